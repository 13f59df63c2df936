// The GPU planner, written for a team of threads that share one task: Howard policy iteration and Jacobi sweeps in
// float64. A host build runs it with a team of coroutines (value_iteration_cuda_on_host.cpp), which is how it is tested
// where there is no GPU.
//
//   ns, na        the task's states and actions; s a state, a an action, k = s * na + a a row
//   b, w          the batch and the task's memory: CoreBatch, CoreSpace (value_iteration_cuda_space.h has their shapes)
//   windows       of the table's type: row k's w.length[k] entries from successor w.low[k] on; a state's rows follow
//                 one another from w.base[s] on
//   factors       of I - discount P, double: row i's column j, from w.left[i] on and below its panel's w.right, is at
//                 factors[w.origin[i] + j]
//   P             [ns, ns], the policy's rows of the transitions
//   v, rhs        w.v, w.rhs: [padded] double
//   q             [ns, na] double, the batch's own
//   id, size      the thread, and how many the team has;  lane, group: its place among the kLanes = 8 threads that take
//                 a row together, and which of these it is among
//
// A task's table is read once. What is left of a row is its window, from the first to the last entry that is not zero;
// where `Resident` the windows lie in the team's fast memory for all discounts, else they are read where they were
// given. Policy evaluation factors I - discount P by panels of four states without pivoting (an M-matrix: every pivot
// is positive): the inverse of a panel's diagonal block replaces it, the rows below take one product of four terms an
// entry. A row is stored from its own first column to the last that its panel can reach. One barrier a panel: the first
// warp updates the next panel and inverts its block while the others do the rest.
#pragma once

#include <cstdint>
#include <type_traits>

#include "tabular/policy_iteration.h"
#include "tabular/value_iteration_cuda_space.h"

namespace icrl {

template <class T, bool Resident, class Team>
struct Core {
  Team& team;
  const CoreBatch& b;
  int64_t task;
  int ns, na;
  CoreSpace w;
  T* windows = nullptr;
  double* factors = nullptr;
  int64_t most_factors = 0;
  double row_sum = 0, reward_magnitude = 0;

  enum State { fine, unfit, singular };
  static constexpr double kRounding = 0x1p-52, kUnderflow = 0x1p-1073, kLargest = 0x1.fffffffffffffp1023;
  static constexpr int64_t kMostSweeps = 100000;

  ICRL_HD static double absolute(double x) { return x < 0 ? -x : x; }
  ICRL_HD double roundings() const { return (ns + 16) * kRounding; }
  ICRL_HD int panels() const { return (ns + kPanel - 1) / kPanel; }
  ICRL_HD double* at(int row) const { return factors + w.origin[row]; }

  // Where a row was given: p[j] and gain[j] for from <= j < to.
  struct Given {
    const T *p, *gain;
    int from, to;
  };
  ICRL_HD Given given(int k) const {
    const T *p = static_cast<const T*>(b.transition), *gain = static_cast<const T*>(b.reward);
    if (!b.offset) {
      const int64_t row = task * b.ns * na + k;
      return {p + row * b.ns, b.by_successor ? gain + row * b.ns : nullptr, 0, ns};
    }
    const int64_t row = task * b.ns * na + k, end = static_cast<int64_t>(b.first[row]) + b.length[row];
    const int64_t shift = b.offset[row] - b.first[row];
    return {p + shift, b.by_successor ? gain + shift : nullptr, b.first[row], static_cast<int>(end < ns ? end : ns)};
  }
  // Whether a row's window leaves its table.
  ICRL_HD bool outside(int k) const {
    if (!b.offset) return false;
    const int64_t row = task * b.ns * na + k, at = b.offset[row], low = b.first[row], n = b.length[row];
    return low < 0 || n < 0 || low + n > b.ns || (n > 0 && (at < 0 || at > b.values - n));
  }
  // Where a row's window begins in table(): column low[k]. `at` runs through the windows of a state, action by action.
  using Place = std::conditional_t<Resident, int, int64_t>;
  ICRL_HD const T* table() const { return Resident ? windows : static_cast<const T*>(b.transition); }
  ICRL_HD Place first_window(int s) const { return Resident ? static_cast<Place>(w.base[s]) : 0; }
  ICRL_HD Place window(int k, Place& at) const {
    if (!Resident) return static_cast<Place>(given(k).p + w.low[k] - static_cast<const T*>(b.transition));
    const Place p = at;
    at += w.length[k];
    return p;
  }

