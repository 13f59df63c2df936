// Gated slot attention in chunks of 16 tokens (chunk.inl), one (sequence, key/value head) at a time.
//
//   T, H, Hk   tokens of all sequences; query heads; key/value heads, each read by `group` = H / Hk query heads
//   M, Mp      slots; rounded up to 16
//   q, o       [T, H, K] queries, [T, H, V] outputs, of GsaShape::dtype, as k, v and s
//   k, v       [T, Hk, K] keys, [T, Hk, V] values
//   s          [T, Hk, M] the weights with which a token writes to the slots; `w` in a step
//   g          [T, Hk, M] log decays, one per slot, of gate_dtype, or null
//   bounds     [sequences + 1] int64: sequence b has the tokens [bounds[b], bounds[b + 1])
//   S, U       [K, M] keys and [M, V] values of the slots; initial_keys, ...: [sequences, Hk, K, M], ... float32
//   A, B       [16, 16] scores of the two passes, one after the other in `a` where both are not kept
//   l, p, pd   [16, Mp] logits, their softmax, P p
//   dl, dp     gradients of l and p; d_o, dq, dk, dv, ds, dg, ...: gradients, shaped and typed as what they belong to
//   step       one token a sequence: the same with T = sequences; keys and values are updated in place
//
// In a chunk that begins with S and U, with P_i the product of exp g over its tokens up to i:
//   l_i = P_i (scale q_i S) + sum_j A_ij (P_i / P_j) s_j,  A_ij = scale q_i . k_j  (j <= i),   p_i = softmax(l_i),
//   o_i = (P_i p_i) U + sum_j B_ij v_j,                    B_ij = p_i . (P_i / P_j) s_j,
// so that both passes take the same decayed s_j, and p lives only as long as its chunk.
#pragma once

#include <cstdint>
#include <cstdlib>

#include "common/gemm.h"
#include "common/parallel.h"
#include "common/vec.h"
#include "linear_attention/chunk.inl"
#include "linear_attention/gate.h"
#include "linear_attention/gsa.h"
#include "linear_attention/limits.h"
#include "linear_attention/step.inl"

