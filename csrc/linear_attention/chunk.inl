// A chunk of 16 tokens with decays, everything of it in L1: what the gated linear attentions share. Float32 throughout.
//
//   K, V       channels of queries and keys, of values;  Kp, Vp: the same rounded up to 16, zeros in the rest
//   n          tokens of the chunk, at most kChunk = 16; rows from n on are zeros
//   q, k, v    [16, Kp], [16, Kp], [16, Vp]: the tokens' queries, keys and values
//   g, e       gates as given, in their dtype, and exp g: [16, Kp] for a channel gate, [16] for a scalar one
//   P, p       products of exp g over the chunk's tokens up to i, shaped as e;  decay [Kp]: P_15
//   kd, ku     [16, Kp]: k_j / P_j and k_j P_15 / P_j;  kt [Kp, 16]: kd transposed
//   qr, qd     [16, Kp]: scale q_i and P_i scale q_i;  qs in the gradients: qd, or qr where there is no gate
//   a, w       [16, 16]: decayed scores A_ij, and weights in their place, such as their gradients da
//   S, state   [Kp, Vp]; in the gradients transposed, [Vp, Kp]; the user's are [K, V]
//   d_o, dq, dk, dvalue, dg, gradient   gradients of o, q, k, v, g and of the state, shaped as these
//
// With P_i the product of exp g over the chunk's tokens up to i, a query i reads (P_i / P_j) q_i . k_j of token j <= i.
// 16 tokens are few enough that the state's update costs less than wider chunks' longer triangles. Products of exp g,
// not exponentials of sums: one exp per gate, errors as in the recurrence, and g = -inf needs no care.
// P_i / P_j is split as P_i times 1 / P_j while P_i >= kSmallest in every channel; from the first row where it is not,
// rows take the running products of exp g themselves. A row's choice depends on no later gate.
#pragma once

#include <cstdint>
#include <cstdlib>

#include "common/gemm.h"
#include "common/vec.h"
#include "linear_attention/gate.h"

namespace icrl::ICRL_ISA {
namespace {

constexpr int kChunk = 16;
constexpr float kSmallest = 0x1p-40f;
constexpr int64_t kSingleSegment = int64_t(1) << 21;  // floats of chunk states kept without recomputation
constexpr int64_t kSegment = int64_t(1) << 17;        // floats of chunk states per segment otherwise

ICRL_INLINE int64_t pad16(int64_t n) { return (n + 15) / 16 * 16; }

// Takes arrays out of one block; with no block it only counts.
struct Arena {
  float* base = nullptr;
  int64_t used = 0;
  float* take(int64_t n) {
    float* p = base ? base + used : nullptr;
    used += pad16(n);
    return p;
  }
  bool allocate() {
    base = static_cast<float*>(aligned_alloc(64, size_t(used + 16) * 4));
    used = 0;
    return base;
  }
};

// rows of the identity, shifted
constexpr float kUnit[2 * kChunk] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1};

// Which chunk comes after this one: its rows are asked for early, because a head's rows are apart in memory, and what
// the processor fetches by itself does not follow them.
enum class Next : int { later = 1, earlier = -1 };

// Where n rows of numbers of a dtype begin and how far apart they are.
struct Rows {
  const void* from;
  int dtype;
  int64_t at, stride;
};

// A head's tokens from t on, in an array [tokens, heads, size]
ICRL_INLINE Rows rows(const void* from, int dtype, int64_t t, int64_t heads, int64_t head, int64_t size) {
  return {from, dtype, (t * heads + head) * size, heads * size};
}

// Into the second level: the first is full of the chunk at work. Past the array's end this asks for nothing.
ICRL_INLINE void prefetch_rows(const Rows& r, int64_t size, Next next) {
  const int64_t bytes = r.dtype == kFloat ? 4 : 2;
  for (int i = 0; i < kChunk; ++i) {
    const uintptr_t row = reinterpret_cast<uintptr_t>(r.from) + (r.at + (i + int(next) * kChunk) * r.stride) * bytes;
    for (int64_t at = 0; at < size * bytes; at += 64) __builtin_prefetch(reinterpret_cast<const void*>(row + at), 0, 2);
  }
}

// n rows of `size` numbers to [16][padded] floats, `ld` apart, zeros in the rest
ICRL_INLINE void load_rows(float* to, const Rows& r, int n, int64_t size, int64_t padded, int64_t ld, Next next) {
  prefetch_rows(r, size, next);
  for (int i = 0; i < n; ++i) load_row(to + i * ld, r.from, r.dtype, r.at + i * r.stride, size, padded);
  for (int i = n; i < kChunk; ++i) __builtin_memset(to + i * ld, 0, padded * 4);
}
ICRL_INLINE void load_rows(float* to, const Rows& r, int n, int64_t size, int64_t padded, Next next) {
  load_rows(to, r, n, size, padded, padded, next);
}
ICRL_INLINE void store_rows(void* to, const float* from, int dtype, int64_t at, int64_t stride, int n, int64_t size,
                            int64_t padded, Next next) {
  prefetch_rows(Rows{to, dtype, at, stride}, size, next);
  for (int i = 0; i < n; ++i) store_row(to, from + i * padded, dtype, at + i * stride, size);
}

// Keep: store 1 / P_j and P_15 / P_j, which only the backward reads.
template <Gate gate, bool Keep>
struct Chunk {
  int64_t K, V, Kp, Vp;
  float *k, *v;                 // [16][Kp], [16][Vp]: as given
  float *kd, *ku, *kt;          // k / P_j; k P_15 / P_j; kd transposed [Kp][16]
  float *e, *p, *inverse, *up;  // exp g, P, 1 / P, P_15 / P_j: [16][Kp] for channel, [16] for scalar gates
  float* d;                     // scalar: P_i / P_j [16][16]; channel: the same for one row, [16][Kp]
  float* decay;                 // P_15 [Kp]
  int cross;                    // rows from here on take running products

