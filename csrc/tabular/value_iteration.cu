// Batched tabular control on the GPU: a team of threads (a block) for each task, tasks handed out by a counter to a
// grid that fills the chip once.
//
//   b            the batch, a CoreBatch (value_iteration_cuda_space.h has its shapes): n tasks, ns states, na actions
//   i, x         the block's task; its place in the round's list
//   list, left   [n] int64: the tasks of a round, and those that did not fit
//   dynamic      [bytes] shared memory of a block: a task's fast memory
//   fast, slow   [blocks, bytes], [blocks, slow_bytes] global memory: the same where shared memory is too small, and
//                what may be slow
//   space        the workspace: each round's two counters and list, then slow and fast
//
// Tasks differ in what they need of shared memory, which is known only when a table has been read. So the batch is run
// with as much as most tasks need, those that did not fit again with more, and the last in global memory: which ones is
// kept on the device, nothing waits for the host, and an empty round costs a launch.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/cuda_device.h"
#include "tabular/value_iteration_cuda.h"
#include "tabular/value_iteration_cuda_space.h"

namespace icrl {
namespace {

template <int Threads>
struct BlockTeam {
  static constexpr int size = Threads, groups = Threads / kLanes;
  int id = threadIdx.x, lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes;
  double* shared;  // [Threads / kWarp]

