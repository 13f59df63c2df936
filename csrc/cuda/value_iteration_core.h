// The GPU planner, written for a team of threads that share one task. A host build runs it with a team of one thread, which
// is how its logic is tested where there is no GPU; races between threads are what that cannot show.
//
// Howard policy iteration in float64. A row's window (first to last entry that is not zero) is found when the table is first
// read; later reads stay within it. I - discount P is stored dense and eliminated without pivoting (an M-matrix), each pivot
// touching only the rows and columns of the envelope of all the task's rows: one barrier for each pivot.
#pragma once

#include <cstdint>

#include "cpu/policy_iteration.h"

#ifdef __CUDACC__
#define ICRL_HD __host__ __device__
#else
#define ICRL_HD
#endif

namespace icrl {

constexpr int kLanes = 8;  // threads of a group, which take one row together: 8 floats are one 32-byte sector

// A team of one: groups of one lane, nothing to wait for. The device's team is in value_iteration.cu.
struct SerialTeam {
  int id = 0, size = 1, lane = 0, lanes = 1, group = 0, groups = 1;
  void sync() {}
  double lane_sum(double x) { return x; }
  int64_t lane_max(int64_t x) { return x; }
  double max(double x) { return x; }
};

template <class T>
struct CoreTask {
  const T* transition;  // as TaskTables
  const T* reward;
  const uint8_t* terminal;
  int64_t ns, na, stride;
  bool by_successor;
};

// Workspace of one task: doubles first, then int32, then bytes.
struct CoreSpace {
  double *matrix, *reward, *magnitude, *q, *scale, *v, *next, *rhs;
  int32_t *low, *high, *policy, *right, *below, *above;
  uint8_t *ends, *reached, *reached_next;
  int64_t ld;
};

ICRL_HD inline int64_t core_layout(CoreSpace& w, char* base, int64_t ns, int64_t na) {
  const int64_t rows = ns * na;
  w.ld = ns | 1;  // odd: a column falls on different banks
  double* d = reinterpret_cast<double*>(base);
  w.matrix = d, d += ns * w.ld;
  w.reward = d, d += rows;
  w.magnitude = d, d += rows;
  w.q = d, d += rows;
  w.scale = d, d += rows;
  w.v = d, d += ns;
  w.next = d, d += ns;
  w.rhs = d, d += ns;
  int32_t* i = reinterpret_cast<int32_t*>(d);
  w.low = i, i += rows;
  w.high = i, i += rows;
  w.policy = i, i += ns;
  w.right = i, i += ns;
  w.below = i, i += ns;
  w.above = i, i += ns;
  uint8_t* b = reinterpret_cast<uint8_t*>(i);
  w.ends = b, b += ns;
  w.reached = b, b += ns;
  w.reached_next = b, b += ns;
  return (reinterpret_cast<char*>(b) - base + 15) / 16 * 16;
}

template <class T, class Team>
struct Core {
  Team& team;
  CoreTask<T> in;
  CoreSpace w;
  double row_sum, reward_magnitude;

  static constexpr double kRounding = 0x1p-52;

  ICRL_HD static double absolute(double x) { return x < 0 ? -x : x; }
  ICRL_HD const T* row(int64_t k) const { return in.transition + k * in.stride; }
  ICRL_HD double roundings() const { return (in.ns + 16) * kRounding; }

  // The first (least) of the indices that threads give, -1 meaning none.
  ICRL_HD int64_t first(int64_t index) {
    const double least = -team.max(index < 0 ? -0x1p60 : -static_cast<double>(index));
    return least >= 0x1p59 ? -1 : static_cast<int64_t>(least);
  }

