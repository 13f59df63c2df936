// Gated linear attention in chunks of 16 tokens (chunk.inl), one (sequence, key/value head) at a time.
//
//   T, H, Hk   tokens of all sequences; query heads; key/value heads, each read by `group` = H / Hk query heads
//   q, o       [T, H, K] queries, [T, H, V] outputs, of GlaShape::dtype, as k and v
//   k, v       [T, Hk, K] keys, [T, Hk, V] values
//   g          [T, Hk, K] or [T, Hk] log decays, of gate_dtype, or null
//   bounds     [sequences + 1] int64: sequence b has the tokens [bounds[b], bounds[b + 1])
//   S          [K, V] state of a (sequence, head); initial, final: [sequences, Hk, K, V] float32
//   d_o, dq, dk, dv, dg, d_initial, d_final   gradients, shaped and typed as what they belong to
//   step       one token a sequence: the same with T = sequences; state [sequences, Hk, K, V] float32, updated in place
//
// In a chunk that begins with state S, with P_i the product of exp g over its tokens up to i:
//   A_ij = scale q_i . (P_i / P_j) k_j  (j <= i),   o_i = scale S^T (P_i q_i) + sum_j A_ij v_j,
//   S'   = P_15 S + sum_j (P_15 / P_j) k_j v_j^T.
#pragma once

#include <cstdint>
#include <cstdlib>

#include "common/gemm.h"
#include "common/parallel.h"
#include "common/vec.h"
#include "linear_attention/chunk.inl"
#include "linear_attention/gate.h"
#include "linear_attention/gla.h"
#include "linear_attention/limits.h"
#include "linear_attention/step.inl"

