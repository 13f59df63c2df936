// The gated delta rule in chunks of 16 tokens (chunk.inl), one (sequence, value head) at a time.
//
//   T, H, Hk   tokens of all sequences; heads of v, g, beta and the state; heads of q and k, each for H / Hk of those
//   q, k       [T, Hk, K] queries and keys, of DeltaShape::dtype, as v and o
//   v, o       [T, H, V] values, outputs
//   g          [T, H, K] or [T, H] log decays, of gate_dtype, or null
//   beta       [T, H] rates, of beta_dtype, or null: 1
//   bounds     [sequences + 1] int64: sequence b has the tokens [bounds[b], bounds[b + 1])
//   S          [K, V] state of a (sequence, head); initial, final: [sequences, H, K, V] float32
//   N, e, u    of a chunk: [16, 16], [16, Vp] errors, [16, Vp] beta e
//   dq, dk     [T, H, K], of key_gradient_dtype: the caller sums over the heads that share a key head
//   d_o, dv, dg, dbeta, d_initial, d_final   gradients, shaped and typed as what they belong to
//   step       one token a sequence: the same with T = sequences; state [sequences, H, K, V] float32, updated in place
//
// In a chunk that begins with state S, with P_i the product of exp g over its tokens up to i, and e_i = v_i - S_i'^T
// k_i the error that token i corrects, so that its update is k_i (beta_i e_i)^T:
//   N_ij = -k_i . (P_i / P_j) k_j  (j < i),        e_i = v_i - S^T (P_i k_i) + sum_j N_ij beta_j e_j,
//   A_ij = scale q_i . (P_i / P_j) k_j  (j <= i),  o_i = scale S^T (P_i q_i) + sum_j A_ij beta_j e_j,
//   S'   = P_15 S + sum_j (P_15 / P_j) k_j (beta_j e_j)^T.
// The errors come by forward substitution. So a token's negated key is one more query, of the tokens before it, and
// the chunk is gated linear attention of the values u_j = beta_j e_j; the gradients follow the same reading.
#pragma once

#include <cstdint>
#include <cstdlib>

#include "common/gemm.h"
#include "common/parallel.h"
#include "common/vec.h"
#include "linear_attention/chunk.inl"
#include "linear_attention/gate.h"
#include "linear_attention/gated_delta_rule.h"
#include "linear_attention/limits.h"
#include "linear_attention/step.inl"

namespace icrl::ICRL_ISA {
namespace {

// About how many nanoseconds one thread takes for a token and an entry of its state.
constexpr double kForward = 0.05, kBackward = 0.18, kStep = 0.08;

// How many threads `tokens` tokens of all heads are worth.
int team_of(const DeltaShape& s, int64_t tokens, double nanoseconds) {
  return team_for(nanoseconds * static_cast<double>(tokens * s.heads * s.k * s.v), s.threads);
}

constexpr int64_t kPanel = 64;  // columns of the state that stay in L1 for all of a chunk's products

// dx, in place of the gradient of the normalised x: (dx - x (x . dx)) / norm
ICRL_INLINE void normalize_gradient(float* dx, const float* x, const float* by, int64_t Kp) {
  for (int i = 0; i < kChunk; ++i) {
    Vec total = Vec{};
    for (int64_t c = i * Kp; c < (i + 1) * Kp; c += kWidth) total += load(x + c) * load(dx + c);
    const Vec along = splat(sum(total));
    for (int64_t c = i * Kp; c < (i + 1) * Kp; c += kWidth)
      store(dx + c, (load(dx + c) - load(x + c) * along) * splat(by[i]));
  }
}

// What a chunk needs beside keys, values and gates.
template <Gate gate, bool Keep>
struct Delta {
  float *beta, *kr, *kq;         // [16]; the keys as queries: -k and -P k
  float *n, *q, *qr, *qd;        // N [16][16]; q (normalised), scale q, scale P q
  float *key_norm, *query_norm;  // [16]: reciprocals
  float* solve_by;               // [16][16]: N beta_j

  void layout(Arena& a, int64_t Kp) {
    const bool one = gate == Gate::none;
    beta = a.take(kChunk), n = a.take(kChunk * kChunk), solve_by = a.take(kChunk * kChunk);
    key_norm = a.take(kChunk), query_norm = a.take(kChunk);
    kr = a.take(kChunk * Kp), kq = one ? kr : a.take(kChunk * Kp);
    q = a.take(kChunk * Kp), qr = a.take(kChunk * Kp), qd = one ? qr : a.take(kChunk * Kp);
  }

