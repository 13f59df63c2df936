// Eight doubles at a time, and 8 x 8 tiles of them: products, inverses, products with vectors.
//
//   v8, v8u   8 doubles, aligned and at any address;  f8u: 8 floats at any address
//   i8        8 int64, as comparisons give them
//   Part      kDoubles doubles, a register; an Eight is kParts of them
//   a, acc    8 vectors in registers: an 8 x 8 tile by rows, or eight sums whose lanes are still to be added
//   m, u      [8, 8] doubles in memory, row-major
//   x         [8] doubles in memory
#pragma once

#include <immintrin.h>

#include <cstdint>

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
template <class V, int N>
inline void clear(V (&a)[N]) {
#pragma GCC unroll 8
  for (int r = 0; r < N; ++r) a[r] = V{};
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

// ---- in the instruction set's own vectors ---------------------------------------------------------------------------
// GCC keeps vectors wider than the registers in memory, so what is hot goes through an Eight part by part.

#if defined(__AVX512F__)
constexpr int kDoubles = 8;
#elif defined(__AVX2__)
constexpr int kDoubles = 4;
#else
constexpr int kDoubles = 2;
#endif
constexpr int kParts = 8 / kDoubles, kTogether = kDoubles;  // of Eights: their sums fill half of sixteen registers

typedef double Part __attribute__((vector_size(8 * kDoubles)));
typedef double PartAt __attribute__((vector_size(8 * kDoubles), aligned(8)));
typedef float HalfPartAt __attribute__((vector_size(4 * kDoubles), aligned(4)));
typedef long long PartMask __attribute__((vector_size(8 * kDoubles)));

inline Part part(const double* p) { return *reinterpret_cast<const PartAt*>(p); }
#if defined(__AVX512F__)
inline Part part(const float* p) { return load(p); }
#elif defined(__AVX2__)
inline Part part(const float* p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
#else
inline Part part(const float* p) { return __builtin_convertvector(*reinterpret_cast<const HalfPartAt*>(p), Part); }
#endif
inline void store_part(double* p, const Part& x) { *reinterpret_cast<PartAt*>(p) = x; }
inline Part splat_part(double x) { return x - Part{}; }

struct Eight {
  Part part[kParts];
};

template <class T>
inline Eight eight(const T* p) {
  Eight x;
#pragma GCC unroll 4
  for (int i = 0; i < kParts; ++i) x.part[i] = part(p + i * kDoubles);
  return x;
}
inline Eight eight_of(double value) {
  Eight x;
#pragma GCC unroll 4
  for (int i = 0; i < kParts; ++i) x.part[i] = splat_part(value);
  return x;
}
inline void store(double* p, const Eight& x) {
#pragma GCC unroll 4
  for (int i = 0; i < kParts; ++i) store_part(p + i * kDoubles, x.part[i]);
}

inline v8 whole(const Eight& x) {
  alignas(64) double p[8];
  return store(p, x), load(p);
}

#define ICRL_EACH_PART(name, expression)                       \
  inline Eight name(const Eight& a, const Eight& b) {          \
    Eight y;                                                   \
    _Pragma("GCC unroll 4") for (int i = 0; i < kParts; ++i) { \
      const Part u = a.part[i], v = b.part[i];                 \
      y.part[i] = expression;                                  \
    }                                                          \
    return y;                                                  \
  }
ICRL_EACH_PART(operator+, u + v)
ICRL_EACH_PART(operator-, u - v)
ICRL_EACH_PART(operator/, u / v)
ICRL_EACH_PART(operator*, u* v)
ICRL_EACH_PART(least_of, u < v ? u : v)                        // v where u is NaN
ICRL_EACH_PART(most_of, u > v ? u : v)                         // v where u is NaN
ICRL_EACH_PART(times_where_not_zero, v != 0 ? u * v : Part{})  // 0 where v is 0, whatever u is
#undef ICRL_EACH_PART
inline Eight operator*(double a, const Eight& b) { return eight_of(a) * b; }
inline void operator+=(Eight& a, const Eight& b) { a = a + b; }
inline Eight magnitude(const Eight& a) {
  Eight y;
#pragma GCC unroll 4
  for (int i = 0; i < kParts; ++i)
    y.part[i] = reinterpret_cast<Part>(reinterpret_cast<PartMask>(a.part[i]) & 0x7fffffffffffffffll);
  return y;
}

// to[r] is the sum of a[r]'s lanes.
inline void lane_sums(const Part (&a)[8], double* to) {
#if defined(__AVX512F__)
  store(to, row_sums(a));
#elif defined(__AVX2__)
#pragma GCC unroll 2
  for (int r = 0; r < 8; r += 4) {
    Part t[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
      t[i] = __builtin_shufflevector(a[r + 2 * i], a[r + 2 * i + 1], 0, 4, 2, 6) +
             __builtin_shufflevector(a[r + 2 * i], a[r + 2 * i + 1], 1, 5, 3, 7);
    store_part(to + r,
               __builtin_shufflevector(t[0], t[1], 0, 1, 4, 5) + __builtin_shufflevector(t[0], t[1], 2, 3, 6, 7));
  }
#else
#pragma GCC unroll 4
  for (int r = 0; r < 8; r += 2)
    store_part(to + r, __builtin_shufflevector(a[r], a[r + 1], 0, 2) + __builtin_shufflevector(a[r], a[r + 1], 1, 3));
#endif
}

// The sums of eight rows from those of their parts.
inline Eight join(const double (&sums)[kParts][8]) {
  Eight total = eight(sums[0]);
  if constexpr (kParts == 2) total += eight(sums[1]);
  if constexpr (kParts == 4) total = (total + eight(sums[1])) + (eight(sums[2]) + eight(sums[3]));
  return total;
}

// Lane r of the result is the sum of a[r].
inline Eight row_sums(const Eight (&a)[8]) {
  alignas(64) double sums[kParts][8];
#pragma GCC unroll 4
  for (int p = 0; p < kParts; ++p) {
    Part column[8];
#pragma GCC unroll 8
    for (int r = 0; r < 8; ++r) column[r] = a[r].part[p];
    lane_sums(column, sums[p]);
  }
  return join(sums);
}

// tile -= m u, each 8 x 8, for those k in [first, last) for which operands(k, m, u) is true.
template <class F>
inline void subtract_products(double* tile, int64_t first, int64_t last, const F& operands) {
  for (int p = 0; p < 8; p += kDoubles) {
    Part acc[8];
#pragma GCC unroll 8
    for (int r = 0; r < 8; ++r) acc[r] = part(tile + 8 * r + p);
    for (int64_t k = first; k < last; ++k) {
      const double *m, *u;
      if (!operands(k, m, u)) continue;
#pragma GCC unroll 8
      for (int x = 0; x < 8; ++x) {
        const Part row = part(u + 8 * x + p);
#pragma GCC unroll 8
        for (int r = 0; r < 8; ++r) acc[r] -= m[8 * r + x] * row;
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < 8; ++r) store_part(tile + 8 * r + p, acc[r]);
  }
}

// tile = tile u
inline void multiply(double* tile, const double* u) {
  alignas(64) double negative[64];
  for (int x = 0; x < 64; x += kDoubles) store_part(negative + x, -part(tile + x)), store_part(tile + x, Part{});
  subtract_products(tile, 0, 1, [&](int64_t, const double*& m, const double*& right) {
    m = negative, right = u;
    return true;
  });
}

#if defined(__AVX512F__)
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

// The inverse of a tile by Gauss-Jordan elimination; false where a pivot is not positive.
inline bool invert(const double* tile, double* inverse) {
  v8 a[8];
#pragma GCC unroll 8
  for (int r = 0; r < 8; ++r) a[r] = load(tile + 8 * r);
  bool fine = eliminate<0>(a);
  fine &= eliminate<1>(a);
  fine &= eliminate<2>(a);
  fine &= eliminate<3>(a);
  fine &= eliminate<4>(a);
  fine &= eliminate<5>(a);
  fine &= eliminate<6>(a);
  fine &= eliminate<7>(a);
#pragma GCC unroll 8
  for (int r = 0; r < 8; ++r) store(inverse + 8 * r, a[r]);
  return fine;
}
#else
inline bool invert(const double* tile, double* inverse) {
  bool fine = true;
  if (inverse != tile) __builtin_memcpy(inverse, tile, 64 * sizeof(double));
  for (int k = 0; k < 8; ++k) {
    double* row = inverse + 8 * k;
    double factor[8];
    for (int r = 0; r < 8; ++r) factor[r] = inverse[8 * r + k], inverse[8 * r + k] = 0;
    fine &= factor[k] > 0;
    row[k] = 1;
    const double reciprocal = 1 / factor[k];
#pragma GCC unroll 4
    for (int p = 0; p < 8; p += kDoubles) {
      const Part scaled = part(row + p) * reciprocal;
      store_part(row + p, scaled);
      for (int r = 0; r < 8; ++r)
        if (r != k) store_part(inverse + 8 * r + p, part(inverse + 8 * r + p) - factor[r] * scaled);
    }
  }
  return fine;
}
#endif

// minus m x, summed over those j in [first, last) that operands(j, m, x) gives
template <class F>
inline Eight minus_products(int64_t first, int64_t last, const F& operands) {
  alignas(64) double sums[kParts][8];
  for (int p = 0; p < kParts; ++p) {
    Part acc[8];
    clear(acc);
    for (int64_t j = first; j < last; ++j) {
      const double *m, *x;
      operands(j, m, x);
      const Part right = part(x + p * kDoubles);
#pragma GCC unroll 8
      for (int r = 0; r < 8; ++r) acc[r] -= part(m + 8 * r + p * kDoubles) * right;
    }
    lane_sums(acc, sums[p]);
  }
  return join(sums);
}

// m x
inline Eight product(const double* m, const Eight& x) {
  Eight rows[8];
#pragma GCC unroll 8
  for (int r = 0; r < 8; ++r) rows[r] = eight(m + 8 * r) * x;
  return row_sums(rows);
}

}  // namespace

}  // namespace icrl::ICRL_ISA
