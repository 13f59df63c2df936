"""Launchers of the Triton kernels of RWKV-7's rule (rwkv7_kernels.py): buffers and grids. The plan is the gated delta rule's."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from icrl_kernels.linear_attention.triton.gated_delta_rule import CARRIED, _Plan, _plan
from icrl_kernels.linear_attention.triton.plan import STATE_TILE, contiguous, pow2
from icrl_kernels.linear_attention.triton.rwkv7_kernels import _forward, _gradients, _prepare, _reverse, _step


def _sizes(plan: _Plan) -> dict:
    return {name: plan.sizes[name] for name in ("K", "C", "VARLEN")}


def _prepared(plan: _Plan, r, w, k, a, b, scale: float) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
    """The decayed rd, ad, bu, ku; X, Z, Q, R and the chunks' decays; which chunks are strong."""
    H, C, K = plan.heads, plan.chunk, plan.sizes["K"]
    squares = tuple(torch.empty(plan.grid, H, C, C, dtype=plan.work, device=r.device) for _ in range(4))
    operands = tuple(torch.empty(r.shape, dtype=plan.work, device=r.device) for _ in range(4))
    decay = torch.empty(plan.grid, H, K, dtype=torch.float32, device=r.device)
    strong = torch.empty(plan.grid, H, dtype=torch.int32, device=r.device)
    for any_gate in plan.passes if plan.grid else ():
        _prepare[(plan.grid * H,)](
            r, w, k, a, b, *squares, decay, strong, *operands, scale, *plan.span, H,
            BK=min(64, pow2(K)), ANY=any_gate, **_sizes(plan), **plan.products, **plan.gates,
            num_warps=8, num_stages=1,
        )  # fmt: skip
    return operands, (*squares, decay), strong


def _carrying(plan: _Plan, V: int) -> tuple[tuple[int], dict]:
    """Grid and options of the launches that go along the sequence."""
    BK = pow2(plan.sizes["K"])
    BV = min(CARRIED, pow2(V), STATE_TILE // BK)
    options = {"V": V, "BK": BK, "BV": BV, **_sizes(plan), **plan.products}
    return (plan.sequences * plan.heads * triton.cdiv(V, BV),), {**options, "num_warps": 8 if BK > 64 else 4}


def _sequence(plan: _Plan) -> tuple:
    cu, _, first, T, per = plan.span
    return cu, first, T, per, plan.heads


def forward(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, scale: float, initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o, as v, and the final state, float32 [N, H, K, V]. Shapes as in `icrl_kernels.rwkv7`."""
    r, w, k, v, a, b, initial_state = contiguous(r, w, k, v, a, b, initial_state)
    plan = _plan(r, v, w, cu_seqlens)
    operands, chunks, _ = _prepared(plan, r, w, k, a, b, scale)
    o = torch.empty_like(v)
    last = torch.empty(plan.sequences, plan.heads, r.shape[3], v.shape[3], dtype=torch.float32, device=r.device)
    grid, options = _carrying(plan, v.shape[3])
    if grid[0]:
        _forward[grid](
            *operands, v, *chunks, initial_state, last, o, None, None, *_sequence(plan),
            HAS_INIT=initial_state is not None, OUTPUTS=True, num_stages=1, **options,
        )  # fmt: skip
    return o, last


def backward(
    do: Tensor, dfinal_state: Tensor, r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, scale: float,
    initial_state: Tensor | None, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """dr, dw, dk, dv, da, db, d initial_state (None without one), each in its input's dtype."""
    do, dfinal_state, r, w, k, v, a, b = contiguous(do, dfinal_state, r, w, k, v, a, b)
    (initial_state,) = contiguous(initial_state)
    plan = _plan(r, v, w, cu_seqlens)
    operands, chunks, strong = _prepared(plan, r, w, k, a, b, scale)
    H, K, V = plan.heads, r.shape[3], v.shape[3]
    states, dstates = (torch.empty(plan.grid, H, V, K, dtype=plan.work, device=r.device) for _ in range(2))
    u, dx = (torch.empty(v.shape, dtype=plan.work, device=r.device) for _ in range(2))
    dv, dinitial = torch.empty_like(v), torch.empty(plan.sequences, H, K, V, dtype=torch.float32, device=r.device)
    grid, options = _carrying(plan, V)
    if grid[0]:
        _forward[grid](
            *operands, v, *chunks, initial_state, None, None, u, states, *_sequence(plan),
            HAS_INIT=initial_state is not None, OUTPUTS=False, num_stages=1, **options,
        )  # fmt: skip
        _reverse[grid](
            *operands, do, *chunks, dfinal_state, dinitial, dx, dv, dstates, *_sequence(plan), num_stages=1, **options
        )
    dr, dw, dk, da, db = (torch.empty_like(x) for x in (r, w, k, a, b))
    BK, BV = min(32, pow2(K)), min(64, pow2(V))  # twice as many columns would spill
    for any_gate in plan.passes if plan.grid else ():
        _gradients[(plan.grid * H * triton.cdiv(K, BK),)](
            r, w, k, v, a, b, do, u, dx, strong, states, dstates, dr, dw, dk, da, db, scale, *plan.span, H,
            V=V, BK=BK, BV=BV, ANY=any_gate, LEVELS=plan.gates["LEVELS"], **_sizes(plan), **plan.products,
            num_warps=8, num_stages=1,
        )  # fmt: skip
    return dr, dw, dk, dv, da, db, None if initial_state is None else dinitial


def step(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, scale: float) -> Tensor:
    """One token: r, w, k, a, b [B, H, K], v [B, H, V]; `state`, contiguous, is updated in place, o [B, H, V] returned."""
    r, w, k, v, a, b = contiguous(r, w, k, v, a, b)
    B, H, K = r.shape
    V = v.shape[2]
    o = torch.empty_like(v)
    BK = pow2(K)
    BV = min(pow2(V), 4096 // BK)
    if B:
        _step[(B * H * triton.cdiv(V, BV),)](r, w, k, v, a, b, state, o, scale, K=K, V=V, BK=BK, BV=BV, num_warps=4)
    return o
