#include "common/parallel.h"

#include <dlfcn.h>
#include <link.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cfenv>
#include <chrono>
#include <climits>
#include <cstring>
#include <system_error>
#include <thread>
#include <type_traits>

namespace icrl {
namespace {

constexpr int kMostThreads = 256;
constexpr int kSpins = 1000;             // of a caller, before it sleeps until claimed items have ended
constexpr int64_t kWaitedFor = 200'000;  // nanoseconds between a region's last item and its end: the machine is busy
constexpr int64_t kOwnHelpersFor = 500'000'000;  // nanoseconds after such a region

int64_t now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

// What torch brought. This module links none of it: two OpenMP runtimes in one process slow each other down thirtyfold.
struct Torch {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*thread_number)() = nullptr;
  void (*set_openmp)(int) = nullptr;
  int (*set_mkl)(int) = nullptr;
};

int find_torch(dl_phdr_info* info, size_t, void* out) {
  const auto named = [&](const char* name) { return info->dlpi_name && std::strstr(info->dlpi_name, name); };
  const auto find = [&](auto& function, const char* name) {
    void* handle = dlopen(info->dlpi_name, RTLD_LAZY | RTLD_NOLOAD);
    void* found = handle ? dlsym(handle, name) : nullptr;
    if (found) function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(found);
  };
  Torch& torch = *static_cast<Torch*>(out);
  if (!torch.parallel && (named("libgomp") || named("libiomp5") || named("libomp"))) {
    find(torch.parallel, "GOMP_parallel");
    find(torch.thread_number, "omp_get_thread_num");
    find(torch.set_openmp, "omp_set_num_threads");
  }
  if (!torch.set_mkl && (named("libtorch_cpu") || named("libmkl_rt"))) find(torch.set_mkl, "MKL_Set_Num_Threads_Local");
  return torch.parallel && torch.set_mkl;
}

Torch found;
const int looked = dl_iterate_phdr(find_torch, &found);

const Torch& torch() {  // looked for again until found: torch may be imported after this module
  if (!found.parallel) dl_iterate_phdr(find_torch, &found);
  return found;
}

struct alignas(64) Share {
  std::atomic<int64_t> next;
  int64_t end;
};

struct Region {
  void (*body)(void*, int64_t);
  void* context;
  int threads;
  std::fenv_t environment;       // the caller's: flushed denormals, rounding
  std::atomic<int64_t> last{0};  // when a thread ended its last item
  Share share[kMostThreads];

  Region(void (*body)(void*, int64_t), void* context, int64_t n, int threads)
      : body(body), context(context), threads(threads) {
    std::fegetenv(&environment);
    for (int64_t i = 0; i < threads; ++i) {
      share[i].next.store(n * i / threads, std::memory_order_relaxed);
      share[i].end = n * (i + 1) / threads;
    }
  }

  void work(int own) {
    bool worked = false;
    for (int k = 0; k < threads; ++k) {
      Share& s = share[(own + k) % threads];
      for (int64_t i; s.next.load(std::memory_order_relaxed) < s.end &&
                      (i = s.next.fetch_add(1, std::memory_order_relaxed)) < s.end;)
        body(context, i), worked = true;
    }
    if (!worked) return;
    int64_t before = last;
    for (const int64_t t = now(); before < t && !last.compare_exchange_weak(before, t);) {
    }
  }

  void help(int number) {
    std::fenv_t before;
    std::fegetenv(&before);
    std::fesetenv(&environment);
    work(number);
    std::fesetenv(&before);
  }
};

void sleep_while(std::atomic<uint32_t>& word, uint32_t value) {
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}

void wake_all(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

// Our own helpers, one region at a time. A helper enters (`inside`), looks whether a region is open, works, and leaves.
// The caller closes the region and waits until no helper is inside. Loads and stores of these are sequentially
// consistent: a helper that enters too late sees no region, and one that saw it is seen by the caller.
class Helpers {
 public:
  bool take() { return !taken_.exchange(true); }

  void run(Region& region) {
    hire(region.threads - 1);
    region_ = &region;
    call_.fetch_add(1);
    if (asleep_) wake_all(call_);
    region.work(0);
    region_ = nullptr;
    for (int i = 0; i < kSpins && inside_; ++i) __builtin_ia32_pause();
    waiting_ = true;
    for (uint32_t x; (x = inside_) != 0;) sleep_while(inside_, x);
    waiting_ = false;
    taken_ = false;
  }

 private:
  void help(int number, uint32_t seen) {
    for (;;) {
      asleep_.fetch_add(1);
      while (call_ == seen) sleep_while(call_, seen);
      asleep_.fetch_sub(1);
      seen = call_;
      inside_.fetch_add(1);
      Region* region = region_;
      if (region && number < region->threads) region->help(number);
      inside_.fetch_sub(1);
      if (waiting_) wake_all(inside_);
    }
  }

  // Where the system gives no more threads, the region has fewer.
  void hire(int helpers) {
    if (hired_ >= helpers) return;
    sigset_t all, before;  // signals are for the threads that were here before
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
      for (; hired_ < helpers; ++hired_)
        std::thread([this, number = hired_ + 1, seen = call_.load()] { help(number, seen); }).detach();
    } catch (const std::system_error&) {
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  int hired_ = 0;
  std::atomic<bool> taken_{false}, waiting_{false};
  std::atomic<Region*> region_{nullptr};
  alignas(64) std::atomic<uint32_t> call_{0};
  alignas(64) std::atomic<uint32_t> inside_{0}, asleep_{0};
};

Helpers& helpers = *new Helpers;  // never destroyed: they live until the process ends
std::atomic<int64_t> own_helpers_until{0};
std::atomic<bool> forked{false};

// A forked child has one thread, and OpenMP waits for those that its parent had: torch's operators, which these
// kernels' callers use, shall have one there too.
void note_fork() {
  forked = true;
  if (found.set_openmp) found.set_openmp(1);
  if (found.set_mkl) found.set_mkl(1);
}

const int asked_to_note_forks = pthread_atfork(nullptr, nullptr, note_fork);

}  // namespace

void run_items(void (*body)(void*, int64_t), void* context, int64_t n, int threads) {
  threads = static_cast<int>(std::min<int64_t>({n, threads, kMostThreads}));
  if (threads > 1 && !forked) {
    Region region(body, context, n, threads);
    if (torch().parallel && now() >= own_helpers_until) {
      torch().parallel(
          [](void* p) {
            const int number = torch().thread_number();
            number ? static_cast<Region*>(p)->help(number) : static_cast<Region*>(p)->work(0);
          },
          &region, static_cast<unsigned>(threads), 0);
      const int64_t end = now();
      if (end - region.last > kWaitedFor) own_helpers_until = end + kOwnHelpersFor;
      return;
    }
    if (helpers.take()) {
      helpers.run(region);
      return;
    }
  }
  for (int64_t i = 0; i < n; ++i) body(context, i);
}

void use_own_helpers(int64_t nanoseconds) { own_helpers_until = now() + nanoseconds; }

int set_torch_threads(int openmp, int mkl) {
  if (torch().set_openmp) torch().set_openmp(openmp);
  return torch().set_mkl ? torch().set_mkl(mkl) : 0;
}

}  // namespace icrl
