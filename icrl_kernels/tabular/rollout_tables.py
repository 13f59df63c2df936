"""Tabular tasks made ready for simulation: their rows checked, summed and packed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from icrl_kernels import _C, _checks
from icrl_kernels.arguments import every_state_acts
from icrl_kernels.tabular.packed import PackedTransition

READ_PAST = 16  # elements that a reader of a row of `cumulative` may load past its end


DTYPES = (
    *(torch.float32, torch.float32, torch.int64, torch.int16, torch.float32, torch.float32, torch.float32, torch.bool),
    *(torch.int64, torch.int64, torch.int64),
)  # of the fields of RolloutTables


class RolloutTables(NamedTuple):
    """Tasks made ready for simulation by `rollout_tables`: N tasks of at most S states and A actions.

    Row (n, s, a) leads to successor window[..., 0] + j for 0 ≤ j < window[..., 1], and its numbers are at offset + j. It is
    empty, of length 0, where the state does not have the action.
    """

    cumulative: Tensor  # [M + 16] float32
    reward: Tensor  # [M] float32
    offset: Tensor  # [N,S,A] int64
    window: Tensor  # [N,S,A,2] int16: first successor, how many
    noise_state: Tensor  # [N,S] float32
    noise_action: Tensor  # [N,S,A] float32
    start: Tensor  # [N,S] float32, cumulative
    terminal: Tensor  # [N,S] bool
    max_steps: Tensor  # [N] int64
    num_states: Tensor  # [N] int64
    num_actions: Tensor  # [N] int64

    @property
    def action_mask(self) -> Tensor:
        """[N,S,A] bool: the actions that each state has; none where it is terminal or padding."""
        return self.window[..., 1] > 0

    def to(self, device: torch.device | str) -> RolloutTables:
        """The same tables on another device: a simulation runs where they are."""
        return RolloutTables(*(t.to(device) for t in self))


def fit(shapes: Sequence[tuple[int, ...]]) -> bool:
    """Whether tables of these shapes belong together."""
    if len(shapes[2]) != 3 or len(shapes[0]) != 1 or len(shapes[1]) != 1:
        return False
    return (
        shapes == [*shapes[:2], *_shapes(*shapes[2])]
        and READ_PAST <= shapes[0][0] <= shapes[1][0] + READ_PAST
        and shapes[2][1] <= 32767 >= shapes[2][2]
    )


def refuse(tables: RolloutTables) -> None:
    """The ValueError that names what keeps the tables from being `fit`."""
    # two that agree say the sizes
    agreed = tables.noise_action.dim() == 3 and tables.noise_action.shape == tables.window.shape[:3]
    sized = "noise_action" if agreed else "offset"
    _checks.shape(f"tables.{sized}", getattr(tables, sized), ["N", "S", "A"])
    N, S, A = getattr(tables, sized).shape
    for (name, tensor), wanted, dtype in zip(
        tables._asdict().items(), [[None], [None], *_shapes(N, S, A)], DTYPES, strict=True
    ):
        _checks.shape(f"tables.{name}", tensor, wanted)
        _checks.dtype(f"tables.{name}", tensor, [dtype])
        if not tensor.is_contiguous():
            raise ValueError(f"tables.{name}: wanted a contiguous tensor, got strides {tensor.stride()}")
    M = tables.cumulative.shape[0] - READ_PAST
    if M < 0 or tables.reward.shape[0] < M:
        raise ValueError(
            f"tables.cumulative, tables.reward: wanted [M + {READ_PAST}] and at least [M], got "
            f"{list(tables.cumulative.shape)} and {list(tables.reward.shape)}"
        )
    _fit_16_bits("tables.offset", S, A)


def _shapes(N: int, S: int, A: int) -> tuple[tuple[int, ...], ...]:
    """Of the fields of RolloutTables from `offset` on."""
    row, state, task = (N, S, A), (N, S), (N,)
    return row, (N, S, A, 2), state, row, state, state, task, task, task


def _fit_16_bits(name: str, S: int, A: int) -> None:
    if S > 32767 or A > 32767:
        raise ValueError(f"{name}: at most 32767 states and actions, got S={S} and A={A}")


def rollout_tables(
    transition: Tensor | PackedTransition,
    reward: Tensor,
    noise_state: Tensor,
    noise_action: Tensor,
    start: Tensor,
    terminal: Tensor,
    max_steps: Tensor,
    num_states: Tensor,
    num_actions: Tensor,
    action_mask: Tensor | None = None,
) -> RolloutTables:
    """Check N tasks, pack their rows and sum them for sampling: once per set of tasks.

    Packed and dense tables of the same tasks give the same result. The rewards of packed tasks whose rows lie in order,
    without gaps and without zeros at their ends are not copied.

    Args:
        transition: [N,S,A,S] float32, or float32 windows; rows of terminal states, and past a task's own states and
            actions, are not read.
        reward: mean of each transition, float32: [N,S,A,S], or with packed transitions [M], laid out as their
            probabilities. noise_state: [N,S], noise_action: [N,S,A] float32, their sum is the reward's standard deviation.
            start: [N,S] float32, probabilities. terminal: [N,S] bool.
        max_steps, num_states, num_actions: [N] int64.
        action_mask: [N,S,A] bool, True where the state has the action; None: every state has all of its task's. What
            `transition` and `reward` hold for the others is not read. No behaviour takes them, and `rollout_step`
            refuses them.

    Raises:
        ValueError: a shape, dtype or device is not as above; a window leaves its table; a row is not a distribution over
            the task's own states (negative, NaN, or a sum off 1 by more than 1e-4); a start state is terminal; a reward or
            noise is not finite or a noise is negative; a size is out of range; a state that is not terminal has no action.
    """
    packed = isinstance(transition, PackedTransition)
    if packed:
        transition.check()
        N, S, A = transition.offset.shape
        table, layout = transition.probability, list(transition.probability.shape)
    else:
        _checks.shape("transition", transition, ["N", "S", "A", "S"])
        N, S, A, _ = transition.shape
        table, layout = transition, [N, S, A, S]
    _fit_16_bits("transition", S, A)
    named = {
        "transition": (table, layout, torch.float32),
        "reward": (reward, layout, torch.float32),
        "noise_state": (noise_state, [N, S], torch.float32),
        "noise_action": (noise_action, [N, S, A], torch.float32),
        "start": (start, [N, S], torch.float32),
        "terminal": (terminal, [N, S], torch.bool),
        "max_steps": (max_steps, [N], torch.int64),
        "num_states": (num_states, [N], torch.int64),
        "num_actions": (num_actions, [N], torch.int64),
    }
    for name, (tensor, wanted, dtype) in named.items():
        _checks.shape(name, tensor, wanted)
        _checks.dtype(name, tensor, [dtype])
    _on_cpu(**{name: tensor for name, (tensor, _, _) in named.items()})
    for name, size, most in (
        ("max_steps", max_steps, None),
        ("num_states", num_states, S),
        ("num_actions", num_actions, A),
    ):
        if N and (int(size.min()) < 1 or (most is not None and int(size.max()) > most)):
            raise ValueError(
                f"{name}: wanted 1 to {'any' if most is None else most}, got {int(size.min())} to {int(size.max())}"
            )
    for name, noise in (("noise_state", noise_state), ("noise_action", noise_action)):
        if noise.numel() and not (float(noise.min()) >= 0 and float(noise.max()) < torch.inf):
            raise ValueError(f"{name}: wanted finite values >= 0")
    if action_mask is not None:
        check_mask(action_mask, terminal, num_states, num_actions, A)
        action_mask = action_mask.contiguous()

    table, reward, start, terminal = (t.contiguous() for t in (table, reward, start, terminal))
    noise_state, noise_action = noise_state.contiguous(), noise_action.contiguous()
    max_steps, num_states, num_actions = (t.contiguous() for t in (max_steps, num_states, num_actions))
    rows = [t.contiguous() for t in transition[1:]] if packed else []
    places = [t.data_ptr() for t in rows] if packed else [0, 0, 0]
    sizes = [0 if t is None else t.data_ptr() for t in (terminal, num_states, num_actions, action_mask)]
    threads = torch.get_num_threads()
    window = torch.empty(N, S, A, 2, dtype=torch.int16, device=table.device)
    bad = _C.rollout_windows(table.data_ptr(), *places, *sizes, window.data_ptr(), N, S, A, threads)
    if bad >= 0:
        raise ValueError(
            f"transition{_place(bad, S, A)}: wanted zeros past the task's own {int(num_states[bad // A // S])}"
        )
    length = window[..., 1].flatten().long()
    ends = length.cumsum(0)
    offset = (ends - length).view(N, S, A)
    total = int(ends[-1]) if ends.numel() else 0
    cumulative = torch.empty(total + READ_PAST, dtype=torch.float32, device=table.device)
    cumulative[total:] = 2
    as_given = packed and bool(((window[..., 1] == 0) | (rows[0] + window[..., 0] - rows[1] == offset)).all())
    own_reward = reward if as_given else torch.empty(total, dtype=torch.float32, device=table.device)
    start_cumulative = torch.empty_like(start)
    out = (start, window, offset, cumulative)
    kind, index = _C.rollout_tables(
        *(table.data_ptr(), reward.data_ptr(), *places, *sizes),
        *(t.data_ptr() for t in out),
        0 if as_given else own_reward.data_ptr(),
        *(start_cumulative.data_ptr(), N, S, A, threads),
    )
    if kind == 3:
        raise ValueError(
            f"start[{index}]: wanted probabilities with sum 1 on the task's own states that are not terminal"
        )
    if kind == 2:
        raise ValueError(f"reward{_place(index, S, A)}: wanted finite values where transition is positive")
    if kind:
        first, size = (int(x) for x in window.view(-1, 2)[index])
        begin = int(rows[0].flatten()[index]) + first - int(rows[1].flatten()[index]) if packed else index * S + first
        total = float(table.flatten()[begin : begin + size].double().sum())
        raise ValueError(
            f"transition{_place(index, S, A)}: wanted probabilities with sum 1 on the task's own states, got sum {total:g}"
        )
    rest = (noise_state, noise_action, start_cumulative, terminal, max_steps, num_states, num_actions)
    return RolloutTables(cumulative, own_reward, offset, window, *rest)


def check_mask(action_mask: Tensor, terminal: Tensor, num_states: Tensor, num_actions: Tensor, A: int) -> None:
    """ValueError if a mask is not [N,S,A] bool where `terminal` is, or on a CPU leaves a state without an action."""
    N, S = terminal.shape
    _checks.dense("action_mask", action_mask)
    _checks.shape("action_mask", action_mask, ["N", "S", "A"], N=N, S=S, A=A)
    _checks.dtype("action_mask", action_mask, [torch.bool])
    _checks.same_device(terminal=terminal, num_states=num_states, num_actions=num_actions, action_mask=action_mask)
    if action_mask.device.type != "cpu":
        return
    states, actions = (torch.arange(x, dtype=torch.int64, device=action_mask.device) for x in (S, A))
    none = ~(action_mask & (actions < num_actions[:, None])[:, None]).any(-1)
    every_state_acts(none & ~terminal & (states < num_states[:, None]))


def _on_cpu(**tensors: Tensor) -> None:
    device = _checks.same_device(**tensors)
    if device.type != "cpu":
        raise ValueError(
            f"tables are made on the CPU and then moved (RolloutTables.to), got tensors on {device.type!r}"
        )


def _place(row: int, S: int, A: int) -> str:
    return f"[{row // A // S}, {row // A % S}, {row % A}]"
