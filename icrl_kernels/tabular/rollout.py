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
from icrl_kernels.tabular.behaviours import BUILTIN, Behaviours, check_behaviours, constant_behaviours
from icrl_kernels.tabular.rollout_reference import OUT_DTYPES, thresholds
from icrl_kernels.tabular.rollout_tables import RolloutTables

MOST_POLICIES = 255 - len(BUILTIN)  # Rollout.behaviour is uint8, and 255 is taken


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
    successors: Tensor  # [R,S,S,A] float32, counts of (state, next state, action)
    span: Tensor  # [R,S,2] int16, the next states seen, after any action: first, past the last
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
    labels: Tensor  # int16 [R,T,G], what the references would have done in `state`
    final: RolloutState


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
    N, S, A = tables.offset.shape
    device = tables.offset.device
    task = torch.arange(N, device=device) if task_index is None else task_index
    _checks.shape("task_index", task, ["R"])
    R = task.shape[0]
    if not isinstance(seed, Tensor):
        if not isinstance(seed, Integral):
            raise ValueError(f"seed: wanted an int or a tensor, got {seed!r}")
        seed = torch.full((R,), _as_int64(int(seed)), dtype=torch.int64, device=device)
    record = torch.arange(R, device=device) if record is None else record
    for name, tensor in (("task_index", task), ("record", record), ("seed", seed)):
        _checks.shape(name, tensor, ["R"], R=R)
        _checks.dtype(name, tensor, [torch.int64])
    _checks.same_device(tables=tables.offset, task_index=task, record=record, seed=seed)
    uses_q = uses_model = False
    if behaviours is not None:
        weights = behaviours.initial + behaviours.later
        uses_q, uses_model = bool((weights[:, -2] > 0).any()), bool((weights[:, -1] > 0).any())

    def learner(used: bool, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape if used else 0, dtype=dtype, device=device)

    state = RolloutState(
        seed=seed.clone(),
        record=record.clone(),
        task=task.clone(),
        step=torch.zeros_like(task),
        state=torch.full_like(task, -1),
        elapsed=torch.zeros_like(task),
        behaviour=torch.full_like(task, -1),
        visits=learner(uses_q or uses_model, R, S, A, dtype=torch.int32),
        q=learner(uses_q, R, S, A),
        reward_sum=learner(uses_model, R, S, A),
        successors=learner(uses_model, R, S, S, A),
        span=learner(uses_model, R, S, 2, dtype=torch.int16),
        value=learner(uses_model, R, S),
        reward_square=learner(uses_q or uses_model, R, dtype=torch.float64),
    )
    nothing = torch.empty(R, 0, dtype=torch.int64, device=device)
    torch.ops.icrl.rollout(*tables, None, None, [], nothing, list(state), 0, "auto")
    return state


