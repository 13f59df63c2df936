// Policy iteration of many small tasks, one in each lane of the vectors. Included after value_iteration.inl, once for each
// instruction set, inside its namespace.
//
// Only policy evaluation is done across lanes: I - discount P is factored by block LU in tiles of 4 x 4 (times lanes) within
// the union of the lanes' envelopes. Backups and improvement are each lane's own, on its own windows. A lane whose policy
// is optimal goes on to its next discount or takes the next task at once, so that all lanes stay busy though tasks differ
// in the steps they need. Outside its own envelope a lane adds exact zeros, and no lane's arithmetic looks at another's, so
// the bits of a task's answer do not depend on its company. Tasks that are not plain (faults, discount * row sum near 1,
// values that are not finite) are left to the solver for one task.

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 8, kTileRows = 4;
#else
constexpr int kLanes = 4, kTileRows = 2;  // rows of a tile at a time: sixteen registers hold no more
#endif
constexpr int64_t kTile = 16 * kLanes;

typedef double Lanes __attribute__((vector_size(8 * kLanes)));
typedef double LanesAt __attribute__((vector_size(8 * kLanes), aligned(8)));
typedef float SingleLanesAt __attribute__((vector_size(4 * kLanes), aligned(4)));
typedef long long LaneMask __attribute__((vector_size(8 * kLanes)));

inline Lanes wide(const double* p) { return *reinterpret_cast<const LanesAt*>(p); }
#if defined(__AVX512F__)  // GCC 12 converts in halves otherwise
inline Lanes wide(const float* p) { return _mm512_maskz_cvtps_pd(0xff, _mm256_loadu_ps(p)); }
#else
inline Lanes wide(const float* p) { return __builtin_convertvector(*reinterpret_cast<const SingleLanesAt*>(p), Lanes); }
#endif
inline void keep(double* p, const Lanes& x) { *reinterpret_cast<LanesAt*>(p) = x; }

// Bit l is set where lane l is true.
inline unsigned bits(const LaneMask& m) {
  unsigned x = 0;
  for (int l = 0; l < kLanes; ++l) x |= static_cast<unsigned>(m[l] & 1) << l;
  return x;
}

// A row's window [first, end), 0 and 0 where all of it is zero, and where it lies in the lane's table. Rows are kept in
// groups of eight, each row over as many blocks of eight entries as the widest of its group needs, padded with zeros.
struct LaneRow {
  int32_t first, end, at, padded_end;
};

struct Lane {
  int64_t task, states;  // task -1: idle
  int64_t at;            // place of its discount in ascending order
  int64_t iterations, small_rounds;
  double row_sum, reward_magnitude;  // as in Task
  int64_t widest;                    // entries in the widest row
  double gamma, largest;             // its discount; largest |v|
  LaneRow* row;                 // [ns * na]
  double *reward, *magnitude;   // [ns * na]: expected reward, sum of |transition * reward|
  double *q, *v, *next;         // v: zeros follow
  int32_t* chosen;              // [ns]: the policy's rows
  int64_t* order;               // discounts in ascending order
  void* table;
};

struct Group {
  int64_t ns, nb, na;  // states, blocks of four states, actions
  int64_t columns;     // of the row buffer
  Lane lane[kLanes];
  double minus_gamma[kLanes];
  double *rhs, *v;          // [4 nb, kLanes]
  double *tiles, *inverse;  // factors, and the inverses of the diagonal tiles, [4, 4, kLanes] each
  int64_t* tile;            // for each block row: where its tiles begin
  int32_t *low, *high;      // and its first and last block
  void* buffer;             // [4, columns, kLanes]: the policies' rows of one block row; zero between uses
};

