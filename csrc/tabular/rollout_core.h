// The simulator: what one record does in a step, for the CPU and the GPU alike. See icrl_kernels/tabular/rollout.py for
// the semantics, and philox.h for what its includers owe it. `Ops` says how to search and to sweep (PlainOps, or with
// vectors).
//
//   R, T      records, and steps of this call: r and t are one of them; outputs are [R, T], labels [R, T, G]
//   N, S, A   tasks, states and actions of the tables; n the record's task, ns and na its own sizes
//   P, G      policies by table, references
//   s, next   states; a an action; sa = s * A + a its row
//   who       the behaviour that acts: below P a policy by table; then uniform, random, Q-learner, model-based
//   cumulative, reward             float32, rows one behind the other: row sa is window[sa] = (first, length), and
//                                  begins at offset[sa]; it is empty where s does not have a
//   offset, window                 [S, A] int64, [S, A, 2] int16, of this task
//   noise_state, noise_action      [S], [S, A] float32: standard deviations
//   probabilities, choices         [P, S, A] float32 cumulative, [P, S] int16, of this task; one of them or neither
//   references                     [S, G] int16
//   q, random                      [S, A] float32: the Q-learner's values, the random policy's rows met so far
// The tensors of a whole call are in rollout.h.
#pragma once

#include "tabular/model_based.h"
#include "tabular/rollout.h"

namespace icrl {
namespace {

enum Stream : uint32_t { kStep, kEpisode, kPolicy };  // what a random number is for

constexpr int64_t kMostSteps = int64_t{1} << 56;  // that philox can count

// Whether a record's own numbers are in range: what `Record::load` and every step then rely on. The tables' rows,
// starts and policies are judged where they are read.
ICRL_HD inline RolloutFault first_fault(const RolloutCall& c, int64_t r) {
  const RolloutTables& tb = c.tables;
  const RolloutState& st = c.state;
  const RolloutBehaviours& b = c.behaviours;
  const int64_t n = st.task[r], s = st.state[r], who = st.behaviour[r], P = c.P;
  const auto fault = [r](RolloutFault::Kind kind, int64_t at) { return RolloutFault{kind, r, at}; };
  if (n < 0 || n >= tb.N) return fault(RolloutFault::task, r);
  if (tb.num_states[n] < 1 || tb.num_states[n] > tb.S) return fault(RolloutFault::num_states, n);
  if (tb.num_actions[n] < 1 || tb.num_actions[n] > tb.A) return fault(RolloutFault::num_actions, n);
  if (!(tb.start[n * tb.S + tb.num_states[n] - 1] > 1)) return fault(RolloutFault::start, n);
  if (tb.max_steps[n] < 1) return fault(RolloutFault::max_steps, n);
  if (st.step[r] < 0 || st.step[r] > kMostSteps - c.T) return fault(RolloutFault::step, r);
  if (s < -1 || s >= tb.num_states[n] || (s >= 0 && tb.terminal[n * tb.S + s])) return fault(RolloutFault::state, r);
  if (st.elapsed[r] < 0 || st.elapsed[r] > kMostSteps) return fault(RolloutFault::elapsed, r);
  if (who < -1 || (b.initial && who >= P + 4)) return fault(RolloutFault::behaviour, r);
  if (!b.initial) return {};
  const auto used = [&](int64_t m) { return b.initial[r * (P + 4) + m] > 0 || b.later[r * (P + 4) + m] > 0; };
  const bool use_q = used(P + 2), use_model = used(P + 3), counts = st.visits && st.reward_square;
  if (use_q && !(counts && st.q)) return fault(RolloutFault::q_learning, r);
  if (use_model && !(counts && st.reward_sum && st.successors && st.span && st.value))
    return fault(RolloutFault::model_based, r);
  if ((who == P + 2 && !use_q) || (who == P + 3 && !use_model)) return fault(RolloutFault::behaviour, r);
  for (int64_t i = r * tb.S * 2; use_model && i < (r + 1) * tb.S * 2; ++i)
    if (st.span[i] < 0 || st.span[i] > tb.S) return fault(RolloutFault::span, i);
  return {};
}

template <class Ops>
struct Record {
  const RolloutCall* c;
  RolloutFault fault;
  int64_t r, n, ns, na, S, A, P, G, M;
  int64_t horizon, step, s, elapsed, who;
  uint64_t seed, number;
  const float *cumulative, *reward, *noise_state, *noise_action, *probabilities;
  const int64_t* offset;
  const int16_t *window, *choices, *references;
  const uint8_t* terminal;
  float epsilon, decay;
  // the learners; both learn from every step, under every behaviour
  bool use_q, use_model;
  bool lacks;        // whether a state that is not terminal lacks an action; known where something is learned
  ModelBased model;  // its sizes and visits are those of the Q-learner too
  float* q;
  double scale;   // root mean square of the rewards so far
  float* random;  // scratch [S,A]: the random policy's rows met so far; a row not met ends with 0

