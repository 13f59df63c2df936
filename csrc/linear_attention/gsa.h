// Gated slot attention on the CPU: what the Python side hands over.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "linear_attention/gate.h"

namespace icrl {

struct GsaShape {
  int64_t sequences, heads, kv_heads, k, v, slots;
  const int64_t* bounds;  // [sequences + 1] token offsets
  int dtype, gate_dtype;  // of q, k, v, s, o and of g: codes of vec.h
  Gate gate;              // none, or channel: one per slot
  float scale;
  float allowance;  // gates above it are refused
  int threads;
};

// The state is a pair: keys [k][slots] and values [slots][v].
struct GsaForward {
  const void *q, *k, *v, *s, *g;
  const float *initial_keys, *initial_values;  // null: zeros
  void* o;
  float *final_keys, *final_values;
  int* refused;  // set to 1 where a gate is above the allowance
};

struct GsaBackward {
  const void *d_o, *q, *k, *v, *s, *g;
  const float *d_final_keys, *d_final_values, *initial_keys, *initial_values;
  void *dq, *dk, *dv, *ds, *dg;
  float *d_initial_keys, *d_initial_values;  // null: not wanted
  int* refused;                              // set to 1 where a gate is above the allowance
};

struct GsaStep {
  const void *q, *k, *v, *s, *g;
  float *keys, *values;
  void* o;
};

// gsa_forward and gsa_backward return false when memory ran out, gsa_step when a gate is above the allowance.
#define ICRL_GSA_ENTRIES                                      \
  bool gsa_forward(const GsaShape& s, const GsaForward& p);   \
  bool gsa_backward(const GsaShape& s, const GsaBackward& p); \
  bool gsa_step(const GsaShape& s, const GsaStep& p);
ICRL_IN_EACH_ISA(ICRL_GSA_ENTRIES)
#undef ICRL_GSA_ENTRIES

}  // namespace icrl
