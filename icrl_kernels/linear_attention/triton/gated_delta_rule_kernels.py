"""Triton kernels of the gated delta rule: S' = diag(exp g_t) S, u_t = beta_t (v_t − S'ᵀ k_t), S = S' + k_t u_tᵀ, o_t = scale·Sᵀ q_t.

Symbols. Tensors are contiguous, and float32 unless a dtype is named; io is that of q, k and v; DT is the products'.
Grids run fastest over their last factor.
  B, T, N         rows; tokens of a row (packed: B = 1, T of all sequences); sequences (N = B unless packed)
  H, HK, GROUP    heads of v, g, beta, o and the states; heads of q and k; H / HK
  K, V            channels of q and k; of v and o: 1 to 512; 1 to 4096
  PER, NC, C      chunks of a sequence (packed: 0); of the batch (packed: at most); tokens of a chunk: 16, 32 or 64
  PARTS, L        parts that each sequence is cut into (packed: 1); tokens of a part
  q, k            io [B, T, HK, K]
  v, o, do        io [B, T, H, V]
  g               io or float32, logarithms of decays: GATE 1 [B, T, H], GATE 2 [B, T, H, K], else None
  beta            io or float32 [B, T, H]; None without BETA: 1
  cu              int32 or int64 [N + 1], first token of each sequence; cu, owner and first are None unless packed
  owner, first    int64 [NC], the sequence of each chunk; int64 [N + 1], the first chunk of each sequence
  solve, scores   DT [NC, H, C, C]: (I + N)^-1 and A, below
  rows            [NC, H, 3, C]: factors of the rows of (P q) S, of (P k) S and of k eᵀ
  norms           [B, T, H, 2]: 1/|q| and 1/|k|; None without NORM
  decay           product of a chunk's decays: GATE 1 [NC, H, 1], GATE 2 [NC, H, K], else None
  strong          int32 [NC, H], whether gates go beyond LIMIT; GATE 2, else None
  qd, kd, ku      GATE 2: DT [B, T, H, K], q and k decayed from the chunk's start, k to its end; else q, k and k, which
                  `_prepare` does not write. `_forward` and `_reverse` name the first q
  HX, GROUP       in these two: heads of q, kd and ku, and H / HX: H and 1 with GATE 2, else HK and H / HK
  init, last      [N, PARTS, H, K, V], the state before and after each part; init is read with HAS_INIT
  dlast, dinit    [N, PARTS, H, K, V], the gradients of last (None: zeros) and of init
  e, dr           DT [B, T, H, V], below; None: not wanted
  states          DT [NC, H, V, K], the state that each chunk begins with, transposed; None: not wanted
  dstates         DT [NC, H, V, K], the gradient of the state that each chunk ends with, transposed; None: not wanted
  dq, dk          `_gradients`: [B, T, H, K], before the norm and a sum over the heads that share q and k; or the op's
                  own gradients in io, if GROUP is 1 without NORM
  dg              GATE 2: [B, T, H, K] in g's dtype; GATE 1: [B, T, H, ceil(K/BK)], summed by the launcher; else None
  dbeta           [B, T, H, ceil(K/BK)], summed by the launcher; None without BETA
  x, dx, out      `_gather_heads`: io [B, T, HK, K], q or k; [B, T, H, K]; the gradient, like x
  tokens, BT      B·T; tokens of a program of `_gather_heads`
  state, scale    [B, H, K, V], `_step`'s; float
  BK, BV          channels of a program's tile, powers of two of at least 16
  LEVELS, LIMIT   log2 C; in bits, 16 for float32, else 100
  DT, PREC        products' operands: bfloat16 for bfloat16, else float32; "tf32x3" for float32, else "tf32"
  GATE, VARLEN    0 none, 1 per head, 2 per channel; whether the batch is packed
  BETA, NORM      whether there is a beta; whether q and k are normalised
  HAS_INIT        whether there is an init
  TRANSFER        whether `_forward` finds M of a part, below. WHICH: 0 for q, 1 for k
  ANY             whether this is the second launch, for strong gates
  t, hi, h, r, o, MASK: as in common.py. ok, ov: numbers of the tile's channels. The rest: at the device functions

In a chunk of C tokens that begins with state S, with P_i the product of exp g over its tokens up to i and e = u / beta,
  N_ij = beta_j k_i·(P_i / P_j) k_j  (j < i),         e = (I + N)^-1 (v − (P k) S),
  A_ij = scale beta_j q_i·(P_i / P_j) k_j  (j <= i),  o = scale (P q) S + A e,
  S   <- P_C S + sum_j (P_C / P_j) beta_j k_j e_jᵀ.
1. `_prepare`, all chunks at once: (I + N)^-1 and A, written as two [C, C] matrices, and the decays that the rest needs. For a
   gate per channel the three decayed copies of q and k are written too.
2. `_forward`, chunk after chunk for each (sequence, head, columns of V), with Sᵀ on chip: no state goes to memory. The
   state is kept transposed, so that each product's result is the left operand of the next and stays in registers.
   Where these are too few for the chip, sequences are cut into parts. A part takes a state S to M S + R: M and R come
   of two such launches, the states between the parts of a few small products, then each part goes on its own.
The backward does 1, then 2 to save what the gradients read: e and each chunk's first state; `_reverse` the same from the
end, for the state's gradient D and dr = d(v − (P k) S) = dv; and `_gradients`, all chunks at once, the rest from these.
A key of column role occurs as beta_j k_j only, so that one gradient Y of it gives dk's part beta Y and dbeta = k·Y.

Gates are treated as in common.py: sums local to a chunk, in log2, right for any gates, -inf included. All decays
outside of N and A are those from the chunk's start or to its end, at most 1.

A NaN or infinity in v, or a NaN in k, g or beta, may also reach the up to 63 rows before it in its chunk: 0·NaN is NaN.

The inverse is by substitution in blocks of 16 and then by doubling them, in three TF32 products: powers of N would grow
beyond all digits where keys repeat. No atomics: the same bits each run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from icrl_kernels.linear_attention.triton.common import (
    _after,
    _apply_any_gate,
    _decay,
    _gates,
    _load,
    _rows,
    _scalar_gates,
    _scores_any_gate,
    _span,
    _store,
)

NORM_EPSILON = tl.constexpr(1e-6)  # as L2_EPSILON in gated_delta_rule.py
BLOCK = tl.constexpr(16)


@triton.jit
def _join(X, N, B: tl.constexpr, C: tl.constexpr):
    """Of X, the inverses of the diagonal blocks of B rows of I + N, [C/B, B, B], those of 2B, [C/2B, 2B, 2B]: [[X, 0],
    [-Y L X, Y]]."""
    H: tl.constexpr = C // (2 * B)
    half = tl.arange(0, 2)
    p = tl.arange(0, H)
    mine = p[:, None, None, None] == p[None, None, :, None]
    L = tl.sum(tl.where(mine, tl.reshape(N, [H, 2 * B, H, 2 * B]), 0.0), 2)
    corner = (half[:, None, None, None] == 1) & (half[None, None, :, None] == 0)
    L = tl.sum(tl.sum(tl.where(corner[None], tl.reshape(L, [H, 2, B, 2, B]), 0.0), 3), 1)
    Z = tl.reshape(X, [H, 2, B, B])
    upper = tl.sum(tl.where(half[None, :, None, None] == 0, Z, 0.0), 1)
    lower = tl.sum(tl.where(half[None, :, None, None] == 1, Z, 0.0), 1)
    Y = tl.dot(tl.dot(lower, L, input_precision="tf32x3"), upper, input_precision="tf32x3")
    equal = (half[:, None, None, None] == half[None, None, :, None])[None]
    below = tl.where(corner[None], -Y[:, None, :, None, :], 0.0)
    return tl.reshape(tl.where(equal, Z[:, :, :, None, :], below), [H, 2 * B, 2 * B])


@triton.jit
def _inverse(N, C: tl.constexpr):
    """(I + N)^-1 of a strictly lower triangular N [C, C]."""
    B: tl.constexpr = C // BLOCK
    p = tl.arange(0, B)
    r = tl.arange(0, BLOCK)
    mine = p[:, None, None, None] == p[None, None, :, None]
    D = tl.sum(tl.where(mine, tl.reshape(N, [B, BLOCK, B, BLOCK]), 0.0), 2)
    i, j = r[None, :, None], r[None, None, :]
    X = tl.where((i == j) & (p[:, None, None] >= 0), 1.0, 0.0)
    for at in range(BLOCK - 1):
        column = tl.sum(tl.where(j == at, D, 0.0), 2)
        row = tl.sum(tl.where(i == at, X, 0.0), 1)
        X -= column[:, :, None] * row[:, None, :]
    if C > 16:
        X = _join(X, N, 16, C)
    if C > 32:
        X = _join(X, N, 32, C)
    return tl.reshape(X, [C, C])


@triton.jit
def _weights(beta, t, hi, h, H, BETA: tl.constexpr):
    """Reads beta: float32 [C] of rows t of head h, 1 without BETA; zero from hi on."""
    if BETA:
        return tl.load(beta + t * H + h, mask=t < hi, other=0.0).to(tl.float32)
    return tl.where(t < hi, 1.0, 0.0)


@triton.jit
def _prepare(
    q, k, g, beta, solve, scores, rows, norms, decay, strong, qd, kd, ku, scale, cu, owner, first, T, PER, H, HK,
    GROUP: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    LIMIT: tl.constexpr, GATE: tl.constexpr, BETA: tl.constexpr, NORM: tl.constexpr, VARLEN: tl.constexpr,
    DT: tl.constexpr, PREC: tl.constexpr, ANY: tl.constexpr,
):  # fmt: skip
    """Grid NC·H: a chunk and a head. Reads q, k, g, beta. Writes solve, scores, norms, rows, decay, strong and, for a
    gate per channel, qd, kd, ku.

    The decays are in rows for a gate per head; for one per channel they are in qd, kd and ku. There the rows of the two
    matrices whose gates reach beyond LIMIT are left to a second launch, ANY, of the chunks marked as strong.
    """
    MK: tl.constexpr = K % BK != 0
    pid = tl.program_id(0)
    h = pid % H
    hk = h // GROUP
    s = (pid // H).to(tl.int64)
    if ANY:  # noqa: SIM102 (ANY is decided when compiling)
        if tl.load(strong + s * H + h) == 0:
            return
    n, lo, hi, end = _span(s, cu, owner, first, T, C, PER, VARLEN)
    r = tl.arange(0, C)
    t = lo + r
    late = r < 0
    N = tl.zeros([C, C], tl.float32)
    A = tl.zeros([C, C], tl.float32)
    squares_q = tl.zeros([C], tl.float32)
    squares_k = tl.zeros([C], tl.float32)
    for i in range((K + BK - 1) // BK):
        ok = i * BK + tl.arange(0, BK)
        bq = _load(q, t, hi, hk, HK, ok, K, MK)
        bk = _load(k, t, hi, hk, HK, ok, K, MK)
        if NORM:
            squares_q += tl.sum(bq.to(tl.float32) * bq.to(tl.float32), 1)
            squares_k += tl.sum(bk.to(tl.float32) * bk.to(tl.float32), 1)
        if GATE == 2:
            b = _gates(g, t, hi, h, H, ok, K, MK)
            G = tl.cumsum(b, 0)
            late = late | (tl.min(G, 1) < -LIMIT)
            if ANY:
                N += _scores_any_gate(bk, bk, b, C, BK, LEVELS, DT, PREC)
                A += _scores_any_gate(bq, bk, b, C, BK, LEVELS, DT, PREC)
            else:
                kw = tl.trans((bk.to(tl.float32) * tl.exp2(-G)).to(DT))
                x = (bk.to(tl.float32) * tl.exp2(G)).to(DT)
                _store(kd, x, t, hi, h, H, ok, K, MK)
                N = tl.dot(x, kw, N, input_precision=PREC)
                x = (bq.to(tl.float32) * tl.exp2(G)).to(DT)
                _store(qd, x, t, hi, h, H, ok, K, MK)
                A = tl.dot(x, kw, A, input_precision=PREC)
                after = _after(g, t, lo, 0, hi, h, H, ok, K, MK, C)
                _store(ku, bk.to(tl.float32) * after, t, hi, h, H, ok, K, MK)
                tl.store(decay + (s * H + h) * K + ok, tl.exp2(tl.sum(b, 0)), mask=ok < K)
        else:
            bk = bk.to(DT)
            N = tl.dot(bk, tl.trans(bk), N, input_precision=PREC)
            A = tl.dot(bq.to(DT), tl.trans(bk), A, input_precision=PREC)
    late = tl.cumsum(late.to(tl.int32), 0) > 0  # the rows after a late one read it through the inverse
    of_q = tl.full([C], 1.0, tl.float32)
    of_k = tl.full([C], 1.0, tl.float32)
    if NORM:
        of_q = tl.rsqrt(squares_q + NORM_EPSILON)
        of_k = tl.rsqrt(squares_k + NORM_EPSILON)
        if not ANY:
            tl.store(norms + (t * H + h) * 2, of_q, mask=t < hi)
            tl.store(norms + (t * H + h) * 2 + 1, of_k, mask=t < hi)
    column = _weights(beta, t, hi, h, H, BETA) * of_k
    causal = r[:, None] >= r[None, :]
    N *= of_k[:, None] * column[None, :]
    A *= (of_q * scale)[:, None] * column[None, :]
    if GATE == 1:
        coarse, fine, coarse_end, fine_end = _scalar_gates(g, t, hi, h, H)
        pair = (coarse[:, None] - coarse[None, :]) + (fine[:, None] - fine[None, :])
        pair = tl.exp2(tl.where(causal, pair, 0.0))
        N *= pair
        A *= pair
        since = _decay(coarse, fine)
        of_q *= since
        of_k *= since
        column *= _decay(coarse_end - coarse, fine_end - fine)
        tl.store(decay + s * H + h, _decay(coarse_end, fine_end))
    if not ANY:
        p = rows + (s * H + h) * 3 * C + r
        tl.store(p, of_q * scale)
        tl.store(p + C, of_k)
        tl.store(p + 2 * C, column)
    mine = late if ANY else ~late
    if GATE == 2 and not ANY:
        tl.store(strong + s * H + h, tl.max(late.to(tl.int32), 0))
        causal = causal & mine[:, None]  # the other rows are NaN where 0 meets infinity
    square = (s * H + h) * C * C + r[:, None] * C + r[None, :]
    tl.store(scores + square, tl.where(causal, A, 0.0).to(scores.dtype.element_ty), mask=mine[:, None])
    X = _inverse(tl.where(causal & (r[:, None] != r[None, :]), N, 0.0), C)
    tl.store(solve + square, X.to(solve.dtype.element_ty), mask=mine[:, None])


@triton.jit
def _sequence(n, cu, first, T, PER, L, PARTS, C: tl.constexpr, VARLEN: tl.constexpr):
    """First token, end token, first chunk and number of chunks of sequence n, or of the n-th of their parts of L tokens."""
    if VARLEN:
        lo = tl.load(cu + n).to(tl.int64)
        hi = tl.load(cu + n + 1).to(tl.int64)
        s = tl.load(first + n)
    else:
        lo = n // PARTS * T + n % PARTS * L
        hi = tl.minimum(lo + L, n // PARTS * T + T)
        s = n // PARTS * PER + n % PARTS * (L // C)
    return lo, hi, s, tl.cdiv(tl.maximum(hi - lo, 0), C).to(tl.int32)


@triton.jit
def _turned(x, t, left, h, H, r, o, D: tl.constexpr, MASK: tl.constexpr):
    """As `_rows` transposed, for tokens t + r with r < left: pointers [D's tile, C], and which of them are there."""
    m = (r < left)[None, :]
    if MASK:
        m = m & (o < D)[:, None]
    return x + (t * H + h) * D + (r * (H * D))[None, :] + o[:, None], m


@triton.jit
def _shrink(decay, c, ok, K: tl.constexpr, GATE: tl.constexpr):
    """Reads decay: what the gates of chunk and head c (chunk·H + head) do to the transposed state: [1, BK], a number,
    or 1."""
    if GATE == 2:
        shrink = tl.load(decay + c * K + ok, mask=ok < K, other=0.0)[None, :]
    elif GATE == 1:
        shrink = tl.load(decay + c)
    else:
        shrink = 1.0
    return shrink


@triton.jit
def _forward(
    q, kd, ku, v, solve, scores, rows, decay, init, last, o, e, states, cu, first, T, PER, L, PARTS, H, HX,
    GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    GATE: tl.constexpr, HAS_INIT: tl.constexpr, TRANSFER: tl.constexpr, VARLEN: tl.constexpr,
    DT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Grid N·PARTS·H·ceil(V/BV): a part of a sequence, a head, all of K and BV of V. Reads q, kd, ku, v, solve, scores,
    rows, decay, init. Writes last; o unless None; e and states unless None.

    TRANSFER: of the identity as initial state and no values (v is None, V is K), so that last = M, where a state S
    comes out as M S + ..
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    MK: tl.constexpr = K != BK
    MV: tl.constexpr = V % BV != 0
    pid = tl.program_id(0)
    ov = (pid % NV) * BV + tl.arange(0, BV)
    h = (pid // NV) % H
    hx = h // GROUP
    n = (pid // NV // H).to(tl.int64)
    lo, hi, s, chunks = _sequence(n, cu, first, T, PER, L, PARTS, C, VARLEN)
    ok = tl.arange(0, BK)
    r = tl.arange(0, C)
    square = r[:, None] * C + r[None, :]
    inside = (ok < K)[None, :] & (ov < V)[:, None]
    turned = (n * H + h) * K * V + ok[None, :] * V + ov[:, None]
    S = tl.zeros([BV, BK], tl.float32)
    if HAS_INIT:
        S = tl.load(init + turned, mask=inside, other=0.0)
    if TRANSFER:
        S = tl.where(ok[None, :] == ov[:, None], 1.0, 0.0)
    for i in range(chunks):
        t = lo + i * C
        left = tl.minimum(hi - t, C).to(tl.int32)
        c = (s + i) * H + h
        p = rows + c * 3 * C + r
        before = S.to(DT)
        bk = _rows(kd, t, r, left, hx, HX, ok, K, MK).to(DT)
        y = tl.dot(before, tl.trans(bk), input_precision=PREC)
        y *= tl.load(p + C)[None, :]
        if TRANSFER:
            y = -y
        else:
            at, mv = _turned(v, t, left, h, H, r, ov, V, MV)
            y = tl.load(at, mask=mv, other=0.0).to(tl.float32) - y
        y = tl.dot(y.to(DT), tl.trans(tl.load(solve + c * C * C + square)), input_precision=PREC).to(DT)
        if o is not None:
            bq = _rows(q, t, r, left, hx, HX, ok, K, MK).to(DT)
            bo = tl.dot(before, tl.trans(bq), input_precision=PREC) * tl.load(p)[None, :]
            bo = tl.dot(y, tl.trans(tl.load(scores + c * C * C + square)), bo, input_precision=PREC)
            at, mv = _turned(o, t, left, h, H, r, ov, V, MV)
            tl.store(at, bo.to(o.dtype.element_ty), mask=mv)
        if states is not None:
            tl.store(states + c * K * V + (ov[:, None] * K + ok[None, :]), before, mask=inside)
            at, mv = _turned(e, t, left, h, H, r, ov, V, MV)
            tl.store(at, y.to(e.dtype.element_ty), mask=mv)
        if GATE == 2:
            bk = _rows(ku, t, r, left, hx, HX, ok, K, MK).to(DT)
        S *= _shrink(decay, c, ok, K, GATE)
        S = tl.dot((y.to(tl.float32) * tl.load(p + 2 * C)[None, :]).to(DT), bk, S, input_precision=PREC)
    tl.store(last + turned, S, mask=inside)


@triton.jit
def _reverse(
    q, kd, ku, do, solve, scores, rows, decay, dlast, dinit, dr, dstates, cu, first, T, PER, L, PARTS, H, HX,
    GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    GATE: tl.constexpr, VARLEN: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Grid N·PARTS·H·ceil(V/BV), as `_forward`, from the last chunk to the first. Reads q, kd, ku, do, solve, scores,
    rows, decay, dlast. Writes dinit, the gradient D of the first state; dr and dstates, D of the states that chunks end
    with, unless None. Without dlast, D of the last state is 0."""
    NV: tl.constexpr = (V + BV - 1) // BV
    MK: tl.constexpr = K != BK
    MV: tl.constexpr = V % BV != 0
    pid = tl.program_id(0)
    ov = (pid % NV) * BV + tl.arange(0, BV)
    h = (pid // NV) % H
    hx = h // GROUP
    n = (pid // NV // H).to(tl.int64)
    lo, hi, s, chunks = _sequence(n, cu, first, T, PER, L, PARTS, C, VARLEN)
    ok = tl.arange(0, BK)
    r = tl.arange(0, C)
    square = r[:, None] * C + r[None, :]
    inside = (ok < K)[None, :] & (ov < V)[:, None]
    turned = (n * H + h) * K * V + ok[None, :] * V + ov[:, None]
    D = tl.zeros([BV, BK], tl.float32)
    if dlast is not None:
        D = tl.load(dlast + turned, mask=inside, other=0.0)
    for j in range(chunks):
        i = chunks - 1 - j
        t = lo + i * C
        left = tl.minimum(hi - t, C).to(tl.int32)
        c = (s + i) * H + h
        p = rows + c * 3 * C + r
        after = D.to(DT)
        if dstates is not None:
            tl.store(dstates + c * K * V + (ov[:, None] * K + ok[None, :]), after, mask=inside)
        bk = _rows(ku, t, r, left, hx, HX, ok, K, MK).to(DT)
        y = tl.dot(after, tl.trans(bk), input_precision=PREC) * tl.load(p + 2 * C)[None, :]
        at, mv = _turned(do, t, left, h, H, r, ov, V, MV)
        bo = tl.load(at, mask=mv, other=0.0).to(DT)
        y = tl.dot(bo, tl.load(scores + c * C * C + square), y, input_precision=PREC)
        D *= _shrink(decay, c, ok, K, GATE)
        bq = _rows(q, t, r, left, hx, HX, ok, K, MK).to(DT)
        D = tl.dot((bo.to(tl.float32) * tl.load(p)[None, :]).to(DT), bq, D, input_precision=PREC)
        y = tl.dot(y.to(DT), tl.load(solve + c * C * C + square), input_precision=PREC)
        if dr is not None:
            at, mv = _turned(dr, t, left, h, H, r, ov, V, MV)
            tl.store(at, y.to(dr.dtype.element_ty), mask=mv)
        if GATE == 2:
            bk = _rows(kd, t, r, left, hx, HX, ok, K, MK).to(DT)
        D = tl.dot((y * -tl.load(p + C)[None, :]).to(DT), bk, D, input_precision=PREC)
    tl.store(dinit + turned, D, mask=inside)


@triton.jit
def _decayed(
    W, y, b, G, TO_UPPER: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, LEVELS: tl.constexpr, DT: tl.constexpr,
    PREC: tl.constexpr, ANY: tl.constexpr,
):  # fmt: skip
    """out_r = sum_c W_rc 2^(gates between) y_c per channel; TO_UPPER: over c < r, else over c > r. W [C, C], y [C, BK],
    b: gates in log2 [C, BK], G: their sums from the chunk's start [C, BK], used unless ANY."""
    if ANY:
        out = _apply_any_gate(W, y, b, TO_UPPER, C, BK, LEVELS, DT, PREC)
    else:
        r = tl.arange(0, C)
        if TO_UPPER:
            f = tl.exp2(G)
            W = tl.where(r[:, None] > r[None, :], W, 0.0)
        else:
            f = tl.exp2(-G)
            W = tl.where(r[:, None] < r[None, :], W, 0.0)
        out = tl.dot(W.to(DT), (y / f).to(DT), input_precision=PREC) * f
    return out


@triton.jit
def _gradients(
    q, k, g, beta, do, e, dr, norms, strong, states, dstates, dq, dk, dg, dbeta, scale, cu, owner, first, T, PER, H, HK,
    GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    LEVELS: tl.constexpr, GATE: tl.constexpr, BETA: tl.constexpr,
    NORM: tl.constexpr, VARLEN: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr, ANY: tl.constexpr,
):  # fmt: skip
    """Grid NC·H·ceil(K/BK): a chunk, a head and BK of the K channels. Reads q, k, g, beta, do, e, dr, norms, strong,
    states, dstates. Writes dq and dk, the gradients of (normalised) q and k, and its parts of dbeta and dg.

    dg_t sums what decays over t: the rows from t on of what they read from the state and from earlier rows, and the
    columns before t of what they write to the state, each as it is; pairs within the chunk as the difference of sums.
    """
    NK: tl.constexpr = (K + BK - 1) // BK
    MK: tl.constexpr = K % BK != 0
    MV: tl.constexpr = V % BV != 0
    pid = tl.program_id(0)
    ik = pid % NK
    h = (pid // NK) % H
    hk = h // GROUP
    s = (pid // NK // H).to(tl.int64)
    if GATE == 2:  # noqa: SIM102
        if (tl.load(strong + s * H + h) > 0) != ANY:
            return
    n, lo, hi, end = _span(s, cu, owner, first, T, C, PER, VARLEN)
    r = tl.arange(0, C)
    t = lo + r
    ok = ik * BK + tl.arange(0, BK)
    lower = r[:, None] > r[None, :]
    upper = r[:, None] < r[None, :]
    state = (s * H + h) * K * V + ok[None, :]

    # As rows: q and k read the state, and the columns before them
    W = tl.zeros([C, C], tl.float32)
    M = tl.zeros([C, C], tl.float32)
    xq = tl.zeros([C, BK], tl.float32)
    xk = tl.zeros([C, BK], tl.float32)
    for iv in range((V + BV - 1) // BV):
        ov = iv * BV + tl.arange(0, BV)
        bo = _load(do, t, hi, h, H, ov, V, MV).to(DT)
        br = _load(dr, t, hi, h, H, ov, V, MV)
        be = _load(e, t, hi, h, H, ov, V, MV)
        S = tl.load(states + state + ov[:, None] * K, mask=(ok < K)[None, :] & (ov < V)[:, None], other=0.0)
        W = tl.dot(bo, tl.trans(be), W, input_precision=PREC)
        M = tl.dot(br, tl.trans(be), M, input_precision=PREC)
        xq = tl.dot(bo, S, xq, input_precision=PREC)
        xk = tl.dot(br, S, xk, input_precision=PREC)
    bq = _load(q, t, hi, hk, HK, ok, K, MK).to(tl.float32)
    bk = _load(k, t, hi, hk, HK, ok, K, MK).to(tl.float32)
    if NORM:
        bq *= tl.load(norms + (t * H + h) * 2, mask=t < hi, other=0.0)[:, None]
        bk *= tl.load(norms + (t * H + h) * 2 + 1, mask=t < hi, other=0.0)[:, None]
    weight = _weights(beta, t, hi, h, H, BETA)[:, None]
    own = tl.sum(tl.where(r[:, None] == r[None, :], W, 0.0), 1)[:, None] * scale
    if GATE == 2:
        b = _gates(g, t, hi, h, H, ok, K, MK)
        G = tl.cumsum(b, 0)
        since = tl.exp2(G)
        xq = xq * since + _decayed(W, bk * weight, b, G, True, C, BK, LEVELS, DT, PREC, ANY)
        xk = xk * since + _decayed(M, bk * weight, b, G, True, C, BK, LEVELS, DT, PREC, ANY)
    else:
        if GATE == 1:
            coarse, fine, coarse_end, fine_end = _scalar_gates(g, t, hi, h, H)
            pair = (coarse[:, None] - coarse[None, :]) + (fine[:, None] - fine[None, :])
            pair = tl.exp2(tl.where(lower, pair, 0.0))
            W *= pair
            M *= pair
            xq *= _decay(coarse, fine)[:, None]
            xk *= _decay(coarse, fine)[:, None]
        kb = (bk * weight).to(DT)
        xq = tl.dot(tl.where(lower, W, 0.0).to(DT), kb, xq, input_precision=PREC)
        xk = tl.dot(tl.where(lower, M, 0.0).to(DT), kb, xk, input_precision=PREC)
    xq *= scale
    drift = bq * xq - bk * xk
    if GATE == 1:
        drift = tl.sum(drift, 1)
    _store(dq, xq + own * weight * bk, t, hi, h, H, ok, K, MK)

    # As columns: beta k writes to the state, and the rows after it read it
    W = tl.zeros([C, C], tl.float32)
    M = tl.zeros([C, C], tl.float32)
    Y = tl.zeros([C, BK], tl.float32)
    through = tl.zeros([BK], tl.float32)
    for iv in range((V + BV - 1) // BV):
        ov = iv * BV + tl.arange(0, BV)
        bo = _load(do, t, hi, h, H, ov, V, MV).to(DT)
        br = _load(dr, t, hi, h, H, ov, V, MV)
        be = _load(e, t, hi, h, H, ov, V, MV)
        inside = (ok < K)[None, :] & (ov < V)[:, None]
        D = tl.load(dstates + state + ov[:, None] * K, mask=inside, other=0.0)
        W = tl.dot(be, tl.trans(bo), W, input_precision=PREC)
        M = tl.dot(be, tl.trans(br), M, input_precision=PREC)
        Y = tl.dot(be, D, Y, input_precision=PREC)
        if GATE > 0:
            S = tl.load(states + state + ov[:, None] * K, mask=inside, other=0.0)
            through += tl.sum(S.to(tl.float32) * D.to(tl.float32), 0)
    if GATE == 2:  # read once more: in registers all the while it would drive others out
        b = _gates(g, t, hi, h, H, ok, K, MK)
        G = tl.cumsum(b, 0)
        Y *= _after(g, t, lo, 0, hi, h, H, ok, K, MK, C)
        inner = _decayed(W, bq * scale, b, G, False, C, BK, LEVELS, DT, PREC, ANY)
        inner -= _decayed(M, bk, b, G, False, C, BK, LEVELS, DT, PREC, ANY)
    else:
        if GATE == 1:
            coarse, fine, coarse_end, fine_end = _scalar_gates(g, t, hi, h, H)
            Y *= _decay(coarse_end - coarse, fine_end - fine)[:, None]
            pair = (coarse[None, :] - coarse[:, None]) + (fine[None, :] - fine[:, None])
            pair = tl.exp2(tl.where(upper, pair, 0.0))
            W *= pair
            M *= pair
        inner = tl.dot(tl.where(upper, W, 0.0).to(DT), (bq * scale).to(DT), input_precision=PREC)
        inner -= tl.dot(tl.where(upper, M, 0.0).to(DT), bk.to(DT), input_precision=PREC)
    if GATE == 2:
        through *= tl.exp2(tl.sum(b, 0))
        drift -= bk * weight * inner
        written = tl.gather(bk * weight * Y, tl.broadcast_to(tl.maximum(r - 1, 0)[:, None], [C, BK]), 0)
        written = tl.where(r[:, None] > 0, written, 0.0)
        xg = tl.cumsum(drift, 0, reverse=True) + tl.cumsum(written, 0) + through[None, :]
        # below -150 exp2 is 0, and so is the gradient
        _store(dg, tl.where(b < -150.0, 0.0, xg), t, hi, h, H, ok, K, MK)
    elif GATE == 1:
        drift -= tl.sum(bk * weight * inner, 1)
        written = tl.sum(bk * weight * Y, 1)
        xg = tl.cumsum(drift, 0, reverse=True) + tl.sum(tl.where(lower, written[None, :], 0.0), 1)
        xg += tl.sum(through, 0) * _decay(coarse_end, fine_end)
        own_gate = tl.load(g + t * H + h, mask=t < hi, other=0.0).to(tl.float32)
        tl.store(dg + (t * H + h) * NK + ik, tl.where(own_gate < -104.0, 0.0, xg), mask=t < hi)
    Y += inner + own * bq
    if BETA:
        tl.store(dbeta + (t * H + h) * NK + ik, tl.sum(bk * Y, 1), mask=t < hi)
    _store(dk, weight * Y - xk, t, hi, h, H, ok, K, MK)


@triton.jit
def _gather_heads(
    x, dx, norms, out, tokens, H, HK,
    GROUP: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, WHICH: tl.constexpr, NORM: tl.constexpr,
    BT: tl.constexpr,
):  # fmt: skip
    """Grid ceil(B·T/BT)·HK: BT tokens and a head of q and k. Reads x, dx, norms. Writes out, the gradient of q or k:
    those of the value heads that read it, summed in order, then through the norm."""
    MK: tl.constexpr = K != BK
    pid = tl.program_id(0)
    hk = pid % HK
    t = (pid // HK).to(tl.int64) * BT + tl.arange(0, BT)
    ok = tl.arange(0, BK)
    y = tl.zeros([BT, BK], tl.float32)
    for j in range(GROUP):
        y += _load(dx, t, tokens, hk * GROUP + j, H, ok, K, MK)
    if NORM:
        by = tl.load(norms + (t * H + hk * GROUP) * 2 + WHICH, mask=t < tokens, other=0.0)[:, None]
        bx = _load(x, t, tokens, hk, HK, ok, K, MK).to(tl.float32) * by
        y = (y - bx * tl.sum(bx * y, 1)[:, None]) * by
    _store(out, y, t, tokens, hk, HK, ok, K, MK)


@triton.jit
def _step(
    q, k, v, g, beta, state, o, scale, H,
    GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr,
    BETA: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Grid B·H·ceil(V/BV): a row, a value head, all of K and BV of V. Reads q, k, v, g, beta, which have no T here.
    Updates state in place, writes o. H is not used."""
    NV: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    n = (pid // NV).to(tl.int64)  # batch row and value head
    nk = n // GROUP
    ok = tl.arange(0, BK)
    ov = (pid % NV) * BV + tl.arange(0, BV)
    m = (ok < K)[:, None] & (ov < V)[None, :]
    p = state + n * K * V + ok[:, None] * V + ov[None, :]
    S = tl.load(p, mask=m, other=0.0)
    bq = tl.load(q + nk * K + ok, mask=ok < K, other=0.0).to(tl.float32)
    bk = tl.load(k + nk * K + ok, mask=ok < K, other=0.0).to(tl.float32)
    bv = tl.load(v + n * V + ov, mask=ov < V, other=0.0).to(tl.float32)
    if NORM:
        bq *= tl.rsqrt(tl.sum(bq * bq, 0) + NORM_EPSILON)
        bk *= tl.rsqrt(tl.sum(bk * bk, 0) + NORM_EPSILON)
    if GATE == 2:
        S *= tl.exp(tl.load(g + n * K + ok, mask=ok < K, other=0.0).to(tl.float32))[:, None]
    elif GATE == 1:
        S *= tl.exp(tl.load(g + n).to(tl.float32))
    e = bv - tl.sum(S * bk[:, None], 0)
    if BETA:
        e *= tl.load(beta + n).to(tl.float32)
    S += bk[:, None] * e[None, :]
    tl.store(p, S, mask=m)
    tl.store(o + n * V + ov, (tl.sum(S * bq[:, None], 0) * scale).to(o.dtype.element_ty), mask=ov < V)
