"""Batched simulation of tabular tasks and of the behaviour policies that gather data in them.

A step in inner state s under action a draws s' ~ transition[s,a,:], a reward ~ N(reward[s,a,s'], (noise_state[s'] +
noise_action[s,a])²), and ends the episode when s' is terminal (done = 1) or after max_steps steps (done = 2). The next
state is then drawn from `start` within the same step.

Random numbers are Philox4x32-10 (Salmon et al., SC 2011) with key `seed` and counter (step, stream, record): a
trajectory depends on its own seed, record number and tables alone, not on threads, on how records are split into
calls, or on how steps are split into calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from icrl_kernels import _C, _checks, _torch_private
from icrl_kernels._registry import Backend, define, no_cuda
from icrl_kernels.tabular import behaviours as behaving
from icrl_kernels.tabular.behaviours import BUILTIN, Behaviours
from icrl_kernels.tabular.rollout_reference import OUT_DTYPES, thresholds
from icrl_kernels.tabular.rollout_tables import DTYPES, READ_PAST, RolloutTables, check_mask, fit, refuse

MOST_POLICIES = 255 - len(BUILTIN)  # Rollout.behaviour is uint8, and 255 is taken
MOST_ENTRIES = 2**58  # of an output, whose bytes 64 bits count


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


torch.serialization.add_safe_globals([RolloutState])  # torch.load with weights_only makes it


class Rollout(NamedTuple):
    """T steps of R records, all [R,T]."""

    state: Tensor  # int16, inner state before acting
    action: Tensor  # int16
    reward: Tensor  # float32
    done: Tensor  # uint8: 0 no, 1 terminated, 2 truncated
    behaviour: Tensor  # uint8, which one acted (also where epsilon made the action uniform); 255: from outside
    next_state: Tensor  # int16, s' before any reset
    labels: Tensor  # int16 [R,T,G], what the references would have done in `state`
    final: RolloutState


STATE_DTYPES = (
    *([torch.int64] * 7),
    *(torch.int32, torch.float32, torch.float32, torch.float32, torch.int16, torch.float32, torch.float64),
)  # of the fields of RolloutState


def state_shapes(R: int, S: int, A: int) -> tuple[tuple[int, ...], ...]:
    """Of the fields of RolloutState; from `visits` on a tensor may be empty instead."""
    row = (R, S, A)
    return *([(R,)] * 7), row, row, row, (R, S, S, A), (R, S, 2), (R, S), (R,)


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
        behaviours: only what the learners among them need is allocated. Which there are is read: on a GPU the host waits.

    Raises:
        ValueError: a shape, dtype or device is not as above; on a CPU also where task_index, or a table where it is read,
            is out of range. On a GPU such a record does not start: its steps come out as `rollout` says.
    """
    _require("tables", tables, RolloutTables)
    _checks.shape("tables.offset", tables.offset, ["N", "S", "A"])
    N, S, A = tables.offset.shape
    device = tables.offset.device
    task = torch.arange(N, dtype=torch.int64, device=device) if task_index is None else task_index
    _checks.shape("task_index", task, ["R"])
    R = task.shape[0]
    if not isinstance(seed, Tensor) or not seed.dim():
        seed = _as_int64(_checks.integer("seed", seed, -(2**63), 2**64 - 1))
        seed = torch.full((R,), seed, dtype=torch.int64, device=device)
    record = torch.arange(R, dtype=torch.int64, device=device) if record is None else record
    for name, tensor in (("task_index", task), ("record", record), ("seed", seed)):
        _checks.shape(name, tensor, ["R"], R=R)
        _checks.dtype(name, tensor, [torch.int64])
    _checks.same_device(tables=tables.offset, task_index=task, record=record, seed=seed)
    uses_q = uses_model = False
    if behaviours is not None:
        _require("behaviours", behaviours, Behaviours)
        for name in ("initial", "later"):
            _checks.shape(name, getattr(behaviours, name), ["R", "M"], R=R)
        _checks.same_device(initial=behaviours.initial, later=behaviours.later)
        if behaviours.initial.shape[1] < len(BUILTIN) or behaviours.later.shape != behaviours.initial.shape:
            raise ValueError(
                f"initial, later: wanted both [{R}, policies + {len(BUILTIN)}], got {list(behaviours.initial.shape)} and "
                f"{list(behaviours.later.shape)}"
            )
        weights = behaviours.initial + behaviours.later
        uses_q, uses_model = bool((weights[:, -2] > 0).any()), bool((weights[:, -1] > 0).any())

    def learner(used: bool, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape if used else (0,), dtype=dtype, device=device)

    state = RolloutState(
        seed=_copy(seed),
        record=_copy(record),
        task=_copy(task),
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
    action_mask: Tensor | None = None,
) -> Rollout:
    """Simulate `steps` steps of R records. `state` is not changed; the result's `final` continues it bit for bit.

    Args:
        seed, task_index: as in `rollout_start`, for new records; leave out with `state`.
        policies: P ≤ 251 behaviours: [N,P,S,A] float32 action probabilities, or [N,P,S] integers, the actions of deterministic
            policies (the same steps as with probabilities 1 and 0, for less time and memory).
        behaviours: the policies that act; by default the first policy, or uniform actions where there are no policies.
        references: [N,G,S] integers, actions of G policies, which label every step.
        state: continues these records, with the same behaviours.
        backend: "cpu", "cuda", or "plain": the GPU's code on the CPU, record by record. All give the same bits.
        action_mask: [N,S,A] bool, False at actions that the state does not have, beside those that the tables already
            lack (`rollout_tables`). Random actions are uniform over the others, learners take the best of the others.

    Raises:
        ValueError: a shape, dtype, device or layout is not as above. On a CPU also where a policy row is not a distribution
            over the task's own actions; where a policy takes an action that the state lacks; where a state that is not
            terminal has no action; where behaviours are out of range (negative weights, epsilon outside [0,1], discount
            outside [0,1), ...); where the state is; and where a table is, as soon as a record reads it there.

    On a GPU values are not looked at before, as the host would have to wait. A record that meets one out of range (its task
    or state, a policy's action, a row that leaves its table, ...) reads and writes nothing outside its tensors: all its
    steps come out with reward NaN, done 0, behaviour 255 and -1 for the rest, and `final` has it where it was. References
    beyond 16 bits are clipped there.
    """
    if (seed is None) == (state is None):
        raise ValueError("seed, state: give exactly one of them")
    if state is not None and task_index is not None:
        raise ValueError("task_index: the state already says which task each record has")
    _require("tables", tables, RolloutTables)
    _checks.backend(backend)
    _checks.shape("tables.offset", tables.offset, ["N", "S", "A"])
    N = tables.offset.shape[0]
    if action_mask is not None:
        if not fit([t.shape for t in tables]):
            refuse(tables)
        check_mask(action_mask, tables.terminal, tables.num_states, tables.num_actions, tables.offset.shape[2])
        tables = tables._replace(window=tables.window.masked_fill(~action_mask[..., None], 0))
    policies = None if policies is None else _policies(policies, N)
    P = 0 if policies is None else policies.shape[1]
    if state is not None:
        _require("state", state, RolloutState)
    given, name = (task_index, "task_index") if state is None else (state.task, "state.task")
    if given is not None:
        _checks.shape(name, given, ["R"])
    R = N if given is None else given.shape[0]
    if state is None:
        assert seed is not None
        final = rollout_start(tables, seed=seed, task_index=task_index, behaviours=behaviours)
    else:
        final = RolloutState(*map(_copy, state))
    if behaviours is not None:
        _require("behaviours", behaviours, Behaviours)
    else:
        device = tables.offset.device
        behaviours = behaving.same_behaviours(R, P, {0: 1.0} if P else {"uniform": 1.0}, device)
    if references is not None:
        references = _references(references, N)
    arguments = (
        policies,
        references,
        list(behaviours),
        None,
        list(final),
        _checks.integer("steps", steps, *_checks.INT64),
        backend,
    )
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
        ValueError: a shape, dtype, device or layout is not as above; on a CPU also for an action that is not its task's or
            that its state does not have, and for a state or a table out of range, where a record reads it: if it is a table, the other records may have made
            their step. On a GPU such a record comes out as `rollout` says.
    """
    if not isinstance(tables, RolloutTables) or not isinstance(state, RolloutState):
        _require("tables", tables, RolloutTables)
        _require("state", state, RolloutState)
    everything = (*tables, *state, action)
    pointers = None if _checks.compiling() else _pointers(everything)
    if pointers is None:
        _require("tables", tables, RolloutTables)
        _require("state", state, RolloutState)
        _checks.shape("action", action, ["R"])
        out = torch.ops.icrl.rollout(*tables, None, None, [], action.unsqueeze(1), list(state), 1, "auto")
        return out[2].squeeze(1), out[3].squeeze(1), out[5].squeeze(1)
    # past the dispatcher, which takes longer than a step of a few hundred records
    N, S, A = tables.offset.shape
    R = len(action)
    reward, next_state = tables.reward.new_empty(R), tables.window.new_empty(R)
    done = tables.terminal.new_empty(R, dtype=torch.uint8)
    out = [0, 0, reward.data_ptr(), done.data_ptr(), 0, next_state.data_ptr(), 0]
    sizes = (N, S, A, len(tables.cumulative) - READ_PAST, 0, 0, R, 1, FAST, torch.get_num_threads())
    _C.rollout(pointers[:11], 0, 0, 0, [], pointers[25], pointers[11:25], out, *sizes)
    return reward, done, next_state


def _pointers(everything: tuple[Tensor, ...]) -> list[int] | None:
    """Of a step's tensors, where they are `_plain`."""
    try:
        return list(map(Tensor.data_ptr, everything)) if _plain(everything) else None
    except RuntimeError:  # a tensor that is not dense may have no strides and no memory
        return None


