// The arguments of one simulation: pointers to the tensors of icrl_kernels/tabular/rollout.py, on the CPU or on the
// GPU.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace icrl {

struct RolloutTables {
  const float *cumulative, *reward;                     // rows one after another
  const int64_t* offset;                                // [N,S,A] of a row in the two above
  const int16_t* window;                                // [N,S,A,2] first, length
  const float* noise_state;                             // [N,S]
  const float* noise_action;                            // [N,S,A]
  const float* start;                                   // [N,S] cumulative
  const uint8_t* terminal;                              // [N,S]
  const int64_t *max_steps, *num_states, *num_actions;  // [N]
  int64_t N, S, A, M;                                   // M: entries of `cumulative` and `reward` that rows may have
};

struct RolloutBehaviours {
  const float *initial, *later;  // [R,P+4] weights, or null: outside actions
  const float *switching, *epsilon, *epsilon_decay, *policy_scale, *q_bonus, *q_discount, *model_bonus, *model_discount;
};

struct RolloutState {
  int64_t *seed, *record, *task, *step, *state, *elapsed, *behaviour;  // [R]
  int32_t* visits;                                                     // [R,S,A]
  float *q, *reward_sum;                                               // [R,S,A]
  float* successors;                                                   // [R,S,S,A]
  int16_t* span;                                                       // [R,S,2]
  float* value;                                                        // [R,S]
  double* reward_square;                                               // [R]
};

struct RolloutOut {  // [R,T]; null where nobody asks, except for reward
  int16_t *state, *action;
  float* reward;
  uint8_t *done, *behaviour;
  int16_t *next_state, *labels;  // labels [R,T,G]
};

struct RolloutCall {
  RolloutTables tables;
  const float* probabilities;  // [N,P,S,A] cumulative, or null
  const int16_t* choices;      // [N,P,S] actions of deterministic policies, or null
  const int16_t* references;   // [N,S,G] actions, or null
  RolloutBehaviours behaviours;
  const int64_t* actions;  // [R,T], or null
  RolloutState state;
  RolloutOut out;
  int64_t R, T, P, G;
};

// What a record met that is out of range: nothing outside the tensors is read or written, and the record goes no
// further. `at` is the flat index in the argument that the kind names, or the record's own number.
struct RolloutFault {
  enum Kind {
    none,
    task,
    num_states,
    num_actions,
    max_steps,
    step,
    state,
    elapsed,
    behaviour,
    q_learning,
    model_based,
    span,
    action,
    choice,
    policy,
    row,
    thresholds,
    start
  } kind = none;
  int64_t record = 0, at = 0;
};

// Recorded histories, and what the model-based learner would think at each of their steps.
struct ModelHistory {
  const int64_t *state, *action, *done, *next_state;  // [R,T]; next_state may be null
  const float* reward;                                // [R,T]
  float* q;                                           // [R,T,A]
  int64_t R, T, S, A, sweeps;
  float bonus, discount;
  const uint8_t* action_mask;  // [R,S,A], or null: every state has every action
};

// rollout_records simulates the records [from, to) with rollout_scratch(c) floats of scratch. model_based_history fills
// q of record r with history_scratch(h.S, h.A) floats of scratch (model_based.h), zeros.
#define ICRL_ROLLOUT_ENTRIES                                                                    \
  RolloutFault rollout_records(const RolloutCall& c, int64_t from, int64_t to, float* scratch); \
  int64_t rollout_scratch(const RolloutCall& c);                                                \
  void model_based_history(const ModelHistory& h, int64_t r, float* scratch);
ICRL_IN_EACH_ISA(ICRL_ROLLOUT_ENTRIES)
#undef ICRL_ROLLOUT_ENTRIES

}  // namespace icrl
