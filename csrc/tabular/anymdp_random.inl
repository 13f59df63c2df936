// The AnyMDP sampler's numbers: counter-based random ones, and exp and a clipped normal for eight at a time.
//
//   key       uint64 of a stream: a hash of the task's key, the attempt and the Quantity
//   n         int64: the number's place in its stream
//   v8, u8    8 doubles, 8 uint64;  Part, Eight: see common/tiles.inl;  x, u, a: arguments for a Part at a time
//
// Value n of a stream is mix(stream's key + (n + 1)·golden) (splitmix64), and each quantity of each attempt has a
// stream of its own in which each number has its place. So a task depends on its key alone, and
// icrl_kernels/tabular/anymdp_reference.py draws the same one for a whole batch at once.
#pragma once

#include <immintrin.h>
#include <math.h>

#include <cstdint>

#include "common/tiles.inl"

namespace icrl::ICRL_ISA {
namespace {

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15ull;

template <class T>
inline T mix(const T& x) {
  T z = x;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}
inline double to_unit(uint64_t bits) { return static_cast<double>(bits >> 11) * 0x1p-53; }
template <class V>
inline V larger(const V& a, const V& b) {
  return a > b ? a : b;
}
template <class V>
inline V smaller(const V& a, const V& b) {
  return a < b ? a : b;
}
inline double clip(double x, double lo, double hi) { return smaller(larger(x, lo), hi); }

enum Quantity : uint64_t { kScalars, kStart, kEnds, kWindows, kWeights, kCenters, kPosition, kCosts, kItems, kSettle };

struct Random {
  uint64_t key;
  Random(uint64_t parent, uint64_t stream) : key(mix(parent ^ mix((stream + 1) * kGolden))) {}
  Random(uint64_t parent, int64_t attempt, Quantity what)
      : Random(parent, static_cast<uint64_t>(attempt) * 16 + what) {}
  double uniform(int64_t n) const { return to_unit(mix(key + (static_cast<uint64_t>(n) + 1) * kGolden)); }
  double uniform(int64_t n, double lo, double hi) const { return lo + (hi - lo) * uniform(n); }
  int64_t integer(int64_t n, int64_t lo, int64_t hi) const {  // [lo, hi); the multiplication's bias is below hi·2⁻⁵³
    return lo + static_cast<int64_t>(uniform(n) * static_cast<double>(hi - lo));
  }
  double exponential(int64_t n) const { return -log(1.0 - uniform(n)); }
  double radius(int64_t n) const { return sqrt(-2.0 * log(1.0 - uniform(n))); }
  double angle(int64_t n) const { return 6.283185307179586 * uniform(n); }
  double normal(int64_t n) const { return radius(n) * cos(angle(n + 1)); }  // takes n and n + 1
};

typedef unsigned long long u8 __attribute__((vector_size(64)));
alignas(64) constexpr double kNumbers[8] = {0, 1, 2, 3, 4, 5, 6, 7};

template <int N>
inline Part polynomial(const Part& x, const double (&c)[N]) {  // highest power first
  Part p = splat_part(c[0]);
#pragma GCC unroll 16
  for (int i = 1; i < N; ++i) p = p * x + c[i];
  return p;
}

// exp for x <= 0 to a few ulp; 0 below -700.
inline Part exp_negative(const Part& x) {
  const Part y = larger(x, splat_part(-700.0));
  const Part shifted = y * 1.4426950408889634 + 0x1.8p52;
  const Part n = shifted - 0x1.8p52;
  const Part r = (y - n * 0x1.62e42fefa39efp-1) - n * 0x1.abc9e3b39803fp-56;
  const Part series =
      polynomial(r, {1.0 / 479001600.0, 1.0 / 39916800.0, 1.0 / 3628800.0, 1.0 / 362880.0, 1.0 / 40320.0, 1.0 / 5040.0,
                     1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0});
  const PartMask power = (reinterpret_cast<PartMask>(shifted) + 1023) << 52;  // its low bits hold n in two's complement
  return x < -700.0 ? splat_part(0) : series * reinterpret_cast<Part>(power);
}

// clip(N(0,1), .1, 1) from uniforms: the inverse distribution function by the central form of Wichura's PPND16 (Applied
// Statistics AS 241, 1988), good to 1e-16; the clipped range never needs the tails.
inline Part clipped_normal(const Part& u) {
  const Part q = smaller(larger(u, splat_part(0.5398278372770290)), splat_part(0.8413447460685429)) - 0.5,
             r = 0.180625 - q * q;
  const Part a = polynomial(
      r, {2.5090809287301226727e+3, 3.3430575583588128105e+4, 6.7265770927008700853e+4, 4.5921953931549871457e+4,
          1.3731693765509461125e+4, 1.9715909503065514427e+3, 1.3314166789178437745e+2, 3.3871328727963666080});
  const Part b = polynomial(
      r, {5.2264952788528545610e+3, 2.8729085735721942674e+4, 3.9307895800092710610e+4, 2.1213794301586595867e+4,
          5.3941960214247511077e+3, 6.8718700749205790830e+2, 4.2313330701600911252e+1, 1.0});
  return smaller(larger(q * a / b, splat_part(0.1)), splat_part(1.0));
}

inline v8 magnitude(const v8& a) { return a < 0 ? -a : a; }
#if defined(__AVX512F__)
inline bool any(const i8& a) {
  return _mm512_test_epi64_mask(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(a)) != 0;
}
#else
inline bool any(const i8& a) { return ((a[0] | a[4]) | (a[2] | a[6]) | (a[1] | a[5]) | (a[3] | a[7])) != 0; }
#endif
inline bool any(const float* p) {  // of eight: whether one is not zero
  uint64_t w[4];
  __builtin_memcpy(w, p, 32);
  return ((w[0] | w[1] | w[2] | w[3]) & 0x7fffffff7fffffffull) != 0;
}
inline void round_to(float* to, const Part& x) {
  *reinterpret_cast<HalfPartAt*>(to) = __builtin_convertvector(x, HalfPartAt);
}
inline double add(const Eight& x) {
  alignas(64) double a[8];
  store(a, x);
  return ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7]));
}

}  // namespace

}  // namespace icrl::ICRL_ISA
