// What every file of ops shares: views of a group, the checks of an op, vectors at a row's end, and functions of them.
//
//   g, p, o    group, plan and op of program.h;  v: a view
//   n          floats of a row; Whole and Part read and write a vector of them, Part the last n < kWidth
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/vec.h"
#include "fused/program.h"

namespace icrl::ICRL_ISA {
namespace {

constexpr int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

// ---- views and tensors

ICRL_INLINE const FusedBuffer& buffer(const FusedPlan& p, const FusedView& v) { return p.buffers[v.buffer]; }
ICRL_INLINE float* first_row(const FusedGroup& g, const FusedView& v) {
  return g.scratch + buffer(g.plan, v).offset * g.plan.group + v.column;
}
ICRL_INLINE int64_t stride(const FusedGroup& g, const FusedView& v) { return buffer(g.plan, v).stride; }
ICRL_INLINE int64_t rows(const FusedGroup& g, const FusedView& v) { return g.contexts * buffer(g.plan, v).rows; }
// The first row of context c of the group.
ICRL_INLINE float* context_rows(const FusedGroup& g, const FusedView& v, int64_t c) {
  return first_row(g, v) + c * buffer(g.plan, v).rows * stride(g, v);
}
// What tensor i of the op holds for context c of the group; null where it may be and is.
template <class T>
ICRL_INLINE T* context_tensor(const FusedGroup& g, const FusedOp& o, int i, int64_t c) {
  const int32_t at = o.tensors[i];
  char* base = static_cast<char*>(g.plan.addresses[at]);
  return base ? reinterpret_cast<T*>(base + (g.first + c) * g.plan.tensors[at].bytes) : nullptr;
}
ICRL_INLINE const float* weights(const FusedGroup& g, const FusedOp& o, int i) {
  return o.weights[i] < 0 ? nullptr : g.plan.weights + o.weights[i];
}

// ---- checks

ICRL_INLINE bool given(const FusedView& v) { return v.buffer >= 0; }
ICRL_INLINE int64_t rows_of(const FusedPlan& p, const FusedView& v) { return buffer(p, v).rows; }
ICRL_INLINE bool same(const FusedView& a, const FusedView& b) {
  return a.buffer == b.buffer && a.column == b.column && a.width == b.width;
}
ICRL_INLINE bool apart(const FusedView& a, const FusedView& b) {  // two views without a column in common
  return a.buffer != b.buffer || a.column + a.width <= b.column || b.column + b.width <= a.column;
}
// Whether tensor i of the op is there with `bytes` a context; where it may be null, `optional`.
ICRL_INLINE bool has_tensor(const FusedPlan& p, const FusedOp& o, int i, int64_t bytes, bool optional = false) {
  const int32_t at = o.tensors[i];
  return at >= 0 && p.tensors[at].bytes == bytes && (optional || !p.tensors[at].optional);
}
ICRL_INLINE bool has_weights(const FusedPlan& p, const FusedOp& o, int i, int64_t floats) {
  return o.weights[i] >= 0 && o.weights[i] % 16 == 0 && floats >= 0 && floats <= p.weight_floats - o.weights[i];
}

// ---- vectors

struct Whole {
  ICRL_INLINE Vec load(const float* p) const { return ICRL_ISA::load(p); }
  ICRL_INLINE void store(float* p, Vec x) const { ICRL_ISA::store(p, x); }
  ICRL_INLINE Vec keep(Vec x) const { return x; }
};
struct Part {  // the first n < kWidth lanes; others are read as 0 and not written
  int64_t n;
#if defined(__AVX512F__)
  ICRL_INLINE __mmask16 mask() const { return static_cast<__mmask16>((1u << n) - 1); }
  ICRL_INLINE Vec load(const float* p) const { return (Vec)_mm512_maskz_loadu_ps(mask(), p); }
  ICRL_INLINE void store(float* p, Vec x) const { _mm512_mask_storeu_ps(p, mask(), (__m512)x); }
#elif defined(__AVX2__)
  ICRL_INLINE __m256i mask() const { return (__m256i)(lanes() < static_cast<int32_t>(n)); }
  ICRL_INLINE Vec load(const float* p) const { return (Vec)_mm256_maskload_ps(p, mask()); }
  ICRL_INLINE void store(float* p, Vec x) const { _mm256_maskstore_ps(p, mask(), (__m256)x); }
#else
  ICRL_INLINE Vec load(const float* p) const {
    Vec x = Vec{};
    for (int64_t i = 0; i < n; ++i) x[i] = p[i];
    return x;
  }
  ICRL_INLINE void store(float* p, Vec x) const {
    for (int64_t i = 0; i < n; ++i) p[i] = x[i];
  }
#endif
  ICRL_INLINE Vec keep(Vec x) const { return lanes() < static_cast<int32_t>(n) ? x : Vec{}; }
};

// f(j, part) for the vectors from j on of n floats: Whole, and Part for what is left.
template <class F>
ICRL_INLINE void for_vectors(int64_t n, F&& f) {
  int64_t j = 0;
  for (; j + kWidth <= n; j += kWidth) f(j, Whole{});
  if (j < n) f(j, Part{n - j});
}

ICRL_INLINE Vec clamped(Vec x, float most) { return vmin(vmax(x, splat(-most)), splat(most)); }
ICRL_INLINE Vec vsqrt(Vec x) {
#if defined(__AVX512F__)
  return (Vec)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (Vec)_mm256_sqrt_ps((__m256)x);
#else
  return (Vec)_mm_sqrt_ps((__m128)x);
#endif
}
ICRL_INLINE Vec sigmoid(Vec x) { return 1.f / (1.f + vexp(-x)); }
ICRL_INLINE Vec silu(Vec x) { return x * sigmoid(x); }

// Below .625 in size the odd polynomial of Cephes' tanhf, so that small numbers keep their digits; NaN for NaN.
ICRL_INLINE Vec vtanh(Vec x) {
  const Vec square = x * x;
  Vec p = splat(-5.70498872745e-3f);
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const Vec near = p * square * x + x, far = 1.f - 2.f / (vexp(2.f * x) + 1.f);
  return square < splat(.625f * .625f) ? near : far;
}

// ---- maps, row by row

ICRL_INLINE bool as_wide(const FusedPlan& p, const FusedView& v, int64_t rows, int64_t width) {
  return given(v) && rows_of(p, v) == rows && v.width == width;
}
ICRL_INLINE bool same_or_apart(const FusedView& a, const FusedView& b) { return same(a, b) || apart(a, b); }

ICRL_INLINE const char* check_map(const FusedPlan& p, const FusedOp& o) {
  if (!given(o.in) || !as_wide(p, o.out, rows_of(p, o.in), o.in.width)) return "wants an output of the input's shape";
  return same_or_apart(o.in, o.out) ? nullptr : "wants an output apart from its input, or the input itself";
}
ICRL_INLINE const char* check_map2(const FusedPlan& p, const FusedOp& o) {
  if (const char* wrong = check_map(p, o)) return wrong;
  if (!as_wide(p, o.side, rows_of(p, o.in), o.in.width)) return "wants rows of the input's shape at its side";
  return same_or_apart(o.side, o.out) ? nullptr : "wants an output apart from what is at its side, or that itself";
}
// y = f(j, part, x) of every row, z of `side` beside it where there is one
template <class F>
ICRL_INLINE void map(const FusedGroup& g, const FusedOp& o, F&& f) {
  const int64_t n = o.in.width, ldx = stride(g, o.in), ldy = stride(g, o.out), all = rows(g, o.in);
  const float* x = first_row(g, o.in);
  float* y = first_row(g, o.out);
  for (int64_t r = 0; r < all; ++r, x += ldx, y += ldy)
    for_vectors(n, [&](int64_t j, auto part) { part.store(y + j, f(j, part, part.load(x + j))); });
}
template <class F>
ICRL_INLINE void map2(const FusedGroup& g, const FusedOp& o, F&& f) {
  const int64_t n = o.in.width, ldx = stride(g, o.in), ldy = stride(g, o.out), ldz = stride(g, o.side);
  const int64_t all = rows(g, o.in);
  const float *x = first_row(g, o.in), *z = first_row(g, o.side);
  float* y = first_row(g, o.out);
  for (int64_t r = 0; r < all; ++r, x += ldx, y += ldy, z += ldz)
    for_vectors(n, [&](int64_t j, auto part) { part.store(y + j, f(j, part, part.load(x + j), part.load(z + j))); });
}

}  // namespace
}  // namespace icrl::ICRL_ISA
