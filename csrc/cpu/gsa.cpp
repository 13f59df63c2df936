#include "cpu/gsa.h"

#include <pybind11/pybind11.h>

#include <new>
#include <tuple>

#include "cpu/isa.h"
#include "cpu/pointers.h"

namespace icrl {
namespace {

namespace py = pybind11;
// sequences, heads, kv_heads, k, v, slots, bounds, dtype, gate dtype, gate, scale, allowance, threads
using Shape = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, Pointer, int, int, int, float, float, int>;

GsaShape shape(const Shape& t) {
  GsaShape s;
  int gate;
  Pointer bounds;
  std::tie(s.sequences, s.heads, s.kv_heads, s.k, s.v, s.slots, bounds, s.dtype, s.gate_dtype, gate, s.scale,
           s.allowance, s.threads) = t;
  s.bounds = static_cast<const int64_t*>(in(bounds));
  s.gate = static_cast<Gate>(gate);
  return s;
}

bool forward(const Shape& t, Pointer q, Pointer k, Pointer v, Pointer s, Pointer g, Pointer initial_keys,
             Pointer initial_values, Pointer o, Pointer final_keys, Pointer final_values) {
  int refused = 0;
  const GsaForward p{in(q), in(k), in(v), in(s), in(g), floats(initial_keys), floats(initial_values),
                     out(o), out_floats(final_keys), out_floats(final_values), &refused};
  if (!ICRL_DISPATCH(gsa_forward, shape(t), p)) throw std::bad_alloc();
  return !refused;
}

void backward(const Shape& t, Pointer d_o, Pointer d_final_keys, Pointer d_final_values, Pointer q, Pointer k, Pointer v,
              Pointer s, Pointer g, Pointer initial_keys, Pointer initial_values, Pointer dq, Pointer dk, Pointer dv,
              Pointer ds, Pointer dg, Pointer d_initial_keys, Pointer d_initial_values) {
  const GsaBackward p{in(d_o), in(q), in(k), in(v), in(s), in(g),
                      floats(d_final_keys), floats(d_final_values), floats(initial_keys), floats(initial_values),
                      out(dq), out(dk), out(dv), out(ds), out(dg),
                      out_floats(d_initial_keys), out_floats(d_initial_values)};
  if (!ICRL_DISPATCH(gsa_backward, shape(t), p)) throw std::bad_alloc();
}

bool step(const Shape& t, Pointer q, Pointer k, Pointer v, Pointer s, Pointer g, Pointer keys, Pointer values,
          Pointer o) {
  const GsaStep p{in(q), in(k), in(v), in(s), in(g), out_floats(keys), out_floats(values), out(o)};
  return ICRL_DISPATCH(gsa_step, shape(t), p);
}

}  // namespace

void bind_gsa(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> free_gil;
  m.def("gsa_forward", &forward, free_gil);
  m.def("gsa_backward", &backward, free_gil);
  m.def("gsa_step", &step, free_gil);
}

}  // namespace icrl
