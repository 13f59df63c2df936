// Batched tabular control on the CPU: dispatch, threads over tasks, discounts of a task in ascending order.
#include <pybind11/pybind11.h>
#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include "common/isa.h"
#include "common/parallel.h"
#include "tabular/policy_iteration.h"
#include "tabular/value_iteration_lanes.h"

namespace icrl {

// defined in value_iteration.inl and value_iteration_lanes.inl
#define ICRL_VALUE_ITERATION_ENTRIES                                                                          \
  int64_t vi_bytes(int64_t ns, int64_t na);                                                                   \
  PlanResult vi_pack(const TaskTables& in, void* scratch);                                                    \
  PlanResult vi_plan(double discount, Method method, double tol, int64_t* policy, double* q, double* v,       \
                     void* scratch);                                                                          \
  void vi_find(const void* table, bool is_double, int64_t rows, int64_t ns, int32_t* first, int32_t* length); \
  int64_t vi_lanes_bytes(int64_t ns, int64_t na, int64_t ng, bool is_double);                                 \
  void vi_lanes(const LaneJobs& jobs, void* scratch);
ICRL_IN_EACH_ISA(ICRL_VALUE_ITERATION_ENTRIES)
#undef ICRL_VALUE_ITERATION_ENTRIES

int64_t planner_bytes(int64_t num_states, int64_t num_actions) {
  return ICRL_DISPATCH(vi_bytes, num_states, num_actions);
}
PlanResult plan_pack(const TaskTables& tables, void* scratch) { return ICRL_DISPATCH(vi_pack, tables, scratch); }
PlanResult plan(double discount, Method method, double tol, int64_t* policy, double* q, double* v, void* scratch) {
  return ICRL_DISPATCH(vi_plan, discount, method, tol, policy, q, v, scratch);
}

namespace {

// Measured: banded tasks of 96 states take 14 % less time side by side, dense ones 12 % more; of 128, 0 % and 17 %.
// Many actions would need too much memory.
constexpr int64_t kMostLaneStates = 96, kMostLaneEntries = 1 << 18;

// A thread's scratch, kept for its life: tasks are many and small.
struct Scratch {
  std::unique_ptr<char[]> bytes;
  int64_t size = 0;
  void* get(int64_t n) {
    if (n > size) bytes.reset(new char[n + 64]), size = n;
    return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(bytes.get()) + 63) / 64 * 64);
  }
};

// A batch as it comes from Python. Dense: transition [N,S,A,S], reward [N,S,A] or [N,S,A,S]. Packed: transition [M],
// reward [N,S,A] or [M], offset, first, length [N,S,A]. terminal [N,S] or null, num_states [N] or null, discount [N,G];
// outputs q [N,G,S,A], v, policy [N,G,S], bound, iterations [N,G]; refusal [N,3] = kind, row, discount index, where
// kind 0 is none.
struct Batch {
  const char *transition, *reward;
  bool is_double, by_successor;
  const int64_t* offset;
  const int32_t *first, *length;
  int64_t values;
  const uint8_t* terminal;
  const int64_t* num_states;
  const double* discount;
  int64_t n, ng, ns, na;
  Method method;
  double tol;
  double *q, *v;
  int64_t* policy;
  double* bound;
  int64_t *iterations, *refusal;
};

TaskTables tables_of(const Batch& b, int64_t i) {
  const int64_t element = b.is_double ? 8 : 4, rows = b.ns * b.na;
  TaskTables t;
  t.transition = b.offset ? b.transition : b.transition + i * rows * b.ns * element;
  t.reward = b.offset && b.by_successor ? b.reward : b.reward + i * rows * (b.by_successor ? b.ns : 1) * element;
  t.terminal = b.terminal ? b.terminal + i * b.ns : nullptr;
  t.num_states = b.num_states ? b.num_states[i] : b.ns, t.num_actions = b.na, t.stride = b.ns;
  t.is_double = b.is_double, t.reward_by_successor = b.by_successor;
  if (b.offset) t.offset = b.offset + i * rows, t.first = b.first + i * rows, t.length = b.length + i * rows;
  t.values = b.values;
  return t;
}

