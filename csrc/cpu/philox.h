// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): numbers as a function of
// (seed, record, step, stream) alone, so that no thread count, batch split or resumption can change them.
#pragma once

#include <cmath>
#include <cstdint>

namespace icrl {

struct Random4 {
  uint32_t v[4];
};

// step < 2^56
inline Random4 philox(uint64_t seed, uint64_t record, uint64_t step, uint32_t stream) {
  uint32_t c0 = static_cast<uint32_t>(step), c1 = static_cast<uint32_t>(step >> 32) | stream << 24;
  uint32_t c2 = static_cast<uint32_t>(record), c3 = static_cast<uint32_t>(record >> 32);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0, p1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
  }
  return {{c0, c1, c2, c3}};
}

inline float uniform(uint32_t x) { return static_cast<float>(x >> 8) * 0x1p-24f; }  // [0, 1)
inline int64_t below(uint32_t x, int64_t n) { return static_cast<int64_t>(x * static_cast<uint64_t>(n) >> 32); }

// log and the normal quantile by + - * / sqrt alone: IEEE arithmetic then fixes every bit, on any machine. Callers must
// be compiled without contraction into fused multiply-adds.
inline double portable_log(double x) {
  int e;
  double m = std::frexp(x, &e);
  if (m < 0.70710678118654752) m *= 2, --e;
  const double z = (m - 1) / (m + 1), w = z * z;
  double p = 1.0 / 21;
  for (int k = 19; k >= 1; k -= 2) p = p * w + 1.0 / k;
  return 2 * z * p + e * 0.69314718055994531;
}

// Wichura's algorithm AS 241, PPND7 (1988): relative error 1e-7.
inline double normal(uint32_t x) {
  const double p = (x + 0.5) * 0x1p-32, q = p - 0.5;
  if (std::fabs(q) <= 0.425) {
    const double r = 0.180625 - q * q;
    return q * (((5.9109374720e1 * r + 1.5929113202e2) * r + 5.0434271938e1) * r + 3.3871327179) /
           (((6.7187563600e1 * r + 7.8757757664e1) * r + 1.7895169469e1) * r + 1);
  }
  double r = std::sqrt(-portable_log(q < 0 ? p : 1 - p)), z;
  if (r <= 5) {
    r -= 1.6;
    z = (((1.7023821103e-1 * r + 1.3067284816) * r + 2.7568153900) * r + 1.4234372777) /
        ((1.2021132975e-1 * r + 7.3700164250e-1) * r + 1);
  } else {
    r -= 5;
    z = (((1.7337203997e-2 * r + 4.2868294337e-1) * r + 3.0812263860) * r + 6.6579051150) /
        ((1.2258202635e-2 * r + 2.4197894225e-1) * r + 1);
  }
  return q < 0 ? -z : z;
}

}  // namespace icrl
