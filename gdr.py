from lib import apply
M = '''
Triton kernels of the gated delta rule: S' = diag(exp g_t) S, u_t = beta_t (v_t − S'ᵀ k_t), S = S' + k_t u_tᵀ, o_t = scale·Sᵀ q_t.

Symbols. Tensors are contiguous, and float32 unless a dtype is named; io is that of q, k and v; DT is the products'.
Grids run fastest over their last factor.
  B, T, N         rows; tokens of a row (packed: B = 1, T of all sequences); sequences (N = B unless packed)
  H, HK, GROUP    heads of v, g, beta, o and the states; heads of q and k; H / HK
  K, V            channels of q and k; of v and o: each 1 to 256
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
'''
D = {
"_join": '''
Of X, the inverses of the diagonal blocks of B rows of I + N, [C/B, B, B], those of 2B, [C/2B, 2B, 2B]:
[[X, 0], [-Y L X, Y]].''',
"_weights": '''
Reads beta: float32 [C] of rows t of head h, 1 without BETA; zero from hi on.''',
"_prepare": '''
Grid NC·H: a chunk and a head. Reads q, k, g, beta. Writes solve, scores, norms, rows, decay, strong and, for a gate per
channel, qd, kd, ku.

The decays are in rows for a gate per head; for one per channel they are in qd, kd and ku. There the rows of the two
matrices whose gates reach beyond LIMIT are left to a second launch, ANY, of the chunks marked as strong.''',
"_turned": '''
As `_rows` transposed, for tokens t + r with r < left: pointers [D's tile, C], and which of them are there.''',
"_shrink": '''
Reads decay: what the gates of chunk and head c (chunk·H + head) do to the transposed state: [1, BK], a number, or 1.''',
"_forward": '''
Grid N·PARTS·H·ceil(V/BV): a part of a sequence, a head, all of K and BV of V. Reads q, kd, ku, v, solve, scores, rows,
decay, init. Writes last; o unless None; e and states unless None.

TRANSFER: of the identity as initial state and no values (v is None, V is K), so that last = M, where a state S comes
out as M S + ..''',
"_reverse": '''
Grid N·PARTS·H·ceil(V/BV), as `_forward`, from the last chunk to the first. Reads q, kd, ku, do, solve, scores, rows,
decay, dlast. Writes dinit, the gradient D of the first state; dr and dstates, D of the states that chunks end with,
unless None. Without dlast, D of the last state is 0.''',
"_decayed": '''
out_r = sum_c W_rc 2^(gates between) y_c per channel; TO_UPPER: over c < r, else over c > r. W [C, C], y [C, BK], b:
gates in log2 [C, BK], G: their sums from the chunk's start [C, BK], used unless ANY.''',
"_gradients": '''
Grid NC·H·ceil(K/BK): a chunk, a head and BK of the K channels. Reads q, k, g, beta, do, e, dr, norms, strong, states,
dstates. Writes dq and dk, the gradients of (normalised) q and k, and its parts of dbeta and dg.

dg_t sums what decays over t: the rows from t on of what they read from the state and from earlier rows, and the
columns before t of what they write to the state, each as it is; pairs within the chunk as the difference of sums.''',
"_gather_heads": '''
Grid ceil(B·T/BT)·HK: BT tokens and a head of q and k. Reads x, dx, norms. Writes out, the gradient of q or k: those of
the value heads that read it, summed in order, then through the norm.''',
"_step": '''
Grid B·H·ceil(V/BV): a row, a value head, all of K and BV of V. Reads q, k, v, g, beta, which have no T here. Updates
state in place, writes o. H is not used.''',
}
apply("linear_attention/triton/gated_delta_rule_kernels.py", M, D)
