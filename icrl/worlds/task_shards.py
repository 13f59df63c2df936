"""Task sets on disk, for those that one file or one memory would not hold: packed tables in shards (docs/DATA.md)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import icrl_kernels
from icrl.data.shards import SHARD_BYTES, DataSet, Field, ShardReader, Written, write_shards
from icrl.worlds.pomdp import sample_pomdp
from icrl.worlds.samplers import sample_anymdp, sample_bandit, sample_garnet
from icrl.worlds.tasks import TabularTasks
from icrl_kernels.arguments import integer, integer_fields
from icrl_kernels.tabular import packed as packed_tables
from icrl_kernels.tabular.packed import PackedTransition

TASKS = "tabular tasks"
TOKENS = ("num_observations", "observation_tokens", "action_tokens")
WINDOWS = {
    "probability": Field("float32", ("M",), "of the rows' windows, row after row of [N,S,A]"),
    "reward": Field("float32", ("M",), "mean reward of the same transitions"),
    "first": Field("int16", ("N", "S", "A"), "the first successor in a row's window"),
    "length": Field("int16", ("N", "S", "A"), "of the window; 0 ends the episode, or is padding"),
}
REST = {
    "noise_state": Field("float32", ("N", "S"), "of a reward's deviation, by next state"),
    "noise_action": Field("float32", ("N", "S", "A"), "of a reward's deviation, by state and action"),
    "start": Field("float32", ("N", "S"), "probability of the first state"),
    "terminal": Field("bool", ("N", "S"), "whether the episode ends there"),
    "max_steps": Field("int32", ("N",), "after which an episode is truncated"),
    "state_mapping": Field("int16", ("N", "S"), "state to observed id, -1 in the padding"),
    "num_states": Field("int16", ("N",), "of each task, at most S"),
    "num_actions": Field("int16", ("N",), "of each task, at most A"),
}
EMISSION = {"emission": Field("float32", ("N", "K", "S", "O"), "probability of token k being O in a state (pomdp)")}
SOLVED = {
    "policy": Field("int8", ("N", "G", "S"), "optimal action at each discount"),
    "value": Field("float32", ("N", "G", "S"), "optimal value at each discount, rounded from float64"),
    "error_bound": Field("float32", ("N", "G"), "never less than the largest error of the values before rounding"),
}


@dataclasses.dataclass(frozen=True)
class TaskSet:
    """What a task set is made of; `discounts` () leaves the tasks unsolved."""

    kind: str = "anymdp"
    num_states: tuple[int, int] = (16, 16)
    """The fewest and the most; the most is how many observed ids there are."""
    num_actions: int = 5
    branching: int = 2
    """Successors of each state and action (Garnet)."""
    discounts: tuple[float, ...] = ()
    num_observations: int = 64
    """Ids of each token; this and what follows of kind pomdp alone."""
    observation_tokens: int = 1
    action_tokens: int = 1

    def __post_init__(self) -> None:
        integer_fields(self, branching=1, num_observations=1, observation_tokens=1, action_tokens=1)
        if not isinstance(self.num_states, (tuple, list)) or len(self.num_states) != 2:
            raise ValueError(f"num_states: wanted (LOW, HIGH), got {self.num_states!r}")
        low, high = (integer("num_states", size) for size in self.num_states)
        object.__setattr__(self, "num_states", (low, high))
        if not 1 <= low <= high <= 2**15 - 1:
            raise ValueError(f"num_states: wanted 1 <= LOW <= HIGH <= {2**15 - 1}, got {low}, {high}")
        if not 1 <= self.num_actions <= 2**7 - 1:
            raise ValueError(f"num_actions: wanted 1 to {2**7 - 1}, got {self.num_actions}")
        if self.kind not in ("anymdp", "garnet", "bandit", "pomdp"):
            raise ValueError(f"kind: wanted anymdp, garnet, bandit or pomdp, got {self.kind!r}")
        if any(not 0 <= g <= 1 for g in self.discounts):
            raise ValueError(f"discounts: wanted numbers in [0, 1], got {self.discounts}")

    def sample(self, n: int, seed: int, first: int = 0) -> TabularTasks:
        """Tasks `first` to `first + n` of a seed, packed."""
        ids = self.num_states[1]
        of: dict[str, Any] = {"seed": seed, "first": first}
        if self.kind == "bandit":
            tasks = sample_bandit(n, self.num_actions, num_observations=ids, **of)
        elif self.kind == "garnet":
            options: dict[str, Any] = {"num_observations": ids, "packed": True, **of}
            tasks = sample_garnet(n, self.num_states, self.num_actions, self.branching, **options)
        elif self.kind == "pomdp":
            tokens: dict[str, Any] = {name: getattr(self, name) for name in TOKENS}
            tasks = sample_pomdp(n, self.num_states, self.num_actions, packed=True, **tokens, **of)
        else:
            tasks = sample_anymdp(n, self.num_states, self.num_actions, num_observations=ids, packed=True, **of)
        return tasks.pad(ids, self.num_actions).pack()

    def dataset(self, rows: int, seed: int) -> DataSet:
        states = self.num_states[1]
        sizes = {"S": states, "A": self.num_actions, "G": len(self.discounts)}
        config = {"icrl_kernels": icrl_kernels.__version__, **dataclasses.asdict(self)}
        guess = states * self.num_actions * (states // 8 + 4) * 8  # bytes of an AnyMDP task's windows
        fields = {**WINDOWS, **REST, **(SOLVED if self.discounts else {})}
        if self.kind == "pomdp":
            fields |= EMISSION
            sizes |= {"K": self.observation_tokens, "O": self.num_observations}
            guess += 4 * self.observation_tokens * states * self.num_observations
        return DataSet(TASKS, fields, sizes, config, seed, rows, max(1, SHARD_BYTES // guess))


def write_tasks(folder: Path, config: TaskSet, rows: int, seed: int, **options: Any) -> Written:
    """Make the shards that are not there yet: `icrl.data.shards.write_shards`, whose options these are."""
    return write_shards(folder, config.dataset(rows, seed), partial(_make, config, seed), **options)


def _make(config: TaskSet, seed: int, first: int, count: int) -> dict[str, Tensor]:
    tasks = config.sample(count, seed, first)
    assert isinstance(tasks.transition, PackedTransition)
    p, reward = packed_tables.compact(tasks.transition, tasks.reward)
    found = {"probability": p.probability, "reward": reward, "first": p.first, "length": p.length}
    found |= {name: getattr(tasks, name) for name in REST}
    if tasks.emission is not None:
        found["emission"] = tasks.emission
    if config.discounts:
        solved = tasks.solve(config.discounts)
        error = solved.error_bound.float()
        error = torch.where(error < solved.error_bound, error.nextafter(torch.full_like(error, torch.inf)), error)
        found |= {"policy": solved.policy, "value": solved.v, "error_bound": error}
    fields = config.dataset(1, seed).fields
    return {name: t.to(getattr(torch, fields[name].dtype)) for name, t in found.items()}


class TaskShards:
    """The tasks of a folder, shard by shard.

    Raises:
        ValueError: no finished task set, or a damaged shard.
    """

    def __init__(self, folder: Path | str, *, full: bool = False) -> None:
        self.reader = ShardReader(folder, kind=TASKS, full=full)

    def __len__(self) -> int:
        return len(self.reader)

    def shard(self, shard: int) -> TabularTasks:
        found = self.reader.shard(shard)
        length = found["length"].to(torch.int32)
        ends = length.flatten().cumsum(0)
        offset = (ends - length.flatten()).view_as(length)
        transition = PackedTransition(found["probability"], offset, found["first"].to(torch.int32), length)
        rest: dict[str, Any] = {
            name: found[name].long() if found[name].dtype in (torch.int16, torch.int32) else found[name]
            for name in REST
        }
        config = self.reader.dataset.config
        if "emission" in found:
            rest |= {"emission": found["emission"], "action_tokens": config["action_tokens"]}
        ids = config["num_observations"] if "emission" in found else config["num_states"][1]
        return TabularTasks(transition=transition, reward=found["reward"], **rest, num_observations=ids).validate()

    def __iter__(self) -> Iterator[TabularTasks]:
        return (self.shard(i) for i in range(self.reader.dataset.num_shards))

    def task(self, index: int) -> TabularTasks:
        """Task `index`, a batch of one."""
        if not 0 <= index < len(self):
            raise ValueError(f"index: wanted 0 to {len(self) - 1}, got {index}")
        shard, row = divmod(index, self.reader.dataset.rows_per_shard)
        return self.shard(shard)[row]


def load_tasks(path: Path) -> TabularTasks:
    """The tasks of a file, or of all shards of a folder; ValueError where there are none."""
    if path.is_dir():
        return TabularTasks.concatenate(list(TaskShards(path)))
    tasks = TabularTasks.load(path)
    if not len(tasks):
        raise ValueError(f"tasks: {path} holds none")
    return tasks
