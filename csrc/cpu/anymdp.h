// One AnyMDP task to be sampled: where its slices of the padded batch lie. Plain data, shared by the three instruction sets.
#pragma once

#include <cstdint>

namespace icrl {

struct AnymdpTask {
  int64_t ns, na;               // this task's sizes
  int64_t stride;               // padded number of states: the row length of transition and reward
  int64_t num_observations;     // observed ids are drawn from [0, num_observations)
  uint64_t key;                 // hash of (seed, task index): all of the task's random numbers
  int64_t max_attempts;
  float *transition, *reward;   // [stride, na, stride], zeroed
  float *noise_state, *start;   // [stride], zeroed
  float* noise_action;          // [stride, na], zeroed
  bool* terminal;               // [stride], zeroed
  int64_t* state_mapping;       // [stride], filled with -1
  int64_t* max_steps;           // [1]
  int64_t* attempts;            // [1]: 0 where every attempt was refused
  double* scratch;              // anymdp_scratch(ns, na, num_observations) doubles
};

inline constexpr int64_t anymdp_scratch(int64_t ns, int64_t na, int64_t num_observations) {
  return (ns * na + 2 * ns + 32) * (ns + 24) + 9 * ns * na + na + num_observations;
}

}  // namespace icrl