def rollout(
    tables: RolloutTables,
    *,
    steps: int,
    seed: int | Tensor | None = None,
    task_index: Tensor | None = None,
    policies: Tensor | None = None,
    behaviours: Behaviours | None = None,
    references: Tensor | None = None,
    state: RolloutState | None = None,
    backend: str = "auto",
) -> Rollout:
    """Simulate `steps` steps of R records. `state` is not changed; the result's `final` continues it bit for bit.

    Args:
        seed, task_index: as in `rollout_start`, for new records; leave out with `state`.
        policies: P ≤ 251 behaviours: [N,P,S,A] float32 action probabilities, or [N,P,S] integers, the actions of deterministic
            policies (the same steps as with probabilities 1 and 0, for less time and memory).
        behaviours: who acts; by default the first policy, or uniform actions where there are no policies.
        references: [N,G,S] integers, actions of G policies, which label every step.
        state: continues these records, with the same behaviours.
        backend: "cpu", "cuda", or "plain": the GPU's code on the CPU, record by record. All give the same bits.

    Raises:
        ValueError: a shape, dtype or device is not as above; a policy row is not a distribution over the task's own
            actions; behaviours are out of range (negative weights, epsilon outside [0,1], discount outside [0,1), ...).
    """
    if (seed is None) == (state is None):
        raise ValueError("seed, state: give exactly one of them")
    if state is not None and task_index is not None:
        raise ValueError("task_index: the state already says which task each record has")
    if policies is not None:
        policies = _policies(policies, tables)
        if policies.shape[1] > MOST_POLICIES:
            raise ValueError(f"policies: wanted at most {MOST_POLICIES} behaviours, got {policies.shape[1]}")
    if task_index is not None:
        _checks.shape("task_index", task_index, ["R"])
    P = 0 if policies is None else policies.shape[1]
    given = task_index if state is None else state.task
    R = tables.offset.shape[0] if given is None else given.shape[0]
    if behaviours is None:
        behaviours = constant_behaviours(R, P, {0: 1.0} if P else {"uniform": 1.0})
        behaviours = Behaviours(*(t.to(tables.offset.device) for t in behaviours))
    _checks.same_device(tables=tables.offset, **behaviours._asdict())
    check_behaviours(behaviours, R, P)
    if state is None:
        assert seed is not None
        final = rollout_start(tables, seed=seed, task_index=task_index, behaviours=behaviours)
    else:
        _check_state(state, tables, R)
        final = RolloutState(*(t.clone() for t in state))
    if references is not None:
        references = _references(references, tables)
    arguments = (policies, references, list(behaviours), None, list(final), _steps(steps), backend)
    return Rollout._make([*torch.ops.icrl.rollout(*tables, *arguments), final])


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
    R = state.task.shape[0]
    _checks.shape("action", action, ["R"], R=R)
    _checks.dtype("action", action, [torch.int64])
    _checks.same_device(tables=tables.offset, state=state.seed, action=action)
    action = action.contiguous()
    if action.device.type != "cpu" or _checks.compiling() or type(action) is not Tensor:
        arguments = (None, None, [], action.unsqueeze(1), list(state), 1, "auto")
        out = torch.ops.icrl.rollout(*tables, *arguments)
        return out[2].squeeze(1), out[3].squeeze(1), out[5].squeeze(1)
    _check_tables(tables)
    # past the dispatcher, which takes longer than a step of a few hundred records
    reward, done = torch.empty(R), torch.empty(R, dtype=torch.uint8)
    next_state = torch.empty(R, dtype=torch.int16)
    _check_records(state, "cpu")
    N, S, A = tables.offset.shape
    pointers = [t.data_ptr() for t in state]
    out = [0, 0, reward.data_ptr(), done.data_ptr(), 0, next_state.data_ptr(), 0]
    sizes = (N, S, A, 0, 0, R, 1, False, torch.get_num_threads())
    _C.rollout([t.data_ptr() for t in tables], 0, 0, 0, [], action.data_ptr(), pointers, out, *sizes)
    return reward, done, next_state


def _as_int64(seed: int) -> int:
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed: wanted 64 bits, got {seed}")
    return seed - 2**64 if seed >= 2**63 else seed


def _steps(steps: int) -> int:
    if not isinstance(steps, Integral) or steps < 0:
        raise ValueError(f"steps: wanted an int >= 0, got {steps!r}")
    return steps


def _policies(policies: Tensor, tables: RolloutTables) -> Tensor:
    """Actions [N,P,S] int16, or probabilities as thresholds."""
    N, S, A = tables.offset.shape
    _checks.same_device(policies=policies, offset=tables.offset)
    device = policies.device
    states = torch.arange(S, device=device)
    acts = ((states < tables.num_states[:, None]) & ~tables.terminal)[:, None]
    if not policies.dtype.is_floating_point:
        policies = _actions("policies", policies, [N, "P", S], N=N, S=S)
        bad = acts & ((policies < 0) | (policies >= tables.num_actions[:, None, None]))
        if bool(bad.any()):
            n, p, s = bad.nonzero()[0].tolist()
            raise ValueError(f"policies[{n}, {p}, {s}]: wanted one of the task's own actions, got {policies[n, p, s]}")
        return policies
    _checks.shape("policies", policies, [N, "P", S, A], N=N, S=S, A=A)
    _checks.dtype("policies", policies, [torch.float32])
    own_action = torch.arange(A, device=device) < tables.num_actions[:, None]
    ok = (policies.double().sum(3) - 1).abs() <= 1e-4
    ok &= ((policies >= 0) & (own_action[:, None, None] | (policies == 0))).all(3)
    if bool((acts & ~ok).any()):
        n, p, s = (acts & ~ok).nonzero()[0].tolist()
        raise ValueError(f"policies[{n}, {p}, {s}]: wanted probabilities with sum 1 on the task's own actions")
    return thresholds(policies)