_DTYPES = [*DTYPES, *STATE_DTYPES]


def _plain(everything: tuple[Tensor, ...]) -> bool:
    """Whether a step's tables, state and action are as the op wants them, on the CPU, and no dispatch mode is to see the call."""
    if len(everything) != 26 or set(map(type, everything)) != {Tensor} or _torch_private.dispatch_modes():
        return False
    action = everything[25]
    return (
        all([t.is_cpu for t in everything])
        and action.dtype == torch.int64
        and action.is_contiguous()
        and action.shape == everything[11].shape
        and fits(everything[:25])
    )


def fits(everything: tuple[Tensor, ...]) -> bool:
    """Whether tables and a state have the shapes, dtypes and layouts that belong together."""
    shapes = [t.shape for t in everything[:18]]
    own = shapes[11]
    if not fit(shapes[:11]) or len(own) != 1 or shapes[12:] != [own] * 6:
        return False
    if [t.dtype for t in everything] != _DTYPES or not all(map(Tensor.is_contiguous, everything)):
        return False
    learners = [t.shape for t in everything[18:]]
    return learners == _NO_LEARNERS or _learners_fit(learners, state_shapes(own[0], *shapes[2][1:])[7:])


_NO_LEARNERS = [torch.Size([0])] * 7


def _learners_fit(learners: list[torch.Size], shapes: tuple[tuple[int, ...], ...]) -> bool:
    return all(own in (shape, (0,)) for own, shape in zip(learners, shapes, strict=True))


