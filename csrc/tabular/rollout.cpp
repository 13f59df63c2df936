// Batched tabular simulation: see icrl_kernels/rollout.py for the semantics, the shapes and the order of the tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/isa.h"
#include "common/parallel.h"
#include "tabular/rollout_binding.h"
#include "tabular/rollout_core.h"

namespace icrl {

namespace {

std::string text(int64_t x) { return std::to_string(x); }

bool uses_model(const RolloutCall& c, int64_t r) {
  const int64_t at = r * (c.P + 4) + c.P + 3;
  return c.behaviours.initial[at] > 0 || c.behaviours.later[at] > 0;
}

void check(const RolloutCall& c) {
  const RolloutTables& tb = c.tables;
  for (int64_t r = 0; r < c.R; ++r) {
    const int64_t n = c.state.task[r], s = c.state.state[r], who = c.state.behaviour[r];
    if (n < 0 || n >= tb.N)
      throw std::invalid_argument("task_index[" + text(r) + "] is " + text(n) + ", but there are " + text(tb.N) +
                                  " tasks");
    if (s < -1 || s >= tb.num_states[n] || (s >= 0 && tb.terminal[n * tb.S + s]))
      throw std::invalid_argument("state.state[" + text(r) + "] is " + text(s) + ": wanted a state of task " + text(n) +
                                  " that is not terminal, or -1");
    if (who < -1 || (c.behaviours.initial && who >= c.P + 4))
      throw std::invalid_argument("state.behaviour[" + text(r) + "] is " + text(who) + ": wanted -1 to " +
                                  text(c.P + 3));
    if (c.behaviours.initial && uses_model(c, r))
      for (int64_t i = r * tb.S * 2; i < (r + 1) * tb.S * 2; ++i)
        if (c.state.span[i] < 0 || c.state.span[i] > tb.S)
          throw std::invalid_argument("state.span of record " + text(r) + " holds " + text(c.state.span[i]) +
                                      ": wanted next states within " + text(tb.S) + " states");
    for (int64_t t = 0; c.actions && t < c.T; ++t)
      if (const int64_t a = c.actions[r * c.T + t]; a < 0 || a >= tb.num_actions[n])
        throw std::invalid_argument("action of record " + text(r) + " is " + text(a) + ", but its task has " +
                                    text(tb.num_actions[n]) + " actions");
  }
}

float* thread_scratch(int64_t floats) {
  static thread_local std::vector<float> scratch;
  if (static_cast<int64_t>(scratch.size()) < floats) scratch.resize(static_cast<size_t>(floats));
  return scratch.data();
}

// `plain`: the GPU's code on the CPU, record by record.
void rollout(const Pointers& tables, uintptr_t probabilities, uintptr_t choices, uintptr_t references,
             const Pointers& behaviours, uintptr_t actions, const Pointers& state, const Pointers& out, int64_t N,
             int64_t S, int64_t A, int64_t P, int64_t G, int64_t R, int64_t T, bool plain, int threads) {
  const RolloutCall c =
      rollout_call(tables, probabilities, choices, references, behaviours, actions, state, out, N, S, A, P, G, R, T);
  check(c);
  if (plain) {
    float* scratch = thread_scratch(Record<PlainOps>::scratch_floats(c));
    for (int64_t r = 0; r < R; ++r) simulate_plain(c, r, scratch);
    return;
  }
  // waking a thread costs ~100 steps; records in step with one another hide each other's waits
  const int64_t together = std::max<int64_t>(1, std::min<int64_t>(8, R / (2 * std::max(1, threads))));
  const int64_t block = std::max<int64_t>(together, 1024 / std::max<int64_t>(T, 1));
  if (c.actions && T < 8) {  // numbers of 32 steps at once would be drawn in vain
    const int64_t plain_floats = Record<PlainOps>::scratch_floats(c);
    parallel_for((R + block - 1) / block, threads, [&](int64_t i) {
      float* scratch = thread_scratch(plain_floats);
      for (int64_t r = i * block; r < std::min(R, (i + 1) * block); ++r) simulate_plain(c, r, scratch);
    });
    return;
  }
  const int64_t floats = ICRL_DISPATCH(rollout_scratch, c);
  parallel_for((R + block - 1) / block, threads, [&](int64_t i) {
    ICRL_DISPATCH(rollout_records, c, i * block, std::min(R, (i + 1) * block), thread_scratch(floats));
  });
}

}  // namespace

void bind_rollout(pybind11::module_& m) {
  m.def("rollout", &rollout, pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace icrl