namespace icrl::ICRL_ISA {
namespace {

// About how many nanoseconds one thread takes for a token and an entry of its state.
constexpr double kForward = 0.03, kBackward = 0.11, kStep = 0.06;

// How many threads `tokens` tokens of all heads are worth.
int team_of(const GlaShape& s, int64_t tokens, double nanoseconds) {
  return team_for(nanoseconds * static_cast<double>(tokens * s.kv_heads * s.k * s.v), s.threads);
}

// Reads n tokens from t on, columns of v from v0; returns the largest gate.
template <Gate gate, bool Keep>
float read(Chunk<gate, Keep>& c, const GlaShape& s, const void* k, const void* v, const void* g, int64_t t, int n,
           int64_t head, int64_t v0, Next next) {
  Rows values = rows(v, s.dtype, t, s.kv_heads, head, s.v);
  values.at += v0;
  load_rows(c.k, rows(k, s.dtype, t, s.kv_heads, head, s.k), n, s.k, c.Kp, next);
  load_rows(c.v, values, n, c.V, c.Vp, next);
  return c.gates(rows(g, s.gate_dtype, t, s.kv_heads, head, gate == Gate::channel ? s.k : 1), n, next);
}

template <Gate gate>
bool forward(const GlaShape& s, const GlaForward& x) {
  const int64_t pairs = s.sequences * s.kv_heads, group = s.heads / s.kv_heads;
  // With fewer (sequence, head) pairs than threads, columns of v are shared out; they do not depend on each other.
  int64_t width = s.v;
  const int threads = team_of(s, s.bounds[s.sequences], kForward);
  if (pairs && pairs < threads) width = pad16((s.v * pairs + threads - 1) / threads);
  const int64_t splits = (s.v + width - 1) / width;
  int failed = 0;
  parallel_for(pairs * splits, threads, [&](int64_t item) {
    const int64_t pair = item / splits, v0 = item % splits * width, V = v0 + width < s.v ? width : s.v - v0;
    const int64_t sequence = pair / s.kv_heads, head = pair % s.kv_heads, K = s.k;
    Chunk<gate, false> c;
    Arena arena;
    float *state = nullptr, *qr = nullptr, *qd = nullptr, *a = nullptr, *out = nullptr;
    for (int pass = 0; pass < 2; ++pass) {
      if (pass && !arena.allocate()) {
        __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
        return;
      }
      c.layout(arena, K, V);
      state = arena.take(c.Kp * c.Vp), a = arena.take(kChunk * kChunk), out = arena.take(kChunk * c.Vp);
      qr = arena.take(kChunk * c.Kp), qd = gate == Gate::none ? qr : arena.take(kChunk * c.Kp);
    }
    const int64_t Kp = c.Kp, Vp = c.Vp, first = s.bounds[sequence], last = s.bounds[sequence + 1];
    read_state(state, Vp, 1, Kp * Vp, x.initial ? x.initial + pair * K * s.v + v0 : nullptr, s.v, K, V);
    float largest = -__builtin_inff();
    for (int64_t t = first; t < last; t += kChunk) {
      const int n = last - t < kChunk ? int(last - t) : kChunk;
      const float m = read(c, s, x.k, x.v, x.g, t, n, head, v0, Next::later);
      largest = m > largest ? m : largest;
      transpose(c.kt, c.kd, kChunk, Kp);
      for (int64_t r = 0; r < group; ++r) {
        const int64_t query_head = head * group + r;
        load_rows(qr, rows(x.q, s.dtype, t, s.heads, query_head, K), n, K, Kp, Next::later);
        c.queries(qr, s.scale, qr, qd);
        c.scores(a, qr, qd, n);
        for_tiles(kChunk, Vp, [&](auto& tile, int64_t i, int64_t j) __attribute__((always_inline)) {
          tile.zero();
          tile.multiply(Left{qd, Kp, 1}, state + j, Vp, i, 0, K);
          tile.template lower<false>(Left{a, kChunk, 1}, c.v + j, Vp, i);
          tile.write(out + i * Vp + j, Vp);
        });
        store_rows(x.o, out, s.dtype, (t * s.heads + query_head) * s.v + v0, s.heads * s.v, n, V, Vp, Next::later);
      }
      for_tiles(Kp, Vp, [&](auto& tile, int64_t i, int64_t j) __attribute__((always_inline)) {
        tile.read(state + i * Vp + j, Vp);
        if constexpr (gate != Gate::none) tile.scale_rows(c.decay + i);
        tile.multiply(Left{c.ku, 1, Kp}, c.v + j, Vp, i, 0, n);
        tile.write(state + i * Vp + j, Vp);
      });
    }
    write_state(x.final + pair * K * s.v + v0, s.v, state, Vp, 1, K, V);
    if (largest > s.allowance) __atomic_store_n(x.refused, 1, __ATOMIC_RELAXED);
    free(arena.base);
  });
  return !failed;
}

template <Gate gate>
struct Backward {
  const GlaShape& s;
  const GlaBackward& x;
  int64_t pair, head;
  ChunkGradient<gate> m;
  float *qr, *qs, *d_o;

  int64_t state_size() const { return pad16(s.k) * pad16(s.v); }

  void layout(Arena& arena) {
    m.layout(arena, s.k, s.v);
    qr = arena.take(kChunk * m.Kp), qs = gate == Gate::none ? qr : arena.take(kChunk * m.Kp);
    d_o = arena.take(kChunk * m.Vp);
  }

  void read_states(float* state) {
    const int64_t at = pair * s.k * s.v;
    m.read_states(state, x.initial ? x.initial + at : nullptr, x.d_final + at);
  }
  void write_gradient() {
    if (x.d_initial) write_state(x.d_initial + pair * s.k * s.v, s.v, m.gradient, 1, m.Kp, s.k, s.v);
  }

  void advance(float* state, const float* from, int64_t t, int n) {
    read(m.c, s, x.k, x.v, x.g, t, n, head, 0, Next::later);
    m.advance(state, from, m.c.v, n);
  }