def _require(name: str, given: Any, kind: type) -> None:
    """ValueError unless `given` is a `kind` of dense tensors."""
    if not isinstance(given, kind):
        raise ValueError(f"{name}: wanted {kind.__name__}, got {type(given).__name__}")
    if not _checks.compiling():
        for field, tensor in given._asdict().items():
            _checks.dense(field if name == "behaviours" else f"{name}.{field}", tensor)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def _as_int64(seed: int) -> int:
    return seed - 2**64 if seed >= 2**63 else seed


def _policies(policies: Tensor, N: int) -> Tensor:
    """Actions [N,P,S] int16, or probabilities as thresholds: zeros in place of rows that are no distribution."""
    _checks.dense("policies", policies)
    if not policies.dtype.is_floating_point:
        _checks.shape("policies", policies, [N, "P", "S"], N=N)
        _checks.dtype("policies", policies, INTEGERS)
        if policies.dtype in (torch.int32, torch.int64):
            policies = policies.clamp(-1, 32767)  # neither is a task's action
        return policies.to(torch.int16)
    _checks.shape("policies", policies, [N, "P", "S", "A"], N=N)
    _checks.dtype("policies", policies, [torch.float32])
    ok = ((policies.double().sum(3) - 1).abs() <= 1e-4) & (policies >= 0).all(3)
    return thresholds(policies).masked_fill(~ok[..., None], 0.0)


