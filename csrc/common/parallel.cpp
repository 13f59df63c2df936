// Two OpenMP runtimes in one process slow each other down thirtyfold, so this module links none: it finds the libgomp
// (or the GNU entry points of libiomp5/libomp) that torch brought and calls it.
#include "common/parallel.h"

#include <dlfcn.h>
#include <link.h>

#include <cstring>

namespace icrl {
namespace {

struct Runtime {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  void (*set_num_threads)(int) = nullptr;
  int (*number)() = nullptr;
  int (*team)() = nullptr;
};

int find_runtime(dl_phdr_info* info, size_t, void* out) {
  const char* name = info->dlpi_name;
  if (!name || !(std::strstr(name, "libgomp") || std::strstr(name, "libiomp5") || std::strstr(name, "libomp")))
    return 0;
  void* handle = dlopen(name, RTLD_LAZY | RTLD_NOLOAD);
  if (!handle) return 0;
  void *parallel = dlsym(handle, "GOMP_parallel"), *set_num_threads = dlsym(handle, "omp_set_num_threads");
  void *number = dlsym(handle, "omp_get_thread_num"), *team = dlsym(handle, "omp_get_num_threads");
  if (!parallel || !set_num_threads || !number || !team) return 0;
  *static_cast<Runtime*>(out) = {reinterpret_cast<decltype(Runtime::parallel)>(parallel),
                                 reinterpret_cast<decltype(Runtime::set_num_threads)>(set_num_threads),
                                 reinterpret_cast<decltype(Runtime::number)>(number),
                                 reinterpret_cast<decltype(Runtime::team)>(team)};
  return 1;
}

const Runtime& runtime() {
  static Runtime found;  // looked for again until found: torch may be imported after this module
  if (!found.parallel) dl_iterate_phdr(find_runtime, &found);
  return found;
}

}  // namespace

bool has_team() { return runtime().parallel != nullptr; }

void place_in_team(int& number, int& threads) {
  number = has_team() ? runtime().number() : 0;
  threads = has_team() ? runtime().team() : 1;
}

void set_team_size(int threads) {
  if (has_team()) runtime().set_num_threads(threads);
}

void run_team(void (*body)(void*), void* context, int threads) {
  if (threads > 1 && has_team())
    runtime().parallel(body, context, static_cast<unsigned>(threads), 0);
  else
    body(context);
}

}  // namespace icrl
