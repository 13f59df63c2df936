// The GPU planner (value_iteration_cuda.h) on the host, for tests where there is no GPU: a team's threads are
// coroutines on one thread. It is always the first, the last or any of those that can run whose turn it is, until it
// waits at a barrier: what one may read before another has written it, or after, comes out different, so that a missing
// barrier shows in the results. Threads that wait at barriers which others never reach are an error.
#include <pybind11/pybind11.h>

#if defined(__linux__)
#include <ucontext.h>

#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#include "tabular/value_iteration_cuda.h"
#include "tabular/value_iteration_cuda_space.h"

namespace icrl {
namespace {

struct Barrier {
  int members = 0, arrived = 0;
  int64_t round = 0;
};

class Coroutines {
 public:
  Coroutines(int size, int order)
      : size_(size), order_(order), shuffle_(order), barriers_(1 + size / kWarp + 1 + size / kLanes) {
    barriers_[0].members = size;
    for (int i = 0; i < size; ++i) ++barriers_[warp(i)].members, ++barriers_[lanes(i)].members;
  }
  int warp(int id) const { return 1 + id / kWarp; }
  int lanes(int id) const { return 1 + size_ / kWarp + 1 + id / kLanes; }
  int size() const { return size_; }

  void run(const std::function<void(int)>& body) {
    body_ = &body;
    stacks_.resize(size_), contexts_.resize(size_), waits_.assign(size_, {nullptr, 0}), done_.assign(size_, false);
    for (int i = 0; i < size_; ++i) {
      constexpr size_t kStack = 256 << 10;
      if (!stacks_[i]) stacks_[i].reset(new char[kStack]);
      getcontext(&contexts_[i]);
      contexts_[i].uc_stack.ss_sp = stacks_[i].get(), contexts_[i].uc_stack.ss_size = kStack;
      contexts_[i].uc_link = &scheduler_;
      const uint64_t self = reinterpret_cast<uint64_t>(this);
      makecontext(&contexts_[i], reinterpret_cast<void (*)()>(&Coroutines::enter), 3, static_cast<unsigned>(self >> 32),
                  static_cast<unsigned>(self), i);
    }
    for (int left = size_; left > 0; left -= done_[current_]) {
      current_ = next();
      waits_[current_].barrier = nullptr;
      swapcontext(&scheduler_, &contexts_[current_]);
    }
  }

  void arrive(int id, int which) {
    Barrier& barrier = barriers_[which];
    const int64_t round = barrier.round;
    if (++barrier.arrived == barrier.members) barrier.arrived = 0, ++barrier.round;
    waits_[id] = {&barrier, round};
    swapcontext(&contexts_[id], &scheduler_);
  }

 private:
  struct Wait {
    Barrier* barrier;
    int64_t round;
  };
  bool can_run(int i) const { return !done_[i] && !(waits_[i].barrier && waits_[i].barrier->round == waits_[i].round); }
  // The first or the last that can run, so that some get as far as barriers let them before others start; or any.
  int next() {
    const int start = order_ > 0 ? static_cast<int>(shuffle_() % size_) : 0;
    for (int i = 0; i < size_; ++i) {
      const int id = order_ < 0 ? size_ - 1 - i : (start + i) % size_;
      if (can_run(id)) return id;
    }
    throw std::runtime_error("value_iteration: threads wait at different barriers");
  }
  static void enter(unsigned high, unsigned low, int id) {
    auto* self = reinterpret_cast<Coroutines*>(static_cast<uint64_t>(high) << 32 | low);
    (*self->body_)(id);
    self->done_[id] = true;
  }
  int size_, order_, current_ = 0;
  std::mt19937 shuffle_;
  std::vector<Barrier> barriers_;
  std::vector<std::unique_ptr<char[]>> stacks_;
  std::vector<ucontext_t> contexts_;
  std::vector<Wait> waits_;
  std::vector<char> done_;
  ucontext_t scheduler_;
  const std::function<void(int)>* body_ = nullptr;
};

struct HostTeam {
  int id, size, lane, group, groups;
  Coroutines& all;
  std::vector<double>& slots;  // two for each thread, taken in turn
  int turn = 0;