  void layout(Arena& a, int64_t K_, int64_t V_) {
    K = K_, V = V_, Kp = pad16(K), Vp = pad16(V);
    const int64_t n = gate == Gate::channel ? kChunk * Kp : kChunk;
    k = a.take(kChunk * Kp), v = a.take(kChunk * Vp), kt = a.take(kChunk * Kp);
    kd = gate == Gate::channel ? a.take(kChunk * Kp) : k;
    ku = gate == Gate::none ? k : a.take(kChunk * Kp);
    e = a.take(n), p = a.take(n), inverse = a.take(n), up = a.take(n);
    d = a.take(gate == Gate::channel ? n : kChunk * kChunk);
    decay = a.take(Kp);
  }

  // With n tokens' keys in k, takes their gates; returns the largest.
  float gates(const Rows& g, int n, Next next) {
    float largest = -__builtin_inff();
    if constexpr (gate == Gate::channel) {
      load_rows(e, g, n, K, Kp, next);
      largest = channel_gates();
    } else if constexpr (gate == Gate::scalar) {
      for (int i = 0; i < kChunk; ++i) {
        e[i] = i < n ? load_one(g.from, g.dtype, g.at + i * g.stride) : 0.f;
        if (i < n && e[i] > largest) largest = e[i];
      }
      scalar_gates();
    } else {
      cross = kChunk;
    }
    return largest;
  }

  float channel_gates() {
    Vec largest = splat(-__builtin_inff()), least = splat(1.f);
    for (int64_t c = 0; c < Kp; c += kWidth) {
      Vec product = splat(1.f);
      for (int i = 0; i < kChunk; ++i) {
        const Vec g = load(e + i * Kp + c), x = vexp(g);
        largest = vmax(g, largest);
        product *= x;
        least = vmin(product, least);
        store(e + i * Kp + c, x);
        store(p + i * Kp + c, product);
      }
      store(decay + c, product);
    }
    cross = min_lane(least) < kSmallest ? find_cross() : kChunk;
    if (cross == kChunk) {
      for (int64_t c = 0; c < Kp; c += kWidth) {
        const Vec last = load(decay + c);
        for (int64_t i = c; i < kChunk * Kp; i += Kp) {
          const Vec x = splat(1.f) / load(p + i), u = x * last, y = load(k + i);
          if constexpr (Keep) store(inverse + i, x), store(up + i, u);
          store(kd + i, y * x);
          store(ku + i, y * u);
        }
      }
    } else {
      for (int64_t c = 0; c < Kp; c += kWidth) {
        Vec u = splat(1.f);
        for (int i = kChunk - 1; i >= 0; --i) {
          const int64_t at = i * Kp + c;
          const Vec x = i < cross ? splat(1.f) / load(p + at) : Vec{}, y = load(k + at);
          if constexpr (Keep) store(inverse + at, x), store(up + at, u);
          store(kd + at, i < cross ? y * x : Vec{});
          store(ku + at, y * u);
          u *= load(e + at);
        }
      }
    }
    return max_lane(largest);
  }

