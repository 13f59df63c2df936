// Small matrix products out of L1: C[m][n] = sum_k A(m, k) B[k][n], the tile of C in registers, A broadcast from any
// strides, rows of B read as vectors. Each entry is one chain of multiply-adds in the order of k (of a long product one
// for each kChain of k), so its bits depend neither on the tile nor on the rows beside it.
//
//   A      [M, K] float32 through Left: A(m, k) = p[m * row + k * col], so that a transpose needs no copy
//   B, C   [K, N] and [M, N] float32, row-major, their rows ldb and ldc numbers apart
//   M, N   `rows` and `columns`, multiples of 16;  K: `depth`, any
//   c      of Tile<MR, NR>: MR rows of NR vectors of C in registers, from row m (or m0) and column n on
//   w      of scale_rows [MR], of scale_columns [NR * kWidth]: factors
//   x, l   of solve: right-hand sides [16, columns], rows ld apart; lower triangle [16, 16], rows ld_l apart
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "common/vec.h"

namespace icrl::ICRL_ISA {
namespace {

constexpr int64_t kChain = 128;

// A(m, k) = p[m * row + k * col]
struct Left {
  const float* p;
  int64_t row, col;
};

template <int MR, int NR>
struct Tile {
  Vec c[MR][NR];

  ICRL_INLINE void zero() {
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
      for (int n = 0; n < NR; ++n) c[m][n] = Vec{};
  }
  ICRL_INLINE void read(const float* p, int64_t ld) {
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
      for (int n = 0; n < NR; ++n) c[m][n] = load(p + m * ld + n * kWidth);
  }
  ICRL_INLINE void write(float* p, int64_t ld) const {
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
      for (int n = 0; n < NR; ++n) store(p + m * ld + n * kWidth, c[m][n]);
  }
  ICRL_INLINE void add(const float* p, int64_t ld) {
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
      for (int n = 0; n < NR; ++n) c[m][n] += load(p + m * ld + n * kWidth);
  }
  ICRL_INLINE void scale_rows(const float* w) {
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
      for (int n = 0; n < NR; ++n) c[m][n] *= splat(w[m]);
  }
  ICRL_INLINE void scale_columns(const float* w) {
#pragma GCC unroll 8
    for (int n = 0; n < NR; ++n) {
      const Vec x = load(w + n * kWidth);
#pragma GCC unroll 16
      for (int m = 0; m < MR; ++m) c[m][n] *= x;
    }
  }

  // out[m][kWidth] += the products of row m and y's row m, lanes not yet summed
  ICRL_INLINE void dot_rows(float* out, const float* y, int64_t ld) const {
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      Vec x = load(out + m * kWidth);
#pragma GCC unroll 8
      for (int n = 0; n < NR; ++n) x += c[m][n] * load(y + m * ld + n * kWidth);
      store(out + m * kWidth, x);
    }
  }

  // rows [first, last) of the tile take A(m, k) B[k]
  ICRL_INLINE void step(const Left& a, const float* b, int64_t ldb, int64_t m0, int64_t k, int first, int last) {
    Vec x[NR];
#pragma GCC unroll 8
    for (int n = 0; n < NR; ++n) x[n] = load(b + k * ldb + n * kWidth);
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      if (m < first || m >= last) continue;
      const Vec y = splat(a.p[(m0 + m) * a.row + k * a.col]);
#pragma GCC unroll 8
      for (int n = 0; n < NR; ++n) c[m][n] += y * x[n];
    }
  }
  ICRL_INLINE void multiply(const Left& a, const float* b, int64_t ldb, int64_t m0, int64_t k0, int64_t k1) {
    for (int64_t k = k0; k < k1; ++k) step(a, b, ldb, m0, k, 0, MR);
  }
  // A B, zero before it, in sums of at most kChain products, of which each errs less than one long sum would. The tile
  // stays in p meanwhile.
  ICRL_INLINE void multiply_all(const Left& a, const float* b, int64_t ldb, int64_t m0, int64_t depth, float* p,
                                int64_t ld) {
    zero();
    for (int64_t k = 0; k < depth; k += kChain) {
      if (k) write(p, ld), zero();
      multiply(a, b, ldb, m0, k, k + kChain < depth ? k + kChain : depth);
      if (k) add(p, ld);
    }
  }
  // A lower triangular, without its diagonal if Strict. What stands above is not read, so its NaN do no harm.
  template <bool Strict>
  ICRL_INLINE void lower(const Left& a, const float* b, int64_t ldb, int64_t m0) {
    multiply(a, b, ldb, m0, 0, m0);
#pragma GCC unroll 16
    for (int k = 0; k < MR; ++k) step(a, b, ldb, m0, m0 + k, k + Strict, MR);
  }
  // A(m, k) upper triangular: k from m (or m + 1) to size
  template <bool Strict>
  ICRL_INLINE void upper(const Left& a, const float* b, int64_t ldb, int64_t m0, int64_t size) {
#pragma GCC unroll 16
    for (int k = 0; k < MR; ++k) step(a, b, ldb, m0, m0 + k, 0, k + 1 - Strict);
    multiply(a, b, ldb, m0, m0 + MR, size);
  }
};

