#include "cpu/anymdp.h"

#include <pybind11/pybind11.h>

#include <vector>

#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace icrl {

namespace generic { void anymdp_sample(const AnymdpTask&); }
namespace avx2 { void anymdp_sample(const AnymdpTask&); }
namespace avx512 { void anymdp_sample(const AnymdpTask&); }

namespace {

// Task i of the batch has the key keys[i]. Sizes: transition, reward [n,S,na,S]; state_mapping filled with -1, else zeros.
void anymdp_sample(uintptr_t keys, uintptr_t num_states, uintptr_t transition, uintptr_t reward, uintptr_t noise_state,
                   uintptr_t noise_action, uintptr_t start, uintptr_t terminal, uintptr_t state_mapping,
                   uintptr_t max_steps, uintptr_t attempts, int64_t n, int64_t stride, int64_t na,
                   int64_t num_observations, int64_t max_attempts, int threads) {
  parallel_for(n, threads, [&](int64_t i) {
    thread_local std::vector<double> scratch;
    AnymdpTask task;
    task.ns = reinterpret_cast<const int64_t*>(num_states)[i];
    task.na = na, task.stride = stride, task.num_observations = num_observations, task.max_attempts = max_attempts;
    task.key = reinterpret_cast<const uint64_t*>(keys)[i];
    task.transition = reinterpret_cast<float*>(transition) + i * stride * na * stride;
    task.reward = reinterpret_cast<float*>(reward) + i * stride * na * stride;
    task.noise_state = reinterpret_cast<float*>(noise_state) + i * stride;
    task.start = reinterpret_cast<float*>(start) + i * stride;
    task.noise_action = reinterpret_cast<float*>(noise_action) + i * stride * na;
    task.terminal = reinterpret_cast<bool*>(terminal) + i * stride;
    task.state_mapping = reinterpret_cast<int64_t*>(state_mapping) + i * stride;
    task.max_steps = reinterpret_cast<int64_t*>(max_steps) + i;
    task.attempts = reinterpret_cast<int64_t*>(attempts) + i;
    const size_t size = static_cast<size_t>(anymdp_scratch(task.ns, na, num_observations));
    if (scratch.size() < size) scratch.resize(size);
    task.scratch = scratch.data();
    ICRL_DISPATCH(anymdp_sample, task);
  });
}

}  // namespace

void bind_anymdp(pybind11::module_& m) {
  m.def("anymdp_sample", &anymdp_sample, pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace icrl