def _references(references: Tensor, tables: RolloutTables) -> Tensor:
    N, S, _ = tables.offset.shape
    _checks.same_device(references=references, offset=tables.offset)
    return _actions("references", references, [N, "G", S], N=N, S=S).transpose(1, 2).contiguous()


def _actions(name: str, actions: Tensor, wanted: list[int | str], **sizes: int) -> Tensor:
    _checks.shape(name, actions, wanted, **sizes)
    _checks.dtype(name, actions, [torch.int16, torch.int32, torch.int64, torch.int8, torch.uint8])
    if actions.dtype not in (torch.int16, torch.int8, torch.uint8) and actions.numel():
        low, high = int(actions.min()), int(actions.max())
        if low < -32768 or high > 32767:
            raise ValueError(f"{name}: wanted actions that fit 16 bits, got {low} to {high}")
    return actions.to(torch.int16).contiguous()


def _check_state(state: RolloutState, tables: RolloutTables, R: int) -> None:
    _, S, A = tables.offset.shape
    sizes = {
        "visits": [S, A],
        "q": [S, A],
        "reward_sum": [S, A],
        "successors": [S, S, A],
        "span": [S, 2],
        "value": [S],
    }
    dtypes = {"visits": torch.int32, "span": torch.int16, "reward_square": torch.float64}
    for i, (name, tensor) in enumerate(state._asdict().items()):
        if i < 7 or tensor.numel():
            _checks.shape(f"state.{name}", tensor, [R, *sizes.get(name, [])])
        _checks.dtype(f"state.{name}", tensor, [torch.int64 if i < 7 else dtypes.get(name, torch.float32)])
    _checks.same_device(offset=tables.offset, **state._asdict())


def _check_tables(tables: RolloutTables) -> None:
    device = tables.offset.device
    for i, t in enumerate(tables):
        if t.device != device or not t.is_contiguous():
            raise ValueError(
                f"tables.{tables._fields[i]}: wanted a contiguous tensor on {device}, as offset is, "
                f"got one on {t.device} with strides {t.stride()}"
            )


def _check_records(state: RolloutState, device: str) -> None:
    records = state.seed.shape
    for t in state[:7]:
        if t.shape != records or t.dtype != torch.int64 or t.device.type != device:
            break
    else:
        for t in state:
            if not t.is_contiguous():
                raise ValueError("state: wanted contiguous tensors")
        return
    for name, t in state._asdict().items():
        if name == "visits":
            break
        _checks.dtype(f"state.{name}", t, [torch.int64])
        _checks.shape(f"state.{name}", t, ["R"], R=state.seed.numel())
    raise ValueError(f"state: wanted tensors on {device!r}")


def _prepare(args: tuple[Any, ...]) -> tuple[tuple[Tensor, ...], list[Any]]:
    """The op's outputs, and the arguments of the C++ functions."""
    tables, (policies, references, behaviours, actions, state, steps) = RolloutTables(*args[:11]), args[11:]
    state = RolloutState(*state)
    N, S, A = tables.offset.shape
    R, P, G = state.seed.shape[0], 0 if policies is None else policies.shape[1], 0
    _check_tables(tables)
    _check_records(state, tables.offset.device.type)
    if actions is not None:
        _checks.shape("action", actions, ["R", "T"], R=R)
        _checks.dtype("action", actions, [torch.int64])
        if actions.shape[1] < steps:
            raise ValueError(f"action: wanted {steps} steps of actions, got {actions.shape[1]}")
    if behaviours:
        weights = behaviours[0] + behaviours[1]
        for i, names in ((-2, ("visits", "q", "reward_square")), (-1, RolloutState._fields[9:])):
            if bool((weights[:, i] > 0).any()) and any(not getattr(state, name).numel() for name in names):
                raise ValueError(f"state: was started without {BUILTIN[i]}, which the behaviours use")
    if references is not None:
        G = references.shape[2]
    out = _empty(tables.offset, R, steps, G)
    choices = policies is not None and policies.dtype == torch.int16

    def at(t: Tensor | None) -> int:
        return 0 if t is None else t.data_ptr()

    groups = [[t.data_ptr() for t in group] for group in (tables, behaviours, state, out)]
    who = (0, at(policies)) if choices else (at(policies), 0)
    sizes = (N, S, A, P, G, R, steps)
    return out, [groups[0], *who, at(references), groups[1], at(actions), groups[2], groups[3], *sizes]


