// An AnyMDP task while it is sampled, and its values: policy iteration by block LU.
//
//   ns, na            states and actions; s a state, a an action, i = s * na + a a row
//   nb, width         blocks of eight states; length of a vector over states, one block more
//   T(s, a, s')       row i: the blocks [begin[i], end[i]) of eight states, float32, from rows + offset[i] on
//   r(s, a, s')       fixed(s, a) + gain(s'), [ns * na] and [width]
//   row_sum, rbar, q  [ns * na] a row's mass, its expected reward, its value
//   cost, cost_noise  [ns * na] an action's part of the reward, and its standard deviation
//   v, rhs            [width] values, right-hand side
//   pot, pos, pos_noise, bonus   [width] parts of the reward by state: potential, position and its standard deviation,
//                     what is added at terminal states
//   policy, is_end    [width] int64: the policy's actions; 1 for terminal states
//   from, to          [width] int64: the first block of a state's rows, and the one after the last
//   ahead             [width] int64: the state before which a state's rows must not end
//   tiles             [8, 8] each: factors of I - gamma P, block row j in columns low[j] to high[j] from tile[j] on
//   inverse           [nb, 8, 8] the inverses of the diagonal tiles
//   mean              [ns, width] rows of the random policy;  bell, center: [na, width], [na] of one state's actions
//   chain, source     [entries, 8], [entries] the policy's chain by columns: block j's entries from column[j] on
//   visits, moved     [3, width] where the policy is after k steps from each start, and after one more
//   stable            [width] where it is in the end
// Numbers are doubles where nothing else is said.
#pragma once

#include <math.h>

#include <cstdint>

#include "common/tiles.inl"
#include "tabular/anymdp.h"
#include "tabular/anymdp_random.inl"

namespace icrl::ICRL_ISA {
namespace {

constexpr int64_t kBlock = 8;

template <class T>
struct Blocks {  // [begin, end) of eight entries each, of a row that is zero elsewhere
  const T* p;
  int64_t begin, end;
};

struct TaskValues {
  const AnymdpTask& out;
  const int64_t ns, na, nb, width;  // nb blocks of eight states; every vector has one block more
  double* at;                       // the rest of the scratch

  double* take(int64_t n) {
    double* p = at;
    at += (n + 7) / 8 * 8;
    return p;
  }
  int64_t* take_int(int64_t n) { return reinterpret_cast<int64_t*>(take(n)); }

  // Transition row i = s·na + a is the blocks [begin[i], end[i]), packed at rows + offset[i].
  float* rows;
  int64_t *begin, *end, *offset;
  double *rbar, *fixed, *row_sum, *cost, *cost_noise, *q;
  // I − γP as tiles: block row i from block low[i] to high[i]; multipliers left of the diagonal, U right of it.
  double *tiles, *inverse;
  int64_t *low, *high, *tile;
  double *mean, *chain, *bell, *center;
  double *v, *rhs, *gain, *weight, *total, *pot, *pos, *pos_noise, *bonus, *visits, *moved, *stable;
  int64_t *from, *to, *policy, *is_end, *ahead, *source, *column, *filled;
  double start[3];
  bool goal;

  explicit TaskValues(const AnymdpTask& task)
      : out(task), ns(task.ns), na(task.na), nb((ns + 7) / 8), width(8 * nb + 8), at(task.scratch) {
    rows = reinterpret_cast<float*>(take(ns * na * nb * 4 + 8));  // a row's last part is read as a block
    tiles = take(nb * nb * 64), inverse = take(nb * 64), chain = take(ns * nb * 8), source = take_int(ns * nb);
    mean = take(ns * width), bell = take(na * width), center = take(na);
    const int64_t n = ns * na + 8;  // blocks of rows may reach past the last
    rbar = take(n), fixed = take(n), row_sum = take(n), cost = take(n), cost_noise = take(n), q = take(n);
    begin = take_int(n), end = take_int(n), offset = take_int(n);
    v = take(width), rhs = take(width), gain = take(width), weight = take(width), total = take(width);
    pot = take(width), pos = take(width), pos_noise = take(width), bonus = take(width), stable = take(width);
    visits = take(3 * width), moved = take(3 * width);
    from = take_int(width), to = take_int(width), policy = take_int(width), is_end = take_int(width);
    ahead = take_int(width), low = take_int(width), high = take_int(width), tile = take_int(width),
    column = take_int(width), filled = take_int(width);
    for (int64_t j = 0; j < width; ++j) v[j] = gain[j] = rhs[j] = 0;
  }

  Blocks<float> row(int64_t i) const { return {rows + offset[i], begin[i], end[i]}; }
  Blocks<float> chosen(int64_t s) const { return row(s * na + policy[s]); }

