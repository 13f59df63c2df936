// Programs of fused ops: built and judged once, then run, a group of contexts after the other or side by side.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>

#include "common/isa.h"
#include "common/parallel.h"
#include "common/step_call.h"
#include "fused/fused_program.h"

namespace icrl {
namespace {

namespace py = pybind11;

// Of any size, so that none of their products overflows what is kept of them.
constexpr int64_t kMost = int64_t{1} << 40;
constexpr double kWeightNanoseconds = 0.03;  // about what a weight takes for a context

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument(what); }

const FusedKind* find_kind(const std::string& name) {
  for (const FusedKind* table : {ICRL_DISPATCH(fused_layers), ICRL_DISPATCH(fused_memories),
                                 ICRL_DISPATCH(fused_mixers), ICRL_DISPATCH(fused_tokens)})
    for (const FusedKind* kind = table; kind->name; ++kind)
      if (name == kind->name) return kind;
  return nullptr;
}

// A thread's activations: of whatever program ran last, so that an op reads what an op of its own program wrote.
float* thread_scratch(int64_t floats) {
  struct Memory {
    float* at = nullptr;
    int64_t floats = 0;
    ~Memory() { std::free(at); }
  };
  static thread_local Memory memory;
  if (memory.floats < floats) {
    std::free(memory.at);
    memory.floats = 0;
    const int64_t bytes = (4 * floats + 63) / 64 * 64;
    memory.at = static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(bytes)));
    if (!memory.at) throw std::bad_alloc();
    std::memset(memory.at, 0, static_cast<size_t>(bytes));
    memory.floats = floats;
  }
  return memory.at;
}

}  // namespace

FusedProgram::FusedProgram(const std::vector<BufferGiven>& buffers, const std::vector<TensorGiven>& tensors,
                           const std::vector<OpGiven>& ops, uintptr_t weights, int64_t weight_floats, int64_t batch,
                           int64_t group)
    : batch_(batch) {
  if (batch < 1 || batch > kMost) refuse("batch: wanted at least 1, got " + std::to_string(batch));
  if (group < 1) refuse("group: wanted at least 1, got " + std::to_string(group));
  if (weights % 64) refuse("weights: wanted at an address that 64 divides");
  if (weight_floats < 0) refuse("weights: wanted at least 0 of them");
  if (group > batch) group = batch;
  int64_t floats = 0;
  for (const auto& [rows, width] : buffers) {
    if (rows < 1 || width < 1 || rows > INT32_MAX || width > INT32_MAX)
      refuse("buffer " + std::to_string(buffers_.size()) + ": wanted at least a row and a column");
    const int64_t stride = (width + 15) / 16 * 16;
    buffers_.push_back({rows, width, stride, floats});
    floats += rows * stride;
    if (floats > kMost / group) refuse("buffers: they do not fit into memory");
  }
  for (const auto& [name, bytes, optional, of_a_call, below] : tensors) {
    if (bytes < 0 || bytes > kMost) refuse(name + ": wanted a size, got " + std::to_string(bytes));
    if (below < 0 || (below && (bytes != 8 || optional))) refuse(name + ": wanted indices of int64, one a context");
    const auto at = static_cast<int64_t>(tensors_.size());
    if (of_a_call && !bytes && optional) refuse(name + ": wanted a number, which is not optional");
    if (of_a_call) of_a_call_.push_back(at);
    if (below) indices_.push_back(at);
    tensors_.push_back({bytes, optional, below}), names_.push_back(name);
  }
  addresses_.assign(tensors.size(), nullptr), numbers_.assign(tensors.size(), 0.f);
  plan_ = {buffers_.data(),   tensors_.data(),
           addresses_.data(), reinterpret_cast<const float*>(weights),
           weight_floats,     group};
  scratch_floats_ = floats * group;
  for (const OpGiven& given : ops) add(given);
}

void FusedProgram::add(const OpGiven& given) {
  const auto& [name, in, out, side, more, tensors, weights, sizes, numbers] = given;
  const std::string here = "op " + std::to_string(ops_.size()) + " (" + name + "): ";
  const FusedKind* kind = find_kind(name);
  if (!kind) refuse(here + "there is no such kind");
  FusedOp op{};
  op.run = kind->run;
  const auto view = [&](const ViewGiven& v) {
    const auto& [buffer, column, width] = v;
    if (buffer < 0) return FusedView{-1, 0, 0};
    if (buffer >= static_cast<int64_t>(buffers_.size())) refuse(here + "there is no buffer " + std::to_string(buffer));
    const int64_t most = buffers_[static_cast<size_t>(buffer)].width;
    if (column < 0 || width < 1 || column > most || width > most - column)
      refuse(here + "columns " + std::to_string(column) + " to " + std::to_string(column + width) +
             " are not of buffer " + std::to_string(buffer));
    return FusedView{static_cast<int32_t>(buffer), static_cast<int32_t>(column), static_cast<int32_t>(width)};
  };
  op.in = view(in), op.out = view(out), op.side = view(side);
  if (more.size() > kFusedViews) refuse(here + "too many views");
  for (size_t i = 0; i < kFusedViews; ++i) op.more[i] = i < more.size() ? view(more[i]) : FusedView{-1, 0, 0};
  const auto copy = [&](const auto& from, auto& to, const char* what, auto rest) {
    constexpr size_t n = sizeof(to) / sizeof(to[0]);
    if (from.size() > n) refuse(here + "too many " + what);
    for (size_t i = 0; i < n; ++i) to[i] = i < from.size() ? static_cast<std::decay_t<decltype(to[0])>>(from[i]) : rest;
  };
  for (int64_t at : tensors)
    if (at < -1 || at >= static_cast<int64_t>(tensors_.size()))
      refuse(here + "there is no tensor " + std::to_string(at));
  for (int64_t at : weights)
    if (at < -1 || at > plan_.weight_floats) refuse(here + "weights from " + std::to_string(at) + " on are not there");
  for (int64_t size : sizes)
    if (size < 0 || size > INT32_MAX) refuse(here + "wanted sizes of 0 to 2^31-1, got " + std::to_string(size));
  copy(tensors, op.tensors, "tensors", -1), copy(weights, op.weights, "weights", int64_t{-1});
  copy(sizes, op.sizes, "sizes", int64_t{0}), copy(numbers, op.numbers, "numbers", 0.f);
  if (const char* wrong = kind->check(plan_, op)) refuse(here + wrong);
  ops_.push_back(op);
}

