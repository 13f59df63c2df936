// Ops of models that keep tables of their context: memories whose keys are states (gla_step with one-hot keys and
// queries, of which one row is written and few are read), what is computed from their counts, and the choice of an
// action.
//
//   A, S, T    actions, states, behaviour tags;  G: policies;  D: channels of a value memory;  H: heads of a pool
//   state, previous, action   of the token: where the agent is, where it was, what it did there (A: nothing)
//   done       how that ended: 0 no, 1 terminated, 2 truncated, 3 it is the context's first token
//   rewards    a row of 5: mean, scale (mean absolute deviation), root mean square, largest, count, of rewards so far
//   seen       [A] rows of 3 + T + S sums over what was seen of the action in this state: visits, rewards, ends, tags,
//              next states
//   facts      [A] rows of 4: mean reward, 1/sqrt(visits) (0 where untried), share of outcomes that went on, and
//              1/(1 + visits²)
//   successors a row of 1 + S (1 + A): how many next states were seen, then of each its number and its frequency after
//              each action
//   value      a row of 1 + D + G: 1, what is written of the state, values of the policies
// All is float32, in the order in which icrl_kernels' reference sums it.
#pragma once

#include "fused/rows.inl"

namespace icrl::ICRL_ISA {
namespace {

constexpr int64_t kMostActions = 256, kRewards = 5, kFacts = 4, kActionFeatures = 12, kStateFeatures = 7;
enum Reward { kMean, kScale, kRms, kMost, kCount };

ICRL_INLINE float clamp(float x, float most) { return x < -most ? -most : x > most ? most : x; }
ICRL_INLINE bool one_row(const FusedPlan& p, const FusedView& v, int64_t width) {
  return given(v) && rows_of(p, v) == 1 && v.width == width;
}
ICRL_INLINE bool rows_like(const FusedPlan& p, const FusedView& v, int64_t count, int64_t width) {
  return given(v) && rows_of(p, v) == count && v.width == width;
}
ICRL_INLINE bool has_index(const FusedPlan& p, const FusedOp& o, int i, int64_t below) {
  return has_tensor(p, o, i, 8) && p.tensors[o.tensors[i]].below && p.tensors[o.tensors[i]].below <= below;
}

// ---- the rewards so far. tensors: the last one's reward, then the state [1] each: sum, deviation, square, most, count

const char* check_reward_statistics(const FusedPlan& p, const FusedOp& o) {
  for (int i = 0; i < 6; ++i)
    if (!has_tensor(p, o, i, 4)) return "wants a reward and five sums, a float32 each";
  return one_row(p, o.out, kRewards) ? nullptr : "wants a row of 5 for the statistics";
}
void reward_statistics(const FusedGroup& g, const FusedOp& o) {
  for (int64_t c = 0; c < g.contexts; ++c) {
    const float reward = *context_tensor<const float>(g, o, 0, c);
    float *sum = context_tensor<float>(g, o, 1, c), *deviation = context_tensor<float>(g, o, 2, c);
    float *square = context_tensor<float>(g, o, 3, c), *largest = context_tensor<float>(g, o, 4, c);
    float *count = context_tensor<float>(g, o, 5, c), *y = context_rows(g, o.out, c);
    const float seen = *count, n = seen < 1 ? 1 : seen;  // the first token brings none
    const float mean = (*sum += reward) / n;
    *deviation += std::fabs(reward - mean), *square += reward * reward;
    float most = -INFINITY;
    if (seen > 0) most = reward;
    if (seen > 1 && *largest > most) most = *largest;
    *largest = most == -INFINITY ? 0 : most, *count = seen + 1;
    y[kMean] = mean, y[kScale] = *deviation / n + 1e-2f, y[kRms] = std::sqrt(*square / n);
    y[kMost] = *largest, y[kCount] = seen;
  }
}

// ---- transitions: the last one is added to the row of (previous, action), and the rows of this state are read.
// tensors: memory [A,S,3+T+S], state, previous, action, reward, done (uint8), tag (a number); sizes: T

const char* check_transition_memory(const FusedPlan& p, const FusedOp& o) {
  if (!given(o.out)) return "wants an output";
  const int64_t A = rows_of(p, o.out), S = o.out.width - 3 - o.sizes[0];
  if (S < 1) return "wants columns of visits, reward, end, tags and states";
  if (!has_tensor(p, o, 0, 4 * A * S * o.out.width)) return "wants a memory of a row for each action and state";
  if (!has_index(p, o, 1, S) || !has_index(p, o, 2, S) || !has_index(p, o, 3, A + 1))
    return "wants indices of states and actions";
  if (!has_tensor(p, o, 4, 4) || !has_tensor(p, o, 5, 1) || !has_tensor(p, o, 6, 0))
    return "wants a reward, an end and a tag";
  return nullptr;
}
void transition_memory(const FusedGroup& g, const FusedOp& o) {
  const int64_t A = buffer(g.plan, o.out).rows, T = o.sizes[0], n = o.out.width, S = n - 3 - T, ld = stride(g, o.out);
  for (int64_t c = 0; c < g.contexts; ++c) {
    float *memory = context_tensor<float>(g, o, 0, c), *y = context_rows(g, o.out, c);
    const int64_t state = *context_tensor<const int64_t>(g, o, 1, c),
                  before = *context_tensor<const int64_t>(g, o, 2, c);
    const int64_t action = *context_tensor<const int64_t>(g, o, 3, c),
                  done = *context_tensor<const uint8_t>(g, o, 5, c);
    if (action < A && done < 3) {
      const auto tag = static_cast<int64_t>(*context_tensor<const float>(g, o, 6, c));
      float* row = memory + (action * S + before) * n;
      row[0] += 1, row[1] += *context_tensor<const float>(g, o, 4, c);
      if (done == 1) row[2] += 1;
      if (tag >= 0 && tag < T) row[3 + tag] += 1;
      if (done == 0) row[3 + T + state] += 1;  // where an episode ended, the state is no next one
    }
    for (int64_t a = 0; a < A; ++a) std::memcpy(y + a * ld, memory + (a * S + state) * n, static_cast<size_t>(4 * n));
  }
}

// ---- numbers of several actions at once

struct Actions {  // one number for each action, and zeros up to the next vector
  alignas(64) float at[kMostActions + kWidth];
};

// ---- features of actions from what was seen. in: seen; side: rewards; out: [A] rows of 12 + T features, then facts.
// tensors: state

const char* check_action_features(const FusedPlan& p, const FusedOp& o) {
  if (!given(o.in) || !given(o.out) || !one_row(p, o.side, kRewards))
    return "wants what was seen, rewards and an output";
  const int64_t T = o.sizes[0], S = o.in.width - 3 - T;
  if (S < 1 || rows_of(p, o.in) > kMostActions) return "wants rows of what was seen of at most 256 actions";
  if (!rows_like(p, o.out, rows_of(p, o.in), kActionFeatures + T + kFacts)) return "wants room for features and facts";
  if (!apart(o.in, o.out)) return "wants an output apart from its input";
  return has_index(p, o, 0, S) ? nullptr : "wants an index of states";
}
void action_features(const FusedGroup& g, const FusedOp& o) {
  const int64_t A = buffer(g.plan, o.in).rows, T = o.sizes[0], S = o.in.width - 3 - T;
  const int64_t ldx = stride(g, o.in), ldy = stride(g, o.out);
  for (int64_t c = 0; c < g.contexts; ++c) {
    const float *seen = context_rows(g, o.in, c), *rewards = context_rows(g, o.side, c);
    const int64_t state = *context_tensor<const int64_t>(g, o, 0, c);
    const float mean = rewards[kMean], scale = rewards[kScale];
    float* y = context_rows(g, o.out, c);
    Actions known, gain, soft, hard, fine, coarse;
    float count = 0, total = 0;
    for (int64_t a = 0; a < A; ++a) {
      const float *row = seen + a * ldx, n = row[0] < 0 ? 0 : row[0], inverse = 1.f / (n + 1e-2f);
      float *feature = y + a * ldy, *tags = feature + kActionFeatures, *facts = tags + T;
      const float reward = row[1] * inverse, end = row[2] * inverse, share = n / (n + .1f);
      const float r = (reward - mean) / scale * share;
      known.at[a] = share, gain.at[a] = r, count += share, total += r * share;
      Vec squares = Vec{};
      for_vectors(S, [&](int64_t j, auto part) {
        const Vec v = part.load(row + 3 + T + j) * inverse;
        squares += v * v;
      });
      feature[0] = share, feature[1] = .5f * std::log1p(n), feature[2] = 1.f / (1.f + n);
      feature[3] = .5f * clamp(r, 8);
      feature[9] = end, feature[10] = row[3 + T + state] * inverse, feature[11] = sum(squares);
      for (int64_t t = 0; t < T; ++t) tags[t] = row[3 + t] * inverse;
      facts[0] = reward, facts[1] = share / std::sqrt(n + 1e-2f), facts[2] = share * (1 - end);
      facts[3] = 1.f / (1.f + n * n);
    }
    const int64_t whole = (A + kWidth - 1) / kWidth * kWidth;
    for (int64_t a = A; a < whole; ++a) known.at[a] = gain.at[a] = 0;
    const float all = count + .1f, centre = total / all;
    Vec squares = Vec{};
    for (int64_t a = 0; a < whole; a += kWidth) {
      const Vec x = (load(gain.at + a) - centre) * load(known.at + a);
      squares += x * x;
    }
    const float deviation = std::sqrt(sum(squares) / all + 1e-5f);
    for (int64_t a = 0; a < whole; a += kWidth) {
      const Vec r = load(gain.at + a), x = (r - centre) * load(known.at + a);
      store(soft.at + a, vtanh(r)), store(hard.at + a, vtanh(4.f * r)), store(gain.at + a, x / deviation);
      store(fine.at + a, vtanh(5.f * x)), store(coarse.at + a, vtanh(30.f * x));
    }
    for (int64_t a = 0; a < A; ++a) {
      float* feature = y + a * ldy;
      feature[4] = soft.at[a], feature[5] = hard.at[a];
      feature[6] = gain.at[a], feature[7] = fine.at[a], feature[8] = coarse.at[a];
    }
  }
}

// ---- features of the context. in: rewards; out: a row of 7; tensors: done (uint8)

const char* check_context_features(const FusedPlan& p, const FusedOp& o) {
  if (!one_row(p, o.in, kRewards) || !one_row(p, o.out, kStateFeatures)) return "wants rewards and a row of 7";
  return has_tensor(p, o, 0, 1) ? nullptr : "wants an end";
}
void context_features(const FusedGroup& g, const FusedOp& o) {
  for (int64_t c = 0; c < g.contexts; ++c) {
    const float* r = context_rows(g, o.in, c);
    const uint8_t done = *context_tensor<const uint8_t>(g, o, 0, c);
    float* y = context_rows(g, o.out, c);
    const float rms = r[kRms] / r[kScale];
    y[0] = .3f * std::log1p(r[kCount]), y[1] = .3f * std::log(r[kScale]), y[2] = clamp(r[kMean] / r[kScale], 5);
    y[3] = done == 1, y[4] = done == 2, y[5] = .5f * (rms > 8 ? 8 : rms);
    y[6] = .3f * clamp((r[kMost] - r[kMean]) / r[kScale], 8);
  }
}

// ---- the next states seen, and how often each action led there. in: seen; out: successors; sizes: T

const char* check_successors(const FusedPlan& p, const FusedOp& o) {
  if (!given(o.in) || !given(o.out)) return "wants an input and an output";
  const int64_t A = rows_of(p, o.in), S = o.in.width - 3 - o.sizes[0];
  if (S < 1 || S >= 1 << 24) return "wants what was seen of at least one state, and of less than 2^24";
  return one_row(p, o.out, 1 + S * (1 + A)) && apart(o.in, o.out) ? nullptr : "wants a row of 1 + S (1 + A)";
}
void successors(const FusedGroup& g, const FusedOp& o) {
  const int64_t A = buffer(g.plan, o.in).rows, T = o.sizes[0], S = o.in.width - 3 - T, ldx = stride(g, o.in);
  for (int64_t c = 0; c < g.contexts; ++c) {
    const float* seen = context_rows(g, o.in, c);
    float *y = context_rows(g, o.out, c), *to = y + 1;
    int64_t n = 0;
    for_vectors(S, [&](int64_t j, auto part) {
      Vec any = Vec{};
      for (int64_t a = 0; a < A; ++a) any = vmax(any, part.load(seen + a * ldx + 3 + T + j));
      float some[kWidth];
      store(some, any);
      for (int i = 0; i < kWidth; ++i) {
        if (some[i] == 0) continue;
        *to++ = static_cast<float>(j + i), ++n;
        for (int64_t a = 0; a < A; ++a) {
          const float *row = seen + a * ldx, visits = row[0] < 0 ? 0 : row[0];
          *to++ = row[3 + T + j + i] / (visits + 1e-2f);
        }
      }
    });
    y[0] = static_cast<float>(n);
  }
}

// ---- what a value memory stores. out: value; side: what is written of the state, a row of D; more: rewards; and, for
// the policies' best values in raw rewards, in: q [A] rows of G, more: backup [A] rows of G (none: zeros), a row of G
// that is added to all, facts (none: nothing fades): q and that row count in so far as the action is unknown, by the
// last fact. Without q the mean reward is stored for all policies.

const char* check_state_value(const FusedPlan& p, const FusedOp& o) {
  if (!given(o.out) || !given(o.side)) return "wants an output and what is written of the state";
  const int64_t D = o.side.width, G = o.out.width - 1 - D;
  if (G < 1 || !one_row(p, o.out, 1 + D + G) || !one_row(p, o.side, D) || !one_row(p, o.more[0], kRewards))
    return "wants a row of 1 + D + G, one of D and rewards";
  if (!given(o.in)) return nullptr;
  if (o.in.width != G || !one_row(p, o.more[2], G)) return "wants q of each policy and a row for all actions";
  if (given(o.more[1]) && !rows_like(p, o.more[1], rows_of(p, o.in), G)) return "wants a backup of each q";
  if (given(o.more[3]) && !(given(o.more[1]) && rows_like(p, o.more[3], rows_of(p, o.in), kFacts)))
    return "wants rows of 4 facts of the actions, beside backups";
  return nullptr;
}
void state_value(const FusedGroup& g, const FusedOp& o) {
  const int64_t D = o.side.width, G = o.out.width - 1 - D;
  for (int64_t c = 0; c < g.contexts; ++c) {
    const float *written = context_rows(g, o.side, c), *rewards = context_rows(g, o.more[0], c);
    const float mean = rewards[kMean], scale = rewards[kScale];
    float *y = context_rows(g, o.out, c), *best = y + 1 + D;
    y[0] = 1;
    std::memcpy(y + 1, written, static_cast<size_t>(4 * D));
    if (!given(o.in)) {
      for (int64_t j = 0; j < G; ++j) best[j] = mean;
      continue;
    }
    const int64_t A = buffer(g.plan, o.in).rows, ldq = stride(g, o.in);
    const float *q = context_rows(g, o.in, c), *all = context_rows(g, o.more[2], c);
    const float* backup = given(o.more[1]) ? context_rows(g, o.more[1], c) : nullptr;
    const int64_t ldb = backup ? stride(g, o.more[1]) : 0;
    const float* facts = given(o.more[3]) ? context_rows(g, o.more[3], c) : nullptr;
    const int64_t ldf = facts ? stride(g, o.more[3]) : 0;
    for_vectors(G, [&](int64_t j, auto part) {
      const Vec added = part.load(all + j);
      const auto of = [&](int64_t a) {
        const Vec x = part.load(q + a * ldq + j);
        if (facts) return part.load(backup + a * ldb + j) + (x + added) * facts[a * ldf + kFacts - 1];
        return backup ? part.load(backup + a * ldb + j) + x : x;
      };
      Vec most = of(0);
      for (int64_t a = 1; a < A; ++a) most = vmax(most, of(a));
      part.store(best + j, (facts ? most : most + added) * scale + mean);
    });
  }
}

// ---- a value memory: the value is mixed into this state's row, and rows of the successors are read. in: value; side:
// successors; out: [A] rows like the value's. tensors: memory [S,1+D+G], state; numbers: rate, 1 - rate

// A number that an op has written as a float, where it is below `most`: of a row that no op has written, 0.
ICRL_INLINE int64_t whole(float x, int64_t most) {
  return x >= 0 && x < static_cast<float>(most) ? static_cast<int64_t>(x) : 0;
}

// y[a][j..] of NA actions from `first` on: sums of the memory's rows, in the order of the states
template <int NA, class P>
ICRL_INLINE void expect(const float* memory, int64_t S, int64_t width, const float* list, int64_t count, int64_t A,
                        int64_t first, int64_t j, P part, float* y, int64_t ldy) {
  Vec t[NA];
#pragma GCC unroll 8
  for (int a = 0; a < NA; ++a) t[a] = Vec{};
  for (int64_t i = 0; i < count; ++i, list += 1 + A) {
    const Vec row = part.load(memory + whole(list[0], S) * width + j);
#pragma GCC unroll 8
    for (int a = 0; a < NA; ++a) t[a] += row * splat(list[1 + first + a]);
  }
#pragma GCC unroll 8
  for (int a = 0; a < NA; ++a) part.store(y + (first + a) * ldy + j, t[a]);
}

const char* check_value_memory(const FusedPlan& p, const FusedOp& o) {
  if (!given(o.in) || !given(o.side) || !given(o.out)) return "wants a value, successors and an output";
  const int64_t A = rows_of(p, o.out), width = o.in.width, S = (o.side.width - 1) / (1 + A);
  if (S < 1 || !one_row(p, o.side, 1 + S * (1 + A)) || !one_row(p, o.in, o.out.width))
    return "wants a row of 1 + S (1 + A) successors, and rows of the value's width";
  if (!apart(o.in, o.out) || !apart(o.side, o.out)) return "wants an output apart from its inputs";
  if (!has_tensor(p, o, 0, 4 * S * width) || !has_index(p, o, 1, S))
    return "wants a memory of a row a state, and a state";
  return nullptr;
}
void value_memory(const FusedGroup& g, const FusedOp& o) {
  const int64_t A = buffer(g.plan, o.out).rows, width = o.in.width, ldy = stride(g, o.out);
  const int64_t S = (o.side.width - 1) / (1 + A);
  const float rate = o.numbers[0], keep = o.numbers[1];
  for (int64_t c = 0; c < g.contexts; ++c) {
    const float *value = context_rows(g, o.in, c), *list = context_rows(g, o.side, c);
    float *memory = context_tensor<float>(g, o, 0, c), *y = context_rows(g, o.out, c);
    float* slot = memory + *context_tensor<const int64_t>(g, o, 1, c) * width;
    const int64_t count = whole(list[0], S + 1);
    for_vectors(width, [&](int64_t j, auto part) {
      part.store(slot + j, part.load(slot + j) * keep + rate * part.load(value + j));
    });
    for_vectors(width, [&](int64_t j, auto part) {
      int64_t a = 0;
      for (; a + 5 <= A; a += 5) expect<5>(memory, S, width, list + 1, count, A, a, j, part, y, ldy);
      switch (A - a) {
        case 1: expect<1>(memory, S, width, list + 1, count, A, a, j, part, y, ldy); break;
        case 2: expect<2>(memory, S, width, list + 1, count, A, a, j, part, y, ldy); break;
        case 3: expect<3>(memory, S, width, list + 1, count, A, a, j, part, y, ldy); break;
        case 4: expect<4>(memory, S, width, list + 1, count, A, a, j, part, y, ldy); break;
        default: break;
      }
    });
  }
}

// ---- one Bellman backup at each policy's discount, in units of the rewards. in: what the value memory read, [A] rows
// of 1 + D + G; side: rewards; more: facts; out: [A] rows of D + 4 G + 1: average, backup, the backup against the other
// actions' at three resolutions, weight. weights: discounts [G], bonus [G]

constexpr int64_t kMostPairs = 4096;  // of actions and policies, or actions and heads

const char* check_bellman_backup(const FusedPlan& p, const FusedOp& o) {
  if (!given(o.in) || !given(o.out) || !one_row(p, o.side, kRewards))
    return "wants what was read, rewards and an output";
  const int64_t A = rows_of(p, o.in), G = (o.out.width - o.in.width) / 3, D = o.in.width - 1 - G;
  if (G < 1 || D < 0 || !rows_like(p, o.out, A, D + 4 * G + 1)) return "wants rows of 1 + D + G and of D + 4 G + 1";
  if (A > kMostActions || A * G > kMostPairs) return "wants at most 256 actions, and 4096 of actions times policies";
  if (!rows_like(p, o.more[0], A, kFacts)) return "wants rows of 4 facts of the actions";
  if (!apart(o.in, o.out)) return "wants an output apart from its input";
  return has_weights(p, o, 0, padded(G)) && has_weights(p, o, 1, padded(G)) ? nullptr : "wants discounts and bonuses";
}
void bellman_backup(const FusedGroup& g, const FusedOp& o) {
  const int64_t A = buffer(g.plan, o.in).rows, G = (o.out.width - o.in.width) / 3, D = o.in.width - 1 - G;
  const int64_t ldx = stride(g, o.in), ldy = stride(g, o.out), ldf = stride(g, o.more[0]);
  const float *discounts = weights(g, o, 0), *bonus = weights(g, o, 1);
  alignas(64) float packed[kMostPairs + kWidth], fine[kMostPairs + kWidth], coarse[kMostPairs + kWidth];
  for (int64_t c = 0; c < g.contexts; ++c) {
    const float *read = context_rows(g, o.in, c), *rewards = context_rows(g, o.side, c);
    const float *facts = context_rows(g, o.more[0], c), mean = rewards[kMean], scale = rewards[kScale];
    float* y = context_rows(g, o.out, c);
    float known = .1f;
    for (int64_t a = 0; a < A; ++a) {
      const float *x = read + a * ldx, *fact = facts + a * ldf, inverse = 1.f / (x[0] + 1e-2f);
      float *to = y + a * ldy, share = fact[2] > .02f ? 1.f : 0.f;
      for_vectors(D, [&](int64_t j, auto part) { part.store(to + j, part.load(x + 1 + j) * inverse); });
      for_vectors(G, [&](int64_t j, auto part) {
        const Vec d = part.load(discounts + j), gain = fact[0] + part.load(bonus + j) * (rewards[kRms] * fact[1]);
        const Vec next = part.load(x + 1 + D + j) * inverse;
        const Vec t = (1.f - d) * gain + d * (fact[2] * next);
        part.store(to + D + j, clamped((t - mean) / scale, 8) * share);
      });
      to[D + 4 * G] = x[0], known += share;
    }
    for_vectors(G, [&](int64_t j, auto part) {
      Vec total = Vec{}, squares = Vec{};  // the backup of what is unknown is 0
      for (int64_t a = 0; a < A; ++a) total += part.load(y + a * ldy + D + j);
      const Vec centre = total / known;
      for (int64_t a = 0; a < A; ++a) {
        const float share = facts[a * ldf + 2] > .02f ? 1.f : 0.f;
        const Vec x = (part.load(y + a * ldy + D + j) - centre) * share;
        part.store(packed + a * G + j, x);
        squares += x * x;
      }
      const Vec inverse = 1.f / vsqrt(squares / known + 1e-5f);
      for (int64_t a = 0; a < A; ++a) part.store(y + a * ldy + D + G + j, part.load(packed + a * G + j) * inverse);
    });
    for_vectors(A * G, [&](int64_t j, auto part) {
      const Vec x = part.load(packed + j);
      part.store(fine + j, vtanh(5.f * x)), part.store(coarse + j, vtanh(30.f * x));
    });
    for (int64_t a = 0; a < A; ++a) {
      float* to = y + a * ldy + D + 2 * G;
      for (int64_t j = 0; j < G; ++j) to[j] = fine[a * G + j], to[G + j] = coarse[a * G + j];
    }
  }
}

// ---- rows pooled over actions. in: [A] rows of 2 P; more: scores, [A] rows of H; out: a row of 2 P: of the first P
// columns the means under softmax(numbers[0] score), each head's P / H by its own, of the others the largest

const char* check_pool(const FusedPlan& p, const FusedOp& o) {
  if (!given(o.in) || !given(o.more[0]) || !one_row(p, o.out, o.in.width))
    return "wants rows, scores and a row as wide";
  const int64_t A = rows_of(p, o.in), H = o.more[0].width;
  if (rows_of(p, o.more[0]) != A || o.in.width % (2 * H)) return "wants a score of each head, which share the columns";
  if (A * H > kMostPairs) return "wants at most 4096 of actions times heads";
  return apart(o.in, o.out) ? nullptr : "wants an output apart from its input";
}
void pool(const FusedGroup& g, const FusedOp& o) {
  const int64_t A = buffer(g.plan, o.in).rows, H = o.more[0].width, P = o.in.width / 2, size = P / H;
  const int64_t ldx = stride(g, o.in), lds = stride(g, o.more[0]);
  const float sharpness = o.numbers[0];
  alignas(64) float shares[kMostPairs + kWidth];
  for (int64_t c = 0; c < g.contexts; ++c) {
    const float *x = context_rows(g, o.in, c), *scores = context_rows(g, o.more[0], c);
    float* y = context_rows(g, o.out, c);
    for_vectors(H, [&](int64_t j, auto part) {
      Vec most = part.load(scores + j), total = Vec{};
      for (int64_t a = 1; a < A; ++a) most = vmax(most, part.load(scores + a * lds + j));
      for (int64_t a = 0; a < A; ++a) {
        const Vec e = vexp(sharpness * (part.load(scores + a * lds + j) - most));
        part.store(shares + a * H + j, e);
        total += e;
      }
      for (int64_t a = 0; a < A; ++a) part.store(shares + a * H + j, part.load(shares + a * H + j) / total);
    });
    for (int64_t h = 0; h < H; ++h)
      for_vectors(size, [&](int64_t j, auto part) {
        Vec t = Vec{};
        for (int64_t a = 0; a < A; ++a) t += part.load(x + a * ldx + h * size + j) * shares[a * H + h];
        part.store(y + h * size + j, t);
      });
    for_vectors(P, [&](int64_t j, auto part) {
      Vec most = part.load(x + P + j);
      for (int64_t a = 1; a < A; ++a) most = vmax(most, part.load(x + a * ldx + P + j));
      part.store(y + P + j, most);
    });
  }
}

// ---- the action: the first largest of logit + temperature noise, among those that the mask marks. in: logits, [A]
// rows of 1 or a row of [A]. tensors: noise [A], temperature (a number), mask [A] of bytes or null, own (int64: the
// task has so many actions, those beyond wrap around), state; and what is written: the action and the task's (int64),
// the state, logits [A] or null

const char* check_choose_action(const FusedPlan& p, const FusedOp& o) {
  if (!given(o.in) || (o.in.width != 1 && rows_of(p, o.in) != 1)) return "wants a column or a row of logits";
  const int64_t A = rows_of(p, o.in) * o.in.width;
  if (!has_tensor(p, o, 0, 4 * A) || !has_tensor(p, o, 1, 0)) return "wants noise of each action and a temperature";
  if (!has_tensor(p, o, 2, A, true)) return "wants a mask of a byte an action";
  for (int i = 3; i < 8; ++i)
    if (!has_tensor(p, o, i, 8)) return "wants int64 numbers, one a context";
  return has_tensor(p, o, 8, 4 * A, true) ? nullptr : "wants logits of each action";
}
void choose_action(const FusedGroup& g, const FusedOp& o) {
  const int64_t A = buffer(g.plan, o.in).rows * o.in.width, ldx = o.in.width > 1 ? 1 : stride(g, o.in);
  for (int64_t c = 0; c < g.contexts; ++c) {
    const float *x = context_rows(g, o.in, c), *noise = context_tensor<const float>(g, o, 0, c);
    const float temperature = *context_tensor<const float>(g, o, 1, c);
    const uint8_t* mask = context_tensor<const uint8_t>(g, o, 2, c);
    float* logits = context_tensor<float>(g, o, 8, c);
    int64_t best = 0;
    float most = -INFINITY;
    for (int64_t a = 0; a < A; ++a) {
      const float logit = mask && !mask[a] ? -INFINITY : x[a * ldx];
      if (logits) logits[a] = logit;
      const float value = logit + temperature * noise[a];
      if (value > most || (value != value && most == most)) most = value, best = a;  // NaN is above all, as in torch
    }
    const int64_t own = *context_tensor<const int64_t>(g, o, 3, c);
    *context_tensor<int64_t>(g, o, 5, c) = best;
    *context_tensor<int64_t>(g, o, 6, c) = own > 0 ? best % own : best;
    *context_tensor<int64_t>(g, o, 7, c) = *context_tensor<const int64_t>(g, o, 4, c);
  }
}

}  // namespace

const FusedKind* fused_memories() {
  static constexpr FusedKind kinds[] = {
      {"reward_statistics", check_reward_statistics, reward_statistics},
      {"transition_memory", check_transition_memory, transition_memory},
      {"action_features", check_action_features, action_features},
      {"context_features", check_context_features, context_features},
      {"successors", check_successors, successors},
      {"state_value", check_state_value, state_value},
      {"value_memory", check_value_memory, value_memory},
      {"bellman_backup", check_bellman_backup, bellman_backup},
      {"pool", check_pool, pool},
      {"choose_action", check_choose_action, choose_action},
      {nullptr, nullptr, nullptr},
  };
  return kinds;
}

}  // namespace icrl::ICRL_ISA
