"""Offline data of many tasks: trajectories on end, as every in-context learner here samples them.

Episodes lie one after another, a task's in the order in which they were gathered, so that a learner's progress is a run of
consecutive episodes of one history. States are vectors; actions are numbers of one of `num_actions`, or vectors where that is 0.

The steps' tensors may lie on any device. The index (which steps are an episode, which episodes a task) stays on the CPU, and
so do the numbers of tasks, episodes and steps that are drawn: a seed draws the same batches whatever the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from icrl_kernels.arguments import dense, integer

STEPS = ("states", "actions", "rewards", "next_states", "terminated", "optimal")
"""The tensors that have a row a step."""


@dataclass(eq=False)
class Trajectories:
    """E episodes of N tasks, T steps in all.

    Attributes:
        environment: its name; a world model serves the environment it was trained in.
        num_actions: of a discrete action space; 0 where actions are vectors.
        states, next_states: [T,S] float32. rewards: [T] float32. terminated: [T] bool: next_states has no value of its own.
        actions: [T] int64, or [T,A] float32.
        ends: [E] int64 on the CPU, ascending: episode e is steps ends[e-1] to ends[e]-1.
        tasks: [E] int64 on the CPU, not descending: the task of each episode; every task 0..N-1 has one.
        optimal: [T] int64, an optimal action in `states`, where it is known; else None.
        history: episodes of a learning history, of which each task has whole ones, end to end; 0: one a task.
    """

    environment: str
    num_actions: int
    states: Tensor
    actions: Tensor
    rewards: Tensor
    next_states: Tensor
    terminated: Tensor
    ends: Tensor
    tasks: Tensor
    optimal: Tensor | None = None
    history: int = 0

    def __post_init__(self) -> None:
        """Check every field, and index episodes and tasks. Raises ValueError naming the field."""
        self.num_actions, self.history = integer("num_actions", self.num_actions, 0), integer("history", self.history)
        for name in (*STEPS, "ends", "tasks"):
            if name != "optimal" or self.optimal is not None:
                dense(name, getattr(self, name))
        for name in ("states", "next_states"):
            if getattr(self, name).dim() != 2:
                raise ValueError(f"{name}: wanted shape [T, S], got {list(getattr(self, name).shape)}")
        T = self.states.shape[0]
        self.ends, self.tasks = self.ends.cpu(), self.tasks.cpu()
        shapes = {
            "states": (self.states, (T, self.states.shape[-1]), torch.float32),
            "next_states": (self.next_states, self.states.shape, torch.float32),
            "rewards": (self.rewards, (T,), torch.float32),
            "terminated": (self.terminated, (T,), torch.bool),
            "actions": (self.actions, (T,) if self.num_actions else (T, self.actions.shape[-1]), None),
            "ends": (self.ends, (len(self.ends),), torch.int64),
            "tasks": (self.tasks, (len(self.ends),), torch.int64),
        }
        if self.optimal is not None:
            shapes["optimal"] = (self.optimal, (T,), torch.int64)
        for name, (tensor, shape, dtype) in shapes.items():
            wanted = dtype or (torch.int64 if self.num_actions else torch.float32)
            if tuple(tensor.shape) != tuple(shape) or tensor.dtype != wanted:
                raise ValueError(
                    f"{name}: wanted {list(shape)} of {wanted}, got {list(tensor.shape)} of {tensor.dtype}"
                )
            if name not in ("ends", "tasks") and tensor.device != self.device:
                raise ValueError(f"{name}: wanted the states' device, {self.device}, got {tensor.device}")
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise ValueError(f"{name}: wanted finite numbers, first not so at step {_first(~tensor.isfinite())}")
        lengths = self.ends.diff(prepend=self.ends.new_zeros(1))
        if not len(self.ends) or int(lengths.min()) < 1 or int(self.ends[-1]) != T:
            raise ValueError(
                "ends: wanted episodes of at least one step that end with the data, got "
                + (
                    f"an empty episode {_first(lengths < 1)}"
                    if bool((lengths < 1).any())
                    else f"{len(self.ends)} of them"
                )
            )
        if int(self.tasks[0]) or not bool(((self.tasks.diff() == 0) | (self.tasks.diff() == 1)).all()):
            raise ValueError("tasks: wanted each task's episodes together, tasks in the order 0, 1, 2, ...")
        for name in ("actions", "optimal"):
            a = getattr(self, name)
            if self.num_actions and a is not None and T and not 0 <= int(a.min()) <= int(a.max()) < self.num_actions:
                raise ValueError(f"{name}: wanted 0 to {self.num_actions - 1}, got {int(a.min())} to {int(a.max())}")
        self.lengths = lengths
        self._rarity: Tensor | None = None  # [T+1] cumulative 1 / how often its task was in a step's state
        self.begins = self.ends - lengths
        self.num_tasks = int(self.tasks[-1]) + 1
        count = torch.bincount(self.tasks, minlength=self.num_tasks)
        if self.history < 0 or (self.history and bool((count % self.history).any())):
            raise ValueError(
                f"history: wanted a divisor of every task's number of episodes, got {self.history} and "
                f"{int(count[(count % self.history).argmax()]) if self.history > 0 else int(count.min())} episodes"
            )
        self.episodes = torch.stack(
            [count.cumsum(0) - count, count.cumsum(0)], 1
        )  # [N,2], a task's first and past last
        self.steps = torch.stack([self.begins[self.episodes[:, 0]], self.ends[self.episodes[:, 1] - 1]], 1)

    def __repr__(self) -> str:
        return f"Trajectories({self.environment}: {self.num_tasks} tasks, {len(self.ends)} episodes, {len(self.states)} steps)"

    @property
    def device(self) -> torch.device:
        """Of the steps' tensors."""
        return self.states.device

    def to(self, device: torch.device | str) -> Trajectories:
        """The same data with its steps' tensors on another device; itself where they are there."""
        if torch.device(device) == self.device:
            return self
        moved = copy(self)  # what was checked and counted needs neither a second time
        for name in STEPS:
            if (t := getattr(self, name)) is not None:
                setattr(moved, name, t.to(device))
        return moved

    @property
    def state_size(self) -> int:
        return self.states.shape[1]

    @property
    def action_size(self) -> int:
        """Channels of `action_features`."""
        return self.num_actions or self.actions.shape[1]

    def action_features(self, actions: Tensor) -> Tensor:
        """Actions as a network takes them: one-hot where discrete, as they are where not; float32."""
        return F.one_hot(actions, self.num_actions).float() if self.num_actions else actions

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the states, [S] each; a deviation of 0 counts as 1."""
        std = self.states.std(0, correction=0)
        return self.states.mean(0), torch.where(std > 1e-6, std, 1.0)

    def returns_to_go(self, discount: float) -> Tensor:
        """[T] float32 on the data's device: the discounted rewards from each step to its episode's end."""
        longest, E = int(self.lengths.max()), len(self.ends)
        places = torch.arange(longest, device="cpu") < self.lengths[:, None]
        grid = torch.zeros(E, longest, dtype=torch.float64, device="cpu")
        grid[places] = self.rewards.cpu().double()
        for t in range(longest - 2, -1, -1):
            grid[:, t] += discount * grid[:, t + 1]
        return grid[places].float().to(self.device)

    # --- samples, on the CPU; torch's global generator there draws them, so that a run resumes exactly -------------------

    def draw_tasks(self, batch: int) -> Tensor:
        """[batch] int64 on the CPU, uniformly."""
        return torch.randint(self.num_tasks, (batch,), device="cpu")

    def draw_episodes(self, tasks: Tensor, run: int = 1) -> Tensor:
        """[B] the first of `run` consecutive episodes of one history of each task, uniformly."""
        first, past = self.episodes[tasks].unbind(-1)
        if self.history:
            first = first + self.history * _integers((past - first) // self.history)
            past = first + self.history
        if bool((past - first < run).any()):
            raise ValueError(f"episodes: wanted {run} in a row, a history has {int((past - first).min())}")
        return first + _integers(past - first - run + 1)

    def draw_distinct_episodes(self, tasks: Tensor, count: int) -> Tensor:
        """[B,count] different episodes of each task, in any order."""
        first, past = self.episodes[tasks].unbind(-1)
        if bool((past - first < count).any()):
            raise ValueError(f"episodes: wanted {count} of each task, one has {int((past - first).min())}")
        index = torch.arange(int((past - first).max()), device="cpu")
        chance = torch.rand(len(tasks), len(index), device="cpu", dtype=torch.float32).masked_fill(
            index >= (past - first)[:, None], 2.0
        )
        return first[:, None] + chance.argsort(1)[:, :count]

    def draw_steps(self, tasks: Tensor, each: int, balanced: float = 0.0) -> Tensor:
        """[B,each] steps of each task: uniformly; a share `balanced` of them by state, each that the task has seen alike."""
        first, past = (x[:, None] for x in self.steps[tasks].unbind(-1))
        steps = first + _integers((past - first).expand(-1, each))
        if not balanced:
            return steps
        if self._rarity is None:
            _, state = torch.unique(self.states.cpu(), dim=0, return_inverse=True)
            task = torch.repeat_interleave(
                torch.arange(self.num_tasks, device="cpu"), self.steps[:, 1] - self.steps[:, 0]
            )
            _, pair, count = torch.unique(
                task * (int(state.max()) + 1) + state, return_inverse=True, return_counts=True
            )
            self._rarity = F.pad(count[pair].double().reciprocal().cumsum(0), (1, 0))
        low, high = self._rarity[first], self._rarity[past]
        at = low + (high - low) * torch.rand(len(tasks), each, dtype=torch.float64, device="cpu")
        by_state = torch.searchsorted(self._rarity[1:], at, right=True).clamp(first, past - 1)
        return torch.where(torch.rand(len(tasks), each, device="cpu", dtype=torch.float32) < balanced, by_state, steps)

    def check_length(self, name: str, length: int) -> None:
        """ValueError where an episode has fewer than `length` steps."""
        if length > int(self.lengths.min()):
            raise ValueError(
                f"{name}: wanted at most the shortest episode's {int(self.lengths.min())} steps, got {length}"
            )

    def episode_of(self, steps: Tensor) -> Tensor:
        """The episode of each of `steps` [...], int64 on the CPU."""
        return torch.searchsorted(self.ends, steps, right=True)

    def windows(self, steps: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """The `size` steps of the same episode that end with each of `steps` [...], int64 on the CPU: their indices
        [...,size], and whether there are such steps: an episode's first windows begin before it."""
        begin = self.begins[self.episode_of(steps)]
        index = steps[..., None] + torch.arange(1 - size, 1, device="cpu")
        return index.clamp_min(0), index >= begin[..., None]

    def reorder(self, episodes: Tensor, tasks: Tensor) -> Trajectories:
        """The episodes [E'] of these numbers, as tasks [E']: whole histories, where the data has several a task."""
        steps = torch.cat(
            [
                torch.arange(b, e, device="cpu")
                for b, e in zip(self.begins[episodes].tolist(), self.ends[episodes].tolist(), strict=True)
            ]
        )
        steps = steps.to(self.device)
        part = {name: None if (t := getattr(self, name)) is None else t[steps] for name in STEPS}
        return replace(self, **part, ends=self.lengths[episodes].cumsum(0), tasks=tasks)

    def tasks_slice(self, first: int, count: int) -> Trajectories:
        """Tasks first to first+count-1, numbered from 0."""
        episodes = torch.arange(int(self.episodes[first, 0]), int(self.episodes[first + count - 1, 1]), device="cpu")
        return self.reorder(episodes, self.tasks[episodes] - first)

    # --- joining ---------------------------------------------------------------------------------------------------------

    @classmethod
    def concatenate(cls, parts: Sequence[Trajectories]) -> Trajectories:
        """All tasks of all parts, one part's after another's. Raises ValueError for none, or for spaces that differ."""
        if not parts:
            raise ValueError("parts: wanted at least one, got none")
        first = parts[0]
        for p in parts:
            for name in ("environment", "num_actions", "state_size", "action_size", "history"):
                if getattr(p, name) != getattr(first, name):
                    raise ValueError(
                        f"{name}: tasks of one data set must share it, got {getattr(first, name)!r} and {getattr(p, name)!r}"
                    )
        joined: dict[str, Any] = {
            name: torch.cat([getattr(p, name) for p in parts])
            for name in ("states", "actions", "rewards", "next_states", "terminated")
        }
        if all(p.optimal is not None for p in parts):
            joined["optimal"] = torch.cat([p.optimal for p in parts if p.optimal is not None])
        steps, tasks = 0, 0
        ends, whose = [], []
        for p in parts:
            ends.append(p.ends + steps)
            whose.append(p.tasks + tasks)
            steps, tasks = steps + len(p.states), tasks + p.num_tasks
        return replace(first, **{"optimal": None, **joined}, ends=torch.cat(ends), tasks=torch.cat(whose))


def _integers(below: Tensor) -> Tensor:
    """Uniform in [0, below)."""
    return (torch.rand(below.shape, dtype=torch.float64, device="cpu") * below).long().clamp_max_(below - 1)


def _first(bad: Tensor) -> int:
    return int(bad.nonzero()[0, 0])
