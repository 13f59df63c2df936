"""What an optimistic tabular model-based learner would think at each step of recorded histories."""

from __future__ import annotations

import math

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
    bonus: float = 0.2,
    discount: float = 0.9,
    sweeps: int = 2,
    backend: str = "auto",
) -> Tensor:
    """Optimistic action values, before each step, of a learner that has watched the history so far: `[R,T,A]` float32.

    With n(s,a) visits, mean reward r̄ and successor frequencies p̂ of the steps before t, σ the root mean square of those
    steps' rewards:

        Q(s,a) = r̄ + discount·Σ p̂(s') V(s') + bonus·σ/√n,   V(s) = max_a Q(s,a),
        Q(s,a) = (max r̄ + σ)/(1 - discount)  where n = 0,

    V by `sweeps` Gauss-Seidel sweeps a step, warm. argmax_a Q is the action of the "model-based" learner of decoupled
    policy distillation (tag 4; OmniRL, arXiv 2502.02869), here a label for whatever trajectory.

    Args:
        state: [R,T] int64 in [0, num_states). action: [R,T] int64. reward: [R,T] float32.
        done: [R,T] int64: 0 no; 1 the step led to a terminal state; 2 truncated, and what came next is not on record.

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
    _checks.same_device(state=state, action=action, reward=reward, done=done)
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
        for name, tensor, most in (("state", state, num_states), ("action", action, num_actions), ("done", done, 3)):
            low, high = int(tensor.min()), int(tensor.max())
            if low < 0 or high >= most:
                raise ValueError(f"{name}: wanted 0 to {most - 1}, got {low} to {high}")
        if not bool(reward.isfinite().all()):
            raise ValueError("reward: holds NaN or infinity")
    return torch.ops.icrl.model_based_q(
        state, action, reward, done, num_states, num_actions, bonus, discount, sweeps, backend
    )


def _cpu(
    state: Tensor,
    action: Tensor,
    reward: Tensor,
    done: Tensor,
    S: int,
    A: int,
    bonus: float,
    discount: float,
    sweeps: int,
) -> Tensor:
    q = torch.empty(*state.shape, A)
    inputs = [t.contiguous() for t in (state, action, reward, done)]
    pointers = [t.data_ptr() for t in (*inputs, q)]
    _C.model_based_q(*pointers, *state.shape, S, A, bonus, discount, sweeps, torch.get_num_threads())
    return q


def _reference(
    state: Tensor,
    action: Tensor,
    reward: Tensor,
    done: Tensor,
    S: int,
    A: int,
    bonus: float,
    discount: float,
    sweeps: int,
) -> Tensor:
    """The specification, in float64: all records at once, one step after another."""
    R, T = state.shape
    reward, everyone = reward.double(), torch.arange(R)
    n, total = (torch.zeros(R, S, A, dtype=torch.float64) for _ in range(2))
    follow, value = torch.zeros(R, S, A, S, dtype=torch.float64), torch.zeros(R, S, dtype=torch.float64)
    out = torch.empty(R, T, A)

    for t in range(T):
        sigma = (reward[:, :t] ** 2).sum(1).div(max(t, 1)).sqrt()
        mean = (total / n).nan_to_num(-math.inf, neginf=-math.inf).flatten(1).amax(1)  # 0/0 where n = 0
        optimistic = (mean.where(mean > -math.inf, 0.0) + sigma) / (1 - discount)

        def q(s: int, sigma: Tensor = sigma, optimistic: Tensor = optimistic) -> Tensor:
            known = (total[:, s] + discount * (follow[:, s] * value[:, None]).sum(2)) / n[:, s] + (
                bonus * sigma[:, None] / n[:, s].sqrt()
            )
            return known.where(n[:, s] > 0, optimistic[:, None])

        for k in range(sweeps):
            for s in range(S) if k % 2 else reversed(range(S)):
                value[:, s] = q(s).amax(1)
        out[:, t] = torch.stack([q(s) for s in range(S)], 1)[everyone, state[:, t]].float()
        learns = done[:, t] != 2
        s, a = state[:, t], action[:, t]
        n[everyone, s, a] += learns
        total[everyone, s, a] += reward[:, t] * learns
        if t + 1 < T:
            follow[everyone, s, a, state[:, t + 1]] += done[:, t] == 0
    return out


define(
    "model_based_q(Tensor state, Tensor action, Tensor reward, Tensor done, int num_states, int num_actions, float bonus, "
    "float discount, int sweeps, str backend) -> Tensor",
    {"cpu": (("cpu",), _cpu), "reference": (("cpu",), _reference)},
    lambda state, action, reward, done, num_states, num_actions, *rest: reward.new_empty(*state.shape, num_actions),
)