def _empty(like: Tensor, R: int, steps: int, G: int) -> tuple[Tensor, ...]:
    out = [like.new_empty(R, steps, dtype=dtype) for dtype in OUT_DTYPES]
    return (*out, like.new_empty(R, steps, G, dtype=torch.int16))


def _cpu(*args: Any) -> tuple[Tensor, ...]:
    out, arguments = _prepare(args)
    _C.rollout(*arguments, False, torch.get_num_threads())
    return out


def _plain(*args: Any) -> tuple[Tensor, ...]:
    out, arguments = _prepare(args)
    _C.rollout(*arguments, True, 1)
    return out


def _cuda(*args: Any) -> tuple[Tensor, ...]:
    if not _C.with_cuda:
        raise ValueError("backend: this build of icrl_kernels has no CUDA; build with ICRL_CUDA=1")
    _check_values(RolloutTables(*args[:11]), args[11], args[13], args[14], RolloutState(*args[15]))
    out, arguments = _prepare(args)
    like, (_, S, A) = args[2], args[2].shape
    R = args[15][0].shape[0]
    scratch = torch.empty(R * _C.rollout_cuda_scratch(S, A) if args[13] else 0, device=like.device)
    index = like.get_device()
    _C.rollout_cuda(*arguments, scratch.data_ptr(), index, torch.cuda.current_stream(index).cuda_stream)
    return out


def _check_values(
    tables: RolloutTables,
    policies: Tensor | None,
    behaviours: list[Tensor],
    actions: Tensor | None,
    state: RolloutState,
) -> None:
    """What the CPU's code checks record by record, before a kernel that cannot refuse."""
    N = tables.offset.shape[0]
    if bool(((state.task < 0) | (state.task >= N)).any()):
        raise ValueError(f"task_index: wanted 0 to {N - 1}, as there are {N} tasks")
    begun = state.state.clamp_min(0)
    wrong = (state.state < -1) | (begun >= tables.num_states[state.task])
    wrong |= (state.state >= 0) & tables.terminal[state.task, begun.clamp_max(tables.offset.shape[1] - 1)]
    most = (0 if policies is None else policies.shape[1]) + 3 if behaviours else 2**62
    wrong |= (state.behaviour < -1) | (state.behaviour > most)
    if bool(wrong.any()):
        r = int(wrong.nonzero()[0])
        raise ValueError(
            f"state: record {r} is in state {int(state.state[r])} with behaviour {int(state.behaviour[r])}: wanted a state "
            f"of task {int(state.task[r])} that is not terminal, or -1, and a behaviour from -1 to {most}"
        )
    if state.span.numel() and bool(((state.span < 0) | (state.span > tables.offset.shape[1])).any()):
        raise ValueError(f"state.span: wanted next states within {tables.offset.shape[1]} states")
    if actions is not None and bool(((actions < 0) | (actions >= tables.num_actions[state.task][:, None])).any()):
        raise ValueError("action: wanted actions of the record's task")


def _fake(cumulative: Tensor, *args: Any) -> tuple[Tensor, ...]:
    references, state, steps = args[11], args[-3], args[-2]
    return _empty(cumulative, state[0].shape[0], steps, 0 if references is None else references.shape[2])


define(
    "rollout(Tensor cumulative, Tensor reward, Tensor offset, Tensor window, Tensor noise_state, Tensor noise_action, "
    "Tensor start, Tensor terminal, Tensor max_steps, Tensor num_states, Tensor num_actions, Tensor? policies, "
    "Tensor? references, Tensor[] behaviours, Tensor? actions, Tensor(a!)[] state, int steps, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    {"cpu": (("cpu",), _cpu), "plain": (("cpu",), _plain), "cuda": (("cuda",), _cuda)},
    _fake,
)