  // Windows, expected rewards, checks. Every thread returns the same.
  ICRL_HD PlanResult pack() {
    const int64_t ns = in.ns, na = in.na;
    double most_mass = 0, most_size = 0;
    int64_t fault = -1;  // row * 16 + kind, the least
    for (int64_t k = team.group; k < ns * na; k += team.groups) {
      const T* p = row(k);
      const T* gain = in.by_successor ? in.reward + k * in.stride : nullptr;
      double mass = 0, mean = 0, size = 0;
      int64_t low = ns, high = 0, negative = 0;
      for (int64_t j = team.lane; j < ns; j += team.lanes) {
        const double x = p[j];
        if (x == 0) continue;  // a NaN goes on, and spoils the mass
        const double r = gain ? x * static_cast<double>(gain[j]) : 0;
        mass += x, mean += r, size += absolute(r);
        low = j < low ? j : low, high = j + 1, negative |= x < 0;
      }
      mass = team.lane_sum(mass), mean = team.lane_sum(mean), size = team.lane_sum(size);
      low = ns - team.lane_max(ns - low), high = team.lane_max(high), negative = team.lane_max(negative);
      if (!gain) mean = in.reward[k], size = absolute(mean);
      if (team.lane == 0) w.low[k] = low < high ? low : 0, w.high[k] = high, w.reward[k] = mean, w.magnitude[k] = size;
      most_mass = mass > most_mass ? mass : most_mass;
      const bool declared = in.terminal && in.terminal[k / na];
      Refusal kind = Refusal::none;
      if (!(mass - mass == 0)) kind = Refusal::not_finite;
      else if (negative) kind = Refusal::negative;
      else if (high > 0 && !(absolute(mass - 1) <= 1e-4)) kind = Refusal::row_sum;
      else if (high > 0 && declared) kind = Refusal::terminal_row;
      if (kind != Refusal::none && fault < 0) fault = k * 16 + static_cast<int>(kind);
    }
    team.sync();
    for (int64_t s = team.id; s < ns; s += team.size) {
      bool empty = true;
      for (int64_t a = 0; a < na; ++a) empty &= w.high[s * na + a] == 0;
      const bool ends = in.terminal ? in.terminal[s] != 0 : empty;
      for (int64_t k = s * na; k < (s + 1) * na; ++k) {
        if (ends) w.reward[k] = 0, w.magnitude[k] = 0;
        if (!(w.magnitude[k] - w.magnitude[k] == 0)) {
          const int64_t code = k * 16 + static_cast<int>(Refusal::reward);
          fault = fault < 0 || code < fault ? code : fault;
        }
        most_size = w.magnitude[k] > most_size ? w.magnitude[k] : most_size;
      }
    }
    fault = first(fault);
    row_sum = team.max(most_mass) * (1 + roundings());
    reward_magnitude = team.max(most_size);
    PlanResult out;
    if (fault >= 0) out.refusal = static_cast<Refusal>(fault % 16), out.row = fault / 16;
    if (team.id == 0 && fault < 0) envelope();
    team.sync();
    return out;
  }

  // right[k]: the last column that pivot row k can hold; below[k]: the last row that column k can reach; above[k]: the first
  // row that holds column k. One thread, once for each task.
  ICRL_HD void envelope() {
    const int64_t ns = in.ns, na = in.na;
    int32_t right = 0;
    for (int64_t s = 0; s < ns; ++s) w.below[s] = static_cast<int32_t>(s);
    for (int64_t s = 0; s < ns; ++s) {
      int32_t low = static_cast<int32_t>(s);
      right = right > low ? right : low;
      for (int64_t k = s * na; k < (s + 1) * na; ++k) {
        if (w.high[k] == 0) continue;
        low = w.low[k] < low ? w.low[k] : low;
        right = w.high[k] - 1 > right ? w.high[k] - 1 : right;
      }
      w.right[s] = right;
      if (low < s) w.below[low] = static_cast<int32_t>(s);  // s ascends: the last to write is the greatest
    }
    for (int64_t k = 1; k < ns; ++k) w.below[k] = w.below[k] > w.below[k - 1] ? w.below[k] : w.below[k - 1];
    int64_t i = 0;
    for (int64_t k = 0; k < ns; ++k) {
      while (w.right[i] < k) ++i;
      w.above[k] = static_cast<int32_t>(i);
    }
  }

