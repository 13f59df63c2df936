"""Optimal values of batched finite Markov decision processes, with a bound on their error that is guaranteed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from icrl_kernels import _C, _checks, _registry
from icrl_kernels._registry import no_cuda, no_triton
from icrl_kernels.tabular import value_iteration_reference as specification
from icrl_kernels.tabular.packed import PackedTransition

# The number is csrc/tabular/policy_iteration.h's Method.
METHODS = {"auto": 0, "policy_iteration": 0, "value_iteration": 1, "modified_policy_iteration": 2}
MOST_ENTRIES = 2**58  # whose bytes 64 bits count
CERTIFIED_AT_ONCE = (
    2**24
)  # entries of the tables in float64, of which the proof without contraction makes several copies


class ValueIteration(NamedTuple):
    q: Tensor
    v: Tensor
    policy: Tensor
    error_bound: Tensor
    iterations: Tensor


def value_iteration(
    transition: Tensor | PackedTransition,
    reward: Tensor,
    discount: float | Tensor,
    *,
    terminal: Tensor | None = None,
    num_states: Tensor | None = None,
    tol: float = 1e-6,
    method: str = "auto",
    backend: str | None = None,
    action_mask: Tensor | None = None,
) -> ValueIteration:
    r"""Solve N tabular control problems, each for one or several discounts.

    Q*(s,a) = r̄(s,a) + γ Σ_s' T(s,a,s') max_a' Q*(s',a'), where r̄(s,a) = Σ_s' T(s,a,s') R(s,a,s').

    Everything is computed and returned in float64, whatever the tables' dtype: float32 cannot hold 10³ to 1e-6. Rows
    are taken as given, never renormalised.

    Args:
        transition: T, `[N, S, A, S]`, float32 or float64, or a PackedTransition. An all-zero row ends the episode
            after its reward. Here and below a numpy array is taken for a tensor on the CPU; what is returned are tensors.
        reward: r̄, `[N, S, A]`, or R, `[N, S, A, S]` (read where T > 0 only); same dtype. With a PackedTransition R is
            `[M]`, laid out as its probabilities.
        discount: γ in [0, 1]: a float, or a tensor `[G]` (the same for every task) or `[N, G]`.
        terminal: `[N, S]` bool, states of value 0 whose rows must be all zero and whose rewards are not read. None: the
            states whose rows are zero for every action.
        num_states: `[N]` int64, for batches of unequal tasks: states from num_states[n] on are padding, are not read,
            and get value 0 and action 0. Nor are a window's probabilities of such states.
        tol: the error_bound that the methods that sweep stop at. Policy iteration is exact up to rounding and ignores
            it. Where rounding in float64 or 100,000 sweeps (γ near 1) do not allow `tol`, the bound that was reached
            is returned: look at it.
        method: "policy_iteration" (Howard 1960); "value_iteration", Jacobi sweeps from 0, stopped by the span rule
            (Puterman 1994, section 6.6); "modified_policy_iteration", with 20 sweeps of the greedy policy between
            backups (Puterman & Shin 1978); or "auto", policy iteration. The two that sweep need κ < 1 (below).
        backend: "cpu", "cuda", "triton", "reference" or None, the fastest that serves the device. "triton" only sweeps:
            there "auto" is modified policy iteration, "policy_iteration" is refused, and so are γ = 1 and κ ≥ 1.
        action_mask: `[N, S, A]` bool, True where the state has the action; None: every state has all. The maxima are over
            the actions that the state has, and q is −inf at the others, whose transitions and rewards are not read (they may
            be NaN). A state that is not terminal needs an action; without `terminal`, a state that has none must have
            zero rows. Where a state has no action at all, its q is 0.

    Returns:
        q `[N, S, A]`, v = max_a q `[N, S]`, policy = argmax_a q (the lowest of equals) `[N, S]` int64, error_bound
        `[N]`, iterations `[N]` int64 (policies evaluated, or backups). A tensor of discounts adds a dimension G after N.
        sup|q − Q*| ≤ error_bound and sup|v − V*| ≤ error_bound hold for the tables as given, rounding included. With
        κ = γ·(largest row sum) < 1 the bound is (‖q − 𝒯q‖∞ + rounding)/(1 − κ) (Puterman 1994, section 6.3). With κ ≥ 1
        or γ = 1 it comes from the expected time to the end under the near-optimal actions (after Bertsekas & Tsitsiklis
        1991), and is inf where that proves nothing; its last bits, alone, may then depend on the rest of the batch.

    With γ = 1, Q* is the best over policies that reach an end from every state; it is refused if there is none, or if a
    policy that never ends earns without bound. Not differentiable: inputs that require a gradient are refused.

    Raises:
        ValueError: an argument of the wrong shape, dtype or device; γ outside [0, 1]; a transition that is negative,
            not finite, or whose row sums to neither 0 nor, within 1e-4, 1; a window that leaves its table; a reward
            that is not finite; values beyond float64; γ = 1 as above; a state that is not terminal without an action.
            On a GPU too: the host waits for what was refused, so that a CUDA graph cannot capture this op.
    """
    windows: list[Tensor] = []
    if isinstance(transition, PackedTransition):
        table, *windows = transition.check_shapes()
    else:
        table = transition
    table, reward, discount, terminal, num_states = (
        _checks.from_numpy(name, x)
        for name, x in (
            ("transition", table),
            ("reward", reward),
            ("discount", discount),
            ("terminal", terminal),
            ("num_states", num_states),
        )
    )
    for name, x in (("transition", table), ("reward", reward)):
        _checks.dense(name, x)
    single = not isinstance(discount, Tensor) or not discount.dim()
    if isinstance(discount, Tensor) and discount.dim():
        gammas = discount
    else:
        gamma = _checks.number("discount", discount)
        gammas = torch.full((1,), gamma, dtype=torch.float64, device=table.device)
    for name, x in (("discount", gammas), ("terminal", terminal), ("num_states", num_states)):
        if x is not None:
            _checks.dense(name, x)
    if not isinstance(method, str):
        raise ValueError(f"method: wanted one of {', '.join(METHODS)}, got {method!r}")
    if backend is not None:
        _checks.backend(backend)
    tol = _checks.number("tol", tol)
    missing = None
    if action_mask is not None:
        mask: Tensor = _checks.from_numpy("action_mask", action_mask)
        _checks.dense("action_mask", mask)
        n, s, a = _check(table, reward, windows, gammas, terminal, num_states, tol, method)
        _checks.shape("action_mask", mask, ("N", "S", "A"), N=n, S=s, A=a)
        _checks.dtype("action_mask", mask, (torch.bool,))
        _checks.same_device(transition=table, action_mask=mask)
        table, reward, windows, missing = specification.without_missing(
            table, reward, windows, terminal, num_states, mask
        )
    out = torch.ops.icrl.value_iteration(
        table,
        reward,
        windows,
        gammas,
        terminal,
        num_states,
        tol,
        method,
        "auto" if backend is None else backend,
    )
    if missing is not None:
        q = out[0].masked_fill(missing[:, None], -torch.inf)
        out = q, q.amax(-1), q.argmax(-1), *out[3:]
    return ValueIteration(*(x.squeeze(1) for x in out) if single else out)


# ---- checks --------------------------------------------------------------------------------------------------------


def _check(
    transition: Tensor,
    reward: Tensor,
    windows: list[Tensor],
    discount: Tensor,
    terminal: Tensor | None,
    num_states: Tensor | None,
    tol: float,
    method: str,
) -> tuple[int, int, int]:
    """N, S, A, if that is all that shapes, dtypes and devices tell."""
    for name, x in (("transition", transition), ("reward", reward), ("discount", discount)):
        if x.requires_grad:
            raise ValueError(
                f"{name}: value_iteration is not differentiable, but {name} requires a gradient: detach it"
            )
    if len(windows) not in (0, 3):
        raise ValueError(f"windows: wanted none, or offset, first and length, got {len(windows)} tensors")
    if windows:
        packed = PackedTransition(transition, *windows).check_shapes()
        n, s, a = packed.offset.shape
    else:
        _checks.shape("transition", transition, ("N", "S", "A", "S"))
        n, s, a, _ = transition.shape
        _checks.shape("transition", transition, ("N", "S", "A", "S"), N=n, S=s, A=a)
    if s == 0 or a == 0:
        raise ValueError(f"transition: wanted at least one state and one action, got S={s} and A={a}")
    if windows and reward.dim() == 1:
        _checks.shape("reward", reward, ("M",), M=len(transition))
    else:
        by_successor = reward.dim() == 4 and not windows
        _checks.shape("reward", reward, ("N", "S", "A", "S")[: 4 if by_successor else 3], N=n, S=s, A=a)
    _checks.dtype("transition", transition, (torch.float32, torch.float64))
    _checks.same_dtype(transition=transition, reward=reward)
    _checks.shape("discount", discount, ("N", "G")[-1 if discount.dim() == 1 else -2 :], N=n)
    _checks.dtype("discount", discount, (torch.float32, torch.float64))
    if n * discount.shape[-1] * s * a > MOST_ENTRIES:
        raise ValueError(
            f"discount: wanted at most {MOST_ENTRIES} values in all, got {discount.shape[-1]} discounts of N={n}, S={s}, A={a}"
        )
    if terminal is not None:
        _checks.shape("terminal", terminal, ("N", "S"), N=n, S=s)
        _checks.dtype("terminal", terminal, (torch.bool,))
    if num_states is not None:
        _checks.shape("num_states", num_states, ("N",), N=n)
        _checks.dtype("num_states", num_states, (torch.int64,))
    _checks.same_device(
        transition=transition, reward=reward, discount=discount, terminal=terminal, num_states=num_states
    )
    if method not in METHODS:
        raise ValueError(f"method: wanted one of {', '.join(METHODS)}, got {method!r}")
    if not tol > 0:
        raise ValueError(f"tol: wanted a positive number, got {tol}")
    return n, s, a


def _values(
    found: tuple[int, int, int],
    transition: Tensor,
    reward: Tensor,
    windows: list[Tensor],
    discount: Tensor,
    terminal: Tensor | None,
    num_states: Tensor | None,
    *settings: float | str,
) -> None:
    """What is not told while the tables are read: there every row and window is judged."""
    s = found[1]
    wrong = ~((discount >= 0) & (discount <= 1))
    if wrong.any():
        at = wrong.nonzero()[0].tolist()
        raise ValueError(f"discount: wanted values in [0, 1], got {discount[tuple(at)].item()} at index {at}")
    if num_states is not None and ((num_states < 1) | (num_states > s)).any():
        at = int(((num_states < 1) | (num_states > s)).nonzero()[0])
        raise ValueError(f"num_states: wanted 1 to {s}, got {int(num_states[at])} at index {at}")


def _values_on_gpu(found: tuple[int, int, int], *arguments: Any) -> None:
    """There the op, which waits for its refusals anyway, waits for this too."""
    if arguments[0].device.type != "cpu":
        _values(found, *arguments)


def _empty(n: int, g: int, s: int, a: int, device: torch.device) -> tuple[Tensor, ...]:
    f, i = torch.float64, torch.int64
    sizes = ((n, g, s, a), f), ((n, g, s), f), ((n, g, s), i), ((n, g), f), ((n, g), i)
    return tuple(torch.empty(size, dtype=dtype, device=device) for size, dtype in sizes)


def _certify_the_rest(
    out: tuple[Tensor, ...],
    transition: Tensor,
    reward: Tensor,
    windows: list[Tensor],
    discount: Tensor,
    terminal: Tensor | None,
    num_states: Tensor | None,
) -> tuple[Tensor, ...]:
    """Improve the bounds that are NaN because there is no contraction, or large because there hardly is."""
    q, bound = out[0], out[3]
    for g in range(q.shape[1]):
        rest = (bound[:, g].isnan() | (discount[:, g] == 1)).nonzero().squeeze(1)
        for i in rest.split(max(1, CERTIFIED_AT_ONCE // (q[0, 0].numel() * q.shape[2]))) if len(rest) else ():
            ends, sizes = (None if x is None else x[i] for x in (terminal, num_states))
            some = specification.dense(*specification.select(i, transition, reward, windows), sizes)
            t, r, size = specification.tables(*some, discount[i], ends, sizes)
            proven = specification.certificate_by_hitting_times(t, r, size, discount[i, g], q[i, g])
            bound[i, g] = torch.fmin(bound[i, g], proven)
    return out


# ---- backends: each takes N, S, A and what the op takes ------------------------------------------------------------------------


def _reference(
    found: tuple[int, int, int],
    transition: Tensor,
    reward: Tensor,
    windows: list[Tensor],
    discount: Tensor,
    terminal: Tensor | None,
    num_states: Tensor | None,
    tol: float,
    method: str,
) -> tuple[Tensor, ...]:
    _values_on_gpu(found, transition, reward, windows, discount, terminal, num_states)
    n, s, a = found
    transition, reward = specification.dense(transition, reward, windows, num_states)
    t, r, size = specification.tables(transition, reward, discount, terminal, num_states)
    gammas = discount.double().expand(n, -1)
    out = _empty(n, gammas.shape[1], s, a, transition.device)
    for g in range(gammas.shape[1]):
        gamma = gammas[:, g]
        if METHODS[method]:
            inner = specification.INNER_SWEEPS if method == "modified_policy_iteration" else 0
            q, v, iterations, refusal = specification.sweeps(t, r, size, gamma, tol, inner)
        else:
            q, v, iterations, refusal = specification.policy_iteration(t, r, size, gamma)
        if (refusal[:, 0] != 0).any():
            i = int((refusal[:, 0] != 0).nonzero()[0])
            specification.refuse(int(refusal[i, 0]), (i, int(refusal[i, 1]), 0), g, transition, [], discount)
        column = q, q.amax(-1), q.argmax(-1), specification.certificate(t, size, gamma, q, v)[0], iterations
        for whole, part in zip(out, column, strict=True):
            whole[:, g] = part
    return _certify_the_rest(out, transition, reward, [], gammas, terminal, num_states)


def _compiled(
    call: Callable[..., object],
    found: tuple[int, int, int],
    transition: Tensor,
    reward: Tensor,
    windows: list[Tensor],
    discount: Tensor,
    terminal: Tensor | None,
    num_states: Tensor | None,
    tol: float,
    method: str,
    ascending: bool,
) -> tuple[Tensor, ...]:
    """Allocate, `call(*pointers and sizes)`, raise what it refused, certify what it could not."""
    _values_on_gpu(found, transition, reward, windows, discount, terminal, num_states)
    n, s, a = found
    transition, reward = transition.contiguous(), reward.contiguous()
    windows = [x.contiguous() for x in windows]
    terminal = None if terminal is None else terminal.contiguous()
    num_states = None if num_states is None else num_states.contiguous()
    gammas = discount.double().expand(n, -1).contiguous()
    order = gammas.argsort(dim=-1, stable=True).contiguous() if ascending else None
    out = _empty(n, gammas.shape[1], s, a, transition.device)
    refusal = torch.zeros(n, 3, dtype=torch.int64, device=transition.device)
    call(
        transition.data_ptr(),
        reward.data_ptr(),
        transition.dtype == torch.float64,
        reward.dim() == (1 if windows else 4),
        *((*(x.data_ptr() for x in windows), len(transition)) if windows else (0, 0, 0, 0)),
        0 if terminal is None else terminal.data_ptr(),
        0 if num_states is None else num_states.data_ptr(),
        gammas.data_ptr(),
        *(() if order is None else (order.data_ptr(),)),
        *(n, gammas.shape[1], s, a),
        METHODS[method],
        tol,
        *(x.data_ptr() for x in out),
        refusal.data_ptr(),
    )
    if refusal[:, 0].any():
        i = int(refusal[:, 0].nonzero()[0])
        kind, row, g = refusal[i].tolist()
        specification.refuse(kind, (i, row // a, row % a), g, transition, windows, discount)
    return _certify_the_rest(out, transition, reward, windows, gammas, terminal, num_states)


def _cpu(found: tuple[int, int, int], *arguments: Any) -> tuple[Tensor, ...]:
    def call(*x: Any) -> None:
        _C.value_iteration_cpu(*x, torch.get_num_threads())

    return _compiled(call, found, *arguments, ascending=False)


def _cuda(found: tuple[int, int, int], *arguments: Any) -> tuple[Tensor, ...]:
    transition, windows, method = arguments[0], arguments[2], arguments[-1]
    if method == "modified_policy_iteration":
        raise ValueError(
            "method: the cuda backend has policy_iteration and value_iteration, got 'modified_policy_iteration'"
        )
    n, s, a = found
    most = _C.value_iteration_cuda_most_states
    if s > most or s * a >= 2**31:
        raise ValueError(f"transition: the cuda backend serves up to {most} states and 2**31 rows, got S={s}, A={a}")
    device = transition.get_device()
    values = len(transition) if windows else 0
    size = _C.value_iteration_cuda_workspace(n, s, a, values, transition.dtype == torch.float64, device)
    workspace = torch.empty(size, dtype=torch.uint8, device=transition.device)

    def call(*x: Any) -> None:
        stream = torch.cuda.current_stream(device).cuda_stream
        _C.value_iteration_cuda(*x, workspace.data_ptr(), device, stream)

    return _compiled(call, found, *arguments, ascending=True)


def _triton(
    found: tuple[int, int, int],
    transition: Tensor,
    reward: Tensor,
    windows: list[Tensor],
    discount: Tensor,
    terminal: Tensor | None,
    num_states: Tensor | None,
    tol: float,
    method: str,
) -> tuple[Tensor, ...]:
    _values_on_gpu(found, transition, reward, windows, discount, terminal, num_states)
    n, s, a = found
    if method == "policy_iteration":
        raise ValueError(
            "method: the triton backend has value_iteration and modified_policy_iteration (which is its auto)"
        )
    if s * a >= 2**31:
        raise ValueError(f"transition: the triton backend serves up to 2**31 rows a task, got S={s}, A={a}")
    from icrl_kernels.tabular import value_iteration_triton as kernels

    transition, reward = transition.contiguous(), reward.contiguous()
    windows = [x.contiguous() for x in windows]
    start, low, count, mean, size, mass, kind = kernels.prepare(transition, reward, windows, num_states, n, s, a)
    out = _empty(n, discount.shape[-1], s, a, transition.device)
    if n == 0:
        return out
    filled = count > 0
    done = ~filled.any(-1, keepdim=True) if terminal is None else terminal[:, :, None]
    mean, size = (x.masked_fill(done, 0.0) for x in (mean, size))
    kind = torch.where((kind == 0) & ~size.isfinite(), 4, kind)
    if terminal is not None:
        kind = torch.where((kind == 0) & done & filled, 5, kind)
    if kind.any():
        i, j, k = kind.nonzero()[0].tolist()
        specification.refuse(int(kind[i, j, k]), (i, j, k), 0, transition, windows, discount)
    gamma, terms = discount.double().expand(n, -1), s + 16
    relative = terms * 2 * specification.UNIT
    contraction = gamma * (mass.amax((1, 2)) * (1 + relative))[:, None]
    if ((contraction >= 1) | (gamma == 1)).any():
        i, g = ((contraction >= 1) | (gamma == 1)).nonzero()[0].tolist()
        raise ValueError(
            "discount: the triton backend only sweeps, which needs discount < 1 and discount * (largest row sum) < 1, "
            f"got {gamma[i, g].item()!r} and {contraction[i, g].item()!r} for task {i}: use backend 'cuda' or 'reference'"
        )
    base = (relative * size.amax((1, 2)) + terms * specification.UNDERFLOW)[:, None].expand_as(gamma)
    grow = (1 + 16 * specification.UNIT) / (1 - contraction)
    facts = torch.stack([gamma, contraction, base, relative * contraction, grow, torch.full_like(gamma, tol)], -1)
    inner = 0 if method == "value_iteration" else specification.INNER_SWEEPS
    kernels.solve(transition, start, low, count, mean, facts, int(count.max()), inner, specification.MOST_SWEEPS, out)
    bound = out[3]
    bound += specification.UNDERFLOW
    if not bound.isfinite().all():
        i, g = (~bound.isfinite()).nonzero()[0].tolist()
        specification.refuse(8, (i, 0, 0), g, transition, windows, discount)
    return out


def _fake(found: tuple[int, int, int], *arguments: Any) -> tuple[Tensor, ...]:
    n, s, a = found
    return _empty(n, arguments[3].shape[-1], s, a, arguments[0].device)


_registry.define(
    "value_iteration(Tensor transition, Tensor reward, Tensor[] windows, Tensor discount, Tensor? terminal, "
    "Tensor? num_states, float tol, str method, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    {
        "cpu": _registry.Backend(("cpu",), _cpu),
        "cuda": _registry.Backend(("cuda",), _cuda, no_cuda),
        "triton": _registry.Backend(("cuda",), _triton, no_triton),
        "reference": _registry.Backend(("cpu", "cuda"), _reference),
    },
    _fake,
    _check,
    _values,
)
