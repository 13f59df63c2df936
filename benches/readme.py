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


TABLES: dict[str, Callable[[], str]] = {}


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
