"""Optimal values of batched finite Markov decision processes, with a bound on their error that is guaranteed."""

from __future__ import annotations

from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from icrl_kernels import _C, _checks, _registry

METHODS = ("auto", "policy_iteration", "value_iteration")
UNIT = 2.0**-53  # half a unit in the last place of float64


class ValueIteration(NamedTuple):
    q: Tensor
    v: Tensor
    policy: Tensor
    error_bound: Tensor
    iterations: Tensor


def value_iteration(
    transition: Tensor,
    reward: Tensor,
    discount: float | Tensor,
    *,
    terminal: Tensor | None = None,
    num_states: Tensor | None = None,
    tol: float = 1e-6,
    method: str = "auto",
    backend: str | None = None,
) -> ValueIteration:
    r"""Solve N tabular control problems, each for one or several discounts.

    Q*(s,a) = r̄(s,a) + γ Σ_s' T(s,a,s') max_a' Q*(s',a'), where r̄(s,a) = Σ_s' T(s,a,s') R(s,a,s').

    Everything is computed and returned in float64, whatever the tables' dtype: float32 cannot hold 10³ to 1e-6. Rows
    are taken as given, never renormalised.

    Args:
        transition: T, `[N, S, A, S]`, float32 or float64. An all-zero row ends the episode.
        reward: r̄, `[N, S, A]`, or R, `[N, S, A, S]` (read where T > 0 only); same dtype.
        discount: γ in [0, 1]: a float, or a tensor `[G]` (the same for every task) or `[N, G]`.
        terminal: `[N, S]` bool, states of value 0 whose rows must be all zero and whose rewards are not read. None: the
            states whose rows are zero for every action.
        num_states: `[N]` int64, for batches of unequal tasks: states from num_states[n] on are padding, are not read,
            and get value 0 and action 0.
        tol: the error_bound that value iteration stops at. Policy iteration is exact up to rounding and ignores it.
            Where rounding in float64 does not allow `tol`, the bound that was reached is returned: look at it.
        method: "policy_iteration" (Howard 1960), "value_iteration" (Jacobi sweeps from 0; needs γ < 1), or "auto",
            which is policy iteration.
        backend: "cpu", "cuda", "reference" or None, the fastest that serves the device.

    Returns:
        q `[N, S, A]`, v = max_a q `[N, S]`, policy = argmax_a q (the lowest of equals) `[N, S]` int64, error_bound
        `[N]`, iterations `[N]` int64 (policies evaluated, or sweeps). A tensor of discounts adds a dimension G after N.
        sup|q − Q*| ≤ error_bound and sup|v − V*| ≤ error_bound hold for the tables as given, rounding included. With
        κ = γ·(largest row sum) < 1 the bound is (‖q − 𝒯q‖∞ + rounding)/(1 − κ) (Puterman 1994, section 6.3). Otherwise
        it comes from the expected time to the end under the near-optimal actions (after Bertsekas & Tsitsiklis 1991),
        and is inf where that proves nothing.

    With γ = 1, Q* is the best over policies that reach an end from every state; it is refused if there is none, or if a
    policy that never ends earns without bound. Not differentiable: inputs that require a gradient are refused.

    Raises:
        ValueError: an argument of the wrong shape, dtype or device; γ outside [0, 1]; a transition that is negative,
            not finite, or whose row sums to neither 0 nor, within 1e-4, 1; a reward that is not finite; γ = 1 as above.
    """
    given: dict[str, object] = {"transition": transition, "reward": reward, "discount": discount}
    for name, x in given.items():
        if isinstance(x, Tensor) and x.requires_grad:
            raise ValueError(
                f"{name}: value_iteration is not differentiable, but {name} requires a gradient: detach it"
            )
    single = not isinstance(discount, Tensor)
    if not isinstance(discount, Tensor):
        discount = torch.full((1,), float(discount), dtype=torch.float64, device=transition.device)
    out = torch.ops.icrl.value_iteration(
        transition, reward, discount, terminal, num_states, float(tol), method, backend or "auto"
    )
    return ValueIteration(*(x.squeeze(1) for x in out) if single else out)


