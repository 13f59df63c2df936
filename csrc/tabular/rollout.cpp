// Batched tabular simulation: see icrl_kernels/tabular/rollout.py for the semantics, the shapes and the order of the
// tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/isa.h"
#include "common/parallel.h"
#include "tabular/rollout_binding.h"
#include "tabular/rollout_core.h"

namespace icrl {

std::string describe(const RolloutCall& c, const RolloutFault& f) {
  const RolloutTables& tb = c.tables;
  const auto text = [](int64_t x) { return std::to_string(x); };
  const auto place = [&](int64_t last, int64_t size) {  // of a flat index in [N, size, last]
    return "[" + text(f.at / last / size) + ", " + text(f.at / last % size) + ", " + text(f.at % last) + "]";
  };
  const std::string r = text(f.record);
  const int64_t n = c.state.task[f.record];
  switch (f.kind) {
    case RolloutFault::task: return "task_index[" + r + "] is " + text(n) + ", but there are " + text(tb.N) + " tasks";
    case RolloutFault::num_states:
      return "num_states[" + text(n) + "] is " + text(tb.num_states[n]) + ": wanted 1 to " + text(tb.S);
    case RolloutFault::num_actions:
      return "num_actions[" + text(n) + "] is " + text(tb.num_actions[n]) + ": wanted 1 to " + text(tb.A);
    case RolloutFault::max_steps:
      return "max_steps[" + text(n) + "] is " + text(tb.max_steps[n]) + ": wanted at least 1";
    case RolloutFault::step:
      return "state.step[" + r + "] is " + text(c.state.step[f.record]) +
             ": wanted 0 to 2**56 less the steps of this call";
    case RolloutFault::state:
      return "state.state[" + r + "] is " + text(c.state.state[f.record]) + ": wanted a state of task " + text(n) +
             " that is not terminal, or -1";
    case RolloutFault::elapsed:
      return "state.elapsed[" + r + "] is " + text(c.state.elapsed[f.record]) + ": wanted 0 to 2**56";
    case RolloutFault::behaviour:
      return "state.behaviour[" + r + "] is " + text(c.state.behaviour[f.record]) + ": wanted -1 to " + text(c.P + 3) +
             ", and no learner without a weight in the behaviours";
    case RolloutFault::q_learning:
      return "state: record " + r + " was started without q_learning, which the behaviours use";
    case RolloutFault::model_based:
      return "state: record " + r + " was started without model_based, which the behaviours use";
    case RolloutFault::span:
      return "state.span of record " + r + " holds " + text(c.state.span[f.at]) + ": wanted next states within " +
             text(tb.S) + " states";
    case RolloutFault::action:
      return "action of record " + r + " is " + text(c.actions[f.at]) + ", but its task has " +
             text(tb.num_actions[n]) + " actions";
    case RolloutFault::choice:
      return "policies" + place(tb.S, c.P) + ": wanted one of the task's own actions, got " + text(c.choices[f.at]);
    case RolloutFault::policy:
      return "policies" + place(tb.S, c.P) + ": wanted thresholds that end above 1 at the task's last action";
    case RolloutFault::row:
      if (tb.window[2 * f.at + 1] == 0)
        return (c.actions ? "action" : "window, policies") + std::string(" of record ") + r + ": state " +
               text(f.at / tb.A % tb.S) + " of task " + text(n) + " does not have action " + text(f.at % tb.A);
      return "window, offset" + place(tb.A, tb.S) + ": wanted next states within the task's " + text(tb.num_states[n]) +
             " and " + text(tb.M) + " thresholds, got first " + text(tb.window[2 * f.at]) + ", length " +
             text(tb.window[2 * f.at + 1]) + ", offset " + text(tb.offset[f.at]);
    case RolloutFault::thresholds:
      return "cumulative of row " + place(tb.A, tb.S) + ": wanted thresholds that end above 1";
    case RolloutFault::start:
      return "start[" + text(n) + "]: wanted thresholds that end above 1 at the task's last state";
    case RolloutFault::none: break;
  }
  return "no fault";
}

namespace {

constexpr double kStepNanoseconds = 50;  // about what a step takes one thread

[[noreturn]] void refuse(const RolloutCall& c, const RolloutFault& f) { throw std::invalid_argument(describe(c, f)); }

// Before anything is changed: what each record says of itself, and all actions.
void check(const RolloutCall& c) {
  for (int64_t r = 0; r < c.R; ++r) {
    const RolloutFault fault = first_fault(c, r);
    if (fault.kind) refuse(c, fault);
    const int64_t na = c.tables.num_actions[c.state.task[r]];
    for (int64_t i = r * c.T; c.actions && i < (r + 1) * c.T; ++i)
      if (c.actions[i] < 0 || c.actions[i] >= na) refuse(c, {RolloutFault::action, r, i});
    if (c.actions && c.T && c.state.state[r] >= 0) {  // of later steps, the state is not known yet
      const int64_t row = (c.state.task[r] * c.tables.S + c.state.state[r]) * c.tables.A + c.actions[r * c.T];
      if (c.tables.window[2 * row + 1] == 0) refuse(c, {RolloutFault::row, r, row});
    }
  }
}

float* thread_scratch(int64_t floats) {
  static thread_local std::vector<float> scratch;
  if (static_cast<int64_t>(scratch.size()) < floats) scratch.resize(static_cast<size_t>(floats));
  return scratch.data();
}

enum Way {
  kFast,
  kPlain,
  kSpoil
};  // plain: the GPU's code on the CPU, record by record. spoil: the same without refusals

void rollout(const Pointers& tables, uintptr_t probabilities, uintptr_t choices, uintptr_t references,
             const Pointers& behaviours, uintptr_t actions, const Pointers& state, const Pointers& out, int64_t N,
             int64_t S, int64_t A, int64_t M, int64_t P, int64_t G, int64_t R, int64_t T, int way, int threads) {
  const RolloutCall c =
      rollout_call(tables, probabilities, choices, references, behaviours, actions, state, out, N, S, A, M, P, G, R, T);
  if (way == kSpoil) {
    float* scratch = thread_scratch(Record<PlainOps>::scratch_floats(c));
    for (int64_t r = 0; r < R; ++r) simulate_or_spoil(c, r, scratch);
    return;
  }
  check(c);
  RolloutFault first;  // of the lowest record
  std::mutex mutex;
  const auto note = [&](const RolloutFault& fault) {
    if (!fault.kind) return;
    const std::lock_guard<std::mutex> lock(mutex);
    if (!first.kind || fault.record < first.record) first = fault;
  };
  const auto one_by_one = [&](int64_t from, int64_t to, float* scratch) {
    RolloutFault fault;
    for (int64_t r = from; r < to && !fault.kind; ++r) fault = simulate_plain(c, r, scratch);
    note(fault);
  };
  const int64_t plain_floats = Record<PlainOps>::scratch_floats(c);
  threads = team_for(kStepNanoseconds * static_cast<double>(R * T), threads);
  // records in step with one another hide each other's waits
  const int64_t together = std::max<int64_t>(1, std::min<int64_t>(8, R / (2 * threads)));
  const int64_t block = std::max<int64_t>(together, 1024 / std::max<int64_t>(T, 1));
  if (way == kPlain) {
    one_by_one(0, R, thread_scratch(plain_floats));
  } else if (c.actions && T < 8) {  // numbers of 32 steps at once would be drawn in vain
    parallel_for((R + block - 1) / block, threads,
                 [&](int64_t i) { one_by_one(i * block, std::min(R, (i + 1) * block), thread_scratch(plain_floats)); });
  } else {
    const int64_t floats = ICRL_DISPATCH(rollout_scratch, c);
    parallel_for((R + block - 1) / block, threads, [&](int64_t i) {
      note(ICRL_DISPATCH(rollout_records, c, i * block, std::min(R, (i + 1) * block), thread_scratch(floats)));
    });
  }
  if (first.kind) refuse(c, first);
}

}  // namespace

void bind_rollout(pybind11::module_& m) {
  m.def("rollout", &rollout, pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace icrl
