// Threads: those of the OpenMP runtime that torch has already loaded, so that one pool serves both.
#pragma once

#include <atomic>
#include <cstdint>

namespace icrl {

// Runs body(context) on `threads` threads of the loaded OpenMP runtime; where none is loaded, on one.
void run_team(void (*body)(void* context), void* context, int threads);
bool has_team();

// Sets the calling thread's own team size, for torch's operators and for torch.get_num_threads() in that thread too.
void set_team_size(int threads);

// Calls f(i) for each i in [0, n), items handed out one by one. f must not throw. Which thread runs an item must not
// change its result: same bits for any number of threads.
template <class F>
void parallel_for(int64_t n, int threads, F&& f) {
  if (n <= 1 || threads <= 1) {
    for (int64_t i = 0; i < n; ++i) f(i);
    return;
  }
  struct Context {
    std::atomic<int64_t> next{0};
    int64_t n;
    F* f;
  } context;
  context.n = n;
  context.f = &f;
  run_team(
      [](void* p) {
        auto& c = *static_cast<Context*>(p);
        for (int64_t i; (i = c.next.fetch_add(1, std::memory_order_relaxed)) < c.n;) (*c.f)(i);
      },
      &context, threads < n ? threads : static_cast<int>(n));
}

}  // namespace icrl