int64_t lanes_layout(Group& g, char* base, int64_t ns, int64_t na, int64_t ng, int64_t element) {
  char* at = base;
  take<Group>(at, 1);
  const int64_t nb = (ns + 3) / 4, rows = (ns * na + 7) / 8 * 8, reach = 2 * ns + 16;  // windows, padded, end below it
  g.ns = ns, g.na = na, g.nb = nb, g.columns = reach;
  g.rhs = take<double>(at, nb * 4 * kLanes), g.v = take<double>(at, nb * 4 * kLanes);
  g.inverse = take<double>(at, nb * kTile);
  g.tile = take<int64_t>(at, nb + 1), g.low = take<int32_t>(at, nb), g.high = take<int32_t>(at, nb);
  g.buffer = take<char>(at, 4 * reach * kLanes * element);
  for (Lane& lane : g.lane) {
    lane.row = take<LaneRow>(at, rows);
    lane.reward = take<double>(at, rows), lane.magnitude = take<double>(at, rows), lane.q = take<double>(at, rows);
    lane.v = take<double>(at, reach), lane.next = take<double>(at, ns);
    lane.chosen = take<int32_t>(at, ns), lane.order = take<int64_t>(at, ng);
    lane.table = take<char>(at, rows * ((ns + 7) / 8 * 8) * element);
  }
  g.tiles = take<double>(at, nb * nb * kTile);
  return at - base;
}

// ---- loading a task into a lane ----------------------------------------------------------------------------------------

// Bit j is set where entry j of eight is not zero. NaN counts.
template <class T>
inline unsigned filled(const T* p) {
  unsigned x = 0;
  for (int j = 0; j < 8; ++j) x |= static_cast<unsigned>(p[j] != 0) << j;
  return x;
}
// Eight entries, zeros in place of those from n on.
template <class T>
inline void copy_part(T* to, const T* from, int64_t n) {
  for (int64_t j = 0; j < 8; ++j) to[j] = j < n ? from[j] : T(0);
}
#if defined(__AVX512F__)
inline unsigned filled(const float* p) { return _mm256_cmp_ps_mask(_mm256_loadu_ps(p), _mm256_setzero_ps(), _CMP_NEQ_UQ); }
inline unsigned filled(const double* p) { return _mm512_cmp_pd_mask(_mm512_loadu_pd(p), _mm512_setzero_pd(), _CMP_NEQ_UQ); }
inline __mmask8 first_bits(int64_t n) { return static_cast<__mmask8>(n >= 8 ? 0xff : n <= 0 ? 0 : 0xff >> (8 - n)); }
inline void copy_part(float* to, const float* from, int64_t n) {
  _mm256_storeu_ps(to, _mm256_maskz_loadu_ps(first_bits(n), from));
}
inline void copy_part(double* to, const double* from, int64_t n) {
  _mm512_storeu_pd(to, _mm512_maskz_loadu_pd(first_bits(n), from));
}
#endif

// Row k of a task: its entries, the first of them and how many.
template <class T>
inline const T* locate(const TaskTables& in, int64_t k, int64_t& first, int64_t& n) {
  const T* values = static_cast<const T*>(in.transition);
  if (in.offset) {
    first = in.first[k], n = in.length[k];
    if (first + n > in.num_states) n = first < in.num_states ? in.num_states - first : 0;
    return values + in.offset[k];
  }
  const T* row = values + k * in.stride;
  int32_t low, high;
  window(row, in.num_states, low, high);
  if (low == high) return first = n = 0, row;
  int64_t end = high * 8 < in.num_states ? high * 8 : in.num_states;
  first = low * 8;
  if (first + 8 <= end) first += __builtin_ctz(filled(row + first) | 0x80);
  while (row[first] == 0) ++first;  // in the last block, where it is cut short
  if (end == high * 8) end -= __builtin_clz(filled(row + end - 8) | 1) - 24;
  while (row[end - 1] == 0) --end;
  n = end - first;
  return row + first;
}

