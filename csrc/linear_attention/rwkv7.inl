// RWKV-7's generalized delta rule in chunks of 16 tokens (chunk.inl), one (sequence, head) at a time.
//
//   T, H       tokens of all sequences; heads
//   r, k       [T, H, K] receptances (the queries) and keys, of RwkvShape::dtype, as a, b, v and o
//   a, b       [T, H, K]: what reads the state into u, and what writes u back
//   w          [T, H, K] log decays, of gate_dtype
//   v, o       [T, H, V] values, outputs
//   bounds     [sequences + 1] int64: sequence i has the tokens [bounds[i], bounds[i + 1])
//   S          [K, V] state of a (sequence, head); initial, final: [sequences, H, K, V] float32
//   u          of a chunk: [16, Vp]
//   x, q       of a chunk: keys k over b and queries a over r, [32, Kp]; `value`: v over u, [32, Vp]
//   d_o, dr, dw, dk, dv, da, db, d_initial, d_final   gradients, shaped and typed as what they belong to
//   step       one token a sequence: the same with T = sequences; state [sequences, H, K, V] float32, updated in place
//
// In a chunk that begins with state S, with P_i the product of exp w over its tokens up to i and P_-1 = 1:
//   u_i = S^T (P_{i-1} a_i) + sum_{j < i}  a_i . (P_{i-1} / P_j) k_j v_j + a_i . (P_{i-1} / P_j) b_j u_j,
//   o_i = S^T (P_i r_i)     + sum_{j <= i} r_i . (P_i / P_j) k_j v_j     + r_i . (P_i / P_j) b_j u_j,
//   S'  = P_15 S + sum_j (P_15 / P_j) (k_j v_j^T + b_j u_j^T),
// u by forward substitution and scale in r. So there are two sets of queries, a and r, and two sets of keys, k and b,
// which write v and u: each pair of sets is one array of 32 rows, and all scores are one product. a_i reads what
// r_{i-1} would: the state after token i - 1.
#pragma once

#include <cstdint>
#include <cstdlib>

#include "common/gemm.h"
#include "common/parallel.h"
#include "common/vec.h"
#include "linear_attention/chunk.inl"
#include "linear_attention/gate.h"
#include "linear_attention/limits.h"
#include "linear_attention/rwkv7.h"
#include "linear_attention/step.inl"

namespace icrl::ICRL_ISA {
namespace {

// About how many nanoseconds one thread takes for a token and an entry of its state.
constexpr double kForward = 0.07, kBackward = 0.25, kStep = 0.1;

// How many threads `tokens` tokens of all heads are worth.
int team_of(const RwkvShape& s, int64_t tokens, double nanoseconds) {
  return team_for(nanoseconds * static_cast<double>(tokens * s.heads * s.k * s.v), s.threads);
}

constexpr int kPair = 2 * kChunk;
constexpr int64_t kPanel = 64;  // columns of the state that stay in L1 for all of a chunk's products

using Keys = Chunk<Gate::channel, true>;  // of k; what b needs of the decays stands there too

// A chunk's tokens and their scores.
struct Pairs {
  float *x, *xd, *xu, *xt;  // keys k and b, x / P_j, x P_15 / P_j: [32][Kp]; xd transposed, [Kp][32]
  float *q, *qd;            // queries a and scale r; P_{i-1} a and P_i scale r: [32][Kp]
  float *value, *scores;    // v and u, [32][Vp]; [32][32]
  float* ones;              // [Kp], before the chunk's P

  void layout(Arena& m, Keys& c, int64_t K, int64_t V) {
    c.layout(m, K, V);
    const int64_t n = kPair * c.Kp;
    x = m.take(n), xd = m.take(n), xu = m.take(n), xt = m.take(n), q = m.take(n), qd = m.take(n);
    value = m.take(kPair * c.Vp), scores = m.take(kPair * kPair);
    ones = m.take((1 + kChunk) * c.Kp);
    c.k = x, c.kd = xd, c.ku = xu, c.v = value, c.p = ones + c.Kp;
  }

