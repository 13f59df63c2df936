"""What an optimistic tabular model-based learner would think at each step of recorded histories."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from icrl_kernels import _C, _checks
from icrl_kernels._registry import Backend, define, no_cuda

MOST_ENTRIES = 2**58  # whose bytes 64 bits count
MOST_SWEEPS = 2**16
MOST_ACTIONS = 2**20


def model_based_q(
    state: Tensor,
    action: Tensor,
    reward: Tensor,
    done: Tensor,
    num_states: int,
    num_actions: int,
    *,
    next_state: Tensor | None = None,
    bonus: float = 0.2,
    discount: float = 0.9,
    sweeps: int = 2,
    backend: str = "auto",
    action_mask: Tensor | None = None,
) -> Tensor:
    """Optimistic action values, before each step, of a learner that has watched the history so far: `[R,T,A]` float32.

    With n(s,a) visits, mean reward r̄ and successor frequencies p̂ of the steps before t, σ the root mean square of those
    steps' rewards:

        Q(s,a) = r̄ + discount·Σ p̂(s') V(s') + bonus·σ/√n,   V(s) = max_a Q(s,a),
        Q(s,a) = U = (max r̄ + σ)/(1 - discount)  where n = 0,

    V by `sweeps` sweeps a step, warm, each from eight states to the next eight. p̂ counts the steps whose next state is
    on record, or none because they terminated; where there are none yet, U takes the sum's place. argmax_a Q is the
    action of the "model-based" learner of decoupled policy distillation (tag 4; OmniRL, arXiv 2502.02869), here a label
    for whatever trajectory.

    Args:
        state: [R,T] int64 in [0, num_states). action: [R,T] int64. reward: [R,T] float32.
        done: [R,T] int64: 0 no; 1 the step led to a terminal state; 2 truncated.
        next_state: [R,T] int64, where each step led, before any reset. Without it that is the next step's state, and where
            a truncated step led is not on record: its reward counts all the same.
        sweeps: 1 to 65536.
        backend: "cpu", "cuda", "plain" (the GPU's code on the CPU; the same bits) or "reference".
        action_mask: [R,num_states,num_actions] bool, True where the state has the action; None: every state has all. V is
            the best of those that the state has, and Q is −inf at the others. A state without actions counts as one that
            has all.

    Raises:
        ValueError: shapes, dtypes or devices differ from the above, a size, the discount, the bonus or the sweeps are out of
            range, or the reward requires a gradient; on a CPU also for an index out of range, an action that its state
            lacks and a reward that is not finite. On a GPU, where reading them would wait, the values of a record are NaN
            from its first step on whose state, action, done or next state is out of range, or whose action its state
            lacks, and rewards that are not finite spread.
    """
    given = {"state": state, "action": action, "reward": reward, "done": done, "next_state": next_state}
    for name, tensor in given.items():
        if tensor is not None or name != "next_state":
            _checks.dense(name, tensor)
    if action_mask is not None:
        _checks.dense("action_mask", action_mask)
    _checks.backend(backend)
    return torch.ops.icrl.model_based_q(
        *given.values(),
        *(_checks.integer(n, x, *_checks.INT64) for n, x in (("num_states", num_states), ("num_actions", num_actions))),
        *(_checks.number(n, x) for n, x in (("bonus", bonus), ("discount", discount))),
        _checks.integer("sweeps", sweeps, *_checks.INT64),
        backend,
        action_mask,
    )


def _check(
    state: Tensor,
    action: Tensor,
    reward: Tensor,
    done: Tensor,
    next_state: Tensor | None,
    num_states: int,
    num_actions: int,
    bonus: float,
    discount: float,
    sweeps: int,
    action_mask: Tensor | None = None,
) -> None:
    _checks.shape("state", state, ["R", "T"])
    R, T = state.shape
    given = {"state": state, "action": action, "reward": reward, "done": done, "next_state": next_state}
    for name, tensor in given.items():
        if tensor is not None:
            _checks.shape(name, tensor, ["R", "T"], R=R, T=T)
            _checks.dtype(name, tensor, [torch.float32 if name == "reward" else torch.int64])
    if action_mask is not None:
        _checks.shape("action_mask", action_mask, ["R", "S", "A"], R=R, S=num_states, A=num_actions)
        _checks.dtype("action_mask", action_mask, [torch.bool])
    _checks.same_device(**given, action_mask=action_mask)
    if reward.requires_grad and torch.is_grad_enabled():
        raise ValueError("reward: model_based_q has no gradient; detach it")
    for name, size, most in (("num_states", num_states, 32767), ("num_actions", num_actions, MOST_ACTIONS)):
        if not 1 <= size <= most:
            raise ValueError(f"{name}: wanted 1 to {most}, got {size}")
    if max(R, 1) * (num_states + 3) ** 2 * (num_actions + 8) > MOST_ENTRIES or R * T * num_actions > MOST_ENTRIES:
        raise ValueError(
            f"num_actions: wanted tables of at most {MOST_ENTRIES} entries in all, got {num_actions} with R={R}, T={T}, "
            f"num_states={num_states}"
        )
    for name, value, least, most in (
        ("bonus", bonus, 0, 1e6),
        ("discount", discount, 0, 0.9999),
        ("sweeps", sweeps, 1, MOST_SWEEPS),
    ):
        if not least <= value <= most:
            raise ValueError(f"{name}: wanted {least} to {most}, got {value}")


def _values(
    _: None,
    state: Tensor,
    action: Tensor,
    reward: Tensor,
    done: Tensor,
    next_state: Tensor | None,
    num_states: int,
    num_actions: int,
    bonus: float,
    discount: float,
    sweeps: int,
    action_mask: Tensor | None = None,
) -> None:
    if not state.numel():
        return
    for name, tensor, most in (
        ("state", state, num_states),
        ("action", action, num_actions),
        ("done", done, 3),
        ("next_state", next_state, num_states),
    ):
        if tensor is None:
            continue
        low, high = int(tensor.min()), int(tensor.max())
        if low < 0 or high >= most:
            raise ValueError(f"{name}: wanted 0 to {most - 1}, got {low} to {high}")
    if not bool(reward.isfinite().all()):
        raise ValueError("reward: holds NaN or infinity")
    if action_mask is not None:
        each = torch.arange(len(state), dtype=torch.int64, device=state.device)[:, None]
        if (lacks := ~action_mask[each, state, action]).any():
            r, t = lacks.nonzero()[0].tolist()
            raise ValueError(
                f"action: in step {t} of record {r} it is {int(action[r, t])}, which state {int(state[r, t])} does not have"
            )


def _host(plain: bool) -> Callable[..., Tensor]:
    def run(_: None, *args: Any) -> Tensor:
        tensors, sizes, settings, mask = args[:5], args[5:7], args[7:10], args[10:]
        state = tensors[0]
        q = torch.empty(*state.shape, sizes[1], dtype=torch.float32, device=state.device)
        inputs = [None if t is None else t.contiguous() for t in (*tensors, q, *(mask or [None]))]
        *pointers, masked = [0 if t is None else t.data_ptr() for t in inputs]
        _C.model_based_q(*pointers, *state.shape, *sizes, *settings, masked, plain, torch.get_num_threads())
        return q

    return run


def _cuda(_: None, *args: Any) -> Tensor:
    state, sizes, mask = args[0], args[5:7], args[10:]
    inputs = [None if t is None else t.contiguous() for t in (*args[:5], *(mask or [None]))]
    q = torch.empty(*state.shape, sizes[1], dtype=torch.float32, device=state.device)
    each = _C.model_based_q_cuda_scratch(*sizes)
    scratch = torch.zeros(state.shape[0] * each, dtype=torch.float32, device=state.device)
    *pointers, masked = [0 if t is None else t.data_ptr() for t in inputs]
    index = state.get_device()
    stream = torch.cuda.current_stream(index).cuda_stream
    call = (*pointers, q.data_ptr(), *state.shape, *sizes, *args[7:10], masked, scratch.data_ptr(), index, stream)
    _C.model_based_q_cuda(*call)
    return q


def _reference(
    _: None,
    state: Tensor,
    action: Tensor,
    reward: Tensor,
    done: Tensor,
    next_state: Tensor | None,
    S: int,
    A: int,
    bonus: float,
    discount: float,
    sweeps: int,
    action_mask: Tensor | None = None,
) -> Tensor:
    """The specification, in float64: all records at once, one step after another."""
    R, T = state.shape
    reward, everyone = reward.double(), torch.arange(R, dtype=torch.int64, device=state.device)
    n, known, total = (reward.new_zeros(R, S, A) for _ in range(3))
    follow, value = reward.new_zeros(R, S, A, S), reward.new_zeros(R, S)
    out = torch.empty(R, T, A, dtype=torch.float32, device=state.device)
    states = torch.arange(S, dtype=torch.int64, device=state.device)
    blocks = list(states.split(8))
    lacks = torch.zeros(R, S, A, dtype=torch.bool, device=state.device)
    if action_mask is not None:
        lacks = ~action_mask & action_mask.any(-1, keepdim=True)

    for t in range(T):
        sigma = (reward[:, :t] ** 2).sum(1).div(max(t, 1)).sqrt()[:, None, None]
        mean = (total / n).nan_to_num(-math.inf, neginf=-math.inf).flatten(1).amax(1)[:, None, None]  # 0/0 where n = 0
        optimistic = (mean.where(mean > -math.inf, 0.0) + sigma) / (1 - discount)

        def q(s: Tensor, sigma: Tensor = sigma, optimistic: Tensor = optimistic) -> Tensor:
            after = torch.einsum("rsaj,rj->rsa", follow[:, s], value) / known[:, s]
            after = after.where(known[:, s] > 0, optimistic)
            tried = total[:, s] / n[:, s] + discount * after + bonus * sigma / n[:, s].sqrt()
            return tried.where(n[:, s] > 0, optimistic).masked_fill(lacks[:, s], -math.inf)

        for k in range(sweeps):
            for block in blocks if k % 2 else reversed(blocks):
                value[:, block] = q(block).amax(2)
        out[:, t] = q(states)[everyone, state[:, t]].float()
        if t + 1 == T:
            break
        s, a, ends = state[:, t], action[:, t], done[:, t] == 1
        seen = ends | (done[:, t] == 0) if next_state is None else torch.ones_like(ends)
        n[everyone, s, a] += 1
        known[everyone, s, a] += seen
        total[everyone, s, a] += reward[:, t]
        to = state[:, t + 1] if next_state is None else next_state[:, t]
        follow[everyone, s, a, to] += seen & ~ends
    return out


def _fake(_: None, state: Tensor, *args: Any) -> Tensor:
    return torch.empty(*state.shape, args[5], dtype=torch.float32, device=state.device)


define(
    "model_based_q(Tensor state, Tensor action, Tensor reward, Tensor done, Tensor? next_state, int num_states, "
    "int num_actions, float bonus, float discount, int sweeps, str backend, Tensor? action_mask=None) -> Tensor",
    {
        "cpu": Backend(("cpu",), _host(plain=False)),
        "plain": Backend(("cpu",), _host(plain=True)),
        "cuda": Backend(("cuda",), _cuda, no_cuda),
        "reference": Backend(("cpu",), _reference),
    },
    _fake,
    _check,
    _values,
)
