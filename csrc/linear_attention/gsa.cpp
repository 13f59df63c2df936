#include "linear_attention/gsa.h"

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
// sequences, heads, kv_heads, k, v, slots, bounds, dtype, gate dtype, gate, scale, allowance, threads
using Shape =
    std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, Pointer, int, int, int, float, float, int>;

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
  const GsaForward p{in(q),
                     in(k),
                     in(v),
                     in(s),
                     in(g),
                     floats(initial_keys),
                     floats(initial_values),
                     out(o),
                     out_floats(final_keys),
                     out_floats(final_values),
                     &refused};
  if (!ICRL_DISPATCH(gsa_forward, shape(t), p)) throw std::bad_alloc();
  return !refused;
}

bool backward(const Shape& t, Pointer d_o, Pointer d_final_keys, Pointer d_final_values, Pointer q, Pointer k,
              Pointer v, Pointer s, Pointer g, Pointer initial_keys, Pointer initial_values, Pointer dq, Pointer dk,
              Pointer dv, Pointer ds, Pointer dg, Pointer d_initial_keys, Pointer d_initial_values) {
  int refused = 0;
  const GsaBackward p{in(d_o),
                      in(q),
                      in(k),
                      in(v),
                      in(s),
                      in(g),
                      floats(d_final_keys),
                      floats(d_final_values),
                      floats(initial_keys),
                      floats(initial_values),
                      out(dq),
                      out(dk),
                      out(dv),
                      out(ds),
                      out(dg),
                      out_floats(d_initial_keys),
                      out_floats(d_initial_values),
                      &refused};
  if (!ICRL_DISPATCH(gsa_backward, shape(t), p)) throw std::bad_alloc();
  return !refused;
}

bool step(const Shape& t, Pointer q, Pointer k, Pointer v, Pointer s, Pointer g, Pointer keys, Pointer values,
          Pointer o) {
  const GsaStep p{in(q), in(k), in(v), in(s), in(g), out_floats(keys), out_floats(values), out(o)};
  return ICRL_DISPATCH(gsa_step, shape(t), p);
}

// (q, k, v, s, g, keys, values, scale, allowance, threads, gradients) -> o, or None as gla's
PyObject* plain_step(PyObject* const* a) {
  StepCall call(a + 7, a[0]);
  const StepTensor &q = call.q, k = call.tensor(a[1]), v = call.tensor(a[2]), w = call.tensor(a[3]),
                   g = call.optional(a[4]), keys = call.state(a[5]), values = call.state(a[6]);
  if (!call.ok || q.dims != 3 || v.dims != 3 || w.dims != 3) Py_RETURN_NONE;
  const int64_t B = q.shape[0], H = q.shape[1], K = q.shape[2], Hk = v.shape[1], V = v.shape[2], M = w.shape[2];
  if (H % Hk || !channels(K) || !value_channels(V) || !channels(M) || !k.is({B, Hk, K}) || v.shape[0] != B ||
      !w.is({B, Hk, M}) || !keys.is({B, Hk, K, M}) || !values.is({B, Hk, M, V}) || k.dtype != q.dtype ||
      v.dtype != q.dtype || w.dtype != q.dtype || (g.data && (!g.is({B, Hk, M}) || !g.gate_of(q))))
    Py_RETURN_NONE;
  const Gate gate = g.data ? Gate::channel : Gate::none;
  const GsaShape s{B, H, Hk, K, V, M, nullptr, q.dtype, g.dtype, gate, call.scale, call.allowance, call.threads};
  return call.run(a[2], v, B, H, V, B * Hk * M * (K + V), {a[5], a[6]}, [&](void* o) {
    return ICRL_DISPATCH(
        gsa_step, s,
        {q.data, k.data, v.data, w.data, g.data, static_cast<float*>(keys.data), static_cast<float*>(values.data), o});
  });
}

}  // namespace

void bind_gsa(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> free_gil;
  m.def("gsa_forward", &forward, free_gil);
  m.def("gsa_backward", &backward, free_gil);
  m.def("gsa_step", &step, free_gil);
  bind_step<7, plain_step>(m.ptr(), "gsa_step_plain");
}

}  // namespace icrl