  // Reads n tokens from t on, columns of v from v0; returns the largest gate.
  template <class P>
  float read(Keys& c, const RwkvShape& s, const P& p, int64_t t, int n, int64_t head, int64_t v0, Next next) {
    const int64_t Kp = c.Kp, half = kChunk * Kp;
    const auto load_keys = [&](float* to, const void* from) {
      load_rows(to, rows(from, s.dtype, t, s.heads, head, s.k), n, s.k, Kp, next);
    };
    load_keys(x, p.k), load_keys(x + half, p.b), load_keys(q, p.a), load_keys(q + half, p.r);
    Rows values = rows(p.v, s.dtype, t, s.heads, head, s.v);
    values.at += v0;
    load_rows(value, values, n, c.V, c.Vp, next);
    const float largest = c.gates(rows(p.w, s.gate_dtype, t, s.heads, head, s.k), n, next);
    for (int64_t i = 0; i < Kp; i += kWidth) store(ones + i, splat(1.f));
    for (int64_t i = 0; i < half; i += kWidth) {
      const Vec b = load(x + half + i), r = load(q + half + i) * splat(s.scale);
      store(xd + half + i, b * load(c.inverse + i));
      store(xu + half + i, b * load(c.up + i));
      store(qd + i, load(q + i) * load(ones + i));
      store(q + half + i, r);
      store(qd + half + i, r * load(c.p + i));
    }
    transpose(xt, xd, kPair, Kp);
    product(scores, kPair, kPair, kPair, Left{qd, Kp, 1}, xt, kPair, s.k);
    for (int i = c.cross; i < n; ++i) {
      c.advance(i);
      crossed(c, kChunk + i, i);
      if (i + 1 < n) crossed(c, i + 1, i);
    }
    return largest;
  }

