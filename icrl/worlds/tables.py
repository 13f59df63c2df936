"""Tabular tasks as one batch of tensors: checked, sliced, joined, saved, solved, and exchanged with other libraries."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from icrl.checkpoint import checksum
from icrl_kernels import RolloutTables, ValueIteration, rollout_tables, value_iteration

FORMAT, VERSION = "icrl.TabularTasks", "1"
ROW_TOLERANCE = 1e-4  # of a probability row's sum: float32 tables of a thousand entries, and hand-written ones

# field -> (symbols of its shape, dtype)
LAYOUT: dict[str, tuple[str, torch.dtype]] = {
    "transition": ("NSAS", torch.float32),
    "reward": ("NSAS", torch.float32),
    "noise_state": ("NS", torch.float32),
    "noise_action": ("NSA", torch.float32),
    "start": ("NS", torch.float32),
    "terminal": ("NS", torch.bool),
    "max_steps": ("N", torch.int64),
    "state_mapping": ("NS", torch.int64),
    "num_states": ("N", torch.int64),
    "num_actions": ("N", torch.int64),
}


@dataclass(eq=False)
class TabularTasks:
    """N finite Markov decision processes, padded to S states and A actions.

    States are *inner* ones, ordered by the sampler (AnyMDP: by rank); `state_mapping` says what an agent sees. A step
    from s by a leads to s' ~ transition[s, a] with a reward of mean reward[s, a, s'] and of Gaussian noise of deviation
    noise_state[s'] + noise_action[s, a]; it terminates in a terminal s' and is truncated after max_steps steps.

    Attributes:
        transition: [N,S,A,S] float32; rows sum to 1, zero at terminal states and in the padding.
        reward: [N,S,A,S] float32, mean reward of (s, a, s').
        noise_state: [N,S] float32, and noise_action: [N,S,A] float32: the two parts of the standard deviation.
        start: [N,S] float32, probabilities of the first state.
        terminal: [N,S] bool.
        max_steps: [N] int64, steps after which an episode is truncated.
        state_mapping: [N,S] int64, inner → observed id, injective in each task, -1 in the padding.
        num_states, num_actions: [N] int64, each task's own sizes.
        num_observations: observed ids lie in [0, num_observations).
    """

    transition: Tensor
    reward: Tensor
    noise_state: Tensor
    noise_action: Tensor
    start: Tensor
    terminal: Tensor
    max_steps: Tensor
    state_mapping: Tensor
    num_states: Tensor
    num_actions: Tensor
    num_observations: int

    def __len__(self) -> int:
        return self.transition.shape[0]

    def __repr__(self) -> str:
        n, s, a, _ = self.transition.shape
        return f"TabularTasks({n} tasks, {s} states, {a} actions, {self.num_observations} observed ids, {self.device})"

    @property
    def device(self) -> torch.device:
        return self.transition.device

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in LAYOUT}

    def _map(self, f: Any) -> TabularTasks:
        return replace(self, **{name: f(t) for name, t in self.tensors().items()})

    def to(self, device: torch.device | str) -> TabularTasks:
        return self._map(lambda t: t.to(device))

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> TabularTasks:
        """The tasks at `index`, always as a batch: an int gives a batch of one."""
        if isinstance(index, int):
            if not -len(self) <= index < len(self):
                raise IndexError(f"task {index} of {len(self)}")
            index = slice(index % len(self), index % len(self) + 1)
        elif not isinstance(index, (slice, Tensor)):
            index = torch.as_tensor(index, device=self.device)
        return self._map(lambda t: t[index])

    def pad(self, states: int, actions: int) -> TabularTasks:
        """The same tasks in tables of `states` states and `actions` actions, neither fewer than now."""
        _, s, a, _ = self.transition.shape
        if states < s or actions < a:
            raise ValueError(f"states, actions: wanted at least {s}, {a}, got {states}, {actions}")
        if (states, actions) == (s, a):
            return self
        size = {"N": len(self), "S": states, "A": actions}

        def grow(name: str, tensor: Tensor) -> Tensor:
            out = tensor.new_full([size[d] for d in LAYOUT[name][0]], -1 if name == "state_mapping" else 0)
            out[tuple(slice(n) for n in tensor.shape)] = tensor
            return out

        return replace(self, **{name: grow(name, t) for name, t in self.tensors().items()})

    @classmethod
    def concatenate(cls, batches: Sequence[TabularTasks]) -> TabularTasks:
        """All tasks of all batches, padded to the largest; ValueError for none."""
        if not batches:
            raise ValueError("batches: wanted at least one TabularTasks, got none")
        states, actions = (max(b.transition.shape[d] for b in batches) for d in (1, 2))
        padded = [b.pad(states, actions) for b in batches]
        joined = {name: torch.cat([getattr(b, name) for b in padded]) for name in LAYOUT}
        return cls(**joined, num_observations=max(b.num_observations for b in batches))

    # --- checks -------------------------------------------------------------------------------------------------------

    def state_mask(self) -> Tensor:
        """[N,S] bool: states that exist."""
        return torch.arange(self.transition.shape[1], device=self.device) < self.num_states[:, None]

    def action_mask(self) -> Tensor:
        """[N,A] bool: actions that exist."""
        return torch.arange(self.transition.shape[2], device=self.device) < self.num_actions[:, None]

    def validate(self) -> TabularTasks:
        """Return self if every field holds what the class promises, else raise a ValueError that names the field."""
        if self.transition.dim() != 4:
            raise ValueError(f"transition: wanted shape [N, S, A, S], got {list(self.transition.shape)}")
        n, s, a, _ = self.transition.shape
        size = {"N": n, "S": s, "A": a}
        for name, (symbols, dtype) in LAYOUT.items():
            tensor, wanted = getattr(self, name), [size[d] for d in symbols]
            if list(tensor.shape) != wanted:
                raise ValueError(f"{name}: wanted shape [{', '.join(symbols)}] = {wanted}, got {list(tensor.shape)}")
            if tensor.dtype != dtype:
                raise ValueError(f"{name}: wanted dtype {dtype}, got {tensor.dtype}")
            if tensor.device != self.device:
                raise ValueError(f"{name}: is on {tensor.device}, but transition is on {self.device}")
            if dtype == torch.float32 and not tensor.isfinite().all():
                raise ValueError(f"{name}: holds NaN or infinity, first in task {_first(~tensor.isfinite())}")
            if dtype == torch.float32 and name != "reward" and (tensor < 0).any():
                raise ValueError(f"{name}: holds negative entries, first in task {_first(tensor < 0)}")
        for name, most in (("num_states", s), ("num_actions", a)):
            sizes = getattr(self, name)
            if ((sizes < 1) | (sizes > most)).any():
                raise ValueError(f"{name}: wanted 1 to {most}, got {sizes.min().item()} to {sizes.max().item()}")
        if (self.max_steps < 1).any():
            raise ValueError(f"max_steps: wanted at least 1, got {self.max_steps.min().item()}")

        states, actions = self.state_mask(), self.action_mask()
        if (bad := self.terminal & ~states).any():
            raise ValueError(f"terminal: marks padding states, first in task {_first(bad)}")
        rows = self.transition.sum(-1, dtype=torch.float64)
        live = (states & ~self.terminal)[:, :, None] & actions[:, None, :]
        wrong = (rows - live.double()).abs() > ROW_TOLERANCE
        if wrong.any():
            task, state, action = (int(i) for i in wrong.nonzero()[0])
            kind = "a live row must sum to 1" if live[task, state, action] else "terminal and padding rows must be zero"
            raise ValueError(
                f"transition: row ({task}, {state}, {action}) sums to {rows[task, state, action]:.6g}; {kind}"
            )
        if (bad := self.transition.amax((1, 2)) * ~states > 0).any():
            raise ValueError(f"transition: leads to padding states, first in task {_first(bad)}")
        if (bad := (self.start.sum(-1, dtype=torch.float64) - 1).abs() > ROW_TOLERANCE).any():
            raise ValueError(f"start: must sum to 1, does not in task {_first(bad)}")
        if (bad := (self.start > 0) & (self.terminal | ~states)).any():
            raise ValueError(f"start: is positive at a terminal or padding state, first in task {_first(bad)}")

        ids = self.state_mapping
        if (bad := (ids == -1) == states).any() or (ids[states] >= self.num_observations).any() or (ids < -1).any():
            where = _first(bad) if bad.any() else _first((ids >= self.num_observations) | (ids < -1))
            raise ValueError(
                f"state_mapping: wanted ids in [0, {self.num_observations}), -1 in the padding, not so in task {where}"
            )
        if s > 1:
            ordered = ids.sort(-1).values
            if (bad := (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
                raise ValueError(f"state_mapping: two states share an id in task {_first(bad)}")
        return self

    # --- states and observations --------------------------------------------------------------------------------------

    def observe(self, states: Tensor) -> Tensor:
        """Observed ids of inner states [N, ...]."""
        return self.state_mapping.gather(1, states.reshape(len(self), -1)).view_as(states)

    def state_of(self) -> Tensor:
        """[N, num_observations] int64: the inner state behind each observed id, -1 for ids that no state has."""
        inverse = torch.full((len(self), self.num_observations + 1), -1, device=self.device)
        where = self.state_mapping.where(self.state_mapping >= 0, self.num_observations)
        index = torch.arange(where.shape[1], device=self.device).expand_as(where)
        return inverse.scatter_(1, where, index)[:, :-1]

    # --- values -------------------------------------------------------------------------------------------------------

    def expected_reward(self) -> Tensor:
        """r̄[s, a] = Σ_s' transition·reward, [N,S,A] float32 (summed in float64 and rounded once)."""
        n, s, a, _ = self.transition.shape
        out = torch.zeros(n, s, a, device=self.device)
        block = max(1, (1 << 23) // (s * a * s))  # keeps the float64 copies to 64 MB
        for i in range(0, n, block):
            t, r = self.transition[i : i + block].double(), self.reward[i : i + block].double()
            out[i : i + block] = (t * r).sum(-1)
        return out

    def solve(self, discounts: float | Sequence[float] | Tensor, **options: Any) -> ValueIteration:
        """Optimal values at each discount: `icrl_kernels.value_iteration` on these tables.

        Args:
            discounts: γ in [0, 1]: a float; or G of them, a sequence or a tensor [G] or [N,G].
            options: tol, method, backend.
        Returns:
            q [N,G,S,A] float64 (−inf at actions that a task lacks), v, policy [N,G,S], error_bound, iterations [N,G];
            no G for a float.
        """
        if not isinstance(discounts, (float, int, Tensor)):
            discounts = torch.tensor(list(discounts), dtype=torch.float64, device=self.device)
        lacking = ~self.action_mask()
        transition, reward = self.transition, self.reward
        if lacking.any():  # a copy of action 0 changes no value and, coming later, no policy
            absent = lacking[:, None, :, None]
            transition = torch.where(absent, transition[:, :, :1], transition)
            reward = torch.where(absent, reward[:, :, :1], reward)
        found = value_iteration(
            transition, reward, discounts, terminal=self.terminal, num_states=self.num_states, **options
        )
        if lacking.any():
            shape = (len(self), *(1,) * (found.q.dim() - 2), lacking.shape[1])
            found = found._replace(q=found.q.masked_fill(lacking.view(shape), -torch.inf))
        return found

    def tables(self) -> RolloutTables:
        """The simulator's form of these tasks, for `icrl_kernels.rollout` and `rollout_step`."""
        return rollout_tables(**{name: t for name, t in self.tensors().items() if name != "state_mapping"})

    # --- files --------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all."""
        tensors = {name: t.detach().cpu().contiguous() for name, t in self.tensors().items()}
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "num_observations": str(self.num_observations),
            "crc32": str(checksum(tensors)),
        }
        path = Path(path)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            save_file(tensors, partial, metadata=metadata)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> TabularTasks:
        """Read what `save` wrote. FileNotFoundError without the file; ValueError if it is anything else or damaged."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"no task file {os.fspath(path)}")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{os.fspath(path)}: damaged or not a safetensors file ({error})") from error
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{os.fspath(path)}: holds no TabularTasks (format {metadata.get('format')!r})")
        if metadata.get("version") != VERSION:
            raise ValueError(f"{os.fspath(path)}: version {metadata.get('version')!r}, this code reads {VERSION!r}")
        if tensors.keys() != LAYOUT.keys() or metadata.get("crc32") != str(checksum(tensors)):
            raise ValueError(f"{os.fspath(path)}: damaged (its tensors are not those that were saved)")
        return cls(**tensors, num_observations=int(metadata["num_observations"])).validate().to(device)

    # --- other libraries ----------------------------------------------------------------------------------------------

    def to_xenoverse(self, i: int) -> dict[str, Any]:
        """Task i as the dict that xenoverse's AnyMDPEnv.set_task takes (numpy, float64).

        xenoverse demands rows that sum to 1 in float64 to about 1e-8, so the float32 rows are renormalised.
        """
        ns, na = int(self.num_states[i]), int(self.num_actions[i])
        t = self.transition[i, :ns, :na, :ns].double().cpu().numpy()
        mass = t.sum(-1, keepdims=True)
        t = np.divide(t, mass, out=np.zeros_like(t), where=mass > 0)
        start = self.start[i, :ns].double().cpu().numpy()
        s_0 = np.flatnonzero(start)
        noise = self.noise_state[i, None, None, :ns] + self.noise_action[i, :ns, :na, None]
        terminal = self.terminal[i, :ns].cpu().numpy()
        return {
            "ns": self.num_observations,
            "na": na,
            "max_steps": int(self.max_steps[i]),
            "state_mapping": self.state_mapping[i, :ns].cpu().numpy(),
            "task_type": "MDP",
            "transition": t,
            "reward": self.reward[i, :ns, :na, :ns].double().cpu().numpy(),
            "reward_noise": noise.double().cpu().numpy(),
            "s_0": s_0,
            "s_0_prob": start[s_0] / start[s_0].sum(),
            "s_e": np.flatnonzero(terminal).tolist(),
            "final_goal_terminate": bool(terminal[-1]),
        }

    @classmethod
    def from_xenoverse(cls, tasks: dict[str, Any] | Sequence[dict[str, Any]]) -> TabularTasks:
        """From xenoverse's task dict or a list of them (`task_type` "MDP").

        Raises ValueError for partially observed tasks and for reward noise that is not of the form n(s') + n(s, a).
        """
        return cls.concatenate([_from_dict(t) for t in ([tasks] if isinstance(tasks, dict) else tasks)])

    @classmethod
    def from_gymnasium(cls, env: Any, max_steps: int | None = None) -> TabularTasks:
        """From an environment with a table `env.unwrapped.P` (FrozenLake, CliffWalking, Taxi): a batch of one.

        A transition that ends the episode leads to its state where episodes only ever end there; otherwise to an extra
        terminal state appended for it, whose observed id comes after the environment's own.
        The horizon is `max_steps`, else the environment's TimeLimit; ValueError where there is neither.
        """
        table = getattr(env.unwrapped, "P", None)
        if not isinstance(table, dict):
            raise ValueError(f"env: {env} has no transition table env.unwrapped.P")
        spec = getattr(env, "spec", None)
        horizon = max_steps if max_steps is not None else getattr(spec, "max_episode_steps", None)
        if horizon is None:
            raise ValueError("max_steps: the environment has no TimeLimit, so give the horizon")
        ns, na = len(table), len(table[0])
        start = np.asarray(getattr(env.unwrapped, "initial_state_distrib", np.zeros(ns)), dtype=np.float64)
        if not start.any():
            raise ValueError("env: env.unwrapped has no initial_state_distrib")
        edges: list[tuple[int, int, float, int, float, bool]]
        edges = [(s, a, *e) for s, row in table.items() for a, out in row.items() for e in out if e[0] > 0]
        following: dict[int, set[int]] = {s: set() for s in table}
        for s, _, _, s2, _, done in edges:
            if not done:
                following[s].add(s2)
        live: set[int] = set()
        frontier = {int(s) for s in np.flatnonzero(start)}
        while frontier:  # rows that no episode reaches (those of ended states) say nothing about ends
            live |= frontier
            frontier = set().union(*(following[s] for s in frontier)) - live
        ends = {e[3] for e in edges if e[5] and e[0] in live}
        mixed = sorted(ends & live)
        own: dict[int, int] = {s: ns + k for k, s in enumerate(mixed)}
        terminal_states = [own.get(s, s) for s in ends]
        total = ns + len(mixed)
        t, r = np.zeros((total, na, total)), np.zeros((total, na, total))
        for s, a, p, s2, reward, done in edges:
            target = own.get(s2, s2) if done else s2
            t[s, a, target] += p
            r[s, a, target] += p * reward
        r = np.divide(r, t, out=np.zeros_like(r), where=t > 0)
        t[terminal_states], r[terminal_states] = 0, 0
        start = np.pad(start, (0, total - ns))
        terminal = np.zeros(total, dtype=bool)
        terminal[terminal_states] = True
        zeros = np.zeros(total), np.zeros((total, na))
        return _one(t, r, *zeros, start / start.sum(), terminal, int(horizon), np.arange(total), total).validate()


def _first(bad: Tensor) -> int:
    return int(bad.nonzero()[0, 0])


def _one(
    t: Any, r: Any, ns: Any, nsa: Any, start: Any, end: Any, steps: int, ids: Any, observations: int
) -> TabularTasks:
    """A batch of one from arrays in the order of the fields."""
    values = (t, r, ns, nsa, start, end, steps, ids, np.shape(t)[0], np.shape(t)[1])
    made = {
        name: torch.as_tensor(np.asarray(v)).to(dtype)[None]
        for (name, (_, dtype)), v in zip(LAYOUT.items(), values, strict=True)
    }
    return TabularTasks(**made, num_observations=observations)


def _from_dict(task: dict[str, Any]) -> TabularTasks:
    kind = task.get("task_type", "MDP")
    if kind != "MDP":
        raise ValueError(f"task_type: wanted 'MDP', got {kind!r}")
    t, r = np.asarray(task["transition"], dtype=np.float64), np.asarray(task["reward"], dtype=np.float64)
    size = t.shape[0]
    ends = np.asarray(task["s_e"], dtype=np.int64)
    terminal, start = np.zeros(size, dtype=bool), np.zeros(size)
    terminal[ends] = True
    start[np.asarray(task["s_0"], dtype=np.int64)] = task["s_0_prob"]
    noise = np.broadcast_to(np.asarray(task["reward_noise"], dtype=np.float64), t.shape)
    # n(s') + n(s, a): the smallest entry over s' is n(s, a) up to a constant, which belongs to either
    by_action = noise.min(-1)
    by_state = (noise - by_action[..., None]).max((0, 1))
    if not np.allclose(by_state + by_action[..., None], noise, atol=1e-9):
        raise ValueError("reward_noise: is not of the form n(s') + n(s, a)")
    t = np.where(terminal[:, None, None], 0.0, t)
    ids = np.asarray(task["state_mapping"])
    steps = int(np.ceil(task["max_steps"]))
    return _one(t, r, by_state, by_action, start, terminal, steps, ids, int(task["ns"])).validate()


assert list(LAYOUT) == [f.name for f in fields(TabularTasks)][:-1]