# ---- checks --------------------------------------------------------------------------------------------------------


def _check(
    transition: Tensor,
    reward: Tensor,
    discount: Tensor,
    terminal: Tensor | None,
    num_states: Tensor | None,
    tol: float,
    method: str,
) -> None:
    """Everything that shapes, dtypes and devices tell."""
    _checks.shape("transition", transition, ("N", "S", "A", "S"))
    n, s, a, _ = transition.shape
    _checks.shape("transition", transition, ("N", "S", "A", "S"), N=n, S=s, A=a)
    if s == 0 or a == 0:
        raise ValueError(f"transition: wanted at least one state and one action, got shape {list(transition.shape)}")
    _checks.shape("reward", reward, ("N", "S", "A", "S")[: 4 if reward.dim() == 4 else 3], N=n, S=s, A=a)
    _checks.dtype("transition", transition, (torch.float32, torch.float64))
    _checks.same_dtype(transition=transition, reward=reward)
    _checks.shape("discount", discount, ("N", "G")[-1 if discount.dim() == 1 else -2 :], N=n)
    _checks.dtype("discount", discount, (torch.float32, torch.float64))
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


def _check_values(discount: Tensor, num_states: Tensor | None, s: int) -> None:
    wrong = ~((discount >= 0) & (discount <= 1))
    if wrong.any():
        at = wrong.nonzero()[0].tolist()
        raise ValueError(f"discount: wanted values in [0, 1], got {discount[tuple(at)].item()} at index {at}")
    if num_states is not None and ((num_states < 1) | (num_states > s)).any():
        at = int(((num_states < 1) | (num_states > s)).nonzero()[0])
        raise ValueError(f"num_states: wanted 1 to {s}, got {int(num_states[at])} at index {at}")


def _refuse(kind: int, n: int, row: int, g: int, transition: Tensor, discount: Tensor) -> NoReturn:
    """Kinds as in csrc/cpu/policy_iteration.h."""
    s, a = divmod(row, transition.shape[2])
    total = transition[n, s, a].double().sum().item()
    gamma = discount.expand(transition.shape[0], -1)[n, g].item() if discount.shape[-1] else 0.0
    raise ValueError(
        {
            1: f"transition: wanted probabilities, got a negative one in row [{n}, {s}, {a}]",
            2: f"transition: wanted probabilities, got NaN or infinity in row [{n}, {s}, {a}]",
            3: "transition: wanted rows that sum to 1 within 1e-4 over the task's states, or are all zero, got the sum "
            f"{total!r} in row [{n}, {s}, {a}]",
            4: f"reward: wanted finite expected rewards, got NaN or infinity for [{n}, {s}, {a}]",
            5: f"transition: wanted all-zero rows in terminal states, got the sum {total!r} in row [{n}, {s}, {a}]",
            6: f"discount: 1 needs a policy that reaches an end, but none does from state {s} of task {n}",
            7: f"discount: 1 needs values that are finite, but in task {n} a policy that never ends, from state {s}, "
            "earns without bound",
            8: f"discount: with {gamma!r} a policy of task {n} cannot be evaluated: I - discount P is singular",
            9: f"method: value_iteration needs discount * (largest row sum) < 1, but task {n} has discount {gamma!r}",
        }[kind]
    )


# ---- float64 reference, any device: the specification --------------------------------------------------------------


