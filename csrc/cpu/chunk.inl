// A chunk of 16 tokens with decays, everything of it in L1: what the gated linear attentions share.
//
// With P_i the product of exp g over the chunk's tokens up to i, a query i reads (P_i / P_j) q_i . k_j of token j <= i.
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

// n rows of `size` numbers to [16][padded] floats, zeros in the rest
ICRL_INLINE void load_rows(float* to, const Rows& r, int n, int64_t size, int64_t padded) {
  for (int i = 0; i < n; ++i) load_row(to + i * padded, r.from, r.dtype, r.at + i * r.stride, size, padded);
  __builtin_memset(to + n * padded, 0, (kChunk - n) * padded * 4);
}
ICRL_INLINE void store_rows(void* to, const float* from, int dtype, int64_t at, int64_t stride, int n, int64_t size,
                            int64_t padded) {
  for (int i = 0; i < n; ++i) store_row(to, from + i * padded, dtype, at + i * stride, size);
}

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

  // With n tokens' keys in k, takes their gates; returns the largest.
  float gates(const Rows& g, int n) {
    float largest = -__builtin_inff();
    if constexpr (gate == Gate::channel) {
      load_rows(e, g, n, K, Kp);
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

// One token: f.columns<N>(state, ld, at) does N vectors of columns of the state from column `at` on, in place. The last
// V % kWidth go through `tail`, [K][kWidth].
template <class F>
ICRL_INLINE void for_columns(float* state, int64_t K, int64_t V, float* tail, const F& f) {
  int64_t j = 0;
  for (; j + 4 * kWidth <= V; j += 4 * kWidth) f.template columns<4>(state + j, V, j);
  for (; j + kWidth <= V; j += kWidth) f.template columns<1>(state + j, V, j);
  if (j == V) return;
  for (int64_t i = 0; i < K; ++i)
    for (int64_t c = 0; c < kWidth; ++c) tail[i * kWidth + c] = j + c < V ? state[i * V + j + c] : 0.f;
  f.template columns<1>(tail, kWidth, j);
  for (int64_t i = 0; i < K; ++i)
    for (int64_t c = 0; j + c < V; ++c) state[i * V + j + c] = tail[i * kWidth + c];
}

// Gradients of a chunk. States and their gradients are transposed, [V][K], so that dq and dk read rows of them.
//
// The gate's gradient is dg_t = sum over pairs (i >= t > j) of (i's and j's term), the pairs taken in four kinds: both
// outside the chunk (<S dS> at its ends), i inside (summed from the end back), j inside (summed from the start), both
// inside (row sums minus column sums of the strict triangle). No sum runs past a chunk, and terms that no gate touches
// (i = j) never enter, so that strong gates lose nothing to cancellation.
template <Gate gate>
struct ChunkGradient {
  Chunk<gate, true> c;
  float *a, *da, *value_t, *kut, *dvalue_t, *dq, *dk, *dvalue, *raw, *y, *z, *base, *dg;
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
    gradient = m.take(Vp * Kp);
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

  // dvalue += what queries with these scores and gradients of their outputs give
  void scores_gradient(const float* scores, const float* d_o) {
    for_tiles(kChunk, Vp, [&](auto& tile, int64_t i, int64_t j) __attribute__((always_inline)) {
      tile.read(dvalue + i * Vp + j, Vp);
      tile.template upper<false>(Left{scores, 1, kChunk}, d_o + j, Vp, i, kChunk);
      tile.write(dvalue + i * Vp + j, Vp);
    });
  }

  // From the gradients of what queries read: dq (for q = qr / scale), and their parts of dk, z and the state's
  // gradient, which decays with the `first` queries of a chunk. Strict: they read earlier tokens only.
  template <bool Strict>
  void queries_gradient(const float* state, const float* qr, const float* qs, const float* d_o, float scale, int n,
                        bool first) {
    product(da, kChunk, kChunk, kChunk, Left{d_o, Vp, 1}, value_t, kChunk, V);
    float diagonal[kChunk], rest[kChunk * kChunk];
    for (int i = 0; i < kChunk; ++i) diagonal[i] = Strict ? 0.f : da[i * kChunk + i];
    if (c.cross < kChunk) __builtin_memcpy(rest, da, sizeof rest);
    if constexpr (gate == Gate::scalar)
      for (int i = 0; i < kChunk * kChunk; i += kWidth) store(da + i, load(da + i) * load(c.d + i));
    if constexpr (gate == Gate::channel)
      for (int i = c.cross * kChunk; i < kChunk * kChunk; ++i) da[i] = 0.f;

    // dq without its diagonal term and without scale
    for_tiles(kChunk, Kp, [&](auto& tile, int64_t i, int64_t j) __attribute__((always_inline)) {
      tile.zero();
      tile.multiply(Left{d_o, Vp, 1}, state + j, Kp, i, 0, V);
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
        for (int i = 0; i < kChunk; ++i) {
      const Vec w = splat(diagonal[i]);
      for (int64_t at = i * Kp; at < (i + 1) * Kp; at += kWidth) {
        if constexpr (Strict) {
          store(dq + at, load(dq + at) * splat(scale));
          store(dk + at, load(dk + at) + load(raw + at));
        } else {
          store(dq + at, (load(dq + at) + w * load(c.k + at)) * splat(scale));
          store(dk + at, load(dk + at) + load(raw + at) + w * load(qr + at));
        }
      }
    }
    for_tiles(Vp, Kp, [&](auto& tile, int64_t i, int64_t j) __attribute__((always_inline)) {
      tile.read(gradient + i * Kp + j, Kp);
      if constexpr (gate != Gate::none)
        if (first) tile.scale_columns(c.decay + j);
      tile.multiply(Left{d_o, 1, Vp}, qs + j, Kp, i, 0, n);
      tile.write(gradient + i * Kp + j, Kp);
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
        dg[i] = c.e[i] == 0.f ? 0.f : dg[i] + after;
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
      for (int64_t i = j; i < Vp * Kp; i += Kp) b += load(state + i) * load(gradient + i);
      b *= load(c.decay + j);
      if constexpr (gate == Gate::channel) store(base + j, b);
      total += b;
    }
    if constexpr (gate == Gate::scalar) base[0] = sum(total);
  }
};

// Gradients of one sequence: b.advance takes a state over a chunk, b.chunk takes b.m.gradient back over it. States are
// kept at the start of each chunk of one segment, and at the start of every segment. False when memory ran out.
template <class B>
bool backward_sequence(B& b, int64_t first, int64_t last, int64_t K, int64_t V, const float* initial,
                       const float* d_final, float* d_initial) {
  const int64_t chunks = (last - first + kChunk - 1) / kChunk, Kp = pad16(K), size = Kp * pad16(V);
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
  float* gradient = b.m.gradient;
  read_state(starts, 1, Kp, size, initial, V, K, V);
  read_state(gradient, 1, Kp, size, d_final, V, K, V);
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
      b.chunk(states + (j - from) * size, first + j * kChunk, left < kChunk ? int(left) : kChunk);
    }
  }
  if (d_initial) write_state(d_initial, V, gradient, 1, Kp, K, V);
  free(arena.base);
  return true;
}

}  // namespace

#define ICRL_BY_GATE(f)                                        \
  (s.gate == Gate::none     ? f<Gate::none>(s, p)              \
   : s.gate == Gate::scalar ? f<Gate::scalar>(s, p)            \
                            : f<Gate::channel>(s, p))
