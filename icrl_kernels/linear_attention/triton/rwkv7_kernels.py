"""Triton kernels of RWKV-7's rule: u_t = S_{t-1}ᵀ a_t, S_t = diag(exp w_t) S_{t-1} + b_t u_tᵀ + k_t v_tᵀ, o_t = scale·S_tᵀ r_t.

Symbols. Tensors are contiguous, and float32 unless a dtype is named; io is that of r, k, v, a, b; DT is the products'.
Grids run fastest over their last factor.
  B, T, N, H       rows; tokens of a row (packed: B = 1, T of all sequences); sequences (N = B unless packed); heads
  K, V             channels of r, w, k, a, b; of v and o: 1 to 512; 1 to 4096
  PER, NC, C       chunks of a sequence (packed: 0); of the batch (packed: at most); tokens of a chunk: 16, 32 or 64
  r, k, a, b       io [B, T, H, K]; their gradients dr, dk, da, db likewise
  w, dw            io or float32 [B, T, H, K], logarithms of decays; their gradient, in w's dtype
  v, dv, o, do     io [B, T, H, V]
  cu               int32 or int64 [N + 1], first token of each sequence; cu, owner and first are None unless packed
  owner, first     int64 [NC], the sequence of each chunk; int64 [N + 1], the first chunk of each sequence
  solve, through   DT [NC, H, C, C]: X and Z, below (a local variable of `_gradients` is named through too)
  with_b, with_k   DT [NC, H, C, C]: Q and R, below
  decay            [NC, H, K], product of a chunk's decays
  strong           int32 [NC, H], whether gates go beyond LIMIT
  rd, ad           DT [B, T, H, K]: scale·r decayed from the chunk's start, a from there to the token before
  bu, ku           DT [B, T, H, K]: b and k decayed to the chunk's end
  init, last       [N, H, K, V], the state before a sequence (read with HAS_INIT) and after it (written with OUTPUTS)
  dlast, dinit     [N, H, K, V], the gradients of last and init
  u, dx            DT [B, T, H, V]: u, below; the gradient of (P_{i-1} a) S + M v
  states, dstates  DT [NC, H, V, K]: the state each chunk begins with, the gradient of that it ends with, transposed
  state, scale     [B, H, K, V], `_step`'s; float
  BK, BV           channels of a program's tile, powers of two of at least 16
  LEVELS, LIMIT    log2 C; in bits, 16 for float32, else 100
  DT, PREC         products' operands: bfloat16 for bfloat16, else float32; "tf32x3" for float32, else "tf32"
  VARLEN           whether the batch is packed
  HAS_INIT         whether there is an init. OUTPUTS: what `_forward` writes, below
  ANY              whether this is the second launch, for strong gates
  t, hi, h         as in common.py. ok: numbers of the tile's channels. The rest: at the device functions

In a chunk of C tokens that begins with state S, with P_i the product of exp w over its tokens up to i (P_{-1} = 1),
  N_ij = a_i·(P_{i-1} / P_j) b_j, M_ij likewise with k_j  (j < i),     u = (I − N)^-1 ((P_{i-1} a) S + M v),
  Q_ij = scale r_i·(P_i / P_j) b_j, R_ij likewise with k_j  (j <= i),  o = scale (P r) S + Q u + R v,
  S   <- P_C S + sum_j (P_C / P_j) (b_j u_jᵀ + k_j v_jᵀ).
The launches are those of the gated delta rule (gated_delta_rule_kernels.py), whose device functions serve here too:
`_prepare` makes X = (I − N)^-1, Z = X M, Q, R and the decayed copies of r, a, k, b, `_forward` and `_reverse` go along the
sequence with Sᵀ on chip, `_gradients` takes all chunks at once.

a_i reads what stood after token i − 1. Where pairs are decayed one by one it therefore counts as a second query of row
i − 1, "a of the row below": then every query of a row reads the keys up to that row, whatever its kind.

A NaN or infinity in an input may also reach the up to 63 rows before it in its chunk: 0·NaN is NaN. No atomics: the same
bits each run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from icrl_kernels.linear_attention.triton.common import (
    LOG2E,
    _after,
    _gates,
    _load,
    _rows,
    _scores_any_gate,
    _span,
    _store,
)
from icrl_kernels.linear_attention.triton.gated_delta_rule_kernels import (
    _decayed,
    _inverse,
    _sequence,
    _shrink,
    _turned,
)


@triton.jit
def _down(x, C: tl.constexpr):
    """The rows of x [C, C] moved down by one, 0 above."""
    i = tl.arange(0, C)[:, None]
    return tl.where(i > 0, tl.gather(x, tl.broadcast_to(tl.maximum(i - 1, 0), [C, C]), 0), 0.0)


@triton.jit
def _prepare(
    r, w, k, a, b, solve, through, with_b, with_k, decay, strong, rd, ad, bu, ku, scale, cu, owner, first, T, PER, H,
    K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, LIMIT: tl.constexpr,
    VARLEN: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr, ANY: tl.constexpr,
):  # fmt: skip
    """Grid NC·H: a chunk and a head. Reads r, w, k, a, b. Writes solve, through, with_b, with_k, decay, strong, rd, ad,
    bu, ku. The rows of the four matrices whose gates reach beyond LIMIT are left to a second launch, ANY, of the chunks
    marked as strong; that launch writes only these rows."""
    MK: tl.constexpr = K % BK != 0
    pid = tl.program_id(0)
    h = pid % H
    s = (pid // H).to(tl.int64)
    if ANY:  # noqa: SIM102 (ANY is decided when compiling)
        if tl.load(strong + s * H + h) == 0:
            return
    n, lo, hi, end = _span(s, cu, owner, first, T, C, PER, VARLEN)
    i = tl.arange(0, C)
    t = lo + i
    late = i < 0
    N = tl.zeros([C, C], tl.float32)
    M = tl.zeros([C, C], tl.float32)
    Q = tl.zeros([C, C], tl.float32)
    R = tl.zeros([C, C], tl.float32)
    for at in range((K + BK - 1) // BK):
        ok = at * BK + tl.arange(0, BK)
        br = _load(r, t, hi, h, H, ok, K, MK).to(tl.float32) * scale
        bb = _load(b, t, hi, h, H, ok, K, MK).to(tl.float32)
        bk = _load(k, t, hi, h, H, ok, K, MK).to(tl.float32)
        g = _gates(w, t, hi, h, H, ok, K, MK)
        G = tl.cumsum(g, 0)
        late = late | (tl.min(G, 1) < -LIMIT)
        if ANY:
            below = _load(a, t + 1, tl.minimum(lo + C, hi), h, H, ok, K, MK)
            N += _scores_any_gate(below, bb, g, C, BK, LEVELS, DT, PREC)
            M += _scores_any_gate(below, bk, g, C, BK, LEVELS, DT, PREC)
            Q += _scores_any_gate(br, bb, g, C, BK, LEVELS, DT, PREC)
            R += _scores_any_gate(br, bk, g, C, BK, LEVELS, DT, PREC)
        else:
            inverse = tl.exp2(-G)
            b_up = tl.trans((bb * inverse).to(DT))
            k_up = tl.trans((bk * inverse).to(DT))
            x = (br * tl.exp2(G)).to(DT)
            _store(rd, x, t, hi, h, H, ok, K, MK)
            Q = tl.dot(x, b_up, Q, input_precision=PREC)
            R = tl.dot(x, k_up, R, input_precision=PREC)
            m = (i > 0)[:, None] & (t < hi)[:, None] & (ok < K)[None, :]
            before = tl.load(w + ((t - 1) * H + h)[:, None] * K + ok[None, :], mask=m, other=0.0).to(tl.float32)
            before = tl.exp2(tl.cumsum(before * LOG2E, 0))
            x = (_load(a, t, hi, h, H, ok, K, MK).to(tl.float32) * before).to(DT)
            _store(ad, x, t, hi, h, H, ok, K, MK)
            N = tl.dot(x, b_up, N, input_precision=PREC)
            M = tl.dot(x, k_up, M, input_precision=PREC)
            after = _after(w, t, lo, 0, hi, h, H, ok, K, MK, C)
            _store(bu, bb * after, t, hi, h, H, ok, K, MK)
            _store(ku, bk * after, t, hi, h, H, ok, K, MK)
            tl.store(decay + (s * H + h) * K + ok, tl.exp2(tl.sum(g, 0)), mask=ok < K)
    late = tl.cumsum(late.to(tl.int32), 0) > 0  # the rows after a late one read it through the inverse
    if ANY:
        N = _down(N, C)
        M = _down(M, C)
    mine = late if ANY else ~late
    causal = i[:, None] >= i[None, :]
    if not ANY:
        tl.store(strong + s * H + h, tl.max(late.to(tl.int32), 0))
        causal = causal & mine[:, None]  # the other rows are NaN where 0 meets infinity
    strict = causal & (i[:, None] != i[None, :])
    square = (s * H + h) * C * C + i[:, None] * C + i[None, :]
    tl.store(with_b + square, tl.where(causal, Q, 0.0).to(with_b.dtype.element_ty), mask=mine[:, None])
    tl.store(with_k + square, tl.where(causal, R, 0.0).to(with_k.dtype.element_ty), mask=mine[:, None])
    X = _inverse(tl.where(strict, -N, 0.0), C)
    tl.store(solve + square, X.to(solve.dtype.element_ty), mask=mine[:, None])
    Z = tl.dot(X, tl.where(strict, M, 0.0), input_precision="tf32x3")
    tl.store(through + square, Z.to(through.dtype.element_ty), mask=mine[:, None])


@triton.jit
def _forward(
    rd, ad, bu, ku, v, solve, through, with_b, with_k, decay, init, last, o, u, states, cu, first, T, PER, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, HAS_INIT: tl.constexpr,
    OUTPUTS: tl.constexpr, VARLEN: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Grid N·H·ceil(V/BV): a sequence, a head, all of K and BV of V. Reads ad, bu, ku, v, solve, through, decay, init.
    OUTPUTS: reads rd, with_b, with_k too, writes o and last (u and states are None). Otherwise writes u and states (o
    and last are None)."""
    NV: tl.constexpr = (V + BV - 1) // BV
    MK: tl.constexpr = K != BK
    MV: tl.constexpr = V % BV != 0
    pid = tl.program_id(0)
    ov = (pid % NV) * BV + tl.arange(0, BV)
    h = (pid // NV) % H
    n = (pid // NV // H).to(tl.int64)
    lo, hi, s, chunks = _sequence(n, cu, first, T, PER, T, 1, C, VARLEN)
    ok = tl.arange(0, BK)
    i = tl.arange(0, C)
    square = i[:, None] * C + i[None, :]
    inside = (ok < K)[None, :] & (ov < V)[:, None]
    turned = (n * H + h) * K * V + ok[None, :] * V + ov[:, None]
    S = tl.zeros([BV, BK], tl.float32)
    if HAS_INIT:
        S = tl.load(init + turned, mask=inside, other=0.0)
    for j in range(chunks):
        t = lo + j * C
        left = tl.minimum(hi - t, C).to(tl.int32)
        c = (s + j) * H + h
        before = S.to(DT)
        x = tl.dot(before, tl.trans(_rows(ad, t, i, left, h, H, ok, K, MK)), input_precision=PREC).to(DT)
        if OUTPUTS:
            bo = tl.dot(before, tl.trans(_rows(rd, t, i, left, h, H, ok, K, MK)), input_precision=PREC)
        at, mv = _turned(v, t, left, h, H, i, ov, V, MV)
        bv = tl.load(at, mask=mv, other=0.0).to(DT)
        y = tl.dot(x, tl.trans(tl.load(solve + c * C * C + square)), input_precision=PREC)
        y = tl.dot(bv, tl.trans(tl.load(through + c * C * C + square)), y, input_precision=PREC).to(DT)
        if OUTPUTS:
            bo = tl.dot(y, tl.trans(tl.load(with_b + c * C * C + square)), bo, input_precision=PREC)
            bo = tl.dot(bv, tl.trans(tl.load(with_k + c * C * C + square)), bo, input_precision=PREC)
            at, mv = _turned(o, t, left, h, H, i, ov, V, MV)
            tl.store(at, bo.to(o.dtype.element_ty), mask=mv)
        else:
            tl.store(states + c * K * V + (ov[:, None] * K + ok[None, :]), before, mask=inside)
            at, mv = _turned(u, t, left, h, H, i, ov, V, MV)
            tl.store(at, y.to(u.dtype.element_ty), mask=mv)
        S *= _shrink(decay, c, ok, K, 2)
        S = tl.dot(y, _rows(bu, t, i, left, h, H, ok, K, MK), S, input_precision=PREC)
        S = tl.dot(bv, _rows(ku, t, i, left, h, H, ok, K, MK), S, input_precision=PREC)
    if OUTPUTS:
        tl.store(last + turned, S, mask=inside)


@triton.jit
def _reverse(
    rd, ad, bu, ku, do, solve, through, with_b, with_k, decay, dlast, dinit, dx, dv, dstates, cu, first, T, PER, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, VARLEN: tl.constexpr,
    DT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Grid N·H·ceil(V/BV): a sequence, a head, all of K and BV of V, from the last chunk to the first. Reads rd, ad,
    bu, ku, do, solve, through, with_b, with_k, decay, dlast. Writes dstates, the gradient D of the state that each
    chunk ends with, dv, dx and at last dinit."""
    NV: tl.constexpr = (V + BV - 1) // BV
    MK: tl.constexpr = K != BK
    MV: tl.constexpr = V % BV != 0
    pid = tl.program_id(0)
    ov = (pid % NV) * BV + tl.arange(0, BV)
    h = (pid // NV) % H
    n = (pid // NV // H).to(tl.int64)
    lo, hi, s, chunks = _sequence(n, cu, first, T, PER, T, 1, C, VARLEN)
    ok = tl.arange(0, BK)
    i = tl.arange(0, C)
    square = i[:, None] * C + i[None, :]
    inside = (ok < K)[None, :] & (ov < V)[:, None]
    turned = (n * H + h) * K * V + ok[None, :] * V + ov[:, None]
    D = tl.load(dlast + turned, mask=inside, other=0.0)
    for j in range(chunks):
        t = lo + (chunks - 1 - j) * C
        left = tl.minimum(hi - t, C).to(tl.int32)
        c = (s + chunks - 1 - j) * H + h
        after = D.to(DT)
        tl.store(dstates + c * K * V + (ov[:, None] * K + ok[None, :]), after, mask=inside)
        at, mv = _turned(do, t, left, h, H, i, ov, V, MV)
        bo = tl.load(at, mask=mv, other=0.0).to(DT)
        y = tl.dot(after, tl.trans(_rows(bu, t, i, left, h, H, ok, K, MK)), input_precision=PREC)
        y = tl.dot(bo, tl.load(with_b + c * C * C + square), y, input_precision=PREC).to(DT)
        z = tl.dot(after, tl.trans(_rows(ku, t, i, left, h, H, ok, K, MK)), input_precision=PREC)
        z = tl.dot(bo, tl.load(with_k + c * C * C + square), z, input_precision=PREC)
        z = tl.dot(y, tl.load(through + c * C * C + square), z, input_precision=PREC)
        at, mv = _turned(dv, t, left, h, H, i, ov, V, MV)
        tl.store(at, z.to(dv.dtype.element_ty), mask=mv)
        D *= _shrink(decay, c, ok, K, 2)
        D = tl.dot(bo, _rows(rd, t, i, left, h, H, ok, K, MK), D, input_precision=PREC)
        x = tl.dot(y, tl.load(solve + c * C * C + square), input_precision=PREC).to(DT)
        at, mv = _turned(dx, t, left, h, H, i, ov, V, MV)
        tl.store(at, x.to(dx.dtype.element_ty), mask=mv)
        D = tl.dot(x, _rows(ad, t, i, left, h, H, ok, K, MK), D, input_precision=PREC)
    tl.store(dinit + turned, D, mask=inside)


@triton.jit
def _products(
    x, tx, end_x, y, ty, end_y, z, tz, end_z, matrix, h, H, ok, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, C: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """x yᵀ, x zᵀ [C, C] and x times a state's matrix, [C, BK]. Reads the rows of x, y, z [B, T, H, V] with numbers tx,
    ty, tz (up to end_x, end_y, end_z) and head h, and the matrix, [V, K], of which `matrix` [BK] points to the first
    row."""
    MV: tl.constexpr = V % BV != 0
    xy = tl.zeros([C, C], tl.float32)
    xz = tl.zeros([C, C], tl.float32)
    xm = tl.zeros([C, BK], tl.float32)
    for iv in range((V + BV - 1) // BV):
        ov = iv * BV + tl.arange(0, BV)
        bx = _load(x, tx, end_x, h, H, ov, V, MV).to(DT)
        by = tl.trans(_load(y, ty, end_y, h, H, ov, V, MV).to(DT))
        bz = tl.trans(_load(z, tz, end_z, h, H, ov, V, MV).to(DT))
        m = tl.load(matrix[None, :] + ov[:, None] * K, mask=(ok < K)[None, :] & (ov < V)[:, None], other=0.0)
        xy = tl.dot(bx, by, xy, input_precision=PREC)
        xz = tl.dot(bx, bz, xz, input_precision=PREC)
        xm = tl.dot(bx, m, xm, input_precision=PREC)
    return xy, xz, xm


@triton.jit
def _diagonal(x, C: tl.constexpr):
    """The diagonal of x [C, C], as [C, 1]."""
    i = tl.arange(0, C)
    return tl.sum(tl.where(i[:, None] == i[None, :], x, 0.0), 1)[:, None]


@triton.jit
def _as_row(
    dy, ty, end_y, k, v, b, u, S, t, hi, h, H, ok, g, G, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr, ANY: tl.constexpr,
):  # fmt: skip
    """The gradient [C, BK] of queries, from dy [B, T, H, V], rows ty up to end_y, of what they read; its part that no
    gate decays comes apart. Reads dy, k, v, b, u, and the state at S [BK]. g, G [C, BK]: gates in log2, their sums."""
    MK: tl.constexpr = K % BK != 0
    with_k, with_b, x = _products(dy, ty, end_y, v, t, hi, u, t, hi, S, h, H, ok, K, V, BK, BV, C, DT, PREC)
    bk = _load(k, t, hi, h, H, ok, K, MK).to(tl.float32)
    x = x * tl.exp2(G) + _decayed(with_k, bk, g, G, True, C, BK, LEVELS, DT, PREC, ANY)
    own = _diagonal(with_k, C) * bk
    bk = _load(b, t, hi, h, H, ok, K, MK).to(tl.float32)
    x += _decayed(with_b, bk, g, G, True, C, BK, LEVELS, DT, PREC, ANY)
    return x, own + _diagonal(with_b, C) * bk


@triton.jit
def _as_column(
    y, r, do, a, dx, D, t, hi, stop, scale, h, H, ok, g, G, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr, ANY: tl.constexpr,
):  # fmt: skip
    """The gradient of keys that write y [B, T, H, V] (v or u): through the state at the chunk's end (as it meets it
    there), through later rows, through their own row, [C, BK] each. Reads y, r, do, a, dx, and the state's gradient at
    D [BK]; stop: the chunk's end."""
    MK: tl.constexpr = K % BK != 0
    with_r, with_a, x = _products(y, t, hi, do, t, hi, dx, t + 1, stop, D, h, H, ok, K, V, BK, BV, C, DT, PREC)
    bq = _load(r, t, hi, h, H, ok, K, MK).to(tl.float32) * scale
    inner = _decayed(with_r, bq, g, G, False, C, BK, LEVELS, DT, PREC, ANY)
    own = _diagonal(with_r, C) * bq
    bq = _load(a, t + 1, stop, h, H, ok, K, MK).to(tl.float32)
    inner += _decayed(with_a, bq, g, G, False, C, BK, LEVELS, DT, PREC, ANY)
    return x, inner, own + _diagonal(with_a, C) * bq


@triton.jit
def _gradients(
    r, w, k, v, a, b, do, u, dx, strong, states, dstates, dr, dw, dk, da, db, scale, cu, owner, first, T, PER, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    VARLEN: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr, ANY: tl.constexpr,
):  # fmt: skip
    """Grid NC·H·ceil(K/BK): a chunk, a head and BK of the K channels. Reads r, w, k, v, a, b, do, u, dx, strong,
    states, dstates. Writes dr, dw, dk, da, db. dw as in the gated delta rule's `_gradients`.

    r, a (of the row below), k and b take turns, each with what it needs read again: together they would not fit. A
    launch works on the chunks that have gates beyond LIMIT (ANY) or that have none.
    """
    NK: tl.constexpr = (K + BK - 1) // BK
    MK: tl.constexpr = K % BK != 0
    pid = tl.program_id(0)
    h = (pid // NK) % H
    s = (pid // NK // H).to(tl.int64)
    if (tl.load(strong + s * H + h) > 0) != ANY:
        return
    n, lo, hi, end = _span(s, cu, owner, first, T, C, PER, VARLEN)
    i = tl.arange(0, C)
    t = lo + i
    stop = tl.minimum(lo + C, hi)
    ok = (pid % NK) * BK + tl.arange(0, BK)
    S = states + (s * H + h) * K * V + ok
    D = dstates + (s * H + h) * K * V + ok

    through = tl.zeros([BK], tl.float32)
    top = tl.zeros([BK], tl.float32)  # da of the chunk's first token, which reads the state as it is
    for iv in range((V + BV - 1) // BV):
        ov = iv * BV + tl.arange(0, BV)
        m = (ok < K)[None, :] & (ov < V)[:, None]
        bs = tl.load(S[None, :] + ov[:, None] * K, mask=m, other=0.0).to(tl.float32)
        head = tl.load(dx + (lo * H + h) * V + ov, mask=(ov < V) & (lo + 0 * ov < hi), other=0.0)
        top += tl.sum(head.to(tl.float32)[:, None] * bs, 0)
        through += tl.sum(bs * tl.load(D[None, :] + ov[:, None] * K, mask=m, other=0.0).to(tl.float32), 0)
    tl.store(da + (lo * H + h) * K + ok, top.to(da.dtype.element_ty), mask=(ok < K) & (lo + 0 * ok < hi))
    g = _gates(w, t, hi, h, H, ok, K, MK)
    G = tl.cumsum(g, 0)
    through *= tl.exp2(tl.sum(g, 0))

    # As rows, r and the a of the row below read the state and the columns before them.
    x, own = _as_row(
        do, t, hi, k, v, b, u, S, t, hi, h, H, ok, g, G, K, V, BK, BV, C, LEVELS, DT, PREC, ANY
    )  # fmt: skip
    drift = _load(r, t, hi, h, H, ok, K, MK).to(tl.float32) * scale * x
    _store(dr, (x + own) * scale, t, hi, h, H, ok, K, MK)
    x, own = _as_row(
        dx, t + 1, stop, k, v, b, u, S, t, hi, h, H, ok, g, G, K, V, BK, BV, C, LEVELS, DT, PREC, ANY
    )  # fmt: skip
    drift += _load(a, t + 1, stop, h, H, ok, K, MK).to(tl.float32) * x
    _store(da, x + own, t + 1, stop, h, H, ok, K, MK)

    # As columns, k and b write to the state, and the rows after them read them.
    after = _after(w, t, lo, 0, hi, h, H, ok, K, MK, C)
    x, inner, own = _as_column(
        v, r, do, a, dx, D, t, hi, stop, scale, h, H, ok, g, G, K, V, BK, BV, C, LEVELS, DT, PREC, ANY
    )  # fmt: skip
    x *= after
    bk = _load(k, t, hi, h, H, ok, K, MK).to(tl.float32)
    drift -= bk * inner
    written = bk * x
    _store(dk, x + inner + own, t, hi, h, H, ok, K, MK)
    x, inner, own = _as_column(
        u, r, do, a, dx, D, t, hi, stop, scale, h, H, ok, g, G, K, V, BK, BV, C, LEVELS, DT, PREC, ANY
    )  # fmt: skip
    x *= after
    bk = _load(b, t, hi, h, H, ok, K, MK).to(tl.float32)
    drift -= bk * inner
    written += bk * x
    _store(db, x + inner + own, t, hi, h, H, ok, K, MK)

    written = tl.gather(written, tl.broadcast_to(tl.maximum(i - 1, 0)[:, None], [C, BK]), 0)
    written = tl.cumsum(tl.where(i[:, None] > 0, written, 0.0), 0)
    x = tl.cumsum(drift, 0, reverse=True) + written + through[None, :]
    # below -150 exp2 is 0, and so is the gradient
    _store(dw, tl.where(g < -150.0, 0.0, x), t, hi, h, H, ok, K, MK)


@triton.jit
def _step(r, w, k, v, a, b, state, o, scale, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    """Grid B·H·ceil(V/BV): a row, a head, all of K and BV of V. Reads r, w, k, v, a, b, which have no T here. Updates
    state in place, writes o."""
    NV: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    n = (pid // NV).to(tl.int64)  # batch row and head
    ok = tl.arange(0, BK)
    ov = (pid % NV) * BV + tl.arange(0, BV)
    p = state + n * K * V + ok[:, None] * V + ov[None, :]
    m = (ok < K)[:, None] & (ov < V)[None, :]
    S = tl.load(p, mask=m, other=0.0)
    br = tl.load(r + n * K + ok, mask=ok < K, other=0.0).to(tl.float32)
    bw = tl.load(w + n * K + ok, mask=ok < K, other=0.0).to(tl.float32)
    bk = tl.load(k + n * K + ok, mask=ok < K, other=0.0).to(tl.float32)
    ba = tl.load(a + n * K + ok, mask=ok < K, other=0.0).to(tl.float32)
    bb = tl.load(b + n * K + ok, mask=ok < K, other=0.0).to(tl.float32)
    bv = tl.load(v + n * V + ov, mask=ov < V, other=0.0).to(tl.float32)
    bu = tl.sum(S * ba[:, None], 0)
    S = S * tl.exp(bw)[:, None] + bb[:, None] * bu[None, :] + bk[:, None] * bv[None, :]
    tl.store(p, S, mask=m)
    tl.store(o + n * V + ov, (tl.sum(S * br[:, None], 0) * scale).to(o.dtype.element_ty), mask=ov < V)
