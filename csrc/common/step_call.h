// A step's tensors read straight from their Python objects: a step of one sequence computes for a microsecond, and
// torch's dispatcher takes six to call Python. What is not plain (a dense CPU tensor of a type that the kernels serve,
// without a gradient) is left to the dispatcher, whose Python side says what is wrong or makes it right.
#pragma once

#include <Python.h>

#include <cstdint>
#include <initializer_list>

namespace icrl {

struct StepTensor {
  void* data = nullptr;  // null: None
  const int64_t* shape = nullptr;
  int dims = 0, dtype = 0;  // a code of vec.h

  bool is(std::initializer_list<int64_t> wanted) const {
    if (dims != static_cast<int>(wanted.size())) return false;
    const int64_t* at = shape;
    for (int64_t size : wanted)
      if (*at++ != size) return false;
    return true;
  }
  bool gate_of(const StepTensor& inputs) const { return dtype == 0 || dtype == inputs.dtype; }
};

// The memory of a plain tensor [n] of integers (kPlainInt), float32 (kPlainFloat) or bytes (kPlainByte); null for
// anything else.
enum Plain { kPlainInt, kPlainFloat, kPlainByte };
void* plain_memory(PyObject* object, Plain kind, int64_t n);

// One call: the tensors are read one by one, and `ok` is false from the first on that is not plain.
struct StepCall {
  bool ok = true;
  StepTensor q;  // the first tensor
  float scale, allowance;
  int threads;

  // options: scale (None: K^-1/2), the gates' allowance, threads, whether gradients are on
  StepCall(PyObject* const* options, PyObject* first);
  ~StepCall();
  StepTensor tensor(PyObject* object);    // copied where it is not contiguous
  StepTensor optional(PyObject* object);  // a tensor or None
  StepTensor state(PyObject* object);     // float32, to be written to

  // kernel(o) with o [a, b, c] of `like`'s dtype; false where a gate is refused. Returns o, with autograd told what was
  // written; None where the gate was refused, so that the dispatcher's call refuses it; or null and an exception.
  template <class F>
  PyObject* run(PyObject* like, const StepTensor& view, int64_t a, int64_t b, int64_t c, int64_t state_size,
                std::initializer_list<PyObject*> written, F&& kernel) {
    StepTensor out;
    PyObject* o = output(like, view, a, b, c, out);
    if (!o && PyErr_Occurred()) return nullptr;
    if (!o) Py_RETURN_NONE;
    PyThreadState* others = state_size >= 1 << 17 ? PyEval_SaveThread() : nullptr;  // the others' turn, where it pays
    const bool served = kernel(out.data);
    if (others) PyEval_RestoreThread(others);
    if (served) return told(o, written);
    Py_DECREF(o);
    Py_RETURN_NONE;
  }

 private:
  static constexpr int kMostCopies = 8;
  bool gradients;
  int copies = 0;
  PyObject* copied[kMostCopies];
  static PyObject* output(PyObject* like, const StepTensor& view, int64_t a, int64_t b, int64_t c, StepTensor& out);
  static PyObject* told(PyObject* o, std::initializer_list<PyObject*> written);
};

// `step` as the module's function `name` of N tensors or flags and the four options.
template <int N, PyObject* (*step)(PyObject* const*)>
PyObject* step_entry(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count == N + 4) return step(arguments);
  PyErr_Format(PyExc_TypeError, "wanted %d arguments, got %zd", N + 4, count);
  return nullptr;
}

template <int N, PyObject* (*step)(PyObject* const*)>
void bind_step(PyObject* module, const char* name) {
  static PyMethodDef method;  // the module keeps its address
  method = {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&step_entry<N, step>)), METH_FASTCALL, nullptr};
  PyModule_AddObject(module, name, PyCFunction_New(&method, nullptr));
}

}  // namespace icrl
