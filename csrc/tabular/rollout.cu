// The simulator on the GPU: one thread for each record runs the code of rollout_core.h, compiled without fused
// multiply-adds, so that the bits are the CPU's.
//
//   c         the call (rollout.h), its tensors on the GPU
//   h         of model_based_q: the histories [R, T]
//   r         the thread's record
//   scratch   [R, each] float32: scratch_floats(S, A) a record, any content; for histories history_scratch(S, A), zeros
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/cuda_device.h"
#include "tabular/rollout_binding.h"
#include "tabular/rollout_core.h"

namespace icrl {
namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads) simulate_kernel(RolloutCall c, float* scratch, int64_t each) {
  const int64_t r = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (r < c.R) simulate_or_spoil(c, r, scratch + r * each);
}

__global__ void __launch_bounds__(kThreads) history_kernel(ModelHistory h, float* scratch, int64_t each) {
  const int64_t r = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (r < h.R) history<PlainOps>(h, r, scratch + r * each);
}

unsigned blocks(int64_t records) { return static_cast<unsigned>((records + kThreads - 1) / kThreads); }

// Floats of scratch a record, where behaviours are given.
int64_t scratch_floats(int64_t S, int64_t A) { return S * A + ModelBased::scratch_floats(S, A); }

void rollout(const Pointers& tables, uintptr_t probabilities, uintptr_t choices, uintptr_t references,
             const Pointers& behaviours, uintptr_t actions, const Pointers& state, const Pointers& out, int64_t N,
             int64_t S, int64_t A, int64_t M, int64_t P, int64_t G, int64_t R, int64_t T, uintptr_t scratch, int device,
             uintptr_t stream) {
  if (R == 0) return;
  Guard guard(device);
  const RolloutCall c =
      rollout_call(tables, probabilities, choices, references, behaviours, actions, state, out, N, S, A, M, P, G, R, T);
  simulate_kernel<<<blocks(R), kThreads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(
      c, reinterpret_cast<float*>(scratch), scratch ? Record<PlainOps>::scratch_floats(c) : 0);
  check(cudaGetLastError(), "rollout");
}

// scratch: zeros, R * history_scratch(S, A) floats.
void model_based_q(uintptr_t state, uintptr_t action, uintptr_t reward, uintptr_t done, uintptr_t next_state,
                   uintptr_t q, int64_t R, int64_t T, int64_t S, int64_t A, float bonus, float discount, int64_t sweeps,
                   uintptr_t action_mask, uintptr_t scratch, int device, uintptr_t stream) {
  if (R == 0) return;
  Guard guard(device);
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
  history_kernel<<<blocks(R), kThreads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(
      h, reinterpret_cast<float*>(scratch), history_scratch(S, A));
  check(cudaGetLastError(), "model_based_q");
}

}  // namespace

void bind_rollout_cuda(pybind11::module_& m) {
  m.def("rollout_cuda_scratch", &scratch_floats);
  m.def("model_based_q_cuda_scratch", &history_scratch);
  m.def("rollout_cuda", &rollout, pybind11::call_guard<pybind11::gil_scoped_release>());
  m.def("model_based_q_cuda", &model_based_q, pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace icrl
