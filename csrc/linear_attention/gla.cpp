#include "linear_attention/gla.h"

#include <pybind11/pybind11.h>

#include <new>
#include <tuple>

#include "common/isa.h"
#include "common/pointers.h"
#include "common/step_call.h"
#include "linear_attention/limits.h"

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

bool backward(const Shape& t, Pointer d_o, Pointer d_final, Pointer q, Pointer k, Pointer v, Pointer g, Pointer initial,
              Pointer dq, Pointer dk, Pointer dv, Pointer dg, Pointer d_initial) {
  const GlaShape s = shape(t);
  int refused = 0;
  const GlaBackward p{in(d_o),         in(q),   in(k),   in(v),   in(g),   floats(d_final),
                      floats(initial), out(dq), out(dk), out(dv), out(dg), out_floats(d_initial),
                      &refused};
  if (!ICRL_DISPATCH(gla_backward, s, p)) throw std::bad_alloc();
  return !refused;
}

bool step(const Shape& t, Pointer q, Pointer k, Pointer v, Pointer g, Pointer state, Pointer o) {
  const GlaShape s = shape(t);
  const GlaStep p{in(q), in(k), in(v), in(g), out_floats(state), out(o)};
  return ICRL_DISPATCH(gla_step, s, p);
}

// (q, k, v, g, state, scale, allowance, threads, gradients) -> o, or None where the dispatcher is to serve or refuse
PyObject* plain_step(PyObject* const* a) {
  StepCall call(a + 5, a[0]);
  const StepTensor &q = call.q, k = call.tensor(a[1]), v = call.tensor(a[2]), g = call.optional(a[3]),
                   state = call.state(a[4]);
  if (!call.ok || q.dims != 3 || v.dims != 3) Py_RETURN_NONE;
  const int64_t B = q.shape[0], H = q.shape[1], K = q.shape[2], Hk = v.shape[1], V = v.shape[2];
  if (H % Hk || !channels(K) || !value_channels(V) || !k.is({B, Hk, K}) || !v.is({B, Hk, V}) ||
      !state.is({B, Hk, K, V}) || k.dtype != q.dtype || v.dtype != q.dtype ||
      (g.data && (!(g.is({B, Hk, K}) || g.is({B, Hk})) || !g.gate_of(q))))
    Py_RETURN_NONE;
  const Gate gate = static_cast<Gate>(g.data ? g.dims - 1 : 0);
  const GlaShape s{B, H, Hk, K, V, nullptr, q.dtype, g.dtype, gate, call.scale, call.allowance, call.threads};
  return call.run(a[2], v, B, H, V, B * Hk * K * V, {a[4]}, [&](void* o) {
    return ICRL_DISPATCH(gla_step, s, {q.data, k.data, v.data, g.data, static_cast<float*>(state.data), o});
  });
}

}  // namespace

void bind_gla(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> free_gil;
  m.def("gla_forward", &forward, free_gil);
  m.def("gla_backward", &backward, free_gil);
  m.def("gla_step", &step, free_gil);
  bind_step<5, plain_step>(m.ptr(), "gla_step_plain");
}

}  // namespace icrl
