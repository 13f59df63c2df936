// Ops that make a model's token of what was observed, done and earned: rows of tables, features of rewards.
//
//   S, A, T    observations, actions, tags of behaviours
//   done       how the last step ended: 0 no, 1 terminated, 2 truncated, 3 it is the context's first token
#pragma once

#include "fused/rows.inl"

namespace icrl::ICRL_ISA {
namespace {

constexpr int64_t kEnds = 4, kStart = 3, kRewardFeatures = 4, kMostFloats = int64_t{1} << 40;

ICRL_INLINE bool one_row_of(const FusedPlan& p, const FusedView& v, int64_t width) {
  return given(v) && rows_of(p, v) == 1 && v.width == width;
}

// y = the table's row i, or y + that; with two indices, row i n + j, j below n. sizes: rows of the table, whether to
// add; weights: table [rows][width padded]; tensors: i and, if there are two, j, int64
const char* check_table_row(const FusedPlan& p, const FusedOp& o) {
  if (!given(o.out) || rows_of(p, o.out) != 1) return "wants an output of one row a context";
  if (!has_weights(p, o, 0, o.sizes[0] * padded(o.out.width))) return "wants its table within the packed weights";
  int64_t rows = 1;
  for (int i = 0; i < 2; ++i) {
    if (i == 1 && o.tensors[1] < 0) break;
    if (!has_tensor(p, o, i, 8) || p.tensors[o.tensors[i]].below < 1) return "wants indices";
    if (p.tensors[o.tensors[i]].below > o.sizes[0] / rows) return "wants indices within its table";
    rows *= p.tensors[o.tensors[i]].below;
  }
  return nullptr;
}
void table_row(const FusedGroup& g, const FusedOp& o) {
  const int64_t n = o.out.width, ld = padded(n);
  for (int64_t c = 0; c < g.contexts; ++c) {
    int64_t row = *context_tensor<const int64_t>(g, o, 0, c);
    if (o.tensors[1] >= 0) row = row * g.plan.tensors[o.tensors[1]].below + *context_tensor<const int64_t>(g, o, 1, c);
    const float* x = weights(g, o, 0) + row * ld;
    float* y = context_rows(g, o.out, c);
    for_vectors(n, [&](int64_t j, auto part) {
      part.store(y + j, o.sizes[1] ? part.load(y + j) + part.load(x + j) : part.load(x + j));
    });
  }
}

// y += the table's row [before, action], where before is the previous observation, or S on a context's first token.
// tensors: previous observation, action (int64), done (uint8); sizes: S, actions (A, and A itself: none); weights:
// table [S + 1, actions][width padded]
const char* check_transition_row(const FusedPlan& p, const FusedOp& o) {
  const int64_t S = o.sizes[0], A = o.sizes[1];
  if (!given(o.out) || rows_of(p, o.out) != 1) return "wants an output of one row a context";
  const int64_t ld = padded(o.out.width);
  if (S < 1 || A < 1 || S >= kMostFloats / A / ld) return "wants sizes of at least 1, of a table that fits into memory";
  if (!has_weights(p, o, 0, (S + 1) * A * ld)) return "wants its table within the packed weights";
  for (int i = 0; i < 2; ++i) {
    const int64_t below = i ? A : S;
    if (!has_tensor(p, o, i, 8) || p.tensors[o.tensors[i]].below < 1 || p.tensors[o.tensors[i]].below > below)
      return "wants indices of observations and actions";
  }
  return has_tensor(p, o, 2, 1) ? nullptr : "wants an end";
}
void transition_row(const FusedGroup& g, const FusedOp& o) {
  const int64_t n = o.out.width, ld = padded(n);
  for (int64_t c = 0; c < g.contexts; ++c) {
    const bool first = *context_tensor<const uint8_t>(g, o, 2, c) == kStart;
    const int64_t before = first ? o.sizes[0] : *context_tensor<const int64_t>(g, o, 0, c);
    const float* x = weights(g, o, 0) + (before * o.sizes[1] + *context_tensor<const int64_t>(g, o, 1, c)) * ld;
    float* y = context_rows(g, o.out, c);
    for_vectors(n, [&](int64_t j, auto part) { part.store(y + j, part.load(y + j) + part.load(x + j)); });
  }
}

// y = the table's row [done, tag], or y + that. tensors: done (uint8), tag (a number); sizes: T, whether to add;
// weights: table [4, T][width padded]. What is no end or tag, which is for whoever gives it to refuse, is taken for 0
const char* check_end_row(const FusedPlan& p, const FusedOp& o) {
  if (!given(o.out) || rows_of(p, o.out) != 1) return "wants an output of one row a context";
  const int64_t T = o.sizes[0], ld = padded(o.out.width);
  if (T < 1 || T > kMostFloats / kEnds / ld) return "wants a tag or more, of a table that fits into memory";
  if (!has_weights(p, o, 0, kEnds * T * ld)) return "wants its table within the packed weights";
  return has_tensor(p, o, 0, 1) && has_tensor(p, o, 1, 0) ? nullptr : "wants an end and a tag";
}
void end_row(const FusedGroup& g, const FusedOp& o) {
  const int64_t T = o.sizes[0], n = o.out.width, ld = padded(n);
  for (int64_t c = 0; c < g.contexts; ++c) {
    const int64_t told = *context_tensor<const uint8_t>(g, o, 0, c), done = told < kEnds ? told : 0;
    const float number = *context_tensor<const float>(g, o, 1, c);
    const int64_t tag = number >= 0 && number < static_cast<float>(T) ? static_cast<int64_t>(number) : 0;
    const float* x = weights(g, o, 0) + (done * T + tag) * ld;
    float* y = context_rows(g, o.out, c);
    for_vectors(n, [&](int64_t j, auto part) {
      part.store(y + j, o.sizes[1] ? part.load(y + j) + part.load(x + j) : part.load(x + j));
    });
  }
}

// The reward x in units of the root mean square of those so far, at four scales: y = (x / 5 within -6 to 6, tanh x,
// tanh 5x, tanh 25x). tensors: reward, done (uint8), and the state: sum of squares, count, which grow by each reward
// but the first token's
const char* check_reward_features(const FusedPlan& p, const FusedOp& o) {
  for (int i = 0; i < 4; ++i)
    if (!has_tensor(p, o, i, i == 1 ? 1 : 4)) return "wants a reward, an end and two sums";
  return one_row_of(p, o.out, kRewardFeatures) ? nullptr : "wants a row of 4";
}
void reward_features(const FusedGroup& g, const FusedOp& o) {
  for (int64_t c = 0; c < g.contexts; ++c) {
    const float reward = *context_tensor<const float>(g, o, 0, c);
    float *square = context_tensor<float>(g, o, 2, c), *count = context_tensor<float>(g, o, 3, c);
    if (*context_tensor<const uint8_t>(g, o, 1, c) != kStart) *square += reward * reward, *count += 1;
    const float x = *square > 0 ? reward / std::sqrt(*square / (*count < 1 ? 1 : *count)) : reward;
    const float small = x / 5;
    float scaled[kWidth] = {x, 5 * x, 25 * x}, *y = context_rows(g, o.out, c);
    store(scaled, vtanh(load(scaled)));
    y[0] = small < -6 ? -6 : small > 6 ? 6 : small;
    for (int i = 0; i < 3; ++i) y[1 + i] = scaled[i];
  }
}

}  // namespace

const FusedKind* fused_tokens() {
  static constexpr FusedKind kinds[] = {
      {"table_row", check_table_row, table_row},
      {"transition_row", check_transition_row, transition_row},
      {"end_row", check_end_row, end_row},
      {"reward_features", check_reward_features, reward_features},
      {nullptr, nullptr, nullptr},
  };
  return kinds;
}

}  // namespace icrl::ICRL_ISA
