// icrl_kernels._C: raw pointers, sizes and a stream in; no torch. One line per source file that has entry points.
#include <pybind11/pybind11.h>

#include "common/isa.h"
#include "common/parallel.h"

namespace icrl {
// each is defined at the end of csrc/cpu/<op>.cpp or csrc/cuda/<op>.cu
void bind_anymdp(pybind11::module_& m);
void bind_gated_delta_rule(pybind11::module_& m);
void bind_gla(pybind11::module_& m);
void bind_gsa(pybind11::module_& m);
void bind_model_based(pybind11::module_& m);
void bind_rollout(pybind11::module_& m);
void bind_rollout_cuda(pybind11::module_& m);
void bind_rollout_tables(pybind11::module_& m);
void bind_rwkv7(pybind11::module_& m);
void bind_tokens(pybind11::module_& m);
void bind_value_iteration(pybind11::module_& m);
void bind_value_iteration_cuda(pybind11::module_& m);
void bind_value_iteration_team(pybind11::module_& m);
}  // namespace icrl

PYBIND11_MODULE(_C, m) {
  m.def("isa", &icrl::isa_name);
  m.def("has_team", &icrl::has_team);
  m.def("set_team_size", &icrl::set_team_size);
  icrl::bind_anymdp(m);
  icrl::bind_gated_delta_rule(m);
  icrl::bind_gla(m);
  icrl::bind_gsa(m);
  icrl::bind_model_based(m);
  icrl::bind_rollout(m);
  icrl::bind_rollout_tables(m);
  icrl::bind_rwkv7(m);
  icrl::bind_tokens(m);
  icrl::bind_value_iteration(m);
  icrl::bind_value_iteration_team(m);
#ifdef ICRL_WITH_CUDA
  m.attr("with_cuda") = true;
  icrl::bind_rollout_cuda(m);
  icrl::bind_value_iteration_cuda(m);
#else
  m.attr("with_cuda") = false;
#endif
}