  // Floats of scratch for one record.
  ICRL_HD static int64_t scratch_floats(const RolloutCall& c) {
    if (!c.behaviours.initial) return 0;
    return c.tables.S * c.tables.A + ModelBased::scratch_floats(c.tables.S, c.tables.A);
  }

  ICRL_HD bool used(int64_t m) const {
    const RolloutBehaviours& b = c->behaviours;
    return b.initial && (b.initial[r * (P + 4) + m] > 0 || b.later[r * (P + 4) + m] > 0);
  }

  ICRL_HD void load(const RolloutCall& call, int64_t record, float* scratch) {
    c = &call, r = record, fault = {};
    const RolloutTables& tb = call.tables;
    const RolloutState& st = call.state;
    n = st.task[r], S = tb.S, A = tb.A, P = call.P, G = call.G, M = tb.M;
    ns = tb.num_states[n], na = tb.num_actions[n], horizon = tb.max_steps[n];
    step = st.step[r], s = st.state[r], elapsed = st.elapsed[r], who = st.behaviour[r];
    seed = static_cast<uint64_t>(st.seed[r]), number = static_cast<uint64_t>(st.record[r]);
    cumulative = tb.cumulative, reward = tb.reward, offset = tb.offset + n * S * A, window = tb.window + n * S * A * 2;
    noise_state = tb.noise_state + n * S, noise_action = tb.noise_action + n * S * A, terminal = tb.terminal + n * S;
    probabilities = call.probabilities ? call.probabilities + n * P * S * A : nullptr;
    choices = call.choices ? call.choices + n * P * S : nullptr;
    references = call.references ? call.references + n * S * G : nullptr;
    epsilon = decay = 0, use_q = use_model = lacks = false;
    const RolloutBehaviours& b = call.behaviours;
    if (b.initial) {
      epsilon = b.epsilon[r], decay = b.epsilon_decay[r];
      use_q = used(P + 2), use_model = used(P + 3), random = scratch;
      if (used(P + 1) || who == P + 1)
        for (int64_t i = 0; i < S * A; ++i) random[i] = 0;
    }
    if (learns()) {
      model.ns = ns, model.na = na, model.S = S, model.A = A, model.visits = st.visits + r * S * A;
      model.known = model.visits;
      scale = step ? std::sqrt(st.reward_square[r] / static_cast<double>(step)) : 0.0;
      q = use_q ? st.q + r * S * A : nullptr;
      for (int64_t i = 0; i < ns; ++i)
        for (int64_t a = 0; a < na; ++a) lacks |= !has(i, a) && !terminal[i];
      if (use_model) {
        model.reward_sum = st.reward_sum + r * S * A, model.successors = st.successors + r * S * S * A;
        model.span = st.span + r * S * 2, model.value = st.value + r * S;
        model.discount = b.model_discount[r], model.bonus = b.model_bonus[r];
        if (lacks)
          model.begin(scratch + S * A, [this](int64_t i, int64_t a) { return has(i, a); });
        else
          model.begin(scratch + S * A);
      }
    }
    if (s < 0)
      begin_episode();
    else if (who < 0 && b.initial)  // the state came from outside actions
      who = draw(b.initial, uniform(philox(seed, number, static_cast<uint64_t>(step), kEpisode).v[2]));
  }

  ICRL_HD bool learns() const { return use_q || use_model; }

  ICRL_HD void fail(RolloutFault::Kind kind, int64_t at) {
    if (!fault.kind) fault = {kind, r, at};
  }
  ICRL_HD bool has(int64_t state, int64_t a) const { return window[2 * (state * A + a) + 1] > 0; }
  // One of the state's actions, uniformly: one of the task's, and where the state lacks it one of those that it has, by
  // what the first draw leaves of x.
  ICRL_HD int64_t anything(uint32_t x, int64_t state) const {
    const int64_t a = below(x, na);
    return has(state, a) ? a : another(x, state);
  }
  ICRL_HD int64_t another(uint32_t x, int64_t state) const {
    int64_t count = 0, a = 0;
    for (int64_t b = 0; b < na; ++b) count += has(state, b);
    int64_t k = below(static_cast<uint32_t>(x * static_cast<uint64_t>(na)), count);
    while (a + 1 < na && (!has(state, a) || k-- > 0)) ++a;
    return a;
  }
  ICRL_HD bool no_action(int64_t a) const { return static_cast<uint64_t>(a) >= static_cast<uint64_t>(na); }
  // Whether a row, of window w[0] and w[1], leads out of the task's states, or its numbers lie outside the table.
  // Unsigned, what is below 0 and a length of 0 are beyond all states.
  ICRL_HD bool leaves(const int16_t* w, int64_t at) const {
    const uint64_t first = static_cast<uint16_t>(w[0]), last = static_cast<uint32_t>(static_cast<uint16_t>(w[1]) - 1);
    if (first + last >= static_cast<uint64_t>(ns)) return true;
    return (at | static_cast<int64_t>(static_cast<uint64_t>(M) - 1 - last - static_cast<uint64_t>(at))) < 0;
  }
  ICRL_HD void fail_action(int64_t t, int64_t state) {
    if (c->actions) return fail(RolloutFault::action, r * c->T + t);
    const int64_t row = (n * P + who) * S + state;
    choices ? fail(RolloutFault::choice, row) : fail(RolloutFault::policy, row);
  }