  __device__ explicit BlockTeam(double* shared_) : shared(shared_) {}
  __device__ void sync() {
    if (Threads == kWarp)
      __syncwarp();
    else
      __syncthreads();
  }
  __device__ void sync_warp() { __syncwarp(); }
  // groups of a warp may be at different rows, so a shuffle names its own group's lanes only
  __device__ unsigned mask() const { return 0xffu << (threadIdx.x % kWarp / kLanes * kLanes); }
  __device__ void sync_lanes() { __syncwarp(mask()); }
  __device__ double lane_xor(double x, int m) { return __shfl_xor_sync(mask(), x, m); }
  __device__ int lane_xor(int x, int m) { return __shfl_xor_sync(mask(), x, m); }
  __device__ double lane_read(double x, int from) { return __shfl_sync(mask(), x, from, kLanes); }
  __device__ void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
  __device__ int claim(int32_t* counter, int n) { return atomicAdd(counter, n); }
  __device__ double max(double x) {
    for (int m = kWarp / 2; m > 0; m /= 2) x = core_larger(x, __shfl_xor_sync(0xffffffffu, x, m));
    if (Threads == kWarp) {
      __syncwarp();
      return x;
    }
    __syncthreads();  // everybody has read the last call's result
    if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = x;
    __syncthreads();
    x = shared[0];
    for (int i = 1; i < Threads / kWarp; ++i) x = core_larger(x, shared[i]);
    return x;
  }
};

// What a round does: the tasks in `list` (null: all), `*count` of them (null: all), and where those go that do not fit.
struct Round {
  const int64_t *list, *count;
  unsigned long long *taken, *unfit;
  int64_t* left;
};

// Blocks that should fit a processor: without it the compiler takes registers that the shared memory would leave
// unused.
constexpr int blocks_wanted(int threads) { return threads == kWarp ? 20 : threads == 256 ? 3 : 1; }

// `fast` is null where it is shared memory; else `bytes` for each block, as `slow_bytes` of `slow` are.
template <class T, int Threads, bool Resident>
__global__ void __launch_bounds__(Threads, blocks_wanted(Threads))
    solve_kernel(CoreBatch b, Round round, char* fast, int64_t bytes, char* slow, int64_t slow_bytes) {
  extern __shared__ __align__(16) char dynamic[];
  __shared__ double reduction[Threads / kWarp];
  __shared__ int64_t turn;
  BlockTeam<Threads> team(reduction);
  char* const mine = slow + blockIdx.x * slow_bytes;
  for (;;) {
    if (threadIdx.x == 0) turn = static_cast<int64_t>(atomicAdd(round.taken, 1ull));
    __syncthreads();
    const int64_t x = turn;
    if (x >= (round.count ? *round.count : b.n)) return;
    const int64_t i = round.list ? round.list[x] : x;
    const bool fits = Resident ? core_solve<T, true>(team, b, i, dynamic, bytes, mine)
                               : core_solve<T, false>(team, b, i, fast + blockIdx.x * bytes, bytes, mine);
    if (!fits && threadIdx.x == 0) round.left[atomicAdd(round.unfit, 1ull)] = i;
    __syncthreads();
  }
}

template <class T>
using Kernel = void (*)(CoreBatch, Round, char*, int64_t, char*, int64_t);

constexpr int kSmallTask = 36 << 10;  // bytes: up to here six blocks fit a processor, and one warp each keeps it busy

template <class T>
Kernel<T> kernel_for(bool resident, int64_t bytes) {
  if (!resident) return solve_kernel<T, 512, false>;
  return bytes <= kSmallTask ? solve_kernel<T, 32, true> : solve_kernel<T, 256, true>;
}
int threads_for(bool resident, int64_t bytes) { return !resident ? 512 : bytes <= kSmallTask ? 32 : 256; }

struct Launch {
  bool resident;
  int64_t blocks, bytes;
};

struct Device {
  int processors = 0, most = 0, all = 0, reserved = 0;
  explicit Device(int device) {
    const auto get = [&](int& x, cudaDeviceAttr what) {
      check(cudaDeviceGetAttribute(&x, what, device), "value_iteration: device");
    };
    get(processors, cudaDevAttrMultiProcessorCount);
    get(most, cudaDevAttrMaxSharedMemoryPerBlockOptin);
    get(all, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    get(reserved, cudaDevAttrReservedSharedMemoryPerBlock);
  }
  // Shared memory of each of `blocks` that share a processor, less what a kernel has of its own.
  int64_t share(int blocks) const { return std::min(all / blocks - reserved, most) / 16 * 16 - 512; }
};

// The rounds of a batch. `values` is the number of probabilities of a packed batch, 0 for dense tables.
template <class T>
std::vector<Launch> plan(int64_t n, int64_t ns, int64_t na, int64_t values, const Device& device) {
  CoreSpace w;
  const int64_t fixed = core_layout(w, nullptr, nullptr, ns, na), rows = ns * na;
  const int64_t at_most = core_bytes_at_most<T>(ns, na, rows * ns);
  // Windows of dense tables are guessed to be as wide as sampled AnyMDP tasks' (1.25 sqrt(ns)), the factors twice as
  // wide and a quarter more; a tenth is for tasks above the mean. A wrong guess costs a round.
  const double width = values ? static_cast<double>(values) / static_cast<double>(n * rows) : 1.25 * std::sqrt(ns);
  const double guess =
      fixed + 1.1 * (rows * width * sizeof(T) + ns * std::min<double>(2.25 * width, ns) * sizeof(double));
  const int64_t first = std::min(at_most, static_cast<int64_t>(guess));
  std::vector<Launch> out;
  int blocks = guess > 2 * device.share(1) ? 0 : 1;  // 0: too large for shared memory by far
  while (blocks > 0 && blocks < 32 && device.share(blocks + 1) >= first) ++blocks;
  for (; blocks > 0; blocks = blocks > 1 ? (blocks + 1) / 2 : 0) {
    const int64_t bytes = std::min(device.share(blocks), (at_most + 15) / 16 * 16);
    if (bytes > fixed) {
      const Kernel<T> kernel = kernel_for<T>(true, bytes);
      int resident = 0;
      // the most that there is: what another thread asks for in between does not matter then
      check(
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(device.share(1))),
          "value_iteration: shared memory of the kernel");
      check(
          cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
          "value_iteration: shared memory of the processors");
      check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, threads_for(true, bytes), bytes),
            "value_iteration: occupancy");
      out.push_back({true, std::min<int64_t>(n, std::max(1, resident) * device.processors), bytes});
      if (bytes >= at_most) return out;
    }
  }
  // one block a processor bounds the global workspace
  out.push_back({false, std::min<int64_t>(n, device.processors), core_bytes_at_most<T>(ns, na, 0)});
  return out;
}

