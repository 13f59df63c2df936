from lib import apply
M = '''
Triton kernels of RWKV-7's rule: u_t = S_{t-1}ᵀ a_t, S_t = diag(exp w_t) S_{t-1} + b_t u_tᵀ + k_t v_tᵀ, o_t = scale·S_tᵀ r_t.

Symbols. Tensors are contiguous, and float32 unless a dtype is named; io is that of r, k, v, a, b; DT is the products'.
Grids run fastest over their last factor.
  B, T, N, H       rows; tokens of a row (packed: B = 1, T of all sequences); sequences (N = B unless packed); heads
  K, V             channels of r, w, k, a, b; of v and o: each 1 to 256
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
'''
D = {
"_down": '''
The rows of x [C, C] moved down by one, 0 above.''',
"_prepare": '''
Grid NC·H: a chunk and a head. Reads r, w, k, a, b. Writes solve, through, with_b, with_k, decay, strong, rd, ad, bu,
ku. The rows of the four matrices whose gates reach beyond LIMIT are left to a second launch, ANY, of the chunks marked
as strong; that launch writes only these rows.''',
"_forward": '''
Grid N·H·ceil(V/BV): a sequence, a head, all of K and BV of V. Reads ad, bu, ku, v, solve, through, decay, init. OUTPUTS:
reads rd, with_b, with_k too, writes o and last (u and states are None). Otherwise writes u and states (o and last are
None).''',
"_reverse": '''
Grid N·H·ceil(V/BV): a sequence, a head, all of K and BV of V, from the last chunk to the first. Reads rd, ad, bu, ku,
do, solve, through, with_b, with_k, decay, dlast. Writes dstates, the gradient D of the state that each chunk ends with,
dv, dx and at last dinit.''',
"_products": '''
x yᵀ, x zᵀ [C, C] and x times a state's matrix, [C, BK]. Reads the rows of x, y, z [B, T, H, V] with numbers tx, ty, tz
(up to end_x, end_y, end_z) and head h, and the matrix, [V, K], of which `matrix` [BK] points to the first row.''',
"_diagonal": '''
The diagonal of x [C, C], as [C, 1].''',
"_as_row": '''
The gradient [C, BK] of queries, from dy [B, T, H, V], rows ty up to end_y, of what they read; its part that no gate
decays comes apart. Reads dy, k, v, b, u, and the state at S [BK]. g, G [C, BK]: gates in log2, their sums.''',
"_as_column": '''
The gradient of keys that write y [B, T, H, V] (v or u): through the state at the chunk's end (as it meets it there),
through later rows, through their own row, [C, BK] each. Reads y, r, do, a, dx, and the state's gradient at D [BK];
stop: the chunk's end.''',
"_gradients": '''
Grid NC·H·ceil(K/BK): a chunk, a head and BK of the K channels. Reads r, w, k, v, a, b, do, u, dx, strong, states,
dstates. Writes dr, dw, dk, da, db. dw as in the gated delta rule's `_gradients`.

r, a (of the row below), k and b take turns, each with what it needs read again: together they would not fit. A launch
works on the chunks that have gates beyond LIMIT (ANY) or that have none.''',
"_step": '''
Grid B·H·ceil(V/BV): a row, a head, all of K and BV of V. Reads r, w, k, v, a, b, which have no T here. Updates state in
place, writes o.''',
}
apply("linear_attention/triton/rwkv7_kernels.py", M, D)
