"""Device functions that the Triton kernels of the linear-attention ops share: spans of ragged batches, masked loads
and stores with 64-bit offsets, and decays within a chunk. None of them is launched: there are no grids here.

Symbols. Tensors in memory are contiguous. The others are a program's values, float32 unless a dtype is named.
  x               pointer, [tokens, H, D] of any dtype: the tensor that is read or written (in `_halve` see below)
  g               pointer, float32, bfloat16 or float16: logarithms of decays, [tokens, HK, K], or [tokens, HK] in
                  `_scalar_gates`
  cu              pointer, int32 or int64 [N + 1]: first token of each sequence. cu, owner and first: VARLEN only
  owner, first    pointers, int64 [segments] and [N + 1]: each segment's sequence; each sequence's first segment
  s, L            number of a segment; tokens of one
  PER, T          segments of a sequence; tokens of one: unless VARLEN
  t, lo, hi       int64 [rows, mostly C], numbers of tokens in the batch; segment's first token; end of what is there
  t0, r, left     int64, first row's token; int32 [C], rows from it on; int32, how many rows are there
  h, H, HK        number of a head; heads of the tensor; heads of g
  o, D, MASK      int32 [BD], numbers of channels; channels in memory; whether some of o are not below D
  c, C            number of a chunk of the segment; tokens of a chunk: 16, 32 or 64
  K               channels: in memory for `_gates` and `_after`, else those of the tile, a power of two
  q, k            [C, K] of any dtype: rows and columns of a product. y: [C, K], what `_apply_any_gate` reads
  b               [C, K], gates times log2 e, so in log2. total: [K], b's sum over the chunk
  p, x            `_halve`: [C, K], sums of b over a block up to and with each row; after each row
  W, A, out       [C, C]; [C, C]; [C, K]
  coarse, fine    [C], sums of gates per head in log2, as multiples of 1/256 and the rest
  level, LEVELS   blocks of 2^level rows are joined to pairs; number of levels, log2 C
  LIMIT           bits of decay in a chunk that one anchor serves: 16 for float32, else 100
  DT, PREC        products' operands: bfloat16 for bfloat16, else float32; "tf32x3" for float32, else "tf32"
  VARLEN          whether the batch is packed
  TO_UPPER        whether rows read those before them, not those after

Gates. All sums of gates are local to a chunk (a cumulative sum over the sequence loses all digits after a few million
tokens), in log2, and no decay is computed as a difference of two long sums where these may be large. For a gate per
channel the decay of a pair i >= j is split as 2^G_i · 2^-G_j (G: sum from the chunk's start), which is right for rows
with G_i >= -LIMIT. Rows beyond it take the pair's decay from `_halve`: at level l = 0.. the upper half of each block of
2^(l+1) rows meets the lower half with the boundary between them as the anchor, so both factors are <= 1 whatever the
gates are, -inf included. The choice is made row by row from the row's own past: that a later row needs the second path
changes no bit of an earlier one.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _span(s, cu, owner, first, T, L, PER, VARLEN: tl.constexpr):
    """Sequence, first token, end and sequence's end of segment s. Reads cu, owner, first. A surplus segment of a ragged
    batch gets end <= first token."""
    if VARLEN:
        n = tl.load(owner + s)
        lo = tl.load(cu + n).to(tl.int64) + (s - tl.load(first + n)) * L
        end = tl.load(cu + n + 1).to(tl.int64)
    else:
        n = s // PER
        lo = n * T + (s % PER) * L
        end = (n + 1) * T
    return n, lo, tl.minimum(lo + L, end), end


@triton.jit
def _load(x, t, hi, h, H, o, D: tl.constexpr, MASK: tl.constexpr):
    """Reads x: rows t (zero from hi on) and columns o (zero from D on, where MASK says that there are such) of head h,
    [C, BD] in x's dtype."""
    p = x + ((t * H + h) * D)[:, None] + o[None, :]
    m = (t < hi)[:, None]
    if MASK:
        m = m & (o < D)[None, :]
    return tl.load(p, mask=m, other=0.0)


@triton.jit
def _store(x, y, t, hi, h, H, o, D: tl.constexpr, MASK: tl.constexpr):
    """Writes y [C, BD] to x where `_load` would read it, in x's dtype."""
    p = x + ((t * H + h) * D)[:, None] + o[None, :]
    m = (t < hi)[:, None]
    if MASK:
        m = m & (o < D)[None, :]
    tl.store(p, y.to(x.dtype.element_ty), mask=m)


@triton.jit
def _rows(x, t0, r, left, h, H, o, D: tl.constexpr, MASK: tl.constexpr):
    """As `_load` for rows t0 + r, zero where r >= left: one 64-bit address and 32-bit offsets, which saves registers."""
    p = x + (t0 * H + h) * D + ((r * (H * D))[:, None] + o[None, :])
    m = (r < left)[:, None]
    if MASK:
        m = m & (o < D)[None, :]
    return tl.load(p, mask=m, other=0.0)


