// Batched tabular simulation: see icrl_kernels/rollout.py for the semantics, the shapes and the order of the tensors.
#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/model_based.h"
#include "cpu/parallel.h"
#include "cpu/philox.h"

namespace icrl {
namespace {

using Pointers = std::vector<uintptr_t>;  // the tensors of one NamedTuple of rollout.py, in its order

enum Stream : uint32_t { kStep, kEpisode, kPolicy };  // what a random number is for

template <class T>
T* at(const Pointers& p, int i) {
  return reinterpret_cast<T*>(p[i]);
}

struct Tables {
  const float* cumulative;     // rows one after another
  const float* reward;         // as cumulative
  const int64_t* offset;       // [N,S,A] of a row in the two above
  const int16_t* window;       // [N,S,A,2] first, length
  const float* noise_state;    // [N,S]
  const float* noise_action;   // [N,S,A]
  const float* start;          // [N,S] cumulative
  const uint8_t* terminal;     // [N,S]
  const int64_t *max_steps, *num_states, *num_actions;  // [N]
  int64_t N, S, A;
};

struct Behaviours {
  const float *initial, *later;  // [R,M] weights
  const float *switching, *epsilon, *epsilon_decay, *policy_scale, *q_bonus, *q_discount, *model_bonus, *model_discount;
};

struct State {
  int64_t *seed, *record, *task, *step, *state, *elapsed, *behaviour;  // [R]
  int32_t* visits;                                                     // [R,S,A]
  float *q, *reward_sum;                                               // [R,S,A]
  float* successors;                                                   // [R,S,A,S]
  int16_t* span;                                                       // [R,S,A,2] first, past the last
  float* value;                                                        // [R,S]
  double* reward_square;                                               // [R]
};

struct Out {
  int16_t *state, *action;
  float* reward;
  uint8_t *done, *behaviour;
  int16_t* next_state;
};

struct Call {
  Tables tables;
  const float* policies;  // [N,P,S,A] cumulative, or null
  Behaviours behaviours;
  const int64_t* actions;  // [R,T], or null
  State state;
  Out out;
  int64_t R, T, P;
};

// The first j with u < c[j]; c does not decrease and c[n-1] > 1.
inline int64_t search(const float* c, int64_t n, float u) {
  if (n <= 32) {
    int j = 0;
    for (int64_t i = 0; i < n; ++i) j += c[i] <= u;
    return j;
  }
  int64_t j = 0;
  while (n > 1) {
    const int64_t half = n / 2;
    j += c[j + half - 1] <= u ? half : 0;
    n -= half;
  }
  return j;
}

int64_t draw(const float* weights, int64_t n, float u) {
  double total = 0;
  for (int64_t i = 0; i < n; ++i) total += weights[i];
  double x = u * total;
  int64_t last = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (!(weights[i] > 0)) continue;
    last = i;
    if ((x -= weights[i]) < 0) break;
  }
  return last;
}

// What the tabular learners of one record know. Both learn from every step, whoever acted.
struct Learner {
  ModelBased model;  // its sizes and visits are those of the Q-learner too
  float* q;
  double* reward_square;
  float q_discount, q_bonus;
  bool use_q, use_model;
  double scale = 0;  // root mean square of the rewards so far

  void observe(int64_t s, int64_t a, float r, int64_t next, bool terminated, int64_t steps) {
    const int64_t i = s * model.A + a;
    const int32_t n = ++model.visits[i];
    *reward_square += static_cast<double>(r) * r;
    scale = std::sqrt(*reward_square / static_cast<double>(steps));
    if (use_q) {  // Jin et al. 2018's rate, (H+1)/(H+n) with H = 1/(1-discount)
      const float horizon = 1 / (1 - q_discount);
      float best = 0;
      if (!terminated) best = *std::max_element(q + next * model.A, q + next * model.A + model.na);
      q[i] += (horizon + 1) / (horizon + n) * (r + q_discount * best - q[i]);
    }
    if (use_model) model.observe(s, a, r, terminated ? -1 : next);
  }

  // Ties go to the first of them from a random place on, round the circle.
  template <class F>
  int64_t greedy(uint32_t x, F score) const {
    const int64_t from = below(x, model.na);
    int64_t best = from;
    float best_score = -std::numeric_limits<float>::infinity();
    for (int64_t i = 0, a = from; i < model.na; ++i, a = a + 1 == model.na ? 0 : a + 1) {
      const float v = score(a);
      if (v > best_score) best = a, best_score = v;
    }
    return best;
  }

  int64_t act_q(int64_t s, uint32_t x) const {
    double total = 1;
    for (int64_t a = 0; a < model.na; ++a) total += model.visits[s * model.A + a];
    const float width = q_bonus * static_cast<float>(scale * std::sqrt(std::log(total)));
    return greedy(x, [&](int64_t a) {
      const int32_t n = model.visits[s * model.A + a];
      return n ? q[s * model.A + a] + width / std::sqrt(static_cast<float>(n)) : std::numeric_limits<float>::infinity();
    });
  }

