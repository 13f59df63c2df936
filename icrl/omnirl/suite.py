"""OmniRL's table (arXiv 2502.02869): models and baselines in every environment of it, beside what its authors report.

A suite's folder holds `suite.json`, its settings, and a file for each row and column, `<row>/<column>.json`: what is there is not
made again. From all that is there are made `results.json`, `table.md` and `curves.png`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from icrl.extras import versions
from icrl.files import locked, save_numbers, write_figure, write_json, write_text
from icrl.omnirl.evaluate import UNSEEN, Reference
from icrl.omnirl.measures import summary, unlearning
from icrl.omnirl.references import measured, measured_in_world
from icrl.omnirl.suite_columns import Column, Limits, baseline_columns, model_column, ppo_column
from icrl.omnirl.suite_rows import PAPER, ROWS, Row
from icrl.omnirl.suite_table import markdown
from icrl.plots import suite_picture
from icrl.reading import read_json, shown
from icrl.training.config import changes
from icrl.training.process import machine
from icrl.worlds.tasks import TabularTasks
from icrl.worlds.vector_world import VectorWorld
from icrl_kernels.arguments import integer

REFERENCE_STEPS = 20_000
DRAWN = 3
"""How many tasks are looked at for each that is wanted: some are not kept."""
COARSE = 500
"""Steps of the windows in which a fall is looked for, where a context is long enough."""


@dataclass(frozen=True)
class SuiteConfig:
    """What the numbers of a suite's folder have in common. ValueError for a number that is out of range."""

    contexts: int = 64
    """Tasks of a row that are kept, or contexts of its one task."""
    steps: int | None = None
    """Of each context, for the rows' own."""
    learner_steps: int | None = None
    """The most that Q-learning and PPO are given; None: each row's own."""
    seed: int = 1

    def __post_init__(self) -> None:
        integer("contexts", self.contexts, 2)
        integer("seed", self.seed, 0, 2**30)
        for name in ("steps", "learner_steps"):
            if (given := getattr(self, name)) is not None:
                integer(name, given, 100)


def run_suite(out: Path, config: SuiteConfig, rows: Sequence[str], columns: Sequence[Column], progress: bool) -> None:
    """Make what the folder lacks of these rows and columns.

    Raises ValueError where the folder is a suite of other settings or holds damaged files, where another process works in it,
    and where a column cannot act in a row: before all work.
    """
    for column in columns:
        for name in rows:
            column.check(ROWS[name])
    with locked(out, wait=False):
        _check_settings(out, config)
        todo = {name: [c for c in columns if c.serves(ROWS[name]) and _cell(out, name, c) is None] for name in rows}
        with tqdm(total=sum(map(len, todo.values())), desc="suite", unit="cell", disable=not progress) as bar:
            for name, some in todo.items():
                if some:
                    _run_row(out, config, name, some, bar)
        collect(out)


