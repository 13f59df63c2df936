// The tables of one task as the planner wants them, from dense ones or from windows.
//
//   ns, na, nb    states, actions, blocks of eight states; s a state, a an action, k = s * na + a a row
//   transition    the caller's, float or double: dense [ns, na, stride], or windows of rows: row k's entries for the
//                 successors [first[k], first[k] + length[k]) begin at offset[k]
//   reward        the caller's: [ns, na], or shaped as transition
//   packed        state s's rows [na, blocks[s], 8] of the caller's type from offset[s] on; row k holds the blocks from
//                 row_start[k] on, and those outside [row_first[k], row_end[k]) are zeros
//   t.reward, t.magnitude, q   [ns * na] double: expected reward, sum of |transition * reward|, values
//   v, next, rhs               [8 nb] double
//   tiles, inverse             [8, 8] each, double: factors, block row i in columns low[i] to high[i] from
//                              tile[i] on, and the inverses of the diagonal tiles
//   table         of find_windows: [rows, ns]; first, length [rows]
//
// A row is packed from its first block of eight that is not zero on, over as many blocks as the widest row of its state
// needs.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "common/tiles.inl"
#include "tabular/policy_iteration.h"

namespace icrl::ICRL_ISA {
namespace {

constexpr double kUnit = 0x1p-53, kLargest = 0x1.fffffffffffffp1023;

// Sum and maximum of the lanes.
inline double sum(const Eight& x) {
  alignas(64) double a[8];
  store(a, x);
  return ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7]));
}
inline double largest_lane(const Eight& x) {
  alignas(64) double a[8];
  store(a, x);
  double most = a[0];
  for (int j = 1; j < 8; ++j) most = a[j] > most ? a[j] : most;
  return most;
}

// A packed task and the planner's workspace, carved from the caller's scratch by layout.
struct Task {
  int64_t ns, na, nb;       // states, actions, blocks of eight states
  int64_t widest;           // blocks in the widest packed row
  double row_sum;           // largest row sum, rounded up
  double reward_magnitude;  // largest sum of |transition * reward|
  bool is_double;
  int32_t* blocks;  // for each state: the blocks in each of its packed rows, and where [num_actions, blocks, 8] begins
  int64_t* offset;
  // for each state and action: the blocks that are not zero, and the first block that is packed
  int32_t *row_first, *row_end, *row_start;
  double *reward, *magnitude;  // for each state and action: expected reward, sum of |transition * reward|
  double *q, *v, *next, *rhs;
  int32_t *low, *high;      // for each block row of the factors: its first and last block
  int64_t* tile;            // and where its tiles begin
  double *tiles, *inverse;  // U right of the diagonal and multipliers left of it; inverses of the diagonal blocks
  int64_t* policy;
  uint8_t* reached;
  void* packed;
};

