// A program of fused layer ops: one token of a model for a batch of contexts in one call. It knows no model: ops are
// written by icrl_kernels/fused/program.py, from modules.
//
//   context    one sequence: it reads and writes its own rows of every buffer, and its own part of every tensor
//   group      contexts that go through all ops together, so that activations stay in the caches and a weight is read
//              once for all of them
//   buffer     activations: `rows` rows a context of `width` floats, rows `stride` apart (a multiple of 16). Those of a
//              group lie one behind the other, context by context, from scratch + offset * group on
//   view       columns [column, column + width) of all rows of a buffer; buffer -1: none
//   tensor     the user's memory, `bytes` of it a context (0: shared by all contexts)
//   weights    all packed weights, one array of floats; an op names offsets into it, -1: none
//
// What stands here is plain data: its functions would be compiled for one instruction set and used by another.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace icrl {

struct FusedView {
  int32_t buffer, column, width;
};

struct FusedBuffer {
  int64_t rows, width, stride, offset;
};

struct FusedTensor {
  int64_t bytes;
  bool optional;  // whether its address may be null
  int64_t below;  // of indices, which are int64, one a context: they are at least 0 and less than this; 0: no indices
};

struct FusedPlan {
  const FusedBuffer* buffers;
  const FusedTensor* tensors;
  void* const* addresses;  // of the tensors' first contexts
  const float* weights;
  int64_t weight_floats, group;
};

struct FusedGroup {
  const FusedPlan& plan;
  int64_t first, contexts;  // contexts [first, first + contexts)
  float* scratch;
};

constexpr int kFusedTensors = 16, kFusedWeights = 4, kFusedSizes = 8, kFusedNumbers = 4, kFusedViews = 4;

struct FusedOp {
  void (*run)(const FusedGroup& g, const FusedOp& o);
  FusedView in, out, side, more[kFusedViews];
  int32_t tensors[kFusedTensors];  // -1: none
  int64_t weights[kFusedWeights], sizes[kFusedSizes];
  float numbers[kFusedNumbers];
};

// What an op of this name does. `check` says in a few words what is wrong with an op, null if nothing: views, tensors
// and offsets that an op names are in range when it is asked, and what it lets pass reads and writes nothing else.
struct FusedKind {
  const char* name;  // null ends a table
  const char* (*check)(const FusedPlan& p, const FusedOp& o);
  void (*run)(const FusedGroup& g, const FusedOp& o);
};

// Tables of kinds, a source file each.
#define ICRL_FUSED_ENTRIES           \
  const FusedKind* fused_layers();   \
  const FusedKind* fused_memories(); \
  const FusedKind* fused_mixers();   \
  const FusedKind* fused_tokens();
ICRL_IN_EACH_ISA(ICRL_FUSED_ENTRIES)
#undef ICRL_FUSED_ENTRIES

}  // namespace icrl