  int find_cross() const {
    for (int i = 0; i < kChunk; ++i) {
      Vec least = splat(1.f);
      for (int64_t c = 0; c < Kp; c += kWidth) least = vmin(load(p + i * Kp + c), least);
      if (min_lane(least) < kSmallest) return i;
    }
    return kChunk;
  }

  void scalar_gates() {
    cross = kChunk;
    for (int i = 0; i < kChunk; i += kWidth) store(e + i, vexp(load(e + i)));
    float product = 1.f;
    for (int i = 0; i < kChunk; ++i) p[i] = product *= e[i];
    for (int j = 0; j < kChunk; j += kWidth) {
      Vec row = Vec{};
      for (int i = 0; i < kChunk; ++i) {
        row = row * splat(e[i]) + load(kUnit + kChunk - i + j);  // above the diagonal 0, or NaN that is not read
        store(d + i * kChunk + j, row);
      }
      store(up + j, row);
    }
    for (int j = 0; j < kChunk; ++j) {
      for (int64_t c = 0; c < Kp; c += kWidth) store(ku + j * Kp + c, load(k + j * Kp + c) * splat(up[j]));
    }
    for (int64_t c = 0; c < Kp; c += kWidth) store(decay + c, splat(product));
  }

  // Running products for row i: d_j = exp(g_{j+1} + ... + g_i), j <= i. Call for i = cross, cross + 1, ...
  void advance(int i) {
    for (int64_t c = 0; c < Kp; c += kWidth) {
      const Vec x = load(e + i * Kp + c);
      if (i == cross) {
        Vec u = x;
        for (int j = i - 1; j >= 0; --j) {
          store(d + j * Kp + c, u);
          u *= load(e + j * Kp + c);
        }
      } else {
        for (int j = 0; j < i; ++j) store(d + j * Kp + c, load(d + j * Kp + c) * x);
      }
      store(d + i * Kp + c, splat(1.f));
    }
  }

  // qr = scale q and qd = P qr; without gates the two may be one
  void queries(const float* q, float scale, float* qr, float* qd) const {
    for (int i = 0; i < kChunk; ++i)
      for (int64_t at = i * Kp; at < (i + 1) * Kp; at += kWidth) {
        const Vec x = load(q + at) * splat(scale);
        store(qr + at, x);
        if constexpr (gate == Gate::channel) store(qd + at, x * load(p + at));
        if constexpr (gate == Gate::scalar) store(qd + at, x * splat(p[i]));
      }
  }

  // a[16][16]: the decayed scores; what stands above the diagonal is not defined
  void scores(float* a, const float* qr, const float* qd, int n) {
    product(a, kChunk, kChunk, kChunk, Left{gate == Gate::channel ? qd : qr, Kp, 1}, kt, kChunk, K);
    if constexpr (gate == Gate::scalar)
      for (int i = 0; i < kChunk * kChunk; i += kWidth) store(a + i, load(a + i) * load(d + i));
    if constexpr (gate == Gate::channel)
      for (int i = cross; i < n; ++i) {
        advance(i);
        for (int j = 0; j <= i; ++j) {
          Vec x = Vec{};
          for (int64_t c = 0; c < Kp; c += kWidth)
            x += load(qr + i * Kp + c) * load(k + j * Kp + c) * load(d + j * Kp + c);
          a[i * kChunk + j] = sum(x);
        }
      }
  }