namespace icrl::ICRL_ISA {
namespace {

// About how many nanoseconds one thread takes for a token and an entry of both states together.
constexpr double kForward = 0.035, kBackward = 0.12, kStep = 0.06;

// How many threads `tokens` tokens of all heads are worth.
int team_of(const GsaShape& s, int64_t tokens, double nanoseconds) {
  return team_for(nanoseconds * static_cast<double>(tokens * s.kv_heads * s.slots * (s.k + s.v)), s.threads);
}

// Reads n tokens' s and gates from t on; returns the largest gate.
template <Gate gate, bool Keep>
float read(Chunk<gate, Keep>& c, const GsaShape& s, const void* writes, const void* g, int64_t t, int n, int64_t head,
           Next next) {
  load_rows(c.k, rows(writes, s.dtype, t, s.kv_heads, head, s.slots), n, s.slots, c.Kp, next);
  return c.gates(rows(g, s.gate_dtype, t, s.kv_heads, head, s.slots), n, next);
}

// q = scale times n tokens' queries, `ld` apart
ICRL_INLINE void read_queries(float* q, int64_t ld, const GsaShape& s, const void* from, int64_t t, int n,
                              int64_t query_head, Next next) {
  const int64_t Kp = pad16(s.k);
  load_rows(q, rows(from, s.dtype, t, s.heads, query_head, s.k), n, s.k, Kp, ld, next);
  for (int i = 0; i < n; ++i)
    for (int64_t at = i * ld; at < i * ld + Kp; at += kWidth) store(q + at, load(q + at) * splat(s.scale));
}

// From q and k, [16] rows of `ld`, and S: the scores A, the logits l without their diagonal terms, p and pd = P p
template <Gate gate, bool Keep>
ICRL_INLINE void read_slots(Chunk<gate, Keep>& c, float* a, float* l, float* p, float* pd, const float* q, int64_t ld,
                            const float* kt, const float* state, int64_t K, int n) {
  product(a, kChunk, kChunk, kChunk, Left{q, ld, 1}, kt, kChunk, K);
  c.gather(l, q, ld, K, state, a, n);
  for (int i = 0; i < n; ++i) softmax(p + i * c.Kp, l + i * c.Kp, a[i * kChunk + i], c.k + i * c.Kp, c.K, c.Kp);
  __builtin_memset(p + n * c.Kp, 0, (kChunk - n) * c.Kp * 4);
  c.queries(p, 1.f, p, pd);
}

template <Gate gate>
bool forward(const GsaShape& s, const GsaForward& x) {
  const int64_t pairs = s.sequences * s.kv_heads, group = s.heads / s.kv_heads;
  // With fewer (sequence, head) pairs than threads, columns of v are shared out; each share repeats the first pass.
  int64_t width = s.v;
  const int threads = team_of(s, s.bounds[s.sequences], kForward);
  if (pairs && pairs < threads) width = pad16((s.v * pairs + threads - 1) / threads);
  const int64_t splits = (s.v + width - 1) / width;
  int failed = 0;
  parallel_for(pairs * splits, threads, [&](int64_t item) {
    const int64_t pair = item / splits, v0 = item % splits * width, V = v0 + width < s.v ? width : s.v - v0;
    const int64_t sequence = pair / s.kv_heads, head = pair % s.kv_heads, K = s.k, M = s.slots, Kp = pad16(K);
    Chunk<gate, false> c;
    Arena arena;
    float *keys = nullptr, *values = nullptr, *k = nullptr, *kt = nullptr, *q = nullptr, *a = nullptr;
    float *l = nullptr, *p = nullptr, *pd = nullptr, *out = nullptr;
    for (int pass = 0; pass < 2; ++pass) {
      if (pass && !arena.allocate()) {
        __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
        return;
      }
      c.layout(arena, M, V);
      keys = arena.take(Kp * c.Kp), values = arena.take(c.Kp * c.Vp);
      k = arena.take(kChunk * Kp), kt = arena.take(kChunk * Kp), q = arena.take(kChunk * Kp);
      a = arena.take(kChunk * kChunk), out = arena.take(kChunk * c.Vp);
      l = arena.take(kChunk * c.Kp), p = arena.take(kChunk * c.Kp);
      pd = gate == Gate::none ? p : arena.take(kChunk * c.Kp);
    }
    const int64_t Mp = c.Kp, Vp = c.Vp, first = s.bounds[sequence], last = s.bounds[sequence + 1];
    read_state(keys, Mp, 1, Kp * Mp, x.initial_keys ? x.initial_keys + pair * K * M : nullptr, M, K, M);
    read_state(values, Vp, 1, Mp * Vp, x.initial_values ? x.initial_values + pair * M * s.v + v0 : nullptr, s.v, M, V);
    float largest = -__builtin_inff();
    for (int64_t t = first; t < last; t += kChunk) {
      const int n = last - t < kChunk ? int(last - t) : kChunk;
      const float m = read(c, s, x.s, x.g, t, n, head, Next::later);
      largest = m > largest ? m : largest;
      Rows value_rows = rows(x.v, s.dtype, t, s.kv_heads, head, s.v);
      value_rows.at += v0;
      load_rows(c.v, value_rows, n, V, Vp, Next::later);
      load_rows(k, rows(x.k, s.dtype, t, s.kv_heads, head, K), n, K, Kp, Next::later);
      transpose(c.kt, c.kd, kChunk, Mp);
      transpose(kt, k, kChunk, Kp);
      for (int64_t r = 0; r < group; ++r) {
        const int64_t query_head = head * group + r;
        read_queries(q, Kp, s, x.q, t, n, query_head, Next::later);
        read_slots(c, a, l, p, pd, q, Kp, kt, keys, K, n);
        c.scores(a, p, pd, n);
        for_tiles(kChunk, Vp, [&](auto& tile, int64_t i, int64_t j) __attribute__((always_inline)) {
          tile.zero();
          tile.multiply(Left{pd, Mp, 1}, values + j, Vp, i, 0, M);
          tile.template lower<false>(Left{a, kChunk, 1}, c.v + j, Vp, i);
          tile.write(out + i * Vp + j, Vp);
        });
        store_rows(x.o, out, s.dtype, (t * s.heads + query_head) * s.v + v0, s.heads * s.v, n, V, Vp, Next::later);
      }
      for_tiles(Kp, Mp, [&](auto& tile, int64_t i, int64_t j) __attribute__((always_inline)) {
        tile.read(keys + i * Mp + j, Mp);
        if constexpr (gate != Gate::none) tile.scale_columns(c.decay + j);
        tile.multiply(Left{k, 1, Kp}, c.ku + j, Mp, i, 0, n);
        tile.write(keys + i * Mp + j, Mp);
      });
      for_tiles(Mp, Vp, [&](auto& tile, int64_t i, int64_t j) __attribute__((always_inline)) {
        tile.read(values + i * Vp + j, Vp);
        if constexpr (gate != Gate::none) tile.scale_rows(c.decay + i);
        tile.multiply(Left{c.ku, 1, Mp}, c.v + j, Vp, i, 0, n);
        tile.write(values + i * Vp + j, Vp);
      });
    }
    if (v0 == 0) write_state(x.final_keys + pair * K * M, M, keys, Mp, 1, K, M);
    write_state(x.final_values + pair * M * s.v + v0, s.v, values, Vp, 1, M, V);
    if (largest > s.allowance) __atomic_store_n(x.refused, 1, __ATOMIC_RELAXED);
    free(arena.base);
  });
  return !failed;
}

// Both passes are gated linear attention with s as keys. The second's queries are p, its values v. The first, turned
// around, has dl as queries and k as values, scale q is the gradient of its output, and what it gathers is l. So one
// ChunkGradient serves both, its values v and k side by side: rows of its state are U's columns, then S's rows.
template <Gate gate>
struct Backward {
  const GsaShape& s;
  const GsaBackward& x;
  int64_t pair, head, Vp, Kp, width;  // width = Vp + Kp
  ChunkGradient<gate> m;
  float *d_o, *a, *l, *p, *pd, *dl, *dld, *dldt, *dq, *dqt;

