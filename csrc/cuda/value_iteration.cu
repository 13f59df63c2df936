// Batched tabular control on the GPU: one block for each task at a time, workspace in shared memory where it fits.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/value_iteration_core.h"

namespace icrl {
namespace {

constexpr int kThreads = 256;

struct BlockTeam {
  int id, size, lane, lanes, group, groups;
  double* shared;  // [kThreads / 32]

  __device__ explicit BlockTeam(double* shared_)
      : id(threadIdx.x), size(kThreads), lane(threadIdx.x % kLanes), lanes(kLanes), group(threadIdx.x / kLanes),
        groups(kThreads / kLanes), shared(shared_) {}
  __device__ void sync() { __syncthreads(); }
  // groups of a warp may be at different rows, so a shuffle names its own group's lanes only
  __device__ unsigned mask() const { return 0xffu << (threadIdx.x % 32 / kLanes * kLanes); }
  __device__ double lane_sum(double x) {
    for (int m = kLanes / 2; m > 0; m /= 2) x += __shfl_xor_sync(mask(), x, m);
    return x;
  }
  __device__ int64_t lane_max(int64_t x) {
    for (int m = kLanes / 2; m > 0; m /= 2) {
      const int64_t y = __shfl_xor_sync(mask(), static_cast<long long>(x), m);
      x = y > x ? y : x;
    }
    return x;
  }
  __device__ double max(double x) {
    for (int m = 16; m > 0; m /= 2) {
      const double y = __shfl_xor_sync(0xffffffffu, x, m);
      x = y > x ? y : x;
    }
    __syncthreads();  // everybody has read the last call's result
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    x = shared[0];
    for (int i = 1; i < kThreads / 32; ++i) x = shared[i] > x ? shared[i] : x;
    return x;
  }
};

// `space` is null where the workspace is in shared memory, else `bytes` for each block.
template <class T>
__global__ void __launch_bounds__(kThreads) solve_kernel(CoreBatch b, char* space, int64_t bytes) {
  extern __shared__ __align__(16) char dynamic[];
  __shared__ double reduction[kThreads / 32];
  BlockTeam team(reduction);
  for (int64_t i = blockIdx.x; i < b.n; i += gridDim.x) {
    core_solve<T>(team, b, i, space ? space + blockIdx.x * bytes : dynamic);
    __syncthreads();
  }
}

void check(cudaError_t e, const char* what) {
  if (e != cudaSuccess) throw std::runtime_error(std::string("value_iteration: ") + what + ": " + cudaGetErrorString(e));
}

// How a batch of this size is laid out on a device: blocks, bytes of shared memory a block, bytes of global workspace a block.
struct Plan {
  int64_t blocks, shared, global;
};

template <class T>
Plan plan_launch(int64_t n, int64_t ns, int64_t na, int device) {
  CoreSpace w;
  const int64_t bytes = core_layout(w, nullptr, ns, na);
  int most = 0, processors = 0, resident = 0;
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "shared memory of the device");
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "processors of the device");
  const int64_t shared = bytes + 1024 <= most ? bytes : 0;
  if (shared)
    check(cudaFuncSetAttribute(solve_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
          "shared memory of the kernel");
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, solve_kernel<T>, kThreads, shared), "occupancy");
  // without shared memory one block a processor bounds the workspace
  const int64_t blocks = std::max<int64_t>(1, processors) * (shared ? std::max(1, resident) : 1);
  return {std::min(n, blocks), shared, shared ? 0 : bytes};
}

struct Guard {
  int before = 0;
  explicit Guard(int device) {
    check(cudaGetDevice(&before), "current device");
    check(cudaSetDevice(device), "choosing the device");
  }
  ~Guard() { cudaSetDevice(before); }
};

// Bytes of global workspace that a batch needs; 0 where shared memory is enough.
int64_t workspace(int64_t n, int64_t ns, int64_t na, bool is_double, int device) {
  Guard guard(device);
  const Plan p = is_double ? plan_launch<double>(n, ns, na, device) : plan_launch<float>(n, ns, na, device);
  return p.blocks * p.global;
}

template <class T>
void launch(const CoreBatch& b, uintptr_t space, int device, uintptr_t stream) {
  const Plan p = plan_launch<T>(b.n, b.ns, b.na, device);
  solve_kernel<T><<<static_cast<unsigned>(p.blocks), kThreads, p.shared, reinterpret_cast<cudaStream_t>(stream)>>>(
      b, p.shared ? nullptr : reinterpret_cast<char*>(space), p.global);
  check(cudaGetLastError(), "launch");
}

void solve(uintptr_t transition, uintptr_t reward, bool is_double, bool by_successor, uintptr_t terminal,
           uintptr_t num_states, uintptr_t discount, uintptr_t order, int64_t n, int64_t ng, int64_t ns, int64_t na,
           int method, double tol, uintptr_t q, uintptr_t v, uintptr_t policy, uintptr_t bound, uintptr_t iterations,
           uintptr_t refusal, uintptr_t space, int device, uintptr_t stream) {
  if (n == 0) return;
  Guard guard(device);
  const CoreBatch b = core_batch(transition, reward, by_successor, terminal, num_states, discount, order, n, ng, ns, na,
                                 method, tol, q, v, policy, bound, iterations, refusal);
  is_double ? launch<double>(b, space, device, stream) : launch<float>(b, space, device, stream);
}

}  // namespace

void bind_value_iteration_cuda(pybind11::module_& m) {
  m.def("value_iteration_cuda_workspace", &workspace);
  m.def("value_iteration_cuda", &solve, pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace icrl
