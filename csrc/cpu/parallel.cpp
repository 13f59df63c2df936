// Two OpenMP runtimes in one process slow each other down thirtyfold, so this module links none: it finds the libgomp
// (or the GNU entry points of libiomp5/libomp) that torch brought and calls it.
#include "cpu/parallel.h"

#include <dlfcn.h>
#include <link.h>

#include <cstring>

namespace icrl {
namespace {

using Team = void (*)(void (*)(void*), void*, unsigned, unsigned);

int find_runtime(dl_phdr_info* info, size_t, void* out) {
  const char* name = info->dlpi_name;
  if (!name || !(std::strstr(name, "libgomp") || std::strstr(name, "libiomp5") || std::strstr(name, "libomp"))) return 0;
  void* handle = dlopen(name, RTLD_LAZY | RTLD_NOLOAD);
  if (!handle) return 0;
  void* symbol = dlsym(handle, "GOMP_parallel");
  if (!symbol) return 0;
  *static_cast<Team*>(out) = reinterpret_cast<Team>(symbol);
  return 1;
}

Team team() {
  static Team found = nullptr;  // looked for again until found: torch may be imported after this module
  if (!found) dl_iterate_phdr(find_runtime, &found);
  return found;
}

}  // namespace

bool has_team() { return team() != nullptr; }

void run_team(void (*body)(void*), void* context, int threads) {
  if (Team t = threads > 1 ? team() : nullptr)
    t(body, context, static_cast<unsigned>(threads), 0);
  else
    body(context);
}

}  // namespace icrl
