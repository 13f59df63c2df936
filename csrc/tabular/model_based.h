// A tabular model-based learner: counts, and optimistic value iteration on them. This is the specification, and what a
// GPU runs; model_based.inl does the same sums with vectors, and must give the same bits. Same rules as philox.h.
//
//   S, A      states and actions of the batch: strides of the arrays;  ns, na: the task's own
//   L         A rounded up to 8: the length of a row of per-action scratch
//   visits, known, reward_sum      [S, A] int32, int32, float32
//   successors                     [S, S, A] float32: counts of (state, next state, action)
//   span, value                    [S, 2] int16, [S] float32
//   mean, inverse, follow, row     [S, L], [S, L], [S, L], [L] float32: scratch
//   R, T      of histories: records and their steps; r, t one of them; state, action, ... [R, T], q [R, T, A]
#pragma once

#include <cmath>
#include <cstdint>

#include "common/philox.h"
#include "tabular/rollout.h"

namespace icrl {
namespace {

constexpr int64_t kActionLanes = 8;  // actions of a vector: rows of per-action numbers are padded to it
constexpr int64_t kSweepBlock = 8;   // states that a sweep updates at once, from the values before any of them

constexpr int64_t kTerminated = -1, kUnknown = -2;  // for `next` of observe

ICRL_HD constexpr int64_t padded_actions(int64_t A) { return (A + kActionLanes - 1) / kActionLanes * kActionLanes; }

// One record's learner. What it has counted is the caller's and starts at zero; `scratch` follows from that.
// q(s,a) of a tried action: mean reward + bonus * rms / sqrt(visits) + discount * mean value of what followed (of what
// is on record; none: the optimistic value); of an untried one the optimistic value, (the best mean reward + rms) / (1
// - discount). rms is the root mean square of the rewards so far.
struct ModelBased {
  int64_t ns, na, S, A;  // the task's sizes, and the strides of the arrays
  int32_t* visits;       // [S,A], counted by the caller
  const int32_t* known;  // [S,A], visits whose end is on record: the same array where that is all
  float* reward_sum;     // [S,A]
  float* successors;     // [S,S,A] counts: state, next state, action
  int16_t* span;         // [S,2] the next states seen, of any action: first, past the last
  float* value;          // [S]
  float discount, bonus;
  int64_t L;  // padded_actions(A)
  // scratch [S,L]: mean reward (-inf untried), 1 / sqrt(visits), discount / known visits
  float *mean, *inverse, *follow;
  float* row;                       // scratch [L]: the last row asked for
  float optimistic, beyond, width;  // of the last sweep: the value of the untried, discounted, and bonus * rms

  ICRL_HD static int64_t scratch_floats(int64_t S, int64_t A) { return (3 * S + 1) * padded_actions(A); }

  ICRL_HD void begin(float* scratch) {
    begin(scratch, [](int64_t, int64_t) { return true; });
  }

  // `has(s, a)`: whether state s has action a. The others are worth -inf; a state that has none, which ends, has all.
  template <class Has>
  ICRL_HD void begin(float* scratch, Has has) {
    L = padded_actions(A);
    mean = scratch, inverse = mean + S * L, follow = inverse + S * L, row = follow + S * L;
    optimistic = beyond = width = 0;
    for (int64_t s = 0; s < ns; ++s) {
      bool none = true;
      for (int64_t a = 0; a < na; ++a) none &= !has(s, a);
      for (int64_t a = 0; a < L; ++a) {
        const bool own = a < na && (none || has(s, a));
        mean[s * L + a] = -INFINITY, inverse[s * L + a] = own ? 0.f : 1.f, follow[s * L + a] = 0;
        if (own && visits[s * A + a]) refresh(s, a);
      }
    }
  }

  ICRL_HD void refresh(int64_t s, int64_t a) {
    const int64_t from = s * A + a, to = s * L + a;
    const float x = 1 / std::sqrt(static_cast<float>(visits[from]));
    inverse[to] = x;
    mean[to] = reward_sum[from] * x * x;
    follow[to] = known[from] ? discount / static_cast<float>(known[from]) : 0.f;
  }

  // `next` < 0: nothing follows (kTerminated), which leaves the row's mass below one, or nobody knows what (kUnknown).
  ICRL_HD void observe(int64_t s, int64_t a, float gain, int64_t next) {
    reward_sum[s * A + a] += gain;
    if (next >= 0) {
      successors[(s * S + next) * A + a] += 1;
      int16_t* w = span + 2 * s;
      if (w[1] == 0 || next < w[0]) w[0] = static_cast<int16_t>(next);
      if (next >= w[1]) w[1] = static_cast<int16_t>(next + 1);
    }
    refresh(s, a);
  }

  ICRL_HD float q(int64_t s, int64_t a) const {
    const int64_t i = s * L + a;
    if (inverse[i] == 0) return optimistic;
    float even = 0, odd = 0;  // of even and of odd next states, in order
    const float* count = successors + s * S * A + a;
    for (int64_t j = span[2 * s]; j < span[2 * s + 1]; ++j) {
      const float x = count[j * A] * value[j];
      if (j & 1)
        odd += x;
      else
        even += x;
    }
    return (mean[i] + width * inverse[i]) + (follow[i] == 0 ? beyond : follow[i] * (even + odd));
  }