  // Scores of query `row`, which reads the state after token i, from the running products that c.d holds
  void crossed(const Keys& c, int row, int i) {
    for (int j = 0; j <= i; ++j) {
      Vec with_k = Vec{}, with_b = Vec{};
      for (int64_t at = 0; at < c.Kp; at += kWidth) {
        const Vec y = load(q + row * c.Kp + at) * load(c.d + j * c.Kp + at);
        with_k += y * load(x + j * c.Kp + at);
        with_b += y * load(x + (kChunk + j) * c.Kp + at);
      }
      scores[row * kPair + j] = sum(with_k);
      scores[row * kPair + kChunk + j] = sum(with_b);
    }
  }
};

bool forward(const RwkvShape& s, const RwkvForward& x) {
  const int64_t pairs = s.sequences * s.heads;
  // With fewer (sequence, head) pairs than threads, columns of v are shared out; they do not depend on each other.
  int64_t width = s.v;
  const int threads = team_of(s, s.bounds[s.sequences], kForward);
  if (pairs && pairs < threads) width = pad16((s.v * pairs + threads - 1) / threads);
  const int64_t splits = (s.v + width - 1) / width;
  int failed = 0;
  parallel_for(pairs * splits, threads, [&](int64_t item) {
    const int64_t pair = item / splits, v0 = item % splits * width, V = v0 + width < s.v ? width : s.v - v0;
    const int64_t sequence = pair / s.heads, head = pair % s.heads, K = s.k;
    Keys c;
    Pairs d;
    Arena arena;
    float *state = nullptr, *out = nullptr;
    for (int pass = 0; pass < 2; ++pass) {
      if (pass && !arena.allocate()) {
        __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
        return;
      }
      d.layout(arena, c, K, V);
      state = arena.take(c.Kp * c.Vp), out = arena.take(kChunk * c.Vp);
    }
    const int64_t Kp = c.Kp, Vp = c.Vp, first = s.bounds[sequence], last = s.bounds[sequence + 1];
    const float *with_k = d.scores, *with_b = d.scores + kChunk;
    read_state(state, Vp, 1, Kp * Vp, x.initial ? x.initial + pair * K * s.v + v0 : nullptr, s.v, K, V);
    float largest = -__builtin_inff();
    for (int64_t t = first; t < last; t += kChunk) {
      const int n = last - t < kChunk ? int(last - t) : kChunk;
      const float m = d.read(c, s, x, t, n, head, v0, Next::later);
      largest = m > largest ? m : largest;
      for (int64_t at = 0; at < Vp; at += kPanel) {
        const int64_t columns = Vp - at < kPanel ? Vp - at : kPanel;
        float *panel = state + at, *v = d.value + at, *u = v + kChunk * Vp;
        for_tiles(kChunk, columns, [&](auto& tile, int64_t i, int64_t j) __attribute__((always_inline)) {
          tile.zero();
          tile.multiply(Left{d.qd, Kp, 1}, panel + j, Vp, i, 0, K);
          tile.template lower<true>(Left{with_k, kPair, 1}, v + j, Vp, i);
          tile.write(u + i * Vp + j, Vp);
        });
        solve<false>(u, Vp, columns, with_b, kPair);
        for_tiles(kChunk, columns, [&](auto& tile, int64_t i, int64_t j) __attribute__((always_inline)) {
          tile.zero();
          tile.multiply(Left{d.qd + kChunk * Kp, Kp, 1}, panel + j, Vp, i, 0, K);
          tile.template lower<false>(Left{with_k + kChunk * kPair, kPair, 1}, v + j, Vp, i);
          tile.template lower<false>(Left{with_b + kChunk * kPair, kPair, 1}, u + j, Vp, i);
          tile.write(out + at + i * Vp + j, Vp);
        });
        for_tiles(Kp, columns, [&](auto& tile, int64_t i, int64_t j) __attribute__((always_inline)) {
          tile.read(panel + i * Vp + j, Vp);
          tile.scale_rows(c.decay + i);
          tile.multiply(Left{d.xu, 1, Kp}, v + j, Vp, i, 0, n);
          tile.multiply(Left{d.xu + kChunk * Kp, 1, Kp}, u + j, Vp, i, 0, n);
          tile.write(panel + i * Vp + j, Vp);
        });
      }
      store_rows(x.o, out, s.dtype, (t * s.heads + head) * s.v + v0, s.heads * s.v, n, V, Vp, Next::later);
    }
    write_state(x.final + pair * K * s.v + v0, s.v, state, Vp, 1, K, V);
    if (largest > s.allowance) __atomic_store_n(x.refused, 1, __ATOMIC_RELAXED);
    free(arena.base);
  });
  return !failed;
}

// States and their gradients are transposed, [V][K]; the gates' gradient is taken as ChunkGradient has it. du, the
// gradient of u with the later tokens included, comes by backward substitution and is then one more d_o, of the queries
// a. Pairs that no gate lies between, r_i with its own keys and a_i with those of token i - 1, are left out of the
// decayed products and added at the end.
struct Backward {
  const RwkvShape& s;
  const RwkvBackward& x;
  int64_t pair, head;
  ChunkGradient<Gate::channel> m;
  Pairs d;
  float *qt, *u_t, *value_t, *xut;  // P_{i-1} a, u, (v, u) and xu transposed
  float *dvalue, *d_o;              // rows dv, du, do of one array: [32][Vp] from dv and from du on
  float *dvalue_t, *ds, *w;         // ds: of the scores, [32][32]; w: ds where the split decays serve, 0 elsewhere
  float *dq, *dx, *raw;             // [32][Kp]; raw: dx's part inside the chunk

  int64_t state_size() const { return pad16(s.k) * pad16(s.v); }

  void layout(Arena& arena) {
    m.layout(arena, s.k, s.v);
    d.layout(arena, m.c, s.k, s.v);
    const int64_t keys = kPair * m.Kp, values = kPair * m.Vp;
    qt = arena.take(kChunk * m.Kp), u_t = arena.take(kChunk * m.Vp), value_t = arena.take(values);
    xut = arena.take(keys), dvalue = arena.take(3 * kChunk * m.Vp), d_o = dvalue + kChunk * m.Vp;
    dvalue_t = arena.take(values), ds = arena.take(kPair * kPair), w = arena.take(kPair * kPair);
    dq = arena.take(keys), dx = arena.take(keys), raw = arena.take(keys);
  }

  void read_states(float* state) {
    const int64_t at = pair * s.k * s.v;
    m.read_states(state, x.initial ? x.initial + at : nullptr, x.d_final + at);
  }
  void write_gradient() {
    if (x.d_initial) write_state(x.d_initial + pair * s.k * s.v, s.v, m.gradient, 1, m.Kp, s.k, s.v);
  }

