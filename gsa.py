from lib import apply
M = '''
Triton kernels of gated slot attention. K̃_t = diag(exp g_t) K̃_{t-1} + s_t k_tᵀ and
Ṽ_t = diag(exp g_t) Ṽ_{t-1} + s_t v_tᵀ are one gated linear attention with keys s and values [k | v]: the levels, the
gates and the accuracy are those of gla_kernels.py, and the two states lie side by side, [M, K + V].

Symbols. Tensors are contiguous, and float32 unless a dtype is named; io is that of q, k, v and s; DT is the products'.
Grids run fastest over their last factor.
  B, T, N            rows; tokens of a row (packed: B = 1, T of all sequences); sequences (N = B unless packed)
  H, HK, GROUP       heads of q and o; heads of k, v, s, g and the states; H / HK
  K, V, M            channels of q and k; of v and o; slots: each 1 to 256
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
'''
D = {
"_local_states": '''
Grid NS·HK: a segment and a head. Reads x1, y1, x2, y2, g. Writes out1[s, h], the sum over the segment of x1_t y1_tᵀ
decayed to the segment's end (REVERSE: to its start), out2 likewise, decay and strong. Without REVERSE x2 is not read,
being x1.''',
"_scan": '''
Grid N·HK·ceil((K + V)/BD): a sequence, a head, BD columns of the two states side by side, the keys' first. Reads
decay, keys, values, first. Rewrites states1 and states2: what the segments add becomes what they start from (REVERSE:
end with). Writes last_keys and last_values. REVERSE: of gradients, keys and values at the sequence's end.''',
"_softmax": '''
Of logits z [C, BM], slots om: exponentials [C, BM] and what to multiply them by [C, 1].''',
"_read": '''
The slots' vectors times each row of x [C, K or V], 2^G ∘ (x S + tril(x yᵀ) s'), where the rows of y are what is
written, S [K or V, BM] is the state, bs [C, BM] is s, sw [C, BM] is s', b [C, BM] are the gates in log2 and f [C, BM]
is 2^G. ANY: sw is not used. STRICT: without the pairs (t, t). Returns that [C, BM] and x·y of each row [C].''',
"_logits": '''
Grid NS·H·ceil(M/BM): a segment, a head of q, BM of the slots. z = K̃ q: `_outputs`' first half, for a state that one
program cannot hold. Reads q, k, s, g, states. Writes z. Writes strong in the first launch, reads it in the second.
DT is float32 here and PREC "tf32x3", whatever io is.''',
"_outputs": '''
Grid NS·H·ceil(V/BV): a segment, a head of q, all slots and BV of V. Reads q, k, v, s, g, states1, states2; ANY: strong.
Writes o; ANY: only rows beyond LIMIT and those of later chunks.''',
"_grad_logits": '''
Grid NS·H: a segment and a head of q. Reads q, k, v, s, g, do, states1, states2, strong. Writes p again, and
e = dL/d(K̃ q) = scale·p (dp - p·dp) with dp = Ṽ do; with GATE z and own.

z: p dp + e (K̃ q) without the pair (t, t), which does not move dg; own: q·k and do·v, for ds. A launch works on the
segments that have gates beyond LIMIT (ANY) or that have none.''',
"_grad_kv": '''
Grid NS·HK: a segment and a head of k. One of the two states, from the last chunk to the first with its gradient on
chip, [N, M]. x: the keys or values that this state is written with; y: the vectors that meet it; weight: of the slots
for y. `last` has the state's element (m, n) at m·ROW + n·COLUMN. Reads y, x, s, g, weight, dstates; with GATE own,
states, last, strong and, unless SECOND, z; SECOND: ds_sum, dg_sum. Writes dx, ds and, with GATE, dg.

dx is made as [N, C], so that no product's result has to be transposed for another. ds and dg are sums over the two
launches: SECOND adds those of the first. dg as in gla's kernel.''',
"_step": '''
Grid B·HK: a batch row and a head of k with its GROUP queries. Reads q, k, v, s, g, which have no T here. Updates keys
[B, HK, K, M] and values [B, HK, M, V] in place, writes o. It takes BM slots at a time, so the softmax is a running
one.''',
}
apply("linear_attention/triton/gsa_kernels.py", M, D)
