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
from icrl.omnirl.measures import Windows, summary, unlearning
from icrl.omnirl.references import Measured, measured, measured_in_world
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
COARSE = 500
"""Steps of the windows in which a fall is looked for, where a context is long enough."""


@dataclass(frozen=True)
class SuiteConfig:
    """What the numbers of a suite's folder have in common. ValueError for a number that is out of range."""

    contexts: int = 64
    """Tasks of a row, or contexts of its one task."""
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
        todo = {name: [c for c in columns if _cell(out, name, c) is None] for name in rows}
        todo = {name: [c for c in some if c.name != "ppo" or ROWS[name].ppo_steps] for name, some in todo.items()}
        with tqdm(total=sum(map(len, todo.values())), desc="suite", unit="cell", disable=not progress) as bar:
            for name, some in todo.items():
                if some:
                    _run_row(out, config, name, some, bar)
        collect(out)


def _run_row(out: Path, config: SuiteConfig, name: str, columns: list[Column], bar: Any) -> None:
    row, limits = ROWS[name], Limits(config.steps, config.learner_steps, config.seed)
    world = row.make(config.contexts, UNSEEN + config.seed)
    found = _references(row, world, config)
    for column in columns:
        bar.set_postfix_str(f"{row.title}, {column.title}")
        begin, chosen = time.perf_counter(), slice(None)
        if not isinstance(world, TabularTasks):
            acted = row.make(config.contexts, UNSEEN + config.seed)  # each column begins where it begins
        elif column.tasks is None:
            acted = world
        else:
            chosen = found.kept.nonzero()[: column.tasks, 0]
            acted = world[chosen]
        done = column.run(row, acted, limits, f"{row.title}, {column.title}")
        seconds = time.perf_counter() - begin
        reference = Reference(*(getattr(found.reference, f)[chosen] for f in vars(found.reference)))
        kept = found.kept[chosen]
        if isinstance(world, TabularTasks) or column.tasks is None:
            done, reference = _only(done, reference, kept)
        else:  # the tasks of an environment without a table are alike
            reference = Reference(*(getattr(reference, f)[: done.reward.shape[0]] for f in vars(reference)))
        numbers: dict[str, Any] = {
            "row": name,
            "title": column.title,
            "identity": column.identity,
            "tasks": len(kept) if column.tasks is None else done.reward.shape[0],
            "kept": done.reward.shape[0],
            "seconds": round(seconds, 1),
            **summary(done, reference, row.levels),
        }
        times = max(1, min(COARSE // done.width, done.reward.shape[1] // 4))
        numbers["unlearning"] = unlearning(done.coarser(times), reference)
        device = torch.device("cpu") if not isinstance(world, TabularTasks) else world.device
        numbers |= {"versions": versions("gymnasium", "stable-baselines3"), **machine(device)}
        save_numbers(_file(out, name, column), numbers)
        bar.update()
    collect(out)


def _references(row: Row, world: TabularTasks | VectorWorld, config: SuiteConfig) -> Measured:
    if isinstance(world, TabularTasks):
        found = measured(world, REFERENCE_STEPS, row.same)
    else:
        worlds = [made for i in (1, 2) if not isinstance(made := row.make(64, UNSEEN - i), TabularTasks)]
        found = measured_in_world(worlds[0], worlds[1], 2_000, config.contexts)
    if (kept := int(found.kept.sum())) < 2:
        raise ValueError(f"contexts: wanted more, of {config.contexts} tasks of {row.title} {kept} are kept")
    return found


def _only(found: Windows, reference: Reference, kept: torch.Tensor) -> tuple[Windows, Reference]:
    """Those of the tasks that are kept."""
    some = Windows(found.width, found.returns[kept], found.episodes[kept], found.reward[kept])
    return some, Reference(*(getattr(reference, f)[kept] for f in vars(reference)))


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


def _cell(out: Path, row: str, column: Column) -> dict[str, Any] | None:
    """What the folder holds of a row and column; ValueError where it is of another model or other constants."""
    path = out / row / f"{column.name}.json"
    try:
        found = read_json(path, dict, "{path} is damaged ({why}); delete it to have it made again")
    except FileNotFoundError:
        return None
    _check_cell(path, found)
    if other := changes(found["identity"], column.identity):
        said = ", ".join(f"{name}: {shown(old)}, wanted {shown(new)}" for name, old, new in other)
        raise ValueError(f"out: {path} is of other settings ({said}); delete it, or choose another folder")
    return found


_NUMBER = (int, float, type(None))
_FIELDS = {
    "title": str,
    "identity": dict,
    "kept": int,
    "tasks": int,
    "steps_to": dict,
    "unlearning": dict,
    "reward": dict,
    "mean": list,
}
_FIELDS |= {"ci95": list, "window": int} | dict.fromkeys(
    ("performance", "performance_ci95", "steps", "episodes", "last", "last_ci95"), _NUMBER
)


def _check_cell(path: Path, found: dict[str, Any]) -> None:
    for name, kinds in _FIELDS.items():
        if name not in found or not isinstance(found[name], kinds):
            raise ValueError(f"{path} is damaged ({name}: {shown(found.get(name))}); delete it to have it made again")


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