  // Reads the n tokens from t on and makes their u.
  void read(const float* state, int64_t t, int n, Next next) {
    const int64_t Kp = m.Kp, Vp = m.Vp;
    if (d.read(m.c, s, x, t, n, head, 0, next) > s.allowance) __atomic_store_n(x.refused, 1, __ATOMIC_RELAXED);
    transpose(qt, d.qd, kChunk, Kp);
    product(u_t, kChunk, Vp, kChunk, Left{state, Kp, 1}, qt, kChunk, s.k);
    float* u = d.value + kChunk * Vp;
    transpose(u, u_t, Vp, kChunk);
    for_tiles(kChunk, Vp, [&](auto& tile, int64_t i, int64_t j) __attribute__((always_inline)) {
      tile.read(u + i * Vp + j, Vp);
      tile.template lower<true>(Left{d.scores, kPair, 1}, d.value + j, Vp, i);
      tile.write(u + i * Vp + j, Vp);
    });
    solve<false>(u, Vp, Vp, d.scores + kChunk, kPair);
  }

  // to = P_15 from + sum of values[i] keys[i]^T over the n rows of each half
  void accumulate(float* to, const float* from, const float* values, const float* keys, int n) {
    const int64_t Kp = m.Kp, Vp = m.Vp;
    for_tiles(Vp, Kp, [&](auto& tile, int64_t i, int64_t j) __attribute__((always_inline)) {
      tile.read(from + i * Kp + j, Kp);
      tile.scale_columns(m.c.decay + j);
      tile.multiply(Left{values, 1, Vp}, keys + j, Kp, i, 0, n);
      tile.multiply(Left{values + kChunk * Vp, 1, Vp}, keys + kChunk * Kp + j, Kp, i, 0, n);
      tile.write(to + i * Kp + j, Kp);
    });
  }

  void advance(float* state, const float* from, int64_t t, int n) {
    read(from, t, n, Next::later);
    accumulate(state, from, d.value, d.xu, n);
  }

  void chunk(const float* state, int64_t t, int n) {
    const int64_t Kp = m.Kp, Vp = m.Vp, half = kChunk * Kp, row = t * s.heads + head;
    read(state, t, n, Next::earlier);
    load_rows(d_o + kChunk * Vp, rows(x.d_o, s.dtype, t, s.heads, head, s.v), n, s.v, Vp, Next::earlier);
    m.outer_gate_gradient(state);
    transpose(value_t, d.value, kPair, Vp);
    transpose(xut, d.xu, kPair, Kp);
    product(dx, Kp, kPair, Kp, Left{d.value, Vp, 1}, m.gradient, Kp, s.v);
    for (int64_t i = 0; i < half; i += kWidth) {
      const Vec up = load(m.c.up + i), with_k = load(dx + i) * up, with_b = load(dx + half + i) * up;
      store(dx + i, with_k);
      store(dx + half + i, with_b);
      store(m.y + i, load(d.x + i) * with_k + load(d.x + half + i) * with_b);
    }
    values_gradient();
    scores_gradient(state, n);
    finish();
    accumulate(m.gradient, m.gradient, d_o, d.qd, n);
    m.gates_gradient();
    const auto store_keys = [&](void* to, const float* from, int dtype) {
      store_rows(to, from, dtype, row * s.k, s.heads * s.k, n, s.k, Kp, Next::earlier);
    };
    store_keys(x.da, dq, s.dtype), store_keys(x.dr, dq + half, s.dtype), store_keys(x.dw, m.dg, s.gate_dtype);
    store_keys(x.dk, dx, s.dtype), store_keys(x.db, dx + half, s.dtype);
    store_rows(x.dv, dvalue, s.dtype, row * s.v, s.heads * s.v, n, s.v, Vp, Next::earlier);
  }

