"""Launchers of the Triton kernels of gated linear attention (gla_kernels.py): sizes, buffers, grids."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from icrl_kernels.linear_attention.triton.gla_kernels import _grad_kv, _grad_q, _local_states, _outputs, _scan, _step
from icrl_kernels.linear_attention.triton.plan import (
    CHUNK,
    COLUMNS,
    SMS,
    STATE_TILE,
    chunk_length,
    contiguous,
    cut,
    levels,
    limit,
    passes,
    pow2,
    products,
)

ANCHOR = 1024  # most tokens over which the backward of gates sums what cancels, before it looks at a state again
FULL = 0.6  # share of the SMs that whole sequences have to keep busy; cutting them costs 1.4 to 1.8 times the traffic


@dataclass(frozen=True)
class _Plan:
    """What every launch of a call shares: sizes, the cut into segments, and the operands' dtype in the products."""

    chunk: int  # tokens
    single: bool  # whether a program does a whole sequence, not a segment
    segments: int  # an upper bound for a ragged batch
    sequences: int
    heads: int
    span: tuple  # cu_seqlens, owner, first, T, L, segments per sequence
    sizes: dict
    products: dict
    gates: dict
    stages: int  # of the loads' pipeline: two where shared memory holds them
    passes: tuple  # values of ANY: gates per channel take a second launch, which works only where they are strong

    @property
    def units(self) -> int:
        """Programs for each head and tile of the state."""
        return self.sequences if self.single else self.segments

    def states(self, count: int, x: Tensor) -> Tensor:
        shape = (count, self.heads, self.sizes["K"], self.sizes["V"])
        return torch.empty(shape, dtype=torch.float32, device=x.device)


