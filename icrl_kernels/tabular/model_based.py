"""What an optimistic tabular model-based learner would think at each step of recorded histories."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from icrl_kernels import _C, _checks
from icrl_kernels._registry import define


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
        backend: "cpu", "cuda", "plain" (the GPU's code on the CPU; the same bits) or "reference".

    Raises:
        ValueError: shapes, dtypes or devices differ from the above, an index or the discount is out of range, or a reward
            is not finite.
    """
    _checks.shape("state", state, ["R", "T"])
    R, T = state.shape
    for name, tensor, dtype in (
        ("state", state, torch.int64),
        ("action", action, torch.int64),
        ("reward", reward, torch.float32),
        ("done", done, torch.int64),
    ):
        _checks.shape(name, tensor, ["R", "T"], R=R, T=T)
        _checks.dtype(name, tensor, [dtype])
    if next_state is not None:
        _checks.shape("next_state", next_state, ["R", "T"], R=R, T=T)
        _checks.dtype("next_state", next_state, [torch.int64])
    _checks.same_device(state=state, action=action, reward=reward, done=done, next_state=next_state)
    if reward.requires_grad and torch.is_grad_enabled():
        raise ValueError("reward: model_based_q has no gradient; detach it")
    if num_states < 1 or num_actions < 1 or num_states > 32767:
        raise ValueError(
            f"num_states, num_actions: wanted at least 1 (states at most 32767), got {num_states}, {num_actions}"
        )
    if not 0 <= discount <= 0.9999 or not 0 <= bonus <= 1e6 or sweeps < 1:
        raise ValueError(
            f"discount, bonus, sweeps: wanted [0, .9999], [0, 1e6], >= 1, got {discount}, {bonus}, {sweeps}"
        )
    if R * T:
        indices = [("state", state, num_states), ("action", action, num_actions), ("done", done, 3)]
        if next_state is not None:
            indices.append(("next_state", next_state, num_states))
        for name, tensor, most in indices:
            low, high = int(tensor.min()), int(tensor.max())
            if low < 0 or high >= most:
                raise ValueError(f"{name}: wanted 0 to {most - 1}, got {low} to {high}")
        if not bool(reward.isfinite().all()):
            raise ValueError("reward: holds NaN or infinity")
    return torch.ops.icrl.model_based_q(
        state, action, reward, done, next_state, num_states, num_actions, bonus, discount, sweeps, backend
    )


def _compiled(plain: bool, *tensors: Tensor | None, sizes: tuple[int, int], settings: tuple[Any, ...]) -> Tensor:
    state = tensors[0]
    assert state is not None
    q = torch.empty(*state.shape, sizes[1])
    inputs = [None if t is None else t.contiguous() for t in (*tensors, q)]
    pointers = [0 if t is None else t.data_ptr() for t in inputs]
    _C.model_based_q(*pointers, *state.shape, *sizes, *settings, plain, torch.get_num_threads())
    return q


def _cpu(*args: Any) -> Tensor:
    return _compiled(False, *args[:5], sizes=args[5:7], settings=args[7:])


def _plain(*args: Any) -> Tensor:
    return _compiled(True, *args[:5], sizes=args[5:7], settings=args[7:])


def _cuda(*args: Any) -> Tensor:
    if not _C.with_cuda:
        raise ValueError("backend: this build of icrl_kernels has no CUDA; build with ICRL_CUDA=1, or use 'reference'")
    inputs = [None if t is None else t.contiguous() for t in args[:5]]
    state, sizes = args[0], args[5:7]
    q = torch.empty(*state.shape, sizes[1], device=state.device)
    scratch = torch.zeros(state.shape[0] * _C.model_based_q_cuda_scratch(*sizes), device=state.device)
    pointers = [0 if t is None else t.data_ptr() for t in (*inputs, q)]
    index = state.get_device()
    stream = torch.cuda.current_stream(index).cuda_stream
    _C.model_based_q_cuda(*pointers, *state.shape, *sizes, *args[7:], scratch.data_ptr(), index, stream)
    return q


def _reference(
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
) -> Tensor:
    """The specification, in float64: all records at once, one step after another."""
    R, T = state.shape
    reward, everyone = reward.double(), torch.arange(R)
    n, known, total = (torch.zeros(R, S, A, dtype=torch.float64) for _ in range(3))
    follow, value = torch.zeros(R, S, A, S, dtype=torch.float64), torch.zeros(R, S, dtype=torch.float64)
    out = torch.empty(R, T, A)
    blocks = list(torch.arange(S).split(8))

    for t in range(T):
        sigma = (reward[:, :t] ** 2).sum(1).div(max(t, 1)).sqrt()[:, None, None]
        mean = (total / n).nan_to_num(-math.inf, neginf=-math.inf).flatten(1).amax(1)[:, None, None]  # 0/0 where n = 0
        optimistic = (mean.where(mean > -math.inf, 0.0) + sigma) / (1 - discount)

        def q(s: Tensor, sigma: Tensor = sigma, optimistic: Tensor = optimistic) -> Tensor:
            after = torch.einsum("rsaj,rj->rsa", follow[:, s], value) / known[:, s]
            after = after.where(known[:, s] > 0, optimistic)
            tried = total[:, s] / n[:, s] + discount * after + bonus * sigma / n[:, s].sqrt()
            return tried.where(n[:, s] > 0, optimistic)

        for k in range(sweeps):
            for block in blocks if k % 2 else reversed(blocks):
                value[:, block] = q(block).amax(2)
        out[:, t] = q(torch.arange(S))[everyone, state[:, t]].float()
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


define(
    "model_based_q(Tensor state, Tensor action, Tensor reward, Tensor done, Tensor? next_state, int num_states, "
    "int num_actions, float bonus, float discount, int sweeps, str backend) -> Tensor",
    {
        "cpu": (("cpu",), _cpu),
        "plain": (("cpu",), _plain),
        "cuda": (("cuda",), _cuda),
        "reference": (("cpu",), _reference),
    },
    lambda state, action, reward, done, next_state, num_states, num_actions, *rest: reward.new_empty(
        *state.shape, num_actions
    ),
)
