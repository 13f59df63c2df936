// What a model-based learner would think at each step of recorded histories.
#include "tabular/model_based.h"

#include <pybind11/pybind11.h>

#include <vector>

#include "common/isa.h"
#include "common/parallel.h"

namespace icrl {

namespace {

constexpr double kBackupNanoseconds = 5;  // about what a sweep takes for a state and an action

// `plain`: the GPU's code on the CPU.
void model_based_q(uintptr_t state, uintptr_t action, uintptr_t reward, uintptr_t done, uintptr_t next_state,
                   uintptr_t q, int64_t R, int64_t T, int64_t S, int64_t A, float bonus, float discount, int64_t sweeps,
                   uintptr_t action_mask, bool plain, int threads) {
  const auto integers = [](uintptr_t p) { return reinterpret_cast<const int64_t*>(p); };
  const ModelHistory h{integers(state),
                       integers(action),
                       integers(done),
                       integers(next_state),
                       reinterpret_cast<const float*>(reward),
                       reinterpret_cast<float*>(q),
                       R,
                       T,
                       S,
                       A,
                       sweeps,
                       bonus,
                       discount,
                       reinterpret_cast<const uint8_t*>(action_mask)};
  threads = team_for(kBackupNanoseconds * static_cast<double>(R * T * sweeps * S * A), threads);
  parallel_for(R, threads, [&](int64_t r) {
    std::vector<float> scratch(static_cast<size_t>(history_scratch(S, A)), 0.f);
    if (plain)
      history<PlainOps>(h, r, scratch.data());
    else
      ICRL_DISPATCH(model_based_history, h, r, scratch.data());
  });
}

}  // namespace

void bind_model_based(pybind11::module_& m) {
  m.def("model_based_q", &model_based_q, pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace icrl
