"""Launchers of the Triton kernels of the gated delta rule (gated_delta_rule_kernels.py): sizes, buffers, grids."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from icrl_kernels.linear_attention.triton.gated_delta_rule_kernels import (
    _forward,
    _gather_heads,
    _gradients,
    _prepare,
    _reverse,
    _step,
)
from icrl_kernels.linear_attention.triton.plan import (
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

CARRIED = 64  # columns of the state, that one program carries along the sequence: the rows of its products


@dataclass(frozen=True)
class _Plan:
    """What every launch of a call shares: sizes, the cut into chunks, and the operands' dtype in the products."""

    chunk: int  # tokens
    grid: int  # chunks, an upper bound for a ragged batch
    sequences: int
    heads: int  # of v, g, beta and the state
    group: int  # of these, that share a head of q and k
    span: tuple  # cu_seqlens, owner of each chunk, first chunk of each sequence, T, chunks per sequence
    sizes: dict
    products: dict
    gates: dict
    passes: tuple  # values of ANY: gates per channel take a second launch, which works only where they are strong
    parts: int  # of each sequence
    work: torch.dtype  # of what one launch leaves to the next


@dataclass(frozen=True)
class _Prepared:
    solve: Tensor
    scores: Tensor
    rows: Tensor
    norms: Tensor | None
    decay: Tensor | None
    strong: Tensor | None
    operands: tuple[Tensor, Tensor, Tensor]  # q and k as the state's reads and writes take them
    group: int  # value heads that share a head of these