template <class T>
T* take(char*& at, int64_t n) {
  T* p = reinterpret_cast<T*>(at);
  at += (n * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
  return p;
}

// Carves; with a null base it only measures. The packed tables come last: they have the only size that depends on the
// data.
int64_t layout(Task& t, char* base, int64_t ns, int64_t na) {
  char* at = base;
  take<Task>(at, 1);
  const int64_t nb = (ns + 7) / 8, rows = ns * na + 8;
  t.ns = ns, t.na = na, t.nb = nb;
  t.blocks = take<int32_t>(at, ns), t.offset = take<int64_t>(at, ns);
  t.row_first = take<int32_t>(at, rows), t.row_end = take<int32_t>(at, rows), t.row_start = take<int32_t>(at, rows);
  t.reward = take<double>(at, rows), t.magnitude = take<double>(at, rows), t.q = take<double>(at, rows);
  t.v = take<double>(at, nb * 8), t.next = take<double>(at, nb * 8), t.rhs = take<double>(at, nb * 8);
  t.low = take<int32_t>(at, nb), t.high = take<int32_t>(at, nb), t.tile = take<int64_t>(at, nb + 1);
  t.tiles = take<double>(at, nb * nb * 64), t.inverse = take<double>(at, nb * 64);
  t.policy = take<int64_t>(at, ns), t.reached = take<uint8_t>(at, ns);
  t.packed = take<double>(at, ns * na * nb * 8);
  return at - base;
}

// ---- packing --------------------------------------------------------------------------------------------------------

// Whether the numbers at p hold anything but zeros: four blocks of eight, or one. NaN counts.
#if defined(__AVX512F__)
inline __m512i bits_at(const void* p) { return _mm512_loadu_si512(p); }
inline __m512i either(const __m512i& a, const __m512i& b) { return _mm512_or_si512(a, b); }
inline bool any_bit(const __m512i& x, long long mask) {
  return _mm512_test_epi64_mask(x, _mm512_set1_epi64(mask)) != 0;
}
#elif defined(__AVX2__)
inline __m256i bits_at(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline __m256i either(const __m256i& a, const __m256i& b) { return _mm256_or_si256(a, b); }
inline bool any_bit(const __m256i& x, long long mask) { return !_mm256_testz_si256(x, _mm256_set1_epi64x(mask)); }
#else
inline uint64_t bits_at(const void* p) {
  uint64_t x;
  return __builtin_memcpy(&x, p, 8), x;
}
inline uint64_t either(uint64_t a, uint64_t b) { return a | b; }
inline bool any_bit(uint64_t x, long long mask) { return (x & static_cast<uint64_t>(mask)) != 0; }
#endif
template <int count, class T>
inline bool any(const T* p) {
  constexpr int step = sizeof(bits_at(nullptr)) / sizeof(T) < count ? sizeof(bits_at(nullptr)) / sizeof(T) : count;
  auto x = bits_at(p);
#pragma GCC unroll 32
  for (int j = step; j < count; j += step) x = either(x, bits_at(p + j));
  return any_bit(x, sizeof(T) == 8 ? 0x7fffffffffffffff : 0x7fffffff7fffffff);
}
#if defined(__AVX512F__)
inline bool any_block(const float* p) {
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm256_test_epi32_mask(x, _mm256_set1_epi32(0x7fffffff)) != 0;
}
#else
inline bool any_block(const float* p) { return any<8>(p); }
#endif
inline bool any_block(const double* p) { return any<8>(p); }

// The blocks [lo, hi) of a row of n entries outside of which it is zero; lo = hi = 0 where all of it is.
template <class T>
inline void window(const T* row, int64_t n, int32_t& low, int32_t& high) {
  const int64_t whole = n / 8;
  int64_t lo = 0, hi = whole;
  bool tail = false;
  for (int64_t j = whole * 8; j < n; ++j) tail |= row[j] != 0;
  while (lo + 4 <= whole && !any<32>(row + lo * 8)) lo += 4;
  while (lo < whole && !any_block(row + lo * 8)) ++lo;
  if (tail) {
    hi = whole + 1;
  } else {
    while (hi - 4 >= lo && !any<32>(row + hi * 8 - 32)) hi -= 4;
    while (hi > lo && !any_block(row + hi * 8 - 8)) --hi;
  }
  low = static_cast<int32_t>(lo < hi ? lo : 0), high = static_cast<int32_t>(lo < hi ? hi : 0);
}

// Bit j is set where entry j of eight is not zero. NaN counts.
#if defined(__AVX512F__)
inline uint64_t filled(const float* p) {
  return _mm256_cmp_ps_mask(_mm256_loadu_ps(p), _mm256_setzero_ps(), _CMP_NEQ_UQ);
}
inline uint64_t filled(const double* p) {
  return _mm512_cmp_pd_mask(_mm512_loadu_pd(p), _mm512_setzero_pd(), _CMP_NEQ_UQ);
}
#elif defined(__AVX2__)
inline uint64_t filled(const float* p) {
  return static_cast<uint64_t>(_mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(p), _mm256_setzero_ps(), _CMP_NEQ_UQ)));
}
inline uint64_t filled(const double* p) {
  const int low = _mm256_movemask_pd(_mm256_cmp_pd(_mm256_loadu_pd(p), _mm256_setzero_pd(), _CMP_NEQ_UQ));
  const int high = _mm256_movemask_pd(_mm256_cmp_pd(_mm256_loadu_pd(p + 4), _mm256_setzero_pd(), _CMP_NEQ_UQ));
  return static_cast<uint64_t>(low | high << 4);
}
#else
template <class T>
inline uint64_t filled(const T* p) {
  uint64_t x = 0;
  for (int j = 0; j < 8 && any_block(p); ++j) x |= static_cast<uint64_t>(p[j] != 0) << j;
  return x;
}
#endif

// From the first to the last entry that is not zero, for rows of ns entries; 0 and 0 where all are. Without branches on
// what is in a row: where windows begin is anyone's guess.
template <class T>
void find_windows(const T* table, int64_t rows, int64_t ns, int32_t* first, int32_t* length) {
  for (int64_t k = 0; k < rows; ++k) {
    const T* row = table + k * ns;
    int64_t begin = ns, end = 0;
    for (int64_t j = 0; j < ns; j += 64) {
      const int64_t n = ns - j < 64 ? ns - j : 64;
      uint64_t here = 0;
      for (int64_t x = 0; x + 8 <= n; x += 8) here |= filled(row + j + x) << x;
      for (int64_t x = n / 8 * 8; x < n; ++x) here |= static_cast<uint64_t>(row[j + x] != 0) << x;
      const int64_t low = j + __builtin_ctzll(here | 1ull << 63), high = j + 64 - __builtin_clzll(here | 1);
      begin = here && low < begin ? low : begin, end = here ? high : end;
    }
    first[k] = static_cast<int32_t>(begin < end ? begin : 0),
    length[k] = static_cast<int32_t>(begin < end ? end - begin : 0);
  }
}