  ICRL_HD void store() const {
    const RolloutState& st = c->state;
    st.step[r] = step, st.state[r] = s, st.elapsed[r] = elapsed, st.behaviour[r] = who;
  }

  ICRL_HD int64_t draw(const float* all, float u) const {
    const float* weights = all + r * (P + 4);
    double total = 0;
    for (int64_t i = 0; i < P + 4; ++i) total += weights[i];
    double x = u * total;
    int64_t last = 0;
    for (int64_t i = 0; i < P + 4; ++i) {
      if (!(weights[i] > 0)) continue;
      last = i;
      if ((x -= weights[i]) < 0) break;
    }
    return last;
  }

  ICRL_HD void begin_episode() {
    const Random4 x = philox(seed, number, static_cast<uint64_t>(step), kEpisode);
    s = Ops::search(c->tables.start + n * S, ns, uniform(x.v[0]));
    elapsed = 0;
    const RolloutBehaviours& b = c->behaviours;
    if (!b.initial) return;
    if (who < 0)
      who = draw(b.initial, uniform(x.v[2]));
    else if (uniform(x.v[1]) < b.switching[r])
      who = draw(b.later, uniform(x.v[2]));
  }

  // The softmax of Gaussian logits in state s, cumulative: a function of (seed, record, state), so that nothing is
  // kept.
  ICRL_HD const float* random_row() {
    float* row = random + s * A;
    if (row[na - 1] != 0) return row;
    const float spread = c->behaviours.policy_scale[r];
    float peak = -INFINITY, total = 0, sum = 0;
    int64_t last = na - 1;
    while (last > 0 && !has(s, last)) --last;
    for (int64_t a = 0; a < na; ++a) {
      row[a] =
          spread * static_cast<float>(normal(philox(seed, number, static_cast<uint64_t>(s * A + a), kPolicy).v[0]));
      peak = row[a] > peak && has(s, a) ? row[a] : peak;
    }
    for (int64_t a = 0; a < na; ++a)
      total += row[a] = has(s, a) ? static_cast<float>(portable_exp(row[a] - peak)) : 0.f;
    for (int64_t a = 0; a < na; ++a) row[a] = a < last ? (sum += row[a]) / total : 2;
    return row;
  }

  // Ties go to the first of them from a random place on, round the circle. Actions that the state lacks score -inf.
  template <class F>
  ICRL_HD int64_t greedy(uint32_t x, F score) const {
    const int64_t from = anything(x, s);
    int64_t best = from;
    float best_score = -INFINITY;
    for (int64_t i = 0, a = from; i < na; ++i, a = a + 1 == na ? 0 : a + 1) {
      const float v = score(a);
      if (v > best_score) best = a, best_score = v;
    }
    return best;
  }

  ICRL_HD int64_t act_q(uint32_t x) const {
    const int32_t* visits = model.visits + s * A;
    const float* row = q + s * A;
    double total = 1;
    for (int64_t a = 0; a < na; ++a) total += visits[a];
    const float width = c->behaviours.q_bonus[r] * static_cast<float>(scale * std::sqrt(portable_log(total)));
    return greedy(x, [=](int64_t a) {
      if (lacks && !has(s, a)) return -INFINITY;
      return visits[a] ? row[a] + width / std::sqrt(static_cast<float>(visits[a])) : INFINITY;
    });
  }

  ICRL_HD int64_t act_model(uint32_t x) {
    Ops::sweep(model, static_cast<float>(scale), step & 1);
    Ops::fill_row(model, s);
    const float* row = model.row;
    return greedy(x, [=](int64_t a) { return row[a]; });
  }

