#include "cpu/gated_delta_rule.h"

#include <pybind11/pybind11.h>

#include <new>
#include <tuple>

#include "cpu/isa.h"
#include "cpu/pointers.h"

namespace icrl {
namespace {

namespace py = pybind11;

// sequences, heads, key_heads, k, v, bounds, the dtypes of q, g, beta, dq, gate, normalize, scale, allowance, threads
using Shape = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, Pointer, int, int, int, int, int, bool, float,
                         float, int>;

DeltaShape shape(const Shape& t) {
  DeltaShape s;
  int gate;
  Pointer bounds;
  std::tie(s.sequences, s.heads, s.key_heads, s.k, s.v, bounds, s.dtype, s.gate_dtype, s.beta_dtype,
           s.key_gradient_dtype, gate, s.normalize, s.scale, s.allowance, s.threads) = t;
  s.bounds = static_cast<const int64_t*>(in(bounds));
  s.gate = static_cast<Gate>(gate);
  return s;
}

bool forward(const Shape& t, Pointer q, Pointer k, Pointer v, Pointer g, Pointer beta, Pointer initial, Pointer o,
             Pointer final) {
  const DeltaShape s = shape(t);
  int refused = 0;
  const DeltaForward p{in(q), in(k), in(v), in(g), in(beta), floats(initial), out(o), out_floats(final), &refused};
  if (!ICRL_DISPATCH(delta_forward, s, p)) throw std::bad_alloc();
  return !refused;
}

void backward(const Shape& t, Pointer d_o, Pointer d_final, Pointer q, Pointer k, Pointer v, Pointer g, Pointer beta,
              Pointer initial, Pointer dq, Pointer dk, Pointer dv, Pointer dg, Pointer dbeta, Pointer d_initial) {
  const DeltaShape s = shape(t);
  const DeltaBackward p{in(d_o), in(q),   in(k),   in(v),   in(g),   in(beta),   floats(d_final),      floats(initial),
                        out(dq), out(dk), out(dv), out(dg), out(dbeta), out_floats(d_initial)};
  if (!ICRL_DISPATCH(delta_backward, s, p)) throw std::bad_alloc();
}

bool step(const Shape& t, Pointer q, Pointer k, Pointer v, Pointer g, Pointer beta, Pointer state, Pointer o) {
  const DeltaShape s = shape(t);
  const DeltaStep p{in(q), in(k), in(v), in(g), in(beta), out_floats(state), out(o)};
  return ICRL_DISPATCH(delta_step, s, p);
}

}  // namespace

void bind_gated_delta_rule(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> free_gil;
  m.def("delta_forward", &forward, free_gil);
  m.def("delta_backward", &backward, free_gil);
  m.def("delta_step", &step, free_gil);
}

}  // namespace icrl