  // dv and du
  void values_gradient() {
    const int64_t Kp = m.Kp, Vp = m.Vp;
    const float *with_k = d.scores, *with_b = d.scores + kChunk, *of_o = d_o + kChunk * Vp;
    product(dvalue_t, kPair, Vp, kPair, Left{m.gradient, Kp, 1}, xut, kPair, s.k);
    transpose(dvalue, dvalue_t, Vp, kPair);
    for_tiles(kChunk, Vp, [&](auto& tile, int64_t i, int64_t j) __attribute__((always_inline)) {
      tile.read(d_o + i * Vp + j, Vp);
      tile.template upper<false>(Left{with_b + kChunk * kPair, 1, kPair}, of_o + j, Vp, i, kChunk);
      tile.write(d_o + i * Vp + j, Vp);
    });
    solve<true>(d_o, Vp, Vp, with_b, kPair);
    for_tiles(kChunk, Vp, [&](auto& tile, int64_t i, int64_t j) __attribute__((always_inline)) {
      tile.read(dvalue + i * Vp + j, Vp);
      tile.template upper<false>(Left{with_k + kChunk * kPair, 1, kPair}, of_o + j, Vp, i, kChunk);
      tile.template upper<true>(Left{with_k, 1, kPair}, d_o + j, Vp, i, kChunk);
      tile.write(dvalue + i * Vp + j, Vp);
    });
  }

  // What decays touch of dq, raw and m.z
  void scores_gradient(const float* state, int n) {
    const int64_t Kp = m.Kp, Vp = m.Vp, half = kChunk * Kp;
    const int cross = m.c.cross;
    product(ds, kPair, kPair, kPair, Left{d_o, Vp, 1}, value_t, kPair, s.v);
    __builtin_memcpy(w, ds, kPair * kPair * 4);
    for (int i = 0; i < kChunk; ++i) {
      float *a = w + i * kPair, *r = a + kChunk * kPair;
      if (i > 0) a[i - 1] = a[kChunk + i - 1] = 0.f;
      r[i] = r[kChunk + i] = 0.f;
      if (i > cross) __builtin_memset(a, 0, kPair * 4);
      if (i >= cross) __builtin_memset(r, 0, kPair * 4);
    }
    for (int h = 0; h < 2; ++h) {
      const float *rows_of = w + h * kChunk * kPair, *columns_of = w + h * kChunk;
      for_tiles(kChunk, Kp, [&](auto& tile, int64_t i, int64_t j) __attribute__((always_inline)) {
        tile.zero();
        tile.multiply(Left{d_o + h * kChunk * Vp, Vp, 1}, state + j, Kp, i, 0, s.v);
        tile.template lower<true>(Left{rows_of, kPair, 1}, d.xd + j, Kp, i);
        tile.template lower<true>(Left{rows_of + kChunk, kPair, 1}, d.xd + half + j, Kp, i);
        tile.write(dq + h * half + i * Kp + j, Kp);
      });
      for_tiles(kChunk, Kp, [&](auto& tile, int64_t i, int64_t j) __attribute__((always_inline)) {
        tile.zero();
        tile.template upper<true>(Left{columns_of, 1, kPair}, d.qd + j, Kp, i, kChunk);
        tile.template upper<true>(Left{columns_of + kChunk * kPair, 1, kPair}, d.qd + half + j, Kp, i, kChunk);
        tile.write(raw + h * half + i * Kp + j, Kp);
      });
    }
    for (int64_t i = 0; i < half; i += kWidth) {
      const Vec inverse = load(m.c.inverse + i);
      store(dq + i, load(dq + i) * load(d.ones + i));
      store(dq + half + i, load(dq + half + i) * load(m.c.p + i));
      store(raw + i, load(raw + i) * inverse);
      store(raw + half + i, load(raw + half + i) * inverse);
    }
    for (int i = cross; i < n; ++i) {
      m.c.advance(i);
      crossed(kChunk + i, i);
      if (i + 1 < n) crossed(i + 1, i);
    }
    for (int64_t i = 0; i < half; i += kWidth) {
      Vec z = load(d.q + half + i) * load(dq + half + i);
      if (i + Kp < half) z += load(d.q + i + Kp) * load(dq + i + Kp);
      store(m.z + i, z - load(d.x + i) * load(raw + i) - load(d.x + half + i) * load(raw + half + i));
    }
  }