// The workspace: for each round two counters, and its list of tasks that did not fit; each block's slow memory; the
// last round's fast memory.
struct Workspace {
  int64_t counters, lists, slow, fast, bytes;
};
Workspace layout(const std::vector<Launch>& rounds, int64_t n, int64_t ns, int64_t na) {
  int64_t blocks = 0;
  for (const Launch& x : rounds) blocks = std::max(blocks, x.blocks);
  const int64_t count = static_cast<int64_t>(rounds.size());
  Workspace w;
  w.counters = 0, w.lists = count * 2 * 8, w.slow = w.lists + (count - 1) * n * 8;
  w.fast = (w.slow + blocks * core_slow_bytes(ns, na) + 255) / 256 * 256;
  w.bytes = w.fast + (rounds.back().resident ? 0 : rounds.back().blocks * rounds.back().bytes);
  return w;
}

std::vector<Launch> plan(int64_t n, int64_t ns, int64_t na, int64_t values, bool is_double, int device) {
  const Device d(device);
  return is_double ? plan<double>(n, ns, na, values, d) : plan<float>(n, ns, na, values, d);
}

// Bytes of global workspace that a batch needs.
int64_t workspace(int64_t n, int64_t ns, int64_t na, int64_t values, bool is_double, int device) {
  if (n == 0) return 0;
  Guard guard(device);
  return layout(plan(n, ns, na, values, is_double, device), n, ns, na).bytes;
}

template <class T>
void launch(const CoreBatch& b, const std::vector<Launch>& rounds, char* space, cudaStream_t stream) {
  const Workspace w = layout(rounds, b.n, b.ns, b.na);
  check(cudaMemsetAsync(space, 0, w.lists, stream), "value_iteration: workspace");
  auto* counters = reinterpret_cast<unsigned long long*>(space + w.counters);
  auto* lists = reinterpret_cast<int64_t*>(space + w.lists);
  Round round{nullptr, nullptr, counters, counters + 1, lists};
  for (const Launch& x : rounds) {
    kernel_for<T>(x.resident, x.bytes)<<<static_cast<unsigned>(x.blocks), threads_for(x.resident, x.bytes),
                                         x.resident ? x.bytes : 0, stream>>>(
        b, round, space + w.fast, x.bytes, space + w.slow, core_slow_bytes(b.ns, b.na));
    check(cudaGetLastError(), "value_iteration: launch");
    round = {round.left, reinterpret_cast<const int64_t*>(round.unfit), round.taken + 2, round.unfit + 2,
             round.left + b.n};
  }
}

void solve(uintptr_t transition, uintptr_t reward, bool is_double, bool by_successor, uintptr_t offset, uintptr_t first,
           uintptr_t length, int64_t values, uintptr_t terminal, uintptr_t num_states, uintptr_t discount,
           uintptr_t order, int64_t n, int64_t ng, int64_t ns, int64_t na, int method, double tol, uintptr_t q,
           uintptr_t v, uintptr_t policy, uintptr_t bound, uintptr_t iterations, uintptr_t refusal, uintptr_t space,
           int device, uintptr_t stream) {
  if (n == 0) return;
  Guard guard(device);
  const CoreBatch b = core_batch(transition, reward, by_successor, offset, first, length, values, terminal, num_states,
                                 discount, order, n, ng, ns, na, method, tol, q, v, policy, bound, iterations, refusal);
  const std::vector<Launch> rounds = plan(n, ns, na, values, is_double, device);
  char* at = reinterpret_cast<char*>(space);
  const auto on = reinterpret_cast<cudaStream_t>(stream);
  is_double ? launch<double>(b, rounds, at, on) : launch<float>(b, rounds, at, on);
}

}  // namespace

void bind_value_iteration_cuda(pybind11::module_& m) {
  m.attr("value_iteration_cuda_most_states") = kMostStates;
  m.def("value_iteration_cuda_workspace", &workspace);
  m.def("value_iteration_cuda", &solve, pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace icrl
