// The gated delta rule on the CPU: what the Python side hands over.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "linear_attention/gate.h"

namespace icrl {

struct DeltaShape {
  int64_t sequences, heads, key_heads, k, v;  // heads: of v, g, beta and the state; key_heads: of q and k
  const int64_t* bounds;                      // [sequences + 1] token offsets
  int dtype, gate_dtype, beta_dtype;          // of q, k, v, o, of g and of beta: codes of vec.h
  int key_gradient_dtype;                     // of dq and dk, which have `heads` heads
  Gate gate;
  bool normalize;  // q and k by their L2 norms
  float scale;
  float allowance;  // gates above it are refused
  int threads;
};

struct DeltaForward {
  const void *q, *k, *v, *g, *beta;
  const float* initial;  // null: zeros
  void* o;
  float* final;
  int* refused;  // set to 1 where a gate is above the allowance
};

struct DeltaBackward {
  const void *d_o, *q, *k, *v, *g, *beta;
  const float *d_final, *initial;
  void *dq, *dk, *dv, *dg, *dbeta;
  float* d_initial;  // null: not wanted
  int* refused;      // set to 1 where a gate is above the allowance
};

struct DeltaStep {
  const void *q, *k, *v, *g, *beta;
  float* state;
  void* o;
};

// delta_forward and delta_backward return false when memory ran out, delta_step when a gate is above the allowance.
#define ICRL_DELTA_ENTRIES                                          \
  bool delta_forward(const DeltaShape& s, const DeltaForward& p);   \
  bool delta_backward(const DeltaShape& s, const DeltaBackward& p); \
  bool delta_step(const DeltaShape& s, const DeltaStep& p);
ICRL_IN_EACH_ISA(ICRL_DELTA_ENTRIES)
#undef ICRL_DELTA_ENTRIES

}  // namespace icrl
