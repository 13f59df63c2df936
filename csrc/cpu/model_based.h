// A tabular model-based learner: counts, and optimistic value iteration on them by Gauss-Seidel sweeps.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace icrl {

// One record's learner; the arrays are the caller's and start at zero. Worth of an untried action: the best mean reward
// seen so far plus the root mean square of the rewards, for ever. Of a tried one: its mean, plus the bonus.
struct ModelBased {
  int64_t ns, na, S, A;  // the task's sizes, and the strides of the arrays
  int32_t* visits;       // [S,A]
  float* reward_sum;     // [S,A]
  float* successors;     // [S,A,S] counts
  int16_t* span;         // [S,A,2] the nonzero successors: first, past the last
  float* value;          // [S]
  float discount, bonus;
  float width = 0, optimistic = 0;  // of the last sweep

  // `next` < 0: nothing follows. The caller counts `visits`.
  void observe(int64_t s, int64_t a, float reward, int64_t next) {
    const int64_t i = s * A + a;
    reward_sum[i] += reward;
    if (next < 0) return;  // leaves the row's mass below one
    successors[i * S + next] += 1;
    int16_t* w = span + 2 * i;
    if (w[1] == 0) w[0] = static_cast<int16_t>(next);
    w[0] = std::min(w[0], static_cast<int16_t>(next));
    w[1] = std::max(w[1], static_cast<int16_t>(next + 1));
  }

  float q(int64_t s, int64_t a) const {
    const int64_t i = s * A + a;
    if (!visits[i]) return optimistic;
    const int16_t* w = span + 2 * i;
    const float* count = successors + i * S;
    float sum[4] = {0, 0, 0, 0};  // four chains: a serial float sum cannot be vectorised
    int64_t j = w[0];
    for (; j + 4 <= w[1]; j += 4)
      for (int k = 0; k < 4; ++k) sum[k] += count[j + k] * value[j + k];
    for (; j < w[1]; ++j) sum[0] += count[j] * value[j];
    const float n = static_cast<float>(visits[i]), follow = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    return (reward_sum[i] + discount * follow) / n + width / std::sqrt(n);
  }

  // One sweep from where the last one left the values; `rms` is the root mean square of the rewards so far.
  void sweep(float rms, bool forward) {
    float best = -std::numeric_limits<float>::infinity();
    for (int64_t s = 0; s < ns; ++s)
      for (int64_t i = s * A; i < s * A + na; ++i)
        if (visits[i]) best = std::max(best, reward_sum[i] / static_cast<float>(visits[i]));
    if (std::isinf(best)) best = 0;
    width = bonus * rms;
    optimistic = (best + rms) / (1 - discount);
    for (int64_t k = 0; k < ns; ++k) {
      const int64_t s = forward ? k : ns - 1 - k;
      float v = -std::numeric_limits<float>::infinity();
      for (int64_t a = 0; a < na; ++a) v = std::max(v, q(s, a));
      value[s] = v;
    }
  }
};

}  // namespace icrl