def _references(references: Tensor, N: int) -> Tensor:
    """[N,S,G] int16."""
    _checks.shape("references", references, [N, "G", "S"], N=N)
    _checks.dtype("references", references, INTEGERS)
    if references.dtype in (torch.int32, torch.int64) and references.numel():
        if references.device.type == "cpu":
            low, high = int(references.min()), int(references.max())
            if low < -32768 or high > 32767:
                raise ValueError(f"references: wanted actions that fit 16 bits, got {low} to {high}")
        else:
            references = references.clamp(-32768, 32767)
    return references.to(torch.int16).transpose(1, 2).contiguous()


INTEGERS = (torch.int16, torch.int32, torch.int64, torch.int8, torch.uint8)


# ---- the op ----------------------------------------------------------------------------------------------------------


class Sizes(NamedTuple):
    """What the op's arguments have in common: M entries of the tables, P policies, G references, R records, T steps."""

    N: int
    S: int
    A: int
    M: int
    P: int
    G: int
    R: int
    T: int


def _check(*args: Any) -> Sizes:
    tables, (policies, references, behaviours, actions, state, steps) = RolloutTables(*args[:11]), args[11:]
    if len(state) != len(RolloutState._fields):
        raise ValueError(f"state: wanted the {len(RolloutState._fields)} tensors of a RolloutState, got {len(state)}")
    if not fits((*tables, *state)):
        refuse(tables)
        _refuse_state(RolloutState(*state), *tables.offset.shape[1:])
    (N, S, A), R, M = tables.offset.shape, state[0].shape[0], tables.cumulative.shape[0] - READ_PAST
    if not 0 <= steps <= MOST_ENTRIES:
        raise ValueError(f"steps: wanted an int >= 0, of at most {MOST_ENTRIES}, got {steps}")
    P = G = 0
    if policies is not None:
        choices = policies.dtype == torch.int16
        _checks.shape("policies", policies, [N, "P", S] if choices else [N, "P", S, A], N=N, S=S, A=A)
        _checks.dtype("policies", policies, [torch.int16, torch.float32])
        P = policies.shape[1]
        if P > MOST_POLICIES:
            raise ValueError(f"policies: wanted at most {MOST_POLICIES} behaviours, got {P}")
    if references is not None:
        _checks.shape("references", references, [N, S, "G"], N=N, S=S)
        _checks.dtype("references", references, [torch.int16])
        G = references.shape[2]
    if behaviours:
        if len(behaviours) != len(Behaviours._fields):
            raise ValueError(f"behaviours: wanted none or the {len(Behaviours._fields)} tensors, got {len(behaviours)}")
        behaving.check_shapes(Behaviours(*behaviours), R, P)
    if actions is not None:
        _checks.shape("action", actions, ["R", "T"], R=R, T=steps)
        _checks.dtype("action", actions, [torch.int64])
    elif not behaviours:
        raise ValueError("behaviours, actions: wanted one of them, got neither")
    if R * steps * max(G, 1) > MOST_ENTRIES or R * (S + 3) * (A + 8) > MOST_ENTRIES:
        raise ValueError(
            f"steps: wanted at most {MOST_ENTRIES} entries in all, got {steps} with R={R}, S={S}, A={A}, G={G}"
        )
    others = {"policies": policies, "references": references, "action": actions}
    if len({t.device for t in (*tables, *state, *behaviours, *others.values()) if t is not None}) > 1:
        own = {f"tables.{name}": t for name, t in tables._asdict().items()}
        own |= {f"state.{name}": t for name, t in zip(RolloutState._fields, state, strict=True)}
        own |= dict(zip(Behaviours._fields, behaviours, strict=False))
        _checks.same_device(**own, **others)
    return Sizes(N, S, A, M, P, G, R, steps)


def _refuse_state(state: RolloutState, S: int, A: int) -> None:
    """The ValueError that names what is wrong with its shapes, dtypes or layouts."""
    sized = "task" if state.task.shape == state.record.shape else "seed"  # two that agree say how many records
    _checks.shape(f"state.{sized}", getattr(state, sized), ["R"])
    shapes = state_shapes(getattr(state, sized).shape[0], S, A)
    for i, (name, tensor) in enumerate(state._asdict().items()):
        if i < 7 or tuple(tensor.shape) != (0,):
            _checks.shape(f"state.{name}", tensor, shapes[i])
        _checks.dtype(f"state.{name}", tensor, [STATE_DTYPES[i]])
        if not tensor.is_contiguous():
            raise ValueError(f"state.{name}: wanted a contiguous tensor, got strides {tensor.stride()}")


