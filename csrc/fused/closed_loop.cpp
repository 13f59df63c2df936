// An agent's step and a simulator's, one after the other, without Python between them: a program that acts (of
// icrl_kernels.fused) in tabular tasks, one record a context. The same numbers as step by step.
//
//   B, T       contexts and steps;  S, A: states and actions of the tables
//   n, s       a record's task and state
//   ids        [N, S] int64: what is observed in a state
//   open       [N, S, M] bytes: the actions, of the program's M, that a state has; null: all of the task's
//   noise      [T, B, M] float32;  temperature: [T] float32
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/parallel.h"
#include "fused/fused_program.h"
#include "tabular/rollout_binding.h"
#include "tabular/rollout_core.h"

namespace icrl {
namespace {

namespace py = pybind11;

// What an acting program is given with each call, in its order (icrl_kernels/fused/acting.py).
enum Given {
  kObservation,
  kReward,
  kDone,
  kTag,
  kNoise,
  kTemperature,
  kMask,
  kTaskAction,
  kLogits,
  kPrevious,
  kAction,
  kKept,
  kChosen,
  kGiven
};

std::string text(float x) {
  char out[32];
  std::snprintf(out, sizeof out, "%g", static_cast<double>(x));
  return out;
}

struct Trajectory {  // [B, T] each, rows `stride` apart
  int64_t *state, *observation, *action;
  float* reward;
  uint8_t* done;
  int64_t stride;
};

struct Loop {
  const FusedProgram& program;
  const RolloutCall& simulator;  // of one step: R = B, T = 1
  const int64_t* ids;
  const uint8_t* open;
  const float *noise, *temperature;
  float most_reward;
  Trajectory out;
  int64_t T, M;
  std::mutex mutex;
  std::string wrong;  // what the lowest context met
  int64_t wrong_context = -1;

  void refuse(int64_t context, const std::string& what) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (wrong_context < 0 || context < wrong_context) wrong = what, wrong_context = context;
  }

  // All steps of group i. `addresses` are those of the first step.
  void run(int64_t i) {
    std::vector<void*> addresses = program.addresses();
    FusedPlan plan = program.plan();
    plan.addresses = addresses.data();
    const FusedGroup group = program.group(i, plan, program.scratch());
    const auto& slots = program.of_a_call();
    const auto at = [&](Given what) -> void*& { return addresses[static_cast<size_t>(slots[what])]; };
    auto *observation = static_cast<int64_t*>(at(kObservation)), *action = static_cast<int64_t*>(at(kTaskAction));
    auto* mask = static_cast<uint8_t*>(at(kMask));
    const int64_t B = program.batch(), S = simulator.tables.S, first = group.first, end = first + group.contexts;
    for (int64_t t = 0; t < T; ++t) {
      at(kNoise) = const_cast<float*>(noise + t * B * M), at(kTemperature) = const_cast<float*>(temperature + t);
      for (int64_t b = first; b < end; ++b) {
        const int64_t row = simulator.state.task[b] * S + simulator.state.state[b], o = b * out.stride + t;
        out.state[o] = simulator.state.state[b], out.observation[o] = observation[b] = ids[row];
        if (open) std::memcpy(mask + b * M, open + row * M, static_cast<size_t>(M));
      }
      try {
        program.judge_indices(plan, first, group.contexts);
      } catch (const std::invalid_argument& error) {
        return refuse(first, error.what());
      }
      program.run_group(group);
      for (int64_t b = first; b < end; ++b) {
        const RolloutFault fault = simulate_plain(simulator, b, nullptr);
        if (fault.kind) return refuse(b, describe(simulator, fault));
        const float reward = simulator.out.reward[b];
        if (!(std::fabs(reward) <= most_reward))
          return refuse(
              b, "reward: wanted finite numbers of at most " + text(most_reward) + " in size, got " + text(reward));
        const int64_t o = b * out.stride + t;
        out.action[o] = action[b], out.reward[o] = reward, out.done[o] = simulator.out.done[b];
      }
      std::swap(at(kPrevious), at(kKept)), std::swap(at(kAction), at(kChosen));
    }
  }
};

// given: addresses, or numbers, of the program's tensors of a call, for the first step. Its reward, end and task action
// are the simulator's outputs and inputs too: what they hold afterwards is the last step's.
void closed_loop(FusedProgram& program, const std::vector<py::object>& given, const Pointers& tables,
                 const Pointers& state, int64_t N, int64_t S, int64_t A, int64_t entries, const Pointers& trajectory,
                 int64_t stride, uintptr_t next_state, uintptr_t ids, uintptr_t open, uintptr_t noise,
                 uintptr_t temperature, float most_reward, int64_t T, int64_t M, int threads) {
  const int64_t bytes[kGiven] = {8, 4, 1, 0, 4 * M, 0, M, 8, 4 * M, 8, 8, 8, 8};
  const auto& slots = program.of_a_call();
  bool acts = given.size() == kGiven && slots.size() == kGiven && trajectory.size() == 5;
  for (size_t i = 0; acts && i < kGiven; ++i) acts = program.bytes(slots[i]) == bytes[i];
  if (!acts) throw std::invalid_argument("step: wanted one that acts, of " + std::to_string(M) + " actions");
  for (size_t i = 0; i < kGiven; ++i) {
    if (i == kNoise)
      program.bind(slots[i], noise);
    else if (program.is_number(slots[i]))
      program.set(slots[i], given[i].cast<float>());
    else
      program.bind(slots[i], given[i].cast<uintptr_t>());
  }
  const py::gil_scoped_release free_gil;
  program.require_bound();
  const auto address = [&](Given what) {
    return reinterpret_cast<uintptr_t>(program.addresses()[static_cast<size_t>(slots[what])]);
  };
  const Pointers outcome{0, 0, address(kReward), address(kDone), 0, next_state, 0};
  const RolloutCall simulator = rollout_call(tables, 0, 0, 0, {}, address(kTaskAction), state, outcome, N, S, A,
                                             entries, 0, 0, program.batch(), 1);
  for (int64_t b = 0; b < program.batch(); ++b) {
    const RolloutFault fault = first_fault(simulator, b);
    if (fault.kind) throw std::invalid_argument(describe(simulator, fault));
    if (simulator.state.state[b] < 0)
      throw std::invalid_argument("state.state[" + std::to_string(b) + "]: wanted a state to act in, got -1");
  }
  const auto ints = [&](size_t i) { return reinterpret_cast<int64_t*>(trajectory[i]); };
  const Trajectory out{
      ints(0), ints(1), ints(2), reinterpret_cast<float*>(trajectory[3]), reinterpret_cast<uint8_t*>(trajectory[4]),
      stride};
  Loop loop{program,
            simulator,
            reinterpret_cast<const int64_t*>(ids),
            reinterpret_cast<const uint8_t*>(open),
            reinterpret_cast<const float*>(noise),
            reinterpret_cast<const float*>(temperature),
            most_reward,
            out,
            T,
            M,
            {},
            {}};
  parallel_for(program.groups(), program.team(threads, T), [&](int64_t i) { loop.run(i); });
  if (loop.wrong_context >= 0) throw std::invalid_argument(loop.wrong);
}

}  // namespace

void bind_closed_loop(py::module_& m) { m.def("closed_loop", &closed_loop); }

}  // namespace icrl
