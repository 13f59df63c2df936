// One token of one head, on float rows and a state in the user's layout: what the ops' steps and the fused mixers
// share.
//
//   K, V, M    channels of a key, of a value; slots
//   q, k       [K] query and key, zeros from there to a whole number of 16;  r, a, b: RWKV-7's, alike
//   v, out     [V] value and output, with room for a whole number of 16
//   e          decays, exp g: [K] of a state's rows, or [M] of the slots
//   w          [M] what the token writes to each slot
//   state      [K, V], in place;  keys [K, M] and values [M, V] of slots
//   tail       room for [K or M, kWidth]: the state's last columns where they do not fill a vector
#pragma once

#include <cstdint>

#include "common/vec.h"

namespace icrl::ICRL_ISA {
namespace {

constexpr float kNormEpsilon = 1e-6f;  // as L2_EPSILON in gated_delta_rule.py

// n rows of x, Kp apart with zeros at their ends, by the root of their square sums and kNormEpsilon; `by`: the factors
ICRL_INLINE void normalize(float* x, float* by, int n, int64_t Kp) {
  for (int i = 0; i < n; ++i) {
    float* row = x + i * Kp;
    Vec squares = Vec{};
    for (int64_t c = 0; c < Kp; c += kWidth) squares += load(row + c) * load(row + c);
    by[i] = 1.f / __builtin_sqrtf(sum(squares) + kNormEpsilon);
    for (int64_t c = 0; c < Kp; c += kWidth) store(row + c, load(row + c) * splat(by[i]));
  }
}

// to = softmax(l + w s) over the first M of Mp numbers, zeros after them
ICRL_INLINE void softmax(float* to, const float* l, float w, const float* s, int64_t M, int64_t Mp) {
  for (int64_t c = 0; c < Mp; c += kWidth) store(to + c, load(l + c) + splat(w) * load(s + c));
  for (int64_t c = M; c < Mp; ++c) to[c] = -__builtin_inff();
  Vec most = splat(-__builtin_inff()), total = Vec{};
  for (int64_t c = 0; c < Mp; c += kWidth) most = vmax(load(to + c), most);
  const Vec top = splat(max_lane(most));
  for (int64_t c = 0; c < Mp; c += kWidth) {
    const Vec x = vexp(load(to + c) - top);
    store(to + c, x);
    total += x;
  }
  const Vec inverse = splat(1.f / sum(total));
  for (int64_t c = 0; c < Mp; c += kWidth) store(to + c, load(to + c) * inverse);
}

// f.columns<N>(state, ld, at) does N vectors of columns of the state from column `at` on, in place.
template <class F>
ICRL_INLINE void for_columns(float* state, int64_t K, int64_t V, float* tail, const F& f) {
  int64_t j = 0;
  for (; j + 4 * kWidth <= V; j += 4 * kWidth) f.template columns<4>(state + j, V, j);
  for (; j + 2 * kWidth <= V; j += 2 * kWidth) f.template columns<2>(state + j, V, j);
  for (; j + kWidth <= V; j += kWidth) f.template columns<1>(state + j, V, j);
  if (j == V) return;
  for (int64_t i = 0; i < K; ++i)
    for (int64_t c = 0; c < kWidth; ++c) tail[i * kWidth + c] = j + c < V ? state[i * V + j + c] : 0.f;
  f.template columns<1>(tail, kWidth, j);
  for (int64_t i = 0; i < K; ++i)
    for (int64_t c = 0; j + c < V; ++c) state[i * V + j + c] = tail[i * kWidth + c];
}

// S = diag(e) S + k v^T, or S diag(e) + k v^T if Columns decay, if Update; then o = S^T q, the state touched once.
template <bool Update, bool Columns>
struct DecayColumns {
  int64_t K;
  const float *k, *e, *v, *q;
  float* out;

  template <int N>
  ICRL_INLINE void columns(float* state, int64_t ld, int64_t first) const {
    Vec o[N], x[N], w[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      o[n] = Vec{}, x[n] = load(v + first + n * kWidth);
      if (Columns) w[n] = load(e + first + n * kWidth);
    }
    for (int64_t i = 0; i < K; ++i)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        float* at = state + i * ld + n * kWidth;
        Vec y = load(at);
        if (Update) store(at, y = y * (Columns ? w[n] : splat(e[i])) + splat(k[i]) * x[n]);
        o[n] += y * splat(q[i]);
      }
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) store(out + first + n * kWidth, o[n]);
  }
};

