"""Triton kernels of gated linear attention: S_t = diag(exp g_t) S_{t-1} + k_t v_tᵀ, o_t = scale·S_tᵀ q_t.

Two levels (three launches forward). A sequence is cut into segments, a segment into chunks of 64 tokens:
1. `_local_states`: the state each segment would end with if it started from zero, and its total decay;
2. `_scan`: from these, the true state at each segment's start (the only sequential part);
3. `_outputs`: each segment on its own, with the state on chip from chunk to chunk.
The backward does 1 and 2 once more, then in reverse for the state's gradient (from q and do), then `_grad_q` (forwards)
and `_grad_kv` (backwards). It needs nothing but the inputs, uses no atomics, and sums a head's queries in order.

Gates: common.py.

A NaN or infinity in v may also reach the up to 63 rows before it in its chunk: a masked weight is 0, and 0·NaN is NaN.

Accuracy: bfloat16 inputs are multiplied as bfloat16 with float32 sums; float32 as three TF32 products (about 1e-7
relative); float16 as TF32 (same mantissa, without its overflow). dg is a difference of sums over the chunk, good to a
few dozen roundings of its largest pair. States are float32 throughout.
"""

from __future__ import annotations

import triton
import triton.language as tl

from icrl_kernels._triton.common import (
    LOG2E,
    _after,
    _apply_any_gate,
    _decay,
    _gates,
    _halve,  # noqa: F401
    _load,
    _pairs,  # noqa: F401
    _scalar_gates,
    _scores_any_gate,
    _span,
    _store,
)


