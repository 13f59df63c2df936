// A RolloutCall from what Python hands over: addresses of the tensors of each NamedTuple of rollout.py, in its order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

#include "tabular/rollout.h"

namespace icrl {

// Which argument is wrong, where, and what is wanted.
std::string describe(const RolloutCall& c, const RolloutFault& f);

using Pointers = std::vector<uintptr_t>;

inline RolloutCall rollout_call(const Pointers& tables, uintptr_t probabilities, uintptr_t choices,
                                uintptr_t references, const Pointers& behaviours, uintptr_t actions,
                                const Pointers& state, const Pointers& out, int64_t N, int64_t S, int64_t A, int64_t M,
                                int64_t P, int64_t G, int64_t R, int64_t T) {
  size_t i = 0;
  const Pointers* from = &tables;
  const auto next = [&](auto*& to) { to = reinterpret_cast<std::remove_reference_t<decltype(to)>>((*from)[i++]); };
  const auto take = [&](const Pointers& p, auto&... to) {
    i = 0, from = &p;
    (next(to), ...);
  };
  RolloutCall c{};
  RolloutTables& tb = c.tables;
  take(tables, tb.cumulative, tb.reward, tb.offset, tb.window, tb.noise_state, tb.noise_action, tb.start, tb.terminal,
       tb.max_steps, tb.num_states, tb.num_actions);
  tb.N = N, tb.S = S, tb.A = A, tb.M = M;
  RolloutBehaviours& b = c.behaviours;
  if (!behaviours.empty())
    take(behaviours, b.initial, b.later, b.switching, b.epsilon, b.epsilon_decay, b.policy_scale, b.q_bonus,
         b.q_discount, b.model_bonus, b.model_discount);
  RolloutState& st = c.state;
  take(state, st.seed, st.record, st.task, st.step, st.state, st.elapsed, st.behaviour, st.visits, st.q, st.reward_sum,
       st.successors, st.span, st.value, st.reward_square);
  take(out, c.out.state, c.out.action, c.out.reward, c.out.done, c.out.behaviour, c.out.next_state, c.out.labels);
  c.probabilities = reinterpret_cast<const float*>(probabilities),
  c.choices = reinterpret_cast<const int16_t*>(choices);
  c.references = reinterpret_cast<const int16_t*>(references), c.actions = reinterpret_cast<const int64_t*>(actions);
  c.R = R, c.T = T, c.P = P, c.G = G;
  return c;
}

}  // namespace icrl
