// Gated linear attention on the CPU: what the Python side hands over.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "linear_attention/gate.h"

namespace icrl {

struct GlaShape {
  int64_t sequences, heads, kv_heads, k, v;
  const int64_t* bounds;  // [sequences + 1] token offsets
  int dtype, gate_dtype;  // of q, k, v, o and of g: codes of vec.h
  Gate gate;
  float scale;
  float allowance;  // gates above it are refused
  int threads;
};

struct GlaForward {
  const void *q, *k, *v, *g;
  const float* initial;  // null: zeros
  void* o;
  float* final;
  int* refused;  // set to 1 where a gate is above the allowance
};

struct GlaBackward {
  const void *d_o, *q, *k, *v, *g;
  const float *d_final, *initial;
  void *dq, *dk, *dv, *dg;
  float* d_initial;  // null: not wanted
  int* refused;      // set to 1 where a gate is above the allowance
};

struct GlaStep {
  const void *q, *k, *v, *g;
  float* state;
  void* o;
};

// gla_forward and gla_backward return false when memory ran out, gla_step when a gate is above the allowance.
#define ICRL_GLA_ENTRIES                                      \
  bool gla_forward(const GlaShape& s, const GlaForward& p);   \
  bool gla_backward(const GlaShape& s, const GlaBackward& p); \
  bool gla_step(const GlaShape& s, const GlaStep& p);
ICRL_IN_EACH_ISA(ICRL_GLA_ENTRIES)
#undef ICRL_GLA_ENTRIES

}  // namespace icrl
