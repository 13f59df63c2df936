// What a lane holds: a task's tables, taken over and checked; and a first policy. Part of value_iteration_lanes.inl.
//
//   kLanes, kTileRows   tasks in a vector of doubles; rows of a 4 x 4 tile that fit the registers at a time
//   Lanes, LaneMask     kLanes doubles, kLanes int64 as comparisons give them
//   k, s                a row, s * na + a; a state
//   table               groups of eight rows, [blocks[k / 8], 8, 8] of the caller's type from begin[k / 8] on: row k's
//                       entries from successor first[k] on, zeros from end[k] on
//   reward, magnitude, q   [ns * na] double;  rough_q as q, in the tables' type
//   v, next                [2 ns + 16] double, zeros from the task's states on, and [ns];  rough_v as v, in that type
//   chosen, order          [ns] int32 rows of the policy; [discounts] int64
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "common/tiles.inl"
#include "tabular/policy_iteration.h"
#include "tabular/value_iteration_tables.inl"

namespace icrl::ICRL_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 8, kTileRows = 4;
#else
constexpr int kLanes = 4, kTileRows = 2;  // rows of a tile at a time: sixteen registers hold no more
#endif
constexpr int kSweeps = 2;  // for a first policy
constexpr int64_t kTile = 16 * kLanes;

typedef double Lanes __attribute__((vector_size(8 * kLanes)));
typedef double LanesAt __attribute__((vector_size(8 * kLanes), aligned(8)));
typedef float SingleLanesAt __attribute__((vector_size(4 * kLanes), aligned(4)));
typedef long long LaneMask __attribute__((vector_size(8 * kLanes)));
typedef float f8 __attribute__((vector_size(32)));
typedef int32_t j8 __attribute__((vector_size(32)));
typedef int32_t j8u __attribute__((vector_size(32), aligned(4)));
typedef long long i8u __attribute__((vector_size(64), aligned(8)));

inline Lanes wide(const double* p) { return *reinterpret_cast<const LanesAt*>(p); }
#if defined(__AVX512F__)  // GCC 12 converts in halves otherwise
inline Lanes wide(const float* p) { return _mm512_maskz_cvtps_pd(0xff, _mm256_loadu_ps(p)); }
#else
inline Lanes wide(const float* p) { return __builtin_convertvector(*reinterpret_cast<const SingleLanesAt*>(p), Lanes); }
#endif
inline void clear_lanes(double* p) { *reinterpret_cast<LanesAt*>(p) = Lanes{}; }
inline void clear_lanes(float* p) { *reinterpret_cast<SingleLanesAt*>(p) = SingleLanesAt{}; }
inline void keep(double* p, const Lanes& x) { *reinterpret_cast<LanesAt*>(p) = x; }

inline bool any(const i8& m) {
#if defined(__AVX512F__)
  return _mm512_test_epi64_mask(reinterpret_cast<__m512i>(m), reinterpret_cast<__m512i>(m)) != 0;
#else
  return ((m[0] | m[1]) | (m[2] | m[3]) | (m[4] | m[5]) | (m[6] | m[7])) != 0;
#endif
}
// Bit l is set where lane l is true.
inline unsigned bits(const LaneMask& m) {
  unsigned x = 0;
  for (int l = 0; l < kLanes; ++l) x |= static_cast<unsigned>(m[l] & 1) << l;
  return x;
}

struct Lane {
  int64_t task, states;  // task -1: idle
  int64_t at;            // place of its discount in ascending order
  int64_t iterations, small_rounds;
  double row_sum, reward_magnitude;  // as in Task
  int64_t widest;                    // entries in the widest row
  double gamma, largest;             // its discount; largest |v|
  // Rows in groups of eight, [blocks, rows, 8]: as many blocks of eight entries as the widest of the group needs,
  // padded with zeros. The window of each row, 0 and 0 where it is zero, the blocks of each group and where it begins.
  int32_t *first, *end, *blocks, *begin;
  void* table;
  double *reward, *magnitude;  // [ns * na]: expected reward, sum of |transition * reward|
  double *q, *v, *next;        // v: zeros follow
  int32_t* chosen;             // [ns]: the policy's rows
  int64_t* order;              // discounts in ascending order
  void *rough_v, *rough_q;     // of the tables' type
};