  Backward(const GsaShape& s_, const GsaBackward& x_, int64_t pair_)
      : s(s_), x(x_), pair(pair_), head(pair_ % s_.kv_heads), Vp(pad16(s_.v)), Kp(pad16(s_.k)), width(Vp + Kp) {}

  int64_t state_size() const { return pad16(s.slots) * width; }

  void layout(Arena& arena) {
    m.layout(arena, s.slots, Vp + s.k);
    const int64_t n = kChunk * m.Kp;
    d_o = arena.take(kChunk * width), a = arena.take(kChunk * kChunk);
    l = arena.take(n), p = arena.take(n), dl = arena.take(n), dldt = arena.take(n);
    pd = gate == Gate::none ? p : arena.take(n), dld = gate == Gate::none ? dl : arena.take(n);
    dq = arena.take(kChunk * Kp), dqt = arena.take(kChunk * Kp);
  }

  void read_pair(float* to, const float* keys, const float* values) {
    const int64_t M = s.slots;
    read_state(to, 1, m.Kp, Vp * m.Kp, values ? values + pair * M * s.v : nullptr, s.v, M, s.v);
    read_state(to + Vp * m.Kp, m.Kp, 1, Kp * m.Kp, keys ? keys + pair * s.k * M : nullptr, M, s.k, M);
  }
  void read_states(float* state) {
    read_pair(state, x.initial_keys, x.initial_values);
    read_pair(m.gradient, x.d_final_keys, x.d_final_values);
  }
  void write_gradient() {
    const int64_t M = s.slots;
    if (!x.d_initial_keys) return;
    write_state(x.d_initial_keys + pair * s.k * M, M, m.gradient + Vp * m.Kp, m.Kp, 1, s.k, M);
    write_state(x.d_initial_values + pair * M * s.v, s.v, m.gradient, 1, m.Kp, M, s.v);
  }