  // Reads n tokens from t on, columns of v from v0, and makes N; returns the largest gate.
  template <class P>
  float read(Chunk<gate, Keep>& c, const DeltaShape& s, const P& x, int64_t t, int tokens, int64_t head, int64_t v0,
             Next next) {
    const int64_t key_head = head / (s.heads / s.key_heads);
    Rows values = rows(x.v, s.dtype, t, s.heads, head, s.v);
    values.at += v0;
    load_rows(c.k, rows(x.k, s.dtype, t, s.key_heads, key_head, s.k), tokens, s.k, c.Kp, next);
    if (s.normalize) normalize(c.k, key_norm, kChunk, c.Kp);
    load_rows(c.v, values, tokens, c.V, c.Vp, next);
    for (int i = 0; i < kChunk; ++i)
      beta[i] = i >= tokens ? 0.f : x.beta ? load_one(x.beta, s.beta_dtype, (t + i) * s.heads + head) : 1.f;
    const int64_t size = gate == Gate::channel ? s.k : 1;
    const float largest = c.gates(rows(x.g, s.gate_dtype, t, s.heads, head, size), tokens, next);
    transpose(c.kt, c.kd, kChunk, c.Kp);
    c.queries(c.k, -1.f, kr, kq);
    c.scores(n, kr, kq, tokens);
    for (int i = 0; i < kChunk * kChunk; i += kWidth) store(solve_by + i, load(n + i) * load(beta + i % kChunk));
    return largest;
  }

  // The queries of n tokens and their scores
  template <class P>
  void queries(Chunk<gate, Keep>& c, const DeltaShape& s, const P& x, int64_t t, int tokens, int64_t head, float* a,
               Next next) {
    const int64_t key_head = head / (s.heads / s.key_heads);
    load_rows(q, rows(x.q, s.dtype, t, s.key_heads, key_head, s.k), tokens, s.k, c.Kp, next);
    if (s.normalize) normalize(q, query_norm, kChunk, c.Kp);
    c.queries(q, s.scale, qr, qd);
    c.scores(a, qr, qd, tokens);
  }
};

// to = rows of x times w
ICRL_INLINE void scale_rows(float* to, const float* x, const float* w, int64_t columns, int64_t ld) {
  for (int i = 0; i < kChunk; ++i)
    for (int64_t j = i * ld; j < i * ld + columns; j += kWidth) store(to + j, load(x + j) * splat(w[i]));
}

template <Gate gate>
bool forward(const DeltaShape& s, const DeltaForward& x) {
  const int64_t pairs = s.sequences * s.heads;
  // With fewer (sequence, head) pairs than threads, columns of v are shared out; they do not depend on each other.
  int64_t width = s.v;
  const int threads = team_of(s, s.bounds[s.sequences], kForward);
  if (pairs && pairs < threads) width = pad16((s.v * pairs + threads - 1) / threads);
  const int64_t splits = (s.v + width - 1) / width;
  int failed = 0;
  parallel_for(pairs * splits, threads, [&](int64_t item) {
    const int64_t pair = item / splits, v0 = item % splits * width, V = v0 + width < s.v ? width : s.v - v0;
    const int64_t sequence = pair / s.heads, head = pair % s.heads, K = s.k;
    Chunk<gate, false> c;
    Delta<gate, false> d;
    Arena arena;
    float *state = nullptr, *a = nullptr, *out = nullptr;
    for (int pass = 0; pass < 2; ++pass) {
      if (pass && !arena.allocate()) {
        __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
        return;
      }
      c.layout(arena, K, V), d.layout(arena, c.Kp);
      state = arena.take(c.Kp * c.Vp), a = arena.take(kChunk * kChunk), out = arena.take(kChunk * c.Vp);
    }
    const int64_t Kp = c.Kp, Vp = c.Vp, first = s.bounds[sequence], last = s.bounds[sequence + 1];
    read_state(state, Vp, 1, Kp * Vp, x.initial ? x.initial + pair * K * s.v + v0 : nullptr, s.v, K, V);
    float largest = -__builtin_inff();
    for (int64_t t = first; t < last; t += kChunk) {
      const int n = last - t < kChunk ? int(last - t) : kChunk;
      const float m = d.read(c, s, x, t, n, head, v0, Next::later);
      largest = m > largest ? m : largest;
      d.queries(c, s, x, t, n, head, a, Next::later);
      for (int64_t at = 0; at < Vp; at += kPanel) {
        const int64_t columns = Vp - at < kPanel ? Vp - at : kPanel;
        float *panel = state + at, *u = c.v + at;
        for_tiles(kChunk, columns, [&](auto& tile, int64_t i, int64_t j) __attribute__((always_inline)) {
          tile.read(u + i * Vp + j, Vp);
          tile.multiply(Left{d.kq, Kp, 1}, panel + j, Vp, i, 0, K);
          tile.write(u + i * Vp + j, Vp);
        });
        solve<false>(u, Vp, columns, d.solve_by);
        scale_rows(u, u, d.beta, columns, Vp);
        for_tiles(kChunk, columns, [&](auto& tile, int64_t i, int64_t j) __attribute__((always_inline)) {
          tile.zero();
          tile.multiply(Left{d.qd, Kp, 1}, panel + j, Vp, i, 0, K);
          tile.template lower<false>(Left{a, kChunk, 1}, u + j, Vp, i);
          tile.write(out + at + i * Vp + j, Vp);
        });
        for_tiles(Kp, columns, [&](auto& tile, int64_t i, int64_t j) __attribute__((always_inline)) {
          tile.read(panel + i * Vp + j, Vp);
          if constexpr (gate != Gate::none) tile.scale_rows(c.decay + i);
          tile.multiply(Left{c.ku, 1, Kp}, u + j, Vp, i, 0, n);
          tile.write(panel + i * Vp + j, Vp);
        });
      }
      store_rows(x.o, out, s.dtype, (t * s.heads + head) * s.v + v0, s.heads * s.v, n, V, Vp, Next::later);
    }
    write_state(x.final + pair * K * s.v + v0, s.v, state, Vp, 1, K, V);
    if (largest > s.allowance) __atomic_store_n(x.refused, 1, __ATOMIC_RELAXED);
    free(arena.base);
  });
  return !failed;
}

// With w the gradient of u, sum over the later tokens included: w_j = A^T do + (P_15 / P_j) S'-part + sum_m N_mj beta_m
// w_m, by backward substitution; then de = dv = beta w, dbeta = e . w, and de is the gradient of what -k reads.
template <Gate gate>
struct Backward {
  const DeltaShape& s;
  const DeltaBackward& x;
  int64_t pair, head;
  ChunkGradient<gate> m;
  Delta<gate, true> d;
  float *kq_t, *e, *e_t, *u, *d_o, *de, *dbeta;