// Copies a task into a lane; false where it is not a plain one.
template <class T>
bool load_task(Lane& lane, const TaskTables& in) {
  const int64_t na = in.num_actions, rows = in.num_states * na;
  const T *transition = static_cast<const T*>(in.transition), *reward = static_cast<const T*>(in.reward);
  T* to = static_cast<T*>(lane.table);
  v8 least = splat(0), row_sum = splat(0);
  bool fault = false;
  int64_t used = 0;
  lane.states = in.num_states, lane.widest = 0, lane.reward_magnitude = 0;
  for (int64_t k = 0; k < rows; k += 8) {
    const int64_t count = rows - k < 8 ? rows - k : 8;
    const T* from[8];
    int64_t first[8], n[8], widest = 0;
    for (int64_t r = 0; r < count; ++r) {
      if (in.offset && outside(in, k + r)) return false;
      from[r] = locate<T>(in, k + r, first[r], n[r]);
      widest = n[r] > widest ? n[r] : widest;
    }
    lane.widest = widest > lane.widest ? widest : lane.widest;
    const int64_t padded = (widest + 7) / 8 * 8;
    v8 total[8], mean[8], size[8];
    clear(total);
    for (int64_t r = 0; r < count; ++r) {
      v8 sum = splat(0);
      for (int64_t j = 0; j < padded; j += 8) {
        T* here = to + used + r * padded + j;
        copy_part(here, from[r] + j, n[r] - j);
        const v8 p = load(here);
        sum += p;
        least = p < least ? p : least;
      }
      total[r] = sum;
    }
    alignas(64) double mass[8];
    const v8 masses = row_sums(total);
    store(mass, masses);
    row_sum = masses > row_sum ? masses : row_sum;
    if (in.reward_by_successor) {
      clear(mean), clear(size);
      for (int64_t r = 0; r < count; ++r) {
        const T* gain = reward + (from[r] - transition);
        for (int64_t j = 0; j < padded; j += 8) {
          T won[8];
          copy_part(won, gain + j, n[r] - j);
          // the reward of an impossible transition counts for nothing, even if it is NaN
          const v8 p = load(to + used + r * padded + j), x = p != 0 ? load(won) * p : splat(0);
          mean[r] += x, size[r] += x < 0 ? -x : x;
        }
      }
      store(lane.reward + k, row_sums(mean)), store(lane.magnitude + k, row_sums(size));
    } else {
      T means[8];
      copy_part(means, reward + k, count);
      const v8 x = load(means);
      store(lane.reward + k, x), store(lane.magnitude + k, x < 0 ? -x : x);
    }
    for (int64_t r = 0; r < count; ++r) {
      const bool empty = mass[r] == 0;
      fault |= !(empty || (mass[r] - 1 <= 1e-4 && mass[r] - 1 >= -1e-4));
      const int64_t begin = empty ? 0 : first[r], end = empty ? 0 : first[r] + n[r];
      lane.row[k + r] = {static_cast<int32_t>(begin), static_cast<int32_t>(end), static_cast<int32_t>(used + r * padded),
                         static_cast<int32_t>(begin + padded)};
    }
    used += count * padded;
  }
  for (int64_t s = 0; s < in.num_states; ++s) {
    bool empty = true;
    for (int64_t k = s * na; k < s * na + na; ++k) empty &= lane.row[k].end == 0;
    const bool ends = in.terminal ? in.terminal[s] : empty;
    fault |= ends && !empty;
    int64_t best = s * na;
    for (int64_t k = s * na; k < s * na + na; ++k) {
      if (ends) lane.reward[k] = lane.magnitude[k] = 0;
      fault |= !(lane.magnitude[k] <= kLargest);
      lane.reward_magnitude = lane.magnitude[k] > lane.reward_magnitude ? lane.magnitude[k] : lane.reward_magnitude;
      best = lane.reward[k] > lane.reward[best] ? k : best;
    }
    lane.chosen[s] = static_cast<int32_t>(best);
  }
  lane.row_sum = 0;
  for (int j = 0; j < 8; ++j) {
    fault |= least[j] < 0;
    lane.row_sum = row_sum[j] > lane.row_sum ? row_sum[j] : lane.row_sum;
  }
  lane.row_sum *= 1 + (lane.widest + 4) * 2 * kUnit;
  return !fault;
}

// ---- policy evaluation -------------------------------------------------------------------------------------------------

