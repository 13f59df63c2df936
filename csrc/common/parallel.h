// Threads. A region's items are claimed one by one, by the caller and by the other threads of its team, which are:
//
//   OpenMP's   of the runtime that torch has loaded, as long as they come at once. Such a region ends when every thread
//              has come, so beside busy processes it takes as long as a thread waits for a core: milliseconds.
//   our own    for a while after an OpenMP region whose end was waited for. The caller waits for claimed items only: a
//              helper that gets no core costs nothing. They are not the rule, because they sleep between regions, and
//              because where torch's threads still spin for work there is no free core for them.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>

namespace icrl {

// A region's work in nanoseconds, as one thread takes them, for which another thread is worth waking: waking one takes
// 5 to 50 microseconds (benches/NOTES.md, "Threads").
constexpr double kGrain = 50e3;

// How many of `threads` threads a region is worth which one thread works off in about `nanoseconds`.
inline int team_for(double nanoseconds, int threads) {
  const double worth = nanoseconds / kGrain;
  return worth >= threads ? threads : worth < 2 ? 1 : static_cast<int>(worth);
}

// body(context, i) for each i in [0, n), by at most `threads` threads. body must not throw. Serial in a forked child:
// neither team's threads are there.
void run_items(void (*body)(void* context, int64_t item), void* context, int64_t n, int threads);

// Our own helpers serve for so many nanoseconds from now on, whatever OpenMP's threads do: for tests of both teams.
void use_own_helpers(int64_t nanoseconds);

// The calling thread's own number of threads for torch's operators: OpenMP's, and MKL's (0: the process's). Returns
// MKL's before. What torch did not bring is left alone.
int set_torch_threads(int openmp, int mkl);

// Calls f(i) for each i in [0, n). Each thread begins with a share of its own, the same in each call, so that what its
// items hold stays in its core's cache, and then helps with the others'. Which thread runs an item must not change its
// result: same bits for any number of threads. What f throws (no memory) comes out here, once all items have ended.
template <class F>
void parallel_for(int64_t n, int threads, F&& f) {
  if (n <= 1 || threads <= 1) {
    for (int64_t i = 0; i < n; ++i) f(i);
    return;
  }
  struct Context {
    std::atomic<bool> failed{false};
    std::exception_ptr error;
    F* f;
  } context;
  context.f = &f;
  run_items(
      [](void* p, int64_t i) {
        auto& c = *static_cast<Context*>(p);
        if (c.failed.load(std::memory_order_relaxed)) return;
        try {
          (*c.f)(i);
        } catch (...) {
          if (!c.failed.exchange(true)) c.error = std::current_exception();
        }
      },
      &context, n, threads);
  if (context.error) std::rethrow_exception(context.error);
}

}  // namespace icrl
