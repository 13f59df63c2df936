// Ops that any model has: linear layers, norms, gated units, copies from and to the user's tensors.
//
//   x, y       rows of an op's `in` and `out`, ldx and ldy floats apart;  z: of `side`, one a context, for all its rows
//   w          packed weights of a linear [outputs, inputs]: panels of 64 outputs, each [inputs][64]; of the last panel
//              as many columns as are left of the outputs, padded to 16 with zeros
//   K, N       inputs and padded outputs of a linear
//   c          of a tile: MR rows of NR vectors of y, in registers
//
// Every number of y is one chain of multiply-adds over k, from the bias on: its bits depend neither on the tile nor on
// the rows beside it, so that a context's are the same in any batch, group and number of threads.
#pragma once

#include "fused/rows.inl"

namespace icrl::ICRL_ISA {
namespace {

constexpr int64_t kPanel = 64;

#if defined(__AVX512F__)
constexpr int kRows = 6, kVectors = 4, kRowVectors = 4;
#elif defined(__AVX2__)
constexpr int kRows = 6, kVectors = 2, kRowVectors = 8;
#else
constexpr int kRows = 4, kVectors = 2, kRowVectors = 8;
#endif  // kVectors of a tile of several rows, kRowVectors of one row

struct Linear {
  const float *x, *w, *bias;
  float* y;
  int64_t ldx, ldy, rows, K, N;
  bool add;

  // y[m.., n..] of MR rows and NR vectors; weights from `panel` on, ldw apart
  template <int MR, int NR>
  ICRL_INLINE void tile(int64_t m, int64_t n, const float* panel, int64_t ldw) const {
    Vec c[MR][NR];
#pragma GCC unroll 8
    for (int j = 0; j < NR; ++j) {
      const Vec b = bias ? load(bias + n + j * kWidth) : Vec{};
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) c[i][j] = b;
    }
    const float* from = x + m * ldx;
    for (int64_t k = 0; k < K; ++k) {
      Vec b[NR];
#pragma GCC unroll 8
      for (int j = 0; j < NR; ++j) b[j] = load(panel + k * ldw + j * kWidth);
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) {
        const Vec a = splat(from[i * ldx + k]);
#pragma GCC unroll 8
        for (int j = 0; j < NR; ++j) c[i][j] += a * b[j];
      }
    }
    float* to = y + m * ldy + n;
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < NR; ++j) {
        float* at = to + i * ldy + j * kWidth;
        store(at, add ? load(at) + c[i][j] : c[i][j]);
      }
  }

  // all rows of NR vectors of columns, kRows at a time
  template <int NR>
  ICRL_INLINE void down(int64_t n, const float* panel, int64_t ldw) const {
    int64_t m = 0;
    for (; m + kRows <= rows; m += kRows) tile<kRows, NR>(m, n, panel, ldw);
    switch (rows - m) {
      case 1: tile<1, NR>(m, n, panel, ldw); break;
      case 2: tile<2, NR>(m, n, panel, ldw); break;
      case 3: tile<3, NR>(m, n, panel, ldw); break;
      case 4: tile<4 < kRows ? 4 : 1, NR>(m, n, panel, ldw); break;
      case 5: tile<5 < kRows ? 5 : 1, NR>(m, n, panel, ldw); break;
      default: break;
    }
  }

  template <int NR>
  ICRL_INLINE void across(int64_t n0, int64_t width, const float* panel) const {
    int64_t n = 0;
    for (; n + NR * kWidth <= width; n += NR * kWidth)
      rows == 1 ? tile<1, NR>(0, n0 + n, panel + n, width) : down<NR>(n0 + n, panel + n, width);
    if constexpr (NR > 1)
      if (n < width) rest<NR - 1>(n0 + n, width - n, panel + n, width);
  }
  // fewer vectors than NR + 1 are left
  template <int NR>
  ICRL_INLINE void rest(int64_t n, int64_t left, const float* panel, int64_t ldw) const {
    if (left == NR * kWidth)
      rows == 1 ? tile<1, NR>(0, n, panel, ldw) : down<NR>(n, panel, ldw);
    else if constexpr (NR > 1)
      rest<NR - 1>(n, left, panel, ldw);
  }

  void run() const {
    const float* panel = w;
    for (int64_t n = 0; n < N; n += kPanel) {
      const int64_t width = N - n < kPanel ? N - n : kPanel;
      rows == 1 ? across<kRowVectors>(n, width, panel) : across<kVectors>(n, width, panel);
      panel += K * width;
    }
  }
};

