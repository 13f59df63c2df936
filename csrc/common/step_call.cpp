#include "common/step_call.h"

#include <cmath>

namespace icrl {
namespace {

// DLPack's C exchange API, version 1 (https://dmlc.github.io/dlpack/latest/c_api.html): what a tensor's class has as
// __dlpack_c_exchange_api__. Declared here as far as it is used.
struct DlTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t dims;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct DlExchange {
  uint32_t major, minor;
  void* previous;
  void *allocate, *from_python, *to_python;
  int (*view)(void* object, DlTensor* out);  // borrows; may be null
  void* stream;
};
constexpr int kDlCpu = 1, kDlInt = 0, kDlUint = 1, kDlFloat = 2, kDlBfloat = 4;
constexpr int kFloat = 0, kBfloat = 1, kHalf = 2;  // as in vec.h

struct Torch {
  PyTypeObject* type = nullptr;  // null: torch has no exchange API, so that nothing is plain
  int (*view)(void*, DlTensor*) = nullptr;
  PyObject *module, *increment_version;
  PyObject *empty, *empty_like, *dtype, *requires_grad, *is_neg, *contiguous;  // names
  PyObject* dtype_only;                                                        // keyword names
};

Torch find_torch() {
  Torch t;
  t.module = PyImport_ImportModule("torch");
  PyObject* type = t.module ? PyObject_GetAttrString(t.module, "Tensor") : nullptr;
  PyObject* capsule = type ? PyObject_GetAttrString(type, "__dlpack_c_exchange_api__") : nullptr;
  void* api = capsule ? PyCapsule_GetPointer(capsule, "dlpack_exchange_api") : nullptr;
  PyObject* graph = api ? PyImport_ImportModule("torch.autograd.graph") : nullptr;
  t.increment_version = graph ? PyObject_GetAttrString(graph, "increment_version") : nullptr;
  PyErr_Clear();  // an older torch lacks some of these
  const DlExchange* exchange = static_cast<const DlExchange*>(api);
  if (!t.increment_version || exchange->major != 1 || !exchange->view) return t;
  t.view = exchange->view;
  t.empty = PyUnicode_InternFromString("empty");
  t.empty_like = PyUnicode_InternFromString("empty_like");
  t.dtype = PyUnicode_InternFromString("dtype");
  t.requires_grad = PyUnicode_InternFromString("requires_grad");
  t.is_neg = PyUnicode_InternFromString("is_neg");
  t.contiguous = PyUnicode_InternFromString("contiguous");
  t.dtype_only = PyTuple_Pack(1, t.dtype);
  t.type = reinterpret_cast<PyTypeObject*>(type);
  return t;
}

const Torch& torch() {
  static Torch found;
  static bool looked = false;  // no static initializer: its guard, held during an import, could wait for the GIL
  if (!looked) found = find_torch(), looked = true;
  return found;
}

// Takes the reference; an exception counts as true, so that the dispatcher sees to it.
bool truth(PyObject* value) {
  const bool result = value != Py_False;
  Py_XDECREF(value);
  PyErr_Clear();
  return result;
}

// `contiguous` false: only that was missing.
bool read(PyObject* object, bool gradients, StepTensor& out, bool& contiguous) {
  contiguous = true;
  const Torch& t = torch();
  if (!t.type || Py_TYPE(object) != t.type) return false;  // a subclass may want to know of every call
  DlTensor view;
  if (t.view(object, &view)) {  // no storage: vmap's tensors, for one
    PyErr_Clear();
    return false;
  }
  if (view.device_type != kDlCpu || view.lanes != 1) return false;
  if (view.code == kDlFloat && view.bits == 32)
    out.dtype = kFloat;
  else if (view.code == kDlBfloat && view.bits == 16)
    out.dtype = kBfloat;
  else if (view.code == kDlFloat && view.bits == 16)
    out.dtype = kHalf;
  else
    return false;
  int64_t size = 1;
  for (int d = view.dims - 1; d >= 0; --d) {
    contiguous = contiguous && (view.shape[d] == 1 || view.strides[d] == size);
    size *= view.shape[d];
  }
  if (!size || !view.data) return false;
  if (gradients && truth(PyObject_GetAttr(object, t.requires_grad))) return false;
  if (truth(PyObject_CallMethodNoArgs(object, t.is_neg))) return false;  // its memory holds the opposite
  out.data = static_cast<char*>(view.data) + view.byte_offset;
  out.shape = view.shape, out.dims = view.dims;
  return contiguous;
}

}  // namespace

void* plain_memory(PyObject* object, Plain kind, int64_t n) {
  const Torch& t = torch();
  if (!t.type || Py_TYPE(object) != t.type) return nullptr;
  DlTensor view;
  if (t.view(object, &view)) {
    PyErr_Clear();
    return nullptr;
  }
  const int code[] = {kDlInt, kDlFloat, kDlUint}, bits[] = {64, 32, 8};
  if (view.device_type != kDlCpu || view.lanes != 1 || view.code != code[kind] || view.bits != bits[kind])
    return nullptr;
  if (view.dims != 1 || view.shape[0] != n || (n != 1 && view.strides[0] != 1) || !view.data) return nullptr;
  if (kind == kPlainFloat && truth(PyObject_CallMethodNoArgs(object, t.is_neg))) return nullptr;
  return static_cast<char*>(view.data) + view.byte_offset;
}

StepCall::StepCall(PyObject* const* options, PyObject* object) {
  gradients = options[3] != Py_False;
  q = tensor(object);
  double value = 0;
  if (options[0] != Py_None)
    value = PyFloat_AsDouble(options[0]);
  else if (ok && q.dims)
    value = 1 / std::sqrt(static_cast<double>(q.shape[q.dims - 1]));
  scale = static_cast<float>(value);
  allowance = static_cast<float>(PyFloat_AsDouble(options[1]));
  threads = static_cast<int>(PyLong_AsLong(options[2]));
  ok = ok && std::isfinite(scale) && !PyErr_Occurred();
  PyErr_Clear();
}

StepCall::~StepCall() {
  for (int i = 0; i < copies; ++i) Py_DECREF(copied[i]);
}

StepTensor StepCall::tensor(PyObject* object) {
  StepTensor result;
  bool contiguous;
  if (!ok || read(object, gradients, result, contiguous)) return result;
  PyObject* copy =
      contiguous || copies == kMostCopies ? nullptr : PyObject_CallMethodNoArgs(object, torch().contiguous);
  PyErr_Clear();
  if (copy) copied[copies++] = copy;
  ok = copy && read(copy, gradients, result, contiguous);
  return result;
}

StepTensor StepCall::optional(PyObject* object) { return object == Py_None ? StepTensor{} : tensor(object); }

StepTensor StepCall::state(PyObject* object) {
  StepTensor result;
  bool contiguous;
  ok = ok && read(object, gradients, result, contiguous) && result.dtype == kFloat;
  return result;
}

PyObject* StepCall::output(PyObject* like, const StepTensor& view, int64_t a, int64_t b, int64_t c, StepTensor& out) {
  const Torch& t = torch();
  bool contiguous;
  if (view.is({a, b, c})) {  // the quicker of the two
    PyObject* f = PyObject_GetAttr(t.module, t.empty_like);
    PyObject* result = f ? PyObject_CallOneArg(f, like) : nullptr;
    Py_XDECREF(f);
    if (!result || read(result, false, out, contiguous)) return result;
    Py_DECREF(result);  // `like` is dense but not contiguous, and so is what is made like it
  }
  PyObject* arguments[] = {PyLong_FromLongLong(a), PyLong_FromLongLong(b), PyLong_FromLongLong(c),
                           PyObject_GetAttr(like, t.dtype)};
  PyObject* f = PyObject_GetAttr(t.module, t.empty);
  bool have = f;
  for (PyObject* x : arguments) have = have && x;
  PyObject* result = have ? PyObject_Vectorcall(f, arguments, 3, t.dtype_only) : nullptr;
  Py_XDECREF(f);
  for (PyObject* x : arguments) Py_XDECREF(x);
  if (result && !read(result, false, out, contiguous)) Py_CLEAR(result);  // a transform's wrapper
  return result;
}

PyObject* StepCall::told(PyObject* o, std::initializer_list<PyObject*> written) {
  for (PyObject* tensor : written) {
    PyObject* none = o ? PyObject_CallOneArg(torch().increment_version, tensor) : nullptr;
    if (!none) Py_CLEAR(o);
    Py_XDECREF(none);
  }
  return o;
}

}  // namespace icrl