  void read_chunk(int64_t t, int n, Next next) {
    if (read(m.c, s, x.s, x.g, t, n, head, next) > s.allowance) __atomic_store_n(x.refused, 1, __ATOMIC_RELAXED);
    load_rows(m.c.v, rows(x.v, s.dtype, t, s.kv_heads, head, s.v), n, s.v, Vp, width, next);
    load_rows(m.c.v + Vp, rows(x.k, s.dtype, t, s.kv_heads, head, s.k), n, s.k, Kp, width, next);
  }

  void advance(float* state, const float* from, int64_t t, int n) {
    read_chunk(t, n, Next::later);
    m.advance(state, from, m.c.v, n);
  }

  void chunk(const float* state, int64_t t, int n) {
    const int64_t group = s.heads / s.kv_heads, M = s.slots, row = t * s.kv_heads + head;
    read_chunk(t, n, Next::earlier);
    transpose(m.c.kt, m.c.kd, kChunk, m.Kp);
    m.begin(state, m.c.v);
    for (int64_t r = 0; r < group; ++r) query_head(state, t, n, head * group + r, r == 0);
    store_rows(x.ds, m.dk, s.dtype, row * M, s.kv_heads * M, n, M, m.Kp, Next::earlier);
    store_rows(x.dv, m.dvalue, s.dtype, row * s.v, s.kv_heads * s.v, n, s.v, width, Next::earlier);
    store_rows(x.dk, m.dvalue + Vp, s.dtype, row * s.k, s.kv_heads * s.k, n, s.k, width, Next::earlier);
    if constexpr (gate != Gate::none) {
      m.gates_gradient();
      store_rows(x.dg, m.dg, s.gate_dtype, row * M, s.kv_heads * M, n, M, m.Kp, Next::earlier);
    }
  }

  void query_head(const float* state, int64_t t, int n, int64_t query_head, bool first) {
    const float *keys = state + Vp * m.Kp, *q = d_o + Vp;
    load_rows(d_o, rows(x.d_o, s.dtype, t, s.heads, query_head, s.v), n, s.v, Vp, width, Next::earlier);
    read_queries(d_o + Vp, width, s, x.q, t, n, query_head, Next::earlier);
    read_slots(m.c, a, l, p, pd, q, width, m.value_t + Vp * kChunk, keys, s.k, n);
    // the second pass
    m.c.scores(m.a, p, pd, n);
    m.scores_gradient(m.a, m.dvalue, d_o, Vp);
    product(m.da, kChunk, kChunk, kChunk, Left{d_o, width, 1}, m.value_t, kChunk, s.v);
    m.c.gather(m.dq, d_o, width, s.v, state, m.da, n);
    m.template keys_gradient<false>(m.da, p, pd, m.dq, n);
    m.state_gradient(m.gradient, Vp, pd, d_o, n, first);
    softmax_gradient(n);
    // the first
    m.c.scores(m.a, dl, dld, n);
    m.scores_gradient(m.a, m.dvalue + Vp, q, Kp);
    m.template keys_gradient<false>(a, dl, dld, l, n);
    m.state_gradient(m.gradient + Vp * m.Kp, Kp, dld, q, n, first);
    transpose(dldt, dld, kChunk, m.Kp);
    product(dqt, kChunk, Kp, kChunk, Left{keys, m.Kp, 1}, dldt, kChunk, s.slots);
    transpose(dq, dqt, Kp, kChunk);
    for_tiles(kChunk, Kp, [&](auto& tile, int64_t i, int64_t j) __attribute__((always_inline)) {
      tile.read(dq + i * Kp + j, Kp);
      tile.template lower<false>(Left{m.a, kChunk, 1}, m.c.v + Vp + j, width, i);
      tile.write(dq + i * Kp + j, Kp);
    });
    for (int64_t at = 0; at < n * Kp; at += kWidth) store(dq + at, load(dq + at) * splat(s.scale));
    store_rows(x.dq, dq, s.dtype, (t * s.heads + query_head) * s.k, s.heads * s.k, n, s.k, Kp, Next::earlier);
  }