// Whether the window of row k leaves its table.
inline bool outside(const TaskTables& in, int64_t k) {
  const int64_t first = in.first[k], length = in.length[k];
  if (first < 0 || length < 0 || first + length > in.stride) return true;
  return length > 0 && (in.offset[k] < 0 || in.offset[k] > in.values - length);
}

// What is wrong with a task, row by row and slowly: called once something is.
template <class T>
PlanResult first_fault(const Task& t, const TaskTables& in) {
  PlanResult r;
  for (r.row = 0; r.row < t.ns * t.na; ++r.row) {
    const T* row = static_cast<const T*>(in.transition);
    int64_t count = t.ns;
    if (in.offset) {
      if (outside(in, r.row)) return r.refusal = Refusal::window, r;
      const int64_t first = in.first[r.row], length = in.length[r.row];
      row += in.offset[r.row];
      count = first + length < t.ns ? length : t.ns - first;
    } else {
      row += r.row * in.stride;
    }
    double mass = 0;
    bool finite = true, negative = false, empty = true;
    for (int64_t j = 0; j < count; ++j) {
      mass += row[j], negative |= row[j] < 0, empty &= row[j] == 0;
      finite &= row[j] - row[j] == 0;
    }
    if (!finite) return r.refusal = Refusal::not_finite, r;
    if (negative) return r.refusal = Refusal::negative, r;
    if (!empty && !(mass - 1 <= 1e-4 && mass - 1 >= -1e-4)) return r.refusal = Refusal::row_sum, r;
    if (!empty && in.terminal && in.terminal[r.row / t.na]) return r.refusal = Refusal::terminal_row, r;
    if (!(t.magnitude[r.row] <= kLargest)) return r.refusal = Refusal::reward, r;
  }
  return r;
}

// Those lanes of a block at p that `bits` has, zeros in the others, of which nothing is read; put in `to`, and
// returned.
#if defined(__AVX512F__)
inline Eight copy(double* to, const double* p, uint32_t bits) {
  const __m512d x = _mm512_maskz_loadu_pd(static_cast<__mmask8>(bits), p);
  return _mm512_storeu_pd(to, x), Eight{{x}};
}
inline Eight copy(float* to, const float* p, uint32_t bits) {
  const __m256 x = _mm256_maskz_loadu_ps(static_cast<__mmask8>(bits), p);
  return _mm256_storeu_ps(to, x), Eight{{_mm512_maskz_cvtps_pd(0xff, x)}};
}
#else
template <class T>
inline Eight copy(T* to, const T* p, uint32_t bits) {
  if (bits == 0xff) {
    __builtin_memcpy(to, p, 8 * sizeof(T));
    return eight(p);
  }
  for (int j = 0; j < 8; ++j) to[j] = bits >> j & 1 ? p[j] : T(0);
  return eight(to);
}
#endif

// A row: where its successor 0 would lie in a table laid out as the transitions, and which successors it has.
struct Extent {
  int64_t at, begin, end;
};

template <class T>
struct DenseRows {
  const TaskTables& in;
  const int64_t ns;
  Extent row(int64_t k) const { return {k * in.stride, 0, ns}; }
  void find(int64_t k, int32_t& low, int32_t& high) const {
    const T* row = static_cast<const T*>(in.transition) + k * in.stride;
    window(row, ns, low, high);
    // A row is read from both ends to where it begins and ends: the processor's own prefetcher does not follow that.
    constexpr int64_t kLine = 64 / sizeof(T), kAhead = 4;
    if (k + kAhead < ns * in.num_actions)
      for (int64_t j = 0; j < ns; j += kLine) __builtin_prefetch(row + kAhead * in.stride + j);
    if (in.reward_by_successor) {
      const T* reward = static_cast<const T*>(in.reward) + k * in.stride;
      for (int64_t j = low * 8; j < high * 8; j += kLine) __builtin_prefetch(reward + j);
    }
  }
};

template <class T>
struct WindowRows {  // successors from num_states on are left out
  const TaskTables& in;
  const int64_t ns;
  Extent row(int64_t k) const {
    const int64_t begin = in.first[k], end = begin + in.length[k];
    return {in.offset[k] - begin, begin, end < ns ? end : ns};
  }
  void find(int64_t k, int32_t& low, int32_t& high) const {
    const Extent r = row(k);
    const bool some = r.begin < r.end;
    low = some ? static_cast<int32_t>(r.begin / 8) : 0, high = some ? static_cast<int32_t>((r.end + 7) / 8) : 0;
  }
};

