// The tabular planner, for any C++ caller: Q* of one finite MDP and a certificate of its error. Thread-safe.
#pragma once

#include <cstdint>

namespace icrl {

enum class Method : int { policy_iteration = 0, value_iteration = 1, modified_policy_iteration = 2 };

// Why a task was refused; `row` of the result is state * num_actions + action.
enum class Refusal : int {
  none = 0,
  negative = 1,          // transition below 0
  not_finite = 2,        // NaN or infinity in transition
  row_sum = 3,           // a row sums neither to 0 nor, within 1e-4, to 1
  reward = 4,            // expected reward not finite
  terminal_row = 5,      // a terminal state has an outgoing transition
  no_proper_policy = 6,  // discount 1: from this state no policy reaches an end
  unbounded = 7,         // discount 1: never ending earns without bound from this state
  singular = 8,          // I - discount P could not be inverted, or values leave float64's range
  no_contraction = 9,    // methods that sweep need discount * (largest row sum) < 1
  window = 10,           // a window of a packed table leaves it
};

// One task's tables, row-major. States from num_states on (up to `stride`) are padding and are not read. Packed tables
// (`offset` is not null) hold for each row one window of successors, as icrl_kernels/tabular/packed.py says; then
// `transition`, and with `reward_by_successor` `reward`, are the batch's values, which the offsets index; windows are
// within `stride` states.
struct TaskTables {
  const void* transition;   // [num_states, num_actions, stride], float or double
  const void* reward;       // [num_states, num_actions], or with `reward_by_successor` shaped as transition; same type
  const uint8_t* terminal;  // [num_states] or null: then a state whose rows are all zero is terminal
  int64_t num_states, num_actions, stride;
  bool is_double, reward_by_successor;
  const int64_t* offset = nullptr;                    // [num_states, num_actions]
  const int32_t *first = nullptr, *length = nullptr;  // [num_states, num_actions]
  int64_t values = 0;                                 // how many values the batch has
};

struct PlanResult {
  Refusal refusal = Refusal::none;
  int64_t row = 0;
  int64_t iterations = 0;
  double bound = 0;  // |q - Q*| at most; NaN where discount * (largest row sum) >= 1, as this certificate needs less
};

// Bytes of scratch, 64-byte aligned, that the calls below need for a task of this size.
int64_t planner_bytes(int64_t num_states, int64_t num_actions);

// Checks and packs the tables into scratch; `plan` then solves for as many discounts as wanted.
PlanResult plan_pack(const TaskTables& tables, void* scratch);

// policy [num_states]: a guess going in (-1 in policy[0]: none), the greedy policy of q coming out.
// q [num_states, num_actions], v [num_states] come out. Double throughout.
PlanResult plan(double discount, Method method, double tol, int64_t* policy, double* q, double* v, void* scratch);

}  // namespace icrl
