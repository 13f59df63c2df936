"""The simulator's specification in plain torch, and its random numbers: Philox4x32-10 (Salmon et al., SC 2011)."""

from __future__ import annotations

import torch
from torch import Tensor

from icrl_kernels import _checks
from icrl_kernels.tabular.behaviours import Behaviours, check_shapes, check_values, same_behaviours
from icrl_kernels.tabular.rollout_tables import rollout_tables

OUT_DTYPES = (torch.int16, torch.int16, torch.float32, torch.uint8, torch.uint8, torch.int16)  # as in Rollout


def rollout_reference(
    transition: Tensor,
    reward: Tensor,
    noise_state: Tensor,
    noise_action: Tensor,
    start: Tensor,
    terminal: Tensor,
    max_steps: Tensor,
    num_states: Tensor,
    num_actions: Tensor,
    *,
    steps: int,
    seed: Tensor,
    record: Tensor,
    task_index: Tensor,
    policies: Tensor | None = None,
    behaviours: Behaviours | None = None,
    actions: Tensor | None = None,
    action_mask: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The specification in plain torch, rewards in float64 arithmetic: the fields of `Rollout` but the last.

    The same bits as `rollout`, for behaviours that are policy tables or uniform, or for outside `actions` [R,T].
    A uniform action is one of the task's; where the state lacks it, one of those that the state has, by the low bits of
    the same product, which the first draw leaves.

    Raises:
        ValueError: as `rollout_tables` and `rollout` do.
    """
    tasks = (transition, reward, noise_state, noise_action, start, terminal, max_steps, num_states, num_actions)
    has = rollout_tables(*tasks, action_mask).action_mask
    N, S, A = has.shape
    _checks.shape("task_index", task_index, ["R"])
    R = task_index.shape[0]
    for name, tensor in (("task_index", task_index), ("seed", seed), ("record", record)):
        _checks.shape(name, tensor, [R])
        _checks.dtype(name, tensor, [torch.int64])
    others = {"task_index": task_index, "seed": seed, "record": record, "policies": policies, "actions": actions}
    _checks.same_device(transition=transition, **others, **(behaviours._asdict() if behaviours else {}))
    if R and not 0 <= int(task_index.min()) <= int(task_index.max()) < N:
        raise ValueError(f"task_index: wanted 0 to {N - 1}, got {int(task_index.min())} to {int(task_index.max())}")
    if steps < 0:
        raise ValueError(f"steps: wanted an int >= 0, got {steps}")
    if policies is not None:
        _checks.shape("policies", policies, [N, "P", S, A])
        _checks.dtype("policies", policies, [torch.float32])
    if actions is not None:
        _checks.shape("actions", actions, [R, "T"])
        _checks.dtype("actions", actions, [torch.int64])
        own = num_actions[task_index][:, None]
        if actions.shape[1] < steps or bool(((actions < 0) | (actions >= own)).any()):
            raise ValueError(
                f"actions: wanted {steps} steps of the tasks' own actions, got shape {list(actions.shape)}"
            )
    if behaviours is not None:
        check_shapes(behaviours, R, 0 if policies is None else policies.shape[1])
        check_values(behaviours)

    def at_step(t: int) -> Tensor:
        return torch.full((), t, dtype=torch.int64, device=task_index.device)

    def sample(cumulative: Tensor, x: Tensor) -> Tensor:
        return (cumulative <= _uniform(x)[:, None]).sum(1)

    def draw(weights: Tensor, x: Tensor) -> Tensor:
        w = weights.double()
        left = _uniform(x).double()[:, None] * w.sum(1, keepdim=True)
        chosen = torch.full((R,), -1, dtype=torch.int64, device=x.device)
        for m in range(w.shape[1]):
            left[:, 0] -= w[:, m]
            chosen = torch.where((chosen < 0) & (left[:, 0] < 0) & (w[:, m] > 0), m, chosen)
        return chosen

    cumulative, starts = thresholds(transition), thresholds(start)
    everyone = torch.arange(R, dtype=torch.int64, device=transition.device)
    P = 0 if policies is None else policies.shape[1]
    if behaviours is None:
        behaviours = same_behaviours(R, P, {0: 1.0} if P else {"uniform": 1.0}, transition.device)
    acts = None if policies is None else thresholds(policies)
    x = philox(seed, record, at_step(0), 1)
    state, elapsed = sample(starts[task_index], x[0]), torch.zeros_like(task_index)
    who = draw(behaviours.initial, x[2])
    out = []
    for t in range(steps):
        x = philox(seed, record, at_step(t), 0)
        if actions is not None:
            action = actions[:, t]
        else:
            product, own = x[2] * num_actions[task_index], has[task_index, state]
            place = (product & 0xFFFFFFFF) * own.sum(1) >> 32
            another = (own.cumsum(1) <= place[:, None]).sum(1)
            action = anything = torch.where(own[everyone, product >> 32], product >> 32, another)
            if acts is not None:
                by_table = sample(acts[task_index, who.clamp_max(P - 1), state], x[2])
                explore = _uniform(x[3]) < behaviours.epsilon - behaviours.epsilon_decay * float(t)
                action = torch.where(explore | (who == P), anything, by_table)
        if not bool(has[task_index, state, action].all()):
            raise ValueError("actions, policies: wanted actions that the states have")
        following = sample(cumulative[task_index, state, action], x[0])
        std = (noise_state[task_index, following] + noise_action[task_index, state, action]).double()
        mean = reward[task_index, state, action, following].double()
        elapsed = elapsed + 1
        over = elapsed >= max_steps[task_index]
        done = torch.where(terminal[task_index, following], 1, 2 * over)
        gain = torch.where(std > 0, mean + std * _normal(x[1]), mean).float()
        outside = torch.full_like(who, 255)
        out.append((state, action, gain, done, who if actions is None else outside, following))
        x = philox(seed, record, at_step(t + 1), 1)
        ended = done > 0
        state = torch.where(ended, sample(starts[task_index], x[0]), following)
        elapsed = elapsed.masked_fill(ended, 0)
        who = torch.where(ended & (_uniform(x[1]) < behaviours.switch), draw(behaviours.later, x[2]), who)
    columns = [torch.stack(column, 1) for column in zip(*out, strict=True)]
    return tuple(column.to(dtype) for column, dtype in zip(columns, OUT_DTYPES, strict=True))


def philox(seed: Tensor, record: Tensor, step: Tensor, stream: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 in plain torch: four numbers below 2³² (int64) for int64 seeds, records and steps (steps < 2⁵⁶)."""
    low = 0xFFFFFFFF
    c = [step & low, step >> 32 | stream << 24, record & low, record >> 32 & low]
    k0, k1 = seed & low, seed >> 32 & low
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57  # int64 wraps round: the low 64 bits are right
        c = [p1 >> 32 & low ^ c[1] ^ k0, p1 & low, p0 >> 32 & low ^ c[3] ^ k1, p0 & low]
        k0, k1 = k0 + 0x9E3779B9 & low, k1 + 0xBB67AE85 & low
    return c[0], c[1], c[2], c[3]


def _uniform(x: Tensor) -> Tensor:
    return (x >> 8).float() * 2.0**-24


def _normal(x: Tensor) -> Tensor:
    """The normal quantile of (x + ½)/2³², float64: Wichura's AS 241 PPND7 by + - * / sqrt and frexp: portable bits."""

    p = (x.double() + 0.5) * 2.0**-32
    q = p - 0.5
    r = 0.180625 - q * q
    over = ((5.9109374720e1 * r + 1.5929113202e2) * r + 5.0434271938e1) * r + 3.3871327179
    under = ((6.7187563600e1 * r + 7.8757757664e1) * r + 1.7895169469e1) * r + 1
    middle = q * over / under

    m, e = torch.frexp(torch.where(q < 0, p, 1 - p))
    small = m < 0.70710678118654752
    m, e = torch.where(small, m * 2, m), torch.where(small, e - 1, e).double()
    z = (m - 1) / (m + 1)
    log = torch.full_like(z, 1.0 / 21)
    for k in range(19, 0, -2):
        log = log * (z * z) + 1.0 / k
    log = 2 * z * log + e * 0.69314718055994531
    r = torch.sqrt(-log)
    n, f = r - 1.6, r - 5
    near = ((1.7023821103e-1 * n + 1.3067284816) * n + 2.7568153900) * n + 1.4234372777
    near = near / ((1.2021132975e-1 * n + 7.3700164250e-1) * n + 1)
    far = ((1.7337203997e-2 * f + 4.2868294337e-1) * f + 3.0812263860) * f + 6.6579051150
    far = far / ((1.2258202635e-2 * f + 2.4197894225e-1) * f + 1)
    tail = torch.where(r <= 5, near, far)
    return torch.where(q.abs() <= 0.425, middle, torch.where(q < 0, -tail, tail))


def thresholds(p: Tensor) -> Tensor:
    """Cumulative sums of p's rows, 2 from the last positive entry on: no rounding can run past it."""
    past = p.flip(-1).cumsum(-1).flip(-1) <= p
    return torch.where(past, 2.0, p.double().cumsum(-1)).float()
