// Float vectors of the file's instruction set in GCC's vector extension, an exponential, and conversions of rows.
//
//   kWidth      floats of a vector: 16 with AVX-512, 8 with AVX2, else 4
//   Vec, UVec   kWidth floats, aligned and at any address;  IVec: kWidth int32, as comparisons give them
//   dtype       what an array of the user holds, a code shared with Python: 0 float32, 1 bfloat16, 2 float16
//   from, to    arrays of a row's n numbers; `at` is the row's first element, counted in numbers of the dtype
//   padded      length of a row in float32 with zeros from n on, a multiple of 16
//
// Everything here is in an anonymous namespace inside the instruction set's, so that no symbol of one instruction set
// can stand in for another's.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace icrl::ICRL_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

#define ICRL_INLINE inline __attribute__((always_inline))

typedef float Vec __attribute__((vector_size(4 * kWidth), may_alias));
typedef float UVec __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));
typedef int32_t IVec __attribute__((vector_size(4 * kWidth), may_alias));

ICRL_INLINE Vec load(const float* p) { return *reinterpret_cast<const UVec*>(p); }
ICRL_INLINE void store(float* p, Vec x) { *reinterpret_cast<UVec*>(p) = x; }
ICRL_INLINE Vec splat(float x) { return x - Vec{}; }
ICRL_INLINE IVec lanes() {  // 0, 1, 2, ...
  IVec x;
  for (int i = 0; i < kWidth; ++i) x[i] = i;
  return x;
}
ICRL_INLINE Vec vmax(Vec a, Vec b) { return a > b ? a : b; }  // b where a is NaN
ICRL_INLINE Vec vmin(Vec a, Vec b) { return a < b ? a : b; }

ICRL_INLINE float sum(Vec x) {  // halves, so that the order is one whatever the compiler
#pragma GCC unroll 8
  for (int n = kWidth / 2; n; n /= 2) x += __builtin_shuffle(x, (lanes() + n) & (kWidth - 1));
  return x[0];
}
ICRL_INLINE float max_lane(Vec x) {
  float t[kWidth], m;
  store(t, x);
  m = t[0];
  for (int i = 1; i < kWidth; ++i) m = t[i] > m ? t[i] : m;
  return m;
}
ICRL_INLINE float min_lane(Vec x) { return -max_lane(-x); }

// exp to about one ulp on [-87.3, 88.3]; 0 below (so exp(-inf) = 0), the value at 88.3 above, NaN for NaN.
ICRL_INLINE Vec vexp(Vec x) {
  const Vec top = splat(88.3f), bottom = splat(-87.3f);
  const IVec zero = x < bottom;
  x = x > top ? top : x;
  const Vec shift = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
  const Vec shifted = x * 1.44269504f + shift;
  const Vec n = shifted - shift;
  Vec r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  p = p * (Vec)(((IVec)shifted + 127) << 23);  // casts between vectors keep the bits
  return zero ? Vec{} : p;
}

// Gates to decays in place, the n of them and what fills the last vector; returns the largest gate, not below 0.
ICRL_INLINE float decays(float* gates, int64_t n) {
  Vec most = Vec{};
  for (int64_t i = 0; i < n; i += kWidth) {
    const Vec x = load(gates + i);
    most = vmax(x, most);
    store(gates + i, vexp(x));
  }
  return max_lane(most);
}

// dtype codes shared with Python
enum Dtype : int { kFloat = 0, kBfloat = 1, kHalf = 2 };

ICRL_INLINE float from_bfloat(uint16_t x) { return __builtin_bit_cast(float, uint32_t(x) << 16); }
ICRL_INLINE uint16_t to_bfloat(float f) {
  uint32_t b = __builtin_bit_cast(uint32_t, f);
  const uint32_t rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
  return uint16_t((b & 0x7fffffff) > 0x7f800000 ? (b >> 16) | 0x40 : rounded);
}
ICRL_INLINE float from_half(uint16_t x) {
#ifdef __F16C__
  return _cvtsh_ss(x);
#else
  uint32_t b = uint32_t(x & 0x7fff) << 13;
  float f = __builtin_bit_cast(float, b) * 0x1p112f;  // rebias; right for subnormals too
  if ((x & 0x7c00) == 0x7c00) f = __builtin_bit_cast(float, b | 0x7f800000);
  return (x & 0x8000) ? -f : f;
#endif
}
ICRL_INLINE uint16_t to_half(float f) {
#ifdef __F16C__
  return uint16_t(_cvtss_sh(f, 0));
#else
  uint32_t b = __builtin_bit_cast(uint32_t, f);
  const uint32_t sign = (b >> 16) & 0x8000;
  b &= 0x7fffffff;
  if (b > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (b >= 0x477ff000) return uint16_t(sign | 0x7c00);
  if (b < 0x38800000) {  // subnormal half: let the addition of 0.5 round at the right bit
    return uint16_t(sign | (__builtin_bit_cast(uint32_t, __builtin_bit_cast(float, b) + 0.5f) - 0x3f000000));
  }
  return uint16_t(sign | ((b - 0x38000000 + 0xfff + ((b >> 13) & 1)) >> 13));
#endif
}

ICRL_INLINE float load_one(const void* from, int dtype, int64_t at) {
  if (dtype == kFloat) return static_cast<const float*>(from)[at];
  const uint16_t x = static_cast<const uint16_t*>(from)[at];
  return dtype == kBfloat ? from_bfloat(x) : from_half(x);
}

// One row of n numbers of a dtype, from element `at`, to float, with zeros up to `padded` (a multiple of 16).
ICRL_INLINE void load_row(float* to, const void* from, int dtype, int64_t at, int64_t n, int64_t padded) {
  int64_t i = 0;
  if (dtype == kFloat) {
    const float* p = static_cast<const float*>(from) + at;
    for (; i + kWidth <= n; i += kWidth) store(to + i, load(p + i));
    for (; i < n; ++i) to[i] = p[i];
  } else if (dtype == kBfloat) {
    const uint16_t* p = static_cast<const uint16_t*>(from) + at;
    for (; i < n; ++i) to[i] = from_bfloat(p[i]);
  } else {
    const uint16_t* p = static_cast<const uint16_t*>(from) + at;
#ifdef __F16C__
    for (; i + 8 <= n; i += 8)
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i))));
#endif
    for (; i < n; ++i) to[i] = from_half(p[i]);
  }
  for (; i < padded; ++i) to[i] = 0.f;
}
ICRL_INLINE void store_row(void* to, const float* from, int dtype, int64_t at, int64_t n) {
  int64_t i = 0;
  if (dtype == kFloat) {
    float* p = static_cast<float*>(to) + at;
    for (; i + kWidth <= n; i += kWidth) store(p + i, load(from + i));
    for (; i < n; ++i) p[i] = from[i];
  } else if (dtype == kBfloat) {
    uint16_t* p = static_cast<uint16_t*>(to) + at;
    for (; i < n; ++i) p[i] = to_bfloat(from[i]);
  } else {
    uint16_t* p = static_cast<uint16_t*>(to) + at;
#ifdef __F16C__
    for (; i + 8 <= n; i += 8)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
#endif
    for (; i < n; ++i) p[i] = to_half(from[i]);
  }
}

}  // namespace

}  // namespace icrl::ICRL_ISA
