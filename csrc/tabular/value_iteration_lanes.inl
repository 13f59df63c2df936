// Policy iteration of many small tasks, one in each lane of the vectors.
//
//   ns, nb, na   states, blocks of four states and actions, of the largest task in the lanes
//   i, j         a block row and a block column; l a lane
//   rhs, v       [4 nb, kLanes] double: right-hand sides, values
//   tiles        [4, 4, kLanes] each, double: factors of I - discount P, block row i in columns low[i] to high[i] from
//                tile[i] on
//   inverse      [nb, 4, 4, kLanes] double: inverses of the diagonal tiles
//   buffer       [4, columns, kLanes] of the tables' type: the policies' rows of one block row
//   gamma        a lane's discount
// What each lane has of its own is Lane's (value_iteration_lane_tables.inl); what the tasks come from and go to,
// LaneJobs'.
//
// Only policy evaluation is done across lanes: I - discount P is factored by block LU in tiles of 4 x 4 (times lanes)
// within the union of the lanes' envelopes. Backups and improvement are each lane's own, on its own windows. A lane
// whose policy is optimal goes on to its next discount or takes the next task at once, so that all lanes stay busy
// though tasks differ in the steps they need. Outside its own envelope a lane adds exact zeros, and no lane's
// arithmetic looks at another's, so the bits of a task's answer do not depend on its company. Tasks that are not plain
// (faults, discount * row sum near 1, values that are not finite) are left to the solver for one task.
#pragma once

#include <cstdint>

#include "tabular/policy_iteration.h"
#include "tabular/value_iteration.inl"
#include "tabular/value_iteration_lane_tables.inl"
#include "tabular/value_iteration_lanes.h"

namespace icrl::ICRL_ISA {
namespace {

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
    lane.first = take<int32_t>(at, rows), lane.end = take<int32_t>(at, rows);
    lane.blocks = take<int32_t>(at, rows / 8), lane.begin = take<int32_t>(at, rows / 8);
    lane.reward = take<double>(at, rows), lane.magnitude = take<double>(at, rows), lane.q = take<double>(at, rows);
    lane.v = take<double>(at, reach), lane.next = take<double>(at, ns);
    lane.rough_v = take<char>(at, reach * element), lane.rough_q = take<char>(at, rows * element);
    lane.chosen = take<int32_t>(at, ns), lane.order = take<int64_t>(at, ng);
    lane.table = take<char>(at, rows * ((ns + 7) / 8 * 8) * element);
  }
  g.tiles = take<double>(at, nb * nb * kTile);
  return at - base;
}

// ---- policy evaluation ----------------------------------------------------------------------------------------------

struct Columns {
  int32_t first, end, padded_end;
};

// The policies' rows of block row i into the buffer, their rewards to the right-hand side; the columns that are filled.
template <class T>
Columns gather(Group& g, int64_t i) {
  Columns all{static_cast<int32_t>(g.ns), 0, 0};
  for (int l = 0; l < kLanes; ++l) {
    const Lane& lane = g.lane[l];
    const int64_t states = lane.states - i * 4 < 4 ? lane.states - i * 4 : 4;
    double* right = g.rhs + i * 4 * kLanes + l;
    T* line = static_cast<T*>(g.buffer) + l;
    for (int64_t r = 0; r < states; ++r) {
      const int64_t k = lane.chosen[i * 4 + r];
      const int32_t first = lane.first[k], end = lane.end[k];
      right[r * kLanes] = lane.reward[k];
      if (end == 0) continue;
      const T* from = static_cast<const T*>(lane.table) + lane.begin[k / 8] + k % 8 * 8;
      T* to = line + (r * g.columns + first) * kLanes;
      int32_t j = first;
      do {
#pragma GCC unroll 8
        for (int x = 0; x < 8; ++x) to[x * kLanes] = from[x];
        j += 8, from += 64, to += 8 * kLanes;
      } while (j < end);
      all.first = first < all.first ? first : all.first, all.end = end > all.end ? end : all.end;
      all.padded_end = j > all.padded_end ? j : all.padded_end;
    }
    for (int64_t r = states > 0 ? states : 0; r < 4; ++r) right[r * kLanes] = 0;
  }
  return all;
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
    const Columns filled = gather<T>(g, i);
    // blocks that the rows themselves fill
    const int64_t own_low = filled.first / 4, own_high = (filled.end + 3) / 4 - 1;
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
            subtract_tiles(acc, tiles + (k - low) * kTile + part * kPart, g.tiles + g.tile[k] + (j - g.low[k]) * kTile);
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
    for (int64_t r = 0; r < 4; ++r)
      for (int64_t j = filled.first; j < filled.padded_end; ++j) clear_lanes(buffer + (r * g.columns + j) * kLanes);
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

// ---- policy improvement, one lane -----------------------------------------------------------------------------------

// As tie(), for rows a and b.
template <class T>
double tie_in_lane(const Lane& lane, int64_t a, int64_t b) {
  double size = lane.magnitude[a] + lane.magnitude[b];
  int64_t widest = 0;
  for (const int64_t k : {a, b}) {
    const T* p = static_cast<const T*>(lane.table) + lane.begin[k / 8] + k % 8 * 8;
    const int64_t n = lane.end[k] - lane.first[k];
    for (int64_t j = 0; j < n; ++j) {
      const double v = lane.v[lane.first[k] + j];
      size += lane.gamma * (v < 0 ? -v : v) * p[j / 8 * 64 + j % 8];
    }
    widest = n > widest ? n : widest;
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
  backup_lane<T, double>(lane, na, lane.v, lane.q);
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

// ---- the queue ------------------------------------------------------------------------------------------------------

// Takes tasks from the queue until one is plain.
template <class T>
bool next_task(Lane& lane, const LaneJobs& jobs) {
  for (int64_t at; (at = __atomic_fetch_add(jobs.next, 1, __ATOMIC_RELAXED)) < jobs.count;) {
    const int64_t i = jobs.tasks[at], ng = jobs.num_discounts, before = lane.states;
    const double* gamma = jobs.discount + i * ng;
    if (load_task<T>(lane, jobs.tables(jobs.context, i))) {
      for (int64_t s = lane.states; s < before; ++s) lane.v[s] = 0, static_cast<T*>(lane.rough_v)[s] = 0;
      for (int64_t x = 0; x < ng; ++x) {  // insertion: few, stable
        int64_t y = x;
        for (; y > 0 && gamma[lane.order[y - 1]] > gamma[x]; --y) lane.order[y] = lane.order[y - 1];
        lane.order[y] = x;
      }
      const double top = gamma[lane.order[ng - 1]];
      if (top < 1 && top * lane.row_sum * (1 + 4 * kUnit) < 1) {
        lane.task = i, lane.at = lane.iterations = lane.small_rounds = 0;
        lane.gamma = gamma[lane.order[0]];
        for (int64_t s = 0; s < lane.states; ++s) lane.next[s] = 0;
        start_policy<T>(lane, jobs.num_actions);
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
        start_policy<T>(lane, g.na);
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
    __builtin_memset(lane.v, 0, g.columns * sizeof(double)), __builtin_memset(lane.rough_v, 0, g.columns * element);
  }
  jobs.is_double ? solve_lanes<double>(g, jobs) : solve_lanes<float>(g, jobs);
}

}  // namespace icrl::ICRL_ISA