// y = x w^T + bias, or y + that. sizes: inputs, outputs, whether to add; weights: packed, bias.
const char* check_linear(const FusedPlan& p, const FusedOp& o) {
  const int64_t K = o.sizes[0], N = padded(o.sizes[1]);
  if (!given(o.in) || !given(o.out)) return "wants an input and an output";
  if (K < 1 || o.sizes[1] < 1 || K > INT32_MAX || N > INT32_MAX) return "wants sizes of at least 1";
  if (o.in.width != K) return "wants as many columns of input as it has inputs";
  if (o.out.width != o.sizes[1]) return "wants as many columns of output as it has outputs";
  if (o.out.column + N > buffer(p, o.out).stride) return "writes whole sixteens: wants room for them in the output";
  if (rows_of(p, o.in) != rows_of(p, o.out)) return "wants as many rows of output as of input";
  if (!apart(o.in, FusedView{o.out.buffer, o.out.column, static_cast<int32_t>(N)}))
    return "wants an output apart from its input";
  if (!has_weights(p, o, 0, K * N) || (o.weights[1] >= 0 && !has_weights(p, o, 1, N)))
    return "wants its weights within the packed ones";
  return nullptr;
}
void linear(const FusedGroup& g, const FusedOp& o) {
  Linear{first_row(g, o.in), weights(g, o, 0), weights(g, o, 1), first_row(g, o.out), stride(g, o.in),
         stride(g, o.out),   rows(g, o.in),    o.sizes[0],       padded(o.sizes[1]),  o.sizes[2] != 0}
      .run();
}

// ---- row by row

const char* same_rows(const FusedPlan& p, const FusedOp& o) {
  if (!given(o.in) || !given(o.out)) return "wants an input and an output";
  if (rows_of(p, o.in) != rows_of(p, o.out)) return "wants as many rows of output as of input";
  return nullptr;
}
const char* same_shape(const FusedPlan& p, const FusedOp& o) {
  if (const char* wrong = same_rows(p, o)) return wrong;
  if (o.in.width != o.out.width) return "wants as many columns of output as of input";
  return same(o.in, o.out) || apart(o.in, o.out) ? nullptr
                                                 : "wants an output apart from its input, or the input itself";
}

// y = x / sqrt(mean x^2 + numbers[0])
void rms_norm(const FusedGroup& g, const FusedOp& o) {
  const int64_t n = o.in.width, ldx = stride(g, o.in), ldy = stride(g, o.out), all = rows(g, o.in);
  const float *x = first_row(g, o.in), *end = x + all * ldx;
  for (float* y = first_row(g, o.out); x < end; x += ldx, y += ldy) {
    Vec squares = Vec{};
    for_vectors(n, [&](int64_t j, auto part) {
      const Vec v = part.load(x + j);
      squares += v * v;
    });
    const float scale = 1.f / std::sqrt(sum(squares) / static_cast<float>(n) + o.numbers[0]);
    for_vectors(n, [&](int64_t j, auto part) { part.store(y + j, part.load(x + j) * scale); });
  }
}

// y = (x - mean x) / sqrt(var x + numbers[0])
void layer_norm(const FusedGroup& g, const FusedOp& o) {
  const int64_t n = o.in.width, ldx = stride(g, o.in), ldy = stride(g, o.out), all = rows(g, o.in);
  const float *x = first_row(g, o.in), *end = x + all * ldx;
  for (float* y = first_row(g, o.out); x < end; x += ldx, y += ldy) {
    Vec total = Vec{}, squares = Vec{};
    for_vectors(n, [&](int64_t j, auto part) { total += part.load(x + j); });
    const float mean = sum(total) / static_cast<float>(n);
    for_vectors(n, [&](int64_t j, auto part) {
      const Vec v = part.keep(part.load(x + j) - mean);
      squares += v * v;
    });
    const float scale = 1.f / std::sqrt(sum(squares) / static_cast<float>(n) + o.numbers[0]);
    for_vectors(n, [&](int64_t j, auto part) { part.store(y + j, (part.load(x + j) - mean) * scale); });
  }
}

