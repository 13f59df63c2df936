"""Batched simulation of tabular tasks and of the behaviour policies that gather data in them.

A step in inner state s under action a draws s' ~ transition[s,a,:], a reward ~ N(reward[s,a,s'], (noise_state[s'] +
noise_action[s,a])²), and ends the episode when s' is terminal (done = 1) or after max_steps steps (done = 2). The next
state is then drawn from `start` within the same step.

Random numbers are Philox4x32-10 (Salmon et al., SC 2011) with key `seed` and counter (step, stream, record): a
trajectory depends on its own seed, record number and tables alone, not on threads, on how records are split into
calls, or on how steps are split into calls.
"""

from __future__ import annotations

from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

from icrl_kernels import _C, _checks
from icrl_kernels._registry import define

BUILTIN = ("uniform", "random_policy", "q_learning", "model_based")
"""Behaviours that need no table; with P policy tables they have the indices P, P+1, P+2, P+3."""


_OUT = (torch.int16, torch.int16, torch.float32, torch.uint8, torch.uint8, torch.int16)  # as in Rollout


class RolloutTables(NamedTuple):
    """Tasks made ready for simulation by `rollout_tables`: N tasks of at most S states and A actions."""

    cumulative: Tensor  # [N,S,A,S] float32, written inside the window only
    window: Tensor  # [N,S,A,2] int16: first successor, how many
    reward: Tensor  # [N,S,A,S] float32
    noise_state: Tensor  # [N,S] float32
    noise_action: Tensor  # [N,S,A] float32
    start: Tensor  # [N,S] float32, cumulative
    terminal: Tensor  # [N,S] bool
    max_steps: Tensor  # [N] int64
    num_states: Tensor  # [N] int64
    num_actions: Tensor  # [N] int64


class Behaviours(NamedTuple):
    """Who acts in each of R records, all float32. M = P + 4 behaviours: P policy tables, then `BUILTIN`.

    A record's first behaviour is drawn by `initial`; at the end of an episode, with probability `switch`, another is
    drawn by `later`. Whoever acts, with probability max(0, epsilon - epsilon_decay·step) the action is uniform.

    `random_policy` is a softmax of policy_scale·N(0,1) logits, one policy a record. `q_learning` has the rate
    (H+1)/(H+n), H = 1/(1-q_discount) (Jin et al., 2018) and takes argmax Q + q_bonus·σ·sqrt(log(1+Σn)/n).
    `model_based` counts, and sweeps optimistic value iteration once over the states a step, with the bonus
    model_bonus·σ/sqrt(n); an untried action is worth (the best mean reward + bonus seen + σ)/(1-model_discount). σ is
    the root mean square of the record's rewards. Both learners observe every step, whoever acted.
    """

    initial: Tensor  # [R,M] weights
    later: Tensor  # [R,M] weights
    switch: Tensor  # [R]
    epsilon: Tensor  # [R]
    epsilon_decay: Tensor  # [R], per step
    policy_scale: Tensor  # [R]
    q_bonus: Tensor  # [R]
    q_discount: Tensor  # [R]
    model_bonus: Tensor  # [R]
    model_discount: Tensor  # [R]


class RolloutState(NamedTuple):
    """Where R records stand; passing it on continues them. A learner's tensors are empty where no record has it."""

    seed: Tensor  # [R] int64
    record: Tensor  # [R] int64, which of the seed's random sequences
    task: Tensor  # [R] int64
    step: Tensor  # [R] int64, since the record began
    state: Tensor  # [R] int64, inner state; -1: the next call draws a start
    elapsed: Tensor  # [R] int64, steps of this episode
    behaviour: Tensor  # [R] int64; -1: not drawn yet
    visits: Tensor  # [R,S,A] int32
    q: Tensor  # [R,S,A] float32
    reward_sum: Tensor  # [R,S,A] float32
    successors: Tensor  # [R,S,A,S] float32, counts
    span: Tensor  # [R,S,A,2] int16, the nonzero successors: first, past the last
    value: Tensor  # [R,S] float32
    reward_square: Tensor  # [R] float64, sum