@triton.jit
def _local_states(
    x, y, g, out, decay, strong, scale, cu, owner, first, T, L, PER, HX, HK,
    GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    GATE: tl.constexpr, LIMIT: tl.constexpr, REVERSE: tl.constexpr, VARLEN: tl.constexpr, DT: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """out[s, h] = scale · sum over the segment of x_t y_tᵀ, decayed to the segment's end (REVERSE: to its start), and
    strong[s, h]: the first chunk whose gates reach beyond LIMIT (a large number if none does)."""
    NV: tl.constexpr = (V + BV - 1) // BV
    MK: tl.constexpr = K != BK
    MV: tl.constexpr = V % BV != 0
    pid = tl.program_id(0)
    iv = pid % NV
    h = (pid // NV) % HK
    s = (pid // NV // HK).to(tl.int64)
    n, lo, hi, end = _span(s, cu, owner, first, T, L, PER, VARLEN)
    r = tl.arange(0, C)
    ok = tl.arange(0, BK)
    ov = iv * BV + tl.arange(0, BV)
    S = tl.zeros([BK, BV], tl.float32)
    beyond = 0x7FFFFFFF
    d = tl.full([BK], 1.0, tl.float32) if GATE == 2 else 1.0
    chunks = tl.cdiv(tl.maximum(hi - lo, 0), C).to(tl.int32)
    for i in range(chunks):
        c = chunks - 1 - i if REVERSE else i
        t = lo + c * C + r
        if GATE == 2:
            b = _gates(g, t, hi, h, HK, ok, K, MK)
            total = tl.sum(b, 0)
            shrink = tl.exp2(total)
            w = tl.exp2(tl.cumsum(b, 0)) if REVERSE else _after(g, t, lo, c, hi, h, HK, ok, K, MK, C)
            d *= shrink
            S *= shrink[:, None]
            beyond = tl.where(tl.min(total, 0) < -LIMIT, tl.minimum(beyond, c), beyond)
        elif GATE == 1:
            coarse, fine, coarse_end, fine_end = _scalar_gates(g, t, hi, h, HK)
            w = _decay(coarse, fine)[:, None] if REVERSE else _decay(coarse_end - coarse, fine_end - fine)[:, None]
            shrink = _decay(coarse_end, fine_end)
            d *= shrink
            S *= shrink
        for j in range(GROUP):
            bx = _load(x, t, hi, h * GROUP + j, HX, ok, K, MK)
            by = _load(y, t, hi, h * GROUP + j, HX, ov, V, MV).to(DT)
            if GATE > 0:
                bx = bx.to(tl.float32) * w
            S = tl.dot(tl.trans(bx.to(DT)), by, S, input_precision=PREC)
    p = (s * HK + h) * K * V + ok[:, None] * V + ov[None, :]
    tl.store(out + p, S * scale, mask=(ok < K)[:, None] & (ov < V)[None, :])
    if GATE == 2:
        tl.store(decay + (s * HK + h) * K + ok, d, mask=ok < tl.where(iv == 0, K, 0))
        if iv == 0:
            tl.store(strong + s * HK + h, beyond)
    elif GATE == 1:  # noqa: SIM102 (GATE is decided when compiling, iv is not)
        if iv == 0:
            tl.store(decay + s * HK + h, d)


@triton.jit
def _scan(
    states, decay, init, last, first, PER, HK,
    K: tl.constexpr, V: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, HAS_INIT: tl.constexpr, REVERSE: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """In place: the states that the segments add become those they start from (REVERSE: end with). last: after all."""
    NR: tl.constexpr = (K + BR - 1) // BR
    pid = tl.program_id(0)
    ok = (pid % NR) * BR + tl.arange(0, BR)
    ov = tl.arange(0, BV)
    h = (pid // NR) % HK
    n = (pid // NR // HK).to(tl.int64)
    m = (ok < K)[:, None] & (ov < V)[None, :]
    tile = ok[:, None] * V + ov[None, :]
    if VARLEN:
        s0 = tl.load(first + n)
        segments = (tl.load(first + n + 1) - s0).to(tl.int32)
    else:
        segments = PER
        s0 = n * PER
    S = tl.zeros([BR, BV], tl.float32)
    if HAS_INIT:
        S = tl.load(init + (n * HK + h) * K * V + tile, mask=m, other=0.0)
    for i in range(segments):
        s = (s0 + (segments - 1 - i if REVERSE else i)) * HK + h
        add = tl.load(states + s * K * V + tile, mask=m, other=0.0)
        tl.store(states + s * K * V + tile, S, mask=m)
        if GATE == 2:
            S = S * tl.load(decay + s * K + ok, mask=ok < K, other=0.0)[:, None] + add
        elif GATE == 1:
            S = S * tl.load(decay + s) + add
        else:
            S += add
    tl.store(last + (n * HK + h) * K * V + tile, S, mask=m)


@triton.jit
def _outputs(
    q, k, v, g, states, strong, o, scale, cu, owner, first, T, L, PER, H, HK,
    GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    LEVELS: tl.constexpr, LIMIT: tl.constexpr, GATE: tl.constexpr, VARLEN: tl.constexpr, DT: tl.constexpr,
    PREC: tl.constexpr, ANY: tl.constexpr,
):  # fmt: skip
    NV: tl.constexpr = (V + BV - 1) // BV
    MK: tl.constexpr = K != BK
    MV: tl.constexpr = V % BV != 0
    pid = tl.program_id(0)
    iv = pid % NV
    h = (pid // NV) % H
    s = (pid // NV // H).to(tl.int64)
    hk = h // GROUP
    n, lo, hi, end = _span(s, cu, owner, first, T, L, PER, VARLEN)
    r = tl.arange(0, C)
    ok = tl.arange(0, BK)
    ov = iv * BV + tl.arange(0, BV)
    causal = r[:, None] >= r[None, :]
    p = (s * HK + hk) * K * V + ok[:, None] * V + ov[None, :]
    S = tl.load(states + p, mask=(ok < K)[:, None] & (ov < V)[None, :], other=0.0)
    chunks = tl.cdiv(tl.maximum(hi - lo, 0), C).to(tl.int32)
    beyond = chunks
    if ANY:
        beyond = tl.load(strong + s * HK + hk)
        chunks = tl.where(beyond < chunks, chunks, 0)
    for c in range(chunks):
        t = lo + c * C + r
        bq = _load(q, t, hi, h, H, ok, K, MK)
        bk = _load(k, t, hi, hk, HK, ok, K, MK)
        bv = _load(v, t, hi, hk, HK, ov, V, MV).to(DT)
        if GATE == 2:
            b = _gates(g, t, hi, hk, HK, ok, K, MK)
            G = tl.cumsum(b, 0)
            qa = (bq.to(tl.float32) * tl.exp2(G)).to(DT)
            if ANY:
                A = _scores_any_gate(bq, bk, b, C, BK, LEVELS, DT, PREC)
                kw = (bk.to(tl.float32) * _after(g, t, lo, c, hi, hk, HK, ok, K, MK, C)).to(DT)
            else:
                kw = (bk.to(tl.float32) * tl.exp2(-G)).to(DT)
                A = tl.dot(qa, tl.trans(kw), input_precision=PREC)
            A = tl.where(causal, A, 0.0)
            bo = tl.dot(qa, S.to(DT), input_precision=PREC)
            shrink = tl.exp2(tl.sum(b, 0))[:, None]
        elif GATE == 1:
            coarse, fine, coarse_end, fine_end = _scalar_gates(g, t, hi, hk, HK)
            pair = (coarse[:, None] - coarse[None, :]) + (fine[:, None] - fine[None, :])
            A = tl.dot(bq.to(DT), tl.trans(bk.to(DT)), input_precision=PREC)
            A = tl.where(causal, A * tl.exp2(pair), 0.0)
            bo = tl.dot(bq.to(DT), S.to(DT), input_precision=PREC) * _decay(coarse, fine)[:, None]
            kw = (bk.to(tl.float32) * _decay(coarse_end - coarse, fine_end - fine)[:, None]).to(DT)
            shrink = _decay(coarse_end, fine_end)
        else:
            kw = bk.to(DT)
            A = tl.where(causal, tl.dot(bq.to(DT), tl.trans(kw), input_precision=PREC), 0.0)
            bo = tl.dot(bq.to(DT), S.to(DT), input_precision=PREC)
        bo = bo * scale + tl.dot(A.to(DT), bv, input_precision=PREC) * scale
        if ANY:
            late = (c > beyond) | ((c == beyond) & (tl.min(G, 1) < -LIMIT))
            _store(o, bo, tl.where(late, t, hi), hi, h, H, ov, V, MV)
        else:
            _store(o, bo, t, hi, h, H, ov, V, MV)
        if GATE == 1 or ANY:
            S = S * shrink
        S = tl.dot(tl.trans(kw), bv, S, input_precision=PREC)
        if GATE == 2 and not ANY:  # kw holds the decay back to the chunk's start, so the shrinking comes last
            S = S * shrink


@triton.jit
def _grad_q(
    q, k, v, g, do, states, strong, dq, z, scale, cu, owner, first, T, L, PER, H, HK, part,
    GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    LEVELS: tl.constexpr, LIMIT: tl.constexpr, GATE: tl.constexpr, VARLEN: tl.constexpr, DT: tl.constexpr,
    PREC: tl.constexpr, ANY: tl.constexpr,
):  # fmt: skip
    """dq_t = scale·S_t do_t for BK of the K channels; the state is kept transposed, as the dot with do reads it.

    z: dq without the pair (t, t), for dg (which that pair does not move); for a gate per head the sum of q·z.
    """
    NK: tl.constexpr = (K + BK - 1) // BK
    MK: tl.constexpr = K % BK != 0
    MV: tl.constexpr = V != BV
    pid = tl.program_id(0)
    h = (pid // NK) % H
    s = (pid // NK // H).to(tl.int64)
    hk = h // GROUP
    n, lo, hi, end = _span(s, cu, owner, first, T, L, PER, VARLEN)
    r = tl.arange(0, C)
    ok = (pid % NK) * BK + tl.arange(0, BK)
    ov = tl.arange(0, BV)
    p = (s * HK + hk) * K * V + ok[None, :] * V + ov[:, None]
    S = tl.load(states + p, mask=(ok < K)[None, :] & (ov < V)[:, None], other=0.0)
    chunks = tl.cdiv(tl.maximum(hi - lo, 0), C).to(tl.int32)
    if GATE == 2:
        chunks = tl.where((tl.load(strong + s * HK + hk) < chunks) == ANY, chunks, 0)
    for c in range(chunks):
        t = lo + c * C + r
        bk = _load(k, t, hi, hk, HK, ok, K, MK)
        bv = _load(v, t, hi, hk, HK, ov, V, MV).to(DT)
        bo = _load(do, t, hi, h, H, ov, V, MV).to(DT)
        W = tl.dot(bo, tl.trans(bv), input_precision=PREC)
        y = tl.dot(bo, S.to(DT), input_precision=PREC)
        if GATE == 0:
            kw = bk.to(DT)
            x = tl.dot(tl.where(r[:, None] >= r[None, :], W, 0.0).to(DT), kw, input_precision=PREC)
            y = y * scale + x * scale
        else:
            own = tl.sum(bo.to(tl.float32) * bv.to(tl.float32), 1)
            W = tl.where(r[:, None] > r[None, :], W, 0.0)
        if GATE == 2:
            b = _gates(g, t, hi, hk, HK, ok, K, MK)
            G = tl.cumsum(b, 0)
            shrink = tl.exp2(tl.sum(b, 0))[None, :]
            if ANY:
                x = _apply_any_gate(W, bk, b, True, C, BK, LEVELS, DT, PREC)
                y = y * (tl.exp2(G) * scale) + x * scale
                kw = (bk.to(tl.float32) * _after(g, t, lo, c, hi, hk, HK, ok, K, MK, C)).to(DT)
            else:
                kw = (bk.to(tl.float32) * tl.exp2(-G)).to(DT)
                x = tl.dot(W.to(DT), kw, input_precision=PREC)
                e = tl.exp2(G) * scale
                y = y * e + x * e
            _store(z, y, t, hi, h, H, ok, K, MK)
        elif GATE == 1:
            coarse, fine, coarse_end, fine_end = _scalar_gates(g, t, hi, hk, HK)
            pair = (coarse[:, None] - coarse[None, :]) + (fine[:, None] - fine[None, :])
            W = tl.where(r[:, None] > r[None, :], W * tl.exp2(pair), 0.0)
            x = tl.dot(W.to(DT), bk.to(DT), input_precision=PREC)
            y = y * (_decay(coarse, fine) * scale)[:, None] + x * scale
            kw = (bk.to(tl.float32) * _decay(coarse_end - coarse, fine_end - fine)[:, None]).to(DT)
            shrink = _decay(coarse_end, fine_end)
            line = tl.sum(_load(q, t, hi, h, H, ok, K, MK).to(tl.float32) * y, 1)
            tl.store(z + (pid % NK) * part + t * H + h, line, mask=t < hi)
        if GATE > 0:
            y += (own * scale)[:, None] * bk.to(tl.float32)
        _store(dq, y, t, hi, h, H, ok, K, MK)
        if GATE == 1 or ANY:
            S *= shrink
        S = tl.dot(tl.trans(bv), kw, S, input_precision=PREC)
        if GATE == 2 and not ANY:
            S *= shrink


@triton.jit
def _grad_kv(
    q, k, v, g, do, z, states, final, dstates, strong, dk, dv, dg, scale, cu, owner, first, T, L, PER, H, HK, part,
    GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    LEVELS: tl.constexpr, LIMIT: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, GATE: tl.constexpr,
    VARLEN: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr, ANY: tl.constexpr,
):  # fmt: skip
    """From the last chunk to the first with D = dL/dS_end (transposed, [V, K]) on chip:
    dk_j = D v_j 2^(gates after j) + sum_{i>=j} .. q_i, and dv_j likewise, kept as [V, C] so that no product's result
    has to be transposed for another. dg_t = sum_{s>=t} (q_s dq_s - k_s dk_s) + sum_v S_end D within the chunk, where
    the pairs (s, s), which cancel, are left out of both: under strong gates they would drown the rest.

    DK needs all of V on chip, DV all of K; a large state is done in two launches.
    """
    NK: tl.constexpr = (K + BK - 1) // BK
    NV: tl.constexpr = (V + BV - 1) // BV
    MK: tl.constexpr = K % BK != 0
    MV: tl.constexpr = V % BV != 0
    pid = tl.program_id(0)
    ik = pid % NK
    iv = pid // NK % NV
    h = (pid // NK // NV) % HK
    s = (pid // NK // NV // HK).to(tl.int64)
    n, lo, hi, end = _span(s, cu, owner, first, T, L, PER, VARLEN)
    r = tl.arange(0, C)
    ok = ik * BK + tl.arange(0, BK)
    ov = iv * BV + tl.arange(0, BV)
    tile = ok[None, :] * V + ov[:, None]
    inside = (ok < K)[None, :] & (ov < V)[:, None]
    D = tl.load(dstates + (s * HK + h) * K * V + tile, mask=inside, other=0.0)
    if DK and GATE > 0:  # the state at the segment's end: the next segment's first or the sequence's last
        more = (hi + 0 * ok)[None, :] < end  # as a tensor: triton 3.9's interpreter makes a scalar's & an integer
        S = tl.load(states + ((s + 1) * HK + h) * K * V + tile, mask=inside & more, other=0.0)
        S += tl.load(final + (n * HK + h) * K * V + tile, mask=inside & ~more, other=0.0)
        carry = tl.sum(S * D, 0)
        if GATE == 1:
            carry = tl.sum(carry, 0)
    chunks = tl.cdiv(tl.maximum(hi - lo, 0), C).to(tl.int32)
    if GATE == 2:
        chunks = tl.where((tl.load(strong + s * HK + h) < chunks) == ANY, chunks, 0)
    for i in range(chunks):
        c = chunks - 1 - i
        t = lo + c * C + r
        bk = _load(k, t, hi, h, HK, ok, K, MK)
        kw = bk.to(DT)
        if GATE == 2:
            b = _gates(g, t, hi, h, HK, ok, K, MK)
            G = tl.cumsum(b, 0)
            shrink = tl.exp2(tl.sum(b, 0))[None, :]
            if ANY:
                w = _after(g, t, lo, c, hi, h, HK, ok, K, MK, C)
            else:  # D shrinks first; all decays run from the chunk's start
                w = tl.exp2(-G)
                D *= shrink
            kw = (bk.to(tl.float32) * w).to(DT)
        elif GATE == 1:
            coarse, fine, coarse_end, fine_end = _scalar_gates(g, t, hi, h, HK)
            pair = (coarse[:, None] - coarse[None, :]) + (fine[:, None] - fine[None, :])
            w = _decay(coarse_end - coarse, fine_end - fine)[:, None]
            kw = (bk.to(tl.float32) * w).to(DT)
            shrink = _decay(coarse_end, fine_end)
        if DK:
            bv = _load(v, t, hi, h, HK, ov, V, MV).to(DT)
            xk = tl.dot(bv, D.to(DT), input_precision=PREC)
            if GATE > 0:
                xk *= w
            if GATE == 2:
                drift = tl.zeros([C, BK], tl.float32)
            elif GATE == 1:
                drift = tl.zeros([C], tl.float32)
            own = tl.zeros([C, BK], tl.float32)
        if DV:
            xv = tl.dot(D.to(DT), tl.trans(kw), input_precision=PREC)
        if GATE == 1 or ANY:
            D *= shrink
        for j in range(GROUP):
            hq = h * GROUP + j
            bq = _load(q, t, hi, hq, H, ok, K, MK)
            bo = _load(do, t, hi, hq, H, ov, V, MV).to(DT)
            qs = bq.to(tl.float32) * scale
            if GATE == 2:
                qa = (qs * tl.exp2(G)).to(DT)
            elif GATE == 1:
                qa = (qs * _decay(coarse, fine)[:, None]).to(DT)
            else:
                qa = qs.to(DT)
            if DV:
                if GATE == 2:
                    if ANY:
                        A = _scores_any_gate(qs, bk, b, C, BK, LEVELS, DT, PREC)
                    else:
                        A = tl.dot(qa, tl.trans(kw), input_precision=PREC)
                else:
                    A = tl.dot(qs.to(DT), tl.trans(bk.to(DT)), input_precision=PREC)
                    if GATE == 1:
                        A *= tl.exp2(pair)
                A = tl.where(r[:, None] >= r[None, :], A, 0.0)
                xv = tl.dot(tl.trans(bo), A.to(DT), xv, input_precision=PREC)
            D = tl.dot(tl.trans(bo), qa, D, input_precision=PREC)
            if DK:
                W = tl.dot(bv, tl.trans(bo), input_precision=PREC)
                if GATE == 0:
                    W = tl.where(r[:, None] <= r[None, :], W, 0.0).to(DT)
                    xk += tl.dot(W, bq.to(DT), input_precision=PREC) * scale
                else:
                    own += tl.sum(bo.to(tl.float32) * bv.to(tl.float32), 1)[:, None] * qs
                    W = tl.where(r[:, None] < r[None, :], W, 0.0)
                if GATE == 2:
                    drift += bq.to(tl.float32) * _load(z, t, hi, hq, H, ok, K, MK)
                    if ANY:
                        xk += _apply_any_gate(W, qs, b, False, C, BK, LEVELS, DT, PREC)
                    else:
                        xk += tl.dot(W.to(DT), qa, input_precision=PREC) * w
                elif GATE == 1:
                    drift += tl.load(z + ik * part * GROUP + t * H + hq, mask=t < hi, other=0.0)
                    W = tl.where(r[:, None] < r[None, :], W * tl.exp2(tl.trans(pair)), 0.0)
                    xk += tl.dot(W.to(DT), bq.to(DT), input_precision=PREC) * scale
        if DK:
            if GATE == 2:
                drift -= bk.to(tl.float32) * xk
                # below -150 exp2 is 0, and so is the gradient
                xg = tl.where(b < -150.0, 0.0, tl.cumsum(drift, 0, reverse=True) + carry[None, :])
                _store(dg, xg, t, hi, h, HK, ok, K, MK)
                carry += tl.sum(drift, 0)
            elif GATE == 1:
                drift -= tl.sum(bk.to(tl.float32) * xk, 1)
                xg = tl.cumsum(drift, 0, reverse=True) + carry
                own_gate = tl.load(g + t * HK + h, mask=t < hi, other=0.0).to(tl.float32) * LOG2E
                tl.store(dg + ik * part + t * HK + h, tl.where(own_gate < -150.0, 0.0, xg), mask=t < hi)
                carry += tl.sum(drift, 0)
            _store(dk, xk + own, t, hi, h, HK, ok, K, MK)
        if DV:
            p = dv + ((t * HK + h) * V)[None, :] + ov[:, None]
            tl.store(p, xv.to(dv.dtype.element_ty), mask=(t < hi)[None, :] & (ov < V)[:, None])


@triton.jit
def _step(
    q, k, v, g, state, o, scale, HK,
    GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    NV: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    n = (pid // NV).to(tl.int64)  # batch row and key head
    ok = tl.arange(0, BK)
    ov = (pid % NV) * BV + tl.arange(0, BV)
    m = (ok < K)[:, None] & (ov < V)[None, :]
    p = state + n * K * V + ok[:, None] * V + ov[None, :]
    S = tl.load(p, mask=m, other=0.0)
    if GATE == 2:
        S *= tl.exp(tl.load(g + n * K + ok, mask=ok < K, other=0.0).to(tl.float32))[:, None]
    elif GATE == 1:
        S *= tl.exp(tl.load(g + n).to(tl.float32))
    bk = tl.load(k + n * K + ok, mask=ok < K, other=0.0).to(tl.float32)
    S += bk[:, None] * tl.load(v + n * V + ov, mask=ov < V, other=0.0).to(tl.float32)[None, :]
    tl.store(p, S, mask=m)
    for j in range(GROUP):
        bq = tl.load(q + (n * GROUP + j) * K + ok, mask=ok < K, other=0.0).to(tl.float32) * scale
        x = tl.sum(S * bq[:, None], 0)
        tl.store(o + (n * GROUP + j) * V + ov, x.to(o.dtype.element_ty), mask=ov < V)
