// Eight doubles at a time, and 8 x 8 tiles of them: products, inverses, products with vectors.
//
//   v8, v8u   8 doubles, aligned and at any address;  f8u: 8 floats at any address
//   i8        8 int64, as comparisons give them
//   a, acc    8 vectors in registers: an 8 x 8 tile by rows, or eight sums whose lanes are still to be added
//   m, u      [8, 8] doubles in memory, row-major
//   x         [8] doubles in memory
#pragma once

#include <immintrin.h>

namespace icrl::ICRL_ISA {
namespace {

typedef double v8 __attribute__((vector_size(64)));
typedef double v8u __attribute__((vector_size(64), aligned(8)));
typedef float f8u __attribute__((vector_size(32), aligned(4)));
typedef long long i8 __attribute__((vector_size(64)));

inline v8 load(const double* p) { return *reinterpret_cast<const v8u*>(p); }
#if defined(__AVX512F__)
// GCC 12 converts in halves otherwise
inline v8 load(const float* p) { return _mm512_maskz_cvtps_pd(0xff, _mm256_loadu_ps(p)); }
#else
inline v8 load(const float* p) { return __builtin_convertvector(*reinterpret_cast<const f8u*>(p), v8); }
#endif
inline void store(double* p, const v8& x) { *reinterpret_cast<v8u*>(p) = x; }
inline v8 splat(double x) { return v8{x, x, x, x, x, x, x, x}; }

// An initialiser {} would become a string instruction, which is slow to start.
template <class V>
inline void clear(V (&a)[8]) {
#pragma GCC unroll 8
  for (int r = 0; r < 8; ++r) a[r] = V{};
}

// Lane r of the result is the sum of a[r].
template <class V>
inline V row_sums(const V (&a)[8]) {
  V t[4], u[2];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    t[i] = __builtin_shufflevector(a[2 * i], a[2 * i + 1], 0, 8, 2, 10, 4, 12, 6, 14) +
           __builtin_shufflevector(a[2 * i], a[2 * i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
    u[i] = __builtin_shufflevector(t[2 * i], t[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13) +
           __builtin_shufflevector(t[2 * i], t[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15);
  return __builtin_shufflevector(u[0], u[1], 0, 1, 2, 3, 8, 9, 10, 11) +
         __builtin_shufflevector(u[0], u[1], 4, 5, 6, 7, 12, 13, 14, 15);
}

// acc -= m u, each 8 x 8
inline void subtract_product(v8 (&acc)[8], const double* m, const double* u) {
#pragma GCC unroll 8
  for (int k = 0; k < 8; ++k) {
    const v8 row = load(u + 8 * k);
#pragma GCC unroll 8
    for (int r = 0; r < 8; ++r) acc[r] -= m[8 * r + k] * row;
  }
}

template <int k>
inline bool eliminate(v8 (&a)[8]) {
  const i8 lanes = {0, 1, 2, 3, 4, 5, 6, 7};
  const i8 at_k = lanes == k;
  const double pivot = a[k][k];
  const v8 row = (at_k ? splat(1) : a[k]) * (1 / pivot);
#pragma GCC unroll 8
  for (int r = 0; r < 8; ++r) {
    if (r == k) continue;
    const double f = a[r][k];
    a[r] = (at_k ? splat(0) : a[r]) - f * row;
  }
  a[k] = row;
  return pivot > 0;
}

// In place by Gauss-Jordan elimination; false where a pivot is not positive.
inline bool invert(v8 (&a)[8]) {
  bool fine = eliminate<0>(a);
  fine &= eliminate<1>(a);
  fine &= eliminate<2>(a);
  fine &= eliminate<3>(a);
  fine &= eliminate<4>(a);
  fine &= eliminate<5>(a);
  fine &= eliminate<6>(a);
  fine &= eliminate<7>(a);
  return fine;
}

inline void subtract_times(v8 (&acc)[8], const double* m, const double* x) {
  const v8 right = load(x);
#pragma GCC unroll 8
  for (int r = 0; r < 8; ++r) acc[r] -= load(m + 8 * r) * right;
}

}  // namespace

}  // namespace icrl::ICRL_ISA