  HostTeam(int id_, Coroutines& all_, std::vector<double>& slots_)
      : id(id_),
        size(all_.size()),
        lane(id_ % kLanes),
        group(id_ / kLanes),
        groups(size / kLanes),
        all(all_),
        slots(slots_) {}
  void sync() { all.arrive(id, 0); }
  void sync_warp() { all.arrive(id, all.warp(id)); }
  void sync_lanes() { all.arrive(id, all.lanes(id)); }
  double lane_read(double x, int from) {
    double* mine = slots.data() + (turn ^= 1) * size;
    mine[id] = x;
    sync_lanes();  // one barrier is enough: nobody writes this half again before all have passed the next one
    return mine[id - lane + from];
  }
  double lane_xor(double x, int m) { return lane_read(x, lane ^ m); }
  int lane_xor(int x, int m) { return static_cast<int>(lane_read(static_cast<double>(x), lane ^ m)); }
  void prefetch(const void*) {}
  int claim(int32_t* counter, int n) {
    const int before = *counter;
    *counter += n;
    return before;
  }
  double max(double x) {
    double* mine = slots.data() + 2 * size;
    sync();  // everybody has read the last call's result
    mine[id] = x;
    sync();
    for (int i = 0; i < size; ++i) x = core_larger(x, mine[i]);
    return x;
  }
};

template <class T, bool Resident>
bool solve_one(Coroutines& all, const CoreBatch& b, int64_t i, int64_t bytes) {
  constexpr int64_t kGuard = 256;
  std::vector<double> slots(3 * all.size());
  std::vector<double> fast((bytes + kGuard) / sizeof(double) + 1), slow(core_slow_bytes(b.ns, b.na) / sizeof(double));
  char* at = reinterpret_cast<char*>(fast.data());
  std::memset(at, 0xff, fast.size() * sizeof(double));  // NaN: what is read was written
  std::memset(static_cast<void*>(slow.data()), 0xff, slow.size() * sizeof(double));
  std::vector<char> solved(all.size());
  all.run([&](int id) {
    HostTeam team(id, all, slots);
    solved[id] = core_solve<T, Resident>(team, b, i, at, bytes, reinterpret_cast<char*>(slow.data()));
  });
  for (int64_t k = bytes; k < bytes + kGuard; ++k)
    if (at[k] != static_cast<char>(0xff)) throw std::runtime_error("value_iteration: wrote beyond its memory");
  for (const char x : solved)
    if (x != solved[0]) throw std::runtime_error("value_iteration: threads disagree");
  return solved[0];
}

template <class T>
int64_t solve(const CoreBatch& b, int64_t bytes, int threads, int order) {
  Coroutines all(threads, order);
  int64_t unfit = 0;
  for (int64_t i = 0; i < b.n; ++i) {
    if (bytes > 0 && solve_one<T, true>(all, b, i, bytes)) continue;
    ++unfit;
    solve_one<T, false>(all, b, i, core_bytes_at_most<T>(b.ns, b.na, 0));
  }
  return unfit;
}

// As value_iteration_cuda, with a team of `threads` (a multiple of 8) that has `bytes` of fast memory, run in `order`:
// 0 first, -1 last, else any by this seed. Returns how many tasks did not fit and were solved in slow memory.
int64_t solve_on_host(uintptr_t transition, uintptr_t reward, bool is_double, bool by_successor, uintptr_t offset,
                      uintptr_t first, uintptr_t length, int64_t values, uintptr_t terminal, uintptr_t num_states,
                      uintptr_t discount, uintptr_t order, int64_t n, int64_t ng, int64_t ns, int64_t na, int method,
                      double tol, uintptr_t q, uintptr_t v, uintptr_t policy, uintptr_t bound, uintptr_t iterations,
                      uintptr_t refusal, int64_t bytes, int threads, int turn) {
  const CoreBatch b = core_batch(transition, reward, by_successor, offset, first, length, values, terminal, num_states,
                                 discount, order, n, ng, ns, na, method, tol, q, v, policy, bound, iterations, refusal);
  return is_double ? solve<double>(b, bytes, threads, turn) : solve<float>(b, bytes, threads, turn);
}

}  // namespace

void bind_value_iteration_cuda_on_host(pybind11::module_& m) {
  m.def("value_iteration_cuda_host_check", &solve_on_host, pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace icrl
#else
namespace icrl {
void bind_value_iteration_cuda_on_host(pybind11::module_&) {}
}  // namespace icrl
#endif
