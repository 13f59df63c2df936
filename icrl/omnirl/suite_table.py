"""The suite's results as markdown."""

from __future__ import annotations

from typing import Any

ORDER = ("oracle", "model-based", "q-ucb", "ppo", "random")
"""Of the columns that are no models, which come first."""


def markdown(results: dict[str, Any]) -> str:
    """Three tables of `results.json`'s numbers: performance beside the paper's, sample efficiency, what was unlearned."""
    rows, settings = results["rows"], results["settings"]
    columns = _columns(rows)
    lines = ["# OmniRL's table", ""]
    lines += [
        f"{settings['contexts']} tasks or contexts a row, seed {settings['seed']}. Return per episode, 0 random, 1 oracle, the"
        " mean over tasks ± half a 95 % interval / steps / episodes. Tasks are those that are kept: the oracle beats random, and"
        " its normalised returns have a variance under .3. Performance is the best mean of three windows in a"
        " row; steps and episodes are those until the curve first is, for three windows, within .02 of it. The paper's figures"
        " are its authors', on their tasks.",
        "",
    ]
    paper = list(dict.fromkeys(title for row in rows.values() for title in row["paper"]))
    lines += _table(
        ["", "tasks", *(columns[c] for c in columns if c not in ("random", "oracle")), *(f"paper: {t}" for t in paper)],
        [
            [
                row["title"],
                _tasks(row),
                *(_figure(row["cells"].get(c)) for c in columns if c not in ("random", "oracle")),
                *(_figure(row["paper"].get(t)) for t in paper),
            ]
            for row in rows.values()
        ],
    )
    lines += ["", "## Steps to a level", ""]
    body = []
    for row in rows.values():
        levels = dict.fromkeys(x for cell in row["cells"].values() for x in cell["steps_to"])
        for level in levels:
            cells = (row["cells"].get(c) for c in columns if c not in ("random", "oracle"))
            body.append(
                [f"{row['title']}, {level}", *(_count(None if c is None else c["steps_to"].get(level)) for c in cells)]
            )
    lines += _table(["", *(columns[c] for c in columns if c not in ("random", "oracle"))], body)
    lines += ["", "## The largest fall of a window's mean under the best earlier window's", ""]
    lines += [
        "In bold where some window's 95 % interval lies wholly more than .03 under that mean: the best mean → the fallen one"
        " at its last step.",
        "",
    ]
    lines += _table(
        ["", "windows of", *(columns[c] for c in columns if c not in ("random", "oracle"))],
        [
            [
                row["title"],
                _count(max(c["unlearning"]["window"] for c in row["cells"].values())),
                *(_fall(row["cells"].get(c)) for c in columns if c not in ("random", "oracle")),
            ]
            for row in rows.values()
        ],
    )
    return "\n".join(lines) + "\n"


def _columns(rows: dict[str, Any]) -> dict[str, str]:
    """Titles by column, models first."""
    found = {c: cell["title"] for row in rows.values() for c, cell in row["cells"].items()}
    return {c: found[c] for c in sorted(found, key=lambda c: (ORDER.index(c) if c in ORDER else -1, c))}


def _table(head: list[str], body: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *body)]


def _tasks(row: dict[str, Any]) -> str:
    cell = max(row["cells"].values(), key=lambda c: c["tasks"])
    return f"{cell['tasks']}" + (f" of {cell['drawn']}" if cell["drawn"] > cell["tasks"] else "")


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _count(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value / 1000:.3g}K" if value >= 1000 else f"{value:.3g}"


def _figure(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return ""
    interval = f" ±{cell['performance_ci95']:.3f}" if cell.get("performance_ci95") is not None else ""
    return f"{_share(cell['performance'])}{interval} / {_count(cell['steps'])} / {_count(cell['episodes'])}"


def _fall(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return ""
    fall = cell["unlearning"]
    if not fall["fall"]:
        return "0"
    low = f" ±{fall['low_ci95']:.2f}" if fall["low_ci95"] is not None else ""
    said = f"{fall['best']:.2f} → {fall['mean']:.2f}{low} at {_count(fall['steps'])}"
    return f"**{said}**" if fall["unlearned"] else said
