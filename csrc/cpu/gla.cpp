#include "cpu/gla.h"

#include <pybind11/pybind11.h>

#include <new>
#include <tuple>

#include "cpu/isa.h"
#include "cpu/pointers.h"

namespace icrl {
namespace {

namespace py = pybind11;

// sequences, heads, kv_heads, k, v, bounds, dtype, gate dtype, gate, scale, allowance, threads
using Shape = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, Pointer, int, int, int, float, float, int>;

GlaShape shape(const Shape& t) {
  GlaShape s;
  int gate;
  Pointer bounds;
  std::tie(s.sequences, s.heads, s.kv_heads, s.k, s.v, bounds, s.dtype, s.gate_dtype, gate, s.scale, s.allowance,
           s.threads) = t;
  s.bounds = static_cast<const int64_t*>(in(bounds));
  s.gate = static_cast<Gate>(gate);
  return s;
}

bool forward(const Shape& t, Pointer q, Pointer k, Pointer v, Pointer g, Pointer initial, Pointer o, Pointer final) {
  const GlaShape s = shape(t);
  int refused = 0;
  const GlaForward p{in(q), in(k), in(v), in(g), floats(initial), out(o), out_floats(final), &refused};
  if (!ICRL_DISPATCH(gla_forward, s, p)) throw std::bad_alloc();
  return !refused;
}

void backward(const Shape& t, Pointer d_o, Pointer d_final, Pointer q, Pointer k, Pointer v, Pointer g, Pointer initial,
              Pointer dq, Pointer dk, Pointer dv, Pointer dg, Pointer d_initial) {
  const GlaShape s = shape(t);
  const GlaBackward p{in(d_o), in(q),   in(k),   in(v),   in(g),   floats(d_final),      floats(initial),
                      out(dq), out(dk), out(dv), out(dg), out_floats(d_initial)};
  if (!ICRL_DISPATCH(gla_backward, s, p)) throw std::bad_alloc();
}

bool step(const Shape& t, Pointer q, Pointer k, Pointer v, Pointer g, Pointer state, Pointer o) {
  const GlaShape s = shape(t);
  const GlaStep p{in(q), in(k), in(v), in(g), out_floats(state), out(o)};
  return ICRL_DISPATCH(gla_step, s, p);
}

}  // namespace

void bind_gla(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> free_gil;
  m.def("gla_forward", &forward, free_gil);
  m.def("gla_backward", &backward, free_gil);
  m.def("gla_step", &step, free_gil);
}

}  // namespace icrl