def _segment_length(tokens: int, heads: int) -> int:
    """The power of two that gives about six segments per SM; a segment costs a state's round trip to memory."""
    return max(triton.next_power_of_2(tokens * heads // (6 * SMS) + 1), CHUNK)


def _single(sequences: int, T: int, heads: int) -> bool:
    """Whether one program does a whole sequence and head: where that leaves few SMs idle, or nothing is to be cut."""
    programs = sequences * heads
    waves = -(-programs // SMS)
    return _segment_length(sequences * T, heads) >= T or programs >= FULL * waves * SMS


def _plan(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, cu_seqlens: Tensor | None, anchored: bool = False
) -> _Plan:
    """anchored: with a state for each ANCHOR tokens, also where a program does a whole sequence."""
    B, T, H, K = q.shape
    heads = k.shape[2]
    L = _segment_length(B * T, heads)
    single = cu_seqlens is None and _single(B, T, heads)
    if single:
        L = max(T, 1)
    if anchored:
        L = min(L, ANCHOR)
    N, segments, per, owner, first = cut(q, L, cu_seqlens)
    chunk = chunk_length(q.dtype, K, v.shape[-1])
    return _Plan(
        chunk=chunk,
        single=single,
        segments=segments,
        sequences=N,
        heads=heads,
        span=(cu_seqlens, owner, first, T, L, per),
        sizes={"K": K, "V": v.shape[-1], "VARLEN": cu_seqlens is not None, "GATE": 0 if g is None else g.dim() - 2},
        products=products(q.dtype),
        gates={"LIMIT": limit(q.dtype)},
        stages=2 if q.dtype == torch.bfloat16 and max(K, v.shape[-1]) <= 128 else 1,
        passes=passes(g),
    )


def _warps(state_entries: int) -> int:
    return 8 if state_entries > STATE_TILE // 2 else 4


def _forward_tile(K: int, V: int) -> tuple[int, int]:
    """All of K, and as much of V as fits."""
    return pow2(K), min(pow2(V), COLUMNS, STATE_TILE // pow2(K))


def _segment_states(
    plan: _Plan, k: Tensor, v: Tensor, g: Tensor | None, init: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The state before each segment, [segments, Hk, K, V], that after the last, and the segments' decays."""
    K, V, gate = plan.sizes["K"], plan.sizes["V"], plan.sizes["GATE"]
    BK, BV = _forward_tile(K, V)
    states, decay = plan.states(plan.segments, k), None
    if gate:
        shape = (plan.segments, plan.heads, K if gate == 2 else 1)
        decay = torch.empty(shape, dtype=torch.float32, device=k.device)
    if plan.segments:
        _local_states[(plan.segments * plan.heads * triton.cdiv(V, BV),)](
            k, v, g, states, decay, *plan.span, plan.heads,
            BK=BK, BV=BV, C=plan.chunk, **plan.sizes, **plan.products,
            num_warps=_warps(BK * BV), num_stages=plan.stages,
        )  # fmt: skip
    return states, _scanned(plan, states, decay, init, False), decay


def _scanned(plan: _Plan, states: Tensor, decay: Tensor | None, init: Tensor | None, reverse: bool) -> Tensor:
    """Makes, of what each segment adds, the state each starts from (reverse: ends with); returns the one after all."""
    K, V = plan.sizes["K"], plan.sizes["V"]
    last = plan.states(plan.sequences, states)
    BR, BV = max(1, 2048 // pow2(V)), pow2(V)
    _scan[(plan.sequences * plan.heads * triton.cdiv(K, BR),)](
        states, decay, init, last, plan.span[2], plan.span[5], plan.heads,
        BR=BR, BV=BV, REVERSE=reverse, **plan.sizes, num_warps=4,
    )  # fmt: skip
    return last


def forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, scale: float,
    initial_state: Tensor | None, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o [B, T, H, V] in v's dtype and the final state, float32 [N, Hk, K, V]. Shapes as in `icrl_kernels.gla`."""
    q, k, v, g, initial_state = contiguous(q, k, v, g, initial_state)
    plan = _plan(q, k, v, g, cu_seqlens)
    K, V, H = plan.sizes["K"], plan.sizes["V"], q.shape[2]
    o = torch.empty(*q.shape[:3], V, dtype=v.dtype, device=v.device)
    if plan.single:
        last = plan.states(plan.sequences, k)
        states, ends = initial_state, last
    else:
        states, last, _ = _segment_states(plan, k, v, g, initial_state)
        ends = None
    strong = torch.empty(plan.units, plan.heads, dtype=torch.int32, device=q.device) if len(plan.passes) > 1 else None
    BK, BV = _forward_tile(K, V)
    for any_gate in plan.passes if plan.units else ():
        _outputs[(plan.units * plan.heads * triton.cdiv(V, BV),)](
            q, k, v, g, states, ends, strong, o, scale, *plan.span, plan.heads,
            GROUP=H // plan.heads, BK=BK, BV=BV, C=plan.chunk, LEVELS=levels(plan.chunk), **plan.sizes,
            **plan.products, **plan.gates,
            ANY=any_gate, num_warps=_warps(BK * BV), num_stages=plan.stages,
        )  # fmt: skip
    return o, last


def backward(
    do: Tensor, dfinal_state: Tensor | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, scale: float,
    initial_state: Tensor | None, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """dq, dk, dv, dg (None without gates), d initial_state (None without one), each in its input's dtype."""
    if v.shape[3] <= COLUMNS:
        return _backward(do, dfinal_state, q, k, v, g, scale, initial_state, cu_seqlens, False)
    # The kernels want all of V on chip: wider heads are taken in blocks of columns, which do not touch one another. What
    # these share, dq, dk and dg, is summed in float32.
    shared, dvs, dinits = [None] * 3, [], []
    for i in range(0, v.shape[3], COLUMNS):
        of = [None if x is None else x[..., i : i + COLUMNS] for x in (do, dfinal_state, v, initial_state)]
        dq, dk, dv, dg, dinit = _backward(of[0], of[1], q, k, of[2], g, scale, of[3], cu_seqlens, True)
        shared = [b if a is None else a.add_(b) for a, b in zip(shared, (dq, dk, dg), strict=True)]
        dvs.append(dv)
        dinits.append(dinit)
    dq, dk, dg = (None if a is None else a.to(x.dtype) for a, x in zip(shared, (q, k, g), strict=True))
    return dq, dk, torch.cat(dvs, 3), dg, None if initial_state is None else torch.cat(dinits, 3)


def _backward(
    do: Tensor, dfinal_state: Tensor | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, scale: float,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, wide: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """As `backward`, for V up to COLUMNS; wide: dq, dk and dg in float32, to be summed."""
    do, q, k, v, g, initial_state, dfinal_state = contiguous(do, q, k, v, g, initial_state, dfinal_state)
    plan = _plan(q, k, v, g, cu_seqlens, anchored=g is not None)
    K, V, H, gate = plan.sizes["K"], plan.sizes["V"], q.shape[2], plan.sizes["GATE"]
    dq, dk = (torch.empty_like(x, dtype=torch.float32 if wide else None) for x in (q, k))
    dv = torch.empty_like(v)
    BK, BV = pow2(K), pow2(V)
    # What is on chip, [K columns, V columns]: with all of V for dq, dk and dg, with all of K for dv; dk, dg and dv in
    # one launch where the state fits. With gates dq's state takes half the registers, and all launches half a chunk at a
    # time, which leaves enough registers for dk, dg and dv at once (dq has to round as they do).
    half, chunk = (STATE_TILE, plan.chunk) if g is None else (STATE_TILE // 2, min(plan.chunk, CHUNK // 2))
    BKS = min(BK, half // BV)
    parts = triton.cdiv(K, BKS)
    tiles = [(BK, BV, True, True)]
    if BK * BV > STATE_TILE:
        tiles = [(BKS, BV, True, False), (BK, STATE_TILE // BK, False, True)]
    dg = z = strong = decay = added = None
    if gate == 1:
        z = torch.empty(parts, *q.shape[:3], dtype=torch.float32, device=q.device)
        own = triton.cdiv(K, tiles[0][0])  # parts of K in the launch for dg: all of it where the state fits
        dg = torch.empty(own, *g.shape, dtype=torch.float32, device=g.device)
    elif gate == 2:
        dg = torch.empty_like(g, dtype=torch.float32 if wide else None)
        z = dg if dg.dtype == torch.float32 and plan.heads == H else torch.empty_like(q, dtype=torch.float32)
        strong = torch.empty(parts, plan.units, plan.heads, dtype=torch.int32, device=q.device)
    if plan.single:
        states, final = None if g is None else plan.states(plan.segments, k), None
    else:
        states, final, decay = _segment_states(plan, k, v, g, initial_state)
        added = plan.states(plan.segments, k)
    share = {"GROUP": H // plan.heads, "SINGLE": plan.single, "num_stages": plan.stages}
    share |= {**plan.sizes, **plan.products, **plan.gates}
    for any_gate in plan.passes if plan.units else ():
        _grad_q[(plan.units * plan.heads * parts,)](
            None if plan.single and gate != 1 else q, k, v, g, do, states, initial_state if plan.single else None,
            added, strong, dq, z, scale, *plan.span, plan.heads, dq.numel() // K,
            C=chunk, LEVELS=levels(chunk), BK=BKS, BV=BV, ANY=any_gate,
            num_warps=_warps(BKS * BV) if g is None else 8, **share,
        )  # fmt: skip
    if gate == 1 and len(dg) < parts:
        z = z.sum(0, keepdim=True)  # that launch reads as many parts of q·z as it writes of dg
    if plan.single:
        dstates, dinit = dfinal_state, None if initial_state is None else plan.states(plan.sequences, k)
        dinit_out = dinit
    else:
        dstates, dinit = added, _scanned(plan, added, decay, dfinal_state, True)
        dinit_out = None
    for any_gate in plan.passes if plan.units else ():
        for bk, bv, with_dk, with_dv in tiles:
            of_dk = (lambda x: x) if with_dk and g is not None else (lambda x: None)
            _grad_kv[(plan.units * plan.heads * triton.cdiv(K, bk) * triton.cdiv(V, bv),)](
                q, k, v if with_dk else None, g, do, of_dk(z), of_dk(states), of_dk(final), dstates,
                dinit_out if with_dk else None, strong, dk if with_dk else None, dv if with_dv else None, of_dk(dg),
                scale, *plan.span, plan.heads, 0 if g is None else g.numel(),
                C=chunk, LEVELS=levels(chunk), BK=bk, BV=bv, DK=with_dk, DV=with_dv, PARTS=parts, ANY=any_gate,
                num_warps=_warps(bk * bv if g is None else 2 * bk * bv), **share,
            )  # fmt: skip
    if gate == 1:
        dg = dg.sum(0).to(torch.float32 if wide else g.dtype)
    return dq, dk, dv, dg, None if initial_state is None else dinit


def step(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor, scale: float) -> Tensor:
    """One token: q [B, H, K], k [B, Hk, K], v [B, Hk, V]; `state` is updated in place, o [B, H, V] returned."""
    if not state.is_contiguous():
        raise ValueError(f"state: wanted a contiguous tensor, got strides {state.stride()}")
    q, k, v, g = contiguous(q, k, v, g)
    B, H, K = q.shape
    heads, V = v.shape[1:]
    o = torch.empty(B, H, V, dtype=v.dtype, device=v.device)
    BK = pow2(K)
    BV = min(pow2(V), 4096 // BK)
    if B:
        _step[(B * heads * triton.cdiv(V, BV),)](
            q, k, v, g, state, o, scale, heads,
            GROUP=H // heads, K=K, V=V, BK=BK, BV=BV, GATE=0 if g is None else g.dim() - 1, num_warps=4,
        )  # fmt: skip
    return o
