// A program of fused ops over one batch, its tensors bound to addresses. Nothing that it is given can make a run read
// or write outside its buffers, weights and tensors: all of that is judged when it is built.
#pragma once

#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "fused/program.h"

namespace icrl {

using ViewGiven = std::tuple<int64_t, int64_t, int64_t>;  // buffer, column, width
using BufferGiven = std::tuple<int64_t, int64_t>;         // rows, width
// name, bytes a context, optional, given with each call, and of indices what they are below (0: no indices)
using TensorGiven = std::tuple<std::string, int64_t, bool, bool, int64_t>;
using OpGiven = std::tuple<std::string, ViewGiven, ViewGiven, ViewGiven, std::vector<ViewGiven>, std::vector<int64_t>,
                           std::vector<int64_t>, std::vector<int64_t>, std::vector<double>>;

class FusedProgram {
 public:
  FusedProgram(const std::vector<BufferGiven>& buffers, const std::vector<TensorGiven>& tensors,
               const std::vector<OpGiven>& ops, uintptr_t weights, int64_t weight_floats, int64_t batch, int64_t group);
  FusedProgram(const FusedProgram&) = delete;
  FusedProgram& operator=(const FusedProgram&) = delete;

  void bind(int64_t tensor, uintptr_t address);
  void set(int64_t tensor, float value);  // of one that is_number
  bool is_number(int64_t of_a_call) const { return !tensors_[static_cast<size_t>(of_a_call)].bytes; }
  int64_t bytes(int64_t tensor) const { return tensors_[static_cast<size_t>(tensor)].bytes; }  // a context
  const std::vector<int64_t>& of_a_call() const { return of_a_call_; }  // tensors that are given with each call
  void run(int threads) const;  // by at most so many threads, where that is worth it

  // What a loop over several steps needs: contexts of different groups do not meet, so that each group may be at a step
  // of its own, with the addresses of that step.
  void require_bound() const;
  int64_t batch() const { return batch_; }
  int64_t groups() const { return (batch_ + plan_.group - 1) / plan_.group; }
  bool long_run() const;                       // whether the interpreter's lock is worth giving up for it
  int team(int threads, int64_t steps) const;  // threads that so many steps are worth
  float* scratch() const;                      // of the calling thread
  FusedGroup group(int64_t i, const FusedPlan& plan, float* scratch) const;
  const FusedPlan& plan() const { return plan_; }
  const std::vector<void*>& addresses() const { return addresses_; }
  void judge_indices(const FusedPlan& plan, int64_t first, int64_t contexts) const;
  void run_group(const FusedGroup& g) const;

 private:
  int64_t batch_, scratch_floats_ = 0;
  std::vector<FusedBuffer> buffers_;
  std::vector<FusedTensor> tensors_;
  std::vector<void*> addresses_;
  std::vector<float> numbers_;  // what `set` was given
  std::vector<FusedOp> ops_;
  std::vector<int64_t> of_a_call_, indices_;
  std::vector<std::string> names_;
  FusedPlan plan_;
  void add(const OpGiven& op);
  double nanoseconds() const;  // about, of a step by one thread
};

}  // namespace icrl