  // dl = p (dp - p . dp), where m.dq is dp without its diagonal terms
  void softmax_gradient(int n) {
    for (int i = 0; i < n; ++i) {
      const Vec w = splat(m.da[i * kChunk + i]);
      Vec total = Vec{};
      for (int64_t at = i * m.Kp; at < (i + 1) * m.Kp; at += kWidth) {
        const Vec x = load(m.dq + at) + w * load(m.c.k + at);
        store(m.dq + at, x);
        total += load(p + at) * x;
      }
      const Vec mean = splat(sum(total));
      for (int64_t at = i * m.Kp; at < (i + 1) * m.Kp; at += kWidth)
        store(dl + at, load(p + at) * (load(m.dq + at) - mean));
    }
    __builtin_memset(dl + n * m.Kp, 0, (kChunk - n) * m.Kp * 4);
    m.c.queries(dl, 1.f, dl, dld);
  }
};

template <Gate gate>
bool backward(const GsaShape& s, const GsaBackward& x) {
  int failed = 0;
  parallel_for(s.sequences * s.kv_heads, team_of(s, s.bounds[s.sequences], kBackward), [&](int64_t pair) {
    const int64_t sequence = pair / s.kv_heads;
    Backward<gate> b(s, x, pair);
    if (!backward_sequence(b, s.bounds[sequence], s.bounds[sequence + 1]))
      __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
  });
  return !failed;
}

}  // namespace

#define ICRL_GATED(f) (s.gate == Gate::none ? f<Gate::none>(s, p) : f<Gate::channel>(s, p))

bool gsa_forward(const GsaShape& s, const GsaForward& p) { return ICRL_GATED(forward); }
bool gsa_backward(const GsaShape& s, const GsaBackward& p) { return ICRL_GATED(backward); }

bool gsa_step(const GsaShape& s, const GsaStep& p) {
  const int64_t pairs = s.sequences * s.kv_heads, group = s.heads / s.kv_heads, K = s.k, V = s.v, M = s.slots;
  int refused = 0;
  parallel_for(pairs, team_of(s, s.sequences, kStep), [&](int64_t pair) {
    alignas(64) float q[kMostChannels], k[kMostChannels], w[kMostChannels], e[kMostChannels], l[kMostChannels];
    alignas(64) float weights[kMostChannels], v[kMostValues], out[kMostValues], tail[kMostChannels * kWidth];
    load_row(k, p.k, s.dtype, pair * K, K, pad16(K));
    load_row(v, p.v, s.dtype, pair * V, V, pad16(V));
    load_row(w, p.s, s.dtype, pair * M, M, pad16(M));
    if (s.gate == Gate::none) {
      for (int64_t i = 0; i < pad16(M); ++i) e[i] = 1.f;
    } else {
      load_row(e, p.g, s.gate_dtype, pair * M, M, pad16(M));
      if (decays(e, M) > s.allowance) __atomic_store_n(&refused, 1, __ATOMIC_RELAXED);
    }
    float *keys = p.keys + pair * K * M, *values = p.values + pair * M * V;
    for (int64_t r = 0; r < group; ++r) {
      load_row(q, p.q, s.dtype, (pair * group + r) * K, K, pad16(K));
      scale_row(q, s.scale, pad16(K));
      gsa_head(r == 0, keys, values, K, V, M, q, k, v, w, e, l, weights, out, tail);
      store_row(p.o, out, s.dtype, (pair * group + r) * V, V);
    }
  });
  return !refused;
}

}  // namespace icrl::ICRL_ISA
