"""Triton kernels of gated linear attention: S_t = diag(exp g_t) S_{t-1} + k_t v_tᵀ, o_t = scale·S_tᵀ q_t.

Symbols. Tensors are contiguous, and float32 unless a dtype is named; io is that of q, k and v. Grids run fastest over
their last factor.
  B, T, N         rows; tokens of a row (packed: B = 1, T of all sequences); sequences (N = B unless packed)
  H, HK, GROUP    heads of q and o; heads of k, v, g and the states; H / HK
  K, V            channels of q and k; of v and o: 1 to 512; 1 to 4096 (`_grad_q` and `_grad_kv`: to 256)
  L, PER, NS      tokens of a segment; segments of a sequence (packed: 0); of the batch (packed: at most)
  U               units: N if SINGLE, else NS
  q, dq; k, dk    io [B, T, H, K]; io [B, T, HK, K]
  v, dv; o, do    io [B, T, HK, V]; io [B, T, H, V]
  g               io or float32, logarithms of decays: GATE 1 [B, T, HK], GATE 2 [B, T, HK, K], else None
  cu              int32 or int64 [N + 1], first token of each sequence; cu, owner and first are None unless packed
  owner, first    int64 [NS], the sequence of each segment; int64 [N + 1], the first segment of each sequence
  states          [NS, HK, K, V], the state each segment starts from (gradients if SINGLE: ends with)
  out, add        [NS, HK, K, V], what a segment adds to the state; to the state's gradient
  init, dinit     [N, HK, K, V], the state before a sequence (None: zeros); its gradient (None: not wanted)
  last, final     [N, HK, K, V], the state after a sequence
  dstates         [U, HK, K, V], the gradient of the state that a unit ends with (None: zeros)
  decay           product of a segment's decays: GATE 1 [NS, HK, 1], GATE 2 [NS, HK, K]
  strong          int32, where gates go beyond LIMIT (GATE 2): [U, HK] in `_outputs`, [PARTS, U, HK] in gradients
  z               q's part of dg: GATE 1 [PARTS, B, T, H], summed to 1 part where `_grad_kv` has all of K, GATE 2 [B, T, H, K], which may be dg itself
  dg              GATE 1 [K tiles of `_grad_kv`, B, T, HK], summed by the launcher; GATE 2 [B, T, HK, K] in g's dtype
  state, scale    [B, HK, K, V], `_step`'s; float
  PARTS, part     ceil(K / BK) of `_grad_q`; entries of a part: B·T·H in `_grad_q`, B·T·HK in `_grad_kv` (GATE 1)
  C               tokens of a chunk: 16, 32 or 64. LEVELS: log2 C. LIMIT: in bits, 16 for float32, else 100
  BK, BV, BR      channels of a program's tile of the state, powers of two; BR: K's in `_scan`
  DT, PREC        products' operands: bfloat16 for bfloat16, else float32; "tf32x3" for float32, else "tf32"
  GATE, VARLEN    0 none, 1 per head, 2 per channel; whether the batch is packed
  SINGLE, ANY     whether a unit is a sequence, not a segment; whether this is the second launch, for strong gates
  DK, DV          what `_grad_kv` makes: dk and dg; dv. REVERSE: `_scan` from the last segment to the first

A program goes through its tokens in chunks with the state on chip. Where sequences and heads fill the chip, one
program does a whole sequence (SINGLE) and every tensor is read once:
  forward `_outputs`; backward `_grad_q` (forwards: dq, and the state now and then) and `_grad_kv` (backwards).
Elsewhere a sequence is cut into segments, a program each, and their states are found first:
  forward `_local_states`, `_scan` (the only sequential part), `_outputs`;
  backward the same two, `_grad_q`, `_scan` in reverse, `_grad_kv`.
The backward needs nothing but the inputs, uses no atomics, and sums a head's queries in order.

Gates: common.py. Where a chunk's gates go beyond LIMIT a second launch (ANY) does what the first could not; both judge
a row by its own past, so that a later token changes no bit of an earlier output.

A NaN or infinity in v may also reach the up to 63 rows before it in its chunk: a masked weight is 0, and 0·NaN is NaN.

Accuracy: bfloat16 inputs are multiplied as bfloat16 with float32 sums; float32 as three TF32 products (about 1e-7
relative); float16 as TF32 (same mantissa, without its overflow). dg is a difference of sums over the segment, good to a
few dozen roundings of its largest pair. States are float32 throughout.
"""

