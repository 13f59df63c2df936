// One AnyMDP task to be sampled: where its slices of the batch lie. Plain data, shared by the three instruction sets.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace icrl {

struct AnymdpTask {
  int64_t ns, na;            // this task's sizes
  int64_t stride;            // padded number of states: the row length of dense tables
  int64_t num_observations;  // observed ids are drawn from [0, num_observations)
  uint64_t key;              // hash of (seed, task index): all of the task's random numbers
  int64_t max_attempts;
  float *transition, *reward;  // dense tables [stride, na, stride], zeroed; or null, and then windows:
  int32_t *first, *length;     // [stride, na], zeroed
  float* (*room)(void* context, int64_t entries);  // where the windows' probabilities go, and then as many rewards
  void* context;
  float *noise_state, *start;  // [stride], zeroed
  float* noise_action;         // [stride, na], zeroed
  bool* terminal;              // [stride], zeroed
  int64_t* state_mapping;      // [stride], filled with -1
  int64_t* max_steps;          // [1]
  int64_t* attempts;           // [1]: 0 where every attempt was refused
  double* scratch;             // anymdp_scratch(ns, na, num_observations) doubles, 64-byte aligned
};

// Rows, tiles, the chain and its transposed lists, then vectors and numbers per row; each part is rounded up to eight.
inline constexpr int64_t anymdp_scratch(int64_t ns, int64_t na, int64_t num_observations) {
  const int64_t nb = (ns + 7) / 8, width = 8 * nb + 8;
  return ns * na * nb * 4 + 8 + nb * nb * 64 + ns * nb * 9 + (ns + na) * width + 9 * (ns * na + 16) + 32 * width +
         nb * 64 + na + num_observations + 64 * 8;
}

#define ICRL_ANYMDP_ENTRIES void anymdp_sample(const AnymdpTask& task);
ICRL_IN_EACH_ISA(ICRL_ANYMDP_ENTRIES)
#undef ICRL_ANYMDP_ENTRIES

}  // namespace icrl
