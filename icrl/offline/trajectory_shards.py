"""Offline trajectories on disk: shards of whole tasks (`icrl.data.shards`), in the order of their tasks.

A row is a task. Its steps and episodes lie end to end in tensors of a shard's own length, so that episodes may differ:
`steps` and `episodes` say how many each task has, `lengths` how long each episode is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from icrl.data.shards import INDEX, DataSet, Field, ShardReader, Written, shard_path, write_shards
from icrl.offline.trajectories import STEPS, Trajectories

KIND = "trajectories"


@dataclass(frozen=True)
class TaskByTask:
    """Trajectories that are yet to be gathered, some tasks at a time: what is known of them before, and the function that gathers them."""

    environment: str
    num_actions: int
    state_size: int
    action_size: int
    num_tasks: int
    tasks_slice: Callable[[int, int], Trajectories]
    """Gathers tasks first to first+count-1, numbered from 0: a function of (first, count) alone."""
    history: int = 0
    """Episodes a learning history, as in `Trajectories`."""
    optimal: None = None
    """Optimal actions are not known."""


def trajectories_dataset(
    data: Trajectories | TaskByTask, config: dict[str, Any], seed: int, rows_per_shard: int
) -> DataSet:
    """The data set of these trajectories; `config`, plain JSON values, says what made them."""
    number = "int16" if data.num_actions < 2**15 else "int64"
    action = (number, ("T",)) if data.num_actions else ("float32", ("T", "A"))
    fields = {
        "steps": Field("int64", ("N",), "of each task"),
        "episodes": Field("int64", ("N",), "of each task"),
        "lengths": Field("int64", ("E",), "steps of each episode"),
        "states": Field("float32", ("T", "S"), "before the action"),
        "actions": Field(*action, "the behaviour's"),
        "rewards": Field("float32", ("T",), "of the action"),
        "next_states": Field("float32", ("T", "S"), "after it"),
        "terminated": Field("bool", ("T",), "whether the next state has no value of its own"),
    }
    if data.optimal is not None:
        fields["optimal"] = Field(number, ("T",), "an optimal action in the state")
    sizes = {"S": data.state_size, "A": data.action_size}
    made = {
        "environment": data.environment,
        "num_actions": data.num_actions,
        "episodes_a_history": data.history,
        **config,
    }
    return DataSet(KIND, fields, sizes, made, seed, data.num_tasks, rows_per_shard)


def write_trajectories(
    folder: Path,
    data: Trajectories | TaskByTask,
    config: dict[str, Any],
    seed: int,
    rows_per_shard: int | None = None,
    **options: Any,
) -> Written:
    """Write what is not there yet: `icrl.data.shards.write_shards`, whose options these are.

    16 tasks a shard unless given; 1 where tasks are gathered one by one, so that a kill costs one task's work.
    """
    if rows_per_shard is None:
        rows_per_shard = 1 if isinstance(data, TaskByTask) else 16
    dataset = trajectories_dataset(data, config, seed, rows_per_shard)

    def make(first: int, count: int) -> dict[str, Tensor]:
        part = data.tasks_slice(first, count)
        tensors = {name: t for name in STEPS if (t := getattr(part, name)) is not None}
        tensors["steps"] = part.steps[:, 1] - part.steps[:, 0]
        tensors["episodes"] = part.episodes[:, 1] - part.episodes[:, 0]
        tensors["lengths"] = part.lengths
        return {name: t.to(getattr(torch, dataset.fields[name].dtype)) for name, t in tensors.items()}

    return write_shards(folder, dataset, make, unit="task", **options)


def read_trajectories(folder: Path) -> Trajectories:
    """All tasks of a finished data set. Raises ValueError where there is none, or a shard is missing or damaged."""
    reader = ShardReader(folder, kind=KIND, full=True)
    facts = {"episodes_a_history": 0, **reader.dataset.config}
    for name, kind in {"environment": str, "num_actions": int, "episodes_a_history": int}.items():
        if type(facts.get(name)) is not kind:
            raise ValueError(f"{folder / INDEX}: damaged ({name}: wanted {kind.__name__})")
    if lacking := {*STEPS, "episodes", "lengths"} - {"optimal"} - reader.dataset.fields.keys():
        raise ValueError(f"{folder / INDEX}: damaged (it lacks {min(lacking)})")
    parts = []
    for i in range(reader.dataset.num_shards):
        t = reader.shard(i)
        steps = {name: t[name].long() if t[name].dtype == torch.int16 else t[name] for name in STEPS if name in t}
        try:
            tasks = torch.arange(len(t["episodes"]), device="cpu").repeat_interleave(t["episodes"])
            parts.append(
                Trajectories(
                    facts["environment"],
                    facts["num_actions"],
                    **steps,
                    ends=t["lengths"].cumsum(0),
                    tasks=tasks,
                    history=facts["episodes_a_history"],
                )
            )
        except (ValueError, RuntimeError) as e:
            raise ValueError(f"{shard_path(folder, i)}: {e}") from e
    return Trajectories.concatenate(parts)