class Rollout(NamedTuple):
    """T steps of R records, all [R,T]."""

    state: Tensor  # int16, inner state before acting
    action: Tensor  # int16
    reward: Tensor  # float32
    done: Tensor  # uint8: 0 no, 1 terminated, 2 truncated
    behaviour: Tensor  # uint8, who acted (also where epsilon made the action uniform); 255: actions from outside
    next_state: Tensor  # int16, s' before any reset
    final: RolloutState


def rollout_tables(
    transition: Tensor,
    reward: Tensor,
    noise_state: Tensor,
    noise_action: Tensor,
    start: Tensor,
    terminal: Tensor,
    max_steps: Tensor,
    num_states: Tensor,
    num_actions: Tensor,
) -> RolloutTables:
    """Check N tasks and sum their rows for sampling: once per set of tasks.

    Args:
        transition: [N,S,A,S] float32; rows of terminal states, and past a task's own states and actions, are not read.
        reward: [N,S,A,S] float32, mean. noise_state: [N,S], noise_action: [N,S,A] float32, their sum is the reward's
            standard deviation. start: [N,S] float32, probabilities. terminal: [N,S] bool.
        max_steps, num_states, num_actions: [N] int64.

    Raises:
        ValueError: a shape, dtype or device is not as above; a row is not a distribution over the task's own states
            (negative, NaN, or a sum off 1 by more than 1e-4); a start state is terminal; a reward or noise is not
            finite or a noise is negative; a size is out of range.
    """
    _checks.shape("transition", transition, ["N", "S", "A", "S"])
    N, S, A, _ = transition.shape
    _checks.shape("transition", transition, [N, S, A, S])
    if S > 32767:
        raise ValueError(f"transition: at most 32767 states, got {S}")
    named = {
        "transition": (transition, [N, S, A, S], torch.float32),
        "reward": (reward, [N, S, A, S], torch.float32),
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
            raise ValueError(f"{name}: wanted 1 to {most or 'any'}, got {int(size.min())} to {int(size.max())}")
    for name, noise in (("noise_state", noise_state), ("noise_action", noise_action)):
        if not bool(((noise >= 0) & noise.isfinite()).all()):
            raise ValueError(f"{name}: wanted finite values >= 0")

    transition, start, num_states, num_actions = (t.contiguous() for t in (transition, start, num_states, num_actions))
    reward, noise_state, noise_action = (t.contiguous() for t in (reward, noise_state, noise_action))
    terminal, max_steps = terminal.contiguous(), max_steps.contiguous()
    cumulative, window = torch.empty_like(transition), torch.empty(N, S, A, 2, dtype=torch.int16)
    start_cumulative = torch.empty_like(start)
    inputs = (transition, reward, start, terminal, num_states, num_actions, cumulative, window, start_cumulative)
    kind, index = _C.rollout_tables(*(t.data_ptr() for t in inputs), N, S, A, torch.get_num_threads())
    if kind == 3:
        raise ValueError(
            f"start[{index}]: wanted probabilities with sum 1 on the task's own states that are not terminal"
        )
    if kind:
        place = f"[{index // A // S}, {index // A % S}, {index % A}]"
        if kind == 2:
            raise ValueError(f"reward{place}: wanted finite values where transition is positive")
        total = float(transition.view(-1, S)[index].double().sum())
        raise ValueError(
            f"transition{place}: wanted probabilities with sum 1 on the task's own states, got sum {total:g}"
        )
    rest = (reward, noise_state, noise_action, start_cumulative, terminal, max_steps, num_states, num_actions)
    return RolloutTables(cumulative, window, *rest)


def rollout_start(
    tables: RolloutTables,
    *,
    seed: int | Tensor,
    task_index: Tensor | None = None,
    record: Tensor | None = None,
    behaviours: Behaviours | None = None,
) -> RolloutState:
    """The beginning of R records, the start states drawn.

    Args:
        seed: an int, or [R] int64. task_index: [R] int64, each record's task; 0..N-1 by default.
        record: [R] int64, each record's random sequence under the seed; 0..R-1 by default. Give it to split a batch.
        behaviours: only what the learners among them need is allocated.

    Raises:
        ValueError: a shape, dtype or device is not as above, or task_index is out of range.
    """
    N, S, A, _ = tables.reward.shape
    task = torch.arange(N) if task_index is None else task_index
    _checks.shape("task_index", task, ["R"])
    R = task.shape[0]
    if not isinstance(seed, Tensor):
        if not isinstance(seed, Integral):
            raise ValueError(f"seed: wanted an int or a tensor, got {seed!r}")
        seed = torch.full((R,), _as_int64(int(seed)), dtype=torch.int64)
    record = torch.arange(R) if record is None else record
    for name, tensor in (("task_index", task), ("record", record), ("seed", seed)):
        _checks.shape(name, tensor, ["R"], R=R)
        _checks.dtype(name, tensor, [torch.int64])
    _on_cpu(task_index=task, record=record, seed=seed)
    uses_q = uses_model = False
    if behaviours is not None:
        weights = behaviours.initial + behaviours.later
        uses_q, uses_model = bool((weights[:, -2] > 0).any()), bool((weights[:, -1] > 0).any())

    def learner(used: bool, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape if used else 0, dtype=dtype)

    state = RolloutState(
        seed=seed.clone(),
        record=record.clone(),
        task=task.clone(),
        step=torch.zeros(R, dtype=torch.int64),
        state=torch.full((R,), -1),
        elapsed=torch.zeros(R, dtype=torch.int64),
        behaviour=torch.full((R,), -1),
        visits=learner(uses_q or uses_model, R, S, A, dtype=torch.int32),
        q=learner(uses_q, R, S, A),
        reward_sum=learner(uses_model, R, S, A),
        successors=learner(uses_model, R, S, A, S),
        span=learner(uses_model, R, S, A, 2, dtype=torch.int16),
        value=learner(uses_model, R, S),
        reward_square=learner(uses_q or uses_model, R, dtype=torch.float64),
    )
    nothing = torch.empty(R, 0, dtype=torch.int64)
    torch.ops.icrl.rollout(*tables, None, [], nothing, list(state), 0, "auto")
    return state


def rollout(
    tables: RolloutTables,
    *,
    steps: int,
    seed: int | Tensor | None = None,
    task_index: Tensor | None = None,
    policies: Tensor | None = None,
    behaviours: Behaviours | None = None,
    state: RolloutState | None = None,
) -> Rollout:
    """Simulate `steps` steps of R records. `state` is not changed; the result's `final` continues it bit for bit.

    Args:
        seed, task_index: as in `rollout_start`, for new records; leave out with `state`.
        policies: [N,P,S,A] float32 action probabilities of P behaviours.
        behaviours: who acts; by default the first policy, or uniform actions where there are no policies.
        state: continues these records, with the same behaviours.

    Raises:
        ValueError: a shape, dtype or device is not as above; a policy row is not a distribution over the task's own
            actions; behaviours are out of range (negative weights, epsilon outside [0,1], discount outside [0,1), ...).
    """
    if (seed is None) == (state is None):
        raise ValueError("seed, state: give exactly one of them")
    if state is not None and task_index is not None:
        raise ValueError("task_index: the state already says which task each record has")
    if policies is not None:
        _checks.shape("policies", policies, ["N", "P", "S", "A"])
    if task_index is not None:
        _checks.shape("task_index", task_index, ["R"])
    P = 0 if policies is None else policies.shape[1]
    task = (
        state.task if state is not None else torch.arange(tables.reward.shape[0]) if task_index is None else task_index
    )
    R = task.shape[0]
    if behaviours is None:
        behaviours = constant_behaviours(R, P, {0: 1.0} if P else {"uniform": 1.0})
    _check_behaviours(behaviours, R, P)
    if state is None:
        assert seed is not None
        final = rollout_start(tables, seed=seed, task_index=task, behaviours=behaviours)
    else:
        _check_state(state, tables, R)
        final = RolloutState(*(t.clone() for t in state))
    cumulative = None if policies is None else _cumulative_policies(policies, tables)
    out = torch.ops.icrl.rollout(*tables, cumulative, list(behaviours), None, list(final), _steps(steps), "auto")
    return Rollout._make([*out, final])


def rollout_step(tables: RolloutTables, state: RolloutState, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One step of every record under outside actions; `state` is changed in place.

    `rollout` under a deterministic policy and a loop of `rollout_step` with the same actions agree bit for bit.

    Args:
        action: [R] int64.

    Returns:
        reward [R] float32, done [R] uint8 (0 no, 1 terminated, 2 truncated), next_state [R] int16 (s' before any reset;
        after it, the state to act in is `state.state`).

    Raises:
        ValueError: a shape or dtype is not as above, or an action is not one of its task's.
    """
    _checks.shape("action", action, ["R"], R=state.task.shape[0])
    _checks.dtype("action", action, [torch.int64])
    out = torch.ops.icrl.rollout(*tables, None, [], action.contiguous().unsqueeze(1), list(state), 1, "auto")
    return out[2].squeeze(1), out[3].squeeze(1), out[5].squeeze(1)


def constant_behaviours(
    num_records: int, num_policies: int, weights: dict[int | str, float], **settings: float
) -> Behaviours:
    """The same `Behaviours` for every record: weights by policy index or `BUILTIN` name, the rest by field name."""
    names = {**{i: i for i in range(num_policies)}, **{name: num_policies + i for i, name in enumerate(BUILTIN)}}
    row = torch.zeros(num_policies + len(BUILTIN))
    for name, weight in weights.items():
        if name not in names:
            raise ValueError(f"weights: wanted a policy below {num_policies} or one of {BUILTIN}, got {name!r}")
        row[names[name]] = weight
    values = {"switch": 0.0, "epsilon": 0.0, "epsilon_decay": 0.0, "policy_scale": 1.0}
    values |= {"q_bonus": 0.2, "q_discount": 0.9, "model_bonus": 0.3, "model_discount": 0.9}
    if unknown := set(settings) - set(values):
        raise ValueError(f"settings: wanted {', '.join(values)}, got {', '.join(sorted(unknown))}")
    values |= settings
    rows = row.expand(num_records, -1).contiguous()
    return Behaviours(rows, rows, **{name: torch.full((num_records,), float(v)) for name, v in values.items()})


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
) -> tuple[Tensor, ...]:
    """The specification in plain torch, rewards in float64 arithmetic: the fields of `Rollout` but the last.

    The same bits as `rollout`, for behaviours that are policy tables or uniform, or for outside `actions` [R,T].
    """
    R = task_index.shape[0]

    def sample(cumulative: Tensor, x: Tensor) -> Tensor:
        return (cumulative <= _uniform(x)[:, None]).sum(1)

    def draw(weights: Tensor, x: Tensor) -> Tensor:
        w = weights.double()
        left = _uniform(x).double()[:, None] * w.sum(1, keepdim=True)
        chosen = torch.full((R,), -1)
        for m in range(w.shape[1]):
            left[:, 0] -= w[:, m]
            chosen = torch.where((chosen < 0) & (left[:, 0] < 0) & (w[:, m] > 0), m, chosen)
        return chosen

    cumulative, starts = _thresholds(transition), _thresholds(start)
    P = 0 if policies is None else policies.shape[1]
    if behaviours is None:
        behaviours = constant_behaviours(R, P, {0: 1.0} if P else {"uniform": 1.0})
    acts = None if policies is None else _thresholds(policies)
    x = philox(seed, record, torch.tensor(0), 1)
    state, elapsed = sample(starts[task_index], x[0]), torch.zeros(R, dtype=torch.int64)
    who = draw(behaviours.initial, x[2])
    out = []
    for t in range(steps):
        x = philox(seed, record, torch.tensor(t), 0)
        if actions is not None:
            action = actions[:, t]
        else:
            action = anything = x[2] * num_actions[task_index] >> 32
            if acts is not None:
                by_table = sample(acts[task_index, who.clamp_max(P - 1), state], x[2])
                explore = _uniform(x[3]) < behaviours.epsilon - behaviours.epsilon_decay * float(t)
                action = torch.where(explore | (who == P), anything, by_table)
        following = sample(cumulative[task_index, state, action], x[0])
        std = (noise_state[task_index, following] + noise_action[task_index, state, action]).double()
        mean = reward[task_index, state, action, following].double()
        elapsed = elapsed + 1
        over = elapsed >= max_steps[task_index]
        done = torch.where(terminal[task_index, following], 1, 2 * over)
        gain = torch.where(std > 0, mean + std * _normal(x[1]), mean).float()
        outside = torch.full_like(who, 255)
        out.append((state, action, gain, done, who if actions is None else outside, following))
        x = philox(seed, record, torch.tensor(t + 1), 1)
        ended = done > 0
        state = torch.where(ended, sample(starts[task_index], x[0]), following)
        elapsed = elapsed.masked_fill(ended, 0)
        who = torch.where(ended & (_uniform(x[1]) < behaviours.switch), draw(behaviours.later, x[2]), who)
    columns = [torch.stack(column, 1) for column in zip(*out, strict=True)]
    return tuple(column.to(dtype) for column, dtype in zip(columns, _OUT, strict=True))


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


def _thresholds(p: Tensor) -> Tensor:
    """Cumulative sums of p's rows, 2 from the last positive entry on: no rounding can run past it."""
    past = p.flip(-1).cumsum(-1).flip(-1) <= p
    return torch.where(past, 2.0, p.double().cumsum(-1)).float()


def _as_int64(seed: int) -> int:
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed: wanted 64 bits, got {seed}")
    return seed - 2**64 if seed >= 2**63 else seed


def _steps(steps: int) -> int:
    if not isinstance(steps, Integral) or steps < 0:
        raise ValueError(f"steps: wanted an int >= 0, got {steps!r}")
    return steps


def _on_cpu(**tensors: Tensor) -> None:
    device = _checks.same_device(**tensors)
    if device.type != "cpu":
        raise ValueError(f"rollout runs on the CPU; a kernel for {device.type!r} is not written yet")


def _cumulative_policies(policies: Tensor, tables: RolloutTables) -> Tensor:
    N, S, A, _ = tables.reward.shape
    _checks.shape("policies", policies, [N, "P", S, A], N=N, S=S, A=A)
    _checks.dtype("policies", policies, [torch.float32])
    _on_cpu(policies=policies, reward=tables.reward)
    own_action = torch.arange(A) < tables.num_actions[:, None]
    acts = ((torch.arange(S) < tables.num_states[:, None]) & ~tables.terminal)[:, None].expand(policies.shape[:3])
    ok = (policies.double().sum(3) - 1).abs() <= 1e-4
    ok &= ((policies >= 0) & (own_action[:, None, None] | (policies == 0))).all(3)
    if bool((acts & ~ok).any()):
        n, p, s = (acts & ~ok).nonzero()[0].tolist()
        raise ValueError(f"policies[{n}, {p}, {s}]: wanted probabilities with sum 1 on the task's own actions")
    return _thresholds(policies)


def _check_behaviours(behaviours: Behaviours, R: int, P: int) -> None:
    for name, tensor in behaviours._asdict().items():
        _checks.shape(name, tensor, [R, P + len(BUILTIN)] if name in ("initial", "later") else [R])
        _checks.dtype(name, tensor, [torch.float32])
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: wanted contiguous")
        if name in ("q_discount", "model_discount"):
            ok, wanted = (tensor >= 0) & (tensor < 1), "values in [0, 1)"
        elif name in ("switch", "epsilon"):
            ok, wanted = (tensor >= 0) & (tensor <= 1), "values in [0, 1]"
        else:
            ok, wanted = (tensor >= 0) & tensor.isfinite(), "finite values >= 0"
        if not bool(ok.all()):
            raise ValueError(f"{name}: wanted {wanted}")
    if not bool((behaviours.initial.sum(1) > 0).all()):
        raise ValueError("initial: wanted a positive weight in every record")
    if not bool(((behaviours.later.sum(1) > 0) | (behaviours.switch == 0)).all()):
        raise ValueError("later: wanted a positive weight in every record that switches")


def _check_state(state: RolloutState, tables: RolloutTables, R: int) -> None:
    _, S, A, _ = tables.reward.shape
    sizes = {
        "visits": [S, A],
        "q": [S, A],
        "reward_sum": [S, A],
        "successors": [S, A, S],
        "span": [S, A, 2],
        "value": [S],
    }
    dtypes = {"visits": torch.int32, "span": torch.int16, "reward_square": torch.float64}
    for i, (name, tensor) in enumerate(state._asdict().items()):
        if i < 7 or tensor.numel():
            _checks.shape(f"state.{name}", tensor, [R, *sizes.get(name, [])])
        _checks.dtype(f"state.{name}", tensor, [torch.int64 if i < 7 else dtypes.get(name, torch.float32)])
    _on_cpu(**state._asdict())


def _rollout_cpu(
    cumulative: Tensor,
    window: Tensor,
    reward: Tensor,
    noise_state: Tensor,
    noise_action: Tensor,
    start: Tensor,
    terminal: Tensor,
    max_steps: Tensor,
    num_states: Tensor,
    num_actions: Tensor,
    policies: Tensor | None,
    behaviours: list[Tensor],
    actions: Tensor | None,
    state: list[Tensor],
    steps: int,
) -> tuple[Tensor, ...]:
    N, S, A, _ = reward.shape
    P = 0 if policies is None else policies.shape[1]
    records = state[0].shape
    if any(t.shape != records or t.dtype != torch.int64 or t.device.type != "cpu" for t in state[:7]):
        for name, t in zip(RolloutState._fields, state[:7], strict=False):
            _checks.dtype(f"state.{name}", t, [torch.int64])
            _checks.shape(f"state.{name}", t, ["R"], R=state[0].numel())
        raise ValueError("state: wanted tensors on the CPU")
    if actions is not None:
        _checks.shape("action", actions, ["R", "T"], R=records[0])
        _checks.dtype("action", actions, [torch.int64])
        if actions.shape[1] < steps:
            raise ValueError(f"action: wanted {steps} steps of actions, got {actions.shape[1]}")
    if not all(t.is_contiguous() for t in state):
        raise ValueError("state: wanted contiguous tensors")
    if behaviours:
        weights = behaviours[0] + behaviours[1]
        for i, names in ((-2, ("visits", "q", "reward_square")), (-1, RolloutState._fields[9:])):
            if bool((weights[:, i] > 0).any()) and any(not state[RolloutState._fields.index(n)].numel() for n in names):
                raise ValueError(f"state: was started without {BUILTIN[i]}, which the behaviours use")
    out = tuple(torch.empty(state[0].shape[0], steps, dtype=dtype) for dtype in _OUT)
    tables = (
        cumulative,
        window,
        reward,
        noise_state,
        noise_action,
        start,
        terminal,
        max_steps,
        num_states,
        num_actions,
    )
    _C.rollout(
        [t.data_ptr() for t in tables],
        0 if policies is None else policies.data_ptr(),
        [t.data_ptr() for t in behaviours],
        0 if actions is None else actions.data_ptr(),
        [t.data_ptr() for t in state],
        [t.data_ptr() for t in out],
        *(N, S, A, P, state[0].shape[0], steps, torch.get_num_threads()),
    )
    return out


def _rollout_fake(cumulative: Tensor, *args: Any) -> tuple[Tensor, ...]:
    state, steps = args[-3], args[-2]
    return tuple(cumulative.new_empty(state[0].shape[0], steps, dtype=dtype) for dtype in _OUT)


define(
    "rollout(Tensor cumulative, Tensor window, Tensor reward, Tensor noise_state, Tensor noise_action, Tensor start, "
    "Tensor terminal, Tensor max_steps, Tensor num_states, Tensor num_actions, Tensor? policies, Tensor[] behaviours, "
    "Tensor? actions, Tensor(a!)[] state, int steps, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    {"cpu": (("cpu",), _rollout_cpu)},
    _rollout_fake,
)