  int64_t state_size() const { return pad16(s.k) * pad16(s.v); }

  void layout(Arena& arena) {
    m.layout(arena, s.k, s.v);
    d.layout(arena, m.Kp);
    kq_t = arena.take(kChunk * m.Kp), dbeta = arena.take(kChunk);
    e = arena.take(kChunk * m.Vp), e_t = arena.take(kChunk * m.Vp), u = arena.take(kChunk * m.Vp);
    d_o = arena.take(kChunk * m.Vp), de = arena.take(kChunk * m.Vp);
  }

  void read_states(float* state) {
    const int64_t at = pair * s.k * s.v;
    m.read_states(state, x.initial ? x.initial + at : nullptr, x.d_final + at);
  }
  void write_gradient() {
    if (x.d_initial) write_state(x.d_initial + pair * s.k * s.v, s.v, m.gradient, 1, m.Kp, s.k, s.v);
  }

  // e and u of the n tokens from t on
  void errors(const float* state, int64_t t, int n, Next next) {
    const int64_t Kp = m.Kp, Vp = m.Vp;
    if (d.read(m.c, s, x, t, n, head, 0, next) > s.allowance) __atomic_store_n(x.refused, 1, __ATOMIC_RELAXED);
    transpose(kq_t, d.kq, kChunk, Kp);
    product(e_t, kChunk, Vp, kChunk, Left{state, Kp, 1}, kq_t, kChunk, s.k);
    transpose(e, e_t, Vp, kChunk);
    for (int64_t i = 0; i < kChunk * Vp; i += kWidth) store(e + i, load(e + i) + load(m.c.v + i));
    solve<false>(e, Vp, Vp, d.solve_by);
    scale_rows(u, e, d.beta, Vp, Vp);
  }

  void advance(float* state, const float* from, int64_t t, int n) {
    errors(from, t, n, Next::later);
    m.advance(state, from, u, n);
  }