  // q = reward + discount T v, scale = its sum of magnitudes, next = max q.
  ICRL_HD void backup(double discount) {
    for (int64_t k = team.group; k < in.ns * in.na; k += team.groups) {
      const T* p = row(k);
      double sum = 0, size = 0;
      for (int64_t j = w.low[k] + team.lane; j < w.high[k]; j += team.lanes) {
        const double x = static_cast<double>(p[j]) * w.v[j];
        sum += x, size += absolute(x);
      }
      sum = team.lane_sum(sum), size = team.lane_sum(size);
      if (team.lane == 0) w.q[k] = w.reward[k] + discount * sum, w.scale[k] = w.magnitude[k] + discount * size;
    }
    team.sync();
    for (int64_t s = team.id; s < in.ns; s += team.size) w.next[s] = w.q[s * in.na + greedy(s)];
    team.sync();
  }

  ICRL_HD int64_t greedy(int64_t s) const {
    int64_t best = 0;
    for (int64_t a = 1; a < in.na; ++a)
      if (w.q[s * in.na + a] > w.q[s * in.na + best]) best = a;
    return best;
  }

  // v = (I - discount P[policy])^-1 reward[policy]; false where a pivot is not positive.
  ICRL_HD bool evaluate(double discount) {
    const int64_t ns = in.ns, ld = w.ld;
    for (int64_t i = team.group; i < ns; i += team.groups) {
      const int64_t k = i * in.na + w.policy[i];
      const T* p = row(k);
      for (int64_t j = team.lane; j < ns; j += team.lanes) {
        const double x = j >= w.low[k] && j < w.high[k] ? -discount * static_cast<double>(p[j]) : 0;
        w.matrix[i * ld + j] = i == j ? x + 1 : x;
      }
      if (team.lane == 0) w.rhs[i] = w.reward[k];
    }
    team.sync();
    bool fine = true;
    for (int64_t k = 0; k < ns; ++k) {
      const double* pivot = w.matrix + k * ld;
      const int64_t right = w.right[k], below = w.below[k];
      fine &= pivot[k] > 0;
      if (below == k) continue;  // the same for every thread
      const double inverse = 1 / pivot[k];
      for (int64_t i = k + 1 + team.group; i <= below; i += team.groups) {
        double* to = w.matrix + i * ld;
        const double m = to[k] * inverse;  // column k itself stays as it is: nobody reads it after this pivot
        for (int64_t j = k + 1 + team.lane; j <= right; j += team.lanes) to[j] -= m * pivot[j];
        if (team.lane == 0) w.rhs[i] -= m * w.rhs[k];
      }
      team.sync();
    }
    if (!fine) return false;  // every thread has seen every pivot
    for (int64_t k = ns - 1; k >= 0; --k) {
      const double x = w.rhs[k] / w.matrix[k * ld + k];
      if (team.id == 0) w.v[k] = x;
      const int64_t above = w.above[k];
      for (int64_t i = above + team.id; i < k; i += team.size) w.rhs[i] -= w.matrix[i * ld + k] * x;
      team.sync();
    }
    return true;
  }

