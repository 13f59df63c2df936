// The AnyMDP sampler (Wang et al., arXiv 2502.02869, "Scalable procedural task generation"): one task at a time, windows
// packed, float64 throughout, tables rounded to float32 before anything is judged by them. Included once per
// instruction set; everything here is local to the file that includes it.
//
// Random numbers are counter-based: bits(key, n) = mix(key + n·golden) (splitmix64), so that a task depends on its key
// alone, not on batch, thread or the tasks before it.

namespace {

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15ull;

inline uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}
inline double to_unit(uint64_t bits) { return static_cast<double>(bits >> 11) * 0x1p-53; }
inline double larger(double a, double b) { return a > b ? a : b; }
inline double smaller(double a, double b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline double clip(double x, double lo, double hi) { return smaller(larger(x, lo), hi); }

struct Random {
  uint64_t key, n = 0;
  Random(uint64_t parent, uint64_t stream) : key(mix(parent ^ mix(stream + kGolden))) {}
  double uniform() { return to_unit(mix(key + ++n * kGolden)); }
  double uniform(double lo, double hi) { return lo + (hi - lo) * uniform(); }
  int64_t integer(int64_t lo, int64_t hi) {  // [lo, hi); the bias of the multiplication is below hi·2⁻⁵³
    return lo + static_cast<int64_t>(uniform() * static_cast<double>(hi - lo));
  }
  double exponential(double mean) { return -mean * log(1.0 - uniform()); }
  double normal() {
    const double r = sqrt(-2.0 * log(1.0 - uniform()));
    return r * cos(6.283185307179586 * uniform());
  }
};

// exp for x <= 0 to a few ulp, in a form that vectorises; 0 below -700.
inline double exp_negative(double x) {
  const double y = larger(x, -700.0);
  const double shifted = y * 1.4426950408889634 + 0x1.8p52;
  const double n = shifted - 0x1.8p52;
  const double r = (y - n * 0x1.62e42fefa39efp-1) - n * 0x1.abc9e3b39803fp-56;
  double p = 1.0 / 6227020800.0;
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  int64_t bits;
  memcpy(&bits, &shifted, 8);
  const int64_t power = (bits + 1023) << 52;  // the low bits of `shifted` hold n in two's complement
  double scale;
  memcpy(&scale, &power, 8);
  return x < -700.0 ? 0.0 : p * scale;
}

// clip(N(0,1), .1, 1) from one uniform: the inverse distribution function's central rational form (P. J. Acklam, relative
// error 1.2e-9); the clipped range never needs the tails.
inline double clipped_normal(double u) {
  const double q = clip(u, 0.5398278372770290, 0.8413447460685429) - 0.5, r = q * q;
  const double a =
      ((((-3.969683028665376e+01 * r + 2.209460984245205e+02) * r - 2.759285104469687e+02) * r + 1.383577518672690e+02) * r -
       3.066479806614716e+01) * r + 2.506628277459239e+00;
  const double b =
      ((((-5.447609879822406e+01 * r + 1.615858368580409e+02) * r - 1.556989798598866e+02) * r + 6.680131188771972e+01) * r -
       1.328068155288572e+01) * r + 1.0;
  return clip(q * a / b, 0.1, 1.0);
}

// Every row below is followed by eight zeros, and every vector by eight finite numbers, so that loops run in whole blocks.
constexpr int64_t kBlock = 8;
inline int64_t blocks(int64_t n) { return (n + kBlock - 1) / kBlock * kBlock; }

inline double dot(const double* a, const double* b, int64_t n) {
  double lanes[kBlock] = {};
  for (int64_t i = 0; i < n; i += kBlock)
    for (int k = 0; k < kBlock; ++k) lanes[k] += a[i + k] * b[i + k];
  for (int k = 0; k < 4; ++k) lanes[k] += lanes[k + 4];
  return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
}

struct Row {  // entries [lo, hi) of a transition row
  const double* p;
  int64_t lo, hi;
};

struct Sampler {
  const AnymdpTask& out;
  const int64_t ns, na, width;  // width: of a row with its padding
  double* at;                   // the rest of the scratch

  double* take(int64_t n) {
    double* p = at;
    at += n;
    return p;
  }
  int64_t* take_int(int64_t n) { return reinterpret_cast<int64_t*>(take(n)); }

  // transition rows live at t + (s·na + a)·width, valid on [lo, hi) of (s, a)
  double *t, *lu, *chain;
  double *rbar, *fixed, *row_sum, *cost, *cost_noise, *q, *center;
  double *v, *gain, *weight, *total, *visits, *moved;
  double *inv, *rhs, *pot, *pos, *pos_noise, *bonus;
  int64_t *lo, *hi, *from, *to, *policy, *upper, *is_end;
  double start[3];
  bool goal;

  explicit Sampler(const AnymdpTask& task) : out(task), ns(task.ns), na(task.na), width(blocks(task.ns) + 16), at(task.scratch) {
    t = take(ns * na * width), lu = take(ns * width), chain = take(ns * width);
    rbar = take(ns * na), fixed = take(ns * na), row_sum = take(ns * na), cost = take(ns * na), cost_noise = take(ns * na);
    q = take(ns * na), lo = take_int(ns * na), hi = take_int(ns * na), center = take(na);
    v = take(width), gain = take(width), weight = take(width), total = take(width);
    visits = take(3 * width), moved = take(3 * width);
    for (int64_t j = 0; j < width; ++j) v[j] = gain[j] = 0;
    inv = take(ns), rhs = take(ns), pot = take(ns), pos = take(ns), pos_noise = take(ns), bonus = take(ns);
    from = take_int(ns), to = take_int(ns), policy = take_int(ns), upper = take_int(ns), is_end = take_int(ns);
  }

  double* row(int64_t i) const { return t + i * width; }

  void sample_ends(Random& random) {
    double sum = 0;
    while (sum < 1e-10) {
      sum = 0;
      for (double& p : start) sum += p = larger(random.normal(), 0.0);
    }
    for (double& p : start) p = p > 1e-10 ? p / sum : 0.0;
    const double rate = larger(random.uniform(-0.2, 0.4), 0.0);
    double count;
    do {
      count = 0;
      for (int64_t s = 0; s < ns; ++s) count += is_end[s] = random.uniform() < rate;
    } while (!(count < static_cast<double>(ns) * rate + 1.0));
    for (int64_t s = 0; s < 3; ++s)
      if (start[s] > 0) is_end[s] = 0;
    is_end[ns - 1] = goal = random.uniform() < 0.3;
  }

  void sample_transition(Random& random, uint64_t weight_key) {
    const int64_t leap = larger(int64_t{2}, ns / 4 + 1), back = larger(int64_t{2}, ns / 2 + 1);
    for (int64_t s = 0; s < ns; ++s) {
      if (is_end[s]) {
        from[s] = to[s] = s;
        for (int64_t a = 0; a < na; ++a) lo[s * na + a] = hi[s * na + a] = s, row_sum[s * na + a] = 0;
        continue;
      }
      const int64_t from_min = larger(int64_t{0}, s - back), to_max = smaller(ns, s + leap);
      const int64_t f = random.integer(from_min, larger(s - 1, from_min + 1));
      int64_t e = random.integer(smaller(smaller(ns - 1, s + 1), to_max - 1), to_max);
      for (int64_t open = 0, seen = s + 1; e < ns; ++e) {  // grown until two open states lie ahead
        for (; seen < e; ++seen) open += !is_end[seen];
        if (open > 1) break;
      }
      from[s] = f, to[s] = e;

      double sum = 0;
      const uint64_t base = weight_key + static_cast<uint64_t>(s * ns) * kGolden;
      const int64_t stop = f + blocks(e - f);
      for (int64_t j = f; j < stop; ++j) weight[j] = clipped_normal(to_unit(mix(base + static_cast<uint64_t>(j) * kGolden)));
      for (int64_t j = e; j < stop; ++j) weight[j] = 0;
      weight[s] = s == ns - 1 ? 0.0 : weight[s] / 2.0;  // f <= s < e
      for (int64_t j = f; j < e; ++j) sum += weight[j];

      for (int64_t a = 0; a < na; ++a) center[a] = random.uniform(static_cast<double>(f - 1), static_cast<double>(e));
      const double sigma = clip(random.exponential(1.0), 0.2, 1.6), sharp = -1.0 / (sigma * sigma);
      for (int64_t j = f; j < stop; ++j) total[j] = 0;
      for (int64_t a = 0; a < na; ++a) {
        double* p = row(s * na + a);
        const double c = center[a];
        for (int64_t j = f; j < stop; ++j) {
          const double d = c - static_cast<double>(j);
          p[j] = exp_negative(sharp * (d * d));
          total[j] += p[j];
        }
      }
      for (int64_t j = f; j < e; ++j) {
        if (total[j] >= 1e-10) continue;  // far from every action: the nearest one takes it
        int64_t nearest = 0;
        for (int64_t a = 1; a < na; ++a)
          if (fabs(center[a] - static_cast<double>(j)) < fabs(center[nearest] - static_cast<double>(j))) nearest = a;
        total[j] += 1.0 - row(s * na + nearest)[j];
        row(s * na + nearest)[j] = 1.0;
      }
      for (int64_t j = e; j < stop; ++j) total[j] = 1.0;
      for (int64_t j = f; j < stop; ++j) total[j] = weight[j] / (sum * total[j]);
      for (int64_t a = 0; a < na; ++a) {
        double* p = row(s * na + a);
        const double scale = 1.0 / dot(p + f, total + f, e - f);
        // rounded as the table will hold it; what float32 would hold as a denormal is dropped
        double lanes[kBlock] = {};
        for (int64_t j = f; j < stop; j += kBlock)
          for (int k = 0; k < kBlock; ++k) {
            const float w = static_cast<float>(p[j + k] * total[j + k] * scale);
            p[j + k] = w < 1.17549435e-38f ? 0.0 : static_cast<double>(w);
            lanes[k] += p[j + k];
          }
        for (int64_t j = stop; j < stop + kBlock; ++j) p[j] = 0;
        double kept = 0;
        for (double lane : lanes) kept += lane;
        int64_t l = f, h = e;
        while (l < h && p[l] == 0) ++l;
        while (h > l && p[h - 1] == 0) --h;
        lo[s * na + a] = l, hi[s * na + a] = h, row_sum[s * na + a] = kept;
      }
    }
  }

  void sample_reward_parts(Random& random) {
    for (int64_t s = 0; s < ns; ++s) pot[s] = 0;
    const double wanted = random.uniform() < 0.5 ? 0.0 : clip(random.exponential(1.0), 0.2, 5.0);
    const double box = larger(random.uniform(-wanted, wanted), 0.0);
    const int64_t items = random.integer(1, 4);
    const double scale = box / sqrt(static_cast<double>(items));
    for (int64_t i = 0; i < items; ++i) {
      const double order = static_cast<double>(random.integer(1, 6)) + random.normal();
      const double sine = random.normal() * random.exponential(scale), cosine = random.normal() * random.exponential(scale);
      if (box > 0)
        for (int64_t s = 0; s < ns; ++s) {
          const double angle = order * static_cast<double>(s) / static_cast<double>(2 * ns);
          pot[s] += sine * sin(angle) + cosine * cos(angle);
        }
    }

    const double base = random.exponential(0.2);
    double height = 0;
    for (int64_t s = 0; s < ns; ++s)
      pos[s] = height += base * (larger(random.normal(), 0.0) + (s == ns - 1 ? 0.2 : 0.0));
    const double zero = random.uniform(0.1 * height, 0.9 * height);
    int64_t ends = 0;
    for (int64_t s = 0; s < ns; ++s) {
      pos_noise[s] = larger(random.uniform(-0.3, 0.3), 0.0) * base;
      pos[s] -= zero;
      if (is_end[s]) pos[s] = pos_noise[s] = 0, ++ends;
    }

    const double amount = smaller(random.exponential(0.05), 0.1);
    for (int64_t i = 0; i < ns * na; ++i) {
      const bool on = random.uniform() >= 0.7;
      cost[i] = on ? amount * random.normal() : 0.0;
      cost_noise[i] = on ? 0.3 * amount * larger(random.normal(), 0.0) : 0.0;
    }
    const double z = 0.01 * random.normal();
    const double step = goal ? smaller(z, 0.0) : ends > 0 ? larger(z, 0.0) : 0.0;
    for (int64_t s = 0; s < ns; ++s)
      for (int64_t a = 0; a < na; ++a) fixed[s * na + a] = pot[s] + cost[s * na + a] + step;
  }

  // r̄(s,a) = Σ T(s,a,s')·(fixed(s,a) + gain(s'))
  void expect_rewards() {
    for (int64_t s = 0; s < ns; ++s) gain[s] = pos[s] - pot[s] + bonus[s];
    for (int64_t i = 0; i < ns * na; ++i)
      rbar[i] = fixed[i] * row_sum[i] + dot(row(i) + lo[i], gain + lo[i], hi[i] - lo[i]);
  }

  // v = (I − γP)⁻¹ r by LU within the rows' envelope. I − γP is strictly diagonally dominant by rows: no pivoting.
  template <class RowOf>
  void evaluate(double gamma, const RowOf& row_of) {
    for (int64_t i = 0; i < ns; ++i) {
      double r = 0;
      const Row p = row_of(i, r);
      double* a = lu + i * width;
      const int64_t first = p.lo < p.hi ? smaller(p.lo, i) : i;
      int64_t last = p.lo < p.hi ? larger(p.hi, i + 1) : i + 1;
      for (int64_t k = first; k < i; ++k) last = larger(last, upper[k]);
      for (int64_t j = first; j < last + kBlock; ++j) a[j] = 0;
      for (int64_t j = p.lo; j < p.hi; ++j) a[j] = -gamma * p.p[j];
      a[i] += 1.0;
      for (int64_t k = first; k < i; ++k) {
        if (a[k] == 0) continue;
        const double m = a[k] * inv[k];
        const double* b = lu + k * width;
        const int64_t end = k + 1 + blocks(upper[k] - k - 1);
        for (int64_t j = k + 1; j < end; ++j) a[j] -= m * b[j];
        r -= m * rhs[k];
      }
      upper[i] = last, inv[i] = 1.0 / a[i], rhs[i] = r;
    }
    for (int64_t i = ns - 1; i >= 0; --i) v[i] = (rhs[i] - dot(lu + i * width + i + 1, v + i + 1, upper[i] - i - 1)) * inv[i];
  }

  void back_up(double gamma) {  // q from v
    for (int64_t i = 0; i < ns * na; ++i)
      q[i] = rbar[i] + gamma * dot(row(i) + lo[i], v + lo[i], hi[i] - lo[i]);
  }

  // Howard's policy iteration from `policy`; leaves v, q, policy.
  void optimise(double gamma) {
    for (int round = 0; round < 1000; ++round) {
      evaluate(gamma, [&](int64_t s, double& r) {
        const int64_t i = s * na + policy[s];
        r = rbar[i];
        return Row{row(i), lo[i], hi[i]};
      });
      back_up(gamma);
      double largest = 1.0;
      for (int64_t s = 0; s < ns; ++s) largest = larger(largest, fabs(v[s]));
      bool changed = false;
      for (int64_t s = 0; s < ns; ++s) {
        int64_t best = 0;
        for (int64_t a = 1; a < na; ++a)
          if (q[s * na + a] > q[s * na + best]) best = a;
        if (q[s * na + best] > q[s * na + policy[s]] + 1e-12 * largest) policy[s] = best, changed = true;
      }
      if (!changed) return;
    }
  }

  double best_q(int64_t s) const {
    double best = q[s * na];
    for (int64_t a = 1; a < na; ++a) best = larger(best, q[s * na + a]);
    return best;
  }

  // Terminal rewards: pitfalls below every value, the last state above every start. False where five rounds do not do it.
  bool settle_rewards(Random& random) {
    for (int64_t s = 0; s < ns; ++s) bonus[s] = s == ns - 1, policy[s] = 0;
    for (int round = 0; round < 5; ++round) {
      expect_rewards();
      optimise(0.99);
      double least = 1e300, lowest_bonus = 1e300, top = -1e300;
      for (int64_t s = 0; s < ns; ++s) {
        lowest_bonus = smaller(lowest_bonus, bonus[s]);
        if (!is_end[s]) least = smaller(least, v[s]);
      }
      for (int64_t s = 0; s < 3; ++s)
        if (start[s] > 0) top = larger(top, v[s]);
      const double pit = lowest_bonus - least + 1.0;
      const double fall = top - v[goal ? ns - 2 : ns - 1] + random.uniform(2.0, 5.0);
      if (pit <= 0 && fall <= 0) return true;
      if (pit > 0) {
        const double drop = pit + random.uniform(1.0, 10.0);
        for (int64_t s = 0; s < ns - 1; ++s)
          if (is_end[s]) bonus[s] -= drop;
      }
      if (fall > 0) {
        const double rise = larger(2.0 * fall, random.uniform(1.0, 10.0));
        bonus[ns - 1] += goal ? rise : 0.01 * rise;
      }
    }
    return false;
  }

  // The two filters at γ = 2^(−1/ns): worth against the random policy, and spread of the optimal chain.
  bool worth_playing(int64_t max_steps) {
    const double gamma = exp2(-1.0 / static_cast<double>(ns));
    optimise(gamma);
    double optimal[3];
    for (int64_t s = 0; s < 3; ++s) optimal[s] = best_q(s);
    evaluate(gamma, [&](int64_t s, double& r) {
      double* m = chain + s * width;
      for (int64_t j = from[s]; j < to[s]; ++j) m[j] = 0;
      for (int64_t a = 0; a < na; ++a) {
        const int64_t i = s * na + a;
        r += rbar[i] / static_cast<double>(na);
        for (int64_t j = lo[i]; j < hi[i]; ++j) m[j] += row(i)[j] / static_cast<double>(na);
      }
      return Row{m, from[s], to[s]};
    });
    back_up(gamma);
    for (int64_t s = 0; s < 3; ++s)
      if (start[s] > 0 && (optimal[s] - best_q(s)) * (1.0 - gamma) * static_cast<double>(max_steps) < 2.0) return false;
    return spreads(max_steps);
  }

  // Where the optimal policy is 2^K steps after each start, K = ⌊log2 max_steps⌋ + 1, terminals restarting: spread enough?
  bool spreads(int64_t max_steps) {
    // The optimal chain by columns: for each block of eight next states, the rows that reach it, eight numbers each.
    int64_t *column = from, *source = reinterpret_cast<int64_t*>(lu), entries = 0;
    for (int64_t j = 0; j < ns; j += kBlock) {
      for (int64_t s = 0; s < ns; ++s) {
        const int64_t i = s * na + policy[s];
        const int64_t l = larger(is_end[s] ? 0 : lo[i], j), h = smaller(is_end[s] ? 3 : hi[i], j + kBlock);
        if (l >= h) continue;
        double* entry = chain + kBlock * entries;
        for (int k = 0; k < kBlock; ++k) entry[k] = 0;
        for (int64_t k = l; k < h; ++k) entry[k - j] = is_end[s] ? start[k] : row(i)[k];
        source[entries++] = s;
      }
      column[j / kBlock] = entries;
    }
    int count = 0;
    for (int64_t s = 0; s < 3; ++s) {
      if (start[s] == 0) continue;
      double* x = visits + count++ * width;
      for (int64_t j = 0; j < width; ++j) x[j] = j == s;
    }
    int64_t steps = 1;
    while (steps <= max_steps) steps *= 2;
    if (count == 1) walk<1>(steps, column, source);
    if (count == 2) walk<2>(steps, column, source);
    if (count == 3) walk<3>(steps, column, source);
    for (int c = 0; c < count; ++c) {
      double squares = 0, entropy = 0;
      for (int64_t s = 0; s < ns; ++s) {
        const double p = visits[c * width + s] + 1e-12;
        squares += p * p;
        entropy -= p * log(p);
      }
      if (!(1.0 - squares > 0.7 && entropy / log(static_cast<double>(ns)) > 0.35)) return false;
    }
    return true;
  }

  // visits[c] ← visits[c]·chain^steps for c < C at once: one chain's latency hides another's. Ends early when the steps
  // that are left (at most 1024) cannot move an entry by more than 1e-7.
  template <int C>
  void walk(int64_t steps, const int64_t* column, const int64_t* source) {
    typedef double Block __attribute__((vector_size(8 * kBlock)));
    for (int64_t k = 1; k <= steps; ++k) {
      for (int64_t j = 0, e = 0; j < ns; j += kBlock) {
        Block sum[2][C] = {};
        const int64_t end = column[j / kBlock];
        for (; e + 1 < end; e += 2)
          for (int half = 0; half < 2; ++half) {
            Block p;
            memcpy(&p, chain + kBlock * (e + half), sizeof p);
            for (int c = 0; c < C; ++c) sum[half][c] += visits[c * width + source[e + half]] * p;
          }
        if (e < end) {
          Block p;
          memcpy(&p, chain + kBlock * e, sizeof p);
          for (int c = 0; c < C; ++c) sum[0][c] += visits[c * width + source[e]] * p;
          ++e;
        }
        for (int c = 0; c < C; ++c) {
          const Block y = sum[0][c] + sum[1][c];
          for (int n = 0; n < kBlock; ++n) moved[c * width + j + n] = y[n] < 1e-18 ? 0.0 : y[n];  // no denormals
        }
      }
      double change = 0;
      if (k % 8 == 0)
        for (int c = 0; c < C; ++c)
          for (int64_t s = c * width; s < c * width + ns; ++s) change = larger(change, fabs(moved[s] - visits[s]));
      double* before = visits;
      visits = moved, moved = before;
      if (k % 8 == 0 && change < 1e-10) return;
    }
  }

  void write() const {
    for (int64_t s = 0; s < 3; ++s) out.start[s] = static_cast<float>(start[s]);
    for (int64_t s = 0; s < ns; ++s) {
      out.terminal[s] = is_end[s] != 0;
      out.noise_state[s] = static_cast<float>(pos_noise[s]);
      if (is_end[s]) continue;
      for (int64_t a = 0; a < na; ++a) {
        const int64_t i = s * na + a;
        out.noise_action[i] = static_cast<float>(cost_noise[i]);
        const double* p = row(i);
        float *w = out.transition + i * out.stride, *r = out.reward + i * out.stride;
        for (int64_t j = lo[i]; j < hi[i]; ++j) {
          w[j] = static_cast<float>(p[j]);
          r[j] = p[j] == 0 ? 0.0f : static_cast<float>(fixed[i] + gain[j]);
        }
      }
    }
  }
};

}  // namespace

