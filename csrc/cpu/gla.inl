// Gated linear attention in chunks of 16 tokens, one (sequence, key/value head) at a time, everything of a chunk in L1.
//
// In a chunk that begins with state S, with P_i the product of exp g over its tokens up to i:
//   A_ij = scale q_i . (P_i / P_j) k_j  (j <= i),   o_i = scale S^T (P_i q_i) + sum_j A_ij v_j,
//   S'   = P_15 S + sum_j (P_15 / P_j) k_j v_j^T.
// 16 tokens are few enough that the state's update costs less than wider chunks' longer triangles. Products of exp g,
// not exponentials of sums: one exp per gate, errors as in the recurrence, and g = -inf needs no care.
// P_i / P_j is split as P_i times 1 / P_j while P_i >= kSmallest in every channel; from the first row where it is not,
// rows take the running products of exp g themselves. A row's choice depends on no later gate.
namespace {

constexpr int kChunk = 16;
constexpr float kSmallest = 0x1p-40f;
constexpr int64_t kSingleSegment = int64_t(1) << 21;  // floats of chunk states kept without recomputation
constexpr int64_t kSegment = int64_t(1) << 18;        // floats of chunk states per segment otherwise

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

constexpr float kUnit[2 * kChunk] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1};  // rows of the identity, shifted

// Keep: store 1 / P_j and P_15 / P_j, which only the backward reads.
template <Gate gate, bool Keep>
struct Chunk {
  int64_t K, V, Kp, Vp;
  float *k, *v;        // [16][Kp], [16][Vp]: as given
  float *kd, *ku, *kt; // k / P_j; k P_15 / P_j; kd transposed [Kp][16]
  float *e, *p, *inverse, *up;  // exp g, P, 1 / P, P_15 / P_j: [16][Kp] for channel, [16] for scalar gates
  float* d;            // scalar: P_i / P_j [16][16]; channel: the same for one row, [16][Kp]
  float* decay;        // P_15 [Kp]
  int cross;           // rows from here on take running products

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

