#include "linear_attention/gated_delta_rule.h"

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

// sequences, heads, key_heads, k, v, bounds, the dtypes of q, g, beta, dq, gate, normalize, scale, allowance, threads
using Shape =
    std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, Pointer, int, int, int, int, int, bool, float, float, int>;

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

bool backward(const Shape& t, Pointer d_o, Pointer d_final, Pointer q, Pointer k, Pointer v, Pointer g, Pointer beta,
              Pointer initial, Pointer dq, Pointer dk, Pointer dv, Pointer dg, Pointer dbeta, Pointer d_initial) {
  const DeltaShape s = shape(t);
  int refused = 0;
  const DeltaBackward p{in(d_o),         in(q),   in(k),   in(v),   in(g),   in(beta),   floats(d_final),
                        floats(initial), out(dq), out(dk), out(dv), out(dg), out(dbeta), out_floats(d_initial),
                        &refused};
  if (!ICRL_DISPATCH(delta_backward, s, p)) throw std::bad_alloc();
  return !refused;
}

bool step(const Shape& t, Pointer q, Pointer k, Pointer v, Pointer g, Pointer beta, Pointer state, Pointer o) {
  const DeltaShape s = shape(t);
  const DeltaStep p{in(q), in(k), in(v), in(g), in(beta), out_floats(state), out(o)};
  return ICRL_DISPATCH(delta_step, s, p);
}

// (q, k, v, g, beta, state, normalize, scale, allowance, threads, gradients) -> o, or None as gla's
PyObject* plain_step(PyObject* const* a) {
  StepCall call(a + 7, a[0]);
  const StepTensor &q = call.q, k = call.tensor(a[1]), v = call.tensor(a[2]), g = call.optional(a[3]),
                   beta = call.optional(a[4]), state = call.state(a[5]);
  if (!call.ok || q.dims != 3 || v.dims != 3 || (a[6] != Py_True && a[6] != Py_False)) Py_RETURN_NONE;
  const int64_t B = q.shape[0], Hk = q.shape[1], K = q.shape[2], H = v.shape[1], V = v.shape[2];
  if (H % Hk || !channels(K) || !value_channels(V) || !k.is({B, Hk, K}) || v.shape[0] != B || !state.is({B, H, K, V}) ||
      k.dtype != q.dtype || v.dtype != q.dtype || (beta.data && (!beta.is({B, H}) || !beta.gate_of(q))) ||
      (g.data && (!(g.is({B, H, K}) || g.is({B, H})) || !g.gate_of(q))))
    Py_RETURN_NONE;
  const Gate gate = static_cast<Gate>(g.data ? g.dims - 1 : 0);
  const DeltaShape s{B,           H,
                     Hk,          K,
                     V,           nullptr,
                     q.dtype,     g.dtype,
                     beta.dtype,  0,
                     gate,        a[6] == Py_True,
                     call.scale,  call.allowance,
                     call.threads};
  return call.run(a[2], v, B, H, V, B * H * K * V, {a[5]}, [&](void* o) {
    return ICRL_DISPATCH(delta_step, s,
                         {q.data, k.data, v.data, g.data, beta.data, static_cast<float*>(state.data), o});
  });
}

}  // namespace

void bind_gated_delta_rule(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> free_gil;
  m.def("delta_forward", &forward, free_gil);
  m.def("delta_backward", &backward, free_gil);
  m.def("delta_step", &step, free_gil);
  bind_step<7, plain_step>(m.ptr(), "delta_step_plain");
}

}  // namespace icrl
