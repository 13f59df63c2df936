// icrl_kernels._C: raw pointers, sizes and a stream in; no torch. One line per source file that has entry points.
#include <pybind11/pybind11.h>

#include "common/isa.h"
#include "common/parallel.h"

// f(name) for each source file that has entry points: bind_name stands at its end.
// clang-format off: a line each
#define ICRL_CPU_SOURCES(f) \
  f(anymdp) \
  f(closed_loop) \
  f(emission) \
  f(fused_program) \
  f(gated_delta_rule) \
  f(gla) \
  f(gsa) \
  f(model_based) \
  f(rollout) \
  f(rollout_tables) \
  f(rwkv7) \
  f(value_iteration) \
  f(value_iteration_cuda_on_host)
#define ICRL_CUDA_SOURCES(f) \
  f(rollout_cuda) \
  f(value_iteration_cuda)
// clang-format on

#define ICRL_DECLARE(name) void bind_##name(pybind11::module_& m);
#define ICRL_BIND(name) icrl::bind_##name(m);

namespace icrl {
ICRL_CPU_SOURCES(ICRL_DECLARE)
ICRL_CUDA_SOURCES(ICRL_DECLARE)
}  // namespace icrl

PYBIND11_MODULE(_C, m) {
  m.def("isa", &icrl::isa_name);
  m.def("use_own_helpers", &icrl::use_own_helpers);
  m.def("set_torch_threads", &icrl::set_torch_threads);
  ICRL_CPU_SOURCES(ICRL_BIND)
#ifdef ICRL_WITH_CUDA
  m.attr("with_cuda") = true;
  ICRL_CUDA_SOURCES(ICRL_BIND)
#else
  m.attr("with_cuda") = false;
#endif
}