  int64_t act_model(int64_t s, uint32_t x, int64_t step) {
    model.sweep(static_cast<float>(scale), step & 1);
    return greedy(x, [&](int64_t a) { return model.q(s, a); });
  }
};

// The softmax of Gaussian logits in state s, cumulative: a function of (seed, record, state), so there is no state to keep.
void random_policy(uint64_t seed, uint64_t record, int64_t s, int64_t na, int64_t A, float scale, float* row) {
  float peak = -std::numeric_limits<float>::infinity(), total = 0, sum = 0;
  for (int64_t a = 0; a < na; ++a) {
    row[a] = scale * static_cast<float>(normal(philox(seed, record, static_cast<uint64_t>(s * A + a), kPolicy).v[0]));
    peak = std::max(peak, row[a]);
  }
  for (int64_t a = 0; a < na; ++a) total += row[a] = std::exp(row[a] - peak);
  for (int64_t a = 0; a < na; ++a) row[a] = (sum += row[a]) / total;
  row[na - 1] = 2;
}

void simulate(const Call& c, int64_t r) {
  const Tables& tb = c.tables;
  const Behaviours& bh = c.behaviours;
  const State& st = c.state;
  const int64_t S = tb.S, A = tb.A, P = c.P, M = P + 4, n = st.task[r];
  const int64_t ns = tb.num_states[n], na = tb.num_actions[n], horizon = tb.max_steps[n];
  const uint64_t seed = static_cast<uint64_t>(st.seed[r]), record = static_cast<uint64_t>(st.record[r]);
  const int64_t* offset = tb.offset + n * S * A;
  const int16_t* window = tb.window + n * S * A * 2;
  const float *noise_state = tb.noise_state + n * S, *noise_action = tb.noise_action + n * S * A;
  const uint8_t* terminal = tb.terminal + n * S;
  const float* policies = c.policies ? c.policies + n * P * S * A : nullptr;
  int64_t step = st.step[r], s = st.state[r], elapsed = st.elapsed[r], who = st.behaviour[r];

  std::vector<float> random;  // [S,A], the rows met so far; a row not met ends with 0
  const auto random_row = [&](int64_t state) -> const float* {
    if (random.empty()) random.resize(static_cast<size_t>(S * A));
    float* row = random.data() + state * A;
    if (row[na - 1] == 0) random_policy(seed, record, state, na, A, bh.policy_scale[r], row);
    return row;
  };

  std::vector<float> scratch;
  Learner learner{};
  bool learning = false;
  float epsilon = 0, decay = 0;
  if (bh.initial) {
    const auto used = [&](int64_t m) { return bh.initial[r * M + m] > 0 || bh.later[r * M + m] > 0; };
    epsilon = bh.epsilon[r], decay = bh.epsilon_decay[r];
    const bool use_q = used(P + 2), use_model = used(P + 3);
    if ((learning = use_q || use_model)) {
      const int64_t sa = r * S * A;
      if (use_model) scratch.resize(static_cast<size_t>(2 * S * A));
      const auto mine = [&](auto* array, int64_t size) { return use_model ? array + r * size : nullptr; };
      learner.model = {ns, na, S, A, st.visits + sa, mine(st.reward_sum, S * A), mine(st.successors, S * A * S),
                       mine(st.span, 2 * S * A), mine(st.value, S), bh.model_discount[r], bh.model_bonus[r],
                       scratch.data(), scratch.data() + (use_model ? S * A : 0)};
      learner.q = use_q ? st.q + sa : nullptr;
      learner.reward_square = st.reward_square + r;
      learner.q_discount = bh.q_discount[r], learner.q_bonus = bh.q_bonus[r];
      learner.use_q = use_q, learner.use_model = use_model;
      if (step) learner.scale = std::sqrt(*learner.reward_square / static_cast<double>(step));
    }
  }

  const auto begin_episode = [&] {
    const Random4 x = philox(seed, record, static_cast<uint64_t>(step), kEpisode);
    s = search(tb.start + n * S, ns, uniform(x.v[0]));
    elapsed = 0;
    if (!bh.initial) return;
    if (who < 0)
      who = draw(bh.initial + r * M, M, uniform(x.v[2]));
    else if (uniform(x.v[1]) < bh.switching[r])
      who = draw(bh.later + r * M, M, uniform(x.v[2]));
  };
  if (s < 0)
    begin_episode();
  else if (who < 0 && bh.initial)  // the state came from outside actions
    who = draw(bh.initial + r * M, M, uniform(philox(seed, record, static_cast<uint64_t>(step), kEpisode).v[2]));

  for (int64_t t = 0; t < c.T; ++t) {
    const int64_t o = r * c.T + t;
    const Random4 x = philox(seed, record, static_cast<uint64_t>(step), kStep);
    int64_t a;
    if (c.actions)
      a = c.actions[o];
    else if (who == P || (epsilon > 0 && uniform(x.v[3]) < epsilon - decay * static_cast<float>(step)))
      a = below(x.v[2], na);
    else if (who < P)
      a = search(policies + (who * S + s) * A, na, uniform(x.v[2]));
    else if (who == P + 1)
      a = search(random_row(s), na, uniform(x.v[2]));
    else if (who == P + 2)
      a = learner.act_q(s, x.v[2]);
    else
      a = learner.act_model(s, x.v[2], step);

    const int64_t sa = s * A + a;
    const int64_t j = search(tb.cumulative + offset[sa], window[2 * sa + 1], uniform(x.v[0])), next = window[2 * sa] + j;
    float gain = tb.reward[offset[sa] + j];
    const float std = noise_state[next] + noise_action[sa];
    if (std > 0) gain = static_cast<float>(gain + static_cast<double>(std) * normal(x.v[1]));
    ++step, ++elapsed;
    const int done = terminal[next] ? 1 : elapsed >= horizon ? 2 : 0;
    c.out.state[o] = static_cast<int16_t>(s);
    c.out.action[o] = static_cast<int16_t>(a);
    c.out.reward[o] = gain;
    c.out.done[o] = static_cast<uint8_t>(done);
    c.out.next_state[o] = static_cast<int16_t>(next);
    c.out.behaviour[o] = c.actions ? 255 : static_cast<uint8_t>(who);
    if (learning) learner.observe(s, a, gain, next, done == 1, step);
    s = next;
    if (done) begin_episode();
  }
  st.step[r] = step, st.state[r] = s, st.elapsed[r] = elapsed, st.behaviour[r] = who;
}

std::string text(int64_t x) { return std::to_string(x); }

void check(const Call& c) {
  const Tables& tb = c.tables;
  for (int64_t r = 0; r < c.R; ++r) {
    const int64_t n = c.state.task[r], s = c.state.state[r], who = c.state.behaviour[r];
    if (n < 0 || n >= tb.N)
      throw std::invalid_argument("task_index[" + text(r) + "] is " + text(n) + ", but there are " + text(tb.N) + " tasks");
    if (s < -1 || s >= tb.num_states[n] || (s >= 0 && tb.terminal[n * tb.S + s]))
      throw std::invalid_argument("state.state[" + text(r) + "] is " + text(s) + ": wanted a state of task " + text(n) +
                                  " that is not terminal, or -1");
    if (who < -1 || (c.behaviours.initial && who >= c.P + 4))
      throw std::invalid_argument("state.behaviour[" + text(r) + "] is " + text(who) + ": wanted -1 to " + text(c.P + 3));
    for (int64_t t = 0; c.actions && t < c.T; ++t)
      if (const int64_t a = c.actions[r * c.T + t]; a < 0 || a >= tb.num_actions[n])
        throw std::invalid_argument("action of record " + text(r) + " is " + text(a) + ", but its task has " +
                                    text(tb.num_actions[n]) + " actions");
  }
}

void rollout(const Pointers& tables, uintptr_t policies, const Pointers& behaviours, uintptr_t actions,
             const Pointers& state, const Pointers& out, int64_t N, int64_t S, int64_t A, int64_t P, int64_t R,
             int64_t T, int threads) {
  Call c{};
  c.tables = {at<float>(tables, 0), at<float>(tables, 1),   at<int64_t>(tables, 2), at<int16_t>(tables, 3),
              at<float>(tables, 4), at<float>(tables, 5),   at<float>(tables, 6),   at<uint8_t>(tables, 7),
              at<int64_t>(tables, 8), at<int64_t>(tables, 9), at<int64_t>(tables, 10), N, S, A};
  c.policies = reinterpret_cast<const float*>(policies);
  if (!behaviours.empty())
    c.behaviours = {at<float>(behaviours, 0), at<float>(behaviours, 1), at<float>(behaviours, 2), at<float>(behaviours, 3),
                    at<float>(behaviours, 4), at<float>(behaviours, 5), at<float>(behaviours, 6), at<float>(behaviours, 7),
                    at<float>(behaviours, 8), at<float>(behaviours, 9)};
  c.actions = reinterpret_cast<const int64_t*>(actions);
  c.state = {at<int64_t>(state, 0), at<int64_t>(state, 1), at<int64_t>(state, 2),  at<int64_t>(state, 3), at<int64_t>(state, 4),
             at<int64_t>(state, 5), at<int64_t>(state, 6), at<int32_t>(state, 7),  at<float>(state, 8),   at<float>(state, 9),
             at<float>(state, 10),  at<int16_t>(state, 11), at<float>(state, 12), at<double>(state, 13)};
  c.out = {at<int16_t>(out, 0), at<int16_t>(out, 1), at<float>(out, 2), at<uint8_t>(out, 3), at<uint8_t>(out, 4),
           at<int16_t>(out, 5)};
  c.R = R, c.T = T, c.P = P;
  check(c);
  const int64_t block = std::max<int64_t>(1, 1024 / std::max<int64_t>(T, 1));  // waking a thread costs ~100 steps
  parallel_for((R + block - 1) / block, threads, [&](int64_t i) {
    for (int64_t r = i * block; r < std::min(R, (i + 1) * block); ++r) simulate(c, r);
  });
}

}  // namespace

void bind_rollout(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("rollout", &rollout, py::call_guard<py::gil_scoped_release>());
}

}  // namespace icrl