  // As cannot_end in cpu/value_iteration.inl: the first state from which no end can be reached, or -1.
  ICRL_HD int64_t cannot_end(bool choose) {
    const int64_t ns = in.ns, na = in.na;
    for (int64_t s = team.id; s < ns; s += team.size) w.reached[s] = 0;
    for (;;) {
      team.sync();
      double more = 0;
      for (int64_t s = team.id; s < ns; s += team.size) {
        w.reached_next[s] = w.reached[s];
        for (int64_t a = choose ? 0 : w.policy[s], end = choose ? na : a + 1; a < end && !w.reached_next[s]; ++a) {
          const int64_t k = s * na + a;
          bool found = w.high[k] == 0;
          for (int64_t j = w.low[k]; j < w.high[k] && !found; ++j) found = row(k)[j] > 0 && w.reached[j];
          if (found) w.reached_next[s] = 1, w.policy[s] = static_cast<int32_t>(a), more = 1;
        }
      }
      more = team.max(more);
      for (int64_t s = team.id; s < ns; s += team.size) w.reached[s] = w.reached_next[s];
      if (more == 0) break;
    }
    int64_t stuck = -1;
    for (int64_t s = team.id; s < ns && stuck < 0; s += team.size)
      if (!w.reached[s]) stuck = s;
    return first(stuck);
  }

  struct Change {
    double change, largest;  // max |v - next|, max |v|
  };
  ICRL_HD Change change() {
    double d = 0, m = 0;
    for (int64_t s = team.id; s < in.ns; s += team.size) {
      const double x = absolute(w.v[s] - w.next[s]), y = absolute(w.v[s]);
      d = x > d ? x : d, m = y > m ? y : m;
    }
    d = team.max(d);
    return {d, team.max(m)};
  }
  ICRL_HD double rounding(double discount, double largest) const {
    return roundings() * (reward_magnitude + discount * row_sum * largest);
  }
  ICRL_HD double certificate(double discount, const Change& c) const {
    const double contraction = discount * row_sum * (1 + 2 * kRounding);
    if (!(contraction < 1)) return 0.0 / 0.0;
    return (rounding(discount, c.largest) + contraction * c.change) / (1 - contraction) * (1 + 8 * kRounding);
  }

  ICRL_HD PlanResult policy_iteration(double discount) {
    PlanResult out;
    if (discount == 1 && cannot_end(false) >= 0) {
      const int64_t s = cannot_end(true);
      if (s >= 0) return out.refusal = Refusal::no_proper_policy, out.row = s * in.na, out;
    }
    const double slack = 1 - discount * row_sum, amplified = 4 / (slack > 1e-6 ? slack : 1e-6);
    for (int small_rounds = 0;;) {
      ++out.iterations;
      if (!evaluate(discount)) return out.refusal = Refusal::singular, out;
      backup(discount);
      double news = 0;  // 1: a change, 2: one above the rounding of v
      for (int64_t s = team.id; s < in.ns; s += team.size) {
        const int64_t k = s * in.na + w.policy[s], best = greedy(s);
        const double gain = w.next[s] - w.q[k], fine = roundings() * (w.scale[k] + w.scale[s * in.na + best]);
        if (!(gain > fine)) continue;
        w.policy[s] = static_cast<int32_t>(best);
        const double kind = gain > fine * amplified ? 2 : 1;
        news = kind > news ? kind : news;
      }
      news = team.max(news);
      small_rounds = news == 2 ? 0 : small_rounds + 1;
      if (news == 0 || small_rounds > 4) break;
      if (discount == 1) {
        const int64_t s = cannot_end(false);
        if (s >= 0) return out.refusal = Refusal::unbounded, out.row = s * in.na, out;
      }
    }
    out.bound = certificate(discount, change());
    return out;
  }

