"""Tabular tasks as one batch of tensors: checked, sliced, joined, saved, solved, and exchanged with other libraries."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from icrl.files import write_bytes
from icrl.reading import TensorFile, check_seal, sealed, shown
from icrl.worlds import conversions
from icrl_kernels import RolloutTables, ValueIteration, rollout_tables, value_iteration
from icrl_kernels.arguments import INT64, dense, every_state_acts, integer, number
from icrl_kernels.tabular import counter_rng
from icrl_kernels.tabular import packed as packed_tables
from icrl_kernels.tabular.emission import draw_tokens
from icrl_kernels.tabular.packed import PackedTransition, pack_transition

FORMAT, VERSION = "icrl.TabularTasks", "2"  # version 1 had dense tables only and is still read
EMISSIONS = 5  # stream of the tokens seen; samplers use those before
ROW_TOLERANCE = 1e-4  # of a probability row's sum: float32 tables of a thousand entries, and hand-written ones

# field -> (symbols of its shape, dtype); a packed transition is four tensors, and its reward is [M]
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
OPTIONAL: dict[str, tuple[str, torch.dtype]] = {
    "emission": ("NKSO", torch.float32),
    "action_mask": ("NSA", torch.bool),
}  # fields that may be None, and that old files lack
PARTS = tuple(f"transition.{name}" for name in PackedTransition._fields)  # their names in files


@dataclass(eq=False)
class TabularTasks:
    """N finite Markov decision processes, padded to S states and A actions.

    States are *inner* ones, ordered by the sampler (AnyMDP: by rank); `state_mapping` says what an agent sees. A step
    from s by a leads to s' ~ transition[s, a] with a reward of mean reward[s, a, s'] and of Gaussian noise of deviation
    noise_state[s'] + noise_action[s, a]; it terminates in a terminal s' and is truncated after max_steps steps.

    The tables are *dense* or *packed*: windows of the rows' successors, for batches that would not fit otherwise. All
    methods take both forms and keep to the size of the one they are given; `dense()` and `pack()` convert.

    With `emission`, an agent sees K tokens instead of a state's id, each drawn on its own in every state that it comes
    to (K = 1: a POMDP). With action_tokens = D > 1, a step of the environment is D actions, each one a step as above;
    their rewards are summed, those after a terminal state are not taken, and max_steps counts the environment's steps.

    Attributes:
        transition: [N,S,A,S] float32, or a PackedTransition of N, S, A with float32 probabilities; rows sum to 1, and
            are zero at terminal states and in the padding. Windows stay within a task's own states.
        reward: [N,S,A,S] float32, mean reward of (s, a, s'); packed, [M] as the probabilities are.
        noise_state: [N,S] float32, and noise_action: [N,S,A] float32: the two parts of the standard deviation.
        start: [N,S] float32, probabilities of the first state.
        terminal: [N,S] bool.
        max_steps: [N] int64, steps after which an episode is truncated.
        state_mapping: [N,S] int64, inner → observed id, injective in each task, -1 in the padding. With `emission` no
            agent sees it, and num_observations is no bound on it.
        num_states, num_actions: [N] int64, each task's own sizes.
        num_observations: observed ids lie in [0, num_observations).
        emission: [N,K,S,O] float32, O = num_observations, probabilities of token k in state s (terminal ones too);
            zero in the padding. None: the state's id is observed.
        action_tokens: actions in a step of the environment.
        action_mask: [N,S,A] bool, True where the state has the action; what the tables hold for the others is of no
            account. Not read at terminal states, in the padding, and beyond a task's own actions. None: every state has
            all of its task's actions.
    """

    transition: Tensor | PackedTransition
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
    emission: Tensor | None = None
    action_tokens: int = 1
    action_mask: Tensor | None = None

    def __len__(self) -> int:
        return self.noise_action.shape[0]

    def __repr__(self) -> str:
        n, s, a = self.shape
        tokens = f", {self.observation_tokens} observation and {self.action_tokens} action tokens" * self.multi_token
        form = ", packed" * self.packed
        return (
            f"TabularTasks({n} tasks, {s} states, {a} actions, {self.num_observations} observed ids{tokens}{form}, "
            f"{self.device})"
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(N, S, A)."""
        n, s, a = self.noise_action.shape
        return n, s, a

    @property
    def device(self) -> torch.device:
        return self.noise_action.device

    @property
    def packed(self) -> bool:
        """Whether the tables are packed_tables."""
        return isinstance(self.transition, PackedTransition)

    @property
    def observation_tokens(self) -> int:
        """K, or 1 where the state's id is observed."""
        return 1 if self.emission is None else self.emission.shape[1]

    @property
    def multi_token(self) -> bool:
        return self.observation_tokens > 1 or self.action_tokens > 1

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its field's name; of a packed transition "transition.probability" and so on."""
        named = {name: getattr(self, name) for name in LAYOUT}
        if isinstance(self.transition, PackedTransition):
            del named["transition"]
            named = dict(zip(PARTS, self.transition, strict=True)) | named
        more = {name: getattr(self, name) for name in OPTIONAL}
        return named | {name: t for name, t in more.items() if t is not None}

    def _replaced(self, tensors: dict[str, Tensor], **changes: Any) -> TabularTasks:
        """With these tensors, named as `tensors()` names them."""
        return replace(self, **_fields(tensors), **changes)

    def _rows(self, f: Callable[[str, Tensor], Tensor]) -> dict[str, Tensor]:
        """f of each name and tensor that has a dimension N, the dense tables among them, the windows not."""
        skip = {*PARTS, "reward"} if self.packed else {}
        return {name: f(name, t) for name, t in self.tensors().items() if name not in skip}

    def to(self, device: torch.device | str) -> TabularTasks:
        return self._replaced({name: t.to(device) for name, t in self.tensors().items()})

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> TabularTasks:
        """The tasks at `index`, always as a batch: an int gives a batch of one.

        Of a packed batch that leaves tasks behind, the entries are copied: nothing of the others is kept alive.
        """
        if not isinstance(index, slice):
            if np.ndim(index):  # pyright: ignore[reportArgumentType] (of a tensor too)
                chosen = index if isinstance(index, Tensor) else torch.from_numpy(np.array(index))
                if chosen.numel() and (chosen.is_floating_point() or chosen.is_complex()):  # [] is an array of floats
                    raise ValueError(f"index: wanted integers, got {chosen.dtype}")
                if chosen.dim() != 1:
                    raise ValueError(f"index: wanted a list of tasks, got shape {list(chosen.shape)}")
                chosen = chosen if chosen.dtype == torch.bool else chosen.long()  # torch takes uint8 for bool
                index = chosen.to(self.device)
            else:
                i = integer("index", index)
                if not -len(self) <= i < len(self):
                    raise IndexError(f"task {i} of {len(self)}")
                index = slice(i % len(self), i % len(self) + 1)
        rest = self._replaced(self._rows(lambda _, t: t[index]))
        if not isinstance(self.transition, PackedTransition):
            return rest
        chosen = torch.arange(len(self), device=self.device)[index]
        transition, reward = packed_tables.take(self.transition, self.reward, chosen)
        return replace(rest, transition=transition, reward=reward)

    def pack(self) -> TabularTasks:
        """The same tasks as windows; rewards of transitions that cannot happen are dropped. Self if packed."""
        if isinstance(self.transition, PackedTransition):
            return self
        transition, reward = pack_transition(self.transition, self.reward)
        return replace(self, transition=transition, reward=reward)

    def dense(self) -> TabularTasks:
        """The same tasks in dense tables [N,S,A,S], zero outside the packed_tables. Self if dense."""
        transition, reward = self.dense_tables()
        return replace(self, transition=transition, reward=reward) if self.packed else self

    def dense_tables(self) -> tuple[Tensor, Tensor]:
        """transition and reward [N,S,A,S], whichever form the batch has."""
        if isinstance(self.transition, PackedTransition):
            return packed_tables.unpack(self.transition, self.reward)
        return self.transition, self.reward

    def pad(self, states: int, actions: int) -> TabularTasks:
        """The same tasks in tables of `states` states and `actions` actions, neither fewer than now."""
        n, s, a = self.shape
        states, actions = integer("states", states), integer("actions", actions)
        if states < s or actions < a:
            raise ValueError(f"states, actions: wanted at least {s}, {a}, got {states}, {actions}")
        if (states, actions) == (s, a):
            return self
        size = {"N": n, "S": states, "A": actions}
        if self.emission is not None:
            size |= {"K": self.emission.shape[1], "O": self.emission.shape[3]}

        def grow(name: str, tensor: Tensor) -> Tensor:
            symbols = (LAYOUT | OPTIONAL)[name][0]
            out = tensor.new_full([size[d] for d in symbols], -1 if name == "state_mapping" else 0)
            out[tuple(slice(n) for n in tensor.shape)] = tensor
            return out

        rest = self._replaced(self._rows(grow))
        if not isinstance(self.transition, PackedTransition):
            return rest
        return replace(rest, transition=packed_tables.pad(self.transition, states, actions))

    @classmethod
    def concatenate(cls, batches: Sequence[TabularTasks]) -> TabularTasks:
        """All tasks of all batches, padded to the largest; packed if any of them is.

        ValueError for none, or for batches of unlike tokens.
        """
        if not batches:
            raise ValueError("batches: wanted at least one TabularTasks, got none")
        for i, batch in enumerate(batches):
            if not isinstance(batch, TabularTasks):
                raise ValueError(f"batches[{i}]: wanted TabularTasks, got {type(batch).__name__}")
        tokens = [(b.emission is not None, b.observation_tokens, b.action_tokens) for b in batches]
        if len(set(tokens)) > 1:
            raise ValueError(
                "batches: wanted the same (partially observed, observation tokens, action tokens) in all, got "
                + ", ".join(map(str, sorted(set(tokens))))
            )
        if any(b.packed for b in batches):
            batches = [b.pack() for b in batches]
        states, actions = (max(b.shape[d] for b in batches) for d in (1, 2))
        ids = max(b.num_observations for b in batches)
        padded = [b.pad(states, actions) for b in batches]
        if any(b.action_mask is not None for b in padded):
            padded = [replace(b, action_mask=b.available_actions()) for b in padded]
        parts = [b._rows(lambda _, t: t) for b in padded]
        if tokens[0][0]:
            for p in parts:
                p["emission"] = torch.nn.functional.pad(p["emission"], (0, ids - p["emission"].shape[3]))
        joined = _fields({name: torch.cat([p[name] for p in parts]) for name in parts[0]})
        if padded[0].packed:
            joined["transition"] = packed_tables.concatenate(
                [b.transition for b in padded if isinstance(b.transition, PackedTransition)]
            )
            joined["reward"] = torch.cat([b.reward for b in padded])
        return cls(**joined, num_observations=ids, action_tokens=batches[0].action_tokens)

    # --- checks -------------------------------------------------------------------------------------------------------

    def state_mask(self) -> Tensor:
        """[N,S] bool: states that exist."""
        return torch.arange(self.shape[1], device=self.device) < self.num_states[:, None]

    def available_actions(self) -> Tensor:
        """[N,S,A] bool: the task's own actions, less those that the state lacks by `action_mask`."""
        own = torch.arange(self.shape[2], device=self.device) < self.num_actions[:, None]
        return own[:, None].expand(self.shape) if self.action_mask is None else own[:, None] & self.action_mask

    def validate(self) -> TabularTasks:
        """Return self if every field holds what the class promises, else raise a ValueError that names the field."""
        size = self._check_shapes()
        for name, t in self.tensors().items():
            if t.dtype != torch.float32:
                continue
            bad = ~t.isfinite()
            if bad.any() and (where := self._first(bad)) is not None:
                raise ValueError(f"{_field(name)}: holds NaN or infinity, first in task {where}")
            if name != "reward" and (bad := t < 0).any() and (where := self._first(bad)) is not None:
                raise ValueError(f"{_field(name)}: holds negative entries, first in task {where}")
        for name, most in (("num_states", size["S"]), ("num_actions", size["A"])):
            sizes = getattr(self, name)
            if ((sizes < 1) | (sizes > most)).any():
                raise ValueError(f"{name}: wanted 1 to {most}, got {sizes.min().item()} to {sizes.max().item()}")
        if (self.max_steps < 1).any():
            raise ValueError(f"max_steps: wanted at least 1, got {self.max_steps.min().item()}")

        states = self.state_mask()
        if (bad := self.terminal & ~states).any():
            raise ValueError(f"terminal: marks padding states, first in task {_task(bad)}")
        if self.action_mask is not None:
            if self.action_tokens != 1:  # what is open to the second token is known once the first is done
                raise ValueError(f"action_mask: wanted tasks of one action token, got {self.action_tokens}")
            every_state_acts(states & ~self.terminal & ~self.available_actions().any(-1))
        self._check_rows(states)
        if (bad := (self.start.sum(-1, dtype=torch.float64) - 1).abs() > ROW_TOLERANCE).any():
            raise ValueError(f"start: must sum to 1, does not in task {_task(bad)}")
        if (bad := (self.start > 0) & (self.terminal | ~states)).any():
            raise ValueError(f"start: is positive at a terminal or padding state, first in task {_task(bad)}")

        ids, most = self.state_mapping, self.num_observations
        if self.emission is not None:
            most = torch.iinfo(torch.int64).max
            wrong = (self.emission.sum(-1, dtype=torch.float64) - states[:, None].double()).abs() > ROW_TOLERANCE
            if wrong.any():
                raise ValueError(
                    "emission: wanted rows that sum to 1, zero in the padding, not so in (task, token, state) "
                    f"{tuple(wrong.nonzero()[0].tolist())}"
                )
        if (bad := ((ids == -1) == states) | (ids >= most) | (ids < -1)).any():
            raise ValueError(
                f"state_mapping: wanted ids in [0, {most}), -1 in the padding, not so in task {_task(bad)}"
            )
        if size["S"] > 1:
            ordered = ids.sort(-1).values
            if (bad := (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
                raise ValueError(f"state_mapping: two states share an id in task {_task(bad)}")
        return self

    def _check_shapes(self) -> dict[str, int]:
        """Shapes, dtypes, devices, tokens; the sizes by their symbols."""
        layout = dict(LAYOUT)
        if isinstance(self.transition, PackedTransition):
            if self.transition.probability.dtype != torch.float32:
                raise ValueError(f"transition: wanted dtype torch.float32, got {self.transition.probability.dtype}")
            self.transition.check()
            layout["reward"] = "M", torch.float32
            size = dict(zip("NSA", self.transition.offset.shape, strict=True))
            size["M"], device = len(self.transition.probability), self.transition.probability.device
        else:
            dense("transition", self.transition)
            if self.transition.dim() != 4:
                raise ValueError(f"transition: wanted shape [N, S, A, S], got {list(self.transition.shape)}")
            size, device = dict(zip("NSA", self.transition.shape, strict=False)), self.transition.device
        if self.emission is not None:
            dense("emission", self.emission)
            if self.emission.dim() != 4 or not self.emission.shape[1]:
                raise ValueError(
                    f"emission: wanted shape [N, K, S, O] with a token or more, got {list(self.emission.shape)}"
                )
            size |= {"K": self.emission.shape[1], "O": self.num_observations}
        layout |= {name: OPTIONAL[name] for name in OPTIONAL if getattr(self, name) is not None}
        self.num_observations = integer("num_observations", self.num_observations, 1)
        self.action_tokens = integer("action_tokens", self.action_tokens, 1)
        for name, (symbols, dtype) in layout.items():
            tensor, wanted = getattr(self, name), [size[d] for d in symbols]
            if isinstance(tensor, PackedTransition):
                continue
            dense(name, tensor)
            if list(tensor.shape) != wanted:
                raise ValueError(f"{name}: wanted shape [{', '.join(symbols)}] = {wanted}, got {list(tensor.shape)}")
            if tensor.dtype != dtype:
                raise ValueError(f"{name}: wanted dtype {dtype}, got {tensor.dtype}")
            if tensor.device != device:
                raise ValueError(f"{name}: is on {tensor.device}, but transition is on {device}")
        return size

    def _check_rows(self, states: Tensor) -> None:
        if isinstance(self.transition, PackedTransition):
            rows = packed_tables.row_sums(self.transition, self.transition.probability)
            past = self.transition.first + self.transition.length > self.num_states[:, None, None]
            outside = (past & (self.transition.length > 0)).flatten(1)
        else:
            rows = self.transition.sum(-1, dtype=torch.float64)
            outside = self.transition.amax((1, 2)) * ~states > 0
        live = (states & ~self.terminal)[:, :, None] & self.available_actions()
        wrong = (rows - live.double()).abs() > ROW_TOLERANCE
        if self.action_mask is not None:
            wrong &= self.action_mask | (self.terminal | ~states)[:, :, None]
        if wrong.any():
            task, state, action = (int(i) for i in wrong.nonzero()[0])
            kind = "a live row must sum to 1" if live[task, state, action] else "terminal and padding rows must be zero"
            raise ValueError(
                f"transition: row ({task}, {state}, {action}) sums to {rows[task, state, action]:.6g}; {kind}"
            )
        if outside.any():
            raise ValueError(f"transition: leads to padding states, first in task {_task(outside)}")

    def _first(self, bad: Tensor) -> int | None:
        """The first task with a bad entry; None where it is of no window."""
        if bad.dim() > 1 or not isinstance(self.transition, PackedTransition):
            return _task(bad)
        for tasks, index in packed_tables.blocks(self.transition):
            if (found := bad[index]).any():
                ends = self.transition.length[tasks].sum((1, 2)).cumsum(0)
                return tasks.start + int((ends <= _task(found)).sum())
        return None

    # --- states and observations --------------------------------------------------------------------------------------

    def observe(self, states: Tensor) -> Tensor:
        """Observed ids of inner states [N, ...]; ValueError for partially observed tasks, whose states `emit` shows."""
        self._require_observed("observe")
        return self.state_mapping.gather(1, states.reshape(len(self), -1)).view_as(states)

    def emit(
        self,
        states: Tensor,
        *,
        seed: int | Tensor,
        step: int | Tensor,
        record: Tensor | None = None,
        task_index: Tensor | None = None,
    ) -> Tensor:
        """Tokens that are seen in inner states, [R, ..., K] int64; the states' ids, K = 1, where these are observed.

        Token k is drawn from emission[task, k, state] by a hash of (seed, record, step, k): the same in any batch. A
        simulation's state at step t is seen at `step` t; what its step t ended in is seen at ~t, as t + 1 is a reset.

        Args:
            states: [R, ...] integers; -1, no state, gives -1. seed: an int, or [R] int64. step: an int, or int64 that
                broadcasts to the states' shape. record: [R] int64, 0..R-1 by default. task_index: [R] int64, each
                record's task; 0..N-1 by default.
        """
        r = len(states)
        task = torch.arange(r, device=self.device) if task_index is None else task_index
        record = torch.arange(r, device=self.device) if record is None else record
        if not isinstance(seed, Tensor) or not seed.dim():
            seed = integer("seed", seed)
        if not isinstance(step, Tensor) or not step.dim():
            step = torch.tensor(integer("step", step, *INT64), dtype=torch.int64, device=self.device)
        elif step.dtype != torch.int64:
            raise ValueError(f"step: wanted int64, got {step.dtype}")
        for name, x in (("task_index", task), ("record", record), ("seed", seed)):
            if isinstance(x, Tensor) and (x.shape != (r,) or x.dtype != torch.int64):
                raise ValueError(f"{name}: wanted [{r}] of int64, got {list(x.shape)} of {x.dtype}")
        if r and (int(task.min()) < 0 or int(task.max()) >= len(self)):
            raise ValueError(f"task_index: wanted 0 to {len(self) - 1}, got {int(task.min())} to {int(task.max())}")
        down = (r, *[1] * (states.dim() - 1))
        flat, task = states.long().flatten(), task.view(down).expand(states.shape).flatten()
        if ((flat < -1) | (flat >= self.num_states[task])).any():
            raise ValueError("states: wanted the tasks' own states, or -1")
        if self.emission is None:
            return torch.where(flat < 0, -1, self.state_mapping[task, flat]).view(states.shape)[..., None]
        keys = counter_rng.keys_of(seed, record, EMISSIONS).view(down) + (step.to(self.device) + 1) * counter_rng.GOLDEN
        keys = counter_rng.mix(keys.expand(states.shape).flatten())
        tokens = self.emission.shape[1]
        return draw_tokens(self.emission, task, flat, keys).view(*states.shape, tokens)

    def state_of(self) -> Tensor:
        """[N, num_observations] int64: the inner state behind each observed id, -1 for ids that no state has."""
        self._require_observed("state_of")
        inverse = torch.full((len(self), self.num_observations + 1), -1, device=self.device, dtype=torch.int64)
        where = self.state_mapping.where(self.state_mapping >= 0, self.num_observations)
        index = torch.arange(where.shape[1], device=self.device).expand_as(where)
        return inverse.scatter_(1, where, index)[:, :-1]

    def _require_observed(self, name: str) -> None:
        if self.emission is not None:
            raise ValueError(f"{name}: these tasks are partially observed, no id stands for a state; use emit")

    # --- values -------------------------------------------------------------------------------------------------------

    def expected_reward(self) -> Tensor:
        """r̄[s, a] = Σ_s' transition·reward, [N,S,A] float32 (summed in float64 and rounded once)."""
        if isinstance(self.transition, PackedTransition):
            return packed_tables.row_sums(self.transition, self.transition.probability, self.reward).float()
        out = torch.zeros(self.shape, dtype=torch.float32, device=self.device)
        for block in packed_tables.dense_blocks(*self.shape):
            out[block] = (self.transition[block].double() * self.reward[block].double()).sum(-1)
        return out

    def num_successors(self) -> Tensor:
        """[N,S,A] int64: states that (s, a) can lead to."""
        if isinstance(self.transition, PackedTransition):
            return packed_tables.row_sums(self.transition, self.transition.probability > 0).long()
        return (self.transition > 0).sum(-1)

    def solve(self, discounts: float | Sequence[float] | Tensor, **options: Any) -> ValueIteration:
        """Optimal values at each discount: `icrl_kernels.value_iteration` on these tables.

        Of partially observed tasks, the values where states are seen; of several action tokens, those of an action each.

        Args:
            discounts: γ in [0, 1]: a float; or G of them, a sequence or a tensor [G] or [N,G].
            options: tol, method, backend.
        Returns:
            q [N,G,S,A] float64 (−inf at actions that a state lacks, but 0 where it has none), v, policy [N,G,S],
            error_bound, iterations [N,G]; no G for a float.
        """
        if isinstance(discounts, Sequence):
            given = [number("discounts", g) for g in discounts]
            discounts = torch.tensor(given, dtype=torch.float64, device=self.device)
        has = self.available_actions()
        return value_iteration(
            self.transition,
            self.reward,
            discounts,
            terminal=self.terminal,
            num_states=self.num_states,
            action_mask=None if has.all() else has,
            **options,
        )

    def tables(self) -> RolloutTables:
        """The simulator's form of these tasks, for `icrl_kernels.rollout` and `rollout_step`.

        Its steps are single actions: with several action tokens its horizon is max_steps·action_tokens, and
        `icrl.worlds.pomdp.regroup` makes the environment's steps of them. They are made on the CPU and lie where the tasks
        do.
        """
        here = self.to("cpu")
        given = {name: getattr(here, name) for name in [*LAYOUT, "action_mask"] if name != "state_mapping"}
        return rollout_tables(**given | {"max_steps": here.max_steps * self.action_tokens}).to(self.device)

    # --- files --------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all, in the form that the tables have."""
        tensors = {name: t.detach().cpu().contiguous() for name, t in self.tensors().items()}
        if len({t.untyped_storage().data_ptr() for t in tensors.values()}) < len(tensors):
            tensors = {name: t.clone() for name, t in tensors.items()}  # the format has no shared storage
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "num_observations": str(self.num_observations),
            "action_tokens": str(self.action_tokens),
        }
        write_bytes(Path(path), save(tensors, sealed(tensors, metadata)))

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> TabularTasks:
        """Read a copy of what `save` wrote: what happens to the file later changes nothing.

        FileNotFoundError without the file; ValueError, which names it, if it is anything else or damaged.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no task file {path}")
        with TensorFile(path) as file:
            tensors, metadata = file.tensors(), file.metadata
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{path}: holds no TabularTasks (format {shown(metadata.get('format'))})")
        if metadata.get("version") not in ("1", VERSION):
            raise ValueError(f"{path}: version {shown(metadata.get('version'))}, this code reads '1' to {VERSION!r}")
        names = set(LAYOUT) - {"transition"} | {*PARTS} if PARTS[0] in tensors else set(LAYOUT)
        if tensors.keys() - OPTIONAL.keys() != names:
            raise ValueError(f"{path}: damaged (its tensors are not those that were saved)")
        check_seal(path, tensors, metadata, {"format", "version", "num_observations", "action_tokens"})
        try:
            ids, tokens = _count(metadata, "num_observations"), _count(metadata, "action_tokens", "1")
            tasks = cls(**_fields(tensors), num_observations=ids, action_tokens=tokens).validate()
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{path}: damaged ({error})") from error
        return tasks.to(device)

    # --- other libraries ----------------------------------------------------------------------------------------------

    def to_xenoverse(self, i: int) -> dict[str, Any]:
        """Task i as the dict that xenoverse's AnyMDPEnv.set_task takes (numpy, float64): MDP, POMDP or MTPOMDP.

        xenoverse demands rows that sum to 1 in float64 to about 1e-8, so the float32 rows are renormalised. It knows no
        action mask: ValueError for a task whose states lack actions.
        """
        return conversions.to_xenoverse(self[i].dense())

    @classmethod
    def from_xenoverse(cls, tasks: dict[str, Any] | Sequence[dict[str, Any]]) -> TabularTasks:
        """From xenoverse's task dict or a list of them (`task_type` "MDP", "POMDP" or "MTPOMDP", all of the same).

        Raises ValueError for reward noise that is not of the form n(s') + n(s, a).
        """
        given = [tasks] if isinstance(tasks, dict) else tasks
        if not isinstance(given, (list, tuple)):
            raise ValueError(f"tasks: wanted a dict or a list of them, got {type(tasks).__name__}")
        return cls.concatenate([cls._one(conversions.from_xenoverse(t)) for t in given])

    @classmethod
    def from_gymnasium(cls, env: Any, max_steps: int | None = None) -> TabularTasks:
        """From an environment with a table `env.unwrapped.P` (FrozenLake, CliffWalking, Taxi): a batch of one.

        A transition that ends the episode leads to its state where episodes only ever end there; otherwise to an extra
        terminal state appended for it, whose observed id comes after the environment's own. An action that a state's table
        lacks, or that has no transitions there, is one that the state does not have: `action_mask`.
        The horizon is `max_steps`, else the environment's TimeLimit; ValueError where there is neither.
        """
        return cls._one(conversions.from_gymnasium(env, max_steps))

    @classmethod
    def _one(cls, fields: dict[str, Any]) -> TabularTasks:
        """A batch of one from a task's fields as arrays."""
        fields = {name: x for name, x in fields.items() if x is not None}
        fields["num_states"], fields["num_actions"] = np.shape(fields["transition"])[:2]
        types = {name: dtype for name, (_, dtype) in (LAYOUT | OPTIONAL).items()}
        for name in types.keys() & fields.keys():
            fields[name] = torch.from_numpy(np.array(fields[name])).to(types[name])[None]
        return cls(**fields).validate()


def _count(metadata: dict[str, str], name: str, default: str = "") -> int:
    """A whole number in a file's metadata."""
    text = metadata.get(name, default)
    if not (text.isascii() and text.isdigit() and len(text) < 20 and int(text) < 2**63):
        raise ValueError(f"{name}: wanted a number, got {shown(text)}")
    return int(text)


def _task(bad: Tensor) -> int:
    return int(bad.nonzero()[0, 0])


def _field(name: str) -> str:
    """The field of a tensor."""
    return name.split(".")[0]


def _fields(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Fields from tensors named as `TabularTasks.tensors` names them."""
    fields: dict[str, Any] = {name: t for name, t in tensors.items() if name not in PARTS}
    if PARTS[0] in tensors:
        fields["transition"] = PackedTransition(*(tensors[name] for name in PARTS))
    return fields
