"""Launchers of the Triton kernels of gated linear attention (gla_kernels.py): sizes, buffers, grids."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from icrl_kernels._triton.gla_kernels import _grad_kv, _grad_q, _local_states, _outputs, _scan, _step

CHUNK = 64
STATE_TILE = 16384  # entries of the state that one program of 8 warps holds: 64 registers a thread
SMS = 132


@dataclass(frozen=True)
class _Plan:
    """What every launch of a call shares: sizes, the cut into segments, and the operands' dtype in the products."""

    chunk: int  # tokens
    grid: int  # segments, an upper bound for a ragged batch
    sequences: int
    heads: int
    groups: int
    span: tuple  # cu_seqlens, owner, first, T, L, segments per sequence
    sizes: dict
    products: dict
    gates: dict
    stages: int  # of the loads' pipeline: two where shared memory holds them
    passes: tuple  # values of ANY: gates per channel take a second launch, which works only where they are strong


def _pow2(n: int) -> int:
    return max(16, triton.next_power_of_2(n))


def _segment_length(tokens: int, heads: int) -> int:
    """The power of two that gives about six segments per SM; a segment costs a state's round trip to memory."""
    return max(triton.next_power_of_2(tokens * heads // (6 * SMS) + 1), CHUNK)


def _plan(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, cu_seqlens: Tensor | None) -> _Plan:
    B, T, H, K = q.shape
    heads = k.shape[2]
    L = _segment_length(B * T, heads)
    if cu_seqlens is None:
        N, per, owner, first = B, -(-T // L), None, None
        grid = B * per
    else:  # on the device throughout: the grid is an upper bound, so that no length has to come to the host
        N, per = cu_seqlens.numel() - 1, 0
        grid = T // L + N
        counts = (cu_seqlens.diff().long() + L - 1) // L
        first = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        segments = torch.arange(grid, device=q.device)
        owner = torch.searchsorted(first[1:], segments, right=True).clamp_(max=N - 1)
    half, widest = q.dtype == torch.bfloat16, max(K, v.shape[-1])
    # float32 operands take two to four times the shared memory: shorter chunks there
    chunk = CHUNK if half or widest <= 64 else CHUNK // 2 if widest <= 128 else CHUNK // 4
    return _Plan(
        chunk=chunk,
        grid=grid,
        sequences=N,
        heads=heads,
        groups=H // heads,
        span=(cu_seqlens, owner, first, T, L, per),
        sizes={"K": K, "V": v.shape[-1], "VARLEN": cu_seqlens is not None, "GATE": 0 if g is None else g.dim() - 2},
        products={"DT": tl.bfloat16 if half else tl.float32, "PREC": "tf32x3" if q.dtype == torch.float32 else "tf32"},
        gates={"LEVELS": chunk.bit_length() - 1, "LIMIT": 16.0 if q.dtype == torch.float32 else 100.0},
        stages=2 if half and widest <= 128 else 1,
        passes=(False, True) if g is not None and g.dim() == 4 else (False,),
    )


def _segment_states(
    plan: _Plan, x: Tensor, y: Tensor, g: Tensor | None, init: Tensor | None, scale: float, reverse: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The state before each segment, [segments, Hk, K, V], and after the last, and `strong` of
    `_local_states`; reverse: the gradient's, from the end."""
    K, V, gate = plan.sizes["K"], plan.sizes["V"], plan.sizes["GATE"]
    BK, BV = _pow2(K), min(_pow2(V), STATE_TILE // _pow2(K))
    states = torch.empty(plan.grid, plan.heads, K, V, dtype=torch.float32, device=x.device)
    last = torch.empty(plan.sequences, plan.heads, K, V, dtype=torch.float32, device=x.device)
    decay = strong = None
    if gate == 2:
        strong = torch.empty(plan.grid, plan.heads, dtype=torch.int32, device=x.device)
    if gate:
        decay = torch.empty(plan.grid, plan.heads, K if gate == 2 else 1, dtype=torch.float32, device=x.device)
    if plan.grid:
        _local_states[(plan.grid * plan.heads * triton.cdiv(V, BV),)](
            x, y, g, states, decay, strong, scale, *plan.span, x.shape[2], plan.heads,
            GROUP=x.shape[2] // plan.heads, BK=BK, BV=BV, C=plan.chunk, LIMIT=plan.gates["LIMIT"], REVERSE=reverse,
            **plan.sizes, **plan.products,
            num_warps=_warps(BK * BV), num_stages=plan.stages,
        )  # fmt: skip
    BR, BVS = max(1, 2048 // _pow2(V)), _pow2(V)
    _scan[(plan.sequences * plan.heads * triton.cdiv(K, BR),)](
        states, decay, init, last, plan.span[2], plan.span[5], plan.heads,
        BR=BR, BV=BVS, HAS_INIT=init is not None, REVERSE=reverse, **plan.sizes, num_warps=4,
    )  # fmt: skip
    return states, last, strong


def _warps(state_entries: int) -> int:
    return 8 if state_entries > STATE_TILE // 2 else 4


def forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, scale: float,
    initial_state: Tensor | None, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o [B, T, H, V] in v's dtype and the final state, float32 [N, Hk, K, V]. Shapes as in `icrl_kernels.gla`."""
    q, k, v, g, initial_state = _contiguous(q, k, v, g, initial_state)
    plan = _plan(q, k, v, g, cu_seqlens)
    K, V, H = plan.sizes["K"], plan.sizes["V"], q.shape[2]
    o = torch.empty(*q.shape[:3], V, dtype=v.dtype, device=v.device)
    states, last, strong = _segment_states(plan, k, v, g, initial_state, 1.0, False)
    if plan.grid:
        BK, BV = _pow2(K), min(_pow2(V), STATE_TILE // _pow2(K))
        for any_gate in plan.passes:
            _outputs[(plan.grid * H * triton.cdiv(V, BV),)](
                q, k, v, g, states, strong, o, scale, *plan.span, H, plan.heads,
                GROUP=plan.groups, BK=BK, BV=BV, C=plan.chunk, **plan.sizes, **plan.products, **plan.gates, ANY=any_gate,
                num_warps=_warps(BK * BV), num_stages=plan.stages,
            )  # fmt: skip
    return o, last


def backward(
    do: Tensor, dfinal_state: Tensor | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, scale: float,
    initial_state: Tensor | None, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """dq, dk, dv, dg (None without gates), d initial_state (None without one), each in its input's dtype."""
    do, q, k, v, g, initial_state, dfinal_state = _contiguous(do, q, k, v, g, initial_state, dfinal_state)
    plan = _plan(q, k, v, g, cu_seqlens)
    K, V, H, gate = plan.sizes["K"], plan.sizes["V"], q.shape[2], plan.sizes["GATE"]
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    states, last, strong = _segment_states(plan, k, v, g, initial_state, 1.0, False)
    dstates, dinit, _ = _segment_states(plan, q, do, g, dfinal_state, scale, True)
    BK, BV = _pow2(K), _pow2(V)
    share = {
        "C": plan.chunk,
        "GROUP": plan.groups,
        **plan.sizes,
        **plan.products,
        **plan.gates,
        "num_stages": plan.stages,
    }
    # What is on chip, [K columns, V columns]: with all of V for dk and dg, with all of K for dv, both at once where it
    # fits. With gates dk and dg take the registers of half a state, so that dv has a launch of its own.
    half = STATE_TILE if g is None else STATE_TILE // 2
    tiles = [(min(BK, half // BV), BV, True, False), (BK, min(BV, STATE_TILE // BK), False, True)]
    if g is None and BK * BV <= STATE_TILE:
        tiles = [(BK, BV, True, True)]
    BKS = tiles[0][0]
    parts = triton.cdiv(K, BKS)
    BKS = tiles[0][0]
    parts = triton.cdiv(K, BKS)
    warps = _warps(BKS * BV) if g is None else 8
    dg = z = None
    if gate == 1:
        z = torch.empty(parts, *q.shape[:3], dtype=torch.float32, device=q.device)
        dg = torch.empty(parts, *g.shape, dtype=torch.float32, device=g.device)
    elif gate == 2:
        dg = torch.empty_like(g)
        z = dg if g.dtype == torch.float32 and plan.groups == 1 else torch.empty_like(q, dtype=torch.float32)
    for any_gate in plan.passes if plan.grid else ():
        _grad_q[(plan.grid * H * parts,)](
            q, k, v, g, do, states, strong, dq, z, scale, *plan.span, H, plan.heads, q.shape[0] * q.shape[1] * H,
            BK=BKS, BV=BV, ANY=any_gate, num_warps=warps, **share,
        )  # fmt: skip
        for bk, bv, with_dk, with_dv in tiles:
            _grad_kv[(plan.grid * plan.heads * triton.cdiv(K, bk) * triton.cdiv(V, bv),)](
                q, k, v, g, do, z, states, last, dstates, strong, dk, dv, dg, scale, *plan.span, H, plan.heads,
                0 if g is None else g.numel(), BK=bk, BV=bv, DK=with_dk, DV=with_dv, ANY=any_gate,
                num_warps=warps if with_dk else _warps(bk * bv), **share,
            )  # fmt: skip
    if gate == 1:
        dg = dg.sum(0).to(g.dtype)
    return dq, dk, dv, dg, None if initial_state is None else dinit


def step(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor, scale: float) -> Tensor:
    """One token: q [B, H, K], k [B, Hk, K], v [B, Hk, V]; `state` is updated in place, o [B, H, V] returned."""
    if not state.is_contiguous():
        raise ValueError(f"state: wanted a contiguous tensor, got strides {state.stride()}")
    q, k, v, g = _contiguous(q, k, v, g)
    B, H, K = q.shape
    heads, V = v.shape[1:]
    o = torch.empty(B, H, V, dtype=v.dtype, device=v.device)
    BK = _pow2(K)
    BV = min(_pow2(V), 4096 // BK)
    if B:
        _step[(B * heads * triton.cdiv(V, BV),)](
            q, k, v, g, state, o, scale, heads,
            GROUP=H // heads, K=K, V=V, BK=BK, BV=BV, GATE=0 if g is None else g.dim() - 1, num_warps=4,
        )  # fmt: skip
    return o


def _contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if x is None else x.contiguous() for x in tensors)
