// Tabular control in float64.
//
//   t            the packed task and its workspace (value_iteration_tables.inl has their shapes)
//   T, r         transition probabilities [ns, na, ns], expected rewards [ns, na], in t.packed and t.reward
//   P            of evaluate: [ns, ns], the policy's rows of T
//   policy       [ns] int64
//   v, t.next    [8 nb] double: values, and max q after a backup
//   q            [ns, na] double: r + discount T v
//   discount, tol, bound   doubles: gamma, the error wanted, the error proven, |q - Q*|
//   kappa        discount times the largest row sum: by how much a backup contracts
//
// States are taken in blocks of eight (value_iteration_tables.inl): a Bellman backup has no tails, and one branch for
// each state. Policy evaluation factors I - discount P by block LU without pivoting (it is an M-matrix: every pivot is
// positive, growth is at most 2), tile rows of eight at a time within the envelope of the policy's rows; a banded table
// costs what its band costs, a dense one runs at GEMM speed. A policy that changed only from state s on keeps the
// factors of the blocks before s.
#pragma once

#include <cstdint>

#include "common/tiles.inl"
#include "tabular/policy_iteration.h"
#include "tabular/value_iteration_tables.inl"

namespace icrl::ICRL_ISA {
namespace {

constexpr double kUnderflow = 0x1p-1073;  // above what two products may lose to underflow
constexpr int64_t kMostSweeps = 100000, kInnerSweeps = 20;

// ---- Bellman backup -------------------------------------------------------------------------------------------------

// t.q = reward + discount T v, t.next = max over actions; v is padded with zeros to whole blocks.
template <class T>
void backup(Task& t, double discount, const double* v) {
  const int64_t na = t.na;
  for (int64_t s = 0; s < t.ns; ++s) {
    const int64_t n = t.blocks[s];
    const int32_t* start = t.row_start + s * na;
    double* q = t.q + s * na;
    double best = -__builtin_inf();
    for (int64_t a0 = 0; a0 < na; a0 += 8) {
      const int64_t rows = na - a0 < 8 ? na - a0 : 8;
      const T* p = static_cast<const T*>(t.packed) + t.offset[s] + a0 * n * 8;
      Eight acc[8];
#pragma GCC unroll 8
      for (Eight& one : acc) one = eight_of(0);
      if (rows == 5 && kParts < 4) {
        const double* at[5];
        for (int r = 0; r < 5; ++r) at[r] = v + start[a0 + r] * 8;
        for (int64_t b = 0; b < n * 8; b += 8) {
#pragma GCC unroll 5
          for (int r = 0; r < 5; ++r) acc[r] += eight(p + r * n * 8 + b) * eight(at[r] + b);
        }
      } else {
        for (int64_t r = 0; r < rows; ++r) {
          const double* at = v + start[a0 + r] * 8;
          Eight one = eight_of(0);
          for (int64_t b = 0; b < n * 8; b += 8) one += eight(p + r * n * 8 + b) * eight(at + b);
          acc[r] = one;
        }
      }
      // eight are written where fewer are meant; the next state or the padding takes them over
      store(q + a0, eight(t.reward + s * na + a0) + discount * row_sums(acc));
      for (int64_t r = 0; r < rows; ++r) best = q[a0 + r] > best ? q[a0 + r] : best;
    }
    t.next[s] = best;
  }
}

// A bound on the rounding error of one entry of backup(), given max |v|: relative, and what underflow adds.
double backup_rounding(const Task& t, double discount, double largest) {
  const double terms = t.widest * 8 + 16;
  return terms * 2 * kUnit * (t.reward_magnitude + discount * t.row_sum * largest) + terms * kUnderflow;
}

// max |v|, NaN where there is NaN or infinity; v is padded with zeros to whole blocks.
double largest_magnitude(const Task& t, const double* v) {
  Eight most = eight_of(0), odd = eight_of(0);
  for (int64_t b = 0; b < t.nb * 8; b += 8) {
    const Eight x = eight(v + b);
    most = most_of(magnitude(x), most), odd += x - x;
  }
  return largest_lane(most) + sum(odd);
}

// ---- policy evaluation by block LU ----------------------------------------------------------------------------------

// Factors I - discount P[policy] from block row `from` on and solves for t.v. False where a pivot is not positive.
template <class T>
bool evaluate(Task& t, double discount, const int64_t* policy, int64_t from) {
  const int64_t na = t.na, nb = t.nb;
  if (from == 0) t.tile[0] = 0;
  for (int64_t i = from; i < nb; ++i) {
    const int64_t begin = i * 8, count = t.ns - begin < 8 ? t.ns - begin : 8;
    int64_t low = i, high = i;
    for (int64_t r = 0; r < count; ++r) {
      const int64_t k = (begin + r) * na + policy[begin + r];
      if (t.row_first[k] == t.row_end[k]) continue;
      if (t.row_first[k] < low) low = t.row_first[k];
      if (t.row_end[k] - 1 > high) high = t.row_end[k] - 1;
    }
    for (int64_t k = low; k < i; ++k) high = t.high[k] > high ? t.high[k] : high;
    t.low[i] = static_cast<int32_t>(low), t.high[i] = static_cast<int32_t>(high);
    t.tile[i + 1] = t.tile[i] + (high - low + 1) * 64;
    double* tiles = t.tiles + t.tile[i];  // tile j at tiles + (j - low) * 64

    __builtin_memset(tiles, 0, (high - low + 1) * 64 * sizeof(double));
    for (int64_t r = 0; r < count; ++r) {
      const int64_t s = begin + r, k = s * na + policy[s];
      const T* p = static_cast<const T*>(t.packed) + t.offset[s] + (policy[s] * t.blocks[s] - t.row_start[k]) * 8;
      for (int64_t j = t.row_first[k]; j < t.row_end[k]; ++j)
        store(tiles + (j - low) * 64 + r * 8, -discount * eight(p + j * 8));
      t.rhs[s] = t.reward[k];
    }
    for (int64_t r = 0; r < 8; ++r) tiles[(i - low) * 64 + r * 9] += 1;
    for (int64_t r = count; r < 8; ++r) t.rhs[begin + r] = 0;

    for (int64_t j = low; j <= high; ++j) {
      double* here = tiles + (j - low) * 64;
      subtract_products(here, low, j < i ? j : i, [&](int64_t k, const double*& m, const double*& u) {
        m = tiles + (k - low) * 64, u = t.tiles + t.tile[k] + (j - t.low[k]) * 64;
        return t.high[k] >= j;
      });
      if (j < i)
        multiply(here, t.inverse + j * 64);
      else if (j == i && !invert(here, t.inverse + i * 64))
        return false;
    }
    const Eight known = minus_products(
        low, i, [&](int64_t j, const double*& m, const double*& x) { m = tiles + (j - low) * 64, x = t.rhs + j * 8; });
    store(t.rhs + begin, eight(t.rhs + begin) + known);
  }
  for (int64_t i = nb - 1; i >= 0; --i) {
    const Eight known = minus_products(i + 1, t.high[i] + 1, [&](int64_t j, const double*& m, const double*& x) {
      m = t.tiles + t.tile[i] + (j - t.low[i]) * 64, x = t.v + j * 8;
    });
    store(t.v + i * 8, product(t.inverse + i * 64, eight(t.rhs + i * 8) + known));
  }
  return true;
}

// ---- discount 1: policies that end ----------------------------------------------------------------------------------

// Marks the states from which an end can be reached under `policy`, or with `choose` under some policy, which is
// written. Returns the first state from which none can, or -1.
template <class T>
int64_t cannot_end(Task& t, int64_t* policy, bool choose) {
  const int64_t na = t.na;
  for (int64_t s = 0; s < t.ns; ++s) t.reached[s] = 0;
  for (bool more = true; more;) {
    more = false;
    for (int64_t s = 0; s < t.ns; ++s) {
      for (int64_t a = choose ? 0 : policy[s], end = choose ? na : a + 1; a < end && !t.reached[s]; ++a) {
        const int64_t k = s * na + a;
        bool found = t.row_first[k] == t.row_end[k];
        const T* p = static_cast<const T*>(t.packed) + t.offset[s] + (a * t.blocks[s] - t.row_start[k]) * 8;
        for (int64_t j = t.row_first[k] * 8; j < t.row_end[k] * 8 && !found; ++j) found = p[j] > 0 && t.reached[j];
        if (found) t.reached[s] = 1, more = true, policy[s] = a;
      }
    }
  }
  for (int64_t s = 0; s < t.ns; ++s)
    if (!t.reached[s]) return s;
  return -1;
}

// ---- the methods ----------------------------------------------------------------------------------------------------

// How far one backup moves the values: the largest |next - v|, and the least and the greatest next - v of states with a
// row.
struct Change {
  double size = 0, low = __builtin_inf(), high = -__builtin_inf();
};

inline bool moves(const Task& t, int64_t s) {
  for (int64_t k = s * t.na; k < (s + 1) * t.na; ++k)
    if (t.row_first[k] < t.row_end[k]) return true;
  return false;
}

Change change(const Task& t, const double* v) {
  Change c;
  for (int64_t s = 0; s < t.ns; ++s) {
    const double d = t.next[s] - v[s], size = d < 0 ? -d : d;
    c.size = size > c.size || size != size ? size : c.size;
    if (!moves(t, s)) continue;
    c.low = d < c.low ? d : c.low, c.high = d > c.high ? d : c.high;
  }
  return c;
}

double contraction(const Task& t, double discount) { return discount * t.row_sum * (1 + 4 * kUnit); }

// |t.q - Q*| given that t.q = backup(v), t.next = max t.q and |t.next - v| <= change: the residual q - (r + discount T
// next) is at most rounding + contraction * change. NaN where there is no contraction.
double certificate(const Task& t, double discount, const double* v, double change) {
  const double kappa = contraction(t, discount);
  if (!(kappa < 1)) return __builtin_nan("");
  const double rounding = backup_rounding(t, discount, largest_magnitude(t, v));
  return (rounding + kappa * change) / (1 - kappa) * (1 + 16 * kUnit) + kUnderflow;
}

inline int64_t greedy(const double* q, int64_t na) {
  int64_t best = 0;
  double most = q[0];
  for (int64_t a = 1; a < na; ++a) {
    const bool more = q[a] > most;
    best = more ? a : best, most = more ? q[a] : most;
  }
  return best;
}

// How far two actions of state s may seem apart by the rounding of their backups alone.
template <class T>
double tie(const Task& t, double discount, int64_t s, int64_t a, int64_t b) {
  double size = t.magnitude[s * t.na + a] + t.magnitude[s * t.na + b];
  for (int64_t x = a, left = 2; left > 0; x = b, --left) {
    const T* p = static_cast<const T*>(t.packed) + t.offset[s] + x * t.blocks[s] * 8;
    const double* v = t.v + t.row_start[s * t.na + x] * 8;
    for (int64_t j = 0; j < t.blocks[s] * 8; ++j) size += discount * (v[j] < 0 ? -v[j] : v[j]) * p[j];
  }
  return (t.blocks[s] * 8 + 16) * 2 * kUnit * size;
}

// Where nothing is known policy iteration starts from the policy of two backups of the largest rewards: they cost less
// than the evaluations that they save.
template <class T>
void first_policy(Task& t, double discount) {
  for (int64_t s = 0; s < t.nb * 8; ++s) t.v[s] = t.next[s] = 0;
  for (int64_t s = 0; s < t.ns; ++s) t.v[s] = t.reward[s * t.na + greedy(t.reward + s * t.na, t.na)];
  backup<T>(t, discount, t.v);
  __builtin_memcpy(t.v, t.next, t.ns * sizeof(double));
  backup<T>(t, discount, t.v);
  for (int64_t s = 0; s < t.ns; ++s) t.policy[s] = greedy(t.q + s * t.na, t.na);
}

template <class T>
PlanResult policy_iteration(Task& t, double discount) {
  PlanResult out;
  int64_t* policy = t.policy;
  if (discount == 1 && cannot_end<T>(t, policy, false) >= 0) {
    const int64_t s = cannot_end<T>(t, policy, true);
    if (s >= 0) return out.refusal = Refusal::no_proper_policy, out.row = s * t.na, out;
  }
  // Rounding in v, which is that of a backup amplified by 1 / (1 - contraction), may make policies go round in circles:
  // after a few rounds without a larger gain the search ends.
  const double slack = 1 - discount * t.row_sum, amplified = 4 / (slack > 1e-6 ? slack : 1e-6);
  int64_t from = 0, small_rounds = 0;
  for (;;) {
    ++out.iterations;
    const bool solved = evaluate<T>(t, discount, policy, from);
    const double largest = largest_magnitude(t, t.v);
    if (!solved || !(largest <= kLargest)) return out.refusal = Refusal::singular, out;
    backup<T>(t, discount, t.v);
    const double coarse = backup_rounding(t, discount, largest) * 2;
    bool changed = false, large = false;
    for (int64_t s = 0; s < t.ns; ++s) {
      const double* q = t.q + s * t.na;
      const double gain = t.next[s] - q[policy[s]];
      if (!(gain > 0)) continue;
      const int64_t best = greedy(q, t.na);
      if (!(gain > coarse * amplified)) {
        const double fine = tie<T>(t, discount, s, best, policy[s]);
        if (gain <= fine) continue;
        large |= gain > fine * amplified;
      } else {
        large = true;
      }
      if (!changed) from = s / 8;
      changed = true, policy[s] = best;
    }
    small_rounds = large ? 0 : small_rounds + 1;
    if (!changed || small_rounds > 4) break;
    if (discount == 1) {
      const int64_t s = cannot_end<T>(t, policy, false);
      if (s >= 0) return out.refusal = Refusal::unbounded, out.row = s * t.na, out;
    }
  }
  const Change c = change(t, t.v);
  if (!(c.size <= kLargest)) return out.refusal = Refusal::singular, out;
  out.bound = certificate(t, discount, t.v, c.size);
  return out;
}

// t.v = reward + discount P t.v for the policy of t.policy.
template <class T>
void policy_sweep(Task& t, double discount) {
  for (int64_t s0 = 0; s0 < t.ns; s0 += 8) {
    Eight acc[8];
#pragma GCC unroll 8
    for (Eight& one : acc) one = eight_of(0);
    const int64_t count = t.ns - s0 < 8 ? t.ns - s0 : 8;
    alignas(64) double reward[8] = {};
    for (int64_t r = 0; r < count; ++r) {
      const int64_t s = s0 + r, k = s * t.na + t.policy[s], n = t.blocks[s] * 8;
      const T* p = static_cast<const T*>(t.packed) + t.offset[s] + t.policy[s] * n;
      const double* v = t.v + t.row_start[k] * 8;
      Eight one = eight_of(0);
      for (int64_t b = 0; b < n; b += 8) one += eight(p + b) * eight(v + b);
      acc[r] = one, reward[r] = t.reward[k];
    }
    store(t.next + s0, eight(reward) + discount * row_sums(acc));
  }
  __builtin_memcpy(t.v, t.next, t.nb * 8 * sizeof(double));
}

// Value iteration, and with `inner` sweeps of the greedy policy after each backup modified policy iteration (Puterman
// and Shin 1978). The span rule (Puterman 1994, section 6.6): when next - v is nearly the same everywhere, the middle
// of it over 1 - contraction is what is still missing, and the values so corrected are what must pass the certificate.
template <class T>
PlanResult sweeps(Task& t, double discount, double tol, int64_t inner) {
  PlanResult out;
  const double kappa = contraction(t, discount);
  if (!(kappa < 1)) return out.refusal = Refusal::no_contraction, out;
  for (int64_t s = 0; s < t.nb * 8; ++s) t.v[s] = t.next[s] = 0;
  double limit = __builtin_inf();  // a correction that failed is not tried again before the span has halved
  for (int64_t done = 0;; done += 1 + inner) {
    ++out.iterations;
    backup<T>(t, discount, t.v);
    const Change c = change(t, t.v);
    if (!(c.size <= kLargest)) return out.refusal = Refusal::singular, out;
    out.bound = certificate(t, discount, t.v, c.size);
    // below rounding nothing is to be gained
    const double rounding = backup_rounding(t, discount, largest_magnitude(t, t.v));
    if (out.bound <= tol || c.size <= rounding || done >= kMostSweeps) return out;
    const double least = 2 * rounding / (1 - kappa);
    const double predicted = kappa * kappa * (c.high - c.low) / 2 / (1 - kappa) + least / 2;
    if (predicted <= limit && predicted <= (tol > least ? tol : least)) {
      limit = predicted / 2;
      const double shift = kappa / (1 - kappa) * (c.high + c.low) / 2, before = out.bound;
      for (int64_t s = 0; s < t.ns; ++s) t.rhs[s] = t.next[s], t.v[s] = moves(t, s) ? t.next[s] + shift : t.next[s];
      ++out.iterations;
      backup<T>(t, discount, t.v);
      out.bound = certificate(t, discount, t.v, change(t, t.v).size);
      if (out.bound <= tol) return out;
      const double* better = out.bound < before ? t.next : t.rhs;
      for (int64_t s = 0; s < t.ns; ++s) t.v[s] = better[s];
      continue;
    }
    for (int64_t s = 0; s < t.ns; ++s) t.v[s] = t.next[s];
    if (inner)
      for (int64_t s = 0; s < t.ns; ++s) t.policy[s] = greedy(t.q + s * t.na, t.na);
    for (int64_t x = 0; x < inner; ++x) policy_sweep<T>(t, discount);
  }
}

template <class T>
PlanResult solve(Task& t, double discount, Method method, double tol, const int64_t* policy) {
  if (method == Method::policy_iteration) {
    if (policy[0] < 0)
      first_policy<T>(t, discount);
    else
      __builtin_memcpy(t.policy, policy, t.ns * sizeof(int64_t));
    return policy_iteration<T>(t, discount);
  }
  return sweeps<T>(t, discount, tol, method == Method::value_iteration ? 0 : kInnerSweeps);
}

}  // namespace

int64_t vi_bytes(int64_t ns, int64_t na) {
  Task t;
  return layout(t, nullptr, ns, na);
}

PlanResult vi_pack(const TaskTables& in, void* scratch) {
  Task& t = *static_cast<Task*>(scratch);
  layout(t, static_cast<char*>(scratch), in.num_states, in.num_actions);
  t.is_double = in.is_double;
  if (in.offset) return in.is_double ? pack<double, WindowRows<double>>(t, in) : pack<float, WindowRows<float>>(t, in);
  return in.is_double ? pack<double, DenseRows<double>>(t, in) : pack<float, DenseRows<float>>(t, in);
}

PlanResult vi_plan(double discount, Method method, double tol, int64_t* policy, double* q, double* v, void* scratch) {
  Task& t = *static_cast<Task*>(scratch);
  const PlanResult out =
      t.is_double ? solve<double>(t, discount, method, tol, policy) : solve<float>(t, discount, method, tol, policy);
  if (out.refusal != Refusal::none) return out;
  __builtin_memcpy(q, t.q, t.ns * t.na * sizeof(double));
  for (int64_t s = 0; s < t.ns; ++s) v[s] = t.next[s], policy[s] = greedy(t.q + s * t.na, t.na);
  return out;
}

void vi_find(const void* table, bool is_double, int64_t rows, int64_t ns, int32_t* first, int32_t* length) {
  is_double ? find_windows(static_cast<const double*>(table), rows, ns, first, length)
            : find_windows(static_cast<const float*>(table), rows, ns, first, length);
}

}  // namespace icrl::ICRL_ISA