  // out_i = P_i (x_i S) + sum of w_ij (P_i / P_j) k_j over j < i, for x [16][ld], S [depth][Kp] and w [16][16], of
  // which nothing from the diagonal up is read. For a scalar gate, and y [16][Kp], along_i += y_i . P_i (x_i S).
  void gather(float* out, const float* x, int64_t ld, int64_t depth, const float* state, const float* w, int n,
              const float* y = nullptr, float* along = nullptr) {
    float held[kChunk * kChunk], dots[kChunk * kWidth];
    const float* u = split(held, w);
    if (along) __builtin_memset(dots, 0, sizeof dots);
    for_tiles(kChunk, Kp, [&](auto& tile, int64_t i, int64_t j) __attribute__((always_inline)) {
      tile.multiply_all(Left{x, ld, 1}, state + j, Kp, i, depth, out + i * Kp + j, Kp);
      if constexpr (gate == Gate::scalar) {
        tile.scale_rows(p + i);
        if (along) tile.dot_rows(dots + i * kWidth, y + i * Kp + j, Kp);
      }
      tile.template lower<true>(Left{u, kChunk, 1}, kd + j, Kp, i);
      tile.write(out + i * Kp + j, Kp);
    });
    if (along)
      for (int i = 0; i < kChunk; ++i) along[i] += sum(load(dots + i * kWidth));
    if constexpr (gate == Gate::channel) {
      for (int64_t i = 0; i < kChunk * Kp; i += kWidth) store(out + i, load(out + i) * load(p + i));
      for (int i = cross; i < n; ++i) {
        advance(i);
        for (int j = 0; j < i; ++j) {
          const Vec y = splat(w[i * kChunk + j]);
          for (int64_t at = 0; at < Kp; at += kWidth)
            store(out + i * Kp + at, load(out + i * Kp + at) + y * load(d + j * Kp + at) * load(k + j * Kp + at));
        }
      }
    }
  }

  // w as it meets kd and P q: scalar decays put in, rows that take running products emptied
  const float* split(float* to, const float* w) const {
    if constexpr (gate == Gate::scalar) {
      for (int i = 0; i < kChunk * kChunk; i += kWidth) store(to + i, load(w + i) * load(d + i));
      return to;
    }
    if (cross == kChunk) return w;
    __builtin_memcpy(to, w, cross * kChunk * 4);
    __builtin_memset(to + cross * kChunk, 0, (kChunk - cross) * kChunk * 4);
    return to;
  }
};

// [rows][columns] of the user's state to or from a padded array, transposed or not
ICRL_INLINE void read_state(float* to, int64_t ld_row, int64_t ld_column, int64_t size, const float* from, int64_t ld,
                            int64_t rows, int64_t columns) {
  __builtin_memset(to, 0, size * 4);
  if (from)
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) to[i * ld_row + j * ld_column] = from[i * ld + j];
}
ICRL_INLINE void write_state(float* to, int64_t ld, const float* from, int64_t ld_row, int64_t ld_column, int64_t rows,
                             int64_t columns) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) to[i * ld + j] = from[i * ld_row + j * ld_column];
}

// Gradients of a chunk. States and their gradients are transposed, [V][K], so that dq and dk read rows of them.
//
// The gate's gradient is dg_t = sum over pairs (i >= t > j) of (i's and j's term), the pairs taken in four kinds: both
// outside the chunk (<S dS> at its ends), i inside (summed from the end back), j inside (summed from the start), both
// inside: for a scalar gate the pairs themselves, for a channel gate, where these are vectors, row sums minus column
// sums of the strict triangle. No sum runs past a chunk, and terms that no gate touches (i = j) never enter, so that
// strong gates lose nothing to cancellation.
template <Gate gate>
struct ChunkGradient {
  Chunk<gate, true> c;
  float *a, *da, *value_t, *kut, *dvalue_t, *dq, *dk, *dvalue, *raw, *y, *z, *base, *pairs, *dg;
  float* gradient;  // of the state
  int64_t K, V, Kp, Vp;