def _parts(programs: int, tokens: int) -> int:
    """Into how many parts sequences are cut. It costs two more launches along them, so less than four would not pay."""
    parts = min(SMS // max(programs, 1), tokens // 1024)
    return parts if parts >= 4 else 1


def _plan(q: Tensor, v: Tensor, g: Tensor | None, cu_seqlens: Tensor | None) -> _Plan:
    B, T, Hk, K = q.shape
    H, V = v.shape[2:]
    C = chunk_length(q.dtype, K, V)
    N, grid, per, owner, first = cut(q, C, cu_seqlens)
    return _Plan(
        chunk=C,
        grid=grid,
        sequences=N,
        heads=H,
        group=H // Hk,
        span=(cu_seqlens, owner, first, T, per),
        sizes={
            "K": K,
            "C": C,
            "VARLEN": cu_seqlens is not None,
            "GATE": 0 if g is None else g.dim() - 2,
        },
        products=products(q.dtype),
        gates={"LEVELS": levels(C), "LIMIT": limit(q.dtype)},
        passes=passes(g),
        parts=1 if cu_seqlens is not None else _parts(B * H * triton.cdiv(V, CARRIED), T),
        work=torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32,
    )


def _prepared(
    plan: _Plan, q: Tensor, k: Tensor, g: Tensor | None, beta: Tensor | None, scale: float, norm: bool
) -> _Prepared:
    B, T, Hk, K = q.shape
    H, C, gate = plan.heads, plan.chunk, plan.sizes["GATE"]
    solve, scores = (torch.empty(plan.grid, H, C, C, dtype=plan.work, device=q.device) for _ in range(2))
    rows = torch.empty(plan.grid, H, 3, C, dtype=torch.float32, device=q.device)
    norms = torch.empty(B, T, H, 2, dtype=torch.float32, device=q.device) if norm else None
    decay = strong = None
    operands = q, k, k
    if gate:
        decay = torch.empty(plan.grid, H, K if gate == 2 else 1, dtype=torch.float32, device=q.device)
    if gate == 2:
        strong = torch.empty(plan.grid, H, dtype=torch.int32, device=q.device)
        qd, kd, ku = (torch.empty(B, T, H, K, dtype=plan.work, device=q.device) for _ in range(3))
        operands = qd, kd, ku
    for any_gate in plan.passes if plan.grid else ():
        _prepare[(plan.grid * H,)](
            q, k, g, beta, solve, scores, rows, norms, decay, strong, *operands, scale, *plan.span, H, Hk,
            GROUP=plan.group, BK=min(64, pow2(K)), BETA=beta is not None, NORM=norm, ANY=any_gate,
            **plan.sizes, **plan.products, **plan.gates, num_warps=8 if gate == 2 else 4, num_stages=1,
        )  # fmt: skip
    return _Prepared(solve, scores, rows, norms, decay, strong, operands, plan.group if gate < 2 else 1)


def _carry(plan: _Plan, ready: _Prepared, V: int) -> tuple[tuple[int], tuple, dict]:
    """Grid, last arguments and options of the launches that go along the sequences, or along their parts."""
    K = plan.sizes["K"]
    BK = pow2(K)
    BV = min(CARRIED, pow2(V), STATE_TILE // BK)
    half = plan.work == torch.bfloat16
    options = {"GROUP": ready.group, "V": V, "BK": BK, "BV": BV, **plan.sizes, **plan.products}
    options |= {"num_warps": 8 if BK > 128 else 4, "num_stages": 2 if half and BK <= 128 else 1}
    cu, _, first, T, per = plan.span
    along = cu, first, T, per, -(-per // plan.parts) * plan.chunk, plan.parts, plan.heads, ready.operands[0].shape[2]
    return (plan.sequences * plan.parts * plan.heads * triton.cdiv(V, BV),), along, options


def _along(
    plan: _Plan, ready: _Prepared, v: Tensor | None, initial: Tensor | None, o: Tensor | None = None,
    e: Tensor | None = None, states: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`_forward`, without v of the identity: returns the states that (parts of) sequences end with, [N, parts, H, K, V]."""
    H, K, V = plan.heads, plan.sizes["K"], plan.sizes["K"] if v is None else v.shape[3]
    last = torch.empty(plan.sequences, plan.parts, H, K, V, dtype=torch.float32, device=ready.solve.device)
    grid, along, options = _carry(plan, ready, V)
    if grid[0]:
        _forward[grid](
            *ready.operands, v, ready.solve, ready.scores, ready.rows, ready.decay, initial, last, o, e, states, *along,
            HAS_INIT=initial is not None, TRANSFER=v is None, **options,
        )  # fmt: skip
    return last


def _back(
    plan: _Plan, ready: _Prepared, do: Tensor, dlast: Tensor | None, dr: Tensor | None = None, dstates: Tensor | None = None
) -> Tensor:  # fmt: skip
    """`_reverse`: returns the gradients of the states that (parts of) sequences begin with, [N, parts, H, K, V]."""
    H, K, V = plan.heads, plan.sizes["K"], do.shape[3]
    dfirst = torch.empty(plan.sequences, plan.parts, H, K, V, dtype=torch.float32, device=do.device)
    grid, along, options = _carry(plan, ready, V)
    if grid[0]:
        _reverse[grid](
            *ready.operands, do, ready.solve, ready.scores, ready.rows, ready.decay, dlast, dfirst, dr, dstates, *along,
            **options,
        )  # fmt: skip
    return dfirst


def _between(transfer: Tensor, add: Tensor, state: Tensor | None) -> Tensor:
    """The states that parts begin with, from the first part's: S <- M S + R along dimension 1, in the order given.

    In float64, which no setting for float32 products changes.
    """
    states = torch.zeros_like(add)
    S = torch.zeros_like(add[:, 0]) if state is None else state
    for i in range(add.shape[1]):
        states[:, i] = S
        S = (transfer[:, i].double() @ S.double() + add[:, i]).float()
    return states


def forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, scale: float,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, qk_l2norm: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o, as v, and the final state, float32 [N, H, K, V]. Shapes as in `icrl_kernels.gated_delta_rule`."""
    q, k, v, g, beta, initial_state = contiguous(q, k, v, g, beta, initial_state)
    plan = _plan(q, v, g, cu_seqlens)
    ready = _prepared(plan, q, k, g, beta, scale, qk_l2norm)
    o = torch.empty_like(v)
    if plan.parts > 1:
        initial_state = _between(_along(plan, ready, None, None), _along(plan, ready, v, None), initial_state)
    return o, _along(plan, ready, v, initial_state, o)[:, -1].contiguous()


def backward(
    do: Tensor, dfinal_state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None,
    scale: float, initial_state: Tensor | None, cu_seqlens: Tensor | None, qk_l2norm: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dq, dk, dv, dg, dbeta, d initial_state, each in its input's dtype, None for those without an input."""
    do, dfinal_state, q, k, v = contiguous(do, dfinal_state, q, k, v)
    g, beta, initial_state = contiguous(g, beta, initial_state)
    plan = _plan(q, v, g, cu_seqlens)
    ready = _prepared(plan, q, k, g, beta, scale, qk_l2norm)
    (B, T, Hk, K), H, V, gate = q.shape, plan.heads, v.shape[3], plan.sizes["GATE"]

    states, dstates = (torch.empty(plan.grid, H, V, K, dtype=plan.work, device=q.device) for _ in range(2))
    e, dr = (torch.empty(v.shape, dtype=plan.work, device=q.device) for _ in range(2))
    first, dlast = initial_state, dfinal_state
    if plan.parts > 1:
        transfer = _along(plan, ready, None, None)
        first = _between(transfer, _along(plan, ready, v, None), initial_state)
        dlast = _between(transfer.mT.flip(1), _back(plan, ready, do, None).flip(1), dfinal_state).flip(1)
    _along(plan, ready, v, first, None, e, states)
    dinitial = _back(plan, ready, do, dlast, dr, dstates)[:, 0].contiguous()

    BK, BV = min(32 if gate == 2 else 64, pow2(K)), min(64, pow2(V))  # 64 would spill where all channels decay apart
    parts = triton.cdiv(K, BK)
    alone = plan.group == 1 and not qk_l2norm
    dq, dk = torch.empty_like(q), torch.empty_like(k)
    to = (dq, dk) if alone else tuple(torch.empty(B, T, H, K, dtype=torch.float32, device=q.device) for _ in range(2))
    dg = dbeta = None
    if gate == 2:
        dg = torch.empty_like(g)
    elif gate == 1:
        dg = torch.empty(B, T, H, parts, dtype=torch.float32, device=q.device)
    if beta is not None:
        dbeta = torch.empty(B, T, H, parts, dtype=torch.float32, device=q.device)
    for any_gate in plan.passes if plan.grid else ():
        _gradients[(plan.grid * H * parts,)](
            q, k, g, beta, do, e, dr, ready.norms, ready.strong, states, dstates, *to, dg, dbeta, scale,
            *plan.span, H, Hk, GROUP=plan.group, V=V, BK=BK, BV=BV, BETA=beta is not None, NORM=qk_l2norm, ANY=any_gate,
            LEVELS=plan.gates["LEVELS"], **plan.sizes, **plan.products, num_warps=8, num_stages=1,
        )  # fmt: skip
    if not alone and B * T:
        BT = max(1, 2048 // pow2(K))
        for which, (x, dx, out) in enumerate(((q, to[0], dq), (k, to[1], dk))):
            _gather_heads[(triton.cdiv(B * T, BT) * Hk,)](
                x, dx, ready.norms, out, B * T, H, Hk,
                GROUP=plan.group, K=K, BK=pow2(K), WHICH=which, NORM=qk_l2norm, BT=BT, num_warps=4,
            )  # fmt: skip
    if gate == 1:
        dg = dg.sum(-1).to(g.dtype)
    if dbeta is not None:
        dbeta = dbeta.sum(-1).to(beta.dtype)
    return dq, dk, dr.to(v.dtype), dg, dbeta, None if initial_state is None else dinitial


def step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, state: Tensor, scale: float, qk_l2norm: bool
) -> Tensor:
    """One token: q, k [B, Hk, K], v [B, H, V]; `state`, contiguous, is updated in place, o [B, H, V] returned."""
    q, k, v, g, beta = contiguous(q, k, v, g, beta)
    B, H, V = v.shape
    K = q.shape[2]
    o = torch.empty_like(v)
    BK = pow2(K)
    BV = min(pow2(V), 4096 // BK)
    if B:
        _step[(B * H * triton.cdiv(V, BV),)](
            q, k, v, g, beta, state, o, scale, H,
            GROUP=H // q.shape[1], K=K, V=V, BK=BK, BV=BV, GATE=0 if g is None else g.dim() - 1,
            BETA=beta is not None, NORM=qk_l2norm, num_warps=4,
        )  # fmt: skip
    return o