from __future__ import annotations

import triton
import triton.language as tl

from icrl_kernels.linear_attention.triton.common import (
    LOG2E,
    _after,
    _apply_any_gate,
    _decay,
    _gates,
    _load,
    _put_rows,
    _rows,
    _scalar_gates,
    _scores_any_gate,
    _span,
    _store,
    _weak,
)


@triton.jit
def _local_states(
    k, v, g, out, decay, cu, owner, first, T, L, PER, HK,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    GATE: tl.constexpr, VARLEN: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Grid NS·HK·ceil(V/BV): a segment, a head, all of K and BV of V. Reads k, v, g. Writes out[s, h], the segment's
    sum of k_t v_tᵀ, each decayed to its end, and decay[s, h]."""
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
    d = tl.full([BK], 1.0, tl.float32) if GATE == 2 else 1.0
    for c in range(tl.cdiv(tl.maximum(hi - lo, 0), C).to(tl.int32)):
        t = lo + c * C + r
        bk = _load(k, t, hi, h, HK, ok, K, MK)
        if GATE == 2:
            shrink = tl.exp2(tl.sum(_gates(g, t, hi, h, HK, ok, K, MK), 0))
            bk = bk.to(tl.float32) * _after(g, t, lo, c, hi, h, HK, ok, K, MK, C)
            d *= shrink
            S *= shrink[:, None]
        elif GATE == 1:
            coarse, fine, coarse_end, fine_end = _scalar_gates(g, t, hi, h, HK)
            bk = bk.to(tl.float32) * _decay(coarse_end - coarse, fine_end - fine)[:, None]
            shrink = _decay(coarse_end, fine_end)
            d *= shrink
            S *= shrink
        bv = _load(v, t, hi, h, HK, ov, V, MV).to(DT)
        S = tl.dot(tl.trans(bk.to(DT)), bv, S, input_precision=PREC)
    p = (s * HK + h) * K * V + ok[:, None] * V + ov[None, :]
    tl.store(out + p, S, mask=(ok < K)[:, None] & (ov < V)[None, :])
    if GATE == 2:
        tl.store(decay + (s * HK + h) * K + ok, d, mask=ok < tl.where(iv == 0, K, 0))
    elif GATE == 1:  # noqa: SIM102 (GATE is decided when compiling, iv is not)
        if iv == 0:
            tl.store(decay + s * HK + h, d)


@triton.jit
def _scan(
    states, decay, init, last, first, PER, HK,
    K: tl.constexpr, V: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, REVERSE: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Grid N·HK·ceil(K/BR): a sequence, a head, BR of K and all of V. Reads decay, init. Rewrites states: what segments
    add becomes what they start from (REVERSE: end with). Writes last. REVERSE: init is a gradient at the sequence's
    end."""
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
    if init is not None:
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
    q, k, v, g, states, last, strong, o, scale, cu, owner, first, T, L, PER, HK,
    GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    LEVELS: tl.constexpr, LIMIT: tl.constexpr, GATE: tl.constexpr, VARLEN: tl.constexpr, DT: tl.constexpr,
    PREC: tl.constexpr, ANY: tl.constexpr,
):  # fmt: skip
    """Grid U·HK·ceil(V/BV): a unit, a head of k with its GROUP queries, all of K, BV of V. Reads q, k, v, g, states
    (SINGLE: init; None: zeros). Writes o and, if SINGLE, last (else None). strong[s, h]: the first chunk with gates
    beyond LIMIT (none: the number of chunks), written by the first launch, read by the second."""
    NV: tl.constexpr = (V + BV - 1) // BV
    MK: tl.constexpr = K != BK
    MV: tl.constexpr = V % BV != 0
    H = HK * GROUP  # not an argument, so that with GROUP = 1 all addresses are seen to be the same
    pid = tl.program_id(0)
    iv = pid % NV
    h = (pid // NV) % HK
    s = (pid // NV // HK).to(tl.int64)
    n, lo, hi, end = _span(s, cu, owner, first, T, L, PER, VARLEN)
    r = tl.arange(0, C)
    ok = tl.arange(0, BK)
    ov = iv * BV + tl.arange(0, BV)
    causal = r[:, None] >= r[None, :]
    p = (s * HK + h) * K * V + ok[:, None] * V + ov[None, :]
    inside = (ok < K)[:, None] & (ov < V)[None, :]
    S = tl.zeros([BK, BV], tl.float32)
    if states is not None:
        S = tl.load(states + p, mask=inside, other=0.0)
    chunks = tl.cdiv(tl.maximum(hi - lo, 0), C).to(tl.int32)
    if ANY:
        beyond = tl.load(strong + s * HK + h)
        chunks = tl.where(beyond < chunks, chunks, 0)
    elif GATE == 2:
        reach = tl.zeros([BK], tl.int32) + chunks  # the first chunk beyond LIMIT, for each channel
    for c in range(chunks):
        t = lo + c * C + r
        bk = _load(k, t, hi, h, HK, ok, K, MK)
        bv = _load(v, t, hi, h, HK, ov, V, MV).to(DT)
        kw = bk.to(DT)
        if GATE == 2:
            b = _gates(g, t, hi, h, HK, ok, K, MK)
            G = tl.cumsum(b, 0)
            total = tl.sum(b, 0)
            kw = (bk.to(tl.float32) * tl.exp2(-G)).to(DT)
            if ANY:
                hard = tl.min(_weak(total, LIMIT), 0) == 0
                late = tl.min(G, 1) < -LIMIT
            else:
                reach = tl.where(_weak(total, LIMIT) == 0, tl.minimum(reach, c), reach)
        elif GATE == 1:
            coarse, fine, coarse_end, fine_end = _scalar_gates(g, t, hi, h, HK)
            pair = (coarse[:, None] - coarse[None, :]) + (fine[:, None] - fine[None, :])
        for j in tl.range(GROUP, num_stages=1):
            hq = h * GROUP + j
            bq = _load(q, t, hi, hq, H, ok, K, MK)
            qa = (bq.to(tl.float32) * tl.exp2(G)).to(DT) if GATE == 2 else bq.to(DT)
            A = tl.dot(qa, tl.trans(kw), input_precision=PREC)
            if GATE == 1:
                A *= tl.exp2(pair)
            if ANY:  # noqa: SIM102 (ANY is decided when compiling, hard is not)
                if hard:
                    A = tl.where(late[:, None], _scores_any_gate(bq, bk, b, C, BK, LEVELS, DT, PREC), A)
            A = tl.where(causal, A, 0.0).to(DT)
            bo = tl.dot(qa, S.to(DT), input_precision=PREC)
            bo *= _decay(coarse, fine)[:, None] * scale if GATE == 1 else scale
            bo += tl.dot(A, bv, input_precision=PREC) * scale
            rows = t
            if ANY:
                rows = tl.where((c > beyond) | ((c == beyond) & late), t, hi)
            _store(o, bo, rows, hi, hq, H, ov, V, MV)
        if GATE == 2:  # kw holds the decay back to the chunk's start, so the shrinking comes last
            shrink = tl.exp2(total)[:, None]
            if ANY:  # noqa: SIM102
                if hard:
                    S *= shrink
                    shrink = tl.full([BK, 1], 1.0, tl.float32)
                    kw = (bk.to(tl.float32) * _after(g, t, lo, c, hi, h, HK, ok, K, MK, C)).to(DT)
            S = tl.dot(tl.trans(kw), bv, S, input_precision=PREC)
            S *= shrink
        else:
            if GATE == 1:
                kw = (bk.to(tl.float32) * _decay(coarse_end - coarse, fine_end - fine)[:, None]).to(DT)
                S *= _decay(coarse_end, fine_end)
            S = tl.dot(tl.trans(kw), bv, S, input_precision=PREC)
    if GATE == 2 and not ANY:  # noqa: SIM102 (iv is not known when compiling)
        if iv == 0:
            tl.store(strong + s * HK + h, tl.min(reach, 0))
    if last is not None:
        if ANY:
            inside = inside & (ok < tl.where(chunks > 0, K, 0))[:, None]
        tl.store(last + p, S, mask=inside)


@triton.jit
def _grad_q(
    q, k, v, g, do, states, init, add, strong, dq, z, scale, cu, owner, first, T, L, PER, HK, part,
    GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    LEVELS: tl.constexpr, LIMIT: tl.constexpr, GATE: tl.constexpr, VARLEN: tl.constexpr, DT: tl.constexpr,
    PREC: tl.constexpr, SINGLE: tl.constexpr, ANY: tl.constexpr,
):  # fmt: skip
    """Grid U·HK·PARTS: a unit, a head of k with its GROUP queries, BK of K and all of V. dq_t = scale·S_t do_t; the
    state is kept transposed, as the dot with do reads it. Reads q (None if SINGLE, unless GATE is 1), k, v, g, do.
    Writes dq and z: dq / scale without the pair (t, t), which does not move dg; GATE 1: the sum over BK channels of
    scale·q·z.
    SINGLE: reads init, writes what each segment ends with to states (None: not wanted). Otherwise reads states and
    writes to add what the segment adds to the state's gradient at its start.
    strong[part, unit, h]: whether gates go beyond LIMIT, written by the first launch, read by the second."""
    NK: tl.constexpr = (K + BK - 1) // BK
    MK: tl.constexpr = K % BK != 0
    MV: tl.constexpr = V != BV
    H = HK * GROUP
    pid = tl.program_id(0)
    ik = pid % NK
    h = (pid // NK) % HK
    unit = (pid // NK // HK).to(tl.int64)
    r = tl.arange(0, C)
    ok = ik * BK + tl.arange(0, BK)
    ov = tl.arange(0, BV)
    tile = ok[None, :] * V + ov[:, None]
    inside = (ok < K)[None, :] & (ov < V)[:, None]
    flag = strong + (ik * (tl.num_programs(0) // NK) + unit * HK + h) if GATE == 2 else 0
    weak = tl.full([BK], 1, tl.int32)
    n, lo, hi, end = _span(unit, cu, owner, first, T, T if SINGLE else L, 1 if SINGLE else PER, VARLEN)
    chunks = tl.cdiv(tl.maximum(hi - lo, 0), C).to(tl.int32)
    if ANY:
        chunks = tl.where(tl.load(flag) != 0, chunks, 0)
    S = tl.zeros([BV, BK], tl.float32)
    if SINGLE:
        if init is not None:
            S = tl.load(init + (unit * HK + h) * K * V + tile, mask=inside, other=0.0)
    else:
        S = tl.load(states + (unit * HK + h) * K * V + tile, mask=inside, other=0.0)
    if not SINGLE and not ANY:
        D = tl.zeros([BV, BK], tl.float32)
        since = tl.zeros([BK], tl.float32) if GATE == 2 else 0.0  # sum of gates from the segment's start
        since_fine = 0.0
    for c in range(chunks):
        t = lo + c * C + r
        bk = _load(k, t, hi, h, HK, ok, K, MK)
        bv = _load(v, t, hi, h, HK, ov, V, MV).to(DT)
        kw = bk.to(DT)
        if GATE == 2:
            b = _gates(g, t, hi, h, HK, ok, K, MK)
            G = tl.cumsum(b, 0)
            total = tl.sum(b, 0)
            kw = (bk.to(tl.float32) * tl.exp2(-G)).to(DT)
            e = tl.exp2(G)
            if ANY:
                hard = tl.min(_weak(total, LIMIT), 0) == 0
            else:
                weak = tl.minimum(weak, _weak(total, LIMIT))
        elif GATE == 1:
            coarse, fine, coarse_end, fine_end = _scalar_gates(g, t, hi, h, HK)
            pair = (coarse[:, None] - coarse[None, :]) + (fine[:, None] - fine[None, :])
        for j in tl.range(GROUP, num_stages=1):
            hq = h * GROUP + j
            bo = _load(do, t, hi, hq, H, ov, V, MV).to(DT)
            W = tl.dot(bo, tl.trans(bv), input_precision=PREC)
            y = tl.dot(bo, S.to(DT), input_precision=PREC)
            if GATE == 0:
                x = tl.dot(tl.where(r[:, None] >= r[None, :], W, 0.0).to(DT), kw, input_precision=PREC)
                y = y * scale + x * scale
            else:
                own = tl.sum(bo.to(tl.float32) * bv.to(tl.float32), 1)
                W = tl.where(r[:, None] > r[None, :], W, 0.0)
            if GATE == 2:
                if ANY:
                    if hard:
                        x = _apply_any_gate(W, bk, b, True, C, BK, LEVELS, DT, PREC)
                    else:
                        x = tl.dot(W.to(DT), kw, input_precision=PREC) * e
                else:
                    x = tl.dot(W.to(DT), kw, input_precision=PREC) * e
                y = y * e + x
                _store(z, y, t, hi, hq, H, ok, K, MK)
                y = y * scale + (own * scale)[:, None] * bk.to(tl.float32)
            elif GATE == 1:
                W = tl.where(r[:, None] > r[None, :], W * tl.exp2(pair), 0.0)
                x = tl.dot(W.to(DT), kw, input_precision=PREC)
                qs = _load(q, t, hi, hq, H, ok, K, MK).to(tl.float32) * scale
                qa = (qs * _decay(coarse, fine)[:, None]).to(DT).to(tl.float32)
                tl.store(z + ik * part + t * H + hq, tl.sum(qa * y + qs * x, 1), mask=t < hi)
                y = y * (_decay(coarse, fine) * scale)[:, None] + x * scale
                y += (own * scale)[:, None] * bk.to(tl.float32)
            _store(dq, y, t, hi, hq, H, ok, K, MK)
            if not SINGLE and not ANY:
                qa = _load(q, t, hi, hq, H, ok, K, MK)
                if GATE == 2:
                    qa = qa.to(tl.float32) * tl.exp2(since[None, :] + G)
                elif GATE == 1:
                    qa = qa.to(tl.float32) * _decay(since + coarse, since_fine + fine)[:, None]
                D = tl.dot(tl.trans(bo), qa.to(DT), D, input_precision=PREC)
        if GATE == 2:
            shrink = tl.exp2(total)[None, :]
            if ANY:  # noqa: SIM102 (ANY is decided when compiling, hard is not)
                if hard:
                    S *= shrink
                    shrink = tl.full([1, BK], 1.0, tl.float32)
                    kw = (bk.to(tl.float32) * _after(g, t, lo, c, hi, h, HK, ok, K, MK, C)).to(DT)
            S = tl.dot(tl.trans(bv), kw, S, input_precision=PREC)
            S *= shrink
        else:
            if GATE == 1:
                kw = (bk.to(tl.float32) * _decay(coarse_end - coarse, fine_end - fine)[:, None]).to(DT)
                S *= _decay(coarse_end, fine_end)
            S = tl.dot(tl.trans(bv), kw, S, input_precision=PREC)
        if not SINGLE and not ANY:
            if GATE == 2:
                since += total
            elif GATE == 1:
                since += coarse_end
                since_fine += fine_end
        if SINGLE and states is not None:  # noqa: SIM102 (c is not known when compiling)
            if ((c + 1) % tl.cdiv(L, C) == 0) | (c == chunks - 1):
                s = unit * PER + c // tl.cdiv(L, C)
                tl.store(states + (s * HK + h) * K * V + tile, S, mask=inside)
    if not SINGLE and not ANY:
        tl.store(add + (unit * HK + h) * K * V + tile, D * scale, mask=inside)
    if GATE == 2 and not ANY:
        tl.store(flag, 1 - tl.min(weak, 0))


@triton.jit
def _grad_kv(
    q, k, v, g, do, z, states, final, dstates, dinit, strong, dk, dv, dg, scale, cu, owner, first, T, L, PER, HK, part,
    GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    LEVELS: tl.constexpr, LIMIT: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, PARTS: tl.constexpr,
    GATE: tl.constexpr, VARLEN: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr, SINGLE: tl.constexpr,
    ANY: tl.constexpr,
):  # fmt: skip
    """Grid U·HK·ceil(V/BV)·ceil(K/BK): a unit, a head of k with its GROUP queries, BK of K, BV of V; from the last
    chunk to the first with D = dL/dS_end (transposed, [V, K]) on chip. Reads q, k, v, g, do, strong, dstates; for dg z,
    states and, unless SINGLE, final. Writes dk, dg; dv; if SINGLE dinit. What a launch has no use for is None.
    dk_j = D v_j 2^(gates after j) + sum_{i>=j} .. q_i, and dv_j likewise, kept as [V, C] so that no product's result
    has to be transposed for another. dg_t = sum_{s>=t} (q_s dq_s - k_s dk_s) + sum_v S_end D within the segment. The
    pairs (s, s) cancel and are left out of both terms: under strong gates they would drown the rest. The terms take q
    and k as the products took them, rounded after their decays; the rest then cancels to float32's digits.
    DK needs all of V on chip, DV all of K: a large state is done in two launches."""
    NK: tl.constexpr = (K + BK - 1) // BK
    NV: tl.constexpr = (V + BV - 1) // BV
    MK: tl.constexpr = K % BK != 0
    MV: tl.constexpr = V % BV != 0
    H = HK * GROUP
    pid = tl.program_id(0)
    ik = pid % NK
    iv = pid // NK % NV
    h = (pid // NK // NV) % HK
    unit = (pid // NK // NV // HK).to(tl.int64)
    r = tl.arange(0, C)
    ok = ik * BK + tl.arange(0, BK)
    ov = iv * BV + tl.arange(0, BV)
    tile = ok[None, :] * V + ov[:, None]
    inside = (ok < K)[None, :] & (ov < V)[:, None]
    n, lo, hi, end = _span(unit, cu, owner, first, T, T if SINGLE else L, 1 if SINGLE else PER, VARLEN)
    chunks = tl.cdiv(tl.maximum(hi - lo, 0), C).to(tl.int32)
    if GATE == 2:
        units = tl.num_programs(0) // (NK * NV)
        found = tl.load(strong + unit * HK + h)
        for i in tl.static_range(1, PARTS):
            found |= tl.load(strong + i * units + unit * HK + h)
        mine = (found != 0) == ANY
        chunks = tl.where(mine, chunks, 0)
    D = tl.zeros([BV, BK], tl.float32)
    if dstates is not None:
        D = tl.load(dstates + (unit * HK + h) * K * V + tile, mask=inside, other=0.0)
    if DK and GATE > 0:
        if SINGLE:
            carry = tl.zeros([BK], tl.float32) if GATE == 2 else 0.0
        else:  # what the segment ends with is the next one's start or the sequence's last
            more = (hi + 0 * ok)[None, :] < end  # a tensor: triton 3.9's interpreter makes a scalar's & an integer
            S = tl.load(states + ((unit + 1) * HK + h) * K * V + tile, mask=inside & more, other=0.0)
            S += tl.load(final + (n * HK + h) * K * V + tile, mask=inside & ~more, other=0.0)
            carry = tl.sum(S * D, 0) if GATE == 2 else tl.sum(tl.sum(S * D, 0), 0)
    for i in range(chunks):
        c = chunks - 1 - i
        if SINGLE and DK and GATE > 0:  # noqa: SIM102
            if ((c + 1) % tl.cdiv(L, C) == 0) | (c == chunks - 1):
                s = unit * PER + c // tl.cdiv(L, C)
                S = tl.load(states + (s * HK + h) * K * V + tile, mask=inside, other=0.0)
                carry = tl.sum(S * D, 0) if GATE == 2 else tl.sum(tl.sum(S * D, 0), 0)
        t0 = lo + c * C
        t = t0 + r
        left = tl.minimum(hi - t0, C).to(tl.int32)
        bk = _rows(k, t0, r, left, h, HK, ok, K, MK)
        kw = bk.to(DT)
        if GATE == 2:
            b = _rows(g, t0, r, left, h, HK, ok, K, MK).to(tl.float32) * LOG2E
            G = tl.cumsum(b, 0)
            total = tl.sum(b, 0)
            shrink = tl.exp2(total)[None, :]
            w = tl.exp2(-G)
            if ANY:
                hard = tl.min(_weak(total, LIMIT), 0) == 0
                later = tl.full([1, BK], 1.0, tl.float32)
                if hard:
                    w = _after(g, t, lo, c, hi, h, HK, ok, K, MK, C)
                    later = shrink
                else:
                    D *= shrink
            else:  # D shrinks first; all decays run from the chunk's start
                D *= shrink
            kw = (bk.to(tl.float32) * w).to(DT)
        elif GATE == 1:
            coarse, fine, coarse_end, fine_end = _scalar_gates(g, t, hi, h, HK)
            pair = (coarse[:, None] - coarse[None, :]) + (fine[:, None] - fine[None, :])
            w = _decay(coarse_end - coarse, fine_end - fine)[:, None]
            kw = (bk.to(tl.float32) * w).to(DT)
            shrink = _decay(coarse_end, fine_end)
        if DV:
            xv = tl.dot(D.to(DT), tl.trans(kw), input_precision=PREC)
            for j in tl.range(GROUP, num_stages=1):
                hq = h * GROUP + j
                bq = _rows(q, t0, r, left, hq, H, ok, K, MK)
                bo = _rows(do, t0, r, left, hq, H, ov, V, MV).to(DT)
                if GATE == 2:
                    qs = bq.to(tl.float32) * scale
                    if ANY:
                        if hard:
                            A = _scores_any_gate(qs, bk, b, C, BK, LEVELS, DT, PREC)
                        else:
                            A = tl.dot((qs * tl.exp2(G)).to(DT), tl.trans(kw), input_precision=PREC)
                    else:
                        A = tl.dot((qs * tl.exp2(G)).to(DT), tl.trans(kw), input_precision=PREC)
                else:
                    A = tl.dot(bq.to(DT), tl.trans(bk.to(DT)), input_precision=PREC) * scale
                    if GATE == 1:
                        A *= tl.exp2(pair)
                A = tl.where(r[:, None] >= r[None, :], A, 0.0)
                xv = tl.dot(tl.trans(bo), A.to(DT), xv, input_precision=PREC)
            p = dv + (t0 * HK + h) * V + ((r * (HK * V))[None, :] + ov[:, None])
            tl.store(p, xv.to(dv.dtype.element_ty), mask=(r < left)[None, :] & (ov < V)[:, None])
        if DK:
            bv = _rows(v, t0, r, left, h, HK, ov, V, MV).to(DT)
            xk = tl.dot(bv, D.to(DT), input_precision=PREC)
            if GATE == 2:
                drift = tl.zeros([C, BK], tl.float32)
                if ANY:
                    xk *= tl.where(hard, w, 1.0)
            elif GATE == 1:
                drift = -tl.sum(kw.to(tl.float32) * xk, 1)
                xk *= w
            own = tl.zeros([C, BK], tl.float32)
        if GATE == 1:
            D *= shrink
        elif ANY:
            D *= later
        for j in tl.range(GROUP, num_stages=1):
            hq = h * GROUP + j
            bq = _rows(q, t0, r, left, hq, H, ok, K, MK)
            bo = _rows(do, t0, r, left, hq, H, ov, V, MV).to(DT)
            qs = bq.to(tl.float32) * scale
            if GATE == 2:
                qa = (qs * tl.exp2(G)).to(DT)
            elif GATE == 1:
                qa = (qs * _decay(coarse, fine)[:, None]).to(DT)
            else:
                qa = qs.to(DT)
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
                    qh = qa.to(tl.float32) * w
                    if ANY:
                        qh = tl.where(hard, qs, qh)
                    drift += qh * _rows(z, t0, r, left, hq, H, ok, K, MK)
                    if ANY:
                        if hard:
                            xk += _apply_any_gate(W, qs, b, False, C, BK, LEVELS, DT, PREC)
                        else:
                            xk += tl.dot(W.to(DT), qa, input_precision=PREC)
                    else:
                        xk = tl.dot(W.to(DT), qa, xk, input_precision=PREC)
                elif GATE == 1:
                    drift += tl.load(z + ik * part * GROUP + t * H + hq, mask=t < hi, other=0.0)
                    W = tl.where(r[:, None] < r[None, :], W * tl.exp2(tl.trans(pair)), 0.0)
                    x = tl.dot(W.to(DT), bq.to(DT), input_precision=PREC) * scale
                    drift -= tl.sum(bk.to(tl.float32) * x, 1)
                    xk += x
        if DK:
            if GATE == 2:
                if ANY:
                    drift -= tl.where(hard, bk.to(tl.float32), kw.to(tl.float32)) * xk
                    xk *= tl.where(hard, 1.0, w)
                else:
                    drift -= kw.to(tl.float32) * xk
                    xk *= w
                xg = tl.cumsum(drift, 0, reverse=True) + carry[None, :]
                if ANY:  # below -150 exp2 is 0, and so is the gradient
                    xg = tl.where(b < -150.0, 0.0, xg)
                _put_rows(dg, xg, t0, r, left, h, HK, ok, K, MK)
                carry += tl.sum(drift, 0)
            elif GATE == 1:
                xg = tl.cumsum(drift, 0, reverse=True) + carry
                own_gate = tl.load(g + t * HK + h, mask=t < hi, other=0.0).to(tl.float32) * LOG2E
                tl.store(dg + ik * part + t * HK + h, tl.where(own_gate < -150.0, 0.0, xg), mask=t < hi)
                carry += tl.sum(drift, 0)
            _put_rows(dk, xk + own, t0, r, left, h, HK, ok, K, MK)
    if dinit is not None:
        if GATE == 2:
            inside = inside & (ok < tl.where(mine, K, 0))[None, :]
        tl.store(dinit + (unit * HK + h) * K * V + tile, D, mask=inside)


@triton.jit
def _step(
    q, k, v, g, state, o, scale, HK,
    GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """Grid B·HK·ceil(V/BV): a row, a head of k with its GROUP queries, all of K, BV of V. Reads q, k, v, g, without a
    T. Updates state, writes o. Does not use HK."""
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
    for j in tl.range(GROUP, num_stages=1):
        bq = tl.load(q + (n * GROUP + j) * K + ok, mask=ok < K, other=0.0).to(tl.float32) * scale
        x = tl.sum(S * bq[:, None], 0)
        tl.store(o + (n * GROUP + j) * V + ov, x.to(o.dtype.element_ty), mask=ov < V)