def _values(found: Sizes, *args: Any) -> None:
    """What the C++ code, which judges the state first and tables where it reads them, does not see."""
    tables, policies, behaviours = RolloutTables(*args[:11]), args[11], args[13]
    if behaviours:
        behaving.check_values(Behaviours(*behaviours))
    if policies is None:
        return
    states = torch.arange(found.S, dtype=torch.int64, device=policies.device)
    acts = ((states < tables.num_states[:, None]) & ~tables.terminal)[:, None]
    own = tables.num_actions[:, None, None]
    if policies.dtype == torch.int16:
        bad, wanted = (policies < 0) | (policies >= own), "one of the task's own actions, got "
    else:
        last = (own - 1).clamp(0, max(found.A - 1, 0))[..., None].expand(found.N, found.P, found.S, 1)
        bad = (
            ~(policies.gather(3, last).squeeze(3) >= 2)
            if found.A
            else torch.ones_like(policies[..., 0], dtype=torch.bool)
        )
        wanted = "probabilities with sum 1 on the task's own actions"
    bad &= acts
    if bool(bad.any()):
        n, p, s = bad.nonzero()[0].tolist()
        got = int(policies[n, p, s]) if policies.dtype == torch.int16 else ""
        raise ValueError(f"policies[{n}, {p}, {s}]: wanted {wanted}{got}")


def _call(found: Sizes, args: tuple[Any, ...]) -> tuple[tuple[Tensor, ...], list[Any]]:
    """The op's outputs, and the arguments of the C++ functions."""
    tables, (policies, references, behaviours, actions, state, _) = args[:11], args[11:]
    policies, references, actions = (None if t is None else t.contiguous() for t in (policies, references, actions))
    out = _empty(tables[0], found)

    def at(t: Tensor | None) -> int:
        return 0 if t is None or not t.numel() else t.data_ptr()

    groups = [[at(t) for t in group] for group in (tables, behaviours, state, out)]
    chosen = (0, at(policies)) if policies is not None and policies.dtype == torch.int16 else (at(policies), 0)
    kept = [t for t in (policies, references, actions) if t is not None]  # copies, perhaps, that must outlive the call
    return (*out, *kept), [groups[0], *chosen, at(references), groups[1], at(actions), *groups[2:], *found]


def _empty(like: Tensor, found: Sizes) -> tuple[Tensor, ...]:
    out = [like.new_empty(found.R, found.T, dtype=dtype) for dtype in OUT_DTYPES]
    return (*out, like.new_empty(found.R, found.T, found.G, dtype=torch.int16))


FAST, PLAIN, SPOIL = range(3)  # csrc's Way; the last is what a GPU does with values out of range, for tests


def _host(way: int) -> Callable[..., tuple[Tensor, ...]]:
    def run(found: Sizes, *args: Any) -> tuple[Tensor, ...]:
        out, arguments = _call(found, args)
        _C.rollout(*arguments, way, 1 if way else torch.get_num_threads())
        return out[:7]

    return run


def _cuda(found: Sizes, *args: Any) -> tuple[Tensor, ...]:
    out, arguments = _call(found, args)
    device = args[0].device
    each = _C.rollout_cuda_scratch(found.S, found.A) if args[13] else 0
    scratch = torch.empty(found.R * each, dtype=torch.float32, device=device)
    index = args[0].get_device()
    _C.rollout_cuda(*arguments, scratch.data_ptr(), index, torch.cuda.current_stream(index).cuda_stream)
    return out[:7]


def _fake(found: Sizes, *args: Any) -> tuple[Tensor, ...]:
    return _empty(args[0], found)


define(
    "rollout(Tensor cumulative, Tensor reward, Tensor offset, Tensor window, Tensor noise_state, Tensor noise_action, "
    "Tensor start, Tensor terminal, Tensor max_steps, Tensor num_states, Tensor num_actions, Tensor? policies, "
    "Tensor? references, Tensor[] behaviours, Tensor? actions, Tensor(a!)[] state, int steps, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    {
        "cpu": Backend(("cpu",), _host(FAST)),
        "plain": Backend(("cpu",), _host(PLAIN)),
        "cuda": Backend(("cuda",), _cuda, no_cuda),
    },
    _fake,
    _check,
    _values,
)
