"""Triton kernels of gated slot attention. K̃_t = diag(exp g_t) K̃_{t-1} + s_t k_tᵀ and
Ṽ_t = diag(exp g_t) Ṽ_{t-1} + s_t v_tᵀ are one gated linear attention with keys s and values [k | v]: the levels, the
gates and the accuracy are those of gla_kernels.py, and the two states lie side by side, [M, K + V].

Symbols. Tensors are contiguous, and float32 unless a dtype is named; io is that of q, k, v and s; DT is the products'.
Grids run fastest over their last factor.
  B, T, N            rows; tokens of a row (packed: B = 1, T of all sequences); sequences (N = B unless packed)
  H, HK, GROUP       heads of q and o; heads of k, v, s, g and the states; H / HK
  K, V, M            channels of q and k; of v and o; slots: 1 to 256, 256 and 128, in `_logits` and `_step` to 512, 4096 and 512
  L, PER, NS         tokens of a segment; segments of a sequence (packed: 0); of the batch (packed: at most)
  q, dq; k, dk       io [B, T, H, K] (dq by `_outputs` of gla_kernels.py); io [B, T, HK, K]
  v, dv; o, do       io [B, T, HK, V]; io [B, T, H, V]
  s                  io [B, T, HK, M], what a token writes to each slot
  g                  io or float32 [B, T, HK, M], logarithms of the slots' decays; None without GATE
  cu                 int32 or int64 [N + 1], first token of each sequence; cu, owner and first are None unless packed
  owner, first       int64 [NS], the sequence of each segment; int64 [N + 1], the first segment of each sequence
  x1, y1, x2, y2     `_local_states`: [B, T, HX, M], [B, T, HX, K], [B, T, HX, M], [B, T, HX, V]; the forward's are
                     s, k, s, v (io, HX = HK, GROUP = 1), the backward's e, q, p, do (HX = H)
  out1, out2         [NS, HK, M, K], [NS, HK, M, V]: what a segment adds to K̃ and Ṽ, or to their gradients
  states1, states2   as out1, out2 and the same memory: K̃ and Ṽ (gradients: theirs) that a segment starts from
                     (gradients: ends with). `_logits`: states is K̃'s
  keys, values       [N, HK, K, M] and [N, HK, M, V]: K̃ᵀ and Ṽ before each sequence; `_step`: [B, HK, ..]
  last_keys, last_values   as keys and values, after each sequence; in reverse the gradients of keys and values
  decay              [NS, HK, M], product of a segment's decays; None without GATE
  strong             int32 [NS, HK], the first chunk with gates beyond LIMIT, 2^31 - 1 if there is none; `_logits`:
                     [NS, HK, ceil(M/BM)], of BM slots, the number of chunks if there is none; None without GATE
  p, e               DT [B, T, H, M], softmax(scale·K̃ q) and dL/d(K̃ q)
  z                  [B, T, H, M]: `_logits`: K̃ q; gradients: p and e's part of dg, which may be dg itself, None
                     without GATE
  own                [2, B, T, H]: q·k and do·v of each token; `_grad_kv` gets one of the two; None without GATE
  part               B·T·H, entries of one of own's halves
  y, x, weight, N, states, last, dstates, dx, ROW, COLUMN   `_grad_kv`, where N is a number of channels:
    first launch     q, k, e, K, K̃ [NS, HK, M, K], final keys [N, HK, K, M], K̃'s gradient [NS, HK, M, K], dk, 1, M
    SECOND           do, v, p, V, Ṽ [NS, HK, M, V], final values [N, HK, M, V], Ṽ's gradient, dv, V, 1
  ds_sum, dg_sum     [B, T, HK, M], what the first launch leaves to SECOND; dg_sum is dg where that is float32
  ds, dg             [B, T, HK, M]: ds_sum and dg_sum in the first launch, the op's gradients (s's, g's dtype) in SECOND
  scale              float, of the logits
  C                  tokens of a chunk: 16, 32 or 64. LEVELS: log2 C. LIMIT: in bits, 16 for float32, else 100
  BK, BV, BM, BN     channels and slots of a program's tile, powers of two of at least 16
  BD, BG             columns of [K + V] in `_scan`; power of two that holds GROUP
  DT, PREC           products' operands: bfloat16 for bfloat16, else float32; "tf32x3" for float32, else "tf32"
  GATE, VARLEN       whether there are gates; whether the batch is packed
  REVERSE, HAS_INIT  whether the launch goes from the last segment to the first; whether there are keys and values
  SECOND, ANY        whether this is `_grad_kv` of Ṽ; whether this is the second launch, for strong gates
  om                 numbers of the tile's slots. The rest: at the device functions

`_outputs` holds both states on chip: logits, softmax and output of a chunk come from one launch, and no p is written.
With G the sum of a slot's gates from the chunk's start and s' = s·2^-G, a chunk's logits are
2^G ∘ (q K̃ᵀ + tril(q kᵀ) s'), its outputs (p ∘ 2^G) Ṽ + tril((p ∘ 2^G) s'ᵀ) v. Rows with G < -LIMIT are done again for
any gates by a second launch, as in gla. There 2^-G stops at 2^LIMIT in the first launch, because s' is summed over with
weights of 0 by the rows before it: a NaN or infinity in s or v may reach the up to 63 rows before it in its chunk.
"""

