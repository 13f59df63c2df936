// model_based.h's sums with vectors of actions: lanes are independent and go through the next states in the same order,
// so the bits are the same.
//
//   Lanes       8 floats, one for each of the actions [c, c + 8) of a state
//   m           the learner; its S, A, L and arrays are those of model_based.h
//   s, j        a state; a next state, within span[s]
//   even, odd   sums over the even and over the odd next states
//   c           of search: [n] float32, cumulative
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>

#include "tabular/model_based.h"

namespace icrl::ICRL_ISA {
namespace {

typedef float Lanes __attribute__((vector_size(4 * kActionLanes), may_alias));
typedef float LooseLanes __attribute__((vector_size(4 * kActionLanes), aligned(4), may_alias));
typedef int32_t LaneBits __attribute__((vector_size(4 * kActionLanes), may_alias));

inline __attribute__((always_inline)) Lanes load_lanes(const float* p) {
  return *reinterpret_cast<const LooseLanes*>(p);
}
inline __attribute__((always_inline)) Lanes load_some(const float* p, int64_t n) {
  Lanes x = Lanes{};
  for (int64_t i = 0; i < kActionLanes && i < n; ++i) x[i] = p[i];
  return x;
}
inline __attribute__((always_inline)) Lanes most(Lanes a, Lanes b) { return a > b ? a : b; }
inline __attribute__((always_inline)) float most_lane(Lanes x) {
  x = most(x, __builtin_shuffle(x, LaneBits{4, 5, 6, 7, 0, 1, 2, 3}));
  x = most(x, __builtin_shuffle(x, LaneBits{2, 3, 0, 1, 6, 7, 4, 5}));
  x = most(x, __builtin_shuffle(x, LaneBits{1, 0, 3, 2, 5, 4, 7, 6}));
  return x[0];
}

// q of the actions [c, c + 8) in state s; lanes past the task's actions hold -inf. They read the next state's counts,
// and `kLast` says that there may be none to read.
template <bool kLast>
inline __attribute__((always_inline)) Lanes q_lanes(const ModelBased& m, int64_t s, int64_t c) {
  const int64_t begin = m.span[2 * s], end = m.span[2 * s + 1], rest = m.S * m.S * m.A;
  const auto term = [&](int64_t j) {
    const int64_t at = (s * m.S + j) * m.A + c;
    return (kLast ? load_some(m.successors + at, rest - at) : load_lanes(m.successors + at)) * (m.value[j] - Lanes{});
  };
  Lanes even = Lanes{}, odd = Lanes{};
  int64_t j = begin;
  if (j & 1 && j < end) odd += term(j++);
  for (; j + 1 < end; j += 2) even += term(j), odd += term(j + 1);
  if (j < end) even += term(j);
  const int64_t i = s * m.L + c;
  const Lanes inverse = load_lanes(m.inverse + i), follow = load_lanes(m.follow + i), zero = Lanes{};
  const Lanes after = follow == zero ? m.beyond - zero : follow * (even + odd);
  const Lanes known = (load_lanes(m.mean + i) + (m.width - zero) * inverse) + after;
  return inverse == zero ? m.optimistic - zero : known;
}

inline bool near_end(const ModelBased& m, int64_t s) {  // whether a vector of its counts could reach past the record's
  return (s * m.S + m.span[2 * s + 1]) * m.A + kActionLanes > m.S * m.S * m.A;
}

void sweep_lanes(ModelBased& m, float rms, bool forward) {
  Lanes best = Lanes{} - INFINITY;
  for (int64_t i = 0; i < m.ns * m.L; i += kActionLanes) best = most(best, load_lanes(m.mean + i));
  m.set_optimism(most_lane(best), rms);
  const int64_t blocks = (m.ns + kSweepBlock - 1) / kSweepBlock;
  for (int64_t k = 0; k < blocks; ++k) {
    const int64_t from = (forward ? k : blocks - 1 - k) * kSweepBlock;
    const int64_t n = m.ns - from < kSweepBlock ? m.ns - from : kSweepBlock;
    float v[kSweepBlock];
    for (int64_t i = 0; i < n; ++i) {
      const int64_t s = from + i;
      Lanes x = Lanes{} - INFINITY;
      for (int64_t c = 0; c < m.na; c += kActionLanes)
        x = most(x, near_end(m, s) ? q_lanes<true>(m, s, c) : q_lanes<false>(m, s, c));
      v[i] = most_lane(x) + 0.f;
    }
    for (int64_t i = 0; i < n; ++i) m.value[from + i] = v[i];
  }
}

struct FastOps {
  static void sweep(ModelBased& m, float rms, bool forward) { sweep_lanes(m, rms, forward); }
  static void fill_row(ModelBased& m, int64_t s) {
    for (int64_t c = 0; c < m.na; c += kActionLanes)
      *reinterpret_cast<LooseLanes*>(m.row + c) = near_end(m, s) ? q_lanes<true>(m, s, c) : q_lanes<false>(m, s, c);
  }
  static int64_t search(const float* c, int64_t n, float u) {
#if defined(__AVX512F__)
    int64_t j = 0;
    while (n > 32) {
      const int64_t half = n / 2;
      j += c[j + half - 1] <= u ? half : 0;
      n -= half;
    }
    const uint32_t own = ~uint32_t{0} >> (32 - n);  // n >= 1
    const __m512 x = _mm512_set1_ps(u);
    const __mmask16 low = static_cast<__mmask16>(own), high = static_cast<__mmask16>(own >> 16);
    const uint32_t a = _mm512_mask_cmp_ps_mask(low, _mm512_maskz_loadu_ps(low, c + j), x, _CMP_LE_OQ);
    const uint32_t b = _mm512_mask_cmp_ps_mask(high, _mm512_maskz_loadu_ps(high, c + j + 16), x, _CMP_LE_OQ);
    return j + __builtin_popcount(a | b << 16);
#elif defined(__AVX2__)
    int64_t j = 0;
    while (n > 16) {
      const int64_t half = n / 2;
      j += c[j + half - 1] <= u ? half : 0;
      n -= half;
    }
    const __m256 x = _mm256_set1_ps(u);
    const __m256i size = _mm256_set1_epi32(static_cast<int>(n)), lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i low = _mm256_cmpgt_epi32(size, lanes);
    const __m256i high = _mm256_cmpgt_epi32(size, _mm256_add_epi32(lanes, _mm256_set1_epi32(8)));
    const __m256 a = _mm256_cmp_ps(_mm256_maskload_ps(c + j, low), x, _CMP_LE_OQ);
    const __m256 b = _mm256_cmp_ps(_mm256_maskload_ps(c + j + 8, high), x, _CMP_LE_OQ);
    return j + __builtin_popcount(_mm256_movemask_ps(_mm256_and_ps(a, _mm256_castsi256_ps(low))) |
                                  _mm256_movemask_ps(_mm256_and_ps(b, _mm256_castsi256_ps(high))) << 8);
#else
    const int64_t j = PlainOps::search(c, n, u);
    return j + (c[j] <= u);
#endif
  }
};

}  // namespace
}  // namespace icrl::ICRL_ISA