  // y = scale·(row · x) + base·factor for every row, with factor 1 where it is null
  void apply_rows(double scale, const double* x, const double* base, const double* factor, double* y) const {
    for (int64_t i = 0; i < ns * na; i += kBlock) {
      Eight acc[8];
      clear(acc);
      const int64_t count = smaller(kBlock, ns * na - i);
      for (int64_t r = 0; r < count; ++r) {
        const Blocks<float> row_r = row(i + r);
        const double* at_x = x + row_r.begin * kBlock;
        Eight sum = eight_of(0);
        for (int64_t j = 0; j < (row_r.end - row_r.begin) * kBlock; j += kBlock)
          sum += eight(row_r.p + j) * eight(at_x + j);
        acc[r] = sum;
      }
      const Eight from_base = factor ? eight(base + i) * eight(factor + i) : eight(base + i);
      store(y + i, scale * row_sums(acc) + from_base);
    }
  }

  // r̄(s,a) = Σ T(s,a,s')·(fixed(s,a) + gain(s'))
  void expect_rewards() {
    for (int64_t s = 0; s < ns; ++s) gain[s] = pos[s] - pot[s] + bonus[s];
    apply_rows(1.0, gain, fixed, row_sum, rbar);
  }
  void back_up(double gamma) { apply_rows(gamma, v, rbar, nullptr, q); }  // q from v

  // I − γP = LU by tiles within the envelope of the rows, from block row `begin_at` on. Strictly diagonally dominant
  // by rows: no pivoting.
  template <class RowOf>
  void factor(double gamma, int64_t begin_at, const RowOf& row_of) {
    if (begin_at == 0) tile[0] = 0;
    for (int64_t i = begin_at; i < nb; ++i) {
      const int64_t count = smaller(kBlock, ns - i * kBlock);
      int64_t l = i, h = i;
      for (int64_t r = 0; r < count; ++r) {
        const auto p = row_of(i * kBlock + r);
        if (p.begin < p.end) l = smaller(l, p.begin), h = larger(h, p.end - 1);
      }
      for (int64_t k = l; k < i; ++k) h = larger(h, high[k]);
      low[i] = l, high[i] = h, tile[i + 1] = tile[i] + (h - l + 1) * 64;
      double* own = tiles + tile[i];
      for (int64_t x = 0; x < (h - l + 1) * 64; x += kBlock) store(own + x, eight_of(0));
      for (int64_t r = 0; r < count; ++r) {
        const auto p = row_of(i * kBlock + r);
        for (int64_t j = p.begin; j < p.end; ++j)
          store(own + (j - l) * 64 + r * 8, -gamma * eight(p.p + (j - p.begin) * kBlock));
      }
      for (int64_t r = 0; r < kBlock; ++r) own[(i - l) * 64 + r * 9] += 1.0;
      for (int64_t j = l; j <= h; ++j) {
        double* here = own + (j - l) * 64;
        subtract_products(here, l, smaller(i, j), [&](int64_t k, const double*& m, const double*& u) {
          m = own + (k - l) * 64, u = tiles + tile[k] + (j - low[k]) * 64;
          return high[k] >= j;
        });
        if (j < i)
          multiply(here, inverse + j * 64);
        else if (j == i)
          invert(here, inverse + i * 64);
      }
    }
  }

  const double* tile_at(int64_t i, int64_t j) const { return tiles + tile[i] + (j - low[i]) * 64; }

  void solve() {  // v from rhs, which is lost
    for (int64_t i = 0; i < nb; ++i) {
      const Eight known = minus_products(
          low[i], i, [&](int64_t j, const double*& m, const double*& x) { m = tile_at(i, j), x = rhs + j * kBlock; });
      store(rhs + i * kBlock, eight(rhs + i * kBlock) + known);
    }
    for (int64_t i = nb - 1; i >= 0; --i) {
      const Eight known = minus_products(i + 1, high[i] + 1, [&](int64_t j, const double*& m, const double*& x) {
        m = tile_at(i, j), x = v + j * kBlock;
      });
      store(v + i * kBlock, product(inverse + i * 64, eight(rhs + i * kBlock) + known));
    }
  }

  // Howard's policy iteration from `policy`, whose factors hold before block row `changed`; leaves v and q.
  void optimise(double gamma, int64_t changed) {
    for (int round = 0; round < 1000; ++round) {
      factor(gamma, changed, [&](int64_t s) { return chosen(s); });
      for (int64_t s = 0; s < ns; ++s) rhs[s] = rbar[s * na + policy[s]];
      solve();
      back_up(gamma);
      double largest = 1.0;
      for (int64_t s = 0; s < ns; ++s) largest = larger(largest, fabs(v[s]));
      changed = nb;
      for (int64_t s = ns - 1; s >= 0; --s) {
        int64_t best = 0;
        for (int64_t a = 1; a < na; ++a)
          if (q[s * na + a] > q[s * na + best]) best = a;
        if (q[s * na + best] > q[s * na + policy[s]] + 1e-12 * largest) policy[s] = best, changed = s / kBlock;
      }
      if (changed == nb) return;
    }
  }
};

}  // namespace
}  // namespace icrl::ICRL_ISA