// The policies' rows of block row i into the buffer, their rewards, and the columns [first, end) that the lanes fill.
template <class T>
void gather(Group& g, int64_t i, int64_t& first, int64_t& end, int64_t& padded_end) {
  first = g.ns, end = padded_end = 0;
  for (int l = 0; l < kLanes; ++l) {
    const Lane& lane = g.lane[l];
    for (int64_t r = 0; r < 4; ++r) {
      const int64_t s = i * 4 + r;
      double* right = g.rhs + s * kLanes + l;
      *right = 0;
      if (lane.task < 0 || s >= lane.states) continue;
      const LaneRow row = lane.row[lane.chosen[s]];
      *right = lane.reward[lane.chosen[s]];
      if (row.end == 0) continue;
      first = row.first < first ? row.first : first, end = row.end > end ? row.end : end;
      padded_end = row.padded_end > padded_end ? row.padded_end : padded_end;
      const T* from = static_cast<const T*>(lane.table) + row.at;
      T* to = static_cast<T*>(g.buffer) + (r * g.columns + row.first) * kLanes + l;
      for (int64_t n = row.padded_end - row.first; n > 0; n -= 8, from += 8, to += 8 * kLanes)
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) to[j * kLanes] = from[j];
    }
  }
}

// acc -= m u for kTileRows rows of m
inline void subtract_tiles(Lanes (&acc)[kTileRows][4], const double* m, const double* u) {
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    Lanes row[4];
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) row[c] = wide(u + (4 * k + c) * kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < kTileRows; ++r) {
      const Lanes f = wide(m + (4 * r + k) * kLanes);
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) acc[r][c] -= f * row[c];
    }
  }
}

// The inverse of a tile by Gauss-Jordan elimination; lanes whose pivots are not all positive come out in the mask.
LaneMask invert_tile(const double* tile, double* inverse) {
  Lanes a[4][4];
  LaneMask bad = {};
#pragma GCC unroll 16
  for (int x = 0; x < 16; ++x) a[x / 4][x % 4] = wide(tile + x * kLanes);
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    bad |= ~(a[k][k] > 0);
    const Lanes reciprocal = 1 / a[k][k];
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) a[k][c] = c == k ? reciprocal : a[k][c] * reciprocal;
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      if (r == k) continue;
      const Lanes f = a[r][k];
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) a[r][c] = c == k ? -f * reciprocal : a[r][c] - f * a[k][c];
    }
  }
#pragma GCC unroll 16
  for (int x = 0; x < 16; ++x) keep(inverse + x * kLanes, a[x / 4][x % 4]);
  return bad;
}

