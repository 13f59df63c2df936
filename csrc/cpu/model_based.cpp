// What a model-based learner would think at each step of recorded histories.
#include "cpu/model_based.h"

#include <pybind11/pybind11.h>

#include <vector>

#include "cpu/parallel.h"

namespace icrl {
namespace {

void model_based_q(uintptr_t state_, uintptr_t action_, uintptr_t reward_, uintptr_t done_, uintptr_t q_, int64_t R,
                   int64_t T, int64_t S, int64_t A, float bonus, float discount, int64_t sweeps, int threads) {
  const auto *state = reinterpret_cast<const int64_t*>(state_), *action = reinterpret_cast<const int64_t*>(action_);
  const auto* done = reinterpret_cast<const int64_t*>(done_);
  const auto* reward = reinterpret_cast<const float*>(reward_);
  auto* q = reinterpret_cast<float*>(q_);
  parallel_for(R, threads, [&](int64_t r) {
    const auto sa = static_cast<size_t>(S * A);
    std::vector<int32_t> visits(sa, 0);
    std::vector<float> reward_sum(sa, 0), successors(sa * static_cast<size_t>(S), 0), value(static_cast<size_t>(S), 0), scratch(2 * sa);
    std::vector<int16_t> span(2 * sa, 0);
    ModelBased learner{S, A, S, A, visits.data(), reward_sum.data(), successors.data(), span.data(), value.data(), discount, bonus, scratch.data(), scratch.data() + sa};
    double square = 0;
    for (int64_t t = 0; t < T; ++t) {
      const int64_t i = r * T + t, s = state[i];
      const auto rms = static_cast<float>(std::sqrt(square / static_cast<double>(std::max<int64_t>(t, 1))));
      for (int64_t k = 0; k < sweeps; ++k) learner.sweep(rms, k & 1);
      for (int64_t a = 0; a < A; ++a) q[i * A + a] = learner.q(s, a);
      square += static_cast<double>(reward[i]) * reward[i];
      if (done[i] == 2 || t + 1 == T) continue;  // where a truncated step led is not on record
      ++visits[static_cast<size_t>(s * A + action[i])];
      learner.observe(s, action[i], reward[i], done[i] ? -1 : state[i + 1]);
    }
  });
}

}  // namespace

void bind_model_based(pybind11::module_& m) {
  m.def("model_based_q", &model_based_q, pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace icrl
