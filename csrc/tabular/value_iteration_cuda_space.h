// What a batch of tabular tasks is to the GPU planner, and the memory that a team of threads needs for one task.
//
//   n, ng, ns, na        tasks, discounts, states and actions of the batch
//   transition, reward   dense [n, ns, na, ns], [n, ns, na] or as transition, float or double; packed: `values` numbers
//   offset, first, length   [n, ns, na] int64, int32, int32: of packed tables, else null
//   terminal, num_states    [n, ns] uint8 and [n] int64, or null
//   discount, order         [n, ng] double, int64: `order` sorts a task's discounts ascending
//   q, v, policy            [n, ng, ns, na] double, [n, ng, ns] double, [n, ng, ns] int64
//   bound, iterations       [n, ng] double, int64;  refusal [n, 3] int64: kind, row, discount's index
//   padded, panels          ns rounded up to kPanel = 4; padded / kPanel
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define ICRL_HD __host__ __device__
#define ICRL_UNROLL _Pragma("unroll")
#else
#define ICRL_HD
#define ICRL_UNROLL
#endif

namespace icrl {

// indices are 16 bits wide, places in the factors 32
constexpr int64_t kMostStates = 32768;
constexpr int kLanes = 8;  // threads of a group, which take one row together: 8 floats are a 32-byte sector
constexpr int kWarp = 32;  // threads of the warp that runs ahead
constexpr int kPanel = 4;  // states that are eliminated together

// A batch as Python hands it over: TaskTables' fields, outputs as in value_iteration.cpp; `order` [N,G] sorts a task's
// discounts ascending.
struct CoreBatch {
  const void *transition, *reward;
  const int64_t* offset;
  const int32_t *first, *length;
  int64_t values;
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

// Addresses as Python has them; 0 is none.
inline CoreBatch core_batch(uintptr_t transition, uintptr_t reward, bool by_successor, uintptr_t offset,
                            uintptr_t first, uintptr_t length, int64_t values, uintptr_t terminal, uintptr_t num_states,
                            uintptr_t discount, uintptr_t order, int64_t n, int64_t ng, int64_t ns, int64_t na,
                            int method, double tol, uintptr_t q, uintptr_t v, uintptr_t policy, uintptr_t bound,
                            uintptr_t iterations, uintptr_t refusal) {
  const auto doubles = [](uintptr_t p) { return reinterpret_cast<double*>(p); };
  const auto integers = [](uintptr_t p) { return reinterpret_cast<int64_t*>(p); };
  return {reinterpret_cast<const void*>(transition),
          reinterpret_cast<const void*>(reward),
          integers(offset),
          reinterpret_cast<const int32_t*>(first),
          reinterpret_cast<const int32_t*>(length),
          values,
          reinterpret_cast<const uint8_t*>(terminal),
          integers(num_states),
          doubles(discount),
          integers(order),
          n,
          ng,
          ns,
          na,
          by_successor,
          method,
          tol,
          doubles(q),
          doubles(v),
          integers(policy),
          doubles(bound),
          integers(iterations),
          integers(refusal)};
}

// A team's memory. `reward` and `magnitude` are touched once a sweep and in order: they may be slow. The rest is
// `fixed`; windows and factors share what is left of the fast memory, `room` bytes from `pool` on.
struct CoreSpace {
  double *reward, *magnitude;  // [ns * na] expected rewards, and sums of |transition * reward|
  double *v, *rhs;             // [padded]; rhs holds the next v after a backup
  int32_t *origin, *base, *total, *shared;
  uint16_t *low, *length, *policy, *best, *left, *right, *below, *above;
  uint8_t *reached, *reached_next;
  char* pool;
  int64_t room;
};

// The larger of two; a NaN stays one.
ICRL_HD inline double core_larger(double x, double y) { return x >= y || x != x ? x : y; }

ICRL_HD inline int64_t core_padded(int64_t ns) { return (ns + kPanel - 1) / kPanel * kPanel; }

// Carves `fixed` and `slow`; returns bytes of `fixed`.
ICRL_HD inline int64_t core_layout(CoreSpace& w, char* fixed, char* slow, int64_t ns, int64_t na) {
  const int64_t rows = ns * na, padded = core_padded(ns), panels = padded / kPanel;
  w.reward = reinterpret_cast<double*>(slow), w.magnitude = w.reward + rows;
  double* d = reinterpret_cast<double*>(fixed);
  w.v = d, d += padded;
  w.rhs = d, d += padded;
  int32_t* i = reinterpret_cast<int32_t*>(d);
  w.origin = i, i += padded;  // a row's column j is at factors[origin + j]
  w.base = i, i += ns;        // where a state's windows begin
  w.total = i, i += panels;   // entries of a panel's rows
  w.shared = i, i += 4;       // windows' entries taken, no fit, bad pivot
  uint16_t* u = reinterpret_cast<uint16_t*>(i);
  w.low = u, u += rows;
  w.length = u, u += rows;
  w.policy = u, u += ns;
  w.best = u, u += ns;
  w.left = u, u += padded;   // first column of a row of the factors
  w.right = u, u += panels;  // the column after the last of a panel's rows
  w.below = u, u += panels;  // the last panel that holds one of this panel's columns
  w.above = u, u += panels;  // the first
  uint8_t* b = reinterpret_cast<uint8_t*>(u);
  w.reached = b, b += ns;
  w.reached_next = b, b += ns;
  return (reinterpret_cast<char*>(b) - fixed + 15) / 16 * 16;
}

ICRL_HD inline int64_t core_slow_bytes(int64_t ns, int64_t na) {
  return ns * na * 2 * static_cast<int64_t>(sizeof(double));
}

// Bytes that no task of this size goes beyond: `windows` entries of the table (0 where it is not resident), full
// factors.
template <class T>
int64_t core_bytes_at_most(int64_t ns, int64_t na, int64_t windows) {
  CoreSpace w;
  const int64_t padded = core_padded(ns);
  const int64_t table = (windows * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
  return core_layout(w, nullptr, nullptr, ns, na) + table + padded * padded * static_cast<int64_t>(sizeof(double));
}

}  // namespace icrl