  // The part of query `row`, which reads the state after token i, from the running products
  void crossed(int row, int i) {
    const int64_t Kp = m.Kp, half = kChunk * Kp;
    for (int j = 0; j < i; ++j) {
      const Vec with_k = splat(ds[row * kPair + j]), with_b = splat(ds[row * kPair + kChunk + j]);
      for (int64_t at = 0; at < Kp; at += kWidth) {
        const int64_t key = j * Kp + at, query = row * Kp + at;
        const Vec y = load(m.c.d + key), q = load(d.q + query) * y;
        store(dq + query, load(dq + query) + y * (with_k * load(d.x + key) + with_b * load(d.x + half + key)));
        store(raw + key, load(raw + key) + with_k * q);
        store(raw + half + key, load(raw + half + key) + with_b * q);
      }
    }
  }

  // dq and dx, with the pairs that no gate lies between
  void finish() {
    const int64_t Kp = m.Kp, half = kChunk * Kp;
    for (int i = 0; i < kChunk; ++i) {
      const float *r = ds + (kChunk + i) * kPair + i, *a = ds + (i + 1) * kPair + i;
      const Vec r_k = splat(r[0]), r_b = splat(r[kChunk]);
      for (int64_t at = i * Kp; at < (i + 1) * Kp; at += kWidth) {
        const Vec k = load(d.x + at), b = load(d.x + half + at), q = load(d.q + half + at);
        Vec dk = load(dx + at) + load(raw + at) + r_k * q, db = load(dx + half + at) + load(raw + half + at) + r_b * q;
        store(dq + half + at, (load(dq + half + at) + r_k * k + r_b * b) * splat(s.scale));
        if (i + 1 < kChunk) {
          const Vec a_k = splat(a[0]), a_b = splat(a[kChunk]), next = load(d.q + at + Kp);
          dk += a_k * next, db += a_b * next;
          store(dq + at + Kp, load(dq + at + Kp) + a_k * k + a_b * b);
        }
        store(dx + at, dk);
        store(dx + half + at, db);
      }
    }
  }
};

bool backward(const RwkvShape& s, const RwkvBackward& x) {
  int failed = 0;
  parallel_for(s.sequences * s.heads, team_of(s, s.bounds[s.sequences], kBackward), [&](int64_t pair) {
    const int64_t sequence = pair / s.heads;
    Backward b{s, x, pair, pair % s.heads};
    if (!backward_sequence(b, s.bounds[sequence], s.bounds[sequence + 1]))
      __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
  });
  return !failed;
}

}  // namespace

bool rwkv7_forward(const RwkvShape& s, const RwkvForward& p) { return forward(s, p); }
bool rwkv7_backward(const RwkvShape& s, const RwkvBackward& p) { return backward(s, p); }

bool rwkv7_step(const RwkvShape& s, const RwkvStep& p) {
  const int64_t pairs = s.sequences * s.heads, K = s.k, V = s.v, Kp = pad16(K);
  int refused = 0;
  parallel_for(pairs, team_of(s, s.sequences, kStep), [&](int64_t pair) {
    alignas(64) float r[kMostChannels], e[kMostChannels], k[kMostChannels], a[kMostChannels], b[kMostChannels];
    alignas(64) float v[kMostValues], out[kMostValues], tail[kMostChannels * kWidth];
    load_row(r, p.r, s.dtype, pair * K, K, Kp);
    load_row(e, p.w, s.gate_dtype, pair * K, K, Kp);
    load_row(k, p.k, s.dtype, pair * K, K, Kp);
    load_row(v, p.v, s.dtype, pair * V, V, pad16(V));
    load_row(a, p.a, s.dtype, pair * K, K, Kp);
    load_row(b, p.b, s.dtype, pair * K, K, Kp);
    if (decays(e, K) > s.allowance) __atomic_store_n(&refused, 1, __ATOMIC_RELAXED);
    scale_row(r, s.scale, Kp);
    rwkv7_head(p.state + pair * K * V, K, V, r, e, k, v, a, b, out, tail);
    store_row(p.o, out, s.dtype, pair * V, V);
  });
  return !refused;
}

}  // namespace icrl::ICRL_ISA
