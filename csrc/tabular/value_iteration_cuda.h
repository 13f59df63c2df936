// One task of a batch, solved by a team of threads: what a block of the GPU and the host's check of it call.
//
//   team         threads that share the task: see value_iteration_cuda_core.h
//   b, i         the batch (value_iteration_cuda_space.h has its shapes), the task
//   fast, slow   [bytes], [core_slow_bytes] the team's memory
//   discount     the task's discounts are taken in ascending order, x; g is a discount's place in the batch
#pragma once

#include <cstdint>

#include "tabular/policy_iteration.h"
#include "tabular/value_iteration_cuda_core.h"
#include "tabular/value_iteration_cuda_space.h"

namespace icrl {

// Solves one task; false, and nothing is to be made of the outputs, where `fast` (`bytes`, with `Resident`) was too
// small for it. `slow` is core_slow_bytes large. Without `Resident` fast memory is global and large enough:
// core_bytes_at_most.
template <class T, bool Resident, class Team>
ICRL_HD bool core_solve(Team& team, const CoreBatch& b, int64_t i, char* fast, int64_t bytes, char* slow) {
  const int ns = static_cast<int>(b.num_states ? b.num_states[i] : b.ns), na = static_cast<int>(b.na);
  Core<T, Resident, Team> core{team, b, i, ns, na, {}};
  CoreSpace& w = core.w;
  const int64_t fixed = core_layout(w, fast, slow, ns, na);
  w.pool = fast + fixed, w.room = bytes - fixed;
  if (w.room < 0) return false;
  int64_t* refused = b.refusal + i * 3;
  PlanResult r = core.pack();
  if (Resident && w.shared[1]) return false;
  if (team.id == 0) refused[0] = static_cast<int64_t>(r.refusal), refused[1] = r.row, refused[2] = 0;
  if (r.refusal != Refusal::none) return true;
  for (int s = team.id; s < ns; s += team.size) {  // the greedy policy of the expected reward
    int best = 0;
    for (int a = 1; a < na; ++a)
      if (w.reward[s * na + a] > w.reward[s * na + best]) best = a;
    w.policy[s] = static_cast<uint16_t>(best);
  }
  for (int64_t x = 0; x < b.ng; ++x) {
    const int64_t g = b.order[i * b.ng + x], at = i * b.ng + g;
    const double discount = b.discount[at];
    double *q = b.q + at * b.ns * na, *v = b.v + at * b.ns;
    bool fits = true;
    team.sync();
    r = b.method == 1 ? core.value_iteration(discount, b.tol, q, v) : core.policy_iteration(discount, q, v, fits);
    if (!fits) return false;
    if (r.refusal != Refusal::none) {
      if (team.id == 0) refused[0] = static_cast<int64_t>(r.refusal), refused[1] = r.row, refused[2] = g;
      return true;
    }
    for (int64_t k = static_cast<int64_t>(ns) * na + team.id; k < b.ns * na; k += team.size) q[k] = 0;
    for (int64_t s = team.id; s < b.ns; s += team.size) {
      const int best = s < ns ? w.best[s] : 0;
      b.policy[at * b.ns + s] = best;
      if (s < ns)
        w.policy[s] = static_cast<uint16_t>(best);
      else
        v[s] = 0;
    }
    if (team.id == 0) b.bound[at] = r.bound, b.iterations[at] = r.iterations;
  }
  return true;
}

}  // namespace icrl
