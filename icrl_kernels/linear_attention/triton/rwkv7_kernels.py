"""Triton kernels of RWKV-7's rule: u_t = S_{t-1}ᵀ a_t, S_t = diag(exp w_t) S_{t-1} + b_t u_tᵀ + k_t v_tᵀ, o_t = scale·S_tᵀ r_t.

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
    """Rows moved down by one, 0 above."""
    i = tl.arange(0, C)[:, None]
    return tl.where(i > 0, tl.gather(x, tl.broadcast_to(tl.maximum(i - 1, 0), [C, C]), 0), 0.0)


@triton.jit
def _prepare(
    r, w, k, a, b, solve, through, with_b, with_k, decay, strong, rd, ad, bu, ku, scale, cu, owner, first, T, PER, H,
    K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, LIMIT: tl.constexpr,
    VARLEN: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr, ANY: tl.constexpr,
):  # fmt: skip
    """X, Z, Q and R of a chunk, [C, C] each, and its decayed operands. The rows whose gates reach beyond LIMIT are left to
    a second launch, ANY, of the chunks marked as strong."""
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
    """OUTPUTS: o and the last state; else u and the states that chunks begin with, [chunks, H, V, K]."""
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
    """From the last chunk to the first: the gradient D of the state that each chunk ends with, dv, dx = d((P a) S + M v),
    and at last the gradient of the first state."""
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
    """x yᵀ, x zᵀ [C, C] and x times a state's matrix, [V, K] at `matrix` [BK]; x, y, z [.., H, V] from rows tx, ty, tz on."""
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
    i = tl.arange(0, C)
    return tl.sum(tl.where(i[:, None] == i[None, :], x, 0.0), 1)[:, None]


@triton.jit
def _as_row(
    dy, ty, end_y, k, v, b, u, S, t, hi, h, H, ok, g, G, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr, ANY: tl.constexpr,
):  # fmt: skip
    """The gradient of queries, from dy of what they read; its part that no gate decays comes apart."""
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
    """The gradient of keys that write y: through the state at the chunk's end (as it meets it there), through later rows,
    through their own row."""
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
    """One chunk and BK of the K channels: dr, dw, dk, da, db. dw as in the gated delta rule's `_gradients`.

    r, a (of the row below), k and b take turns, each with what it needs read again: together they would not fit.
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