// Values of the lanes' policies into their v. Lanes in which a pivot was not positive come out in the mask.
template <class T>
unsigned evaluate_lanes(Group& g) {
  constexpr int64_t kPart = kTileRows * 4 * kLanes;
  const int64_t nb = g.nb;
  const Lanes minus = wide(g.minus_gamma);
  T* buffer = static_cast<T*>(g.buffer);
  LaneMask bad = {};
  g.tile[0] = 0;
  for (int64_t i = 0; i < nb; ++i) {
    int64_t first, end, padded_end;
    gather<T>(g, i, first, end, padded_end);
    const int64_t own_low = first / 4, own_high = (end + 3) / 4 - 1;  // blocks that the rows themselves fill
    int64_t low = own_low < i ? own_low : i, high = own_high > i ? own_high : i;
    for (int64_t k = low; k < i; ++k) high = g.high[k] > high ? g.high[k] : high;
    g.low[i] = static_cast<int32_t>(low), g.high[i] = static_cast<int32_t>(high);
    g.tile[i + 1] = g.tile[i] + (high - low + 1) * kTile;
    double* tiles = g.tiles + g.tile[i];  // tile j at tiles + (j - low) * kTile
    for (int64_t j = low; j <= high; ++j) {
      const int64_t last = j < i ? j : i;
      for (int64_t part = 0; part < 4 / kTileRows; ++part) {
        double* here = tiles + (j - low) * kTile + part * kPart;
        Lanes acc[kTileRows][4] = {};
        if (j >= own_low && j <= own_high) {
          const T* row = buffer + (part * kTileRows * g.columns + j * 4) * kLanes;
#pragma GCC unroll 4
          for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 4
            for (int c = 0; c < 4; ++c) acc[r][c] = minus * wide(row + (r * g.columns + c) * kLanes);
        }
        if (j == i) {
#pragma GCC unroll 4
          for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 4
            for (int c = 0; c < 4; ++c) acc[r][c] += part * kTileRows + r == c ? 1. : 0.;
        }
        for (int64_t k = low; k < last; ++k)
          if (g.high[k] >= j)
            subtract_tiles(acc, tiles + (k - low) * kTile + part * kPart,
                           g.tiles + g.tile[k] + (j - g.low[k]) * kTile);
#pragma GCC unroll 16
        for (int x = 0; x < kTileRows * 4; ++x) keep(here + x * kLanes, acc[x / 4][x % 4]);
        if (j >= i) continue;
        Lanes product[kTileRows][4] = {};
        subtract_tiles(product, here, g.inverse + j * kTile);
        double* right = g.rhs + (i * 4 + part * kTileRows) * kLanes;
#pragma GCC unroll 4
        for (int r = 0; r < kTileRows; ++r) {
          Lanes sum = wide(right + r * kLanes);
#pragma GCC unroll 4
          for (int c = 0; c < 4; ++c) {
            const Lanes x = -product[r][c];
            keep(here + (r * 4 + c) * kLanes, x);
            sum -= x * wide(g.rhs + (j * 4 + c) * kLanes);
          }
          keep(right + r * kLanes, sum);
        }
      }
      if (j == i) bad |= invert_tile(tiles + (j - low) * kTile, g.inverse + i * kTile);
    }
    for (int64_t r = 0; r < 4 && end > 0; ++r)
      __builtin_memset(buffer + (r * g.columns + first) * kLanes, 0, (padded_end - first) * kLanes * sizeof(T));
  }
  Lanes largest = {}, total = {};
  for (int64_t i = nb - 1; i >= 0; --i) {
    Lanes x[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) x[r] = wide(g.rhs + (i * 4 + r) * kLanes);
    for (int64_t j = i + 1; j <= g.high[i]; ++j) {
      const double* u = g.tiles + g.tile[i] + (j - g.low[i]) * kTile;
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) {
        const Lanes v = wide(g.v + (j * 4 + c) * kLanes);
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) x[r] -= wide(u + (r * 4 + c) * kLanes) * v;
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      const double* m = g.inverse + i * kTile + r * 4 * kLanes;
      const Lanes v =
          wide(m) * x[0] + wide(m + kLanes) * x[1] + (wide(m + 2 * kLanes) * x[2] + wide(m + 3 * kLanes) * x[3]);
      keep(g.v + (i * 4 + r) * kLanes, v);
      const Lanes size = v < 0 ? -v : v;
      largest = size > largest ? size : largest;
      total += size;
    }
  }
  for (int l = 0; l < kLanes; ++l) {
    Lane& lane = g.lane[l];
    lane.largest = largest[l];
    for (int64_t s = 0; s < lane.states; ++s) lane.v[s] = g.v[s * kLanes + l];
  }
  return bits(bad) | bits(~(total <= kLargest));
}

// ---- policy improvement, one lane --------------------------------------------------------------------------------------

// q = reward + discount T v
template <class T>
void backup_lane(Lane& lane, int64_t rows) {
  const T* p = static_cast<const T*>(lane.table);
  for (int64_t k = 0; k < rows; k += 8) {
    const LaneRow* row = lane.row + k;
    const int64_t count = rows - k < 8 ? rows - k : 8, padded = row->padded_end - row->first;
    v8 acc[8];
    clear(acc);
    if (count == 8) {
      const double* at[8];
      for (int r = 0; r < 8; ++r) at[r] = lane.v + row[r].first;
      for (int64_t j = 0; j < padded; j += 8) {
#pragma GCC unroll 8
        for (int r = 0; r < 8; ++r) acc[r] += load(p + r * padded + j) * load(at[r] + j);
      }
    } else {
      for (int64_t r = 0; r < count; ++r)
        for (int64_t j = 0; j < padded; j += 8) acc[r] += load(p + r * padded + j) * load(lane.v + row[r].first + j);
    }
    p += count * padded;
    store(lane.q + k, load(lane.reward + k) + lane.gamma * row_sums(acc));
  }
}

