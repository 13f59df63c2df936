#include "tabular/anymdp.h"

#include <pybind11/pybind11.h>

#include <cstring>
#include <memory>
#include <vector>

#include "common/isa.h"
#include "common/parallel.h"

namespace icrl {

namespace {

constexpr double kTaskNanoseconds = 100e3, kCopyNanoseconds = 0.5;  // about what a task and a copied entry take

// A task's windows between the two phases: `entries` probabilities, then as many rewards.
struct Chunk {
  std::unique_ptr<float[]> values;
  int64_t entries = 0;
};

// The windows of a batch whose size is known only once it is sampled.
struct Windows {
  std::vector<Chunk> chunks;

  // Task i's probabilities and rewards to where its first row begins. Each chunk is freed once it is copied, so that
  // the batch is held about once.
  void move_to(uintptr_t probability, uintptr_t reward, uintptr_t offset, int64_t rows, int threads) {
    int64_t entries = 0;
    for (const Chunk& c : chunks) entries += c.entries;
    threads = team_for(kCopyNanoseconds * static_cast<double>(entries), threads);
    parallel_for(static_cast<int64_t>(chunks.size()), threads, [&](int64_t i) {
      Chunk& c = chunks[i];
      const int64_t begin = reinterpret_cast<const int64_t*>(offset)[i * rows];
      std::memcpy(reinterpret_cast<float*>(probability) + begin, c.values.get(), c.entries * sizeof(float));
      std::memcpy(reinterpret_cast<float*>(reward) + begin, c.values.get() + c.entries, c.entries * sizeof(float));
      c.values.reset();
    });
  }
};

float* room(void* context, int64_t entries) {
  Chunk& c = *static_cast<Chunk*>(context);
  c.values.reset(new float[2 * entries]), c.entries = entries;
  return c.values.get();
}

// Task i of the batch has the key keys[i]. Dense: transition, reward [n,S,na,S], zeros, and first, length null.
// Windows: first, length [n,S,na], zeros, and transition, reward null. state_mapping filled with -1, the rest zeros.
std::unique_ptr<Windows> anymdp_sample(uintptr_t keys, uintptr_t num_states, uintptr_t transition, uintptr_t reward,
                                       uintptr_t first, uintptr_t length, uintptr_t noise_state, uintptr_t noise_action,
                                       uintptr_t start, uintptr_t terminal, uintptr_t state_mapping,
                                       uintptr_t max_steps, uintptr_t attempts, int64_t n, int64_t stride, int64_t na,
                                       int64_t num_observations, int64_t max_attempts, int threads) {
  auto windows = std::make_unique<Windows>();
  if (!transition) windows->chunks.resize(n);
  parallel_for(n, team_for(kTaskNanoseconds * static_cast<double>(n), threads), [&](int64_t i) {
    thread_local std::vector<double> scratch;
    AnymdpTask task;
    task.ns = reinterpret_cast<const int64_t*>(num_states)[i];
    task.na = na, task.stride = stride, task.num_observations = num_observations, task.max_attempts = max_attempts;
    task.key = reinterpret_cast<const uint64_t*>(keys)[i];
    const auto dense = [&](uintptr_t p) {
      return p ? reinterpret_cast<float*>(p) + i * stride * na * stride : nullptr;
    };
    const auto bounds = [&](uintptr_t p) { return p ? reinterpret_cast<int32_t*>(p) + i * stride * na : nullptr; };
    task.transition = dense(transition), task.reward = dense(reward);
    task.first = bounds(first), task.length = bounds(length);
    task.room = &room, task.context = transition ? nullptr : &windows->chunks[i];
    task.noise_state = reinterpret_cast<float*>(noise_state) + i * stride;
    task.start = reinterpret_cast<float*>(start) + i * stride;
    task.noise_action = reinterpret_cast<float*>(noise_action) + i * stride * na;
    task.terminal = reinterpret_cast<bool*>(terminal) + i * stride;
    task.state_mapping = reinterpret_cast<int64_t*>(state_mapping) + i * stride;
    task.max_steps = reinterpret_cast<int64_t*>(max_steps) + i;
    task.attempts = reinterpret_cast<int64_t*>(attempts) + i;
    const size_t size = static_cast<size_t>(anymdp_scratch(task.ns, na, num_observations)) + 8;
    if (scratch.size() < size) scratch.resize(size);
    task.scratch = reinterpret_cast<double*>((reinterpret_cast<uintptr_t>(scratch.data()) + 63) / 64 * 64);
    ICRL_DISPATCH(anymdp_sample, task);
  });
  return windows;
}

}  // namespace

void bind_anymdp(pybind11::module_& m) {
  const pybind11::call_guard<pybind11::gil_scoped_release> free;
  pybind11::class_<Windows>(m, "AnymdpWindows").def("move_to", &Windows::move_to, free);
  m.def("anymdp_sample", &anymdp_sample, free);
}

}  // namespace icrl