  // Reads n tokens from t on; returns the largest gate.
  float read(const GlaShape& s, const void* ks, const void* vs, const void* gs, int64_t t, int n, int64_t head,
             int64_t v0) {
    for (int i = 0; i < kChunk; ++i) {
      const int64_t row = (t + i) * s.kv_heads + head;
      if (i < n) {
        load_row(k + i * Kp, ks, s.dtype, row * s.k, K, Kp);
        load_row(v + i * Vp, vs, s.dtype, row * s.v + v0, V, Vp);
      } else {
        __builtin_memset(k + i * Kp, 0, Kp * 4);
        __builtin_memset(v + i * Vp, 0, Vp * 4);
      }
    }
    float largest = -__builtin_inff();
    if constexpr (gate == Gate::channel) {
      for (int i = 0; i < kChunk; ++i) {
        if (i < n)
          load_row(e + i * Kp, gs, s.gate_dtype, ((t + i) * s.kv_heads + head) * s.k, K, Kp);
        else
          __builtin_memset(e + i * Kp, 0, Kp * 4);
      }
      largest = channel_gates();
    } else if constexpr (gate == Gate::scalar) {
      const int64_t first = t * s.kv_heads + head;
      for (int i = 0; i < kChunk; ++i) {
        e[i] = i < n ? load_one(gs, s.gate_dtype, first + i * s.kv_heads) : 0.f;
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

  // qr = scale q and qd = P qr, rows from n on zero
  void queries(const GlaShape& s, const void* q, int64_t t, int n, int64_t head, float* qr, float* qd) const {
    const Vec scale = splat(s.scale);
    for (int i = 0; i < kChunk; ++i) {
      float* row = qr + i * Kp;
      if (i >= n) {
        __builtin_memset(row, 0, Kp * 4);
        __builtin_memset(qd + i * Kp, 0, Kp * 4);
        continue;
      }
      load_row(row, q, s.dtype, ((t + i) * s.heads + head) * s.k, K, Kp);
      for (int64_t c = 0; c < Kp; c += kWidth) {
        const Vec x = load(row + c) * scale;
        store(row + c, x);
        if constexpr (gate == Gate::channel) store(qd + i * Kp + c, x * load(p + i * Kp + c));
        if constexpr (gate == Gate::scalar) store(qd + i * Kp + c, x * splat(p[i]));
      }
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

template <Gate gate>
bool forward(const GlaShape& s, const GlaForward& x) {
  const int64_t pairs = s.sequences * s.kv_heads, group = s.heads / s.kv_heads;
  // With fewer (sequence, head) pairs than threads, columns of v are shared out; they do not depend on each other.
  int64_t width = s.v;
  if (pairs && pairs < s.threads) width = pad16((s.v * pairs + s.threads - 1) / s.threads);
  const int64_t splits = (s.v + width - 1) / width;
  int failed = 0;
  parallel_for(pairs * splits, s.threads, [&](int64_t item) {
    const int64_t pair = item / splits, v0 = item % splits * width, V = v0 + width < s.v ? width : s.v - v0;
    const int64_t sequence = pair / s.kv_heads, head = pair % s.kv_heads, K = s.k;
    Chunk<gate, false> c;
    Arena arena;
    float *state = nullptr, *qr = nullptr, *qd = nullptr, *a = nullptr, *out = nullptr;
    for (int pass = 0; pass < 2; ++pass) {
      if (pass && !arena.allocate()) {
        __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
        return;
      }
      c.layout(arena, K, V);
      state = arena.take(c.Kp * c.Vp), a = arena.take(kChunk * kChunk), out = arena.take(kChunk * c.Vp);
      qr = arena.take(kChunk * c.Kp), qd = gate == Gate::none ? qr : arena.take(kChunk * c.Kp);
    }
    const int64_t Kp = c.Kp, Vp = c.Vp, first = s.bounds[sequence], last = s.bounds[sequence + 1];
    read_state(state, Vp, 1, Kp * Vp, x.initial ? x.initial + pair * K * s.v + v0 : nullptr, s.v, K, V);
    float largest = -__builtin_inff();
    for (int64_t t = first; t < last; t += kChunk) {
      const int n = last - t < kChunk ? int(last - t) : kChunk;
      const float m = c.read(s, x.k, x.v, x.g, t, n, head, v0);
      largest = m > largest ? m : largest;
      transpose(c.kt, c.kd, kChunk, Kp);
      for (int64_t r = 0; r < group; ++r) {
        const int64_t query_head = head * group + r;
        c.queries(s, x.q, t, n, query_head, qr, qd);
        c.scores(a, qr, qd, n);
        for_tiles(kChunk, Vp, [&](auto& tile, int64_t i, int64_t j) __attribute__((always_inline)) {
          tile.zero();
          tile.multiply(Left{qd, Kp, 1}, state + j, Vp, i, 0, K);
          tile.template lower<false>(Left{a, kChunk, 1}, c.v + j, Vp, i);
          tile.write(out + i * Vp + j, Vp);
        });
        for (int i = 0; i < n; ++i)
          store_row(x.o, out + i * Vp, s.dtype, ((t + i) * s.heads + query_head) * s.v + v0, V);
      }
      for_tiles(Kp, Vp, [&](auto& tile, int64_t i, int64_t j) __attribute__((always_inline)) {
        tile.read(state + i * Vp + j, Vp);
        if constexpr (gate != Gate::none) tile.scale_rows(c.decay + i);
        tile.multiply(Left{c.ku, 1, Kp}, c.v + j, Vp, i, 0, n);
        tile.write(state + i * Vp + j, Vp);
      });
    }
    write_state(x.final + pair * K * s.v + v0, s.v, state, Vp, 1, K, V);
    if (largest > s.allowance) __atomic_store_n(x.refused, 1, __ATOMIC_RELAXED);
    free(arena.base);
  });
  return !failed;
}

// Backward works on transposed states [V][K] and their gradients, so that dq and dk read rows of them.
//
// The gate's gradient is dg_t = sum over pairs (i >= t > j) of (i's and j's term), the pairs taken in four kinds: both
// outside the chunk (<S dS> at its ends), i inside (summed from the end back), j inside (summed from the start), both
// inside (row sums minus column sums of the strict triangle). No sum runs past a chunk, and terms that no gate touches
// (i = j) never enter, so that strong gates lose nothing to cancellation.
template <Gate gate>
struct Backward {
  const GlaShape& s;
  const GlaBackward& x;
  Chunk<gate, true> c;
  float *qr, *qs, *d_o, *a, *da, *vt, *kut, *dvt, *dq, *dk, *dv, *raw, *y, *z, *base, *dg, *gradient;
  int64_t head, Kp, Vp;

  void layout(Arena& m) {
    c.layout(m, s.k, s.v);
    Kp = c.Kp, Vp = c.Vp;
    qr = m.take(kChunk * Kp), qs = gate == Gate::none ? qr : m.take(kChunk * Kp), d_o = m.take(kChunk * Vp);
    a = m.take(kChunk * kChunk), da = m.take(kChunk * kChunk);
    vt = m.take(kChunk * Vp), kut = m.take(kChunk * Kp), dvt = m.take(kChunk * Vp);
    dq = m.take(kChunk * Kp), dk = m.take(kChunk * Kp), dv = m.take(kChunk * Vp), raw = m.take(kChunk * Kp);
    const int64_t n = gate == Gate::channel ? Kp : 1;
    y = m.take(kChunk * n), z = m.take(kChunk * n), base = m.take(n), dg = m.take(kChunk * n);
    gradient = m.take(Vp * Kp);
  }

  // state = after this chunk, from = before it
  void advance(float* state, const float* from, int64_t t, int n) {
    c.read(s, x.k, x.v, x.g, t, n, head, 0);
    for_tiles(Vp, Kp, [&](auto& tile, int64_t i, int64_t j) __attribute__((always_inline)) {
      tile.read(from + i * Kp + j, Kp);
      if constexpr (gate != Gate::none) tile.scale_columns(c.decay + j);
      tile.multiply(Left{c.v, 1, Vp}, c.ku + j, Kp, i, 0, n);
      tile.write(state + i * Kp + j, Kp);
    });
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

  void chunk(const float* state, int64_t t, int n) {
    const int64_t group = s.heads / s.kv_heads, width = gate == Gate::channel ? Kp : 1;
    c.read(s, x.k, x.v, x.g, t, n, head, 0);
    transpose(c.kt, c.kd, kChunk, Kp);
    transpose(vt, c.v, kChunk, Vp);
    if constexpr (gate != Gate::none) {
      transpose(kut, c.ku, kChunk, Kp);
      __builtin_memset(y, 0, kChunk * width * 4);
      __builtin_memset(z, 0, kChunk * width * 4);
      outer_gate_gradient(state);
    }
    // through the state at the chunk's end
    product(dk, Kp, kChunk, Kp, Left{c.v, Vp, 1}, gradient, Kp, s.v);
    if constexpr (gate == Gate::channel)
      for (int64_t i = 0; i < kChunk * Kp; i += kWidth) store(dk + i, load(dk + i) * load(c.up + i));
    if constexpr (gate == Gate::scalar)
      for (int i = 0; i < kChunk; ++i)
        for (int64_t j = 0; j < Kp; j += kWidth) store(dk + i * Kp + j, load(dk + i * Kp + j) * splat(c.up[i]));
    if constexpr (gate != Gate::none) reduce(y, [&](int64_t i) { return load(c.k + i) * load(dk + i); });
    product(dvt, kChunk, Vp, kChunk, Left{gradient, Kp, 1}, gate == Gate::none ? c.kt : kut, kChunk, s.k);
    transpose(dv, dvt, Vp, kChunk);

    for (int64_t r = 0; r < group; ++r) query_head(state, t, n, head * group + r, r == 0);

    for (int i = 0; i < n; ++i) {
      const int64_t row = (t + i) * s.kv_heads + head;
      store_row(x.dk, dk + i * Kp, s.dtype, row * s.k, s.k);
      store_row(x.dv, dv + i * Vp, s.dtype, row * s.v, s.v);
    }
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
        dg[i] = c.e[i] == 0.f ? 0.f : dg[i] + after;
      }
    }
    if constexpr (gate != Gate::none)
      for (int i = 0; i < n; ++i) {
        const int64_t row = (t + i) * s.kv_heads + head, size = gate == Gate::channel ? s.k : 1;
        store_row(x.dg, dg + i * width, s.gate_dtype, row * size, size);
      }
  }

  void outer_gate_gradient(const float* state) {
    Vec total = Vec{};
    for (int64_t j = 0; j < Kp; j += kWidth) {
      Vec b = Vec{};
      for (int64_t i = j; i < Vp * Kp; i += Kp) b += load(state + i) * load(gradient + i);
      b *= load(c.decay + j);
      if constexpr (gate == Gate::channel) store(base + j, b);
      total += b;
    }
    if constexpr (gate == Gate::scalar) base[0] = sum(total);
  }

  void query_head(const float* state, int64_t t, int n, int64_t query_head, bool first) {
    c.queries(s, x.q, t, n, query_head, qr, qs);
    for (int i = 0; i < kChunk; ++i) {
      if (i < n)
        load_row(d_o + i * Vp, x.d_o, s.dtype, ((t + i) * s.heads + query_head) * s.v, s.v, Vp);
      else
        __builtin_memset(d_o + i * Vp, 0, Vp * 4);
    }
    c.scores(a, qr, qs, n);
    product(da, kChunk, kChunk, kChunk, Left{d_o, Vp, 1}, vt, kChunk, s.v);
    for_tiles(kChunk, Vp, [&](auto& tile, int64_t i, int64_t j) __attribute__((always_inline)) {
      tile.read(dv + i * Vp + j, Vp);
      tile.template upper<false>(Left{a, 1, kChunk}, d_o + j, Vp, i, kChunk);
      tile.write(dv + i * Vp + j, Vp);
    });
    float diagonal[kChunk], rest[kChunk * kChunk];
    for (int i = 0; i < kChunk; ++i) diagonal[i] = da[i * kChunk + i];
    if (c.cross < kChunk) __builtin_memcpy(rest, da, sizeof rest);
    if constexpr (gate == Gate::scalar)
      for (int i = 0; i < kChunk * kChunk; i += kWidth) store(da + i, load(da + i) * load(c.d + i));
    if constexpr (gate == Gate::channel)
      for (int i = c.cross * kChunk; i < kChunk * kChunk; ++i) da[i] = 0.f;

    // dq without its diagonal term and without scale
    for_tiles(kChunk, Kp, [&](auto& tile, int64_t i, int64_t j) __attribute__((always_inline)) {
      tile.zero();
      tile.multiply(Left{d_o, Vp, 1}, state + j, Kp, i, 0, s.v);
      if constexpr (gate == Gate::scalar) tile.scale_rows(c.p + i);
      tile.template lower<true>(Left{da, kChunk, 1}, c.kd + j, Kp, i);
      tile.write(dq + i * Kp + j, Kp);
    });
    // dk, likewise
    for_tiles(kChunk, Kp, [&](auto& tile, int64_t i, int64_t j) __attribute__((always_inline)) {
      tile.zero();
      tile.template upper<true>(Left{da, 1, kChunk}, (gate == Gate::channel ? qs : qr) + j, Kp, i, kChunk);
      tile.write(raw + i * Kp + j, Kp);
    });
    if constexpr (gate == Gate::channel) {
      for (int64_t i = 0; i < kChunk * Kp; i += kWidth) {
        store(dq + i, load(dq + i) * load(c.p + i));
        store(raw + i, load(raw + i) * load(c.inverse + i));
      }
      for (int i = c.cross; i < n; ++i) {
        c.advance(i);
        for (int j = 0; j < i; ++j) {
          const Vec w = splat(rest[i * kChunk + j]);
          for (int64_t at = 0; at < Kp; at += kWidth) {
            const Vec u = w * load(c.d + j * Kp + at);
            store(dq + i * Kp + at, load(dq + i * Kp + at) + u * load(c.k + j * Kp + at));
            store(raw + j * Kp + at, load(raw + j * Kp + at) + u * load(qr + i * Kp + at));
          }
        }
      }
    }
    if constexpr (gate != Gate::none)
      reduce(z, [&](int64_t i) { return load(qr + i) * load(dq + i) - load(c.k + i) * load(raw + i); });
    const Vec scale = splat(s.scale);
    for (int i = 0; i < kChunk; ++i) {
      const Vec w = splat(diagonal[i]);
      for (int64_t at = i * Kp; at < (i + 1) * Kp; at += kWidth) {
        store(dq + at, (load(dq + at) + w * load(c.k + at)) * scale);
        store(dk + at, load(dk + at) + load(raw + at) + w * load(qr + at));
      }
      if (i < n) store_row(x.dq, dq + i * Kp, s.dtype, ((t + i) * s.heads + query_head) * s.k, s.k);
    }
    for_tiles(Vp, Kp, [&](auto& tile, int64_t i, int64_t j) __attribute__((always_inline)) {
      tile.read(gradient + i * Kp + j, Kp);
      if constexpr (gate != Gate::none)
        if (first) tile.scale_columns(c.decay + j);
      tile.multiply(Left{d_o, 1, Vp}, qs + j, Kp, i, 0, n);
      tile.write(gradient + i * Kp + j, Kp);
    });
  }
};

template <Gate gate>
bool backward(const GlaShape& s, const GlaBackward& x) {
  int failed = 0;
  parallel_for(s.sequences * s.kv_heads, s.threads, [&](int64_t pair) {
    const int64_t first = s.bounds[pair / s.kv_heads], last = s.bounds[pair / s.kv_heads + 1], K = s.k, V = s.v;
    const int64_t chunks = (last - first + kChunk - 1) / kChunk, size = pad16(K) * pad16(V);
    // States at the start of each chunk are kept for one segment of chunks, and for the start of every segment.
    int64_t length = chunks > 0 ? chunks : 1;
    if (length * size > kSingleSegment) length = kSegment / size > 16 ? kSegment / size : 16;
    const int64_t segments = (chunks + length - 1) / length;
    Backward<gate> b{s, x};
    b.head = pair % s.kv_heads;
    Arena arena;
    float *starts = nullptr, *states = nullptr;
    for (int pass = 0; pass < 2; ++pass) {
      if (pass && !arena.allocate()) {
        __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
        return;
      }
      b.layout(arena);
      starts = arena.take((segments > 0 ? segments : 1) * size), states = arena.take(length * size);
    }
    const auto tokens = [&](int64_t chunk) {
      const int64_t left = last - first - chunk * kChunk;
      return left < kChunk ? int(left) : kChunk;
    };
    const int64_t at = pair * K * V;
    read_state(starts, 1, b.Kp, size, x.initial ? x.initial + at : nullptr, V, K, V);
    read_state(b.gradient, 1, b.Kp, size, x.d_final + at, V, K, V);
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
      for (int64_t j = to - 1; j >= from; --j) b.chunk(states + (j - from) * size, first + j * kChunk, tokens(j));
    }
    if (x.d_initial) write_state(x.d_initial + at, V, b.gradient, 1, b.Kp, K, V);
    free(arena.base);
  });
  return !failed;
}

// N vectors of columns of the state: S = diag(exp g) S + k v^T if Update, then o = S^T q, the state touched once.
template <int N, bool Update>
ICRL_INLINE void step_columns(float* state, int64_t ld, int64_t K, const float* k, const float* e, const float* v,
                              const float* q, float* out) {
  Vec o[N], x[N];
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) o[n] = Vec{}, x[n] = load(v + n * kWidth);
  for (int64_t i = 0; i < K; ++i)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      float* at = state + i * ld + n * kWidth;
      Vec y = load(at);
      if (Update) store(at, y = y * splat(e[i]) + splat(k[i]) * x[n]);
      o[n] += y * splat(q[i]);
    }
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) store(out + n * kWidth, o[n]);
}

template <bool Update>
void step_head(float* state, int64_t K, int64_t V, const float* k, const float* e, const float* v, const float* q,
               float* out, float* tail) {
  int64_t j = 0;
  for (; j + 4 * kWidth <= V; j += 4 * kWidth) step_columns<4, Update>(state + j, V, K, k, e, v + j, q, out + j);
  for (; j + kWidth <= V; j += kWidth) step_columns<1, Update>(state + j, V, K, k, e, v + j, q, out + j);
  if (j == V) return;
  for (int64_t i = 0; i < K; ++i)
    for (int64_t c = 0; c < kWidth; ++c) tail[i * kWidth + c] = j + c < V ? state[i * V + j + c] : 0.f;
  step_columns<1, Update>(tail, kWidth, K, k, e, v + j, q, out + j);
  if (Update)
    for (int64_t i = 0; i < K; ++i)
      for (int64_t c = 0; j + c < V; ++c) state[i * V + j + c] = tail[i * kWidth + c];
}

}  // namespace