  void layout(Arena& m, int64_t K_, int64_t V_) {
    c.layout(m, K_, V_);
    K = K_, V = V_, Kp = c.Kp, Vp = c.Vp;
    a = m.take(kChunk * kChunk), da = m.take(kChunk * kChunk);
    value_t = m.take(kChunk * Vp), kut = m.take(kChunk * Kp), dvalue_t = m.take(kChunk * Vp);
    dq = m.take(kChunk * Kp), dk = m.take(kChunk * Kp), dvalue = m.take(kChunk * Vp), raw = m.take(kChunk * Kp);
    const int64_t n = gate == Gate::channel ? Kp : 1;
    y = m.take(kChunk * n), z = m.take(kChunk * n), base = m.take(n), dg = m.take(kChunk * n);
    pairs = m.take(kChunk);
    gradient = m.take(Vp * Kp);
  }

  // The state of [K][V] that a sequence begins with and the gradient of the one that it ends with
  void read_states(float* state, const float* initial, const float* d_final) {
    read_state(state, 1, Kp, Vp * Kp, initial, V, K, V);
    read_state(gradient, 1, Kp, Vp * Kp, d_final, V, K, V);
  }

  // state = after this chunk, from = before it; the chunk wrote `value` with its keys
  void advance(float* state, const float* from, const float* value, int n) {
    for_tiles(Vp, Kp, [&](auto& tile, int64_t i, int64_t j) __attribute__((always_inline)) {
      tile.read(from + i * Kp + j, Kp);
      if constexpr (gate != Gate::none) tile.scale_columns(c.decay + j);
      tile.multiply(Left{value, 1, Vp}, c.ku + j, Kp, i, 0, n);
      tile.write(state + i * Kp + j, Kp);
    });
  }

  // Begins with what the state at the chunk's end gives to dk, dvalue and the gates. c.kt is set already.
  void begin(const float* state, const float* value) {
    transpose(value_t, value, kChunk, Vp);
    if constexpr (gate != Gate::none) {
      const int64_t width = gate == Gate::channel ? Kp : 1;
      transpose(kut, c.ku, kChunk, Kp);
      __builtin_memset(y, 0, kChunk * width * 4);
      __builtin_memset(z, 0, kChunk * width * 4);
      __builtin_memset(pairs, 0, kChunk * 4);
      outer_gate_gradient(state);
    }
    product(dk, Kp, kChunk, Kp, Left{value, Vp, 1}, gradient, Kp, V);
    if constexpr (gate == Gate::channel)
      for (int64_t i = 0; i < kChunk * Kp; i += kWidth) store(dk + i, load(dk + i) * load(c.up + i));
    if constexpr (gate == Gate::scalar)
      for (int i = 0; i < kChunk; ++i)
        for (int64_t j = 0; j < Kp; j += kWidth) store(dk + i * Kp + j, load(dk + i * Kp + j) * splat(c.up[i]));
    if constexpr (gate != Gate::none) reduce(y, [&](int64_t i) { return load(c.k + i) * load(dk + i); });
    product(dvalue_t, kChunk, Vp, kChunk, Left{gradient, Kp, 1}, gate == Gate::none ? c.kt : kut, kChunk, K);
    transpose(dvalue, dvalue_t, Vp, kChunk);
  }

  // dvalue += what queries with these scores and gradients of their outputs give, in `width` columns of dvalue and d_o
  void scores_gradient(const float* scores, float* to, const float* d_o, int64_t width) {
    for_tiles(kChunk, width, [&](auto& tile, int64_t i, int64_t j) __attribute__((always_inline)) {
      tile.read(to + i * Vp + j, Vp);
      tile.template upper<false>(Left{scores, 1, kChunk}, d_o + j, Vp, i, kChunk);
      tile.write(to + i * Vp + j, Vp);
    });
  }

  // From the gradients of what queries read: dq (for q = qr / scale), and their parts of dk, z and the state's
  // gradient, which decays with the `first` queries of a chunk. Strict: they read earlier tokens only.
  template <bool Strict>
  void queries_gradient(const float* state, const float* scores, const float* qr, const float* qs, const float* d_o,
                        float scale, int n, bool first) {
    product(da, kChunk, kChunk, kChunk, Left{d_o, Vp, 1}, value_t, kChunk, V);
    c.gather(dq, d_o, Vp, V, state, da, n, qr, gate == Gate::scalar ? z : nullptr);
    if constexpr (gate == Gate::scalar) pairs_gradient(da, scores);
    keys_gradient<Strict>(da, qr, qs, dq, n);
    for (int i = 0; i < kChunk; ++i) {
      const Vec w = splat(da[i * kChunk + i]);
      for (int64_t at = i * Kp; at < (i + 1) * Kp; at += kWidth)
        store(dq + at, (Strict ? load(dq + at) : load(dq + at) + w * load(c.k + at)) * splat(scale));
    }
    state_gradient(gradient, Vp, qs, d_o, n, first);
  }