@triton.jit
def _put_rows(x, y, t0, r, left, h, H, o, D: tl.constexpr, MASK: tl.constexpr):
    """Writes y [C, BD] to x where `_rows` would read it, in x's dtype."""
    p = x + (t0 * H + h) * D + ((r * (H * D))[:, None] + o[None, :])
    m = (r < left)[:, None]
    if MASK:
        m = m & (o < D)[None, :]
    tl.store(p, y.to(x.dtype.element_ty), mask=m)


@triton.jit
def _gates(g, t, hi, h, HK, o, K: tl.constexpr, MASK: tl.constexpr):
    """Reads g: rows t of head h as b, [C, BD]."""
    return _load(g, t, hi, h, HK, o, K, MASK).to(tl.float32) * LOG2E


@triton.jit
def _after(g, t, lo, c, hi, h, HK, o, K: tl.constexpr, MASK: tl.constexpr, C: tl.constexpr):
    """2^(sum of the chunk's gates after each row), from the rows below: to add a row's own gate and take it off again
    would cost digits, or give NaN for -inf."""
    return tl.exp2(tl.cumsum(_gates(g, t + 1, tl.minimum(lo + c * C + C, hi), h, HK, o, K, MASK), 0, reverse=True))


@triton.jit
def _scalar_gates(g, t, hi, h, HK):
    """Sum of the chunk's gates up to and with each row, as multiples of 1/256 (exact) and a small rest; both totals.

    A difference of two such sums is then good to 1e-8 even where the sums are thousands. exp2(-1000) is 0 already.
    """
    b = tl.load(g + t * HK + h, mask=t < hi, other=0.0).to(tl.float32) * LOG2E
    b = tl.where(b < -1000.0, -1000.0, b)
    coarse = tl.floor(b * 256.0 + 0.5) * 0.00390625
    return tl.cumsum(coarse, 0), tl.cumsum(b - coarse, 0), tl.sum(coarse, 0), tl.sum(b - coarse, 0)


@triton.jit
def _decay(coarse, fine):
    """2^(coarse + fine)."""
    return tl.exp2(coarse) * tl.exp2(fine)


@triton.jit
def _weak(total, LIMIT: tl.constexpr):
    """Int32 [K]: 1 where a chunk's gates, whose sums these are, stay within LIMIT; 0 for a NaN too: rows before it may
    be beyond."""
    return tl.where(total >= -LIMIT, 1, 0)


@triton.jit
def _halve(p, x, level, C: tl.constexpr, K: tl.constexpr):
    """From blocks of b = 2^level rows to 2b: p sums the gates from the block's start to the row (inclusive), x those
    after the row to the block's end."""
    r = tl.arange(0, C)
    b = 1 << level
    upper = ((r & b) != 0)[:, None]
    other = tl.gather(p, tl.broadcast_to(((r ^ b) | (b - 1))[:, None], [C, K]), 0)  # the sibling block's total
    return tl.where(upper, p + other, p), tl.where(upper, x, x + other)


@triton.jit
def _pairs(level, C: tl.constexpr):
    """Rows i of the upper and columns j of the lower half of one block of 2^(level+1)."""
    r = tl.arange(0, C)
    up = (r & (1 << level)) != 0
    same = (r[:, None] >> (level + 1)) == (r[None, :] >> (level + 1))
    return up, same


@triton.jit
def _scores_any_gate(
    q, k, b, C: tl.constexpr, K: tl.constexpr, LEVELS: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr
):
    """A_ij = sum_k q_ik k_jk 2^(b_{j+1} + .. + b_i) for i >= j, right for any gates b <= 0."""
    r = tl.arange(0, C)
    q = q.to(tl.float32)
    k = k.to(tl.float32)
    A = tl.where(r[:, None] == r[None, :], tl.sum(q * k, 1)[:, None], 0.0)
    p = b
    x = tl.zeros([C, K], tl.float32)
    for level in range(LEVELS):
        up, same = _pairs(level, C)
        f = tl.exp2(tl.where(up[:, None], p, x))
        qf = tl.where(up[:, None], q * f, 0.0).to(DT)
        kf = tl.where(up[:, None], 0.0, k * f).to(DT)
        A = tl.where(same & up[:, None] & (~up)[None, :], tl.dot(qf, tl.trans(kf), input_precision=PREC), A)
        p, x = _halve(p, x, level, C, K)
    return A


@triton.jit
def _apply_any_gate(
    W,
    y,
    b,
    TO_UPPER: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    LEVELS: tl.constexpr,
    DT: tl.constexpr,
    PREC: tl.constexpr,
):
    """out_r = sum_c W_rc 2^(gates between) y_c; TO_UPPER: over c < r, else over c > r. Right for any gates b <= 0."""
    y = y.to(tl.float32)
    out = tl.zeros([C, K], tl.float32)
    p = b
    x = tl.zeros([C, K], tl.float32)
    for level in range(LEVELS):
        up, same = _pairs(level, C)
        rows = up if TO_UPPER else ~up
        f = tl.exp2(tl.where(up[:, None], p, x))
        part = tl.dot(
            tl.where(same & rows[:, None] & (~rows)[None, :], W, 0.0).to(DT),
            tl.where(rows[:, None], 0.0, y * f).to(DT),
            input_precision=PREC,
        )
        out += tl.where(rows[:, None], part * f, 0.0)
        p, x = _halve(p, x, level, C, K)
    return out
