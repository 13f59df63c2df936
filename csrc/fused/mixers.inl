// Ops of token mixers, one token a context: short convolutions, feature maps, gates, the recurrences' steps on the
// user's states, attention to the last tokens, and what follows them.
//
//   x, y, z    rows of an op's `in`, `out` and `side`; what `more` holds, and weights and tensors, each op says
//   H, Hk      query heads and key/value heads; a row of all heads is one behind the other, without gaps
//   K, V, M    channels of a key and of a value, slots
//   e          decays, exp of the gates g <= 0;  w: what a token writes to slots, 1 - e
//   state      [Hk, K, V] float32 of a context, as icrl_kernels.layers.State has it, changed in place
// Recurrences are those of linear_attention/step.inl, which icrl_kernels' own steps run too.
#pragma once

#include <initializer_list>

#include "fused/rows.inl"
#include "linear_attention/limits.h"
#include "linear_attention/step.inl"

namespace icrl::ICRL_ISA {
namespace {

// ---- heads and gates

// Whether the columns of a row are so many heads' of some channels each.
ICRL_INLINE bool heads_of(const FusedView& v, int64_t heads) { return heads >= 1 && v.width % heads == 0; }

// f(x, y) of every head of every row
template <class F>
ICRL_INLINE void each_head(const FusedGroup& g, const FusedOp& o, int64_t heads, F&& f) {
  const int64_t n = o.in.width / heads, m = o.out.width / heads, all = rows(g, o.in);
  for (int64_t r = 0; r < all; ++r) {
    const float* x = first_row(g, o.in) + r * stride(g, o.in);
    float* y = first_row(g, o.out) + r * stride(g, o.out);
    for (int64_t h = 0; h < heads; ++h) f(x + h * n, y + h * m);
  }
}

// log(1 + y) for y in [0, 1]: twice the area tangent of y / (2 + y), which is at most 1/3
ICRL_INLINE Vec log1p_unit(Vec y) {
  const Vec s = y / (2.f + y), square = s * s;
  Vec p = splat(1.f / 15);
  p = p * square + 1.f / 13;
  p = p * square + 1.f / 11;
  p = p * square + 1.f / 9;
  p = p * square + 1.f / 7;
  p = p * square + 1.f / 5;
  p = p * square + 1.f / 3;
  return 2.f * s + 2.f * s * square * p;
}
ICRL_INLINE Vec softplus(Vec x) { return vmax(Vec{}, x) + log1p_unit(vexp(x > 0.f ? -x : x)); }
// 1 - exp(g) for g <= 0, without cancellation near 0
ICRL_INLINE Vec one_minus_exp(Vec g) {
  Vec p = splat(1.f / 5040);
  p = p * g + 1.f / 720;
  p = p * g + 1.f / 120;
  p = p * g + 1.f / 24;
  p = p * g + 1.f / 6;
  p = p * g + .5f;
  return g > -.35f ? -(p * g * g + g) : 1.f - vexp(g);
}

// y = exp g with, by sizes[0],
//   0: g = max(-rate softplus(s x + b), least);   1: g = bound sigmoid(rate (x + b))
// weights: rate, b or none; numbers: s, least, bound. side, if given: 1 - y
const char* check_decay(const FusedPlan& p, const FusedOp& o) {
  if (const char* wrong = check_map(p, o)) return wrong;
  const int64_t n = o.in.width;
  if (!has_weights(p, o, 0, n) || (o.weights[1] >= 0 && !has_weights(p, o, 1, n))) return "wants a weight a column";
  if (o.sizes[0] > 1) return "wants one of two forms";
  if (given(o.side) &&
      !(as_wide(p, o.side, rows_of(p, o.in), o.in.width) && apart(o.side, o.out) && same_or_apart(o.side, o.in)))
    return "wants rows of the input's shape, apart from the output, at its side";
  return nullptr;
}
template <bool Bounded>
ICRL_INLINE void decay_rows(const FusedGroup& g, const FusedOp& o) {
  const float *rate = weights(g, o, 0), *b = weights(g, o, 1);
  const float s = o.numbers[0], least = o.numbers[1], bound = o.numbers[2];
  const int64_t n = o.in.width, all = rows(g, o.in);
  for (int64_t r = 0; r < all; ++r) {
    const float* x = first_row(g, o.in) + r * stride(g, o.in);
    float* y = first_row(g, o.out) + r * stride(g, o.out);
    float* w = given(o.side) ? first_row(g, o.side) + r * stride(g, o.side) : nullptr;
    for_vectors(n, [&](int64_t j, auto part) {
      const Vec shift = b ? part.load(b + j) : Vec{}, by = part.load(rate + j), a = part.load(x + j);
      const Vec log = Bounded ? bound * sigmoid(by * (a + shift)) : vmax(splat(least), -by * softplus(s * a + shift));
      part.store(y + j, vexp(log));
      if (w) part.store(w + j, one_minus_exp(log));
    });
  }
}
void decay(const FusedGroup& g, const FusedOp& o) { o.sizes[0] ? decay_rows<true>(g, o) : decay_rows<false>(g, o); }

// ---- heads

// y = softmax of (2x, -2x) of each head: twice as many columns. sizes: heads
const char* check_hedgehog(const FusedPlan& p, const FusedOp& o) {
  if (!given(o.in) || !heads_of(o.in, o.sizes[0])) return "wants an input of whole heads";
  return as_wide(p, o.out, rows_of(p, o.in), 2 * o.in.width) && apart(o.in, o.out)
             ? nullptr
             : "wants twice the columns of output, apart from its input";
}
void hedgehog(const FusedGroup& g, const FusedOp& o) {
  const int64_t n = o.in.width / o.sizes[0];
  each_head(g, o, o.sizes[0], [&](const float* x, float* y) {
    Vec most = Vec{}, total = Vec{};
    for_vectors(n, [&](int64_t j, auto part) {
      const Vec z = 2.f * part.load(x + j);
      most = vmax(vmax(-z, z), most);
    });
    const Vec top = splat(max_lane(most));
    for_vectors(n, [&](int64_t j, auto part) {
      const Vec z = 2.f * part.load(x + j), a = vexp(z - top), b = vexp(-z - top);
      part.store(y + j, a), part.store(y + n + j, b);
      total += part.keep(a + b);
    });
    const Vec by = splat(1.f / sum(total));
    for_vectors(2 * n, [&](int64_t j, auto part) { part.store(y + j, part.load(y + j) * by); });
  });
}

const char* check_heads(const FusedPlan& p, const FusedOp& o) {
  if (const char* wrong = check_map(p, o)) return wrong;
  return heads_of(o.in, o.sizes[0]) ? nullptr : "wants an input of whole heads";
}
// y = x / (sum of x + numbers[0]) in each head. sizes: heads
void sum_norm(const FusedGroup& g, const FusedOp& o) {
  const int64_t n = o.in.width / o.sizes[0];
  each_head(g, o, o.sizes[0], [&](const float* x, float* y) {
    Vec total = Vec{};
    for_vectors(n, [&](int64_t j, auto part) { total += part.load(x + j); });
    const Vec by = splat(sum(total) + o.numbers[0]);
    for_vectors(n, [&](int64_t j, auto part) { part.store(y + j, part.load(x + j) / by); });
  });
}

// y = a / (b + numbers[0]) with (a, b) = x in each head, b its last channel. sizes: heads
const char* check_divide_by_last(const FusedPlan& p, const FusedOp& o) {
  const int64_t H = o.sizes[0];
  if (!given(o.in) || !heads_of(o.in, H) || o.in.width == H) return "wants an input of heads of two channels or more";
  return as_wide(p, o.out, rows_of(p, o.in), o.in.width - H) && apart(o.in, o.out)
             ? nullptr
             : "wants a column less a head of output, apart from its input";
}
void divide_by_last(const FusedGroup& g, const FusedOp& o) {
  const int64_t n = o.out.width / o.sizes[0];
  each_head(g, o, o.sizes[0], [&](const float* x, float* y) {
    const Vec by = splat(x[n] + o.numbers[0]);
    for_vectors(n, [&](int64_t j, auto part) { part.store(y + j, part.load(x + j) / by); });
  });
}

// y = x / sqrt(mean x^2 + numbers[0]) in each head, times f(z): sizes: heads, f: 0 no z, 1 silu, 2 sigmoid
const char* check_head_norm(const FusedPlan& p, const FusedOp& o) {
  if (const char* wrong = o.sizes[1] ? check_map2(p, o) : check_map(p, o)) return wrong;
  if (o.sizes[1] > 2) return "wants a gate of 0, 1 or 2";
  return heads_of(o.in, o.sizes[0]) ? nullptr : "wants an input of whole heads";
}
template <int Gated>
ICRL_INLINE void head_norm_rows(const FusedGroup& g, const FusedOp& o) {
  const int64_t H = o.sizes[0], n = o.in.width / H, all = rows(g, o.in);
  for (int64_t r = 0; r < all; ++r) {
    const float* x = first_row(g, o.in) + r * stride(g, o.in);
    const float* z = Gated ? first_row(g, o.side) + r * stride(g, o.side) : nullptr;
    float* y = first_row(g, o.out) + r * stride(g, o.out);
    for (int64_t at = 0; at < H * n; at += n) {
      Vec squares = Vec{};
      for_vectors(n, [&](int64_t j, auto part) {
        const Vec v = part.load(x + at + j);
        squares += v * v;
      });
      const float scale = 1.f / std::sqrt(sum(squares) / static_cast<float>(n) + o.numbers[0]);
      for_vectors(n, [&](int64_t j, auto part) {
        Vec v = part.load(x + at + j) * scale;
        if (Gated == 1) v *= silu(part.load(z + at + j));
        if (Gated == 2) v *= sigmoid(part.load(z + at + j));
        part.store(y + at + j, v);
      });
    }
  }
}
void head_norm(const FusedGroup& g, const FusedOp& o) {
  o.sizes[1] == 0 ? head_norm_rows<0>(g, o) : o.sizes[1] == 1 ? head_norm_rows<1>(g, o) : head_norm_rows<2>(g, o);
}

// ---- tokens before

// y = silu(b + sum_j taps_j x_j) over the window's tokens and x. sizes: taps W; weights: taps [W][C padded], b or none;
// tensors: window [W - 1, C], moved on (none where W = 1)
const char* check_short_conv(const FusedPlan& p, const FusedOp& o) {
  if (const char* wrong = check_map(p, o)) return wrong;
  const int64_t W = o.sizes[0], C = o.in.width;
  if (rows_of(p, o.in) != 1) return "wants one token a context";
  if (W < 1 || W > kMostChannels) return "wants 1 to 512 taps";
  if (!has_weights(p, o, 0, W * padded(C)) || (o.weights[1] >= 0 && !has_weights(p, o, 1, C)))
    return "wants its taps within the packed weights";
  return W == 1 || has_tensor(p, o, 0, 4 * (W - 1) * C) ? nullptr : "wants a window of the tokens before";
}
void short_conv(const FusedGroup& g, const FusedOp& o) {
  const int64_t W = o.sizes[0], C = o.in.width, ld = padded(C);
  const float *taps = weights(g, o, 0), *b = weights(g, o, 1);
  for (int64_t c = 0; c < g.contexts; ++c) {
    const float* x = context_rows(g, o.in, c);
    float *y = context_rows(g, o.out, c), *window = W > 1 ? context_tensor<float>(g, o, 0, c) : nullptr;
    for_vectors(C, [&](int64_t j, auto part) {
      Vec total = b ? part.load(b + j) : Vec{};
      for (int64_t w = 0; w + 1 < W; ++w) {
        const Vec before = part.load(window + w * C + j);
        total += before * part.load(taps + w * ld + j);
        if (w) part.store(window + (w - 1) * C + j, before);
      }
      const Vec now = part.load(x + j);
      if (W > 1) part.store(window + (W - 2) * C + j, now);
      part.store(y + j, silu(total + now * part.load(taps + (W - 1) * ld + j)));
    });
  }
}

// y_n = x + (before - x) mu_n, side by side, and x becomes the token before. sizes: how many; weights: mu [n][D
// padded]; tensors: the token before [D]
const char* check_token_shift(const FusedPlan& p, const FusedOp& o) {
  const int64_t n = o.sizes[0];
  if (!given(o.in) || rows_of(p, o.in) != 1) return "wants one token a context";
  if (n < 1 || !as_wide(p, o.out, 1, n * o.in.width) || !apart(o.in, o.out))
    return "wants as many columns of output as mixtures have, apart from its input";
  if (!has_weights(p, o, 0, n * padded(o.in.width))) return "wants its mixtures within the packed weights";
  return has_tensor(p, o, 0, 4 * o.in.width) ? nullptr : "wants the token before";
}
void token_shift(const FusedGroup& g, const FusedOp& o) {
  const int64_t D = o.in.width, ld = padded(D);
  const float* mu = weights(g, o, 0);
  for (int64_t c = 0; c < g.contexts; ++c) {
    const float* x = context_rows(g, o.in, c);
    float *y = context_rows(g, o.out, c), *before = context_tensor<float>(g, o, 0, c);
    for_vectors(D, [&](int64_t j, auto part) {
      const Vec now = part.load(x + j), delta = part.load(before + j) - now;
      for (int64_t n = 0; n < o.sizes[0]; ++n) part.store(y + n * D + j, now + delta * part.load(mu + n * ld + j));
      part.store(before + j, now);
    });
  }
}

// ---- recurrences

struct Heads {  // room for a head's rows, padded
  alignas(64) float q[kMostChannels], k[kMostChannels], e[kMostChannels], w[kMostChannels], l[kMostChannels],
      p[kMostChannels], v[kMostValues], out[kMostValues], tail[kMostChannels * kWidth];
};

// A head's n numbers, with zeros to a whole number of 16: themselves where they are one
ICRL_INLINE const float* head_row(float* room, const float* x, int64_t n) {
  if (n % 16 == 0) return x;
  load_row(room, x, kFloat, 0, n, padded(n));
  return room;
}
ICRL_INLINE float* head_copy(float* room, const float* x, int64_t n) {
  load_row(room, x, kFloat, 0, n, padded(n));
  return room;
}
ICRL_INLINE float* fill_row(float* room, float x, int64_t n) {
  for (int64_t i = 0; i < padded(n); i += kWidth) store(room + i, splat(x));
  return room;
}

// Whether the views are rows of a context, of these widths, none of which the output touches.
ICRL_INLINE bool one_token(const FusedPlan& p, const FusedOp& o, int64_t in, int64_t side, int64_t out,
                           std::initializer_list<int64_t> more) {
  if (!as_wide(p, o.in, 1, in) || !as_wide(p, o.side, 1, side) || !as_wide(p, o.out, 1, out)) return false;
  if (!apart(o.in, o.out) || !apart(o.side, o.out)) return false;
  const FusedView* v = o.more;
  for (int64_t width : more)
    if (!as_wide(p, *v, 1, width) || !apart(*v, o.out))
      return false;
    else
      ++v;
  return true;
}
ICRL_INLINE const char* check_sizes(int64_t heads, int64_t key_heads, int64_t K, int64_t V, int64_t M = 1) {
  if (heads < 1 || key_heads < 1 || heads % key_heads) return "wants heads a multiple of those that share them";
  return channels(K) && value_channels(V) && channels(M) ? nullptr : "wants heads of channels that a step serves";
}
constexpr const char* kShapes = "wants rows of all heads, apart from the output";
constexpr const char* kState = "wants the state of all heads";

// in: q, side: k, more: v and e, if there are decays; sizes: H, Hk, K, V; numbers: scale; tensors: state
const char* check_gla_step(const FusedPlan& p, const FusedOp& o) {
  const int64_t H = o.sizes[0], Hk = o.sizes[1], K = o.sizes[2], V = o.sizes[3];
  if (const char* wrong = check_sizes(H, Hk, K, V)) return wrong;
  if (!(given(o.more[1]) ? one_token(p, o, H * K, Hk * K, H * V, {Hk * V, Hk * K})
                         : one_token(p, o, H * K, Hk * K, H * V, {Hk * V})))
    return kShapes;
  return has_tensor(p, o, 0, 4 * Hk * K * V) ? nullptr : kState;
}
void gla_step(const FusedGroup& g, const FusedOp& o) {
  const int64_t H = o.sizes[0], Hk = o.sizes[1], K = o.sizes[2], V = o.sizes[3];
  Heads room;
  for (int64_t c = 0; c < g.contexts; ++c)
    for (int64_t h = 0; h < H; ++h) {
      const int64_t kv = h / (H / Hk);
      float* q = head_copy(room.q, context_rows(g, o.in, c) + h * K, K);
      scale_row(q, o.numbers[0], padded(K));
      const float* k = head_row(room.k, context_rows(g, o.side, c) + kv * K, K);
      const float* v = head_row(room.v, context_rows(g, o.more[0], c) + kv * V, V);
      const float* e =
          given(o.more[1]) ? head_row(room.e, context_rows(g, o.more[1], c) + kv * K, K) : fill_row(room.e, 1.f, K);
      float* state = context_tensor<float>(g, o, 0, c) + kv * K * V;
      gla_head(h % (H / Hk) == 0, state, K, V, q, k, e, v, room.out, room.tail);
      store_row(context_rows(g, o.out, c) + h * V, room.out, kFloat, 0, V);
    }
}

// in: q, side: k, more: v, w, e; sizes: H, Hk, K, V, M; numbers: scale; tensors: keys, values
const char* check_gsa_step(const FusedPlan& p, const FusedOp& o) {
  const int64_t H = o.sizes[0], Hk = o.sizes[1], K = o.sizes[2], V = o.sizes[3], M = o.sizes[4];
  if (const char* wrong = check_sizes(H, Hk, K, V, M)) return wrong;
  if (!one_token(p, o, H * K, Hk * K, H * V, {Hk * V, Hk * M, Hk * M})) return kShapes;
  return has_tensor(p, o, 0, 4 * Hk * K * M) && has_tensor(p, o, 1, 4 * Hk * M * V) ? nullptr : kState;
}
void gsa_step(const FusedGroup& g, const FusedOp& o) {
  const int64_t H = o.sizes[0], Hk = o.sizes[1], K = o.sizes[2], V = o.sizes[3], M = o.sizes[4];
  Heads room;
  for (int64_t c = 0; c < g.contexts; ++c)
    for (int64_t h = 0; h < H; ++h) {
      const int64_t kv = h / (H / Hk);
      float* q = head_copy(room.q, context_rows(g, o.in, c) + h * K, K);
      scale_row(q, o.numbers[0], padded(K));
      const float* k = head_row(room.k, context_rows(g, o.side, c) + kv * K, K);
      const float* v = head_row(room.v, context_rows(g, o.more[0], c) + kv * V, V);
      const float* w = head_row(room.w, context_rows(g, o.more[1], c) + kv * M, M);
      const float* e = head_row(room.e, context_rows(g, o.more[2], c) + kv * M, M);
      float* keys = context_tensor<float>(g, o, 0, c) + kv * K * M;
      float* values = context_tensor<float>(g, o, 1, c) + kv * M * V;
      gsa_head(h % (H / Hk) == 0, keys, values, K, V, M, q, k, v, w, e, room.l, room.p, room.out, room.tail);
      store_row(context_rows(g, o.out, c) + h * V, room.out, kFloat, 0, V);
    }
}

// in: q, side: k, of key heads, normalised here; more: v of H heads; e and beta of H / parts, e one or K of each.
// sizes: H, key heads, K, V, parts; numbers: scale; tensors: state of H heads
const char* check_delta_step(const FusedPlan& p, const FusedOp& o) {
  const int64_t H = o.sizes[0], Hk = o.sizes[1], K = o.sizes[2], V = o.sizes[3], parts = o.sizes[4];
  if (const char* wrong = check_sizes(H, Hk, K, V)) return wrong;
  if (parts < 1 || H % parts) return "wants heads of whole parts";
  const int64_t gates = H / parts;
  if (!one_token(p, o, Hk * K, Hk * K, H * V, {H * V, gates, gates}) &&
      !one_token(p, o, Hk * K, Hk * K, H * V, {H * V, gates * K, gates}))
    return kShapes;
  return has_tensor(p, o, 0, 4 * H * K * V) ? nullptr : kState;
}
void delta_step(const FusedGroup& g, const FusedOp& o) {
  const int64_t H = o.sizes[0], Hk = o.sizes[1], K = o.sizes[2], V = o.sizes[3], parts = o.sizes[4];
  const bool scalar = o.more[1].width == H / parts;
  Heads room;
  for (int64_t c = 0; c < g.contexts; ++c)
    for (int64_t h = 0; h < H; ++h) {
      const int64_t key = h / (H / Hk) * K, gate = h / parts;
      float* q = head_copy(room.q, context_rows(g, o.in, c) + key, K);
      float* k = head_copy(room.k, context_rows(g, o.side, c) + key, K);
      const float* v = head_row(room.v, context_rows(g, o.more[0], c) + h * V, V);
      const float* gates = context_rows(g, o.more[1], c);
      const float* e = scalar ? fill_row(room.e, gates[gate], K) : head_row(room.e, gates + gate * K, K);
      const float beta = context_rows(g, o.more[2], c)[gate];
      float* state = context_tensor<float>(g, o, 0, c) + h * K * V;
      delta_head(true, o.numbers[0], beta, state, K, V, q, k, e, v, room.w, room.out, room.tail);
      store_row(context_rows(g, o.out, c) + h * V, room.out, kFloat, 0, V);
    }
}

// in: r, side: k, more: v, e, a, b; sizes: H, K, V; numbers: scale; tensors: state
const char* check_rwkv7_step(const FusedPlan& p, const FusedOp& o) {
  const int64_t H = o.sizes[0], K = o.sizes[1], V = o.sizes[2];
  if (const char* wrong = check_sizes(H, 1, K, V)) return wrong;
  if (!one_token(p, o, H * K, H * K, H * V, {H * V, H * K, H * K, H * K})) return kShapes;
  return has_tensor(p, o, 0, 4 * H * K * V) ? nullptr : kState;
}
void rwkv7_step(const FusedGroup& g, const FusedOp& o) {
  const int64_t H = o.sizes[0], K = o.sizes[1], V = o.sizes[2];
  Heads room;
  for (int64_t c = 0; c < g.contexts; ++c)
    for (int64_t h = 0; h < H; ++h) {
      float* r = head_copy(room.q, context_rows(g, o.in, c) + h * K, K);
      scale_row(r, o.numbers[0], padded(K));
      const float* k = head_row(room.k, context_rows(g, o.side, c) + h * K, K);
      const float* v = head_row(room.v, context_rows(g, o.more[0], c) + h * V, V);
      const float* e = head_row(room.e, context_rows(g, o.more[1], c) + h * K, K);
      const float* a = head_row(room.l, context_rows(g, o.more[2], c) + h * K, K);
      const float* b = head_row(room.p, context_rows(g, o.more[3], c) + h * K, K);
      rwkv7_head(context_tensor<float>(g, o, 0, c) + h * K * V, K, V, r, e, k, v, a, b, room.out, room.tail);
      store_row(context_rows(g, o.out, c) + h * V, room.out, kFloat, 0, V);
    }
}

// RWKV-7's keys. With u = k k_k, divided by its norm in each head: out = -u, more[0] = u rate, k = k + k (rate - 1)
// k_a. in: k, changed; side: rate; weights: k_k, k_a; sizes: heads, norm: 0 max(|u|, numbers[0]), 1 sqrt(|u|^2 +
// numbers[0])
const char* check_rwkv7_keys(const FusedPlan& p, const FusedOp& o) {
  if (const char* wrong = check_map2(p, o)) return wrong;
  const FusedView& b = o.more[0];
  if (!as_wide(p, b, rows_of(p, o.in), o.in.width)) return "wants rows of the input's shape";
  if (!apart(o.in, o.out) || !apart(o.side, o.out) || !apart(o.in, o.side) || !apart(o.in, b) || !apart(o.side, b) ||
      !apart(o.out, b))
    return "wants rows that are apart";
  if (!has_weights(p, o, 0, o.in.width) || !has_weights(p, o, 1, o.in.width)) return "wants a weight a column";
  return heads_of(o.in, o.sizes[0]) && o.sizes[1] <= 1 ? nullptr : "wants an input of whole heads";
}
void rwkv7_keys(const FusedGroup& g, const FusedOp& o) {
  const int64_t H = o.sizes[0], K = o.in.width / H, all = rows(g, o.in);
  const float *by = weights(g, o, 0), *mix = weights(g, o, 1), eps = o.numbers[0];
  for (int64_t r = 0; r < all; ++r)
    for (int64_t h = 0; h < H; ++h) {
      const int64_t at = h * K;
      float* k = first_row(g, o.in) + r * stride(g, o.in) + at;
      const float* rate = first_row(g, o.side) + r * stride(g, o.side) + at;
      float* a = first_row(g, o.out) + r * stride(g, o.out) + at;
      float* b = first_row(g, o.more[0]) + r * stride(g, o.more[0]) + at;
      Vec squares = Vec{};
      for_vectors(K, [&](int64_t j, auto part) {
        const Vec u = part.load(k + j) * part.load(by + at + j);
        squares += u * u;
      });
      const float square = sum(squares), norm = std::sqrt(square);
      const float scale = 1.f / (o.sizes[1] ? std::sqrt(square + eps) : norm < eps ? eps : norm);
      for_vectors(K, [&](int64_t j, auto part) {
        const Vec x = part.load(k + j), t = part.load(rate + j), u = x * part.load(by + at + j) * scale;
        part.store(a + j, -u), part.store(b + j, u * t);
        part.store(k + j, x + x * (t - 1.f) * part.load(mix + at + j));
      });
    }
}

// y = (w (o - mean) / sqrt(var + numbers[0]) + b + (sum r k r_k) v) z in each head. in: o, side: z; more: r, k, v;
// weights: r_k, w and b or none; sizes: heads
const char* check_rwkv7_output(const FusedPlan& p, const FusedOp& o) {
  if (const char* wrong = check_map2(p, o)) return wrong;
  const int64_t H = o.sizes[0], n = o.in.width, all = rows_of(p, o.in);
  if (!given(o.more[0]) || !heads_of(o.in, H) || !heads_of(o.more[0], H)) return "wants rows of whole heads";
  for (int i = 0; i < 3; ++i)
    if (!as_wide(p, o.more[i], all, i < 2 ? o.more[0].width : n) || !apart(o.more[i], o.out))
      return "wants r, k and v of all heads, apart from the output";
  const bool affine = o.weights[1] >= 0;
  if (!has_weights(p, o, 0, o.more[0].width) || affine != (o.weights[2] >= 0)) return "wants a weight a column";
  return !affine || (has_weights(p, o, 1, n) && has_weights(p, o, 2, n)) ? nullptr : "wants a weight a column";
}
void rwkv7_output(const FusedGroup& g, const FusedOp& o) {
  const int64_t H = o.sizes[0], V = o.in.width / H, K = o.more[0].width / H, all = rows(g, o.in);
  const float *r_k = weights(g, o, 0), *w = weights(g, o, 1), *b = weights(g, o, 2);
  for (int64_t t = 0; t < all; ++t)
    for (int64_t h = 0; h < H; ++h) {
      const float* x = first_row(g, o.in) + t * stride(g, o.in) + h * V;
      const float* z = first_row(g, o.side) + t * stride(g, o.side) + h * V;
      const float* r = first_row(g, o.more[0]) + t * stride(g, o.more[0]) + h * K;
      const float* k = first_row(g, o.more[1]) + t * stride(g, o.more[1]) + h * K;
      const float* v = first_row(g, o.more[2]) + t * stride(g, o.more[2]) + h * V;
      float* y = first_row(g, o.out) + t * stride(g, o.out) + h * V;
      Vec total = Vec{}, squares = Vec{}, dots = Vec{};
      for_vectors(
          K, [&](int64_t j, auto part) { dots += part.load(r + j) * part.load(k + j) * part.load(r_k + h * K + j); });
      for_vectors(V, [&](int64_t j, auto part) { total += part.load(x + j); });
      const float mean = sum(total) / static_cast<float>(V), bonus = sum(dots);
      for_vectors(V, [&](int64_t j, auto part) {
        const Vec d = part.keep(part.load(x + j) - mean);
        squares += d * d;
      });
      const float scale = 1.f / std::sqrt(sum(squares) / static_cast<float>(V) + o.numbers[0]);
      for_vectors(V, [&](int64_t j, auto part) {
        Vec normed = (part.load(x + j) - mean) * scale;
        if (w) normed = normed * part.load(w + h * V + j) + part.load(b + h * V + j);
        part.store(y + j, (normed + bonus * part.load(v + j)) * part.load(z + j));
      });
    }
}

// ---- softmax attention of a token to itself and the W - 1 before it, whose keys and values are in rings: token n is
// in slot n mod W. Scores are numbers[0] q . k - slope * age, age 0 being the token's own.
//
// in: q, side: k, more: v, room [W] for a head's weights; sizes: H, W, K; weights: slopes [H] or none;
// tensors: keys, values [H, W, K], length int64: tokens so far
const char* check_window_attention(const FusedPlan& p, const FusedOp& o) {
  const int64_t H = o.sizes[0], W = o.sizes[1], K = o.sizes[2], n = H * K;
  if (const char* wrong = check_sizes(H, 1, 1, K)) return wrong;
  if (W < 1) return "wants room for a token";
  if (!one_token(p, o, n, n, n, {n, W})) return kShapes;
  for (const FusedView* v : {&o.in, &o.side, &o.more[0]})
    if (!apart(*v, o.more[1])) return "wants room that is apart";
  if (o.weights[0] >= 0 && !has_weights(p, o, 0, H)) return "wants a slope a head";
  return has_tensor(p, o, 0, 4 * n * W) && has_tensor(p, o, 1, 4 * n * W) && has_tensor(p, o, 2, 8)
             ? nullptr
             : "wants keys, values and a length";
}
void window_attention(const FusedGroup& g, const FusedOp& o) {
  const int64_t H = o.sizes[0], W = o.sizes[1], K = o.sizes[2];
  for (int64_t c = 0; c < g.contexts; ++c) {
    int64_t* length = context_tensor<int64_t>(g, o, 2, c);
    const uint64_t before = static_cast<uint64_t>(*length), room = static_cast<uint64_t>(W);
    const int64_t slot = static_cast<int64_t>(before % room), n = before < room ? slot + 1 : W;
    *length = static_cast<int64_t>(before + 1);
    float* p = context_rows(g, o.more[1], c);
    for (int64_t h = 0; h < H; ++h) {
      const float* q = context_rows(g, o.in, c) + h * K;
      float* keys = context_tensor<float>(g, o, 0, c) + h * W * K;
      float* values = context_tensor<float>(g, o, 1, c) + h * W * K;
      float* y = context_rows(g, o.out, c) + h * K;
      std::memcpy(keys + slot * K, context_rows(g, o.side, c) + h * K, static_cast<size_t>(4 * K));
      std::memcpy(values + slot * K, context_rows(g, o.more[0], c) + h * K, static_cast<size_t>(4 * K));
      const float slope = o.weights[0] < 0 ? 0.f : weights(g, o, 0)[h];
      float most = -INFINITY;
      for (int64_t i = 0; i < n; ++i) {
        Vec dots = Vec{};
        for_vectors(K, [&](int64_t j, auto part) { dots += part.load(q + j) * part.load(keys + i * K + j); });
        const int64_t age = i <= slot ? slot - i : slot - i + W;
        p[i] = sum(dots) * o.numbers[0] - slope * static_cast<float>(age);
        most = p[i] > most ? p[i] : most;
      }
      Vec total = Vec{};
      for_vectors(n, [&](int64_t i, auto part) {
        const Vec x = part.keep(vexp(part.load(p + i) - most));
        part.store(p + i, x);
        total += x;
      });
      const float by = 1.f / sum(total);
      for_vectors(K, [&](int64_t j, auto part) {
        Vec mixed = Vec{};
        for (int64_t i = 0; i < n; ++i) mixed += p[i] * part.load(values + i * K + j);
        part.store(y + j, mixed * by);
      });
    }
  }
}

}  // namespace

const FusedKind* fused_mixers() {
  static constexpr FusedKind kinds[] = {
      {"decay", check_decay, decay},
      {"hedgehog", check_hedgehog, hedgehog},
      {"sum_norm", check_heads, sum_norm},
      {"divide_by_last", check_divide_by_last, divide_by_last},
      {"head_norm", check_head_norm, head_norm},
      {"short_conv", check_short_conv, short_conv},
      {"token_shift", check_token_shift, token_shift},
      {"gla_step", check_gla_step, gla_step},
      {"gsa_step", check_gsa_step, gsa_step},
      {"delta_step", check_delta_step, delta_step},
      {"rwkv7_step", check_rwkv7_step, rwkv7_step},
      {"rwkv7_keys", check_rwkv7_keys, rwkv7_keys},
      {"rwkv7_output", check_rwkv7_output, rwkv7_output},
      {"window_attention", check_window_attention, window_attention},
      {nullptr, nullptr, nullptr},
  };
  return kinds;
}

}  // namespace icrl::ICRL_ISA
