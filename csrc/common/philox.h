// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): numbers as a function of
// (seed, record, step, stream) alone, so that no thread count, batch split or resumption can change them. And log, exp
// and the normal quantile by + - * / sqrt alone: IEEE arithmetic then fixes every bit, on any machine.
//
//   seed           uint64: the key
//   record, step   uint64, step < 2^56: the counter, with stream (uint32, below 2^8): what the number is for
//   Random4        four uint32 numbers of one counter
//   x              one of them: uniform(x) is a float in [0, 1), below(x, n) an integer in [0, n), normal(x) a double
//
// A file that includes this must be compiled without contraction into fused multiply-adds. Everything has internal
// linkage: no instruction set's code can stand in for another's.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define ICRL_HD __host__ __device__
#else
#define ICRL_HD
#endif

namespace icrl {
namespace {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u, kPhiloxK0 = 0x9E3779B9u, kPhiloxK1 = 0xBB67AE85u;

struct Random4 {
  uint32_t v[4];
};

// step < 2^56
ICRL_HD inline Random4 philox(uint64_t seed, uint64_t record, uint64_t step, uint32_t stream) {
  uint32_t c0 = static_cast<uint32_t>(step), c1 = static_cast<uint32_t>(step >> 32) | stream << 24;
  uint32_t c2 = static_cast<uint32_t>(record), c3 = static_cast<uint32_t>(record >> 32);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round, k0 += kPhiloxK0, k1 += kPhiloxK1) {
    const uint64_t p0 = uint64_t{kPhiloxM0} * c0, p1 = uint64_t{kPhiloxM1} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
  }
  return {{c0, c1, c2, c3}};
}

ICRL_HD inline float uniform(uint32_t x) { return static_cast<float>(x >> 8) * 0x1p-24f; }  // [0, 1)
ICRL_HD inline int64_t below(uint32_t x, int64_t n) { return static_cast<int64_t>(x * static_cast<uint64_t>(n) >> 32); }

ICRL_HD inline double from_bits(uint64_t bits) {
  double x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// x > 0, not denormal
ICRL_HD inline double portable_log(double x) {
  uint64_t bits;
  memcpy(&bits, &x, sizeof bits);
  double e = static_cast<double>(static_cast<int32_t>(bits >> 52) - 1022);
  double m = from_bits((bits & 0x000fffffffffffffu) | 0x3fe0000000000000u);  // in [1/2, 1)
  const bool small = m < 0.70710678118654752;
  m = small ? m * 2 : m, e = small ? e - 1 : e;
  const double z = (m - 1) / (m + 1), w = z * z;
  double p = 1.0 / 21;
  p = p * w + 1.0 / 19;
  p = p * w + 1.0 / 17;
  p = p * w + 1.0 / 15;
  p = p * w + 1.0 / 13;
  p = p * w + 1.0 / 11;
  p = p * w + 1.0 / 9;
  p = p * w + 1.0 / 7;
  p = p * w + 1.0 / 5;
  p = p * w + 1.0 / 3;
  p = p * w + 1.0;
  return 2 * z * p + e * 0.69314718055994531;
}

// x <= 0; 0 below -700
ICRL_HD inline double portable_exp(double x) {
  if (!(x > -700)) return 0;
  const double n = static_cast<double>(static_cast<int64_t>(x * 1.4426950408889634 - 0.5));  // to the nearest
  const double r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;    // |r| <= log(2)/2
  double p = 1;
  for (int k = 14; k >= 1; --k) p = p * r / k + 1;
  return p * from_bits(static_cast<uint64_t>(static_cast<int64_t>(n) + 1023) << 52);
}

// Wichura's algorithm AS 241, PPND7 (1988): relative error 1e-7. The quantile of p = q + 1/2, in two parts.
ICRL_HD inline double normal_middle(double q) {  // |q| <= 0.425
  const double r = 0.180625 - q * q;
  return q * (((5.9109374720e1 * r + 1.5929113202e2) * r + 5.0434271938e1) * r + 3.3871327179) /
         (((6.7187563600e1 * r + 7.8757757664e1) * r + 1.7895169469e1) * r + 1);
}
ICRL_HD inline double normal_tail(double p, double q) {
  const double r = std::sqrt(-portable_log(q < 0 ? p : 1 - p));
  const bool near = r <= 5;
  const double n = r - (near ? 1.6 : 5.0);
  const double over = (((near ? 1.7023821103e-1 : 1.7337203997e-2) * n + (near ? 1.3067284816 : 4.2868294337e-1)) * n +
                       (near ? 2.7568153900 : 3.0812263860)) *
                          n +
                      (near ? 1.4234372777 : 6.6579051150);
  const double under =
      ((near ? 1.2021132975e-1 : 1.2258202635e-2) * n + (near ? 7.3700164250e-1 : 2.4197894225e-1)) * n + 1;
  const double z = over / under;
  return q < 0 ? -z : z;
}
ICRL_HD inline double normal(uint32_t x) {
  const double p = (x + 0.5) * 0x1p-32, q = p - 0.5;
  return std::fabs(q) <= 0.425 ? normal_middle(q) : normal_tail(p, q);
}

}  // namespace
}  // namespace icrl
