"""`python -m benches.end_to_end demo|context|difficulty`: the commands of the same name, their numbers kept in benches/results/.

`python -m benches.end_to_end sicql FOLDER`: DarkRoom's table of seven methods, runs in FOLDER (resumable).
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from benches.common import RESULTS, write


def main() -> int:
    which = sys.argv[1:]
    if which == ["demo"]:
        from icrl.demo import demo

        numbers = demo(out=RESULTS / "demo.png")
        del numbers["picture"]
        print(write("demo", [], **numbers))
    elif which == ["context"]:
        from icrl.context import context

        print(write("context", [], **context(compile=True)))
    elif which == ["difficulty"]:
        from icrl.worlds.commands import difficulty
        from icrl.worlds.draw import draw_task
        from icrl.worlds.samplers import sample_anymdp

        numbers = difficulty(RESULTS / "difficulty.png", 500, (16, 32, 64, 128), 5, 2, seed=0)
        print(write("difficulty", **numbers))
        draw_task(sample_anymdp(1, 20, seed=3)).savefig(RESULTS / "task.png", dpi=90)
    elif which[:1] == ["sicql"] and len(which) == 2:
        from icrl.offline_training import METHODS
        from icrl.sicql.suite import suite

        folder = Path(which[1])
        numbers = suite(folder, "darkroom", list(METHODS), seeds=3, episodes=40, jobs=2, overrides={})
        shutil.copy(folder / "few_shot.png", RESULTS / "sicql_darkroom.png")
        print(write("sicql_darkroom", [], **numbers))
    else:
        print(__doc__, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