void FusedProgram::bind(int64_t tensor, uintptr_t address) {
  if (tensor < 0 || tensor >= static_cast<int64_t>(tensors_.size()))
    refuse("there is no tensor " + std::to_string(tensor));
  addresses_[static_cast<size_t>(tensor)] = reinterpret_cast<void*>(address);
}

void FusedProgram::set(int64_t tensor, float value) {
  const auto at = static_cast<size_t>(tensor);
  numbers_[at] = value, addresses_[at] = &numbers_[at];
}

void FusedProgram::require_bound() const {
  for (size_t i = 0; i < tensors_.size(); ++i)
    if (!addresses_[i] && !tensors_[i].optional) refuse(names_[i] + ": is not bound");
}

void FusedProgram::judge_indices(const FusedPlan& plan, int64_t first, int64_t contexts) const {
  for (int64_t i : indices_) {
    const auto at = static_cast<size_t>(i);
    const int64_t *from = static_cast<const int64_t*>(plan.addresses[at]) + first, below = tensors_[at].below;
    uint64_t most = 0;  // what is below 0 is beyond all that may be
    for (int64_t c = 0; c < contexts; ++c) most = std::max(most, static_cast<uint64_t>(from[c]));
    if (most < static_cast<uint64_t>(below)) continue;
    const auto [least, largest] = std::minmax_element(from, from + contexts);
    refuse(names_[at] + ": wanted 0 to " + std::to_string(below - 1) + ", got " + std::to_string(*least) + " to " +
           std::to_string(*largest));
  }
}

FusedGroup FusedProgram::group(int64_t i, const FusedPlan& plan, float* scratch) const {
  const int64_t first = i * plan.group, left = batch_ - first;
  return {plan, first, left < plan.group ? left : plan.group, scratch};
}

void FusedProgram::run_group(const FusedGroup& g) const {
  for (const FusedOp& op : ops_) op.run(g, op);
}

float* FusedProgram::scratch() const { return thread_scratch(scratch_floats_); }

double FusedProgram::nanoseconds() const {
  return kWeightNanoseconds * static_cast<double>(plan_.weight_floats) * static_cast<double>(batch_);
}
bool FusedProgram::long_run() const { return nanoseconds() > 1e5; }
int FusedProgram::team(int threads, int64_t steps) const {
  return team_for(nanoseconds() * static_cast<double>(steps), threads);
}

void FusedProgram::run(int threads) const {
  require_bound();
  judge_indices(plan_, 0, batch_);
  parallel_for(groups(), threads > 1 ? team(threads, 1) : 1,
               [this](int64_t i) { run_group(group(i, plan_, scratch())); });
}

namespace {

// values: an address, or the number that it is, for each tensor that is given with each call, in their order
void run(FusedProgram& program, int threads, const py::args& values) {
  const auto& tensors = program.of_a_call();
  if (values.size() != tensors.size()) refuse("wanted " + std::to_string(tensors.size()) + " tensors with the call");
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (program.is_number(tensors[i]))
      program.set(tensors[i], values[i].cast<float>());
    else
      program.bind(tensors[i], values[i].cast<uintptr_t>());
  }
  if (program.long_run()) {
    const py::gil_scoped_release free_gil;
    program.run(threads);
  } else {
    program.run(threads);
  }
}

// The address of n numbers of a plain tensor, 0 for another.
uintptr_t plain_integers(const py::handle& tensor, int64_t n) {
  return reinterpret_cast<uintptr_t>(plain_memory(tensor.ptr(), kPlainInt, n));
}

// The addresses of n plain rewards and ends; None where they are none, a reward is not finite or beyond `most` in size,
// or an end none of 0, 1 and 2.
py::object plain_outcome(const py::handle& reward, const py::handle& done, int64_t n, float most) {
  const auto* r = static_cast<const float*>(plain_memory(reward.ptr(), kPlainFloat, n));
  const auto* d = static_cast<const uint8_t*>(plain_memory(done.ptr(), kPlainByte, n));
  if (!r || !d) return py::none();
  for (int64_t i = 0; i < n; ++i)
    if (!(r[i] <= most && -r[i] <= most) || d[i] > 2) return py::none();
  return py::make_tuple(reinterpret_cast<uintptr_t>(r), reinterpret_cast<uintptr_t>(d));
}

}  // namespace

void bind_fused_program(py::module_& m) {
  m.def("plain_integers", &plain_integers), m.def("plain_outcome", &plain_outcome);
  py::class_<FusedProgram>(m, "FusedProgram")
      .def(py::init<const std::vector<BufferGiven>&, const std::vector<TensorGiven>&, const std::vector<OpGiven>&,
                    uintptr_t, int64_t, int64_t, int64_t>())
      .def("bind", &FusedProgram::bind)
      .def("run", &run);
}

}  // namespace icrl
