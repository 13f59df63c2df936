"""Batched simulation of tabular tasks and of the behaviour policies that gather data in them.

A step in inner state s under action a draws s' ~ transition[s,a,:], a reward ~ N(reward[s,a,s'], (noise_state[s'] +
noise_action[s,a])²), and ends the episode when s' is terminal (done = 1) or after max_steps steps (done = 2). The next
state is then drawn from `start` within the same step.

Random numbers are Philox4x32-10 (Salmon et al., SC 2011) with key `seed` and counter (step, stream, record): a
trajectory depends on its own seed, record number and tables alone, not on threads, on how records are split into
calls, or on how steps are split into calls.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from icrl_kernels import _C, _checks
from icrl_kernels._registry import define

BUILTIN = ("uniform", "random_policy", "q_learning", "model_based")
"""Behaviours that need no table; with P policy tables they have the indices P, P+1, P+2, P+3."""


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
    `model_based` counts, and plans one optimistic Gauss-Seidel sweep a step with the bonus model_bonus·σ/sqrt(n); untried
    actions are worth the best mean reward seen, for ever. σ is the root mean square of the record's rewards. Both
    learners observe every step, whoever acted.
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
    """Where R records stand; passing it on continues them. Learner tensors are empty where no record has the learner."""

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
        transition: [N,S,A,S] float32; rows of terminal states, and of states and actions past a task's own, are not read.
        reward: [N,S,A,S] float32, mean. noise_state: [N,S], noise_action: [N,S,A] float32, their sum is the reward's
            standard deviation. start: [N,S] float32. terminal: [N,S] bool. max_steps, num_states, num_actions: [N] int64.

    Raises:
        ValueError: a shape, dtype or device is not as above; a row is not a distribution over the task's own states
            (negative, NaN, or a sum off 1 by more than 1e-4); a start state is terminal; a reward or noise is not finite
            or a noise is negative; a size is out of range.
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
    for name, size, most in (("max_steps", max_steps, None), ("num_states", num_states, S), ("num_actions", num_actions, A)):
        if N and (int(size.min()) < 1 or (most is not None and int(size.max()) > most)):
            raise ValueError(f"{name}: wanted 1 to {most or 'any'}, got {int(size.min())} to {int(size.max())}")
    for name, noise in (("noise_state", noise_state), ("noise_action", noise_action)):
        if not bool(((noise >= 0) & noise.isfinite()).all()):
            raise ValueError(f"{name}: wanted finite values >= 0")

    transition, start, num_states, num_actions = (t.contiguous() for t in (transition, start, num_states, num_actions))
    rest = [t.contiguous() for t in (reward, noise_state, noise_action, terminal, max_steps)]
    cumulative, window = torch.empty_like(transition), torch.empty(N, S, A, 2, dtype=torch.int16)
    start_cumulative = torch.empty_like(start)
    inputs = (transition, rest[0], start, rest[3], num_states, num_actions, cumulative, window, start_cumulative)
    kind, index = _C.rollout_tables(*(t.data_ptr() for t in inputs), N, S, A, torch.get_num_threads())
    if kind == 3:
        raise ValueError(f"start[{index}]: wanted probabilities with sum 1 on the task's own states that are not terminal")
    if kind:
        place = f"[{index // A // S}, {index // A % S}, {index % A}]"
        if kind == 2:
            raise ValueError(f"reward{place}: wanted finite values where transition is positive")
        total = float(transition.view(-1, S)[index].double().sum())
        raise ValueError(f"transition{place}: wanted probabilities with sum 1 on the task's own states, got sum {total:g}")
    return RolloutTables(cumulative, window, *rest[:3], start_cumulative, rest[3], rest[4], num_states, num_actions)


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
    seed = torch.full((R,), _as_int64(seed), dtype=torch.int64) if isinstance(seed, int) else seed
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
    P = 0 if policies is None else policies.shape[1]
    task = state.task if state is not None else torch.arange(tables.reward.shape[0]) if task_index is None else task_index
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
    return Rollout(*out, final)


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


def constant_behaviours(num_records: int, num_policies: int, weights: dict[int | str, float], **settings: float) -> Behaviours:
    """The same `Behaviours` for every record: weights by policy index or `BUILTIN` name, the rest by field name."""
    names = {**{i: i for i in range(num_policies)}, **{name: num_policies + i for i, name in enumerate(BUILTIN)}}
    row = torch.zeros(num_policies + len(BUILTIN))
    for name, weight in weights.items():
        if name not in names:
            raise ValueError(f"weights: wanted a policy below {num_policies} or one of {BUILTIN}, got {name!r}")
        row[names[name]] = weight
    values = {"switch": 0.0, "epsilon": 0.0, "epsilon_decay": 0.0, "policy_scale": 1.0}
    values |= {"q_bonus": 0.2, "q_discount": 0.9, "model_bonus": 0.2, "model_discount": 0.95}
    if unknown := set(settings) - set(values):
        raise ValueError(f"settings: wanted {', '.join(values)}, got {', '.join(sorted(unknown))}")
    values |= settings
    rows = row.expand(num_records, -1).contiguous()
    return Behaviours(rows, rows, **{name: torch.full((num_records,), float(v)) for name, v in values.items()})


def _as_int64(seed: int) -> int:
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed: wanted 64 bits, got {seed}")
    return seed - 2**64 if seed >= 2**63 else seed


def _steps(steps: int) -> int:
    if steps < 0:
        raise ValueError(f"steps: wanted >= 0, got {steps}")
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
    total = policies.double().cumsum(3)
    last = total.gather(3, (tables.num_actions - 1).view(N, 1, 1, 1).expand(*policies.shape[:3], 1))[..., 0]
    ok = (last - 1).abs() <= 1e-4
    ok &= ((policies >= 0) & (own_action[:, None, None] | (policies == 0))).all(3)
    if bool((acts & ~ok).any()):
        n, p, s = (acts & ~ok).nonzero()[0].tolist()
        raise ValueError(f"policies[{n}, {p}, {s}]: wanted probabilities with sum 1 on the task's own actions")
    # from the last positive action on, 2: no rounding can run past it
    past = policies.flip(3).cumsum(3).flip(3) <= policies
    return torch.where(past, 2.0, total).float().contiguous()


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
    sizes = {"visits": [S, A], "q": [S, A], "reward_sum": [S, A], "successors": [S, A, S], "span": [S, A, 2], "value": [S]}
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
    if not all(t.is_contiguous() for t in state):
        raise ValueError("state: wanted contiguous tensors")
    if behaviours:
        weights = behaviours[0] + behaviours[1]
        for i, names in ((-2, ("visits", "q", "reward_square")), (-1, RolloutState._fields[9:])):
            if bool((weights[:, i] > 0).any()) and any(not state[RolloutState._fields.index(n)].numel() for n in names):
                raise ValueError(f"state: was started without {BUILTIN[i]}, which the behaviours use")
    out = _outputs(state[0].shape[0], steps)
    tables = (cumulative, window, reward, noise_state, noise_action, start, terminal, max_steps, num_states, num_actions)
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


def _outputs(R: int, T: int) -> tuple[Tensor, ...]:
    """In `Rollout`'s order."""
    dtypes = (torch.int16, torch.int16, torch.float32, torch.uint8, torch.uint8, torch.int16)
    return tuple(torch.empty(R, T, dtype=dtype) for dtype in dtypes)


def _rollout_fake(cumulative: Tensor, *args: object) -> tuple[Tensor, ...]:
    state, steps = args[-3], args[-2]
    assert isinstance(state, list)
    assert isinstance(steps, (int, torch.SymInt))
    dtypes = (torch.int16, torch.int16, torch.float32, torch.uint8, torch.uint8, torch.int16)
    return tuple(cumulative.new_empty(state[0].shape[0], steps, dtype=dtype) for dtype in dtypes)


define(
    "rollout(Tensor cumulative, Tensor window, Tensor reward, Tensor noise_state, Tensor noise_action, Tensor start, "
    "Tensor terminal, Tensor max_steps, Tensor num_states, Tensor num_actions, Tensor? policies, Tensor[] behaviours, "
    "Tensor? actions, Tensor(a!)[] state, int steps, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    {"cpu": (("cpu",), _rollout_cpu)},
    _rollout_fake,
)
