// Observation tokens of partially observed tasks, drawn by counter: icrl.worlds.TabularTasks.emit.
//
//   M, K, S, O         steps to emit for, tokens of each, inner states, observations
//   emission           [tasks, K, S, O] float32, probabilities of an observation
//   task, state, key   [M] int64, int64 (-1: none), uint64
//   out                [M, K] int64
#include <pybind11/pybind11.h>

#include <cstdint>

#include "common/parallel.h"

namespace icrl {
namespace {

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15ull;

uint64_t mix(uint64_t z) {  // splitmix64's finaliser, as icrl_kernels/tabular/counter_rng.py has it
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

// out[i, k] ~ emission[task[i], k, state[i], :] for i < M, by the k-th uniform of key[i]; -1 where the state is -1. All
// is summed in float64 and in order, as torch sums it: both give the same tokens.
void draw_tokens(uintptr_t emission_, uintptr_t task_, uintptr_t state_, uintptr_t key_, uintptr_t out_, int64_t M,
                 int64_t K, int64_t S, int64_t O, int threads) {
  const auto* emission = reinterpret_cast<const float*>(emission_);
  const auto* task = reinterpret_cast<const int64_t*>(task_);
  const auto* state = reinterpret_cast<const int64_t*>(state_);
  const auto* key = reinterpret_cast<const uint64_t*>(key_);
  auto* out = reinterpret_cast<int64_t*>(out_);
  constexpr int64_t kBlock = 256;
  threads = team_for(static_cast<double>(M * K * O), threads);  // about a nanosecond for each probability
  parallel_for((M + kBlock - 1) / kBlock, threads, [=](int64_t b) {
    const int64_t end = M < (b + 1) * kBlock ? M : (b + 1) * kBlock;
    for (int64_t i = b * kBlock; i < end; ++i) {
      const uint64_t inner = mix(key[i] ^ mix(kGolden));
      for (int64_t k = 0; k < K; ++k) {
        if (state[i] < 0) {
          out[i * K + k] = -1;
          continue;
        }
        const float* row = emission + ((task[i] * K + k) * S + state[i]) * O;
        double total = 0;
        for (int64_t o = 0; o < O; ++o) total += static_cast<double>(row[o]);
        const double u = static_cast<double>(mix(inner + static_cast<uint64_t>(k + 1) * kGolden) >> 11) * 0x1p-53;
        const double wanted = u * (1 - 0x1p-52) * total;
        int64_t o = 0;
        for (double sum = row[0]; sum <= wanted && o < O - 1;) sum += static_cast<double>(row[++o]);
        out[i * K + k] = o;
      }
    }
  });
}

}  // namespace

void bind_emission(pybind11::module_& m) {
  m.def("draw_tokens", &draw_tokens, pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace icrl