// S = diag(e) S, u = beta (v - S^T k), S += k u^T, o = S^T q. `kd` is e k.
struct DeltaColumns {
  int64_t K;
  const float *k, *kd, *e, *v, *q;
  float beta;
  float* out;

  template <int N>
  ICRL_INLINE void columns(float* state, int64_t ld, int64_t first) const {
    Vec o[N], u[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) o[n] = Vec{}, u[n] = load(v + first + n * kWidth);
    for (int64_t i = 0; i < K; ++i)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) u[n] -= load(state + i * ld + n * kWidth) * splat(kd[i]);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) u[n] *= splat(beta);
    for (int64_t i = 0; i < K; ++i)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        float* at = state + i * ld + n * kWidth;
        // the first pass over the next head's state, this one being in the nearest cache
        if (n % (32 / kWidth) == 0) __builtin_prefetch(at + K * ld);
        const Vec y = load(at) * splat(e[i]) + splat(k[i]) * u[n];
        store(at, y);
        o[n] += y * splat(q[i]);
      }
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) store(out + first + n * kWidth, o[n]);
  }
};

// u = S^T a, S = diag(e) S + k v^T + b u^T, o = S^T r
struct RwkvColumns {
  int64_t K;
  const float *r, *e, *k, *v, *a, *b;
  float* out;

  template <int N>
  ICRL_INLINE void columns(float* state, int64_t ld, int64_t first) const {
    Vec o[N], u[N], x[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) o[n] = Vec{}, u[n] = Vec{}, x[n] = load(v + first + n * kWidth);
    for (int64_t i = 0; i < K; ++i)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) u[n] += load(state + i * ld + n * kWidth) * splat(a[i]);
    for (int64_t i = 0; i < K; ++i)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        float* at = state + i * ld + n * kWidth;
        // the first pass over the next head's state, this one being in the nearest cache
        if (n % (32 / kWidth) == 0) __builtin_prefetch(at + K * ld);
        const Vec y = load(at) * splat(e[i]) + splat(k[i]) * x[n] + splat(b[i]) * u[n];
        store(at, y);
        o[n] += y * splat(r[i]);
      }
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) store(out + first + n * kWidth, o[n]);
  }
};

ICRL_INLINE void scale_row(float* x, float by, int64_t Kp) {
  for (int64_t i = 0; i < Kp; i += kWidth) store(x + i, load(x + i) * splat(by));
}

// Gated linear attention: the head's first query updates its state, further ones of the same head read it.
ICRL_INLINE void gla_head(bool update, float* state, int64_t K, int64_t V, const float* q, const float* k,
                          const float* e, const float* v, float* out, float* tail) {
  update ? for_columns(state, K, V, tail, DecayColumns<true, false>{K, k, e, v, q, out})
         : for_columns(state, K, V, tail, DecayColumns<false, false>{K, k, e, v, q, out});
}

// Gated slot attention, likewise; l and p [M]: scores and their softmax
ICRL_INLINE void gsa_head(bool update, float* keys, float* values, int64_t K, int64_t V, int64_t M, const float* q,
                          const float* k, const float* v, const float* w, const float* e, float* l, float* p,
                          float* out, float* tail) {
  update ? for_columns(keys, K, M, tail, DecayColumns<true, true>{K, k, e, w, q, l})
         : for_columns(keys, K, M, tail, DecayColumns<false, true>{K, k, e, w, q, l});
  softmax(p, l, 0.f, w, M, (M + 15) / 16 * 16);
  gla_head(update, values, M, V, p, w, e, v, out, tail);
}

// The gated delta rule, where q and k are normalised if wanted and q is scaled, in place; kd: room for [K]
ICRL_INLINE void delta_head(bool norm, float scale, float beta, float* state, int64_t K, int64_t V, float* q, float* k,
                            const float* e, const float* v, float* kd, float* out, float* tail) {
  const int64_t Kp = (K + 15) / 16 * 16;
  float by;
  if (norm) normalize(q, &by, 1, Kp), normalize(k, &by, 1, Kp);
  for (int64_t i = 0; i < Kp; i += kWidth) store(kd + i, load(k + i) * load(e + i));
  scale_row(q, scale, Kp);
  for_columns(state, K, V, tail, DeltaColumns{K, k, kd, e, v, q, beta, out});
}

ICRL_INLINE void rwkv7_head(float* state, int64_t K, int64_t V, const float* r, const float* e, const float* k,
                            const float* v, const float* a, const float* b, float* out, float* tail) {
  for_columns(state, K, V, tail, RwkvColumns{K, r, e, k, v, a, b, out});
}

}  // namespace
}  // namespace icrl::ICRL_ISA