  void chunk(const float* state, int64_t t, int n) {
    const int64_t Kp = m.Kp, Vp = m.Vp, row = t * s.heads + head;
    constexpr Next next = Next::earlier;
    errors(state, t, n, next);
    d.queries(m.c, s, x, t, n, head, m.a, next);
    load_rows(d_o, rows(x.d_o, s.dtype, t, s.heads, head, s.v), n, s.v, Vp, next);
    m.begin(state, u);
    m.scores_gradient(m.a, m.dvalue, d_o, Vp);
    for (int i = 0; i < kChunk; ++i)
      for (int j = 0; j < i; ++j) d.solve_by[i * kChunk + j] = d.n[i * kChunk + j] * d.beta[i];
    solve<true>(m.dvalue, Vp, Vp, d.solve_by);
    for (int i = 0; i < kChunk; ++i) {
      Vec total = Vec{};
      for (int64_t j = i * Vp; j < (i + 1) * Vp; j += kWidth) total += load(e + j) * load(m.dvalue + j);
      dbeta[i] = sum(total);
    }
    scale_rows(de, m.dvalue, d.beta, Vp, Vp);
    m.template queries_gradient<false>(state, m.a, d.qr, d.qd, d_o, s.scale, n, true);
    if (s.normalize) normalize_gradient(m.dq, d.q, d.query_norm, Kp);
    store_rows(x.dq, m.dq, s.key_gradient_dtype, row * s.k, s.heads * s.k, n, s.k, Kp, next);
    m.template queries_gradient<true>(state, d.n, d.kr, d.kq, de, -1.f, n, false);
    for (int64_t i = 0; i < kChunk * Kp; i += kWidth) store(m.dk + i, load(m.dk + i) + load(m.dq + i));
    if (s.normalize) normalize_gradient(m.dk, m.c.k, d.key_norm, Kp);
    store_rows(x.dk, m.dk, s.key_gradient_dtype, row * s.k, s.heads * s.k, n, s.k, Kp, next);
    store_rows(x.dv, de, s.dtype, row * s.v, s.heads * s.v, n, s.v, Vp, next);
    if (x.dbeta) store_rows(x.dbeta, dbeta, s.beta_dtype, row, s.heads, n, 1, 1, next);
    if constexpr (gate != Gate::none) {
      const int64_t size = gate == Gate::channel ? s.k : 1;
      m.gates_gradient();
      store_rows(x.dg, m.dg, s.gate_dtype, row * size, s.heads * size, n, size, gate == Gate::channel ? Kp : 1, next);
    }
  }
};

template <Gate gate>
bool backward(const DeltaShape& s, const DeltaBackward& x) {
  int failed = 0;
  parallel_for(s.sequences * s.heads, team_of(s, s.bounds[s.sequences], kBackward), [&](int64_t pair) {
    const int64_t sequence = pair / s.heads;
    Backward<gate> b{s, x, pair, pair % s.heads};
    if (!backward_sequence(b, s.bounds[sequence], s.bounds[sequence + 1]))
      __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
  });
  return !failed;
}

}  // namespace

bool delta_forward(const DeltaShape& s, const DeltaForward& p) { return ICRL_BY_GATE(forward); }
bool delta_backward(const DeltaShape& s, const DeltaBackward& p) { return ICRL_BY_GATE(backward); }

bool delta_step(const DeltaShape& s, const DeltaStep& p) {
  const int64_t pairs = s.sequences * s.heads, group = s.heads / s.key_heads, K = s.k, V = s.v, Kp = pad16(K);
  int refused = 0;
  parallel_for(pairs, team_of(s, s.sequences, kStep), [&](int64_t pair) {
    alignas(64) float q[kMostChannels], k[kMostChannels], kd[kMostChannels], e[kMostChannels];
    alignas(64) float v[kMostValues], out[kMostValues], tail[kMostChannels * kWidth];
    const int64_t keys = pair / group * K, n = s.gate == Gate::channel ? K : s.gate == Gate::scalar ? 1 : 0;
    load_row(q, p.q, s.dtype, keys, K, Kp);
    load_row(k, p.k, s.dtype, keys, K, Kp);
    load_row(v, p.v, s.dtype, pair * V, V, pad16(V));
    const float beta = p.beta ? load_one(p.beta, s.beta_dtype, pair) : 1.f;
    load_row(e, p.g, s.gate_dtype, pair * n, n, pad16(n));
    if (decays(e, n) > s.allowance) __atomic_store_n(&refused, 1, __ATOMIC_RELAXED);
    for (int64_t i = n; i < Kp; ++i) e[i] = n ? e[0] : 1.f;
    delta_head(s.normalize, s.scale, beta, p.state + pair * K * V, K, V, q, k, e, v, kd, out, tail);
    store_row(p.o, out, s.dtype, pair * V, V);
  });
  return !refused;
}

}  // namespace icrl::ICRL_ISA