// The bounds count on gradual underflow; a thread may have been told to flush (torch.set_flush_denormal).
class GradualUnderflow {
#if defined(__SSE2__)
  const unsigned before_ = _mm_getcsr();

 public:
  GradualUnderflow() { _mm_setcsr(before_ & ~0x8040u); }
  ~GradualUnderflow() { _mm_setcsr(before_); }
#endif
};

// Solves task i for all its discounts, in ascending order, each from the last one's policy.
void solve_task(const Batch& b, int64_t i, int64_t bytes) {
  const GradualUnderflow guard;
  thread_local Scratch scratch;
  thread_local std::vector<int64_t> order, warm;
  void* work = scratch.get(bytes);
  const TaskTables t = tables_of(b, i);
  const int64_t ng = b.ng, ns = b.ns, na = b.na, states = t.num_states;
  int64_t* refused = b.refusal + i * 3;
  refused[0] = refused[1] = refused[2] = 0;
  const PlanResult packed = plan_pack(t, work);
  if (packed.refusal != Refusal::none) {
    refused[0] = static_cast<int64_t>(packed.refusal), refused[1] = packed.row;
    return;
  }
  const double* gamma = b.discount + i * ng;
  order.resize(ng), warm.resize(ns);
  std::iota(order.begin(), order.end(), int64_t{0});
  std::stable_sort(order.begin(), order.end(), [&](int64_t x, int64_t y) { return gamma[x] < gamma[y]; });
  warm[0] = -1;
  for (int64_t g : order) {
    const int64_t at = i * ng + g;
    double *q = b.q + at * ns * na, *v = b.v + at * ns;
    int64_t* policy = b.policy + at * ns;
    const PlanResult r = plan(gamma[g], b.method, b.tol, warm.data(), q, v, work);
    if (r.refusal != Refusal::none) {
      refused[0] = static_cast<int64_t>(r.refusal), refused[1] = r.row, refused[2] = g;
      return;
    }
    std::fill(q + states * na, q + ns * na, 0.0);
    std::fill(v + states, v + ns, 0.0);
    std::copy(warm.begin(), warm.begin() + states, policy);
    std::fill(policy + states, policy + ns, 0);
    b.bound[at] = r.bound, b.iterations[at] = r.iterations;
  }
}

template <class T>
T* pointer(uintptr_t p) {
  return reinterpret_cast<T*>(p);
}

