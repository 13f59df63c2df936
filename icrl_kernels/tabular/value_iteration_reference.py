"""The specification of `value_iteration`: float64 torch operators, for any device."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from icrl_kernels.arguments import every_state_acts
from icrl_kernels.tabular.packed import PackedTransition, refuse_window

UNIT = 2.0**-53  # half a unit in the last place of float64
UNDERFLOW = 2.0**-1073  # above what two products may lose to underflow
MOST_SWEEPS, INNER_SWEEPS = 100_000, 20


def dense(
    transition: Tensor, reward: Tensor, windows: list[Tensor], num_states: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Both as dense tables; `windows` is empty, or offset, first and length of a PackedTransition, which are checked."""
    if not windows:
        return transition, reward
    offset, first, length = windows
    if num_states is not None:
        padding = torch.arange(offset.shape[1], dtype=torch.int64, device=offset.device) >= num_states[:, None]
        first, length = (x.masked_fill(padding[:, :, None], 0) for x in (first, length))
    packed = PackedTransition(transition, offset, first, length).check()
    return packed._unpack(transition), packed._unpack(reward) if reward.dim() == 1 else reward


def select(i: Tensor, transition: Tensor, reward: Tensor, windows: list[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The tasks `i` of a batch."""
    if not windows:
        return transition[i], reward[i], []
    return transition, reward if reward.dim() == 1 else reward[i], [x[i] for x in windows]


def without_missing(
    transition: Tensor,
    reward: Tensor,
    windows: list[Tensor],
    terminal: Tensor | None,
    num_states: Tensor | None,
    action_mask: Tensor,
) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """The same tasks without missing actions, and where q is −inf [N,S,A].

    A missing action becomes a copy of the first that its state has, which changes no maximum: V*, the bound on its error
    and the number of iterations are those of the actions that the states have. ValueError for a state without actions
    that is not terminal.
    """
    none = ~action_mask.any(-1)
    missing = ~action_mask & ~none[..., None]
    if not (missing.any() or none.any()):
        return transition, reward, windows, missing
    own = torch.arange(action_mask.shape[2], dtype=torch.int64, device=action_mask.device)
    first = action_mask.to(torch.int8).argmax(-1, keepdim=True)
    source = torch.where(missing, first, own)
    ended = none if terminal is None else none & terminal
    if windows:
        windows = [x.gather(2, source) for x in windows]
        if terminal is not None:
            windows[2] = windows[2].masked_fill(ended[..., None], 0)
    else:
        transition = transition.gather(2, source[..., None].expand_as(transition))
        if terminal is not None:
            transition.masked_fill_(ended[..., None, None], 0)
    if reward.dim() > 1:
        wide = source if reward.dim() == 3 else source[..., None].expand_as(reward)
        reward = reward.gather(2, wide)
    if num_states is not None:
        none = none & (torch.arange(none.shape[1], dtype=torch.int64, device=none.device) < num_states[:, None])
    if terminal is None and (some := none.any(-1).nonzero()[:, 0]).numel():
        sizes = None if num_states is None else num_states[some]
        rows = dense(*select(some, transition, reward, windows), sizes)[0]
        ended = ended.index_copy(0, some, ended[some] & (rows == 0).flatten(2).all(-1))
    every_state_acts(none & ~ended)
    return transition, reward, windows, missing


def refuse(
    kind: int, row: tuple[int, int, int], g: int, transition: Tensor, windows: list[Tensor], discount: Tensor
) -> NoReturn:
    """Kinds as in csrc/tabular/policy_iteration.h."""
    n, s, a = row
    if kind == 10:
        refuse_window(PackedTransition(transition, *windows), *row)
    if windows:
        begin, count = int(windows[0][row]), int(windows[2][row])
        total = transition[begin : begin + count].double().sum().item()
    else:
        total = transition[row].double().sum().item()
    gamma = (discount[n, g] if discount.dim() == 2 else discount[g]).item() if discount.shape[-1] else 0.0
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
            8: f"discount: with {gamma!r} a policy of task {n} cannot be evaluated: I - discount P is singular, "
            "or values leave float64's range",
            9: "method: value_iteration and modified_policy_iteration need discount * (largest row sum) < 1, but task "
            f"{n} has discount {gamma!r}",
        }[kind]
    )


def tables(
    transition: Tensor, reward: Tensor, discount: Tensor, terminal: Tensor | None, num_states: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """T [N,S,A,S], r̄ and Σ|T R| [N,S,A] in float64, padding zeroed; ValueError for the first bad row."""
    n, s, _, _ = transition.shape
    t = transition.double()
    real = torch.ones(n, s, dtype=torch.bool, device=t.device)
    if num_states is not None:
        real = torch.arange(s, dtype=torch.int64, device=t.device) < num_states[:, None]
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
        refuse(int(kind[i, j, k]), (i, j, k), 0, t, [], discount)
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


def _underflow(t: Tensor) -> float:
    """What underflow may add to that."""
    return (t.shape[-1] + 16) * UNDERFLOW


def policy_iteration(t: Tensor, r: Tensor, size: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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


def sweeps(
    t: Tensor, r: Tensor, size: Tensor, gamma: Tensor, tol: float, inner: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Value iteration; with `inner` sweeps of the greedy policy after each backup, modified policy iteration.

    The span rule (Puterman 1994, section 6.6): when max q - v is nearly the same everywhere, the middle of it over
    1 - contraction is what is still missing; the values so corrected are what must pass the certificate.
    """
    refusal = torch.zeros(t.shape[0], 2, dtype=torch.int64, device=t.device)
    kappa = _contraction(t, gamma)
    refusal[kappa >= 1, 0] = 9
    done = refusal[:, 0] != 0
    moves = (t != 0).any(-1).any(-1)
    iterations, count = torch.zeros_like(done, dtype=torch.int64), 0
    q, v = r.clone(), torch.zeros_like(r[..., 0])
    limit = torch.full_like(gamma, torch.inf)  # a correction that failed is not tried before the span has halved
    while not done.all():
        iterations += ~done
        q = torch.where(done[:, None, None], q, _backup(t, r, gamma, v))
        after = q.amax(-1)
        change = (after - v).abs().amax(-1)
        bad = ~done & ~change.isfinite()
        refusal[bad, 0], done = 8, done | bad
        bound, rounding = certificate(t, size, gamma, q, v)
        done = done | (bound <= tol) | (change <= rounding) | (count >= MOST_SWEEPS)
        high = (after - v).masked_fill(~moves, -torch.inf).amax(-1)
        low = (after - v).masked_fill(~moves, torch.inf).amin(-1)
        least = 2 * rounding / (1 - kappa)
        predicted = kappa**2 * (high - low) / 2 / (1 - kappa) + least / 2
        attempt = ~done & (predicted <= limit) & (predicted <= least.clamp_min(tol))
        if attempt.any():
            limit = torch.where(attempt, predicted / 2, limit)
            shift = kappa / (1 - kappa) * (high + low) / 2
            corrected = torch.where(moves & attempt[:, None], after + shift[:, None], after)
            iterations += attempt
            new = _backup(t, r, gamma, corrected)
            closer = certificate(t, size, gamma, new, corrected)[0]
            hit = attempt & (closer <= tol)
            q, v = torch.where(hit[:, None, None], new, q), torch.where(hit[:, None], corrected, v)
            done = done | hit
            after = torch.where((attempt & (closer < bound))[:, None], new.amax(-1), after)
        v = torch.where(done[:, None], v, after)
        if inner and not done.all():
            still, policy = (done | attempt)[:, None], q.argmax(-1)
            p = t.gather(2, policy[:, :, None, None].expand(-1, -1, 1, t.shape[-1])).squeeze(2)
            earned = r.gather(2, policy[..., None]).squeeze(2)
            for _ in range(inner):
                v = torch.where(still, v, earned + gamma[:, None] * torch.einsum("nsj,nj->ns", p, v))
        count += 1 + inner
    return q, v, iterations, refusal


def _contraction(t: Tensor, gamma: Tensor) -> Tensor:
    return gamma * t.sum(-1).amax((1, 2)) * (1 + _roundings(t))


def certificate(t: Tensor, size: Tensor, gamma: Tensor, q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Given q = backup(v): ‖q − Q*‖ ≤ (rounding + κ‖v − max q‖)/(1 − κ), NaN where κ ≥ 1; and the rounding."""
    kappa = _contraction(t, gamma)
    rounding = _roundings(t) * (size.amax((1, 2)) + kappa * v.abs().amax(1)) + _underflow(t)
    change = (q.amax(-1) - v).abs().amax(-1)
    bound = (rounding + kappa * change) / (1 - kappa) * (1 + 16 * UNIT) + UNDERFLOW
    return torch.where(kappa < 1, bound, torch.nan), rounding


def certificate_by_hitting_times(t: Tensor, r: Tensor, size: Tensor, gamma: Tensor, q: Tensor) -> Tensor:
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
    rounding = rounding + _underflow(t)
    least = v[..., None] - exact - rounding  # v − 𝒯_a v is at least this
    most = v[..., None] - exact + rounding
    policy, proven = greedy, torch.full_like(gamma, torch.inf)
    for _ in range(20):
        w = _evaluate(t, gamma, policy, torch.ones_like(v))
        kept = (gamma < 1) | _endings(t, policy)[0].all(-1)
        kept &= w.isfinite().all(-1) & (w > 0.5).all(-1)  # it is at least 1
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
        bound = torch.maximum(bound, error) + UNDERFLOW
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
