from lib import apply
M = '''
Triton kernels of gated linear attention: S_t = diag(exp g_t) S_{t-1} + k_t v_tᵀ, o_t = scale·S_tᵀ q_t.

Symbols. Tensors are contiguous, and float32 unless a dtype is named; io is that of q, k and v. Grids run fastest over
their last factor.
  B, T, N         rows; tokens of a row (packed: B = 1, T of all sequences); sequences (N = B unless packed)
  H, HK, GROUP    heads of q and o; heads of k, v, g and the states; H / HK
  K, V            channels of q and k; of v and o: 1 to 256
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
  z               q's part of dg: GATE 1 [PARTS, B, T, H], GATE 2 [B, T, H, K], which may be dg itself
  dg              GATE 1 [PARTS, B, T, HK], summed by the launcher; GATE 2 [B, T, HK, K] in g's dtype
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
'''
D = {
"_local_states": '''
Grid NS·HK·ceil(V/BV): a segment, a head, all of K and BV of V. Reads k, v, g. Writes out[s, h], the segment's sum
of k_t v_tᵀ, each decayed to its end, and decay[s, h].''',
"_scan": '''
Grid N·HK·ceil(K/BR): a sequence, a head, BR of K and all of V. Reads decay, init. Rewrites states: what segments add
becomes what they start from (REVERSE: end with). Writes last. REVERSE: init is a gradient at the sequence's end.''',
"_outputs": '''
Grid U·HK·ceil(V/BV): a unit, a head of k with its GROUP queries, all of K, BV of V. Reads q, k, v, g, states (SINGLE:
init; None: zeros). Writes o and, if SINGLE, last (else None). strong[s, h]: the first chunk with gates beyond
LIMIT (none: the number of chunks), written by the first launch, read by the second.''',
"_grad_q": '''
Grid U·HK·PARTS: a unit, a head of k with its GROUP queries, BK of K and all of V. dq_t = scale·S_t do_t; the state is
kept transposed, as the dot with do reads it. Reads q (None if SINGLE, unless GATE is 1), k, v, g, do. Writes dq and
z: dq / scale without the pair (t, t), which does not move dg; GATE 1: the sum over BK channels of scale·q·z.
¶SINGLE: reads init, writes what each segment ends with to states (None: not wanted). Otherwise reads states and writes
to add what the segment adds to the state's gradient at its start.
¶strong[part, unit, h]: whether gates go beyond LIMIT, written by the first launch, read by the second.''',
"_grad_kv": '''
Grid U·HK·ceil(V/BV)·ceil(K/BK): a unit, a head of k with its GROUP queries, BK of K, BV of V; from the last chunk to
the first with D = dL/dS_end (transposed, [V, K]) on chip. Reads q, k, v, g, do, strong, dstates; for dg z, states
and, unless SINGLE, final. Writes dk, dg; dv; if SINGLE dinit. What a launch has no use for is None.
¶dk_j = D v_j 2^(gates after j) + sum_{i>=j} .. q_i, and dv_j likewise, kept as [V, C] so that no product's result
has to be transposed for another. dg_t = sum_{s>=t} (q_s dq_s - k_s dk_s) + sum_v S_end D within the segment. The
pairs (s, s) cancel and are left out of both terms: under strong gates they would drown the rest. The terms take q
and k as the products took them, rounded after their decays; the rest then cancels to float32's digits.
¶DK needs all of V on chip, DV all of K: a large state is done in two launches.''',
"_step": '''
Grid B·HK·ceil(V/BV): a row, a head of k with its GROUP queries, all of K, BV of V. Reads q, k, v, g, without a T.
Updates state, writes o. Does not use HK.''',
}
apply("linear_attention/triton/gla_kernels.py", M, D)