// ---- loading a task into a lane -------------------------------------------------------------------------------------

// Eight entries, zeros in place of those from n on.
template <class T>
inline void copy_part(T* to, const T* from, int32_t n) {
  for (int32_t j = 0; j < 8; ++j) to[j] = j < n ? from[j] : T(0);
}
#if defined(__AVX512F__)
inline __mmask8 first_bits(int32_t n) {
  return _mm256_cmpgt_epi32_mask(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline void copy_part(float* to, const float* from, int32_t n) {
  _mm256_storeu_ps(to, _mm256_maskz_loadu_ps(first_bits(n), from));
}
inline void copy_part(double* to, const double* from, int32_t n) {
  _mm512_storeu_pd(to, _mm512_maskz_loadu_pd(first_bits(n), from));
}
#endif

// Eight rows of a task from row k on: their entries, where these begin and how many there are. Rows past the last have
// none. False where a window leaves its table.
template <class T>
bool find_rows(const TaskTables& in, int64_t k, const T* (&from)[8], j8& first, j8& n) {
  const T* values = static_cast<const T*>(in.transition);
  const int64_t states = in.num_states, count = states * in.num_actions - k < 8 ? states * in.num_actions - k : 8;
  if (in.offset) {
    j8 length = {};
    i8 offset = {};
    first = j8{};
    if (count == 8) {
      first = *reinterpret_cast<const j8u*>(in.first + k), length = *reinterpret_cast<const j8u*>(in.length + k);
      offset = *reinterpret_cast<const i8u*>(in.offset + k);
    } else {
      for (int64_t r = 0; r < count; ++r)
        first[r] = in.first[k + r], length[r] = in.length[k + r], offset[r] = in.offset[k + r];
    }
    const i8 wide = __builtin_convertvector(length, i8), some = wide > 0;
    const j8 out = (first < 0) | (length < 0) | (first > static_cast<int32_t>(in.stride) - length);
    const i8 wrong = __builtin_convertvector(out, i8) | (some & ((offset < 0) | (offset > in.values - wide)));
    if (any(wrong)) return false;
    const j8 left = static_cast<int32_t>(states) - first, room = left > 0 ? left : j8{};
    n = length < room ? length : room;
    offset &= some;
#pragma GCC unroll 8
    for (int r = 0; r < 8; ++r) from[r] = values + offset[r];
    return true;
  }
  first = n = j8{};
  for (int64_t r = 0; r < 8; ++r) {
    from[r] = values;
    if (r >= count) continue;
    int32_t begin, length;
    find_windows(values + (k + r) * in.stride, 1, states, &begin, &length);
    from[r] = values + (k + r) * in.stride + begin, first[r] = begin, n[r] = length;
  }
  return true;
}

// Copies a task into a lane; false where it is not a plain one.
template <class T>
bool load_task(Lane& lane, const TaskTables& in) {
  const int64_t na = in.num_actions, rows = in.num_states * na;
  const T *transition = static_cast<const T*>(in.transition), *reward = static_cast<const T*>(in.reward);
  T* to = static_cast<T*>(lane.table);
  Eight least = eight_of(0);
  v8 row_sum = splat(0), largest = splat(0);
  i8 fault = {};
  j8 widest = {};
  int64_t used = 0;
  bool some_empty = false;
  lane.states = in.num_states;
  for (int64_t k = 0; k < rows; k += 8) {
    const int64_t count = rows - k < 8 ? rows - k : 8;
    const T* from[8];
    j8 first, length;
    if (!find_rows<T>(in, k, from, first, length)) return false;
    widest = length > widest ? length : widest;
    alignas(32) int32_t n[8];
    *reinterpret_cast<j8*>(n) = length;
    int32_t blocks = 0;
#pragma GCC unroll 8
    for (int r = 0; r < 8; ++r) blocks = n[r] > blocks ? n[r] : blocks;
    blocks = (blocks + 7) / 8;
    Eight total[8], mean[8], size[8];
    for (int r0 = 0; r0 < 8; r0 += kTogether) {
      Eight sums[kTogether], gain[kTogether], amount[kTogether];
      clear(sums), clear(gain), clear(amount);
      for (int32_t b = 0; b < blocks; ++b) {
#pragma GCC unroll 8
        for (int r = 0; r < kTogether; ++r) {
          T* here = to + used + b * 64 + (r0 + r) * 8;
          copy_part(here, from[r0 + r] + b * 8, n[r0 + r] - b * 8);
          const Eight x = eight(here);
          sums[r] += x;
          least = least_of(x, least);
        }
      }
      for (int32_t b = 0; b < blocks && in.reward_by_successor; ++b) {
#pragma GCC unroll 8
        for (int r = 0; r < kTogether; ++r) {
          T won[8];
          copy_part(won, reward + (from[r0 + r] - transition) + b * 8, n[r0 + r] - b * 8);
          // the reward of an impossible transition counts for nothing, even if it is NaN
          const Eight x = times_where_not_zero(eight(won), eight(to + used + b * 64 + (r0 + r) * 8));
          gain[r] += x, amount[r] += magnitude(x);
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < kTogether; ++r) total[r0 + r] = sums[r], mean[r0 + r] = gain[r], size[r0 + r] = amount[r];
    }
    v8 gains, sizes;
    if (in.reward_by_successor) {
      gains = whole(row_sums(mean)), sizes = whole(row_sums(size));
    } else {
      T means[8];
      copy_part(means, reward + k, static_cast<int32_t>(count));
      gains = load(means), sizes = gains < 0 ? -gains : gains;
    }
    const v8 mass = whole(row_sums(total));
    const i8 empty = mass == 0;
    row_sum = mass > row_sum ? mass : row_sum;
    fault |= ~empty & ~((mass - 1 <= 1e-4) & (mass - 1 >= -1e-4) & (sizes <= kLargest));
    const v8 counted = empty ? splat(0) : sizes;
    largest = counted > largest ? counted : largest;
    store(lane.reward + k, gains), store(lane.magnitude + k, sizes);
    const j8 nothing = __builtin_convertvector(empty, j8);
    some_empty |= any(empty);
    *reinterpret_cast<j8u*>(lane.first + k) = first & ~nothing;
    *reinterpret_cast<j8u*>(lane.end + k) = (first + length) & ~nothing;
    lane.blocks[k / 8] = blocks, lane.begin[k / 8] = static_cast<int32_t>(used);
    used += blocks * 64;
  }
  fault |= whole(least) < 0;
  bool plain = !any(fault);
  lane.widest = 0, lane.row_sum = lane.reward_magnitude = 0;
  for (int j = 0; j < 8; ++j) {
    lane.widest = widest[j] > lane.widest ? widest[j] : lane.widest;
    lane.row_sum = row_sum[j] > lane.row_sum ? row_sum[j] : lane.row_sum;
    lane.reward_magnitude = largest[j] > lane.reward_magnitude ? largest[j] : lane.reward_magnitude;
  }
  lane.row_sum *= 1 + (lane.widest + 4) * 2 * kUnit;
  for (int64_t s = 0; s < in.num_states && (some_empty || in.terminal); ++s) {
    int32_t filled = 0, least_end = 1;
    for (int64_t k = s * na; k < s * na + na; ++k)
      filled |= lane.end[k], least_end = lane.end[k] < least_end ? lane.end[k] : least_end;
    const bool ends = in.terminal ? in.terminal[s] : filled == 0;
    plain &= !ends || filled == 0;
    for (int64_t k = s * na; k < s * na + na && (ends || least_end == 0); ++k) {
      if (ends) lane.reward[k] = lane.magnitude[k] = 0;
      plain &= lane.magnitude[k] <= kLargest;
      lane.reward_magnitude = lane.magnitude[k] > lane.reward_magnitude ? lane.magnitude[k] : lane.reward_magnitude;
    }
  }
  return plain;
}

// ---- the first policy -----------------------------------------------------------------------------------------------

// Eight numbers in type E.
template <class E>
struct Numbers;
template <>
struct Numbers<double> {
  typedef Eight type;
  template <class T>
  static inline Eight get(const T* p) {
    return eight(p);
  }
  static inline void set(double* p, const Eight& x) { store(p, x); }
  static constexpr int kTogether = ICRL_ISA::kTogether;
};
template <>
struct Numbers<float> {
  typedef f8 type;
  static inline f8 get(const float* p) { return *reinterpret_cast<const f8u*>(p); }
#if defined(__AVX512F__)
  static inline f8 get(const double* p) { return _mm512_maskz_cvtpd_ps(0xff, load(p)); }
#else
  static inline f8 get(const double* p) { return __builtin_convertvector(load(p), f8); }
#endif
  static inline void set(float* p, const f8& x) { *reinterpret_cast<f8u*>(p) = x; }
  static constexpr int kTogether = 8;
};

// q = reward + discount T v in E; zeros follow v.
template <class T, class E>
void backup_lane(const Lane& lane, int64_t na, const E* v, E* q) {
  using Number = Numbers<E>;
  const E discount = static_cast<E>(lane.gamma);
  const T* p = static_cast<const T*>(lane.table);
  for (int64_t k = 0; k < lane.states * na; k += 8) {
    const int32_t *first = lane.first + k, width = lane.blocks[k / 8] * 8;
    typename Number::type acc[8];
    for (int r0 = 0; r0 < 8; r0 += Number::kTogether) {
      typename Number::type one[Number::kTogether];
      clear(one);
      for (int32_t j = 0; j < width; j += 8) {
#pragma GCC unroll 8
        for (int r = 0; r < Number::kTogether; ++r)
          one[r] += Number::get(p + j * 8 + (r0 + r) * 8) * Number::get(v + first[r0 + r] + j);
      }
#pragma GCC unroll 8
      for (int r = 0; r < Number::kTogether; ++r) acc[r0 + r] = one[r];
    }
    p += width * 8;
    Number::set(q + k, Number::get(lane.reward + k) + discount * row_sums(acc));
  }
}

// A first policy for the lane's discount: what is greedy after a few sweeps of value iteration from the values `next`,
// in the tables' own precision. A sweep costs a tenth of an evaluation or less, and a few of them save one or two.
template <class T>
void start_policy(Lane& lane, int64_t na) {
  T *v = static_cast<T*>(lane.rough_v), *q = static_cast<T*>(lane.rough_q);
  for (int64_t s = 0; s < lane.states; ++s) v[s] = static_cast<T>(lane.next[s]);
  for (int left = kSweeps; left > 0; --left) {
    backup_lane<T, T>(lane, na, v, q);
    for (int64_t s = 0; s < lane.states; ++s) {
      T top = q[s * na];
      for (int64_t a = 1; a < na; ++a) top = q[s * na + a] > top ? q[s * na + a] : top;
      v[s] = top;
    }
  }
  backup_lane<T, T>(lane, na, v, q);
  for (int64_t s = 0; s < lane.states; ++s) {
    int64_t best = s * na;
    for (int64_t k = best + 1; k < s * na + na; ++k) best = q[k] > q[best] ? k : best;
    lane.chosen[s] = static_cast<int32_t>(best);
  }
}

}  // namespace
}  // namespace icrl::ICRL_ISA