  // Adds to dk and z what queries give whose decayed scores have the gradients w; gathered is c.gather's result for w.
  template <bool Strict>
  void keys_gradient(const float* w, const float* qr, const float* qs, const float* gathered, int n) {
    float held[kChunk * kChunk];
    const float* u = c.split(held, w);
    for_tiles(kChunk, Kp, [&](auto& tile, int64_t i, int64_t j) __attribute__((always_inline)) {
      tile.zero();
      tile.template upper<true>(Left{u, 1, kChunk}, (gate == Gate::channel ? qs : qr) + j, Kp, i, kChunk);
      tile.write(raw + i * Kp + j, Kp);
    });
    if constexpr (gate == Gate::channel) {
      for (int64_t i = 0; i < kChunk * Kp; i += kWidth) store(raw + i, load(raw + i) * load(c.inverse + i));
      for (int i = c.cross; i < n; ++i) {
        c.advance(i);
        for (int j = 0; j < i; ++j) {
          const Vec x = splat(w[i * kChunk + j]);
          for (int64_t at = 0; at < Kp; at += kWidth)
            store(raw + j * Kp + at, load(raw + j * Kp + at) + x * load(c.d + j * Kp + at) * load(qr + i * Kp + at));
        }
      }
    }
    if constexpr (gate == Gate::channel)
      reduce(z, [&](int64_t i) { return load(qr + i) * load(gathered + i) - load(c.k + i) * load(raw + i); });
    for (int i = 0; i < kChunk; ++i) {
      const Vec x = splat(w[i * kChunk + i]);
      for (int64_t at = i * Kp; at < (i + 1) * Kp; at += kWidth) {
        const Vec y = load(dk + at) + load(raw + at);
        store(dk + at, Strict ? y : y + x * load(qr + at));
      }
    }
  }

  // A scalar gate's pairs inside the chunk: pairs_t += sum of w_ij scores_ij over i >= t > j
  void pairs_gradient(const float* w, const float* scores) {
    Vec total[kChunk] = {};
    for (int j = 0; j < kChunk; j += kWidth) {
      const IVec column = lanes() + j;
      Vec later = Vec{};
      for (int t = kChunk - 1; t > 0; --t) {
        later += column < t ? load(w + t * kChunk + j) * load(scores + t * kChunk + j) : Vec{};
        total[t] += column < t ? later : Vec{};
      }
    }
    for (int t = 1; t < kChunk; ++t) pairs[t] += sum(total[t]);
  }

  // `rows` of the state's gradient take what queries with these d_o (columns as many) give
  void state_gradient(float* to, int64_t rows, const float* qs, const float* d_o, int n, bool first) {
    for_tiles(rows, Kp, [&](auto& tile, int64_t i, int64_t j) __attribute__((always_inline)) {
      tile.read(to + i * Kp + j, Kp);
      if constexpr (gate != Gate::none)
        if (first) tile.scale_columns(c.decay + j);
      tile.multiply(Left{d_o, 1, Vp}, qs + j, Kp, i, 0, n);
      tile.write(to + i * Kp + j, Kp);
    });
  }

  // dg from its four kinds of pairs
  void gates_gradient() {
    if constexpr (gate == Gate::channel) {
      for (int64_t j = 0; j < Kp; j += kWidth) {
        Vec before = load(base + j), after = Vec{};
        for (int i = 0; i < kChunk; ++i) {
          store(dg + i * Kp + j, before);
          before += load(y + i * Kp + j);
        }
        for (int i = kChunk - 1; i >= 0; --i) {
          const int64_t at = i * Kp + j;
          after += load(z + at);
          store(dg + at, load(c.e + at) == Vec{} ? Vec{} : load(dg + at) + after);  // a closed gate: exactly zero
        }
      }
    } else if constexpr (gate == Gate::scalar) {
      float before = base[0], after = 0.f;
      for (int i = 0; i < kChunk; before += y[i++]) dg[i] = before;
      for (int i = kChunk - 1; i >= 0; --i) {
        after += z[i];
        dg[i] = c.e[i] == 0.f ? 0.f : dg[i] + after + pairs[i];
      }
    }
  }