  ICRL_HD double lane_sum(double x) {
    for (int m = kLanes / 2; m > 0; m /= 2) x += team.lane_xor(x, m);
    return x;
  }
  ICRL_HD int lane_max(int x) {
    for (int m = kLanes / 2; m > 0; m /= 2) {
      const int y = team.lane_xor(x, m);
      x = y > x ? y : x;
    }
    return x;
  }
  // Lane l gets the sum over the lanes of x[l].
  ICRL_HD double lane_sums(double (&x)[kLanes]) {
    ICRL_UNROLL
    for (int m = kLanes / 2; m > 0; m /= 2) {
      const bool upper = team.lane & m;
      ICRL_UNROLL
      for (int r = 0; r < m; ++r) {
        const double give = upper ? x[r] : x[r + m], keep = upper ? x[r + m] : x[r];
        x[r] = keep + team.lane_xor(give, m);
      }
    }
    return x[0];
  }
  // The least of the indices that threads give, -1 meaning none.
  ICRL_HD int64_t first(int64_t index) {
    const double least = -team.max(index < 0 ? -0x1p60 : -static_cast<double>(index));
    return least >= 0x1p59 ? -1 : static_cast<int64_t>(least);
  }

  // ---- reading the table --------------------------------------------------------------------------------------------

  // Windows, expected rewards, checks. Every thread returns the same; w.shared[1] says that the windows did not fit.
  ICRL_HD PlanResult pack() {
    const int most = Resident ? static_cast<int>(w.room / static_cast<int64_t>(sizeof(T))) : 0;
    if (team.id == 0) w.shared[0] = w.shared[1] = 0;
    windows = reinterpret_cast<T*>(w.pool);
    prefetch();
    team.sync();
    double most_mass = 0, most_size = 0;
    int64_t fault = -1;  // row * 16 + kind, the least
    for (int s = team.group; s < ns; s += team.groups) {
      const bool declared = b.terminal && b.terminal[task * b.ns + s];
      int total = 0;
      for (int k = s * na; k < (s + 1) * na; ++k) {
        const Refusal kind = read_row(k, declared, most_mass);
        if (kind != Refusal::none && fault < 0) fault = static_cast<int64_t>(k) * 16 + static_cast<int>(kind);
        total += w.length[k];
      }
      const bool ends = b.terminal ? declared : total == 0;
      for (int k = s * na + team.lane; k < (s + 1) * na; k += kLanes) {
        if (ends) w.reward[k] = 0, w.magnitude[k] = 0;
        if (!(w.magnitude[k] - w.magnitude[k] == 0)) {
          const int64_t code = static_cast<int64_t>(k) * 16 + static_cast<int>(Refusal::reward);
          fault = fault < 0 || code < fault ? code : fault;
        }
        most_size = core_larger(most_size, w.magnitude[k]);
      }
      if (Resident) keep(s, total, most);
    }
    fault = first(fault);
    row_sum = team.max(most_mass) * (1 + roundings());
    reward_magnitude = team.max(most_size);
    const int64_t taken = (static_cast<int64_t>(w.shared[0]) * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
    factors = reinterpret_cast<double*>(w.pool + (Resident ? taken : 0));
    most_factors = (w.room - (Resident ? taken : 0)) / static_cast<int64_t>(sizeof(double));
    PlanResult out;
    if (fault >= 0) out.refusal = static_cast<Refusal>(fault % 16), out.row = fault / 16;
    return out;
  }

  // Rows are read one after another, each in two or three steps that wait for one another: bring them nearer at once.
  // The rewards of dense tables are left where they are, since most of them will not be read.
  ICRL_HD void prefetch() {
    constexpr int kLine = 128 / sizeof(T);
    for (int k = team.id; k < ns * na; k += team.size) {
      if (!b.by_successor && k % kLine == 0) team.prefetch(static_cast<const T*>(b.reward) + task * b.ns * na + k);
      if (outside(k)) continue;
      const Given in = given(k);
      for (int j = in.from; j < in.to; j = j + kLine < in.to || j == in.to - 1 ? j + kLine : in.to - 1) {
        team.prefetch(in.p + j);
        if (b.offset && in.gain) team.prefetch(in.gain + j);
      }
    }
  }

  // All lanes of the group: the row's window and expected reward.
  ICRL_HD Refusal read_row(int k, bool declared, double& most_mass) {
    const bool out = outside(k);
    const Given in = out ? Given{nullptr, nullptr, 0, 0} : given(k);
    constexpr int kAhead = 8;  // loads in flight
    int low = ns, high = 0;
    for (int j0 = in.from + team.lane; j0 < in.to; j0 += kLanes * kAhead) {
      T x[kAhead];
      ICRL_UNROLL
      for (int u = 0; u < kAhead; ++u) x[u] = j0 + u * kLanes < in.to ? in.p[j0 + u * kLanes] : T(0);
      ICRL_UNROLL
      for (int u = 0; u < kAhead; ++u) {
        if (x[u] == 0) continue;  // a NaN goes on, and spoils the mass
        const int j = j0 + u * kLanes;
        low = j < low ? j : low, high = j + 1;
      }
    }
    low = -lane_max(-low), high = lane_max(high);
    double mass = 0, mean = 0, size = 0;
    int negative = 0;
    for (int j = low + team.lane; j < high; j += kLanes) {
      const double x = in.p[j];
      if (x == 0) continue;  // the reward of what cannot happen is not read
      const double r = in.gain ? x * static_cast<double>(in.gain[j]) : 0;
      mass += x, mean += r, size += absolute(r), negative |= x < 0;
    }
    mass = lane_sum(mass), negative = lane_max(negative);
    if (b.by_successor)
      mean = lane_sum(mean), size = lane_sum(size);
    else
      mean = static_cast<const T*>(b.reward)[task * b.ns * na + k], size = absolute(mean);
    const int length = high > low ? high - low : 0;
    if (team.lane == 0) {
      w.low[k] = static_cast<uint16_t>(length ? low : 0), w.length[k] = static_cast<uint16_t>(length);
      w.reward[k] = mean, w.magnitude[k] = size;
    }
    team.sync_lanes();
    if (out) return Refusal::window;
    most_mass = core_larger(most_mass, mass);
    if (!(mass - mass == 0)) return Refusal::not_finite;
    if (negative) return Refusal::negative;
    if (length && !(absolute(mass - 1) <= 1e-4)) return Refusal::row_sum;
    return length && declared ? Refusal::terminal_row : Refusal::none;
  }

  // All lanes of the group: copies a state's windows where there is room.
  ICRL_HD void keep(int s, int total, int most) {
    int base = 0;
    if (team.lane == 0) base = team.claim(w.shared, total);
    base = lane_max(base);
    const bool fits = base <= most - total;
    if (team.lane == 0) {
      w.base[s] = base;
      if (!fits) w.shared[1] = 1;
    }
    if (!fits) return;
    T* to = windows + base;
    for (int k = s * na; k < (s + 1) * na; ++k) {
      const T* p = given(k).p + w.low[k];
      for (int j = team.lane; j < w.length[k]; j += kLanes) to[j] = p[j];
      to += w.length[k];
    }
  }

  // ---- a sweep ------------------------------------------------------------------------------------------------------

  struct Sweep {
    double change, largest,
        news;  // max |v - next|, max |v|; news 1: a better action somewhere, 2: by more than rounding of v
  };

  // rhs = max q and best = argmax q, where q = reward + discount T v; with `improve` also policy iteration's step. q
  // and v are written where they are asked for. Lane l ends with action l of a chunk of eight.
  ICRL_HD Sweep backup(double discount, bool improve, double* q_out, double* v_out) {
    const double slack = 1 - discount * row_sum, amplified = 4 / (slack > 1e-6 ? slack : 1e-6);
    Sweep out{0, 0, 0};
    for (int s = team.group; s < ns; s += team.groups) {
      Place next_window = first_window(s);
      double top = -1 / 0.0, mine = 0;
      int best = 0;
      const int own = improve ? w.policy[s] : 0;
      for (int a0 = 0; a0 < na; a0 += kLanes) {
        double sum[kLanes];
        Place from[kLanes];
        int low[kLanes], n[kLanes], longest = 0;
        ICRL_UNROLL
        for (int a = 0; a < kLanes; ++a) {
          sum[a] = 0, n[a] = 0, low[a] = 0, from[a] = 0;
          if (a0 + a >= na) continue;
          const int k = s * na + a0 + a;
          from[a] = window(k, next_window), low[a] = w.low[k], n[a] = w.length[k];
          longest = n[a] > longest ? n[a] : longest;
        }
        for (int j = team.lane; j < longest; j += kLanes) {
          ICRL_UNROLL
          for (int a = 0; a < kLanes; ++a)
            if (j < n[a]) sum[a] += static_cast<double>(table()[from[a] + j]) * w.v[low[a] + j];
        }
        const double total = lane_sums(sum);
        const int a = a0 + team.lane, k = s * na + a;
        double q = -1 / 0.0;
        if (a < na) q = w.reward[k] + discount * total;
        if (a < na && q_out) q_out[k] = q;
        if (own >= a0 && own < a0 + kLanes) mine = team.lane_read(q, own - a0);
        int arg = a;
        for (int m = kLanes / 2; m > 0; m /= 2) {
          const double x = team.lane_xor(q, m);
          const int y = team.lane_xor(arg, m);
          if (x > q || (x == q && y < arg)) q = x, arg = y;
        }
        if (q > top) top = q, best = arg;
      }
      out.change = core_larger(out.change, absolute(w.v[s] - top)),
      out.largest = core_larger(out.largest, absolute(w.v[s]));
      if (team.lane == 0) {
        w.rhs[s] = top, w.best[s] = static_cast<uint16_t>(best);
        if (v_out) v_out[s] = top;
      }
      if (!improve || !(top > mine)) continue;
      const double rounding = roundings() * (magnitude_of(s, own, discount) + magnitude_of(s, best, discount));
      if (!(top - mine > rounding)) continue;
      if (team.lane == 0) w.policy[s] = static_cast<uint16_t>(best);
      out.news = core_larger(out.news, top - mine > rounding * amplified ? 2 : 1);
    }
    out.change = team.max(out.change), out.largest = team.max(out.largest), out.news = team.max(out.news);
    return out;
  }

  // All lanes of the group: the sum of magnitudes in the backup of an action.
  ICRL_HD double magnitude_of(int s, int a, double discount) {
    Place next_window = first_window(s);
    const int k = s * na + a;
    for (int i = s * na; Resident && i < k; ++i) window(i, next_window);
    const T* p = table() + window(k, next_window);
    double size = 0;
    for (int j = team.lane; j < w.length[k]; j += kLanes)
      size += static_cast<double>(p[j]) * absolute(w.v[w.low[k] + j]);
    return w.magnitude[k] + discount * lane_sum(size);
  }

  // ---- policy evaluation --------------------------------------------------------------------------------------------

  // Where the factors of the policy's rows lie. Returns whether they fit.
  ICRL_HD bool envelope() {
    const int np = panels();
    for (int k = team.id; k < np; k += team.size) {
      int right = k * kPanel + kPanel;
      for (int i = k * kPanel; i < (k + 1) * kPanel; ++i) {
        int left = k * kPanel;
        if (i < ns) {
          const int row = i * na + w.policy[i], low = w.low[row], high = low + w.length[row];
          if (high > low) left = low < left ? low : left, right = high > right ? high : right;
        }
        w.left[i] = static_cast<uint16_t>(left);
      }
      w.above[k] = static_cast<uint16_t>(right);  // for now
    }
    team.sync();
    for (int k = team.id; k < np; k += team.size) {
      int right = 0, width = 0, least = k * kPanel;
      for (int i = 0; i <= k; ++i) right = w.above[i] > right ? w.above[i] : right;
      for (int i = k * kPanel; i < (k + 1) * kPanel; ++i) {
        width += right - w.left[i];
        least = w.left[i] < least ? w.left[i] : least;
      }
      w.right[k] = static_cast<uint16_t>(right), w.total[k] = width, w.below[k] = static_cast<uint16_t>(least);
    }
    team.sync();
    int64_t all = 0;
    for (int k = 0; k < np; ++k) all += w.total[k];
    const bool fits = all <= most_factors;  // the same for every thread
    int below = 0, above = 0;
    for (int k = team.id; k < np; k += team.size) {
      int at = 0;
      for (int i = 0; i < k; ++i) at += w.total[i];
      for (int i = k * kPanel; i < (k + 1) * kPanel; ++i) {
        w.origin[i] = at - w.left[i];
        at += w.right[k] - w.left[i];
      }
    }
    // two arrays change their meaning: every thread keeps one panel's news until all have read, panel by panel of the
    // team
    for (int k0 = 0; k0 < np; k0 += team.size) {
      const int k = k0 + team.id;
      if (k < np) {
        below = k, above = 0;
        for (int i = k + 1; i < np; ++i)
          if (w.below[i] < (k + 1) * kPanel) below = i;
        while (w.right[above] <= k * kPanel) ++above;
      }
      team.sync();
      if (k < np) w.below[k] = static_cast<uint16_t>(below), w.above[k] = static_cast<uint16_t>(above);
    }
    return fits;
  }

  // One thread: the inverse of a panel's diagonal block, by blocks of two.
  ICRL_HD void invert(int k) {
    const int c = k * kPanel;
    double *r0 = at(c) + c, *r1 = at(c + 1) + c, *r2 = at(c + 2) + c, *r3 = at(c + 3) + c;
    double det = r0[0] * r1[1] - r0[1] * r1[0], inverse = 1 / det;
    bool good = r0[0] > 0 && det > 0;
    const double a00 = r1[1] * inverse, a01 = -r0[1] * inverse, a10 = -r1[0] * inverse, a11 = r0[0] * inverse;
    const double x00 = a00 * r0[2] + a01 * r1[2], x01 = a00 * r0[3] + a01 * r1[3];
    const double x10 = a10 * r0[2] + a11 * r1[2], x11 = a10 * r0[3] + a11 * r1[3];
    const double y00 = r2[0] * a00 + r2[1] * a10, y01 = r2[0] * a01 + r2[1] * a11;
    const double y10 = r3[0] * a00 + r3[1] * a10, y11 = r3[0] * a01 + r3[1] * a11;
    const double s00 = r2[2] - (r2[0] * x00 + r2[1] * x10), s01 = r2[3] - (r2[0] * x01 + r2[1] * x11);
    const double s10 = r3[2] - (r3[0] * x00 + r3[1] * x10), s11 = r3[3] - (r3[0] * x01 + r3[1] * x11);
    det = s00 * s11 - s01 * s10, inverse = 1 / det;
    good = good && s00 > 0 && det > 0;
    const double d00 = s11 * inverse, d01 = -s01 * inverse, d10 = -s10 * inverse, d11 = s00 * inverse;
    const double z00 = d00 * y00 + d01 * y10, z01 = d00 * y01 + d01 * y11;
    const double z10 = d10 * y00 + d11 * y10, z11 = d10 * y01 + d11 * y11;
    r0[0] = a00 + (x00 * z00 + x01 * z10), r0[1] = a01 + (x00 * z01 + x01 * z11);
    r1[0] = a10 + (x10 * z00 + x11 * z10), r1[1] = a11 + (x10 * z01 + x11 * z11);
    r0[2] = -(x00 * d00 + x01 * d10), r0[3] = -(x00 * d01 + x01 * d11);
    r1[2] = -(x10 * d00 + x11 * d10), r1[3] = -(x10 * d01 + x11 * d11);
    r2[0] = -z00, r2[1] = -z01, r2[2] = d00, r2[3] = d01;
    r3[0] = -z10, r3[1] = -z11, r3[2] = d10, r3[3] = d11;
    if (!good) w.shared[2] = 1;
  }

  // The rows below panel k, whose block is inverted. The next panel's four rows are the first warp's alone.
  ICRL_HD void update(int k) {
    const int c = k * kPanel, right = w.right[k], rows = (w.below[k] - k) * kPanel;
    constexpr int kAhead = kWarp / kLanes;
    const bool alone = team.groups > kAhead && team.group < kAhead;
    const int step = team.groups > kAhead ? (alone ? kAhead : team.groups - kAhead) : team.groups;
    const int end = alone && rows > kPanel ? kPanel : rows;
    const double *p0 = at(c), *p1 = at(c + 1), *p2 = at(c + 2), *p3 = at(c + 3);
    for (int x = team.group; x < end; x += step) {
      const int i = c + kPanel + x, left = w.left[i];
      if (left >= c + kPanel) continue;
      double* to = at(i);
      const double a0 = c >= left ? to[c] : 0, a1 = c + 1 >= left ? to[c + 1] : 0;
      const double a2 = c + 2 >= left ? to[c + 2] : 0, a3 = to[c + 3];
      const double m0 = a0 * p0[c] + a1 * p1[c] + (a2 * p2[c] + a3 * p3[c]);
      const double m1 = a0 * p0[c + 1] + a1 * p1[c + 1] + (a2 * p2[c + 1] + a3 * p3[c + 1]);
      const double m2 = a0 * p0[c + 2] + a1 * p1[c + 2] + (a2 * p2[c + 2] + a3 * p3[c + 2]);
      const double m3 = a0 * p0[c + 3] + a1 * p1[c + 3] + (a2 * p2[c + 3] + a3 * p3[c + 3]);
      for (int j = c + kPanel + team.lane; j < right; j += kLanes)
        to[j] -= m0 * p0[j] + m1 * p1[j] + (m2 * p2[j] + m3 * p3[j]);
      if (team.lane == 0) w.rhs[i] -= m0 * w.rhs[c] + m1 * w.rhs[c + 1] + (m2 * w.rhs[c + 2] + m3 * w.rhs[c + 3]);
    }
  }

  // v = (I - discount P[policy])^-1 reward[policy].
  ICRL_HD State evaluate(double discount) {
    const int np = panels();
    if (!envelope()) return unfit;
    if (team.id == 0) w.shared[2] = 0;
    for (int i = team.group; i < np * kPanel; i += team.groups) {
      double* to = at(i);
      const int right = w.right[i / kPanel];
      int low = 0, length = 0;
      const T* p = table();
      if (i < ns) {
        const int k = i * na + w.policy[i];
        Place next_window = first_window(i);
        for (int a = i * na; Resident && a < k; ++a) window(a, next_window);
        p += window(k, next_window), low = w.low[k], length = w.length[k];
        if (team.lane == 0) w.rhs[i] = w.reward[k];
      } else if (team.lane == 0) {
        w.rhs[i] = 0;
      }
      for (int j = w.left[i] + team.lane; j < right; j += kLanes) {
        const double x = j >= low && j < low + length ? -discount * static_cast<double>(p[j - low]) : 0;
        to[j] = i == j ? x + 1 : x;
      }
    }
    team.sync();
    if (team.id == 0) invert(0);
    team.sync();
    for (int k = 0; k + 1 < np; ++k) {
      update(k);
      if (team.id < kWarp) {
        team.sync_warp();
        if (team.id == 0) invert(k + 1);
      }
      team.sync();
    }
    if (w.shared[2]) return singular;
    for (int k = np - 1; k >= 0; --k) {
      const int c = k * kPanel;
      int i = w.above[k] * kPanel + team.id;
      if (i < c || team.id == 0) {
        const double *p0 = at(c) + c, *p1 = at(c + 1) + c, *p2 = at(c + 2) + c, *p3 = at(c + 3) + c;
        const double r0 = w.rhs[c], r1 = w.rhs[c + 1], r2 = w.rhs[c + 2], r3 = w.rhs[c + 3];
        const double x0 = p0[0] * r0 + p0[1] * r1 + (p0[2] * r2 + p0[3] * r3);
        const double x1 = p1[0] * r0 + p1[1] * r1 + (p1[2] * r2 + p1[3] * r3);
        const double x2 = p2[0] * r0 + p2[1] * r1 + (p2[2] * r2 + p2[3] * r3);
        const double x3 = p3[0] * r0 + p3[1] * r1 + (p3[2] * r2 + p3[3] * r3);
        if (team.id == 0) w.v[c] = x0, w.v[c + 1] = x1, w.v[c + 2] = x2, w.v[c + 3] = x3;
        for (; i < c; i += team.size) {
          const double* row = at(i) + c;
          const int n = w.right[i / kPanel] - c;  // at least one of the panel's columns is stored
          w.rhs[i] -= row[0] * x0 + (n > 1 ? row[1] * x1 : 0) + ((n > 2 ? row[2] * x2 : 0) + (n > 3 ? row[3] * x3 : 0));
        }
      }
      team.sync();
    }
    return fine;
  }

  // ---- discount 1 ---------------------------------------------------------------------------------------------------

  // As cannot_end in value_iteration.inl: the first state from which no end can be reached, or -1.
  ICRL_HD int64_t cannot_end(bool choose) {
    for (int s = team.id; s < ns; s += team.size) w.reached[s] = 0;
    for (;;) {
      team.sync();
      double more = 0;
      for (int s = team.id; s < ns; s += team.size) {
        w.reached_next[s] = w.reached[s];
        const int only = w.policy[s];
        Place next_window = first_window(s);
        for (int a = 0; a < na && !w.reached_next[s]; ++a) {
          const int k = s * na + a;
          const T* p = table() + window(k, next_window);
          if (!choose && a != only) continue;
          bool found = w.length[k] == 0;
          for (int j = 0; j < w.length[k] && !found; ++j) found = p[j] > 0 && w.reached[w.low[k] + j];
          if (found) w.reached_next[s] = 1, w.policy[s] = static_cast<uint16_t>(a), more = 1;
        }
      }
      more = team.max(more);
      for (int s = team.id; s < ns; s += team.size) w.reached[s] = w.reached_next[s];
      if (more == 0) break;
    }
    int64_t stuck = -1;
    for (int s = team.id; s < ns && stuck < 0; s += team.size)
      if (!w.reached[s]) stuck = s;
    return first(stuck);
  }

  // ---- the two methods ----------------------------------------------------------------------------------------------

  ICRL_HD double rounding(double discount, double largest) const {
    return roundings() * (reward_magnitude + discount * row_sum * largest) + (ns + 16) * kUnderflow;
  }
  // |q - Q*| given that q is the backup of v: (rounding + contraction |v - max q|) / (1 - contraction), or NaN.
  ICRL_HD double certificate(double discount, const Sweep& c) const {
    const double contraction = discount * row_sum * (1 + 2 * kRounding);
    if (!(contraction < 1)) return 0.0 / 0.0;
    return (rounding(discount, c.largest) + contraction * c.change) / (1 - contraction) * (1 + 8 * kRounding) +
           kUnderflow;
  }

  ICRL_HD PlanResult policy_iteration(double discount, double* q, double* v, bool& fits) {
    PlanResult out;
    if (discount == 1 && cannot_end(false) >= 0) {
      const int64_t s = cannot_end(true);
      if (s >= 0) return out.refusal = Refusal::no_proper_policy, out.row = s * na, out;
    }
    for (int small_rounds = 0;;) {
      ++out.iterations;
      team.sync();
      const State state = evaluate(discount);
      if (state == unfit) return fits = false, out;
      if (state == singular) return out.refusal = Refusal::singular, out;
      const Sweep c = backup(discount, true, q, v);
      if (!(c.change <= kLargest)) return out.refusal = Refusal::singular, out;
      small_rounds = c.news == 2 ? 0 : small_rounds + 1;
      if (c.news == 0 || small_rounds > 4) return out.bound = certificate(discount, c), out;
      if (discount == 1) {
        const int64_t s = cannot_end(false);
        if (s >= 0) return out.refusal = Refusal::unbounded, out.row = s * na, out;
      }
    }
  }

  ICRL_HD PlanResult value_iteration(double discount, double tol, double* q, double* v) {
    PlanResult out;
    for (int s = team.id; s < ns; s += team.size) w.v[s] = 0;
    for (;;) {
      team.sync();
      ++out.iterations;
      const Sweep c = backup(discount, false, nullptr, nullptr);
      if (!(c.change <= kLargest)) return out.refusal = Refusal::singular, out;
      out.bound = certificate(discount, c);
      if (!(out.bound == out.bound)) return out.refusal = Refusal::no_contraction, out;
      if (out.bound <= tol || c.change <= rounding(discount, c.largest) || out.iterations > kMostSweeps) break;
      for (int s = team.id; s < ns; s += team.size) w.v[s] = w.rhs[s];
    }
    backup(discount, false, q, v);  // the same again, to keep it
    return out;
  }
};

}  // namespace icrl
