"""value_iteration in Triton: modified policy iteration or Jacobi sweeps in float64, for any GPU that Triton serves.

Two launches. `_prepare` reads the whole table once: each row's window, its expected reward and what is wrong with it. In
`_solve` a program has one task and one discount for all its sweeps and reads windows only; the discounts of a task are
neighbours in the grid, so that they meet in the L2 cache. They do not share a program: after the first sweep their
policies differ, hence the rows they read, and small discounts end long before large ones do.

Modified policy iteration (Puterman & Shin 1978): a greedy backup over all actions, then sweeps that follow its policy,
which read one row a state.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _prepare(
    transition,
    reward,
    offset,
    first,
    length,
    num_states,
    start,
    low_out,
    count_out,
    mean_out,
    size_out,
    mass_out,
    kind_out,
    total,
    values,
    S,
    A,
    PACKED: tl.constexpr,
    BY_SUCCESSOR: tl.constexpr,
    RAGGED: tl.constexpr,
    ROWS: tl.constexpr,
    BJ: tl.constexpr,
):
    """Each row: where its window starts, its first column and length, Σ T R, Σ |T R|, Σ T, and a kind of refusal."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < total
    task = row // (S * A)
    state = (row // A) % S
    states = tl.zeros([ROWS], tl.int64) + S
    if RAGGED:
        states = tl.minimum(tl.load(num_states + task, mask=there, other=0), S)
    real = there & (state < states)
    if PACKED:
        begin = tl.load(first + row, mask=real, other=0).to(tl.int64)
        count = tl.load(length + row, mask=real, other=0).to(tl.int64)
        place = tl.load(offset + row, mask=real, other=0)
        outside = (begin < 0) | (count < 0) | (begin + count > S)
        outside = outside | ((count > 0) & ((place < 0) | (place > values - count)))
        begin = tl.where(outside, 0, begin)
        end = tl.where(outside, 0, tl.minimum(begin + count, states)).to(tl.int32)
        origin = place - begin
        begin = begin.to(tl.int32)
    else:
        outside = row < 0
        begin = tl.zeros([ROWS], tl.int32)
        end = tl.where(real, states, 0).to(tl.int32)
        origin = row * S
    low = tl.zeros([ROWS], tl.int32) + S
    high = tl.zeros([ROWS], tl.int32)
    mass = tl.zeros([ROWS], tl.float64)
    mean = tl.zeros([ROWS], tl.float64)
    size = tl.zeros([ROWS], tl.float64)
    odd = tl.zeros([ROWS], tl.int32)  # 1: an entry is negative, 2: one is not finite
    for j0 in range(tl.min(tl.where(begin < end, begin, S)), tl.max(end), BJ):
        j = (j0 + tl.arange(0, BJ))[None, :]
        inside = (j >= begin[:, None]) & (j < end[:, None])
        p = tl.load(transition + origin[:, None] + j, mask=inside, other=0.0).to(tl.float64)
        some = p != 0  # true of NaN
        low = tl.minimum(low, tl.min(tl.where(some, j, S), 1))
        high = tl.maximum(high, tl.max(tl.where(some, j + 1, 0), 1))
        wrong = tl.where((p != p) | (tl.abs(p) == float("inf")), 2, tl.where(p < 0, 1, 0))
        odd = tl.maximum(odd, tl.max(wrong, 1))
        mass += tl.sum(p, 1)
        if BY_SUCCESSOR:
            r = p * tl.load(reward + origin[:, None] + j, mask=inside & some, other=0.0).to(tl.float64)
            mean += tl.sum(r, 1)
            size += tl.sum(tl.abs(r), 1)
    if not BY_SUCCESSOR:
        mean = tl.load(reward + row, mask=real, other=0.0).to(tl.float64)
        size = tl.abs(mean)
    count = tl.maximum(high - low, 0)
    low = tl.where(count > 0, low, 0)
    kind = tl.where((count > 0) & ~(tl.abs(mass - 1) <= 1e-4), 3, 0)
    kind = tl.where(odd == 2, 2, tl.where(odd == 1, 1, kind))
    kind = tl.where(outside, 10, kind)
    tl.store(start + row, origin + low, mask=there)
    tl.store(low_out + row, low, mask=there)
    tl.store(count_out + row, count, mask=there)
    tl.store(mean_out + row, mean, mask=there)
    tl.store(size_out + row, size, mask=there)
    tl.store(mass_out + row, mass, mask=there)
    tl.store(kind_out + row, kind, mask=there)


@triton.jit
def _expected(transition, start, low, count, row, mask, v, BS: tl.constexpr, BJ: tl.constexpr):
    """Σ_j T[row, j] v[j] of BS rows."""
    place = tl.load(start + row, mask=mask, other=0)
    column = tl.load(low + row, mask=mask, other=0)
    n = tl.load(count + row, mask=mask, other=0)
    total = tl.zeros([BS, BJ], tl.float64)
    for j0 in range(0, tl.max(n), BJ):
        j = (j0 + tl.arange(0, BJ))[None, :]
        inside = j < n[:, None]
        p = tl.load(transition + place[:, None] + j, mask=inside, other=0.0).to(tl.float64)
        total += p * tl.load(v + column[:, None] + j, mask=inside, other=0.0)
    return tl.sum(total, 1)


@triton.jit
def _greedy(
    transition,
    start,
    low,
    count,
    mean,
    gamma,
    v,
    to,
    policy,
    q,
    S,
    A,
    WRITE_Q: tl.constexpr,
    BS: tl.constexpr,
    BJ: tl.constexpr,
):
    """to = max_a q and policy = argmax_a q of a task, where q is the backup of v; max |v - to| and max |v|."""
    change = tl.zeros([BS], tl.float64)
    largest = tl.zeros([BS], tl.float64)
    for s0 in range(0, S, BS):
        s = s0 + tl.arange(0, BS)
        mask = s < S
        best = tl.zeros([BS], tl.float64)
        action = tl.zeros([BS], tl.int32)
        for a in range(A):
            row = s * A + a
            x = tl.load(mean + row, mask=mask, other=0.0)
            x += gamma * _expected(transition, start, low, count, row, mask, v, BS, BJ)
            if WRITE_Q:
                tl.store(q + row, x, mask=mask)
            better = (x > best) | (a == 0)
            best = tl.where(better, x, best)
            action = tl.where(better, a, action)
        before = tl.load(v + s, mask=mask, other=0.0)
        step = tl.abs(before - best)
        change = tl.maximum(change, tl.where(step == step, step, float("inf")))
        largest = tl.maximum(largest, tl.abs(before))
        tl.store(to + s, best, mask=mask)
        tl.store(policy + s, action.to(policy.dtype.element_ty), mask=mask)
    tl.debug_barrier()
    return tl.max(change), tl.max(largest)


@triton.jit
def _solve(
    transition,
    start,
    low,
    count,
    mean,
    facts,
    scratch,
    followed,
    q,
    v,
    policy,
    bound,
    iterations,
    S,
    A,
    G,
    most,
    INNER: tl.constexpr,
    BS: tl.constexpr,
    BJ: tl.constexpr,
):
    """facts [N,G,6]: discount, contraction, rounding of the reward, rounding of 1, 1 / (1 - contraction) with its own
    rounding, tol. scratch [N,G,2,S] holds v and its successor in turn, followed [N,G,S] the policy."""
    i = tl.program_id(0).to(tl.int64)
    task = i // G
    gamma = tl.load(facts + i * 6)
    contraction = tl.load(facts + i * 6 + 1)
    base = tl.load(facts + i * 6 + 2)
    relative = tl.load(facts + i * 6 + 3)
    grow = tl.load(facts + i * 6 + 4)
    tol = tl.load(facts + i * 6 + 5)
    start += task * S * A
    low += task * S * A
    count += task * S * A
    mean += task * S * A
    scratch += i * 2 * S
    followed += i * S
    for s0 in range(0, S, BS):
        s = s0 + tl.arange(0, BS)
        tl.store(scratch + s, tl.zeros([BS], tl.float64), mask=s < S)
    tl.debug_barrier()
    at = 0
    done = 0
    sweeps = 0
    while done == 0:
        change, largest = _greedy(
            transition,
            start,
            low,
            count,
            mean,
            gamma,
            scratch + at,
            scratch + (S - at),
            followed,
            q,
            S,
            A,
            False,
            BS,
            BJ,
        )
        sweeps += 1
        rounding = base + relative * largest
        error = (rounding + contraction * change) * grow
        # so that a NaN ends it too
        done = tl.where((error > tol) & (change > rounding) & (sweeps * (1 + INNER) <= most), 0, 1)
        if done == 0:
            at = S - at
            for _ in range(INNER):
                for s0 in range(0, S, BS):
                    s = s0 + tl.arange(0, BS)
                    mask = s < S
                    row = s * A + tl.load(followed + s, mask=mask, other=0)
                    x = tl.load(mean + row, mask=mask, other=0.0)
                    x += gamma * _expected(transition, start, low, count, row, mask, scratch + at, BS, BJ)
                    tl.store(scratch + (S - at) + s, x, mask=mask)
                tl.debug_barrier()
                at = S - at
    # the same backup again, to keep it
    change, largest = _greedy(
        transition,
        start,
        low,
        count,
        mean,
        gamma,
        scratch + at,
        v + i * S,
        policy + i * S,
        q + i * S * A,
        S,
        A,
        True,
        BS,
        BJ,
    )
    tl.store(bound + i, (base + relative * largest + contraction * change) * grow)
    tl.store(iterations + i, sweeps)


def prepare(
    transition: Tensor, reward: Tensor, windows: list[Tensor], num_states: Tensor | None, n: int, s: int, a: int
) -> tuple[Tensor, ...]:
    """start, low, count, mean, size, mass, kind, each [N,S,A], of contiguous tables."""
    offset, first, length = windows or (None, None, None)
    dtypes = torch.int64, torch.int32, torch.int32, *[torch.float64] * 3, torch.int32
    out = tuple(torch.empty(n, s, a, dtype=x, device=transition.device) for x in dtypes)
    rows = n * s * a
    if rows:
        columns = min(32, triton.next_power_of_2(s))
        block = 512 // columns
        _prepare[(triton.cdiv(rows, block),)](
            *(transition, reward, offset, first, length, num_states, *out),
            *(rows, transition.numel(), s, a),
            PACKED=bool(windows),
            BY_SUCCESSOR=reward.dim() == (1 if windows else 4),
            RAGGED=num_states is not None,
            ROWS=block,
            BJ=columns,
            num_warps=4,
            num_stages=1,
        )
    return out


def solve(
    transition: Tensor,
    start: Tensor,
    low: Tensor,
    count: Tensor,
    mean: Tensor,
    facts: Tensor,
    widest: int,
    inner: int,
    most: int,
    out: tuple[Tensor, ...],
) -> None:
    """Fill out: q [N,G,S,A], v, policy [N,G,S], bound, iterations [N,G]. `inner` sweeps follow each policy, until there
    have been `most`."""
    n, s, a = mean.shape
    g = facts.shape[1]
    if n * g == 0:
        return
    scratch = torch.empty(n, g, 2, s, dtype=torch.float64, device=mean.device)
    followed = torch.empty(n, g, s, dtype=torch.int32, device=mean.device)
    columns = min(64, max(8, triton.next_power_of_2(widest)))
    block = min(512 // columns, triton.next_power_of_2(s))
    _solve[(n * g,)](
        *(transition, start, low, count, mean, facts, scratch, followed, *out),
        *(s, a, g, most),
        INNER=inner,
        BS=block,
        BJ=columns,
        num_warps=4,
        num_stages=1,
    )
