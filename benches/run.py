"""python -m benches.run --op gla --peer torch,sdpa: check an op, time it beside its peers, write the table."""

from __future__ import annotations

import argparse
import importlib

from benches import common


def table(rows: list[dict]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [
        [f"{x:.3g}" if isinstance(x, float) else str(x) for x in (row.get(c, "") for c in columns)] for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    return "\n".join("  ".join(x.rjust(w) for x, w in zip(line, widths, strict=True)) for line in [columns, *cells])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--op", required=True, help="the module benches/<op>.py, whose run(args) returns rows")
    parser.add_argument("--peer", default="torch,sdpa", help="comma-separated")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--sweep", action="store_true", help="also time per token over T")
    parser.add_argument("--name", help="the result's file name; default <op>_<cpu or gpu>")
    args = parser.parse_args()
    rows = importlib.import_module(f"benches.{args.op}").run(args)
    print(table(rows))
    kind = "gpu" if common.machine()["gpu"] else "cpu"
    print(common.write(args.name or f"{args.op}_{kind}", rows))


if __name__ == "__main__":
    main()