// y = silu(a) b with (a, b) = x, or x + z: the halves of its columns
const char* check_gated(const FusedPlan& p, const FusedOp& o) {
  if (const char* wrong = same_rows(p, o)) return wrong;
  if (o.in.width != 2 * o.out.width) return "wants twice as many columns of input as of output";
  if (!apart(o.in, o.out)) return "wants an output apart from its input";
  if (given(o.side) && (o.side.width != o.in.width || rows_of(p, o.side) != 1))
    return "wants one row a context at its side, as wide as the input";
  return nullptr;
}
void gated(const FusedGroup& g, const FusedOp& o) {
  const int64_t n = o.out.width, each = buffer(g.plan, o.in).rows, ldx = stride(g, o.in), ldy = stride(g, o.out);
  for (int64_t c = 0; c < g.contexts; ++c) {
    const float *x = context_rows(g, o.in, c), *z = given(o.side) ? context_rows(g, o.side, c) : nullptr;
    float* y = context_rows(g, o.out, c);
    for (int64_t r = 0; r < each; ++r, x += ldx, y += ldy)
      for_vectors(n, [&](int64_t j, auto part) {
        Vec a = part.load(x + j), b = part.load(x + n + j);
        if (z) a += part.load(z + j), b += part.load(z + n + j);
        part.store(y + j, silu(a) * b);
      });
  }
}

// y = gelu(x), by its approximation with tanh
void gelu_tanh(const FusedGroup& g, const FusedOp& o) {
  const int64_t n = o.in.width, ldx = stride(g, o.in), ldy = stride(g, o.out), all = rows(g, o.in);
  const float *x = first_row(g, o.in), *end = x + all * ldx;
  for (float* y = first_row(g, o.out); x < end; x += ldx, y += ldy)
    for_vectors(n, [&](int64_t j, auto part) {
      const Vec v = part.load(x + j);
      part.store(y + j, .5f * v * (1.f + vtanh(.7978845608f * (v + .044715f * v * v * v))));
    });
}

// ---- maps

void copy_map(const FusedGroup& g, const FusedOp& o) {
  map(g, o, [](int64_t, auto, Vec x) { return x; });
}
void silu_map(const FusedGroup& g, const FusedOp& o) {
  map(g, o, [](int64_t, auto, Vec x) { return silu(x); });
}
void relu_map(const FusedGroup& g, const FusedOp& o) {
  map(g, o, [](int64_t, auto, Vec x) { return vmax(Vec{}, x); });
}
void tanh_map(const FusedGroup& g, const FusedOp& o) {
  map(g, o, [](int64_t, auto, Vec x) { return vtanh(x); });
}
void elu_plus_one(const FusedGroup& g, const FusedOp& o) {
  map(g, o, [](int64_t, auto, Vec x) { return x > 0.f ? x + 1.f : vexp(x); });
}
// y = numbers[0] sigmoid(x)
void sigmoid_map(const FusedGroup& g, const FusedOp& o) {
  map(g, o, [&](int64_t, auto, Vec x) { return o.numbers[0] * sigmoid(x); });
}
void multiply(const FusedGroup& g, const FusedOp& o) {
  map2(g, o, [](int64_t, auto, Vec x, Vec z) { return x * z; });
}