def _tables(
    transition: Tensor, reward: Tensor, discount: Tensor, terminal: Tensor | None, num_states: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """T [N,S,A,S], r̄ and Σ|T R| [N,S,A] in float64, padding zeroed; ValueError for the first bad row."""
    n, s, a, _ = transition.shape
    t = transition.double()
    real = torch.ones(n, s, dtype=torch.bool, device=t.device)
    if num_states is not None:
        real = torch.arange(s, device=t.device) < num_states[:, None]
        t = torch.where(real[:, :, None, None] & real[:, None, None, :], t, 0.0)
    mass, ends = t.sum(-1), (t == 0).all(-1)
    done = ends.all(-1) if terminal is None else terminal
    off = ~real if terminal is None else terminal | ~real
    if reward.dim() == 4:
        terms = torch.where(t != 0, t * torch.where(t != 0, reward.double(), 0.0), 0.0)
        r, size = terms.sum(-1), terms.abs().sum(-1)
    else:
        r, size = reward.double(), reward.double().abs()
    hide = (done | ~real)[:, :, None]
    r, size = torch.where(hide, 0.0, r), torch.where(hide, 0.0, size)
    zero = torch.zeros((), dtype=torch.int64, device=t.device)
    kind = torch.where(size.isfinite(), zero, 4)
    kind = torch.where((off[:, :, None]) & ~ends, 5, kind)
    kind = torch.where(~ends & ~((mass - 1).abs() <= 1e-4), 3, kind)
    kind = torch.where((t < 0).any(-1), 1, kind)
    kind = torch.where(~t.isfinite().all(-1), 2, kind)
    if (kind != 0).any():
        i, j, k = (kind != 0).nonzero()[0].tolist()
        _refuse(int(kind[i, j, k]), i, j * a + k, 0, transition, discount)
    return t, r, size


def _endings(t: Tensor, policy: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Whether an end can be reached from each state [N,S], under `policy` or any, and an action towards it."""
    allowed = torch.ones_like(t[..., 0], dtype=torch.bool)
    if policy is not None:
        allowed = torch.zeros_like(allowed).scatter_(2, policy[..., None], True)
    hit = (t == 0).all(-1) & allowed
    reached, action = hit.any(-1), hit.to(torch.int8).argmax(-1)
    for _ in range(t.shape[1]):
        hit = ((t > 0) & reached[:, None, None, :]).any(-1) & allowed
        new = hit.any(-1) & ~reached
        if not new.any():
            break
        action = torch.where(new, hit.to(torch.int8).argmax(-1), action)
        reached = reached | new
    return reached, action


def _backup(t: Tensor, r: Tensor, gamma: Tensor, v: Tensor) -> Tensor:
    return r + gamma[:, None, None] * torch.einsum("nsaj,nj->nsa", t, v)


def _evaluate(t: Tensor, gamma: Tensor, policy: Tensor, right: Tensor) -> Tensor:
    """(I − γ P_policy)⁻¹ right."""
    n, s, _, _ = t.shape
    p = t.gather(2, policy[:, :, None, None].expand(n, s, 1, s)).squeeze(2)
    eye = torch.eye(s, dtype=t.dtype, device=t.device)
    return torch.linalg.solve_ex(eye - gamma[:, None, None] * p, right)[0]


def _roundings(t: Tensor) -> float:
    """Relative to Σ|terms|, the rounding of a backup in any order of summation."""
    return (t.shape[-1] + 16) * 2 * UNIT


def _policy_iteration(t: Tensor, r: Tensor, size: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, the v that it was backed up from, and iterations for γ [N]; last, refusals [N,2]: kind and state."""
    policy = r.argmax(-1)
    refusal = torch.zeros(t.shape[0], 2, dtype=torch.int64, device=t.device)
    undiscounted = gamma == 1

    def require_end(kind: int, ok: Tensor) -> None:
        bad = undiscounted & ~ok.all(-1) & (refusal[:, 0] == 0)
        refusal[bad, 0], refusal[bad, 1] = kind, (~ok[bad]).to(torch.int8).argmax(-1)

    if undiscounted.any():
        can, towards = _endings(t)
        require_end(6, can)
        policy = torch.where((undiscounted & ~_endings(t, policy)[0].all(-1))[:, None], towards, policy)
    done = refusal[:, 0] != 0
    amplified = (4 / (1 - _contraction(t, gamma)).clamp_min(1e-6))[:, None]
    iterations = torch.zeros_like(done, dtype=torch.int64)
    q, v = r.clone(), torch.zeros_like(r[..., 0])
    small_rounds = torch.zeros_like(iterations)
    while not done.all():
        new = _evaluate(t, gamma, policy, r.gather(2, policy[..., None]).squeeze(2))
        bad = ~done & ~new.isfinite().all(-1)
        refusal[bad, 0], done = 8, done | bad
        v = torch.where(done[:, None], v, new)
        iterations += ~done
        q = torch.where(done[:, None, None], q, _backup(t, r, gamma, v))
        # Only gains above rounding count. Those within the rounding of v may go round in circles: a few rounds end it.
        best = q.argmax(-1)
        scale = size + gamma[:, None, None] * torch.einsum("nsaj,nj->nsa", t, v.abs())
        pair = torch.stack([best, policy], -1)
        gain = q.amax(-1) - q.gather(2, policy[..., None]).squeeze(2)
        rounding = _roundings(t) * scale.gather(2, pair).sum(-1)
        better, large = gain > rounding, gain > rounding * amplified
        small_rounds = torch.where(large.any(-1), 0, small_rounds + 1)
        done = done | ~better.any(-1) | (small_rounds > 4)
        policy = torch.where(better & ~done[:, None], best, policy)
        if undiscounted.any():
            require_end(7, _endings(t, policy)[0])
            done = done | (refusal[:, 0] != 0)
    return q, v, iterations, refusal


def _sweeps(t: Tensor, r: Tensor, size: Tensor, gamma: Tensor, tol: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    refusal = torch.zeros(t.shape[0], 2, dtype=torch.int64, device=t.device)
    refusal[_contraction(t, gamma) >= 1, 0] = 9
    done = refusal[:, 0] != 0
    iterations = torch.zeros_like(done, dtype=torch.int64)
    q, v = r.clone(), torch.zeros_like(r[..., 0])
    while not done.all():
        iterations += ~done
        q = torch.where(done[:, None, None], q, _backup(t, r, gamma, v))
        bound, rounding = _certificate(t, size, gamma, q, v)
        done = done | (bound <= tol) | ((q.amax(-1) - v).abs().amax(-1) <= rounding)
        v = torch.where(done[:, None], v, q.amax(-1))
    return q, v, iterations, refusal


def _contraction(t: Tensor, gamma: Tensor) -> Tensor:
    return gamma * t.sum(-1).amax((1, 2)) * (1 + _roundings(t))


def _certificate(t: Tensor, size: Tensor, gamma: Tensor, q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Given q = backup(v): ‖q − Q*‖ ≤ (rounding + κ‖v − max q‖)/(1 − κ), NaN where κ ≥ 1; and the rounding."""
    kappa = _contraction(t, gamma)
    rounding = _roundings(t) * (size.amax((1, 2)) + kappa * v.abs().amax(1))
    change = (q.amax(-1) - v).abs().amax(-1)
    bound = (rounding + kappa * change) / (1 - kappa) * (1 + 16 * UNIT)
    return torch.where(kappa < 1, bound, torch.nan), rounding


def _certificate_by_hitting_times(t: Tensor, r: Tensor, size: Tensor, gamma: Tensor, q: Tensor) -> Tensor:
    """‖q − Q*‖ without a contraction.

    Let v = max q and let w > 0 have w − γ P_a w > 0 for the greedy action and those within rounding of it. If v + εw
    is at least its own backup then V* ≤ v + εw, and if v − ε'w is at most its backup by the greedy policy then
    V* ≥ v − ε'w. Actions that are worse by a clear margin need no w: their margin pays for them. w is the expected
    (discounted) time to the end, the longest over near-ties, by policy iteration.
    """
    v, c = q.amax(-1), _roundings(t)
    greedy = q.argmax(-1)
    exact = _backup(t, r, gamma, v)
    rounding = c * (size + gamma[:, None, None] * torch.einsum("nsaj,nj->nsa", t, v.abs()) + v.abs()[..., None])
    least = v[..., None] - exact - rounding  # v − 𝒯_a v is at least this
    most = v[..., None] - exact + rounding
    policy, proven = greedy, torch.full_like(gamma, torch.inf)
    for _ in range(20):
        w = _evaluate(t, gamma, policy, torch.ones_like(v))
        kept = (gamma < 1) | _endings(t, policy)[0].all(-1)
        kept &= w.isfinite().all(-1) & (w > 0).all(-1)
        w = torch.where(kept[:, None], w, 1.0)
        after = gamma[:, None, None] * torch.einsum("nsaj,nj->nsa", t, w)
        drop = (w[..., None] - after) - c * (w[..., None] + after)  # w − γ P_a w is at least this
        need = torch.where((least < 0) & (drop > 0), -least / drop, 0.0).amax((1, 2))
        room = torch.where(drop <= 0, least, torch.inf)  # must cover ε·(−drop)
        upper_fails = (room < 0) | (need[:, None, None] * -drop * (1 + 8 * UNIT) > room)
        mine = drop.gather(2, greedy[..., None]).squeeze(2)
        excess = most.gather(2, greedy[..., None]).squeeze(2).clamp_min(0)
        below = torch.where(mine > 0, excess / mine, torch.inf).amax(-1)
        error = torch.maximum(need, below) * w.amax(-1) * (1 + 16 * UNIT)
        bound = (exact - q).abs().amax((1, 2)) + (rounding.amax((1, 2)) + _contraction(t, gamma) * error) * (
            1 + 16 * UNIT
        )
        bound = torch.maximum(bound, error)
        good = kept & ~upper_fails.any(-1).any(-1) & bound.isfinite()
        proven = torch.where(good, torch.minimum(proven, bound), proven)
        retry = kept & ~good
        if not retry.any():
            break
        # The near-tie with the longest time to go replaces the action in a state where the proof failed.
        near = upper_fails & retry[:, None, None]
        longest = torch.where(near, after, -torch.inf)
        policy = torch.where(near.any(-1), longest.argmax(-1), policy)
    return proven


def _reference(
    transition: Tensor,
    reward: Tensor,
    discount: Tensor,
    terminal: Tensor | None,
    num_states: Tensor | None,
    tol: float,
    method: str,
) -> tuple[Tensor, ...]:
    _check(transition, reward, discount, terminal, num_states, tol, method)
    _check_values(discount, num_states, transition.shape[1])
    n, _, a, _ = transition.shape
    t, r, size = _tables(transition, reward, discount, terminal, num_states)
    gammas = discount.double().expand(n, -1)
    columns = []
    for g in range(gammas.shape[1]):
        gamma = gammas[:, g]
        q, v, iterations, refusal = (
            _sweeps(t, r, size, gamma, tol) if method == "value_iteration" else _policy_iteration(t, r, size, gamma)
        )
        if (refusal[:, 0] != 0).any():
            i = int((refusal[:, 0] != 0).nonzero()[0])
            _refuse(int(refusal[i, 0]), i, int(refusal[i, 1]) * a, g, transition, discount)
        columns.append((q, q.amax(-1), q.argmax(-1), _certificate(t, size, gamma, q, v)[0], iterations))
    out = _empty(transition, gammas.shape[1])
    for g, column in enumerate(columns):
        for whole, part in zip(out, column, strict=True):
            whole[:, g] = part
    return _certify_the_rest(out, transition, reward, gammas, terminal, num_states)


def _empty(transition: Tensor, g: int) -> tuple[Tensor, ...]:
    n, s, a, _ = transition.shape
    f, i = torch.float64, torch.int64
    sizes = ((n, g, s, a), f), ((n, g, s), f), ((n, g, s), i), ((n, g), f), ((n, g), i)
    return tuple(torch.empty(size, dtype=dtype, device=transition.device) for size, dtype in sizes)


def _certify_the_rest(
    out: tuple[Tensor, ...],
    transition: Tensor,
    reward: Tensor,
    discount: Tensor,
    terminal: Tensor | None,
    num_states: Tensor | None,
) -> tuple[Tensor, ...]:
    """Fill the bounds that are NaN because there is no contraction."""
    q, bound = out[0], out[3]
    for g in range(q.shape[1]):
        i = bound[:, g].isnan().nonzero().squeeze(1)
        if len(i):
            some = [None if x is None else x[i] for x in (terminal, num_states)]
            t, r, size = _tables(transition[i], reward[i], discount[i], *some)
            bound[i, g] = _certificate_by_hitting_times(t, r, size, discount[i, g], q[i, g])
    return out


# ---- compiled backends: both take the same pointers ------------------------------------------------------------------


def _compiled(call, transition, reward, discount, terminal, num_states, tol, method, ascending) -> tuple[Tensor, ...]:
    """Check, allocate, `call(*pointers and sizes)`, raise what it refused, certify what it could not."""
    _check(transition, reward, discount, terminal, num_states, tol, method)
    n, s, a, _ = transition.shape
    _check_values(discount, num_states, s)
    transition, reward = transition.contiguous(), reward.contiguous()
    terminal = None if terminal is None else terminal.contiguous()
    num_states = None if num_states is None else num_states.contiguous()
    gammas = discount.double().expand(n, -1).contiguous()
    order = gammas.argsort(dim=-1, stable=True).contiguous() if ascending else None
    out = _empty(transition, gammas.shape[1])
    refusal = torch.zeros(n, 3, dtype=torch.int64, device=transition.device)
    call(
        transition.data_ptr(),
        reward.data_ptr(),
        transition.dtype == torch.float64,
        reward.dim() == 4,
        0 if terminal is None else terminal.data_ptr(),
        0 if num_states is None else num_states.data_ptr(),
        gammas.data_ptr(),
        *(() if order is None else (order.data_ptr(),)),
        *(n, gammas.shape[1], s, a),
        1 if method == "value_iteration" else 0,
        tol,
        *(x.data_ptr() for x in out),
        refusal.data_ptr(),
    )
    if refusal[:, 0].any():
        i = int(refusal[:, 0].nonzero()[0])
        _refuse(int(refusal[i, 0]), i, int(refusal[i, 1]), int(refusal[i, 2]), transition, discount)
    return _certify_the_rest(out, transition, reward, gammas, terminal, num_states)


def _cpu(*arguments) -> tuple[Tensor, ...]:
    return _compiled(lambda *x: _C.value_iteration_cpu(*x, torch.get_num_threads()), *arguments, ascending=False)


def _cuda(transition: Tensor, *arguments) -> tuple[Tensor, ...]:
    if not _C.with_cuda:
        raise ValueError("backend: this build of icrl_kernels has no CUDA; build with ICRL_CUDA=1, or use 'reference'")
    _check(transition, *arguments)
    n, s, a, _ = transition.shape
    device = transition.get_device()
    size = _C.value_iteration_cuda_workspace(n, s, a, transition.dtype == torch.float64, device)
    workspace = torch.empty(size, dtype=torch.uint8, device=transition.device)

    def call(*x) -> None:
        stream = torch.cuda.current_stream(device).cuda_stream
        _C.value_iteration_cuda(*x, workspace.data_ptr(), device, stream)

    return _compiled(call, transition, *arguments, ascending=True)


def _fake(
    transition: Tensor,
    reward: Tensor,
    discount: Tensor,
    terminal: Tensor | None,
    num_states: Tensor | None,
    tol: float,
    method: str,
    backend: str,
) -> tuple[Tensor, ...]:
    _check(transition, reward, discount, terminal, num_states, tol, method)
    return _empty(transition, discount.shape[-1])


# Without CUDA in the build the reference serves CUDA tensors; a forced "cuda" then says what is missing.
_gpu = {"cuda": (("cuda",), _cuda), "reference": (("cpu", "cuda"), _reference)}
_registry.define(
    "value_iteration(Tensor transition, Tensor reward, Tensor discount, Tensor? terminal, Tensor? num_states, "
    "float tol, str method, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    {"cpu": (("cpu",), _cpu), **(_gpu if _C.with_cuda else dict(reversed(_gpu.items())))},
    _fake,
)