// As tie(), for rows a and b.
template <class T>
double tie_in_lane(const Lane& lane, int64_t a, int64_t b) {
  double size = lane.magnitude[a] + lane.magnitude[b];
  int64_t widest = 0;
  for (const int64_t k : {a, b}) {
    const LaneRow row = lane.row[k];
    const T* p = static_cast<const T*>(lane.table) + row.at;
    for (int64_t j = row.first; j < row.end; ++j) {
      const double v = lane.v[j];
      size += lane.gamma * (v < 0 ? -v : v) * p[j - row.first];
    }
    widest = row.end - row.first > widest ? row.end - row.first : widest;
  }
  return (widest + 16) * 2 * kUnit * size;
}

double lane_rounding(const Lane& lane) {
  const double terms = static_cast<double>(lane.widest + 16);
  return terms * 2 * kUnit * (lane.reward_magnitude + lane.gamma * lane.row_sum * lane.largest) + terms * kUnderflow;
}

// The best action's row of state s, the lowest of equals.
inline int64_t greedy_row(const Lane& lane, int64_t s, int64_t na) { return s * na + greedy(lane.q + s * na, na); }

// One round of policy iteration after evaluation, as in policy_iteration(). False once the policy stays.
template <class T>
bool improve_lane(Lane& lane, int64_t na) {
  ++lane.iterations;
  backup_lane<T>(lane, lane.states * na);
  const double slack = 1 - lane.gamma * lane.row_sum, amplified = 4 / (slack > 1e-6 ? slack : 1e-6);
  const double coarse = lane_rounding(lane) * 2;
  bool changed = false, large = false;
  for (int64_t s = 0; s < lane.states; ++s) {
    const double* q = lane.q + s * na;
    double top = q[0];
    for (int64_t a = 1; a < na; ++a) top = q[a] > top ? q[a] : top;
    lane.next[s] = top;
    const double gain = top - lane.q[lane.chosen[s]];
    if (!(gain > 0)) continue;
    const int64_t best = greedy_row(lane, s, na);
    if (!(gain > coarse * amplified)) {
      const double fine = tie_in_lane<T>(lane, best, lane.chosen[s]);
      if (gain <= fine) continue;
      large |= gain > fine * amplified;
    } else {
      large = true;
    }
    changed = true, lane.chosen[s] = static_cast<int32_t>(best);
  }
  lane.small_rounds = large ? 0 : lane.small_rounds + 1;
  return changed && lane.small_rounds <= 4;
}

// ---- the queue ---------------------------------------------------------------------------------------------------------

// Takes tasks from the queue until one is plain.
template <class T>
bool next_task(Lane& lane, const LaneJobs& jobs) {
  for (int64_t at; (at = __atomic_fetch_add(jobs.next, 1, __ATOMIC_RELAXED)) < jobs.count;) {
    const int64_t i = jobs.tasks[at], ng = jobs.num_discounts, before = lane.states;
    const double* gamma = jobs.discount + i * ng;
    if (load_task<T>(lane, jobs.tables(jobs.context, i))) {
      for (int64_t s = lane.states; s < before; ++s) lane.v[s] = 0;
      for (int64_t x = 0; x < ng; ++x) {  // insertion: few, stable
        int64_t y = x;
        for (; y > 0 && gamma[lane.order[y - 1]] > gamma[x]; --y) lane.order[y] = lane.order[y - 1];
        lane.order[y] = x;
      }
      const double top = gamma[lane.order[ng - 1]];
      if (top < 1 && top * lane.row_sum * (1 + 4 * kUnit) < 1) {
        lane.task = i, lane.at = lane.iterations = lane.small_rounds = 0;
        lane.gamma = gamma[lane.order[0]];
        return true;
      }
    }
    lane.states = lane.states > before ? lane.states : before;
    jobs.alone(jobs.context, i);
  }
  lane.task = -1, lane.states = 0, lane.gamma = 0;
  return false;
}

