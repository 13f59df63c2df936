"""`python -m benches.end_to_end demo|context|difficulty`: the commands of the same name, their numbers kept in benches/results/.

`python -m benches.end_to_end sicql STUDY FOLDER`: a table of S-ICQL and rivals or ablations, runs in FOLDER/STUDY
(resumable); environments with a simulator read FOLDER/data/STUDY, see `icrl collect`.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benches.common import RESULTS, write


@dataclass(frozen=True)
class Study:
    environment: str
    methods: tuple[str, ...]
    seeds: int = 3
    episodes: int = 40
    records: bool = True
    config: dict[str, Any] = field(default_factory=dict)
    """As `icrl eval sicql --config` takes it."""
    runs: str = ""
    """Of another study, to go on with."""


ABLATIONS = ("sicql", "sicql w/o q", "sicql w/o c", "sicql w/o cq")
RIVALS = ("dpt", "ad", "idt", "dicp", "dit", "ic_iql", "sicql")
SHORT = {"loop": {"updates": 1000}, "world_loop": {"updates": 1500}}
SHORTER = {"loop": {"updates": 500}, "world_loop": {"updates": 1000}}
STUDIES = {
    "darkroom": Study("darkroom", RIVALS, records=False),
    "darkroom_ablations": Study("darkroom", ABLATIONS, records=False, runs="darkroom"),
    "stitching": Study("stitching", ("dpt", "ad", "sicql"), episodes=10, records=False),
    "point-robot": Study("point-robot", ABLATIONS, records=False, config=SHORT),
    "point-robot_far": Study(
        "point-robot", ("dpt", "sicql"), seeds=2, records=False, config={**SHORTER, "data": {"split": "far"}}
    ),
    "cheetah-vel": Study("cheetah-vel", ("sicql", "sicql w/o q"), seeds=1, config={"loop": {"updates": 1000}}),
} | {
    name: Study(name, ("dpt", "sicql"), seeds=1, config=SHORTER)
    for name in ("ant-dir", "walker-param", "reach", "push")
}


def main() -> int:
    which = sys.argv[1:]
    if which == ["demo"]:
        from icrl.commands.demo import demo

        numbers = demo(out=RESULTS / "demo.png")
        del numbers["picture"]
        print(write("demo", [], **numbers))
    elif which == ["context"]:
        from icrl.commands.context import context

        print(write("context", [], **context()))
    elif which == ["difficulty"]:
        from icrl.commands.worlds import difficulty
        from icrl.files import write_figure
        from icrl.worlds.draw import draw_task
        from icrl.worlds.samplers import sample_anymdp

        numbers = difficulty(RESULTS / "difficulty.png", 500, (16, 32, 64, 128), 5, 2, seed=0)
        print(write("difficulty", **numbers))
        write_figure(RESULTS / "task.png", draw_task(sample_anymdp(1, 20, seed=3)), dpi=90)
    elif which[:1] == ["sicql"] and len(which) == 3 and which[1] in STUDIES:
        from icrl.offline.suite import suite

        study, folder = STUDIES[which[1]], Path(which[2])
        runs = study.runs or which[1]
        out, data = folder / runs, folder / "data" / runs
        overrides = {**study.config, **({"records": str(data)} if study.records else {})}
        numbers = suite(out, study.environment, [*study.methods], study.seeds, study.episodes, 2, overrides)
        shutil.copy(out / "few_shot.png", RESULTS / f"sicql_{which[1]}.png")
        print(write(f"sicql_{which[1]}", [], **numbers))
    else:
        print(__doc__, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