// Calls f(tile, m, n) for tiles that cover [0, rows) x [0, columns).
template <class F>
ICRL_INLINE void for_tiles(int64_t rows, int64_t columns, F&& f) {
  int64_t n = 0;
#if defined(__AVX512F__)
  for (; n + 64 <= columns; n += 64)
    for (int64_t m = 0; m < rows; m += 4) {
      Tile<4, 4> t;
      f(t, m, n);
    }
  if (n + 48 <= columns) {
    for (int64_t m = 0; m < rows; m += 4) {
      Tile<4, 3> t;
      f(t, m, n);
    }
    n += 48;
  }
  if (n + 32 <= columns) {
    for (int64_t m = 0; m < rows; m += 8) {
      Tile<8, 2> t;
      f(t, m, n);
    }
    n += 32;
  }
  if (n + 16 <= columns)
    for (int64_t m = 0; m < rows; m += 8) {
      Tile<8, 1> t;
      f(t, m, n);
    }
#else
  for (; n < columns; n += 2 * kWidth)
    for (int64_t m = 0; m < rows; m += 4) {
      Tile<4, 2> t;
      f(t, m, n);
    }
#endif
}

// C = A B
ICRL_INLINE void product(float* c, int64_t ldc, int64_t rows, int64_t columns, Left a, const float* b, int64_t ldb,
                         int64_t depth) {
  for_tiles(rows, columns, [&](auto& t, int64_t m, int64_t n) __attribute__((always_inline)) {
    t.multiply_all(a, b + n, ldb, m, depth, c + m * ldc + n, ldc);
    t.write(c + m * ldc + n, ldc);
  });
}

// x[16][columns] becomes (I - L)^-1 x, or (I - L^T)^-1 x, for the strictly lower triangle L of l[16][ld_l], by
// substitution. What stands on l's diagonal and above it is not read.
template <bool Transposed>
ICRL_INLINE void solve(float* x, int64_t ld, int64_t columns, const float* l, int64_t ld_l = 16) {
  for (int64_t n = 0; n < columns; n += kWidth) {
    Vec r[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = load(x + i * ld + n);
#pragma GCC unroll 16
    for (int k = 0; k < 16; ++k)
#pragma GCC unroll 16
      for (int i = k + 1; i < 16; ++i) {
        if constexpr (Transposed)
          r[15 - i] += splat(l[(15 - k) * ld_l + 15 - i]) * r[15 - k];
        else
          r[i] += splat(l[i * ld_l + k]) * r[k];
      }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) store(x + i * ld + n, r[i]);
  }
}

// to[16][16] = transpose of from[16][16]
ICRL_INLINE void transpose_block(float* to, int64_t ld_to, const float* from, int64_t ld_from) {
#if defined(__AVX512F__)
  __m512 r[16], s[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(from + i * ld_from);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    s[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    s[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const __m512d a = _mm512_castps_pd(s[4 * i + j]), b = _mm512_castps_pd(s[4 * i + 2 + j]);
      r[4 * i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      r[4 * i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  // now r[4i + j] holds rows 4i..4i+3 of columns j, 4+j, 8+j, 12+j
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512 even01 = _mm512_shuffle_f32x4(r[j], r[4 + j], 0x88),
                 odd01 = _mm512_shuffle_f32x4(r[j], r[4 + j], 0xdd);
    const __m512 even23 = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0x88);
    const __m512 odd23 = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0xdd);
    _mm512_storeu_ps(to + j * ld_to, _mm512_shuffle_f32x4(even01, even23, 0x88));
    _mm512_storeu_ps(to + (8 + j) * ld_to, _mm512_shuffle_f32x4(even01, even23, 0xdd));
    _mm512_storeu_ps(to + (4 + j) * ld_to, _mm512_shuffle_f32x4(odd01, odd23, 0x88));
    _mm512_storeu_ps(to + (12 + j) * ld_to, _mm512_shuffle_f32x4(odd01, odd23, 0xdd));
  }
#else
  for (int c = 0; c < 16; ++c)
    for (int i = 0; i < 16; ++i) to[c * ld_to + i] = from[i * ld_from + c];
#endif
}

// to[columns][rows] = transpose of from[rows][columns], both multiples of 16
ICRL_INLINE void transpose(float* to, const float* from, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; i += 16)
    for (int64_t j = 0; j < columns; j += 16) transpose_block(to + j * rows + i, rows, from + i * columns + j, columns);
}

}  // namespace

}  // namespace icrl::ICRL_ISA