// Writes what a lane has found for its discount, and takes the policy over; false where its bound is not finite.
bool finish(Lane& lane, const LaneJobs& jobs) {
  const int64_t ns = jobs.num_states, na = jobs.num_actions, states = lane.states;
  const int64_t to = lane.task * jobs.num_discounts + lane.order[lane.at];
  double change = 0;
  for (int64_t s = 0; s < states; ++s) {
    const double d = lane.next[s] - lane.v[s], size = d < 0 ? -d : d;
    change = size > change || size != size ? size : change;
  }
  const double kappa = lane.gamma * lane.row_sum * (1 + 4 * kUnit);
  const double bound = (lane_rounding(lane) + kappa * change) / (1 - kappa) * (1 + 16 * kUnit) + kUnderflow;
  if (!(bound <= kLargest)) return false;
  jobs.bound[to] = bound, jobs.iterations[to] = lane.iterations;
  double *q = jobs.q + to * ns * na, *v = jobs.v + to * ns;
  int64_t* policy = jobs.policy + to * ns;
  __builtin_memcpy(q, lane.q, states * na * sizeof(double));
  __builtin_memcpy(v, lane.next, states * sizeof(double));
  for (int64_t s = 0; s < states; ++s) {
    policy[s] = greedy(lane.q + s * na, na);
    lane.chosen[s] = static_cast<int32_t>(s * na + policy[s]);
  }
  for (int64_t k = states * na; k < ns * na; ++k) q[k] = 0;
  for (int64_t s = states; s < ns; ++s) v[s] = 0, policy[s] = 0;
  return true;
}

template <class T>
void solve_lanes(Group& g, const LaneJobs& jobs) {
  int busy = 0;
  for (Lane& lane : g.lane) busy += next_task<T>(lane, jobs);
  while (busy) {
    for (int l = 0; l < kLanes; ++l) g.minus_gamma[l] = -g.lane[l].gamma;
    const unsigned bad = evaluate_lanes<T>(g);
    for (int l = 0; l < kLanes; ++l) {
      Lane& lane = g.lane[l];
      if (lane.task < 0) continue;
      bool fine = !(bad >> l & 1);
      if (fine && improve_lane<T>(lane, g.na)) continue;
      fine = fine && finish(lane, jobs);
      if (fine && ++lane.at < jobs.num_discounts) {
        lane.gamma = jobs.discount[lane.task * jobs.num_discounts + lane.order[lane.at]];
        lane.iterations = lane.small_rounds = 0;
        continue;
      }
      if (!fine) jobs.alone(jobs.context, lane.task);
      busy -= !next_task<T>(lane, jobs);
    }
  }
}

}  // namespace

int64_t vi_lanes_bytes(int64_t ns, int64_t na, int64_t ng, bool is_double) {
  Group g;
  return lanes_layout(g, nullptr, ns, na, ng, is_double ? 8 : 4);
}

// Solves tasks of the queue until it is empty. Every thread calls it, with scratch of its own.
void vi_lanes(const LaneJobs& jobs, void* scratch) {
  Group& g = *static_cast<Group*>(scratch);
  const int64_t ns = jobs.most_states, element = jobs.is_double ? 8 : 4;
  lanes_layout(g, static_cast<char*>(scratch), ns, jobs.num_actions, jobs.num_discounts, element);
  __builtin_memset(g.buffer, 0, 4 * g.columns * kLanes * element);
  for (Lane& lane : g.lane) {
    lane.states = 0;
    for (int64_t s = 0; s < g.columns; ++s) lane.v[s] = 0;
  }
  jobs.is_double ? solve_lanes<double>(g, jobs) : solve_lanes<float>(g, jobs);
}