def _run_row(out: Path, config: SuiteConfig, name: str, columns: list[Column], bar: Any) -> None:
    row, limits = ROWS[name], Limits(config.steps, config.learner_steps, config.seed)
    world, found, drawn = _world(row, config)
    for column in columns:
        bar.set_postfix_str(f"{row.title}, {column.title}")
        if isinstance(world, TabularTasks):
            acted = world[: column.tasks]
        else:  # each column begins where it begins
            acted = row.make(column.tasks or config.contexts, UNSEEN + config.seed)
        begin = time.perf_counter()
        done = column.run(row, acted, limits, None if bar.disable else f"{row.title}, {column.title}")
        seconds, count = time.perf_counter() - begin, len(done.reward)
        reference = Reference(*(value[:count] for value in vars(found).values()))
        numbers: dict[str, Any] = {
            "title": column.title,
            "identity": _identity(row, column),
            "tasks": count,
            "drawn": drawn,
        }
        numbers |= {"seconds": round(seconds, 1), **summary(done, reference, row.levels)}
        times = max(1, min(COARSE // done.width, done.reward.shape[1] // 4))
        numbers["unlearning"] = unlearning(done.coarser(times), reference)
        numbers |= {"versions": versions("gymnasium", "stable-baselines3"), **machine(column.device)}
        save_numbers(_file(out, name, column), numbers)
        bar.update()
    collect(out)


def _world(row: Row, config: SuiteConfig) -> tuple[TabularTasks | VectorWorld, Reference, int]:
    """Where a row's columns act, its references, and how many tasks were drawn until there were as many that are kept."""
    wanted, seed = config.contexts, UNSEEN + config.seed
    if row.same:
        world = row.make(wanted, seed)
        if isinstance(world, TabularTasks):
            return world, measured(world, REFERENCE_STEPS, same=True).reference, wanted
        others = [made for i in (1, 2) if not isinstance(made := row.make(64, UNSEEN - i), TabularTasks)]
        return world, measured_in_world(others[0], others[1], REFERENCE_STEPS // 10, wanted), wanted
    tasks = row.make(DRAWN * wanted, seed)
    assert isinstance(tasks, TabularTasks)
    found = measured(tasks, REFERENCE_STEPS)
    kept = found.kept.nonzero()[:wanted, 0]
    if len(kept) < wanted:
        raise ValueError(
            f"contexts: {wanted} are wanted, and of {len(tasks)} tasks of {row.title} {len(kept)} are kept"
        )
    reference = Reference(*(value[kept] for value in vars(found.reference).values()))
    return tasks[kept], reference, int(kept[-1]) + 1


# ---- files ---------------------------------------------------------------------------------------------------------------


def _file(out: Path, row: str, column: Column) -> Path:
    folder = out / row
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{column.name}.json"


def _check_settings(out: Path, config: SuiteConfig) -> None:
    path, wanted = out / "suite.json", asdict(config)
    try:
        found = read_json(path, dict)
    except FileNotFoundError:
        write_json(path, wanted)
        return
    if other := changes(found, wanted):
        said = ", ".join(f"{name}: {shown(old)}, wanted {shown(new)}" for name, old, new in other)
        raise ValueError(f"out: {out} holds a suite of other settings ({said}); choose another")


def _identity(row: Row, column: Column) -> dict[str, Any]:
    """What a cell's numbers depend on besides the suite's settings."""
    names = ("steps", "window", "q_steps", "ppo_steps", "q_constants", "levels")
    return {**column.identity, "row": {name: getattr(row, name) for name in names} | {"levels": list(row.levels)}}


def _cell(out: Path, row: str, column: Column) -> dict[str, Any] | None:
    """What the folder holds of a row and column; ValueError where it is of another model, other constants or another row."""
    path = out / row / f"{column.name}.json"
    try:
        found = read_json(path, dict, "{path} is damaged ({why}); delete it to have it made again")
    except FileNotFoundError:
        return None
    _check_cell(path, found)
    if other := changes(found["identity"], _identity(ROWS[row], column)):
        said = ", ".join(f"{name}: {shown(old)}, wanted {shown(new)}" for name, old, new in other)
        raise ValueError(f"out: {path} is of other settings ({said}); delete it, or choose another folder")
    return found


_NUMBER = (int, float, type(None))
_NUMBERS = ("performance", "performance_ci95", "steps", "episodes", "last", "last_ci95")
_FIELDS: dict[str, Any] = {"title": str, "identity": dict, "tasks": int, "drawn": int, "window": int, "steps_to": dict}
_FIELDS |= {"unlearning": dict, "reward": dict, "mean": list, "ci95": list, **dict.fromkeys(_NUMBERS, _NUMBER)}
_FALL: dict[str, Any] = {"window": int, "fall": (int, float), "unlearned": bool}
_FALLEN: dict[str, Any] = dict.fromkeys(("best", "mean", "low_ci95", "steps"), _NUMBER)


def _check_cell(path: Path, found: dict[str, Any]) -> None:
    """ValueError unless a cell's file holds what its tables and picture are made of."""

    def wrong(inside: dict[str, Any], kinds: dict[str, Any]) -> Any:
        return next((name for name, kind in kinds.items() if not isinstance(inside.get(name, wrong), kind)), None)

    name = wrong(found, _FIELDS)
    if name is None:
        fall = found["unlearning"]
        name = wrong(fall, _FALL) or (wrong(fall, _FALLEN) if fall["fall"] else None)
        numbers = [*found["mean"], *found["ci95"], *found["steps_to"].values()]
        if len(found["mean"]) != len(found["ci95"]) or not all(isinstance(x, _NUMBER) for x in numbers):
            name = "mean, ci95, steps_to"
    if name is not None:
        raise ValueError(f"{path} is damaged ({name}: not what was written); delete it to have it made again")


def _name_apart(rows: dict[str, Any]) -> None:
    """Columns of one title, as models that came by several commands may have, are told apart by their files' names."""
    columns: dict[str, set[str]] = {}
    all_cells = [(column, cell) for row in rows.values() for column, cell in row["cells"].items()]
    for column, cell in all_cells:
        columns.setdefault(cell["title"], set()).add(column)
    for column, cell in all_cells:
        if len(columns[cell["title"]]) > 1:
            cell["title"] += f", {column.removeprefix('model-')}"


def collect(out: Path) -> dict[str, Any]:
    """All finished cells of a folder, by row and column, which go to `results.json`, `table.md` and `curves.png` there."""
    rows: dict[str, Any] = {}
    for name, row in ROWS.items():
        cells = {}
        for path in sorted((out / name).glob("*.json")):
            cell = read_json(path, dict, "{path} is damaged ({why}); delete it to have it made again")
            _check_cell(path, cell)
            cells[path.stem] = cell
        if cells:
            paper = {
                title: dict(zip(("performance", "steps", "episodes"), figure, strict=True))
                for title, figure in zip(PAPER, row.paper, strict=True)
                if figure is not None
            }
            rows[name] = {"title": row.title, "states": row.states, "cells": cells, "paper": paper}
    _name_apart(rows)
    results = {"settings": read_json(out / "suite.json", dict), "rows": rows}
    save_numbers(out / "results.json", results)
    if rows:
        write_text(out / "table.md", markdown(results))
        write_figure(out / "curves.png", suite_picture(rows), dpi=110)
    return results


# ---- the command ---------------------------------------------------------------------------------------------------------


def suite(
    out: Path,
    checkpoints: Sequence[Path],
    rows: Sequence[str],
    config: SuiteConfig,
    prompt: int,
    ppo_tasks: int,
    device: torch.device,
    progress: bool = True,
) -> dict[str, Any]:
    """Run, draw and print the suite: `results.json`'s numbers. `rows`: some of ROWS, none for all; `ppo_tasks` 0: no PPO."""
    wanted = list(rows) or list(ROWS)
    if set(wanted) - set(ROWS) or len(set(wanted)) < len(wanted):
        raise ValueError(f"rows: wanted some of {', '.join(ROWS)}, each once, got {', '.join(wanted)}")
    names = [path.stem for path in checkpoints]
    if len(set(names)) < len(names):
        raise ValueError(f"checkpoint: wanted files of different names, got {', '.join(names)}")
    columns = [model_column(path, device, prompt, len(checkpoints) == 1) for path in checkpoints]
    columns += baseline_columns()
    if integer("ppo_tasks", ppo_tasks, 0):
        columns.append(ppo_column(ppo_tasks))
    run_suite(out, config, wanted, columns, progress)
    results = read_json(out / "results.json", dict)
    print((out / "table.md").read_text())
    print(f"numbers: {out / 'results.json'}\ntable: {out / 'table.md'}\npicture: {out / 'curves.png'}")
    return results
