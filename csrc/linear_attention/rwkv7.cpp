#include "linear_attention/rwkv7.h"

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

// sequences, heads, k, v, bounds, the dtypes of r and w, scale, allowance, threads
using Shape = std::tuple<int64_t, int64_t, int64_t, int64_t, Pointer, int, int, float, float, int>;

RwkvShape shape(const Shape& t) {
  RwkvShape s;
  Pointer bounds;
  std::tie(s.sequences, s.heads, s.k, s.v, bounds, s.dtype, s.gate_dtype, s.scale, s.allowance, s.threads) = t;
  s.bounds = static_cast<const int64_t*>(in(bounds));
  return s;
}

bool forward(const Shape& t, Pointer r, Pointer w, Pointer k, Pointer v, Pointer a, Pointer b, Pointer initial,
             Pointer o, Pointer final) {
  const RwkvShape s = shape(t);
  int refused = 0;
  const RwkvForward p{in(r), in(w), in(k), in(v), in(a), in(b), floats(initial), out(o), out_floats(final), &refused};
  if (!ICRL_DISPATCH(rwkv7_forward, s, p)) throw std::bad_alloc();
  return !refused;
}

bool backward(const Shape& t, Pointer d_o, Pointer d_final, Pointer r, Pointer w, Pointer k, Pointer v, Pointer a,
              Pointer b, Pointer initial, Pointer dr, Pointer dw, Pointer dk, Pointer dv, Pointer da, Pointer db,
              Pointer d_initial) {
  const RwkvShape s = shape(t);
  int refused = 0;
  const RwkvBackward p{in(d_o),         in(r),   in(w),   in(k),   in(v),   in(a),   in(b),   floats(d_final),
                       floats(initial), out(dr), out(dw), out(dk), out(dv), out(da), out(db), out_floats(d_initial),
                       &refused};
  if (!ICRL_DISPATCH(rwkv7_backward, s, p)) throw std::bad_alloc();
  return !refused;
}

bool step(const Shape& t, Pointer r, Pointer w, Pointer k, Pointer v, Pointer a, Pointer b, Pointer state, Pointer o) {
  const RwkvShape s = shape(t);
  const RwkvStep p{in(r), in(w), in(k), in(v), in(a), in(b), out_floats(state), out(o)};
  return ICRL_DISPATCH(rwkv7_step, s, p);
}

// (r, w, k, v, a, b, state, scale, allowance, threads, gradients) -> o, or None as gla's
PyObject* plain_step(PyObject* const* x) {
  StepCall call(x + 7, x[0]);
  const StepTensor &r = call.q, w = call.tensor(x[1]), k = call.tensor(x[2]), v = call.tensor(x[3]),
                   a = call.tensor(x[4]), b = call.tensor(x[5]), state = call.state(x[6]);
  if (!call.ok || r.dims != 3 || v.dims != 3) Py_RETURN_NONE;
  const int64_t B = r.shape[0], H = r.shape[1], K = r.shape[2], V = v.shape[2];
  for (const StepTensor* t : {&w, &k, &a, &b})
    if (!t->is({B, H, K}) || (t == &w ? !w.gate_of(r) : t->dtype != r.dtype)) Py_RETURN_NONE;
  if (!channels(K) || !value_channels(V) || !v.is({B, H, V}) || v.dtype != r.dtype || !state.is({B, H, K, V}))
    Py_RETURN_NONE;
  const RwkvShape s{B, H, K, V, nullptr, r.dtype, w.dtype, call.scale, call.allowance, call.threads};
  return call.run(x[3], v, B, H, V, B * H * K * V, {x[6]}, [&](void* o) {
    return ICRL_DISPATCH(rwkv7_step, s,
                         {r.data, w.data, k.data, v.data, a.data, b.data, static_cast<float*>(state.data), o});
  });
}

}  // namespace

void bind_rwkv7(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> free_gil;
  m.def("rwkv7_forward", &forward, free_gil);
  m.def("rwkv7_backward", &backward, free_gil);
  m.def("rwkv7_step", &step, free_gil);
  bind_step<7, plain_step>(m.ptr(), "rwkv7_step_plain");
}

}  // namespace icrl