#define ICRL_BY_GATE(f)                                        \
  (s.gate == Gate::none     ? f<Gate::none>(s, p)              \
   : s.gate == Gate::scalar ? f<Gate::scalar>(s, p)            \
                            : f<Gate::channel>(s, p))

bool gla_forward(const GlaShape& s, const GlaForward& p) { return ICRL_BY_GATE(forward); }
bool gla_backward(const GlaShape& s, const GlaBackward& p) { return ICRL_BY_GATE(backward); }

bool gla_step(const GlaShape& s, const GlaStep& p) {
  constexpr int64_t kMost = 256;  // the Python side refuses larger heads
  const int64_t pairs = s.sequences * s.kv_heads, group = s.heads / s.kv_heads, K = s.k, V = s.v;
  const int threads = pairs * K * V >= 1 << 17 ? s.threads : 1;
  int refused = 0;
  parallel_for(pairs, threads, [&](int64_t pair) {
    alignas(64) float q[kMost], k[kMost], v[kMost], e[kMost], out[kMost], tail[kMost * kWidth];
    load_row(k, p.k, s.dtype, pair * K, K, pad16(K));
    load_row(v, p.v, s.dtype, pair * V, V, pad16(V));
    const int64_t n = s.gate == Gate::channel ? K : s.gate == Gate::scalar ? 1 : 0;
    load_row(e, p.g, s.gate_dtype, pair * n, n, pad16(n));
    for (int64_t i = 0; i < n; ++i)
      if (e[i] > s.allowance) __atomic_store_n(&refused, 1, __ATOMIC_RELAXED);
    for (int64_t i = 0; i < n; i += kWidth) store(e + i, vexp(load(e + i)));
    for (int64_t i = n; i < K; ++i) e[i] = n ? e[0] : 1.f;
    for (int64_t r = 0; r < group; ++r) {
      load_row(q, p.q, s.dtype, (pair * group + r) * K, K, pad16(K));
      for (int64_t i = 0; i < K; i += kWidth) store(q + i, load(q + i) * splat(s.scale));
      float* state = p.state + pair * K * V;
      if (r == 0)
        step_head<true>(state, K, V, k, e, v, q, out, tail);
      else
        step_head<false>(state, K, V, k, e, v, q, out, tail);
      store_row(p.o, out, s.dtype, (pair * group + r) * V, V);
    }
  });
  return !refused;
}