  void chunk(const float* state, int64_t t, int n) {
    const int64_t group = s.heads / s.kv_heads, Kp = m.Kp, Vp = m.Vp;
    constexpr Next next = Next::earlier;
    if (read(m.c, s, x.k, x.v, x.g, t, n, head, 0, next) > s.allowance)
      __atomic_store_n(x.refused, 1, __ATOMIC_RELAXED);
    transpose(m.c.kt, m.c.kd, kChunk, Kp);
    m.begin(state, m.c.v);
    for (int64_t r = 0; r < group; ++r) {
      const int64_t query_head = head * group + r;
      const Rows q = rows(x.q, s.dtype, t, s.heads, query_head, s.k);
      load_rows(qr, q, n, s.k, Kp, next);
      m.c.queries(qr, s.scale, qr, qs);
      load_rows(d_o, rows(x.d_o, s.dtype, t, s.heads, query_head, s.v), n, s.v, Vp, next);
      m.c.scores(m.a, qr, qs, n);
      m.scores_gradient(m.a, m.dvalue, d_o, Vp);
      m.template queries_gradient<false>(state, m.a, qr, qs, d_o, s.scale, n, r == 0);
      store_rows(x.dq, m.dq, s.dtype, q.at, q.stride, n, s.k, Kp, next);
    }
    const int64_t row = t * s.kv_heads + head;
    store_rows(x.dk, m.dk, s.dtype, row * s.k, s.kv_heads * s.k, n, s.k, Kp, next);
    store_rows(x.dv, m.dvalue, s.dtype, row * s.v, s.kv_heads * s.v, n, s.v, Vp, next);
    if constexpr (gate != Gate::none) {
      const int64_t size = gate == Gate::channel ? s.k : 1;
      m.gates_gradient();
      store_rows(x.dg, m.dg, s.gate_dtype, row * size, s.kv_heads * size, n, size, gate == Gate::channel ? Kp : 1,
                 next);
    }
  }
};

template <Gate gate>
bool backward(const GlaShape& s, const GlaBackward& x) {
  int failed = 0;
  parallel_for(s.sequences * s.kv_heads, team_of(s, s.bounds[s.sequences], kBackward), [&](int64_t pair) {
    const int64_t sequence = pair / s.kv_heads;
    Backward<gate> b{s, x, pair, pair % s.kv_heads};
    if (!backward_sequence(b, s.bounds[sequence], s.bounds[sequence + 1]))
      __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
  });
  return !failed;
}

}  // namespace

bool gla_forward(const GlaShape& s, const GlaForward& p) { return ICRL_BY_GATE(forward); }
bool gla_backward(const GlaShape& s, const GlaBackward& p) { return ICRL_BY_GATE(backward); }

bool gla_step(const GlaShape& s, const GlaStep& p) {
  const int64_t pairs = s.sequences * s.kv_heads, group = s.heads / s.kv_heads, K = s.k, V = s.v;
  int refused = 0;
  parallel_for(pairs, team_of(s, s.sequences, kStep), [&](int64_t pair) {
    alignas(64) float q[kMostChannels], k[kMostChannels], e[kMostChannels], tail[kMostChannels * kWidth];
    alignas(64) float v[kMostValues], out[kMostValues];
    load_row(k, p.k, s.dtype, pair * K, K, pad16(K));
    load_row(v, p.v, s.dtype, pair * V, V, pad16(V));
    const int64_t n = s.gate == Gate::channel ? K : s.gate == Gate::scalar ? 1 : 0;
    load_row(e, p.g, s.gate_dtype, pair * n, n, pad16(n));
    if (decays(e, n) > s.allowance) __atomic_store_n(&refused, 1, __ATOMIC_RELAXED);
    for (int64_t i = n; i < K; ++i) e[i] = n ? e[0] : 1.f;
    for (int64_t r = 0; r < group; ++r) {
      load_row(q, p.q, s.dtype, (pair * group + r) * K, K, pad16(K));
      scale_row(q, s.scale, pad16(K));
      float* state = p.state + pair * K * V;
      gla_head(r == 0, state, K, V, q, k, e, v, out, tail);
      store_row(p.o, out, s.dtype, (pair * group + r) * V, V);
    }
  });
  return !refused;
}

}  // namespace icrl::ICRL_ISA