inline int64_t within(int64_t x) { return x < 0 ? 0 : x > 8 ? 8 : x; }

template <class T, class Rows>
PlanResult pack(Task& t, const TaskTables& in) {
  const int64_t ns = t.ns, na = t.na;
  const Rows table{in, ns};
  const bool by_successor = in.reward_by_successor;
  const T* transition = static_cast<const T*>(in.transition);
  const T* reward = static_cast<const T*>(in.reward);
  T* out = static_cast<T*>(t.packed);
  t.widest = 0, t.row_sum = 0, t.reward_magnitude = 0;
  if (in.offset)
    for (int64_t k = 0; k < ns * na; ++k)
      if (outside(in, k)) return first_fault<T>(t, in);
  constexpr int64_t kTogether = 5;  // rows: three sums of each fill sixteen slots but one
  Eight slots[2][8];
  for (auto& half : slots)
    for (Eight& slot : half) slot = eight_of(0);
  T won[8];
  int64_t used = 0;
  bool fault = false;
  Eight least = eight_of(0);
  for (int64_t s = 0; s < ns; ++s) {
    int32_t* first = t.row_first + s * na;
    int32_t* end = t.row_end + s * na;
    int64_t n = 0;
    for (int64_t a = 0; a < na; ++a) {
      table.find(s * na + a, first[a], end[a]);
      n = end[a] - first[a] > n ? end[a] - first[a] : n;
    }
    t.blocks[s] = static_cast<int32_t>(n), t.offset[s] = used;
    t.widest = n > t.widest ? n : t.widest;
    bool empty = true;
    for (int64_t a0 = 0; a0 < na; a0 += kTogether) {
      const int64_t rows = na - a0 < kTogether ? na - a0 : kTogether;
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t k = s * na + a0 + r;
        // a row narrower than the state's widest takes in zeros next to it, all of it within the table
        const int64_t start = t.row_first[k] + n <= t.nb ? t.row_first[k] : t.nb - n;
        t.row_start[k] = static_cast<int32_t>(start);
        Eight sum = eight_of(0), gains = sum, sizes = sum;
        const Extent row = table.row(k);
        for (int64_t b = start * 8; b < (start + n) * 8; b += 8, used += 8) {
          const uint32_t bits = 0xffu << within(row.begin - b) & ~(0xffu << within(row.end - b)) & 0xffu;
          const Eight p = copy(out + used, transition + (row.at + b), bits);
          sum += p;
          least = least_of(p, least);
          if (by_successor) {
            // the reward of an impossible transition counts for nothing, even if it is NaN
            const Eight x = times_where_not_zero(copy(won, reward + (row.at + b), bits), p);
            gains += x;
            sizes += magnitude(x);
          }
        }
        Eight* slot = &slots[0][0] + 3 * r;
        slot[0] = sum, slot[1] = gains, slot[2] = sizes;
      }
      alignas(64) double sums[16];
      store(sums, row_sums(slots[0])), store(sums + 8, row_sums(slots[1]));
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t k = s * na + a0 + r;
        const double mass = sums[3 * r], mean = by_successor ? sums[3 * r + 1] : static_cast<double>(reward[k]);
        t.reward[k] = mean, t.magnitude[k] = by_successor ? sums[3 * r + 2] : mean < 0 ? -mean : mean;
        if (mass == 0) {  // of zeros only: otherwise there are negative ones, which are refused below
          first[a0 + r] = end[a0 + r] = 0;
          continue;
        }
        empty = false;
        fault |= !(mass - 1 <= 1e-4 && mass - 1 >= -1e-4);
        t.row_sum = mass > t.row_sum ? mass : t.row_sum;
      }
    }
    const bool ends = in.terminal ? in.terminal[s] : empty;
    fault |= ends && !empty;
    if (ends)
      for (int64_t k = s * na; k < (s + 1) * na; ++k) t.reward[k] = t.magnitude[k] = 0;
  }
  Eight most = eight_of(0), odd = most;
  store(t.magnitude + ns * na, most);
  for (int64_t k = 0; k < ns * na; k += 8) {
    const Eight x = eight(t.magnitude + k);
    most = most_of(x, most), odd += x - x;
  }
  t.reward_magnitude = largest_lane(most);
  fault |= sum(odd) != 0;  // NaN where there is NaN or infinity
  fault |= largest_lane(eight_of(0) - least) > 0;
  if (fault) return first_fault<T>(t, in);
  t.row_sum *= 1 + (t.widest * 8 + 4) * 2 * kUnit;
  return {};
}

}  // namespace
}  // namespace icrl::ICRL_ISA