  // dg's parts: rows of gain(i, column) added to out
  template <class F>
  ICRL_INLINE void reduce(float* out, F&& gain) {
    for (int i = 0; i < kChunk; ++i) {
      if constexpr (gate == Gate::channel) {
        for (int64_t j = 0; j < Kp; j += kWidth) store(out + i * Kp + j, load(out + i * Kp + j) + gain(i * Kp + j));
      } else {
        Vec total = Vec{};
        for (int64_t j = 0; j < Kp; j += kWidth) total += gain(i * Kp + j);
        out[i] += sum(total);
      }
    }
  }

  void outer_gate_gradient(const float* state) {
    Vec total = Vec{};
    for (int64_t j = 0; j < Kp; j += kWidth) {
      Vec b = Vec{};
      for (int64_t i = 0; i < Vp; i += 16) {  // sums of 16, then their sum: fewer roundings, and no chain of latencies
        Vec part[4] = {};
#pragma GCC unroll 16
        for (int m = 0; m < 16; ++m) part[m % 4] += load(state + (i + m) * Kp + j) * load(gradient + (i + m) * Kp + j);
        b += (part[0] + part[1]) + (part[2] + part[3]);
      }
      b *= load(c.decay + j);
      if constexpr (gate == Gate::channel) store(base + j, b);
      total += b;
    }
    if constexpr (gate == Gate::scalar) base[0] = sum(total);
  }
};

// Gradients of one sequence: b.read_states sets its first state and last gradient, b.advance takes a state over a
// chunk, b.chunk takes b.m.gradient back over it. States are kept at the start of each chunk of one segment, and at the
// start of every segment. False when memory ran out.
template <class B>
bool backward_sequence(B& b, int64_t first, int64_t last) {
  const int64_t chunks = (last - first + kChunk - 1) / kChunk, size = b.state_size();
  int64_t length = chunks > 0 ? chunks : 1;
  if (length * size > kSingleSegment) length = kSegment / size > 16 ? kSegment / size : 16;
  const int64_t segments = (chunks + length - 1) / length;
  Arena arena;
  float *starts = nullptr, *states = nullptr;
  for (int pass = 0; pass < 2; ++pass) {
    if (pass && !arena.allocate()) return false;
    b.layout(arena);
    starts = arena.take((segments > 0 ? segments : 1) * size), states = arena.take(length * size);
  }
  b.read_states(starts);
  for (int64_t i = 0; i + 1 < segments; ++i) {
    float* next = starts + (i + 1) * size;
    for (int64_t j = i * length; j < (i + 1) * length; ++j)
      b.advance(next, j == i * length ? starts + i * size : next, first + j * kChunk, kChunk);
  }
  for (int64_t i = segments - 1; i >= 0; --i) {
    const int64_t from = i * length, to = from + length < chunks ? from + length : chunks;
    __builtin_memcpy(states, starts + i * size, size * 4);
    for (int64_t j = from; j + 1 < to; ++j)
      b.advance(states + (j - from + 1) * size, states + (j - from) * size, first + j * kChunk, kChunk);
    for (int64_t j = to - 1; j >= from; --j) {
      const int64_t left = last - first - j * kChunk;
      if (j > from)
        for (int64_t at = 0; at < size; at += 16) __builtin_prefetch(states + (j - 1 - from) * size + at, 0, 2);
      b.chunk(states + (j - from) * size, first + j * kChunk, left < kChunk ? int(left) : kChunk);
    }
  }
  b.write_gradient();
  free(arena.base);
  return true;
}

}  // namespace

#define ICRL_BY_GATE(f) \
  (s.gate == Gate::none ? f<Gate::none>(s, p) : s.gate == Gate::scalar ? f<Gate::scalar>(s, p) : f<Gate::channel>(s, p))

}  // namespace icrl::ICRL_ISA
