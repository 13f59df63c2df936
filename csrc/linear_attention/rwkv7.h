// RWKV-7's generalized delta rule on the CPU: what the Python side hands over.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace icrl {

struct RwkvShape {
  int64_t sequences, heads, k, v;
  const int64_t* bounds;  // [sequences + 1] token offsets
  int dtype, gate_dtype;  // of r, k, v, a, b, o and of w: codes of vec.h
  float scale;
  float allowance;  // gates above it are refused
  int threads;
};

struct RwkvForward {
  const void *r, *w, *k, *v, *a, *b;
  const float* initial;  // null: zeros
  void* o;
  float* final;
  int* refused;  // set to 1 where a gate is above the allowance
};

struct RwkvBackward {
  const void *d_o, *r, *w, *k, *v, *a, *b;
  const float *d_final, *initial;
  void *dr, *dw, *dk, *dv, *da, *db;
  float* d_initial;  // null: not wanted
  int* refused;      // set to 1 where a gate is above the allowance
};

struct RwkvStep {
  const void *r, *w, *k, *v, *a, *b;
  float* state;
  void* o;
};

// rwkv7_forward and rwkv7_backward return false when memory ran out, rwkv7_step when a gate is above the allowance.
#define ICRL_RWKV7_ENTRIES                                        \
  bool rwkv7_forward(const RwkvShape& s, const RwkvForward& p);   \
  bool rwkv7_backward(const RwkvShape& s, const RwkvBackward& p); \
  bool rwkv7_step(const RwkvShape& s, const RwkvStep& p);
ICRL_IN_EACH_ISA(ICRL_RWKV7_ENTRIES)
#undef ICRL_RWKV7_ENTRIES

}  // namespace icrl