void anymdp_sample(const AnymdpTask& task) {
  const int64_t ns = task.ns;
  Random once(task.key, 0);
  const double lower = larger(4.0 * static_cast<double>(ns), 100.0);
  const double above = larger(smaller(8.0 * static_cast<double>(ns), 500.0), lower + 1.0);
  *task.max_steps = static_cast<int64_t>(ceil(once.uniform(lower, above)));

  Sampler sampler(task);
  int64_t* ids = reinterpret_cast<int64_t*>(sampler.at);
  for (int64_t i = 0; i < task.num_observations; ++i) ids[i] = i;
  for (int64_t s = 0; s < ns; ++s) {
    const int64_t other = once.integer(s, task.num_observations), id = ids[other];
    ids[other] = ids[s];
    task.state_mapping[s] = id;
  }

  *task.attempts = 0;
  for (int64_t attempt = 1; attempt <= task.max_attempts; ++attempt) {
    Random random(task.key, static_cast<uint64_t>(2 * attempt));
    Random weights(task.key, static_cast<uint64_t>(2 * attempt + 1));
    sampler.sample_ends(random);
    sampler.sample_transition(random, weights.key);
    sampler.sample_reward_parts(random);
    if (!sampler.settle_rewards(random) || !sampler.worth_playing(*task.max_steps)) continue;
    sampler.write();
    *task.attempts = attempt;
    return;
  }
}