  ICRL_HD PlanResult value_iteration(double discount, double tol) {
    PlanResult out;
    for (int64_t s = team.id; s < in.ns; s += team.size) w.v[s] = 0;
    for (;;) {
      team.sync();
      ++out.iterations;
      backup(discount);
      const Change c = change();
      out.bound = certificate(discount, c);
      if (!(out.bound == out.bound)) return out.refusal = Refusal::no_contraction, out;
      if (out.bound <= tol || c.change <= rounding(discount, c.largest)) return out;
      for (int64_t s = team.id; s < in.ns; s += team.size) w.v[s] = w.next[s];
    }
  }
};

// Arguments of a batch, as `solve` in csrc/cpu/value_iteration.cpp; `order` [N,G] sorts a task's discounts ascending.
struct CoreBatch {
  const void *transition, *reward;
  const uint8_t* terminal;
  const int64_t* num_states;
  const double* discount;
  const int64_t* order;
  int64_t n, ng, ns, na;
  bool by_successor;
  int method;
  double tol;
  double *q, *v;
  int64_t* policy;
  double* bound;
  int64_t *iterations, *refusal;
};

inline CoreBatch core_batch(uintptr_t transition, uintptr_t reward, bool by_successor, uintptr_t terminal,
                            uintptr_t num_states, uintptr_t discount, uintptr_t order, int64_t n, int64_t ng, int64_t ns,
                            int64_t na, int method, double tol, uintptr_t q, uintptr_t v, uintptr_t policy,
                            uintptr_t bound, uintptr_t iterations, uintptr_t refusal) {
  const auto doubles = [](uintptr_t p) { return reinterpret_cast<double*>(p); };
  const auto integers = [](uintptr_t p) { return reinterpret_cast<int64_t*>(p); };
  return {reinterpret_cast<const void*>(transition), reinterpret_cast<const void*>(reward),
          reinterpret_cast<const uint8_t*>(terminal), integers(num_states), doubles(discount), integers(order), n, ng, ns,
          na, by_successor, method, tol, doubles(q), doubles(v), integers(policy), doubles(bound), integers(iterations),
          integers(refusal)};
}

template <class T, class Team>
ICRL_HD void core_solve(Team& team, const CoreBatch& b, int64_t i, char* space) {
  const int64_t ns = b.num_states ? b.num_states[i] : b.ns, na = b.na;
  CoreSpace w;
  core_layout(w, space, ns, na);
  const CoreTask<T> in{static_cast<const T*>(b.transition) + i * b.ns * na * b.ns,
                       static_cast<const T*>(b.reward) + i * b.ns * na * (b.by_successor ? b.ns : 1),
                       b.terminal ? b.terminal + i * b.ns : nullptr, ns, na, b.ns, b.by_successor};
  Core<T, Team> core{team, in, w, 0, 0};
  int64_t* refused = b.refusal + i * 3;
  PlanResult r = core.pack();
  if (team.id == 0) refused[0] = static_cast<int64_t>(r.refusal), refused[1] = r.row, refused[2] = 0;
  if (r.refusal != Refusal::none) return;
  for (int64_t s = team.id; s < ns; s += team.size) {  // the greedy policy of the expected reward
    int64_t best = 0;
    for (int64_t a = 1; a < na; ++a)
      if (w.reward[s * na + a] > w.reward[s * na + best]) best = a;
    w.policy[s] = static_cast<int32_t>(best);
  }
  team.sync();
  for (int64_t x = 0; x < b.ng; ++x) {
    const int64_t g = b.order[i * b.ng + x], at = i * b.ng + g;
    const double discount = b.discount[at];
    r = b.method == 1 ? core.value_iteration(discount, b.tol) : core.policy_iteration(discount);
    if (r.refusal != Refusal::none) {
      if (team.id == 0) refused[0] = static_cast<int64_t>(r.refusal), refused[1] = r.row, refused[2] = g;
      return;
    }
    for (int64_t k = team.id; k < b.ns * na; k += team.size) b.q[at * b.ns * na + k] = k < ns * na ? w.q[k] : 0;
    for (int64_t s = team.id; s < b.ns; s += team.size) {
      const int64_t best = s < ns ? core.greedy(s) : 0;
      b.v[at * b.ns + s] = s < ns ? w.next[s] : 0, b.policy[at * b.ns + s] = best;
      if (s < ns) w.policy[s] = static_cast<int32_t>(best);
    }
    if (team.id == 0) b.bound[at] = r.bound, b.iterations[at] = r.iterations;
    team.sync();
  }
}

}  // namespace icrl
