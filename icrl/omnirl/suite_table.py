"""The suite's results as markdown."""

from __future__ import annotations

from typing import Any

BASELINES = ("model-based", "q-ucb", "ppo")
"""Columns that learn and are no models, which come first."""
REFERENCES = ("random", "oracle")


def markdown(results: dict[str, Any]) -> str:
    """Three tables of `results.json`'s numbers: performance beside the paper's, sample efficiency, what was unlearned."""
    rows, settings = results["rows"], results["settings"]
    titles = _learners(rows)
    paper = list(dict.fromkeys(title for row in rows.values() for title in row["paper"]))
    performance, levels, falls = [], [], []
    for row in rows.values():
        cells = [row["cells"].get(c) for c in titles]
        figures = [*cells, *(row["paper"].get(t) for t in paper)]
        performance.append([row["title"], _tasks(row), *map(_figure, figures)])
        for level in dict.fromkeys(x for cell in row["cells"].values() for x in cell["steps_to"]):
            steps = (_count(None if c is None else c["steps_to"].get(level)) for c in cells)
            levels.append([f"{row['title']}, {level}", *steps])
        falls.append([row["title"], *map(_fall, cells)])
    lines = [
        "# OmniRL's table",
        "",
        f"{settings['contexts']} tasks or contexts a row, seed {settings['seed']}. Return per episode, 0 random, 1 oracle: the mean"
        " over tasks ± half a 95 % interval / steps / episodes. Tasks are those that are kept: the oracle beats random, and its"
        " normalised returns have a variance under .3. Performance is the best mean of three windows in a row; steps and episodes"
        " are those until the curve first is, for three windows, within .02 of it. The paper's figures are its authors', on their"
        " tasks.",
        "",
        *_table(["", "tasks", *titles.values(), *(f"paper: {t}" for t in paper)], performance),
        "",
        "## Steps to a level",
        "",
        *_table(["", *titles.values()], levels),
        "",
        "## The largest fall of a window's mean under the best earlier window's",
        "",
        "Windows of 500 steps, or of the curve where those are longer or the context is short: the best mean → the fallen one at"
        " its last step. In bold where some window's 95 % interval lies wholly more than .03 under the best earlier mean.",
        "",
        *_table(["", *titles.values()], falls),
    ]
    return "\n".join(lines) + "\n"


def _learners(rows: dict[str, Any]) -> dict[str, str]:
    """Titles of the columns that learn, models first."""
    found = {c: cell["title"] for row in rows.values() for c, cell in row["cells"].items() if c not in REFERENCES}
    return {c: found[c] for c in sorted(found, key=lambda c: (BASELINES.index(c) if c in BASELINES else -1, c))}


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