// y = x w + b. weights: w, b or none
const char* check_affine(const FusedPlan& p, const FusedOp& o) {
  if (const char* wrong = check_map(p, o)) return wrong;
  const int64_t n = o.in.width;
  return has_weights(p, o, 0, n) && (o.weights[1] < 0 || has_weights(p, o, 1, n)) ? nullptr : "wants a weight a column";
}
void affine(const FusedGroup& g, const FusedOp& o) {
  const float *w = weights(g, o, 0), *b = weights(g, o, 1);
  map(g, o, [&](int64_t j, auto part, Vec x) {
    const Vec y = x * part.load(w + j);
    return b ? y + part.load(b + j) : y;
  });
}

// y = x + (z - x) t. more: t
const char* check_lerp(const FusedPlan& p, const FusedOp& o) {
  if (const char* wrong = check_map2(p, o)) return wrong;
  return as_wide(p, o.more[0], rows_of(p, o.in), o.in.width) && same_or_apart(o.more[0], o.out)
             ? nullptr
             : "wants rows of the input's shape";
}
void lerp(const FusedGroup& g, const FusedOp& o) {
  const int64_t n = o.in.width, all = rows(g, o.in);
  for (int64_t r = 0; r < all; ++r) {
    const float* x = first_row(g, o.in) + r * stride(g, o.in);
    const float* z = first_row(g, o.side) + r * stride(g, o.side);
    const float* t = first_row(g, o.more[0]) + r * stride(g, o.more[0]);
    float* y = first_row(g, o.out) + r * stride(g, o.out);
    for_vectors(n, [&](int64_t j, auto part) {
      const Vec a = part.load(x + j);
      part.store(y + j, a + (part.load(z + j) - a) * part.load(t + j));
    });
  }
}

// ---- from and to the user's float32 tensors [batch, rows, width]

const char* check_read(const FusedPlan& p, const FusedOp& o) {
  if (!given(o.out)) return "wants an output";
  return has_tensor(p, o, 0, 4 * rows_of(p, o.out) * o.out.width) ? nullptr
                                                                  : "wants a float32 tensor of the output's shape";
}
void read(const FusedGroup& g, const FusedOp& o) {
  const int64_t n = o.out.width, each = buffer(g.plan, o.out).rows, ldy = stride(g, o.out);
  for (int64_t c = 0; c < g.contexts; ++c) {
    const float* x = context_tensor<const float>(g, o, 0, c);
    float* y = context_rows(g, o.out, c);
    for (int64_t r = 0; r < each; ++r) std::memcpy(y + r * ldy, x + r * n, static_cast<size_t>(4 * n));
  }
}
const char* check_write(const FusedPlan& p, const FusedOp& o) {
  if (!given(o.in)) return "wants an input";
  return has_tensor(p, o, 0, 4 * rows_of(p, o.in) * o.in.width) ? nullptr
                                                                : "wants a float32 tensor of the input's shape";
}
void write(const FusedGroup& g, const FusedOp& o) {
  const int64_t n = o.in.width, each = buffer(g.plan, o.in).rows, ldx = stride(g, o.in);
  for (int64_t c = 0; c < g.contexts; ++c) {
    const float* x = context_rows(g, o.in, c);
    float* y = context_tensor<float>(g, o, 0, c);
    for (int64_t r = 0; r < each; ++r) std::memcpy(y + r * n, x + r * ldx, static_cast<size_t>(4 * n));
  }
}

}  // namespace

const FusedKind* fused_layers() {
  static constexpr FusedKind kinds[] = {
      {"linear", check_linear, linear},
      {"rms_norm", same_shape, rms_norm},
      {"layer_norm", same_shape, layer_norm},
      {"gated", check_gated, gated},
      {"gelu_tanh", same_shape, gelu_tanh},
      {"copy", check_map, copy_map},
      {"silu", check_map, silu_map},
      {"relu", check_map, relu_map},
      {"tanh", check_map, tanh_map},
      {"elu_plus_one", check_map, elu_plus_one},
      {"sigmoid", check_map, sigmoid_map},
      {"multiply", check_map2, multiply},
      {"affine", check_affine, affine},
      {"lerp", check_lerp, lerp},
      {"read", check_read, read},
      {"write", check_write, write},
      {nullptr, nullptr, nullptr},
  };
  return kinds;
}

}  // namespace icrl::ICRL_ISA
