"""What `icrl worlds` does: sample, filter, inspect and draw files of tasks."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from torch import Tensor

from icrl.files import probe, save_numbers, write_figure
from icrl.worlds.filters import quality
from icrl.worlds.kinds import draw_tasks
from icrl.worlds.task_shards import TaskSet, TaskShards, load_tasks, write_tasks

DISCOUNT = 0.994


def _target(out: Path, overwrite: bool) -> None:
    if out.is_file() and not overwrite:
        raise ValueError(f"out: {out} exists; give --overwrite to replace it")
    try:
        probe(out)
    except OSError as e:
        raise ValueError(f"out: {e}") from e


def sample(
    out: Path,
    kind: str,
    num_tasks: int,
    num_states: int,
    num_actions: int,
    branching: int,
    seed: int,
    overwrite: bool,
    json: Path | None = None,
    **tokens: int,
) -> dict[str, Any]:
    _target(out, overwrite)
    tasks = draw_tasks(kind, num_tasks, num_states, num_actions, branching, seed, progress=True, **tokens)
    tasks.save(out)
    size = out.stat().st_size
    numbers = {"out": str(out), "kind": kind, "seed": seed, "tasks": len(tasks), "bytes": size}
    save_numbers(json, numbers)
    print(f"{out}: {tasks}, {size / 2**20:.1f} MB")
    return numbers


def filter_tasks(
    path: Path,
    out: Path,
    min_advantage: float,
    min_gini: float,
    min_entropy: float,
    overwrite: bool,
    json: Path | None = None,
) -> dict[str, Any]:
    _target(out, overwrite)
    tasks = load_tasks(path)
    if int(tasks.num_states.min()) < 2:
        raise ValueError(f"tasks: the filters need two states or more; {path} has bandits")
    q = quality(tasks)
    keep = (q.advantage >= min_advantage) & (q.gini > min_gini) & (q.entropy > min_entropy)
    if not keep.any():
        raise ValueError(f"tasks: none of {len(tasks)} passes; nothing is written")
    tasks[keep].save(out)
    numbers = {"out": str(out), "kept": int(keep.sum()), "of": len(tasks)}
    save_numbers(json, numbers)
    print(f"{out}: {numbers['kept']} of {len(tasks)} tasks kept")
    return numbers


def inspect(path: Path, json: Path | None = None) -> dict[str, Any]:
    tasks = load_tasks(path)
    solved, there = tasks.solve(DISCOUNT), tasks.available_actions()
    successors, reward = tasks.num_successors() * there, tasks.expected_reward().where(there, 0)
    live = (successors > 0).sum((1, 2)).clamp(min=1).double()
    rows: dict[str, Tensor] = {
        "states": tasks.num_states,
        "actions": tasks.num_actions,
        "horizon (steps)": tasks.max_steps,
        "terminal states": tasks.terminal.sum(1),
        "successors of a state and action": successors.sum((1, 2)) / live,
        "mean reward, all states and actions": reward.sum((1, 2)) / live,
        f"optimal value of the start, γ={DISCOUNT}": (solved.v * tasks.start).sum(1),
        "certified error of the values": solved.error_bound,
    }
    if int(tasks.num_states.min()) > 1:
        q = quality(tasks)
        rows |= {"advantage over random": q.advantage, "Gini of visits": q.gini, "entropy of visits": q.entropy}
    found: dict[str, dict[str, float]] = {}
    for name, values in rows.items():
        v = values.double()
        found[name] = {"least": float(v.min()), "median": float(v.median()), "largest": float(v.max())}
    numbers = {"tasks": len(tasks), **found}
    save_numbers(json, numbers)
    print(f"{path}: {tasks}\n")
    print(f"  {'a task':38}{'least':>12}{'median':>12}{'largest':>12}")
    for name, row in found.items():
        print(f"  {name:38}" + "".join(f"{x:12.4g}" for x in row.values()))
    return numbers


def draw(path: Path, out: Path, index: int, json: Path | None = None) -> dict[str, Any]:
    from icrl.worlds.draw import draw_task

    if path.is_dir():
        tasks, place = TaskShards(path).task(index), 0
    else:
        tasks, place = load_tasks(path), index
    if not 0 <= place < len(tasks):
        raise ValueError(f"index: wanted 0 to {len(tasks) - 1}, got {index}")
    write_figure(out, draw_task(tasks, place), dpi=130)
    numbers = {"out": str(out), "index": index}
    save_numbers(json, numbers)
    print(f"picture: {out}")
    return numbers


def shards(
    out: Path, config: TaskSet, num_tasks: int, seed: int, json: Path | None = None, **options: Any
) -> dict[str, Any]:
    from icrl.commands.dataset import report

    begin = time.perf_counter()
    written = write_tasks(out, config, num_tasks, seed, progress=True, unit="task", **options)
    return report(out, written, time.perf_counter() - begin, {"task": 1}, json)


def difficulty(
    out: Path,
    num_tasks: int,
    sizes: tuple[int, ...],
    num_actions: int,
    branching: int,
    seed: int,
    json: Path | None = None,
) -> dict[str, Any]:
    from icrl.worlds.difficulty import compare, draw_difficulty

    numbers = compare(num_tasks, sizes, num_actions, branching, seed)
    save_numbers(json, numbers)
    write_figure(out, draw_difficulty(numbers), dpi=100)
    print("decades of random visits from the least to the most valued state of a task: median (quartiles)")
    for row in numbers["rows"]:
        _, low, middle, high, _ = row["decades_from_least_to_most_valued"]
        print(f"  {row['kind']:8}{row['num_states']:5} states  {middle:+6.2f} ({low:+.2f} to {high:+.2f})")
    print(f"picture: {out}")
    return numbers