from __future__ import annotations

import triton
import triton.language as tl

from icrl_kernels.linear_attention.triton.common import (
    LOG2E,
    _after,
    _apply_any_gate,
    _gates,
    _load,
    _scores_any_gate,
    _span,
    _store,
    _weak,
)


@triton.jit
def _local_states(
    x1, y1, x2, y2, g, out1, out2, decay, strong, cu, owner, first, T, L, PER, HX, HK,
    GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, M: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BM: tl.constexpr, C: tl.constexpr, GATE: tl.constexpr, LIMIT: tl.constexpr, REVERSE: tl.constexpr,
    VARLEN: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Grid NS·HK: a segment and a head. Reads x1, y1, x2, y2, g. Writes out1[s, h], the sum over the segment of x1_t
    y1_tᵀ decayed to the segment's end (REVERSE: to its start), out2 likewise, decay and strong. Without REVERSE x2 is
    not read, being x1."""
    MK: tl.constexpr = K != BK
    MV: tl.constexpr = V != BV
    MM: tl.constexpr = M != BM
    pid = tl.program_id(0)
    h = pid % HK
    s = (pid // HK).to(tl.int64)
    n, lo, hi, end = _span(s, cu, owner, first, T, L, PER, VARLEN)
    r = tl.arange(0, C)
    ok = tl.arange(0, BK)
    ov = tl.arange(0, BV)
    om = tl.arange(0, BM)
    S1 = tl.zeros([BM, BK], tl.float32)
    S2 = tl.zeros([BM, BV], tl.float32)
    beyond = 0x7FFFFFFF
    d = tl.full([BM], 1.0, tl.float32)
    chunks = tl.cdiv(tl.maximum(hi - lo, 0), C).to(tl.int32)
    for i in range(chunks):
        c = chunks - 1 - i if REVERSE else i
        t = lo + c * C + r
        if GATE:
            b = _gates(g, t, hi, h, HK, om, M, MM)
            total = tl.sum(b, 0)
            shrink = tl.exp2(total)
            w = tl.exp2(tl.cumsum(b, 0)) if REVERSE else _after(g, t, lo, c, hi, h, HK, om, M, MM, C)
            d *= shrink
            S1 *= shrink[:, None]
            S2 *= shrink[:, None]
            weak = tl.min(_weak(total, LIMIT), 0)
            beyond = tl.where(weak == 0, tl.minimum(beyond, c), beyond)
        for j in tl.range(GROUP, num_stages=1):
            bx = _load(x1, t, hi, h * GROUP + j, HX, om, M, MM)
            by = _load(y1, t, hi, h * GROUP + j, HX, ok, K, MK).to(DT)
            if GATE:
                bx = bx.to(tl.float32) * w
            S1 = tl.dot(tl.trans(bx.to(DT)), by, S1, input_precision=PREC)
            if REVERSE:
                bx = _load(x2, t, hi, h * GROUP + j, HX, om, M, MM)
                if GATE:
                    bx = bx.to(tl.float32) * w
            by = _load(y2, t, hi, h * GROUP + j, HX, ov, V, MV).to(DT)
            S2 = tl.dot(tl.trans(bx.to(DT)), by, S2, input_precision=PREC)
    p = (s * HK + h) * M + om[:, None]
    tl.store(out1 + p * K + ok[None, :], S1, mask=(om < M)[:, None] & (ok < K)[None, :])
    tl.store(out2 + p * V + ov[None, :], S2, mask=(om < M)[:, None] & (ov < V)[None, :])
    if GATE:
        tl.store(decay + (s * HK + h) * M + om, d, mask=om < M)
        tl.store(strong + s * HK + h, beyond)


@triton.jit
def _scan(
    states1, states2, decay, keys, values, last_keys, last_values, first, PER, HK,
    K: tl.constexpr, V: tl.constexpr, M: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
    GATE: tl.constexpr, HAS_INIT: tl.constexpr, REVERSE: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Grid N·HK·ceil((K + V)/BD): a sequence, a head, BD columns of the two states side by side, the keys' first. Reads
    decay, keys, values, first. Rewrites states1 and states2: what the segments add becomes what they start from
    (REVERSE: end with). Writes last_keys and last_values. REVERSE: of gradients, keys and values at the sequence's end.
    """
    ND: tl.constexpr = (K + V + BD - 1) // BD
    pid = tl.program_id(0)
    ok = (pid % ND) * BD + tl.arange(0, BD)[None, :]
    ov = ok - K
    om = tl.arange(0, BM)[:, None]
    nh = (pid // ND).to(tl.int64)
    n = nh // HK
    h = nh % HK
    mk = (om < M) & (ok < K)
    mv = (om < M) & (ov >= 0) & (ov < V)
    key = (nh * K + ok) * M + om
    value = (nh * M + om) * V + ov
    if VARLEN:
        s0 = tl.load(first + n)
        segments = (tl.load(first + n + 1) - s0).to(tl.int32)
    else:
        segments = PER
        s0 = n * PER
    S = tl.zeros([BM, BD], tl.float32)
    if HAS_INIT:
        S = tl.load(keys + key, mask=mk, other=0.0) + tl.load(values + value, mask=mv, other=0.0)
    for i in range(segments):
        row = ((s0 + (segments - 1 - i if REVERSE else i)) * HK + h) * M + om
        add = tl.load(states1 + row * K + ok, mask=mk, other=0.0) + tl.load(states2 + row * V + ov, mask=mv, other=0.0)
        tl.store(states1 + row * K + ok, S, mask=mk)
        tl.store(states2 + row * V + ov, S, mask=mv)
        if GATE:
            S = S * tl.load(decay + row, mask=om < M, other=0.0) + add
        else:
            S += add
    tl.store(last_keys + key, S, mask=mk)
    tl.store(last_values + value, S, mask=mv)


@triton.jit
def _softmax(z, om, M: tl.constexpr, BM: tl.constexpr):
    """Of logits z [C, BM], slots om: exponentials [C, BM] and what to multiply them by [C, 1]."""
    z *= LOG2E
    if M != BM:
        z = tl.where((om < M)[None, :], z, float("-inf"))
    e = tl.exp2(z - tl.max(z, 1)[:, None])
    return e, (1.0 / tl.sum(e, 1))[:, None]


@triton.jit
def _read(
    x, y, S, bs, sw, b, f, STRICT: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, LEVELS: tl.constexpr,
    GATE: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr, ANY: tl.constexpr,
):  # fmt: skip
    """The slots' vectors times each row of x [C, K or V], 2^G ∘ (x S + tril(x yᵀ) s'), where the rows of y are what is
    written, S [K or V, BM] is the state, bs [C, BM] is s, sw [C, BM] is s', b [C, BM] are the gates in log2 and f [C,
    BM] is 2^G. ANY: sw is not used. STRICT: without the pairs (t, t). Returns that [C, BM] and x·y of each row [C]."""
    r = tl.arange(0, C)
    strict = r[:, None] > r[None, :]
    A = tl.dot(x, tl.trans(y), input_precision=PREC)
    own = tl.sum(tl.where(r[:, None] == r[None, :], A, 0.0), 1)
    z = tl.dot(x, S.to(DT), input_precision=PREC)
    if ANY:
        b = tl.where(b == b, b, 0.0)  # a NaN gate acts through f, on its own row and later ones only
        z = z * f + _apply_any_gate(tl.where(strict, A, 0.0), bs, b, True, C, BM, LEVELS, DT, PREC)
        if not STRICT:
            z += own[:, None] * bs
    elif STRICT:  # scaled apart and added: eight warps would do twice the product that another one goes on from
        z = z * f + tl.dot(tl.where(strict, A, 0.0).to(DT), sw, input_precision=PREC) * f
    else:
        z = tl.dot(tl.where(r[:, None] >= r[None, :], A, 0.0).to(DT), sw, z, input_precision=PREC)
        if GATE:
            z *= f
    return z, own


@triton.jit
def _logits(
    q, k, s, g, states, strong, z, cu, owner, first, T, L, PER, H, HK,
    GROUP: tl.constexpr, K: tl.constexpr, M: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr, C: tl.constexpr,
    LEVELS: tl.constexpr, LIMIT: tl.constexpr, GATE: tl.constexpr, VARLEN: tl.constexpr, DT: tl.constexpr,
    PREC: tl.constexpr, ANY: tl.constexpr,
):  # fmt: skip
    """Grid NS·H·ceil(M/BM): a segment, a head of q, BM of the slots. z = K̃ q: `_outputs`' first half, for a state that
    one program cannot hold. Reads q, k, s, g, states. Writes z. Writes strong in the first launch, reads it in the
    second. DT is float32 here and PREC "tf32x3", whatever io is."""
    NM: tl.constexpr = (M + BM - 1) // BM
    MK: tl.constexpr = K != BK
    MM: tl.constexpr = M % BM != 0
    pid = tl.program_id(0)
    h = (pid // NM) % H
    sg = (pid // NM // H).to(tl.int64)
    hk = h // GROUP
    n, lo, hi, end = _span(sg, cu, owner, first, T, L, PER, VARLEN)
    r = tl.arange(0, C)
    ok = tl.arange(0, BK)
    om = (pid % NM) * BM + tl.arange(0, BM)
    p = states + ((sg * HK + hk) * M + om[None, :]) * K + ok[:, None]
    X = tl.load(p, mask=(ok < K)[:, None] & (om < M)[None, :], other=0.0)
    chunks = tl.cdiv(tl.maximum(hi - lo, 0), C).to(tl.int32)
    beyond = chunks
    if GATE:
        strong += (sg * HK + hk) * NM + pid % NM
    if ANY:
        beyond = tl.load(strong)
        chunks = tl.where(beyond < chunks, chunks, 0)
    for c in range(chunks):
        t = lo + c * C + r
        bq = _load(q, t, hi, h, H, ok, K, MK).to(DT)
        bk = _load(k, t, hi, hk, HK, ok, K, MK).to(DT)
        bs = _load(s, t, hi, hk, HK, om, M, MM).to(tl.float32)
        sw = bs.to(DT)
        b, f = 0.0, 0.0
        if GATE:
            b = _gates(g, t, hi, hk, HK, om, M, MM)
            G = tl.cumsum(b, 0)
            f = tl.exp2(G)
            total = tl.sum(b, 0)
            shrink = tl.exp2(total)[None, :]
            if ANY:
                sw = (bs * _after(g, t, lo, c, hi, hk, HK, om, M, MM, C)).to(DT)
            else:
                sw = (bs * tl.exp2(tl.where(-G < LIMIT, -G, LIMIT))).to(DT)
                weak = tl.min(_weak(total, LIMIT), 0)
                beyond = tl.where(weak == 0, tl.minimum(beyond, c), beyond)
        bz, _ = _read(bq, bk, X, bs, sw, b, f, False, C, BM, LEVELS, GATE, DT, PREC, ANY)
        if ANY:
            late = (c > beyond) | ((c == beyond) & (tl.min(G, 1) < -LIMIT))
            _store(z, bz, tl.where(late, t, hi), hi, h, H, om, M, MM)
            X *= shrink
        else:
            _store(z, bz, t, hi, h, H, om, M, MM)
        X = tl.dot(tl.trans(bk), sw, X, input_precision=PREC)
        if GATE and not ANY:
            X *= shrink
    if GATE and not ANY:  # noqa: SIM102 (h is not known when compiling)
        if h % GROUP == 0:
            tl.store(strong, beyond)


@triton.jit
def _outputs(
    q, k, v, s, g, states1, states2, strong, o, scale, cu, owner, first, T, L, PER, H, HK,
    GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, M: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BM: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, LIMIT: tl.constexpr, GATE: tl.constexpr,
    VARLEN: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr, ANY: tl.constexpr,
):  # fmt: skip
    """Grid NS·H·ceil(V/BV): a segment, a head of q, all slots and BV of V. Reads q, k, v, s, g, states1, states2; ANY:
    strong. Writes o; ANY: only rows beyond LIMIT and those of later chunks."""
    NV: tl.constexpr = (V + BV - 1) // BV
    MK: tl.constexpr = K != BK
    MV: tl.constexpr = V % BV != 0
    MM: tl.constexpr = M != BM
    pid = tl.program_id(0)
    h = (pid // NV) % H
    sg = (pid // NV // H).to(tl.int64)
    hk = h // GROUP
    n, lo, hi, end = _span(sg, cu, owner, first, T, L, PER, VARLEN)
    r = tl.arange(0, C)
    ok = tl.arange(0, BK)
    ov = (pid % NV) * BV + tl.arange(0, BV)
    om = tl.arange(0, BM)
    causal = r[:, None] >= r[None, :]
    p = (sg * HK + hk) * M + om
    X = tl.load(states1 + p[None, :] * K + ok[:, None], mask=(ok < K)[:, None] & (om < M)[None, :], other=0.0)
    Y = tl.load(states2 + p[:, None] * V + ov[None, :], mask=(om < M)[:, None] & (ov < V)[None, :], other=0.0)
    chunks = tl.cdiv(tl.maximum(hi - lo, 0), C).to(tl.int32)
    beyond = chunks
    if ANY:
        beyond = tl.load(strong + sg * HK + hk)
        chunks = tl.where(beyond < chunks, chunks, 0)
    for c in range(chunks):
        t = lo + c * C + r
        bq = _load(q, t, hi, h, H, ok, K, MK).to(DT)
        bk = _load(k, t, hi, hk, HK, ok, K, MK).to(DT)
        bv = _load(v, t, hi, hk, HK, ov, V, MV).to(DT)
        bs = _load(s, t, hi, hk, HK, om, M, MM).to(tl.float32)
        b, f = 0.0, 0.0
        if GATE:
            b = _gates(g, t, hi, hk, HK, om, M, MM)
            G = tl.cumsum(b, 0)
            f = tl.exp2(G)
            shrink = tl.exp2(tl.sum(b, 0))
        if ANY:
            sw = (bs * _after(g, t, lo, c, hi, hk, HK, om, M, MM, C)).to(DT)
        elif GATE:
            sw = (bs * tl.exp2(tl.where(-G < LIMIT, -G, LIMIT))).to(DT)
        else:
            sw = bs.to(DT)
        z, _ = _read(bq, bk, X, bs, sw, b, f, False, C, BM, LEVELS, GATE, DT, PREC, ANY)
        e, norm = _softmax(z * scale, om, M, BM)
        if ANY:
            A = _scores_any_gate(e, bs, b, C, BM, LEVELS, DT, PREC)
        if GATE:
            e *= f
        e = e.to(DT)
        if not ANY:
            A = tl.dot(e, tl.trans(sw), input_precision=PREC)
        bo = tl.dot(e, Y.to(DT), input_precision=PREC) * norm
        bo += tl.dot(tl.where(causal, A, 0.0).to(DT), bv, input_precision=PREC) * norm
        if ANY:
            late = (c > beyond) | ((c == beyond) & (tl.min(G, 1) < -LIMIT))
            _store(o, bo, tl.where(late, t, hi), hi, h, H, ov, V, MV)
            X *= shrink[None, :]
            Y *= shrink[:, None]
        else:
            _store(o, bo, t, hi, h, H, ov, V, MV)
        X = tl.dot(tl.trans(bk), sw, X, input_precision=PREC)
        Y = tl.dot(tl.trans(sw), bv, Y, input_precision=PREC)
        if GATE and not ANY:  # sw holds the decay back to the chunk's start, so the shrinking comes last
            X *= shrink[None, :]
            Y *= shrink[:, None]


@triton.jit
def _grad_logits(
    q, k, v, s, g, do, states1, states2, strong, p, e, z, own, scale, cu, owner, first, T, L, PER, H, HK, part,
    GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, M: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BM: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, LIMIT: tl.constexpr, GATE: tl.constexpr,
    VARLEN: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr, ANY: tl.constexpr,
):  # fmt: skip
    """Grid NS·H: a segment and a head of q. Reads q, k, v, s, g, do, states1, states2, strong. Writes p again, and e =
    dL/d(K̃ q) = scale·p (dp - p·dp) with dp = Ṽ do; with GATE z and own.

    z: p dp + e (K̃ q) without the pair (t, t), which does not move dg; own: q·k and do·v, for ds. A launch works on the
    segments that have gates beyond LIMIT (ANY) or that have none.
    """
    MK: tl.constexpr = K != BK
    MV: tl.constexpr = V != BV
    MM: tl.constexpr = M != BM
    pid = tl.program_id(0)
    h = pid % H
    sg = (pid // H).to(tl.int64)
    hk = h // GROUP
    n, lo, hi, end = _span(sg, cu, owner, first, T, L, PER, VARLEN)
    r = tl.arange(0, C)
    ok = tl.arange(0, BK)
    ov = tl.arange(0, BV)
    om = tl.arange(0, BM)
    row = ((sg * HK + hk) * M + om)[None, :]
    X = tl.load(states1 + row * K + ok[:, None], mask=(ok < K)[:, None] & (om < M)[None, :], other=0.0)
    Y = tl.load(states2 + row * V + ov[:, None], mask=(ov < V)[:, None] & (om < M)[None, :], other=0.0)
    chunks = tl.cdiv(tl.maximum(hi - lo, 0), C).to(tl.int32)
    if GATE:
        chunks = tl.where((tl.load(strong + sg * HK + hk) < chunks) == ANY, chunks, 0)
    for c in range(chunks):
        t = lo + c * C + r
        bq = _load(q, t, hi, h, H, ok, K, MK).to(DT)
        bk = _load(k, t, hi, hk, HK, ok, K, MK).to(DT)
        bv = _load(v, t, hi, hk, HK, ov, V, MV).to(DT)
        bo = _load(do, t, hi, h, H, ov, V, MV).to(DT)
        bs = _load(s, t, hi, hk, HK, om, M, MM).to(tl.float32)
        sw = bs.to(DT)
        b, f = 0.0, 0.0
        if GATE:
            b = _gates(g, t, hi, hk, HK, om, M, MM)
            G = tl.cumsum(b, 0)
            f = tl.exp2(G)
            shrink = tl.exp2(tl.sum(b, 0))[None, :]
            w = _after(g, t, lo, c, hi, hk, HK, om, M, MM, C) if ANY else tl.exp2(-G)
            sw = (bs * w).to(DT)
        y, qk = _read(bq, bk, X, bs, sw, b, f, GATE, C, BM, LEVELS, GATE, DT, PREC, ANY)
        bp = y + qk[:, None] * bs if GATE else y
        bp, norm = _softmax(bp * scale, om, M, BM)
        bp *= norm
        x, vo = _read(bo, bv, Y, bs, sw, b, f, GATE, C, BM, LEVELS, GATE, DT, PREC, ANY)
        be = bp * (x + vo[:, None] * bs if GATE else x) * scale
        be -= bp * tl.sum(be, 1)[:, None]
        _store(p, bp, t, hi, h, H, om, M, MM)
        _store(e, be, t, hi, h, H, om, M, MM)
        if GATE:
            tl.store(own + t * H + h, qk, mask=t < hi)
            tl.store(own + part + t * H + h, vo, mask=t < hi)
            # with p and e as the other kernels will have them: what they add cancels part of this
            x = x * bp.to(DT).to(tl.float32) + y * be.to(DT).to(tl.float32)
            _store(z, x, t, hi, h, H, om, M, MM)
        if ANY:
            X *= shrink
            Y *= shrink
        X = tl.dot(tl.trans(bk), sw, X, input_precision=PREC)
        Y = tl.dot(tl.trans(bv), sw, Y, input_precision=PREC)
        if GATE and not ANY:
            X *= shrink
            Y *= shrink


@triton.jit
def _grad_kv(
    y, x, s, g, weight, z, own, states, last, dstates, strong, dx, ds_sum, dg_sum, ds, dg,
    cu, owner, first, T, L, PER, H, HK, ROW, COLUMN,
    GROUP: tl.constexpr, N: tl.constexpr, M: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, C: tl.constexpr,
    LEVELS: tl.constexpr, LIMIT: tl.constexpr, GATE: tl.constexpr, VARLEN: tl.constexpr, DT: tl.constexpr,
    PREC: tl.constexpr, SECOND: tl.constexpr, ANY: tl.constexpr,
):  # fmt: skip
    """Grid NS·HK: a segment and a head of k. One of the two states, from the last chunk to the first with its gradient
    on chip, [N, M]. x: the keys or values that this state is written with; y: the vectors that meet it; weight: of the
    slots for y. `last` has the state's element (m, n) at m·ROW + n·COLUMN. Reads y, x, s, g, weight, dstates; with GATE
    own, states, last, strong and, unless SECOND, z; SECOND: ds_sum, dg_sum. Writes dx, ds and, with GATE, dg.

    dx is made as [N, C], so that no product's result has to be transposed for another. ds and dg are sums over the two
    launches: SECOND adds those of the first. dg as in gla's kernel.
    """
    MN: tl.constexpr = N != BN
    MM: tl.constexpr = M != BM
    pid = tl.program_id(0)
    h = pid % HK
    sg = (pid // HK).to(tl.int64)
    n, lo, hi, end = _span(sg, cu, owner, first, T, L, PER, VARLEN)
    r = tl.arange(0, C)
    on = tl.arange(0, BN)
    om = tl.arange(0, BM)
    tile = ((sg * HK + h) * M + om)[None, :] * N + on[:, None]
    inside = (on < N)[:, None] & (om < M)[None, :]
    D = tl.load(dstates + tile, mask=inside, other=0.0)
    if GATE:  # the state at the segment's end: the next segment's first or the sequence's last
        more = (hi + 0 * om)[None, :] < end  # as a tensor: triton 3.9's interpreter makes a scalar's & an integer
        S = tl.load(states + HK * M * N + tile, mask=inside & more, other=0.0)
        end_state = last + (n.to(tl.int64) * HK + h) * M * N + om[None, :] * ROW + on[:, None] * COLUMN
        S += tl.load(end_state, mask=inside & ~more, other=0.0)
        carry = tl.sum(S * D, 0)
    chunks = tl.cdiv(tl.maximum(hi - lo, 0), C).to(tl.int32)
    if GATE:
        chunks = tl.where((tl.load(strong + sg * HK + h) < chunks) == ANY, chunks, 0)
    for i in range(chunks):
        c = chunks - 1 - i
        t = lo + c * C + r
        bx = _load(x, t, hi, h, HK, on, N, MN).to(DT)
        bs = _load(s, t, hi, h, HK, om, M, MM).to(tl.float32)
        sw = bs.to(DT)
        if GATE:
            b = _gates(g, t, hi, h, HK, om, M, MM)
            G = tl.cumsum(b, 0)
            f = tl.exp2(G)
            if ANY:
                w = _after(g, t, lo, c, hi, h, HK, om, M, MM, C)
            else:  # D shrinks first; all decays run from the chunk's start
                w = tl.exp2(-G)
                D *= tl.exp2(tl.sum(b, 0))[None, :]
            sw = (bs * w).to(DT)
        xs = tl.dot(bx, D.to(DT), input_precision=PREC)
        if GATE:
            xs *= w
        xx = tl.dot(D.to(DT), tl.trans(sw), input_precision=PREC)
        if ANY:
            D *= tl.exp2(tl.sum(b, 0))[None, :]
        for j in tl.range(GROUP, num_stages=1):
            hq = h * GROUP + j
            by = _load(y, t, hi, hq, H, on, N, MN).to(DT)
            bw = _load(weight, t, hi, hq, H, om, M, MM)
            if ANY:
                A = _scores_any_gate(bw, bs, b, C, BM, LEVELS, DT, PREC)
                wf = (bw.to(tl.float32) * f).to(DT)
            else:
                wf = (bw.to(tl.float32) * f).to(DT) if GATE else bw.to(DT)
                A = tl.dot(wf, tl.trans(sw), input_precision=PREC)
            xx = tl.dot(tl.trans(by), tl.where(r[:, None] >= r[None, :], A, 0.0).to(DT), xx, input_precision=PREC)
            D = tl.dot(tl.trans(by), wf, D, input_precision=PREC)
            A = tl.dot(bx, tl.trans(by), input_precision=PREC)
            A = tl.where(r[:, None] < r[None, :] if GATE else r[:, None] <= r[None, :], A, 0.0)
            if ANY:
                xs += _apply_any_gate(A, bw, b, False, C, BM, LEVELS, DT, PREC)
            elif GATE:
                xs += tl.dot(A.to(DT), wf, input_precision=PREC) * w
            else:
                xs = tl.dot(A.to(DT), wf, xs, input_precision=PREC)
        p = dx + ((t * HK + h) * N)[None, :] + on[:, None]
        tl.store(p, xx.to(dx.dtype.element_ty), mask=(t < hi)[None, :] & (on < N)[:, None])
        if GATE:
            drift = -_load(s, t, hi, h, HK, om, M, MM).to(tl.float32) * xs  # again: bs would cost registers until here
            for j in tl.range(GROUP, num_stages=1):
                hq = h * GROUP + j
                xy = tl.load(own + t * H + hq, mask=t < hi, other=0.0)
                xs += xy[:, None] * _load(weight, t, hi, hq, H, om, M, MM)
                if not SECOND:
                    drift += _load(z, t, hi, hq, H, om, M, MM)
            xg = tl.cumsum(drift, 0, reverse=True) + carry[None, :]
            carry += tl.sum(drift, 0)
            if SECOND:
                xg += _load(dg_sum, t, hi, h, HK, om, M, MM)
            if ANY:  # below -150 exp2 is 0, and so is the gradient
                xg = tl.where(b < -150.0, 0.0, xg)
            _store(dg, xg, t, hi, h, HK, om, M, MM)
        if SECOND:
            xs += _load(ds_sum, t, hi, h, HK, om, M, MM)
        _store(ds, xs, t, hi, h, HK, om, M, MM)


@triton.jit
def _step(
    q, k, v, s, g, keys, values, o, scale,
    GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, M: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BM: tl.constexpr, BG: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """Grid B·HK: a batch row and a head of k with its GROUP queries. Reads q, k, v, s, g, which have no T here. Updates
    keys [B, HK, K, M] and values [B, HK, M, V] in place, writes o. It takes BM slots at a time, so the softmax is a
    running one."""
    n = tl.program_id(0).to(tl.int64)
    ok = tl.arange(0, BK)
    ov = tl.arange(0, BV)
    og = tl.arange(0, BG)
    bk = tl.load(k + n * K + ok, mask=ok < K, other=0.0).to(tl.float32)
    bv = tl.load(v + n * V + ov, mask=ov < V, other=0.0).to(tl.float32)
    top = tl.full([BG], float("-inf"), tl.float32)
    norm = tl.zeros([BG], tl.float32)
    sums = tl.zeros([BG, BV], tl.float32)
    for m in range(0, M, BM):
        om = m + tl.arange(0, BM)
        bs = tl.load(s + n * M + om, mask=om < M, other=0.0).to(tl.float32)
        px = keys + n * K * M + ok[:, None] * M + om[None, :]
        py = values + n * M * V + om[:, None] * V + ov[None, :]
        mx = (ok < K)[:, None] & (om < M)[None, :]
        my = (om < M)[:, None] & (ov < V)[None, :]
        X = tl.load(px, mask=mx, other=0.0)
        Y = tl.load(py, mask=my, other=0.0)
        if GATE:
            f = tl.exp(tl.load(g + n * M + om, mask=om < M, other=0.0).to(tl.float32))
            X *= f[None, :]
            Y *= f[:, None]
        X += bk[:, None] * bs[None, :]
        Y += bs[:, None] * bv[None, :]
        tl.store(px, X, mask=mx)
        tl.store(py, Y, mask=my)
        for j in tl.range(GROUP, num_stages=1):
            bq = tl.load(q + (n * GROUP + j) * K + ok, mask=ok < K, other=0.0).to(tl.float32) * scale
            z = tl.where(om < M, tl.sum(X * bq[:, None], 0), float("-inf"))
            mine = og == j
            new = tl.where(mine, tl.maximum(top, tl.max(z, 0)), top)
            e = tl.exp(z - tl.max(tl.where(mine, new, float("-inf")), 0))
            old = tl.where(mine, tl.exp(top - new), 1.0)
            norm = norm * old + tl.where(mine, tl.sum(e, 0), 0.0)
            sums = sums * old[:, None] + tl.where(mine[:, None], tl.sum(e[:, None] * Y, 0)[None, :], 0.0)
            top = new
    p = o + (n * GROUP + og[:, None]) * V + ov[None, :]
    tl.store(p, (sums / norm[:, None]).to(o.dtype.element_ty), mask=(og < GROUP)[:, None] & (ov < V)[None, :])
