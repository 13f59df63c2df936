"""`python -m benches.readme`: write the README's tables from benches/results/; `--check` fails where they differ."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from typing import Any

from benches.common import RESULTS

README = RESULTS.parent.parent / "README.md"


def result(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(heads: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(r) + " |" for r in [heads, ["---"] * len(heads), *rows]]
    return "\n".join(lines)


def where(record: dict[str, Any]) -> str:
    m = record["machine"]
    return f"{m['cpu']}, {m['threads']} threads, torch {m['torch']}"


def demo() -> str:
    r = result("demo")
    first, methods = r["anymdp"], r["anymdp"]["methods"]
    begin, end = first["measured_over"]
    heads = [
        f"{first['tasks']} unseen AnyMDP tasks, {first['num_states']} states, 5 actions",
        "reward per step by 500",
        "by 1000",
    ]
    heads += [f"steps {begin}-{end} (mean ± 95%)", "return per episode (IQM ± 95%)"]
    rows = []
    for name in sorted(methods, key=lambda n: -methods[n]["normalized"]):
        m, c = methods[name], first["curves"][name]
        cells = [f"{c['mean'][4]:.2f}", f"{c['mean'][9]:.2f}", f"{m['normalized']:.3f} ± {m['ci95']:.3f}"]
        rows.append([name, *cells, f"{m['episode']:.3f} ± {m['episode_ci95']:.3f}"])
    tasks = r["gymnasium"]
    names = sorted(next(iter(tasks.values())), key=lambda n: -methods[n]["normalized"])
    second = table(
        ["episodes that reach the goal, 32 contexts each", *(f"{t}: by 500 / last quarter" for t in tasks)],
        [
            [n, *(f"{t[n]['by_500']['success']:.2f} / {t[n]['last_quarter']['success']:.2f}" for t in tasks.values())]
            for n in names
        ],
    )
    return table(heads, rows) + "\n\n" + second + f"\n\n{r['seconds']:.0f} s for all of it ({where(r)})."


def context() -> str:
    r = result("context")
    tenths = list(r["normalized_by_tenth"].values())
    rows = [
        ["steps", f"{r['steps']:,}"],
        ["steps per second", f"{r['steps_per_s']:,.0f}"],
        [
            "time per step, last 10K over first 10K (last tenth over first)",
            f"{r['step_time_ratio_10k']:.3f} ({r['step_time_ratio']:.3f})",
        ],
        ["growth of resident memory", f"{r['rss_growth_mb']:.1f} MB; the context is {r['state_bytes']:,} bytes"],
        ["normalised reward per step, first and last tenth", f"{tenths[0]:.2f}, {tenths[-1]:.2f}"],
    ]
    return table([where(r), ""], rows)


TABLES: dict[str, Callable[[], str]] = {
    "demo": demo,
    "context": context,
}


def main() -> int:
    old = new = README.read_text()
    for name, make in TABLES.items():
        block = re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- end -->)", re.S)
        if not block.search(new):
            raise SystemExit(f"README.md has no block <!-- {name} --> ... <!-- end -->")
        text = make()
        new = block.sub(lambda m, text=text: m[1] + text + m[2], new)
    if "--check" in sys.argv:
        return int(old != new)
    README.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
