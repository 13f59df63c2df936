// Many small tasks at once, one in each lane of the vectors: what the batched operator hands to a thread.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "tabular/policy_iteration.h"

namespace icrl {

struct LaneJobs {
  const int64_t* tasks;  // indices of the tasks to solve
  int64_t count;
  int64_t* next;  // position of the first that no thread has taken, shared by all threads
  int64_t most_states, num_states, num_actions, num_discounts;  // of these tasks; of the outputs
  bool is_double;
  const double* discount;  // [N, num_discounts]
  double *q, *v, *bound;   // [N, num_discounts, num_states, num_actions], ...
  int64_t *policy, *iterations;
  const void* context;  // for:
  TaskTables (*tables)(const void*, int64_t i);
  void (*alone)(const void*, int64_t i);  // solves task i by itself: whatever is unusual
};

}  // namespace icrl