  ICRL_HD void observe(int64_t a, float gain, int64_t next, bool terminated) {
    const int64_t i = s * A + a;
    const int32_t visits = ++model.visits[i];
    double& square = c->state.reward_square[r];
    square += static_cast<double>(gain) * gain;
    scale = std::sqrt(square / static_cast<double>(step));
    if (use_q) {  // Jin et al. 2018's rate, (H+1)/(H+n) with H = 1/(1-discount)
      const float discount = c->behaviours.q_discount[r], H = 1 / (1 - discount);
      float best = 0;
      if (!terminated) {
        const float* row = q + next * A;
        best = lacks && !has(next, 0) ? -INFINITY : row[0];
        for (int64_t b = 1; b < na; ++b) best = row[b] > best && !(lacks && !has(next, b)) ? row[b] : best;
      }
      q[i] += (H + 1) / (H + visits) * (gain + discount * best - q[i]);
    }
    if (use_model) model.observe(s, a, gain, terminated ? kTerminated : next);
  }

  // Step t of this call; x: its random numbers. `noise(x)` is normal(x) or the same number from a table.
  template <bool kLearns, class Noise>
  ICRL_HD void advance(int64_t t, uint32_t place, uint32_t choice, uint32_t explore, Noise noise) {
    const int64_t o = r * c->T + t;
    int64_t a;
    if (c->actions)
      a = c->actions[o];
    else if (who == P || (epsilon > 0 && uniform(explore) < epsilon - decay * static_cast<float>(step)))
      a = anything(choice, s);
    else if (who < P)
      a = choices ? choices[who * S + s] : Ops::search(probabilities + (who * S + s) * A, na, uniform(choice));
    else if (!kLearns || who == P + 1)
      a = Ops::search(random_row(), na, uniform(choice));
    else if (who == P + 2)
      a = act_q(choice);
    else
      a = act_model(choice);

    if (no_action(a)) return fail_action(t, s);
    const int64_t sa = s * A + a, first = window[2 * sa], length = window[2 * sa + 1], at = offset[sa];
    if (leaves(window + 2 * sa, at)) return fail(RolloutFault::row, n * S * A + sa);
    const int64_t j = Ops::search(cumulative + at, length, uniform(place)), next = first + j;
    const float edge = cumulative[at + (j < length ? j : 0)];
    float gain = reward[at + (j < length ? j : 0)];
    if (!(uniform(place) < edge)) return fail(RolloutFault::thresholds, n * S * A + sa);
    const float std = noise_state[next] + noise_action[sa];
    if (std > 0) gain = static_cast<float>(gain + static_cast<double>(std) * noise());
    ++step, ++elapsed;
    const int done = terminal[next] ? 1 : elapsed >= horizon ? 2 : 0;
    const RolloutOut& out = c->out;
    out.reward[o] = gain, out.done[o] = static_cast<uint8_t>(done), out.next_state[o] = static_cast<int16_t>(next);
    if (out.state) {
      out.state[o] = static_cast<int16_t>(s), out.action[o] = static_cast<int16_t>(a);
      out.behaviour[o] = c->actions ? 255 : static_cast<uint8_t>(who);
    }
    for (int64_t g = 0; g < G; ++g) out.labels[o * G + g] = references[s * G + g];
    if (kLearns) observe(a, gain, next, done == 1);
    s = next;
    if (done) begin_episode();
  }
};

// The whole of record r, plainly. first_fault found nothing. After a fault its state is as before, its learner's tables
// have what it learned on the way.
ICRL_HD inline RolloutFault simulate_plain(const RolloutCall& c, int64_t r, float* scratch) {
  Record<PlainOps> record;
  record.load(c, r, scratch);
  const bool learns = record.learns();
  for (int64_t t = 0; t < c.T && !record.fault.kind; ++t) {
    const Random4 x = philox(record.seed, record.number, static_cast<uint64_t>(record.step), kStep);
    const auto noise = [x] { return normal(x.v[1]); };
    learns ? record.advance<true>(t, x.v[0], x.v[2], x.v[3], noise)
           : record.advance<false>(t, x.v[0], x.v[2], x.v[3], noise);
  }
  if (!record.fault.kind) record.store();
  return record.fault;
}

// Where nothing can be raised: a record that meets what is out of range gets rewards of NaN, done 0, behaviour 255 and
// -1 for the rest, at all of its steps.
ICRL_HD inline void simulate_or_spoil(const RolloutCall& c, int64_t r, float* scratch) {
  if (!first_fault(c, r).kind && !simulate_plain(c, r, scratch).kind) return;
  const RolloutOut& out = c.out;
  for (int64_t o = r * c.T; o < (r + 1) * c.T; ++o) {
    out.state[o] = out.action[o] = out.next_state[o] = -1;
    out.reward[o] = NAN, out.done[o] = 0, out.behaviour[o] = 255;
    for (int64_t g = 0; g < c.G; ++g) out.labels[o * c.G + g] = -1;
  }
}

}  // namespace
}  // namespace icrl
