"""Launchers of the Triton kernels of gated slot attention (gsa_kernels.py): sizes, buffers, grids."""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
from torch import Tensor

from icrl_kernels.linear_attention.triton import gla
from icrl_kernels.linear_attention.triton.gla import _Plan, _warps
from icrl_kernels.linear_attention.triton.gla_kernels import _outputs as _gla_outputs
from icrl_kernels.linear_attention.triton.gsa_kernels import (
    _grad_kv,
    _grad_logits,
    _local_states,
    _logits,
    _outputs,
    _scan,
    _step,
)
from icrl_kernels.linear_attention.triton.plan import COLUMNS, STATE_TILE, contiguous, levels, pow2

State = tuple[Tensor, Tensor]


def _plan(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor, g: Tensor | None, cu_seqlens: Tensor | None, anchored: bool = False
) -> _Plan:
    widest = max(k, v, s, key=lambda x: x.shape[3])
    plan = gla._plan(q, k, widest, g, cu_seqlens, anchored)
    return replace(plan, sizes={**plan.sizes, "V": v.shape[3], "M": s.shape[3], "GATE": g is not None})


def _segment_states(
    plan: _Plan, x1: Tensor, y1: Tensor, x2: Tensor, y2: Tensor, g: Tensor | None, init: State | None, reverse: bool
) -> tuple[State, State, Tensor | None]:
    """Both states before each segment, [segments, Hk, M, K] and [segments, Hk, M, V], after the last as the op's pair,
    and `strong`; reverse: the gradients', from the end."""
    K, V, M, gate = (plan.sizes[name] for name in ("K", "V", "M", "GATE"))
    BK, BV, BM = pow2(K), pow2(V), pow2(M)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=y1.device)

    states = empty(plan.segments, plan.heads, M, K), empty(plan.segments, plan.heads, M, V)
    last = empty(plan.sequences, plan.heads, K, M), empty(plan.sequences, plan.heads, M, V)
    decay = strong = None
    if gate:
        strong = empty(plan.segments, plan.heads, dtype=torch.int32)
        decay = empty(plan.segments, plan.heads, M)
    if plan.segments:
        _local_states[(plan.segments * plan.heads,)](
            x1, y1, x2, y2, g, *states, decay, strong, *plan.span, y1.shape[2], plan.heads,
            GROUP=y1.shape[2] // plan.heads, BK=BK, BV=BV, BM=BM, C=plan.chunk, LIMIT=plan.gates["LIMIT"],
            REVERSE=reverse, **plan.sizes, **plan.products,
            num_warps=_warps(BM * (BK + BV)), num_stages=plan.stages,
        )  # fmt: skip
    BD = max(1, 2048 // BM)
    _scan[(plan.sequences * plan.heads * triton.cdiv(K + V, BD),)](
        *states, decay, *(init or (None, None)), *last, plan.span[2], plan.span[5], plan.heads,
        BM=BM, BD=BD, HAS_INIT=init is not None, REVERSE=reverse, **plan.sizes, num_warps=4,
    )  # fmt: skip
    return states, last, strong


def forward(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor, g: Tensor | None, scale: float,
    initial_keys: Tensor | None, initial_values: Tensor | None, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """o [B, T, H, V] in v's dtype and the final states, float32. Shapes as in `icrl_kernels.gsa`."""
    q, k, v, s, g, keys, values = contiguous(q, k, v, s, g, initial_keys, initial_values)
    plan = _plan(q, k, v, s, g, cu_seqlens)
    K, V, M, H = plan.sizes["K"], plan.sizes["V"], plan.sizes["M"], q.shape[2]
    if pow2(M) > 128 or max(K, V) > COLUMNS or pow2(M) * (pow2(K) + pow2(V)) > 2 * STATE_TILE:
        keys = None if keys is None else keys.mT.contiguous()
        z, last = _wide_logits(q, k, s, g, keys, cu_seqlens)
        o, last_values = gla.forward(torch.softmax(z * scale, 3), s, v, g, 1.0, values, cu_seqlens)
        return o, last.mT.contiguous(), last_values
    o = torch.empty(*q.shape[:3], V, dtype=v.dtype, device=v.device)
    init = None if keys is None else (keys, values)
    states, last, strong = _segment_states(plan, s, k, s, v, g, init, False)
    BK, BM = pow2(K), pow2(M)
    BV = min(pow2(V), max(16, STATE_TILE // 2 // BM))
    for any_gate in plan.passes if plan.segments else ():
        _outputs[(plan.segments * H * triton.cdiv(V, BV),)](
            q, k, v, s, g, *states, strong, o, scale, *plan.span, H, plan.heads,
            GROUP=H // plan.heads, BK=BK, BV=BV, BM=BM, C=plan.chunk, LEVELS=levels(plan.chunk),
            **plan.sizes, **plan.products, **plan.gates, ANY=any_gate,
            num_warps=_warps(BM * (BK + BV)), num_stages=plan.stages,
        )  # fmt: skip
    return o, *last


def backward(
    do: Tensor, dfinal_keys: Tensor, dfinal_values: Tensor, q: Tensor, k: Tensor, v: Tensor, s: Tensor,
    g: Tensor | None, scale: float, initial_keys: Tensor | None, initial_values: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dq, dk, dv, ds, dg (None without gates), d of the initial states (None without), each in its input's dtype."""
    do, q, k, v, s, g = contiguous(do, q, k, v, s, g)
    keys, values, dkeys, dvalues = contiguous(initial_keys, initial_values, dfinal_keys, dfinal_values)
    plan = _plan(q, k, v, s, g, cu_seqlens, anchored=g is not None)
    K, V, M, H = plan.sizes["K"], plan.sizes["V"], plan.sizes["M"], q.shape[2]
    if pow2(M) > 64 or max(K, V) > COLUMNS or pow2(M) * (pow2(K) + pow2(V)) > STATE_TILE:
        return _wide_backward(do, dkeys, dvalues, q, k, v, s, g, scale, keys, values, cu_seqlens)
    dq, dk, dv, ds = (torch.empty_like(x) for x in (q, k, v, s))
    dg = None if g is None else torch.empty_like(g)
    init = None if keys is None else (keys, values)
    states, last, strong = _segment_states(plan, s, k, s, v, g, init, False)
    operands = torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32
    p = torch.empty(*q.shape[:3], M, dtype=operands, device=q.device)
    e = torch.empty_like(p)
    z = dg if g is None or (g.dtype == torch.float32 and plan.heads == H) else torch.empty_like(p, dtype=torch.float32)
    own = None if g is None else torch.empty(2, *q.shape[:3], dtype=torch.float32, device=q.device)
    rows = q.shape[0] * q.shape[1] * H
    share = {
        "GROUP": H // plan.heads, "LEVELS": levels(plan.chunk), "BK": pow2(K), "BV": pow2(V), "BM": pow2(M), "C": plan.chunk,
        **plan.sizes, **plan.products, **plan.gates, "num_warps": 8, "num_stages": plan.stages,
    }  # fmt: skip
    for any_gate in plan.passes if plan.segments else ():
        _grad_logits[(plan.segments * H,)](
            q, k, v, s, g, do, *states, strong, p, e, z, own, scale, *plan.span, H, plan.heads, rows,
            ANY=any_gate, **share,
        )  # fmt: skip
    sizes = {**plan.sizes, "K": M, "V": K, "GATE": 0 if g is None else 2}
    del sizes["M"]
    BK = min(pow2(K), STATE_TILE // pow2(M))
    strong_dq = None if strong is None else torch.empty_like(strong)
    for any_gate in plan.passes if plan.segments else ():  # dq_t = K̃_tᵀ e_t: gla with queries e, keys s and values k
        _gla_outputs[(plan.segments * plan.heads * triton.cdiv(K, BK),)](
            e, s, k, g, states[0], None, strong_dq, dq, 1.0, *plan.span, plan.heads,
            GROUP=H // plan.heads, BK=pow2(M), BV=BK, C=plan.chunk, LEVELS=levels(plan.chunk), **sizes,
            **plan.products, **plan.gates, ANY=any_gate, num_warps=_warps(pow2(M) * BK), num_stages=plan.stages,
        )  # fmt: skip
    dstates, dinit, _ = _segment_states(plan, e, q, p, do, g, (dkeys, dvalues), True)
    ds_sum = torch.empty_like(s, dtype=torch.float32)
    dg_sum = dg if g is None or g.dtype == torch.float32 else torch.empty_like(g, dtype=torch.float32)
    share = {name: x for name, x in share.items() if name not in ("K", "V", "BK", "BV")}
    for second, y, x, weight, state, end, dstate, dx, N, row, column in (
        (False, q, k, e, states[0], last[0], dstates[0], dk, K, 1, M),
        (True, do, v, p, states[1], last[1], dstates[1], dv, V, V, 1),
    ):
        sums = (ds, dg) if second else (ds_sum, dg_sum)
        products = None if own is None else own[int(second)]
        for any_gate in plan.passes if plan.segments else ():
            _grad_kv[(plan.segments * plan.heads,)](
                y, x, s, g, weight, z, products, state, end, dstate, strong, dx, ds_sum, dg_sum, *sums,
                *plan.span, H, plan.heads, row, column, N=N, BN=pow2(N), SECOND=second, ANY=any_gate, **share,
            )  # fmt: skip
    return dq, dk, dv, ds, dg, *((None, None) if init is None else dinit)


# States that one program cannot hold: each pass on its own, by gla's kernels but for K̃ q, with logits and p in memory


def _wide_logits(
    q: Tensor, k: Tensor, s: Tensor, g: Tensor | None, keys: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """K̃ q, float32 [B, T, H, M], and the last K̃; `keys` is the first, [N, Hk, M, K]."""
    M, K, H = s.shape[3], k.shape[3], q.shape[2]
    z = torch.empty(*q.shape[:3], M, dtype=torch.float32, device=q.device)
    plan = gla._plan(z, s, k, g, cu_seqlens)
    states, last, _ = gla._segment_states(plan, s, k, g, keys)
    BK = pow2(K)
    BM = min(pow2(M), 64, STATE_TILE // BK)
    parts = triton.cdiv(M, BM)
    strong = None if g is None else torch.empty(plan.segments, plan.heads, parts, dtype=torch.int32, device=q.device)
    for any_gate in plan.passes if plan.segments else ():
        _logits[(plan.segments * H * parts,)](
            q, k, s, g, states, strong, z, *plan.span, H, plan.heads,
            GROUP=H // plan.heads, K=K, M=M, BK=BK, BM=BM, C=plan.chunk, LEVELS=levels(plan.chunk),
            GATE=g is not None, VARLEN=plan.sizes["VARLEN"], **plan.products, **plan.gates,
            ANY=any_gate, num_warps=_warps(BM * BK), num_stages=plan.stages,
        )  # fmt: skip
    return z, last


def _wide_backward(
    do: Tensor, dkeys: Tensor, dvalues: Tensor, q: Tensor, k: Tensor, v: Tensor, s: Tensor,
    g: Tensor | None, scale: float, keys: Tensor | None, values: Tensor | None, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """o = Ṽᵀ p is gla with queries p, keys s, values v. The gradients of K̃ q are those of K̃ᵀ e, gla with queries e,
    keys s, values k, where its output's gradient is q."""
    keys = None if keys is None else keys.mT.contiguous()
    p = torch.softmax(_wide_logits(q, k, s, g, keys, cu_seqlens)[0] * scale, 3)
    dp, ds, dv, dg, dvalues = gla.backward(do, dvalues, p, s, v, g, 1.0, values, cu_seqlens)
    e = (dp - (p * dp).sum(3, keepdim=True)) * p * scale
    dq, _ = gla.forward(e, s, k, g, 1.0, keys, cu_seqlens)
    _, ds1, dk, dg1, dkeys = gla.backward(q, dkeys.mT, e, s, k, g, 1.0, keys, cu_seqlens)
    dkeys = None if dkeys is None else dkeys.mT.contiguous()
    return dq, dk, dv, ds + ds1, None if dg is None else dg + dg1, dkeys, dvalues


def step(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor, g: Tensor | None, keys: Tensor, values: Tensor, scale: float
) -> Tensor:
    """One token: q [B, H, K], k [B, Hk, K], v [B, Hk, V], s, g [B, Hk, M]; both states are updated in place,
    o [B, H, V] returned."""
    q, k, v, s, g = contiguous(q, k, v, s, g)
    B, H, K = q.shape
    heads, V = v.shape[1:]
    M = s.shape[2]
    o = torch.empty(B, H, V, dtype=v.dtype, device=v.device)
    BK, BV = pow2(K), pow2(V)
    BM = min(pow2(M), STATE_TILE // (BK + BV))
    BM = 1 << (BM.bit_length() - 1)
    if B:
        _step[(B * heads,)](
            q, k, v, s, g, keys, values, o, scale,
            GROUP=H // heads, K=K, V=V, M=M, BK=BK, BV=BV, BM=BM, BG=triton.next_power_of_2(H // heads),
            GATE=g is not None, num_warps=_warps(BM * (BK + BV)),
        )  # fmt: skip
    return o
