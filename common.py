from lib import apply
M = '''
Device functions that the Triton kernels of the linear-attention ops share: spans of ragged batches, masked loads
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
'''
D = {
"_span": '''
Sequence, first token, end and sequence's end of segment s. Reads cu, owner, first. A surplus segment of a ragged batch
gets end <= first token.''',
"_load": '''
Reads x: rows t (zero from hi on) and columns o (zero from D on, where MASK says that there are such) of head h,
[C, BD] in x's dtype.''',
"_store": '''
Writes y [C, BD] to x where `_load` would read it, in x's dtype.''',
"_put_rows": '''
Writes y [C, BD] to x where `_rows` would read it, in x's dtype.''',
"_gates": '''
Reads g: rows t of head h as b, [C, BD].''',
"_decay": '''
2^(coarse + fine).''',
"_weak": '''
Int32 [K]: 1 where a chunk's gates, whose sums these are, stay within LIMIT; 0 for a NaN too: rows before it may be
beyond.''',
}
apply("linear_attention/triton/common.py", M, D)
