// Batched tabular control on the CPU: dispatch, threads over tasks, discounts of a task in ascending order.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <vector>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/policy_iteration.h"
#include "cuda/value_iteration_core.h"

namespace icrl {

#define ICRL_DECLARE                                                                                             \
  int64_t vi_bytes(int64_t, int64_t);                                                                            \
  PlanResult vi_pack(const TaskTables&, void*);                                                                  \
  PlanResult vi_plan(double, Method, double, int64_t*, double*, double*, void*);
namespace generic { ICRL_DECLARE }
namespace avx2 { ICRL_DECLARE }
namespace avx512 { ICRL_DECLARE }
#undef ICRL_DECLARE

int64_t planner_bytes(int64_t num_states, int64_t num_actions) { return ICRL_DISPATCH(vi_bytes, num_states, num_actions); }
PlanResult plan_pack(const TaskTables& tables, void* scratch) { return ICRL_DISPATCH(vi_pack, tables, scratch); }
PlanResult plan(double discount, Method method, double tol, int64_t* policy, double* q, double* v, void* scratch) {
  return ICRL_DISPATCH(vi_plan, discount, method, tol, policy, q, v, scratch);
}

namespace {

// A thread's scratch, kept for its life: tasks are many and small.
struct Scratch {
  std::unique_ptr<char[]> bytes;
  int64_t size = 0;
  void* get(int64_t n) {
    if (n > size) bytes.reset(new char[n + 64]), size = n;
    return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(bytes.get()) + 63) / 64 * 64);
  }
};

// transition [N,S,A,S]; reward [N,S,A] or [N,S,A,S]; discount [N,G]; outputs q [N,G,S,A], v, policy [N,G,S],
// bound, iterations [N,G]; refusal [N,3] = kind, row, discount index, where kind 0 is none.
void solve(uintptr_t transition, uintptr_t reward, bool is_double, bool by_successor, uintptr_t terminal,
           uintptr_t num_states, uintptr_t discount, int64_t n, int64_t ng, int64_t ns, int64_t na, int method, double tol,
           uintptr_t q, uintptr_t v, uintptr_t policy, uintptr_t bound, uintptr_t iterations, uintptr_t refusal,
           int threads) {
  const int64_t element = is_double ? 8 : 4, need = planner_bytes(ns, na);
  parallel_for(n, threads, [&](int64_t i) {
    thread_local Scratch scratch;
    thread_local std::vector<int64_t> order, warm;
    void* work = scratch.get(need);
    const int64_t states = num_states ? reinterpret_cast<const int64_t*>(num_states)[i] : ns;
    TaskTables t;
    t.transition = reinterpret_cast<const char*>(transition) + i * ns * na * ns * element;
    t.reward = reinterpret_cast<const char*>(reward) + i * ns * na * (by_successor ? ns : 1) * element;
    t.terminal = terminal ? reinterpret_cast<const uint8_t*>(terminal) + i * ns : nullptr;
    t.num_states = states, t.num_actions = na, t.stride = ns;
    t.is_double = is_double, t.reward_by_successor = by_successor;
    int64_t* refused = reinterpret_cast<int64_t*>(refusal) + i * 3;
    refused[0] = refused[1] = refused[2] = 0;
    PlanResult packed = plan_pack(t, work);
    if (packed.refusal != Refusal::none) {
      refused[0] = static_cast<int64_t>(packed.refusal), refused[1] = packed.row;
      return;
    }
    const double* gamma = reinterpret_cast<const double*>(discount) + i * ng;
    order.resize(ng), warm.resize(ns);
    std::iota(order.begin(), order.end(), int64_t{0});
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return gamma[a] < gamma[b]; });
    warm[0] = -1;
    for (int64_t g : order) {
      const int64_t at = i * ng + g;
      double* q_out = reinterpret_cast<double*>(q) + at * ns * na;
      double* v_out = reinterpret_cast<double*>(v) + at * ns;
      int64_t* policy_out = reinterpret_cast<int64_t*>(policy) + at * ns;
      const PlanResult r = plan(gamma[g], static_cast<Method>(method), tol, warm.data(), q_out, v_out, work);
      if (r.refusal != Refusal::none) {
        refused[0] = static_cast<int64_t>(r.refusal), refused[1] = r.row, refused[2] = g;
        return;
      }
      std::fill(q_out + states * na, q_out + ns * na, 0.0);
      std::fill(v_out + states, v_out + ns, 0.0);
      std::copy(warm.begin(), warm.begin() + states, policy_out);
      std::fill(policy_out + states, policy_out + ns, 0);
      reinterpret_cast<double*>(bound)[at] = r.bound;
      reinterpret_cast<int64_t*>(iterations)[at] = r.iterations;
    }
  });
}

// The GPU's algorithm on one CPU thread: tests compare it where there is no GPU.
void solve_core(uintptr_t transition, uintptr_t reward, bool is_double, bool by_successor, uintptr_t terminal,
                uintptr_t num_states, uintptr_t discount, uintptr_t order, int64_t n, int64_t ng, int64_t ns, int64_t na,
                int method, double tol, uintptr_t q, uintptr_t v, uintptr_t policy, uintptr_t bound,
                uintptr_t iterations, uintptr_t refusal) {
  const CoreBatch b = core_batch(transition, reward, by_successor, terminal, num_states, discount, order, n, ng, ns, na,
                                 method, tol, q, v, policy, bound, iterations, refusal);
  CoreSpace w;
  std::vector<double> space(core_layout(w, nullptr, ns, na) / sizeof(double) + 1);
  SerialTeam team;
  for (int64_t i = 0; i < n; ++i) {
    char* at = reinterpret_cast<char*>(space.data());
    is_double ? core_solve<double>(team, b, i, at) : core_solve<float>(team, b, i, at);
  }
}

}  // namespace

void bind_value_iteration(pybind11::module_& m) {
  m.def("value_iteration_cpu", &solve, pybind11::call_guard<pybind11::gil_scoped_release>());
  m.def("value_iteration_cuda_host_check", &solve_core, pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace icrl