void solve(uintptr_t transition, uintptr_t reward, bool is_double, bool by_successor, uintptr_t offset, uintptr_t first,
           uintptr_t length, int64_t values, uintptr_t terminal, uintptr_t num_states, uintptr_t discount, int64_t n,
           int64_t ng, int64_t ns, int64_t na, int method, double tol, uintptr_t q, uintptr_t v, uintptr_t policy,
           uintptr_t bound, uintptr_t iterations, uintptr_t refusal, int threads) {
  const Batch b{pointer<char>(transition),
                pointer<char>(reward),
                is_double,
                by_successor,
                pointer<int64_t>(offset),
                pointer<int32_t>(first),
                pointer<int32_t>(length),
                values,
                pointer<uint8_t>(terminal),
                pointer<int64_t>(num_states),
                pointer<double>(discount),
                n,
                ng,
                ns,
                na,
                static_cast<Method>(method),
                tol,
                pointer<double>(q),
                pointer<double>(v),
                pointer<int64_t>(policy),
                pointer<double>(bound),
                pointer<int64_t>(iterations),
                pointer<int64_t>(refusal)};
  const int64_t bytes = planner_bytes(ns, na);
  // Which solver a task gets depends on the task alone, never on the batch: its bits must not.
  std::vector<int64_t> small, large;
  int64_t most_states = 0, next = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t states = b.num_states ? b.num_states[i] : ns;
    const bool fits = states <= kMostLaneStates && na <= kMostLaneEntries / (states * states);
    const bool in_lanes = fits && ng > 0 && b.method == Method::policy_iteration;
    (in_lanes ? small : large).push_back(i);
    if (in_lanes) most_states = std::max(most_states, states);
  }
  std::fill_n(b.refusal, n * 3, int64_t{0});
  const std::pair<const Batch&, int64_t> context{b, bytes};
  using Context = decltype(context);
  const LaneJobs jobs{small.data(),
                      static_cast<int64_t>(small.size()),
                      &next,
                      most_states,
                      ns,
                      na,
                      ng,
                      is_double,
                      b.discount,
                      b.q,
                      b.v,
                      b.bound,
                      b.policy,
                      b.iterations,
                      &context,
                      [](const void* c, int64_t i) { return tables_of(static_cast<Context*>(c)->first, i); },
                      [](const void* c, int64_t i) {
                        solve_task(static_cast<Context*>(c)->first, i, static_cast<Context*>(c)->second);
                      }};
  // about 5 nanoseconds for each entry of a table and each discount
  const double task = 5.0 * static_cast<double>(ns * ns * na * ng);
  int team = team_for(task * static_cast<double>(small.size()), threads);
  parallel_for(team, team, [&](int64_t) {
    const GradualUnderflow guard;
    thread_local Scratch scratch;
    const int64_t need = ICRL_DISPATCH(vi_lanes_bytes, most_states, na, ng, is_double);
    ICRL_DISPATCH(vi_lanes, jobs, scratch.get(need));
  });
  team = team_for(task * static_cast<double>(large.size()), threads);
  parallel_for(static_cast<int64_t>(large.size()), team, [&](int64_t i) { solve_task(b, large[i], bytes); });
}

// For pack_transition: the windows of `rows` rows of ns entries, and what lies in them, one row behind the other.
constexpr int64_t kRowsAtOnce = 512;
constexpr double kEntryNanoseconds = 0.2;

void find_windows(uintptr_t table, bool is_double, int64_t rows, int64_t ns, uintptr_t first, uintptr_t length,
                  int threads) {
  threads = team_for(kEntryNanoseconds * static_cast<double>(rows * ns), threads);
  parallel_for((rows + kRowsAtOnce - 1) / kRowsAtOnce, threads, [&](int64_t i) {
    const int64_t k = i * kRowsAtOnce, count = std::min(kRowsAtOnce, rows - k);
    const char* from = pointer<char>(table) + k * ns * (is_double ? 8 : 4);
    ICRL_DISPATCH(vi_find, from, is_double, count, ns, pointer<int32_t>(first) + k, pointer<int32_t>(length) + k);
  });
}

void copy_windows(uintptr_t table, bool is_double, int64_t rows, int64_t ns, uintptr_t offset, uintptr_t first,
                  uintptr_t length, uintptr_t out, int threads) {
  const int64_t element = is_double ? 8 : 4;
  threads = team_for(kEntryNanoseconds * static_cast<double>(rows * ns), threads);
  parallel_for((rows + kRowsAtOnce - 1) / kRowsAtOnce, threads, [&](int64_t i) {
    for (int64_t k = i * kRowsAtOnce; k < std::min(rows, (i + 1) * kRowsAtOnce); ++k)
      std::memcpy(pointer<char>(out) + pointer<int64_t>(offset)[k] * element,
                  pointer<char>(table) + (k * ns + pointer<int32_t>(first)[k]) * element,
                  pointer<int32_t>(length)[k] * element);
  });
}

}  // namespace

void bind_value_iteration(pybind11::module_& m) {
  m.def("value_iteration_cpu", &solve, pybind11::call_guard<pybind11::gil_scoped_release>());
  m.def("find_windows", &find_windows, pybind11::call_guard<pybind11::gil_scoped_release>());
  m.def("copy_windows", &copy_windows, pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace icrl
