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
  int32_t* visits;       // [S,A], counted by the caller
  float* reward_sum;     // [S,A]
  float* successors;     // [S,A,S] counts
  int16_t* span;         // [S,A,2] the nonzero successors: first, past the last
  float* value;          // [S]
  float discount, bonus;
  float *reward_now, *follow_now;  // [S,A], of the last sweep: mean reward with its bonus; discount / visits
  float optimistic = 0;

  // `next` < 0: nothing follows, which leaves the row's mass below one.
  void observe(int64_t s, int64_t a, float reward, int64_t next) {
    const int64_t i = s * A + a;
    reward_sum[i] += reward;
    if (next < 0) return;
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
    return reward_now[i] + follow_now[i] * ((sum[0] + sum[1]) + (sum[2] + sum[3]));
  }

  // One Gauss-Seidel sweep from where the last one left the values; `rms` is the root mean square of the rewards so far.
  // (One sweep a step scores as well as forty: between two steps the counts hardly change.)
  void sweep(float rms, bool forward) {
    float best = -std::numeric_limits<float>::infinity();
    for (int64_t i = 0; i < ns * A; ++i) {  // where visits are 0 the results are not read
      const float inverse = 1 / std::sqrt(static_cast<float>(std::max(visits[i], 1)));
      const float mean = reward_sum[i] * inverse * inverse;
      follow_now[i] = discount * inverse * inverse;
      reward_now[i] = mean + bonus * rms * inverse;
      if (visits[i]) best = std::max(best, mean);
    }
    optimistic = ((std::isinf(best) ? 0 : best) + rms) / (1 - discount);
    for (int64_t k = 0; k < ns; ++k) {
      const int64_t s = forward ? k : ns - 1 - k;
      float v = -std::numeric_limits<float>::infinity();
      for (int64_t a = 0; a < na; ++a) v = std::max(v, q(s, a));
      value[s] = v;
    }
  }
};

}  // namespace icrl