  ICRL_HD void set_optimism(float best, float rms) {
    optimistic = ((best > -INFINITY ? best : 0.f) + rms) / (1 - discount);
    beyond = discount * optimistic, width = bonus * rms;
  }

  // One sweep from where the last one left the values: Gauss-Seidel from block to block of states. (One sweep a step
  // scores as well as forty: between two steps the counts hardly change.)
  ICRL_HD void sweep(float rms, bool forward) {
    float best = -INFINITY;
    for (int64_t i = 0; i < ns * L; ++i) best = mean[i] > best ? mean[i] : best;
    set_optimism(best, rms);
    const int64_t blocks = (ns + kSweepBlock - 1) / kSweepBlock;
    for (int64_t k = 0; k < blocks; ++k) {
      const int64_t from = (forward ? k : blocks - 1 - k) * kSweepBlock;
      float v[kSweepBlock];
      for (int64_t s = from; s < ns && s < from + kSweepBlock; ++s) {
        float most = -INFINITY;
        for (int64_t a = 0; a < na; ++a) {
          const float x = q(s, a);
          most = x > most ? x : most;
        }
        v[s - from] = most + 0.f;  // never -0
      }
      for (int64_t s = from; s < ns && s < from + kSweepBlock; ++s) value[s] = v[s - from];
    }
  }

  ICRL_HD void fill_row(int64_t s) {
    for (int64_t a = 0; a < na; ++a) row[a] = q(s, a);
  }
};

// How the simulator computes where a vector unit could do better: as the specification says.
struct PlainOps {
  ICRL_HD static void sweep(ModelBased& model, float rms, bool forward) { model.sweep(rms, forward); }
  ICRL_HD static void fill_row(ModelBased& model, int64_t s) { model.fill_row(s); }
  // The first j with u < c[j]; c does not decrease and c[n-1] > 1. Else the last, or with vectors perhaps n.
  ICRL_HD static int64_t search(const float* c, int64_t n, float u) {
    int64_t j = 0;
    while (n > 1) {
      const int64_t half = n / 2;
      j += c[j + half - 1] <= u ? half : 0;
      n -= half;
    }
    return j;
  }
};

// Zeros that `history` needs, in floats.
ICRL_HD inline int64_t history_scratch(int64_t S, int64_t A) {
  return S * S * A + 3 * S * A + 2 * S + ModelBased::scratch_floats(S, A);
}

// The q of record r's history before each step, learning from the steps before it; NaN from the first step on whose
// state, action, done or next state is out of range, or whose action its state lacks. scratch: zeros.
template <class Ops>
ICRL_HD void history(const ModelHistory& h, int64_t r, float* scratch) {
  const int64_t S = h.S, A = h.A;
  ModelBased m;
  m.ns = m.S = S, m.na = m.A = A, m.discount = h.discount, m.bonus = h.bonus;
  m.successors = scratch, scratch += S * S * A;
  m.reward_sum = scratch, scratch += S * A;
  m.value = scratch, scratch += S;
  m.visits = reinterpret_cast<int32_t*>(scratch), scratch += S * A;
  int32_t* known = reinterpret_cast<int32_t*>(scratch);
  m.known = known, scratch += S * A;
  m.span = reinterpret_cast<int16_t*>(scratch), scratch += S;
  const uint8_t* mask = h.action_mask ? h.action_mask + r * S * A : nullptr;
  m.begin(scratch, [=](int64_t s, int64_t a) { return !mask || mask[s * A + a]; });
  double square = 0;
  for (int64_t t = 0; t < h.T; ++t) {
    const int64_t i = r * h.T + t, s = h.state[i], a = h.action[i], done = h.done[i];
    // without next_state, the state after a truncated step is the next episode's first
    const bool known_next = h.next_state || (done == 0 && t + 1 < h.T);
    const int64_t to = h.next_state ? h.next_state[i] : known_next ? h.state[i + 1] : 0;
    if (s < 0 || s >= S || a < 0 || a >= A || done < 0 || done > 2 || to < 0 || to >= S || (mask && !mask[s * A + a])) {
      for (int64_t k = i * A; k < (r + 1) * h.T * A; ++k) h.q[k] = NAN;
      return;
    }
    const float rms = static_cast<float>(std::sqrt(square / static_cast<double>(t > 1 ? t : 1)));
    for (int64_t k = 0; k < h.sweeps; ++k) Ops::sweep(m, rms, k & 1);
    Ops::fill_row(m, s);
    for (int64_t b = 0; b < A; ++b) h.q[i * A + b] = m.row[b];
    square += static_cast<double>(h.reward[i]) * h.reward[i];
    if (t + 1 == h.T) break;
    const int64_t next = done == 1 ? kTerminated : known_next ? to : kUnknown;
    ++m.visits[s * A + a];
    known[s * A + a] += next != kUnknown;
    m.observe(s, a, h.reward[i], next);
  }
}

}  // namespace
}  // namespace icrl
