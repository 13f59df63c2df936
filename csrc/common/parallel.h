// Threads: those of the OpenMP runtime that torch has already loaded, so that one pool serves both.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>

namespace icrl {

// Runs body(context) on `threads` threads of the loaded OpenMP runtime; where none is loaded, on one.
void run_team(void (*body)(void* context), void* context, int threads);
bool has_team();

// Of the thread that asks, in its team: its number and how many there are.
void place_in_team(int& number, int& threads);

// Sets the calling thread's own team size, for torch's operators and for torch.get_num_threads() in that thread too.
void set_team_size(int threads);

// Calls f(i) for each i in [0, n), items handed out one by one. Which thread runs an item must not change its result:
// same bits for any number of threads. What f throws (memory that is not to be had) comes out here, once all threads
// are back.
template <class F>
void parallel_for(int64_t n, int threads, F&& f) {
  if (n <= 1 || threads <= 1) {
    for (int64_t i = 0; i < n; ++i) f(i);
    return;
  }
  struct Context {
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    std::exception_ptr error;
    int64_t n;
    F* f;
  } context;
  context.n = n;
  context.f = &f;
  run_team(
      [](void* p) {
        auto& c = *static_cast<Context*>(p);
        try {
          for (int64_t i; (i = c.next.fetch_add(1, std::memory_order_relaxed)) < c.n;) (*c.f)(i);
        } catch (...) {
          if (!c.failed.exchange(true)) c.error = std::current_exception();
          c.next = c.n;
        }
      },
      &context, threads < n ? threads : static_cast<int>(n));
  if (context.error) std::rethrow_exception(context.error);
}

// The same for short calls that come again and again on the same memory: each thread has its own share of the items,
// the same in each call, so that what they hold stays in its core's cache. f must not throw.
template <class F>
void parallel_shares(int64_t n, int threads, F&& f) {
  if (n <= 1 || threads <= 1) {
    for (int64_t i = 0; i < n; ++i) f(i);
    return;
  }
  struct Context {
    int64_t n;
    F* f;
  } context{n, &f};
  run_team(
      [](void* p) {
        auto& c = *static_cast<Context*>(p);
        int number, team;
        place_in_team(number, team);
        for (int64_t i = c.n * number / team; i < c.n * (number + 1) / team; ++i) (*c.f)(i);
      },
      &context, threads < n ? threads : static_cast<int>(n));
}

}  // namespace icrl
