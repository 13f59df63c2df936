// The AnyMDP sampler (Wang et al., arXiv 2502.02869, "Scalable procedural task generation"): one task at a time,
// float64 throughout, probabilities rounded to float32 before anything is judged by them.
//
//   ns, na      states and actions of the task; s a state, a an action, i = s * na + a a row
//   attempt     counts from 1; each draws from streams of its own
//   start       [3] the first states' probabilities
//   gamma       discount;  ends: the terminal states, goal: whether the last state is one
//   p, x        [ns] or [width] a distribution over states
// What a task is while it is sampled, and its values, are TaskValues (anymdp_values.inl); where it goes is AnymdpTask
// (anymdp.h). Everything here is local to the file that includes it.
#pragma once

#include <math.h>
#include <string.h>

#include <cstdint>

#include "common/tiles.inl"
#include "tabular/anymdp.h"
#include "tabular/anymdp_random.inl"
#include "tabular/anymdp_values.inl"

namespace icrl::ICRL_ISA {
namespace {

struct Sampler : TaskValues {
  using TaskValues::TaskValues;

  // ---- the task's parts ---------------------------------------------------------------------------------------------

  void sample_ends(int64_t attempt) {
    const Random scalar(out.key, attempt, kScalars), first(out.key, attempt, kStart), pit(out.key, attempt, kEnds);
    double sum = 0;
    for (int64_t retry = 0; sum < 1e-10; ++retry) {
      sum = 0;
      for (int64_t s = 0; s < 3; ++s) sum += start[s] = larger(first.normal(6 * retry + 2 * s), 0.0);
    }
    for (double& p : start) p = p > 1e-10 ? p / sum : 0.0;
    const double rate = larger(scalar.uniform(0, -0.2, 0.4), 0.0);
    for (int64_t retry = 0, count = ns; !(static_cast<double>(count) < static_cast<double>(ns) * rate + 1.0); ++retry) {
      count = 0;
      for (int64_t s = 0; s < ns; ++s) count += is_end[s] = pit.uniform(retry * ns + s) < rate;
    }
    for (int64_t s = 0; s < 3; ++s)
      if (start[s] > 0) is_end[s] = 0;
    is_end[ns - 1] = goal = scalar.uniform(1) < 0.3;
  }

  void sample_transition(int64_t attempt) {
    const Random windows(out.key, attempt, kWindows), weights(out.key, attempt, kWeights),
        centers(out.key, attempt, kCenters);
    const int64_t leap = larger(int64_t{2}, ns / 4 + 1), back = larger(int64_t{2}, ns / 2 + 1);
    // a window is to end after the second open state ahead, where there are two
    for (int64_t s = ns - 1, next = ns, second = ns; s >= 0; --s) {
      ahead[s] = second < ns ? second + 1 : ns;
      if (!is_end[s]) second = next, next = s;
    }
    int64_t used = 0;
    for (int64_t s = 0; s < ns; ++s) {
      if (is_end[s]) {
        from[s] = to[s] = 0, policy[s] = 0;
        for (int64_t i = s * na; i < (s + 1) * na; ++i) begin[i] = end[i] = 0, offset[i] = used, row_sum[i] = 0;
        continue;
      }
      const int64_t from_min = larger(int64_t{0}, s - back), to_max = smaller(ns, s + leap);
      const int64_t f = windows.integer(3 * s, from_min, larger(s - 1, from_min + 1));
      const int64_t drawn = windows.integer(3 * s + 1, smaller(smaller(ns - 1, s + 1), to_max - 1), to_max);
      const int64_t e = larger(drawn, ahead[s]), first = f / kBlock * kBlock, stop = (e + 7) / kBlock * kBlock;
      from[s] = first / kBlock, to[s] = stop / kBlock;

      const u8 lanes = {0, 1, 2, 3, 4, 5, 6, 7};
      for (int64_t j = first; j < stop; j += kBlock) {
        const u8 bits = mix(weights.key + (static_cast<uint64_t>(s * ns + j + 1) + lanes) * kGolden);
        alignas(64) double uniform[8];
        store(uniform, __builtin_convertvector(bits >> 11, v8) * 0x1p-53);
        for (int p = 0; p < 8; p += kDoubles) store_part(weight + j + p, clipped_normal(part(uniform + p)));
      }
      for (int64_t j = first; j < f; ++j) weight[j] = 0;
      for (int64_t j = e; j < stop; ++j) weight[j] = 0;
      weight[s] = s == ns - 1 ? 0.0 : weight[s] / 2.0;  // f <= s < e
      Eight sums = eight_of(0);
      for (int64_t j = first; j < stop; j += kBlock) sums += eight(weight + j), store(total + j, eight_of(0));
      const double sum = add(sums);

      const double sigma = clip(windows.exponential(3 * s + 2), 0.2, 1.6), sharp = -1.0 / (sigma * sigma);
      // Beyond this distance from its centre a row is zero in float32: its largest entry is no further than 2 away, and
      // shares of actions, at least 1e-10 of which remain, add another e^23 to float32's e^87.
      const double reach = sqrt(120.0 * sigma * sigma + 4.0);
      int64_t nearest = 0;  // the action that most wants to go up: a good first policy
      for (int64_t a = 0; a < na; ++a) {
        const double c = center[a] = centers.uniform(s * na + a, static_cast<double>(f - 1), static_cast<double>(e));
        if (c > center[nearest]) nearest = a;
        const int64_t i = s * na + a;
        const int64_t l = larger(first, static_cast<int64_t>(larger(c - reach, 0.0)) / kBlock * kBlock);
        const int64_t h = smaller(stop, (static_cast<int64_t>(c + reach) + kBlock) / kBlock * kBlock);
        begin[i] = l, end[i] = h;
        double* p = bell + a * width;
        for (int64_t j = first; j < stop; j += kBlock) store(p + j, eight_of(0));
        for (int64_t j = l; j < h; j += kBlock) {
          const double there = c - static_cast<double>(j);
          for (int k = 0; k < 8; k += kDoubles) {
            const Part d = there - part(kNumbers + k), x = exp_negative(sharp * (d * d));
            store_part(p + j + k, x), store_part(total + j + k, part(total + j + k) + x);
          }
        }
      }
      policy[s] = nearest;
      for (int64_t j = first; j < stop; j += kBlock) {
        i8 far = (load(total + j) < 1e-10) & (load(weight + j) != 0);  // from every action: the nearest one takes it
        if (!any(far)) continue;
        const v8 here = load(kNumbers) + static_cast<double>(j);
        v8 least = splat(1e300);
        for (int64_t a = 0; a < na; ++a) least = smaller(least, magnitude(center[a] - here));
        int64_t i = s * na;
        double* p = bell + j;
        for (int64_t a = 0; any(far); ++a, ++i, p += width) {
          const i8 taken = far & (magnitude(center[a] - here) == least);
          if (!any(taken)) continue;
          store(total + j, taken ? load(total + j) + (1.0 - load(p)) : load(total + j));
          store(p, taken ? splat(1) : load(p));
          begin[i] = smaller(begin[i], j), end[i] = larger(end[i], j + kBlock), far &= ~taken;
        }
      }
      for (int64_t j = first; j < stop; j += kDoubles) {
        const Part w = part(weight + j);
        store_part(total + j, w == 0 ? Part{} : w / (sum * part(total + j)));
      }
      for (int64_t a = 0; a < na; ++a) {
        const int64_t i = s * na + a;
        const double* p = bell + a * width;
        int64_t l = begin[i], h = end[i];
        Eight mass = eight_of(0), kept = mass;
        for (int64_t j = l; j < h; j += kBlock) mass += eight(p + j) * eight(total + j);
        const double scale = 1.0 / add(mass);
        float* w = rows + used;
        // rounded as the table will hold it; what would be a denormal is dropped
        for (int64_t j = l; j < h; j += kBlock) {
          for (int64_t k = j; k < j + kBlock; k += kDoubles) {
            const Part x = part(p + k) * part(total + k) * scale;
            round_to(w + k - l, x < 0x1p-126 ? Part{} : x);
          }
          kept += eight(w + j - l);
        }
        for (; l < h && !any(w); l += kBlock) w += kBlock;
        while (h > l && !any(w + h - l - kBlock)) h -= kBlock;
        begin[i] = l / kBlock, end[i] = h / kBlock, offset[i] = w - rows, row_sum[i] = add(kept);
        used = offset[i] + h - l;
      }
    }
  }

  void sample_reward_parts(int64_t attempt) {
    const Random scalar(out.key, attempt, kScalars), item(out.key, attempt, kItems),
        position(out.key, attempt, kPosition), costs(out.key, attempt, kCosts);
    for (int64_t s = 0; s < ns; ++s) pot[s] = 0;
    const double wanted = scalar.uniform(2) < 0.5 ? 0.0 : clip(scalar.exponential(3), 0.2, 5.0);
    const double box = larger(scalar.uniform(4, -wanted, wanted), 0.0);
    const int64_t items = scalar.integer(5, 1, 4);
    for (int64_t k = 0; k < items && box > 0; ++k) {
      const int64_t n = 16 * k;
      const double scale = box / sqrt(static_cast<double>(items));
      const double order = static_cast<double>(item.integer(n, 1, 6)) + item.normal(n + 1);
      const double sine = item.normal(n + 3) * scale * item.exponential(n + 5);
      const double cosine = item.normal(n + 6) * scale * item.exponential(n + 8);
      for (int64_t s = 0; s < ns; ++s) {
        const double angle = order * static_cast<double>(s) / static_cast<double>(2 * ns);
        pot[s] += sine * sin(angle) + cosine * cos(angle);
      }
    }

    const double base = 0.2 * scalar.exponential(6);
    double height = 0;
    for (int64_t s = 0; s < ns; ++s)
      pos[s] = height += base * (larger(position.normal(3 * s), 0.0) + (s == ns - 1 ? 0.2 : 0.0));
    const double zero = scalar.uniform(7, 0.1 * height, 0.9 * height);
    int64_t ends = 0;
    for (int64_t s = 0; s < ns; ++s) {
      pos_noise[s] = larger(position.uniform(3 * s + 2, -0.3, 0.3), 0.0) * base;
      pos[s] -= zero;
      if (is_end[s]) pos[s] = pos_noise[s] = 0, ++ends;
    }

    const double amount = smaller(0.05 * scalar.exponential(8), 0.1);
    for (int64_t i = 0; i < ns * na; ++i) {
      cost[i] = cost_noise[i] = 0;
      if (costs.uniform(3 * i) < 0.7) continue;
      const double r = amount * costs.radius(3 * i + 1), angle = costs.angle(3 * i + 2);
      cost[i] = r * cos(angle), cost_noise[i] = larger(0.3 * r * sin(angle), 0.0);
    }
    const double z = 0.01 * scalar.normal(9);
    const double step = goal ? smaller(z, 0.0) : ends > 0 ? larger(z, 0.0) : 0.0;
    for (int64_t s = 0; s < ns; ++s)
      for (int64_t a = 0; a < na; ++a) fixed[s * na + a] = pot[s] + cost[s * na + a] + step;
  }

  // ---- rewards that are worth something -----------------------------------------------------------------------------

  // Terminal rewards: pitfalls below every value, the last state above every start. False where five rounds fail.
  bool settle_rewards(int64_t attempt) {
    const Random random(out.key, attempt, kSettle);
    for (int64_t s = 0; s < ns; ++s) bonus[s] = s == ns - 1;
    for (int64_t round = 0; round < 5; ++round) {
      expect_rewards();
      optimise(0.99, round == 0 ? 0 : nb);
      double least = 1e300, lowest_bonus = 1e300, top = -1e300;
      for (int64_t s = 0; s < ns; ++s) {
        lowest_bonus = smaller(lowest_bonus, bonus[s]);
        if (!is_end[s]) least = smaller(least, v[s]);
      }
      for (int64_t s = 0; s < 3; ++s)
        if (start[s] > 0) top = larger(top, v[s]);
      const double pit = lowest_bonus - least + 1.0;
      const double fall = top - v[goal ? ns - 2 : ns - 1] + random.uniform(3 * round, 2.0, 5.0);
      if (pit <= 0 && fall <= 0) return true;
      if (pit > 0) {
        const double drop = pit + random.uniform(3 * round + 1, 1.0, 10.0);
        for (int64_t s = 0; s < ns - 1; ++s)
          if (is_end[s]) bonus[s] -= drop;
      }
      if (fall > 0) {
        const double rise = larger(2.0 * fall, random.uniform(3 * round + 2, 1.0, 10.0));
        bonus[ns - 1] += goal ? rise : 0.01 * rise;
      }
    }
    return false;
  }

  // The two filters at γ = 2^(−1/ns): spread of the optimal chain, and worth against the random policy.
  bool worth_playing(int64_t max_steps) {
    const double gamma = exp2(-1.0 / static_cast<double>(ns));
    optimise(gamma, 0);
    double optimal[3];
    for (int64_t s = 0; s < 3; ++s) optimal[s] = best_q(s);
    if (!spreads(max_steps)) return false;
    for (int64_t s = 0; s < ns; ++s) {
      double *m = mean + s * width, r = 0;
      for (int64_t j = from[s] * kBlock; j < to[s] * kBlock; j += kBlock) store(m + j, eight_of(0));
      for (int64_t i = s * na; i < (s + 1) * na; ++i) {
        const Blocks<float> p = row(i);
        r += rbar[i];
        for (int64_t j = p.begin; j < p.end; ++j)
          store(m + j * kBlock,
                eight(m + j * kBlock) + eight(p.p + (j - p.begin) * kBlock) / eight_of(static_cast<double>(na)));
      }
      rhs[s] = r / static_cast<double>(na);
    }
    factor(gamma, 0, [&](int64_t s) { return Blocks<double>{mean + s * width + from[s] * kBlock, from[s], to[s]}; });
    solve();
    back_up(gamma);
    for (int64_t s = 0; s < 3; ++s)
      if (start[s] > 0 && (optimal[s] - best_q(s)) * (1.0 - gamma) * static_cast<double>(max_steps) < 2.0) return false;
    return true;
  }

  double best_q(int64_t s) const {
    double best = q[s * na];
    for (int64_t a = 1; a < na; ++a) best = larger(best, q[s * na + a]);
    return best;
  }

  // ---- where the optimal policy goes --------------------------------------------------------------------------------

  struct Spread {
    double gini, entropy, most;  // 1 − Σp², −Σ p log p / log ns, max p
  };
  Spread spread(const double* p) const {
    double squares = 0, entropy = 0, most = 0;
    for (int64_t s = 0; s < ns; ++s) {
      const double x = p[s] + 1e-12;
      squares += x * x, entropy -= x * log(x), most = larger(most, x);
    }
    return {1.0 - squares, entropy / log(static_cast<double>(ns)), most};
  }

  // Gini above .7 and entropy above .35, for a distribution within `distance` of this one in L1: 1 surely, -1 surely
  // not, 0 unknown. The entropy's modulus of continuity is Fannes' and Audenaert's.
  int enough(const Spread& of, double distance) const {
    const double half = distance / 2;
    if (half >= 0.5) return 0;
    const double shift = distance * (2 * of.most + distance), gini = of.gini - 0.7, entropy = of.entropy - 0.35;
    const double blur = half - (half * log(half) + (1 - half) * log(1 - half)) / log(static_cast<double>(ns)) + 1e-9;
    return gini > shift && entropy > blur ? 1 : gini <= -shift || entropy <= -blur ? -1 : 0;
  }

  // `stable` becomes nearly stationary under the optimal chain with restarts: π = c·start·(I − (1 − 1e-7)·P)⁻¹.
  void find_stable() {
    factor(1.0 - 1e-7, 0, [&](int64_t s) { return chosen(s); });
    for (int64_t j = 0; j < width; ++j) stable[j] = j < 3 ? start[j] : 0.0;
    const auto times = [](const double* x, const double* m) {
      Eight sum = eight_of(0);
      for (int r = 0; r < 8; ++r) sum += x[r] * eight(m + 8 * r);
      return sum;
    };
    for (int64_t i = 0; i < nb; ++i) {
      double* x = stable + i * kBlock;
      store(x, times(x, inverse + i * 64));
      for (int64_t j = i + 1; j <= high[i]; ++j)
        store(stable + j * kBlock, eight(stable + j * kBlock) - times(x, tile_at(i, j)));
    }
    for (int64_t i = nb - 1; i >= 0; --i)
      for (int64_t j = low[i]; j < i; ++j)
        store(stable + j * kBlock, eight(stable + j * kBlock) - times(stable + i * kBlock, tile_at(i, j)));
    double sum = 0;
    for (int64_t s = 0; s < ns; ++s) sum += stable[s] = larger(stable[s], 0.0);
    for (int64_t s = 0; s < ns; ++s) stable[s] /= sum;
  }

  // Where the optimal policy is 2^K steps after each start, K = ⌊log2 max_steps⌋ + 1, terminals restarting: spread
  // enough? Walked only until its distance from a stationary distribution, which no step increases, leaves no doubt.
  bool spreads(int64_t max_steps) {
    // The optimal chain by columns: for each block of eight next states, the rows that reach it, eight numbers each.
    for (int64_t j = 0; j <= nb; ++j) column[j] = 0;
    for (int64_t s = 0; s < ns; ++s) {
      const Blocks<float> p = chosen(s);
      for (int64_t j = p.begin; j < p.end; ++j) ++column[j + 1];
      column[1] += is_end[s];
    }
    for (int64_t j = 0; j < nb; ++j) column[j + 1] += column[j], filled[j] = column[j];
    for (int64_t s = 0; s < ns; ++s) {
      const Blocks<float> p = chosen(s);
      for (int64_t j = p.begin; j < p.end; ++j) {
        store(chain + kBlock * filled[j], eight(p.p + (j - p.begin) * kBlock));
        source[filled[j]++] = s;
      }
      if (is_end[s]) store(chain + kBlock * filled[0], v8{start[0], start[1], start[2]}), source[filled[0]++] = s;
    }
    find_stable();
    memcpy(visits, stable, sizeof(double) * static_cast<size_t>(ns));
    step<1>();
    int64_t steps = 1;
    while (steps <= max_steps) steps *= 2;
    const Spread there = spread(stable);
    // 1e-6 a step for what rows of float32 lack of 1
    const double slack = static_cast<double>(steps) * (distance(moved, stable) + 1e-6);
    int count = 0;
    for (int64_t s = 0; s < 3; ++s) {
      if (start[s] == 0) continue;
      double* x = visits + count++ * width;
      for (int64_t j = 0; j < width; ++j) x[j] = j == s;
    }
    if (count == 1) return walk<1>(steps, slack, there);
    return count == 2 ? walk<2>(steps, slack, there) : walk<3>(steps, slack, there);
  }

  double distance(const double* x, const double* y) const {
    double sum = 0;
    for (int64_t s = 0; s < ns; ++s) sum += fabs(x[s] - y[s]);
    return sum;
  }

  // moved[c] = visits[c]·chain for c < C at once: one chain's latency hides another's.
  template <int C>
  void step() {
    for (int64_t j = 0, e = 0; j < nb; ++j) {
      const int64_t begin_at = e, last = column[j + 1];
      for (int k = 0; k < 8; k += kDoubles) {
        Part sum[2][C];
        for (int c = 0; c < C; ++c) sum[0][c] = sum[1][c] = Part{};
        for (e = begin_at; e + 1 < last; e += 2)
          for (int half = 0; half < 2; ++half) {
            const Part p = part(chain + kBlock * (e + half) + k);
            for (int c = 0; c < C; ++c) sum[half][c] += visits[c * width + source[e + half]] * p;
          }
        if (e < last) {
          const Part p = part(chain + kBlock * e + k);
          for (int c = 0; c < C; ++c) sum[0][c] += visits[c * width + source[e]] * p;
          ++e;
        }
        for (int c = 0; c < C; ++c) {
          const Part y = sum[0][c] + sum[1][c];
          store_part(moved + c * width + j * kBlock + k, y < 1e-18 ? Part{} : y);  // no denormals
        }
      }
    }
  }

  template <int C>
  bool walk(int64_t steps, double slack, const Spread& there) {
    for (int64_t k = 1; k <= steps; ++k) {
      step<C>();
      double* before = visits;
      visits = moved, moved = before;
      if (k % 8 != 0) continue;
      int sure = 0;
      for (int c = 0; c < C; ++c) {
        const int known = enough(there, distance(visits + c * width, stable) + slack);
        if (known < 0) return false;
        sure += known;
      }
      if (sure == C) return true;
      // nor is there doubt where the steps that are left, at most 1024, cannot move an entry by more than 1e-7
      double change = 0;
      for (int c = 0; c < C; ++c)
        for (int64_t s = c * width; s < c * width + ns; ++s) change = larger(change, fabs(moved[s] - visits[s]));
      if (change < 1e-10) break;
    }
    for (int c = 0; c < C; ++c) {
      const Spread found = spread(visits + c * width);
      if (!(found.gini > 0.7 && found.entropy > 0.35)) return false;
    }
    return true;
  }

  // ---- output -------------------------------------------------------------------------------------------------------

  void write_row(int64_t i, int64_t l, int64_t h, float* p, float* r) const {
    const float* w = rows + offset[i] - begin[i] * kBlock;
    const auto rewards = [&](float* to, int64_t j) {
      for (int k = 0; k < 8; k += kDoubles)
        round_to(to + k, part(w + j + k) == 0 ? Part{} : fixed[i] + part(gain + j + k));
    };
    int64_t j = l;
    for (; j + kBlock <= h; j += kBlock, p += kBlock, r += kBlock) memcpy(p, w + j, 32), rewards(r, j);
    float last[kBlock];
    rewards(last, j);
    memcpy(p, w + j, static_cast<size_t>(h - j) * 4), memcpy(r, last, static_cast<size_t>(h - j) * 4);
  }

  void write() const {
    for (int64_t s = 0; s < 3; ++s) out.start[s] = static_cast<float>(start[s]);
    for (int64_t s = 0; s < ns; ++s) {
      out.terminal[s] = is_end[s] != 0;
      out.noise_state[s] = static_cast<float>(pos_noise[s]);
      for (int64_t i = s * na; i < (s + 1) * na && !is_end[s]; ++i)
        out.noise_action[i] = static_cast<float>(cost_noise[i]);
    }
    if (out.transition) {
      for (int64_t i = 0; i < ns * na; ++i) {
        const int64_t l = begin[i] * kBlock, skip = i * out.stride + l;
        write_row(i, l, smaller(ns, end[i] * kBlock), out.transition + skip, out.reward + skip);
      }
      return;
    }
    int64_t entries = 0;
    for (int64_t i = 0; i < ns * na; ++i) {
      int64_t l = 0, h = (end[i] - begin[i]) * kBlock;
      while (l < h && rows[offset[i] + l] == 0) ++l;
      while (l < h && rows[offset[i] + h - 1] == 0) --h;
      out.first[i] = static_cast<int32_t>(l < h ? begin[i] * kBlock + l : 0),
      out.length[i] = static_cast<int32_t>(h - l);
      entries += h - l;
    }
    float *p = out.room(out.context, entries), *r = p + entries;
    for (int64_t i = 0; i < ns * na; ++i) {
      write_row(i, out.first[i], out.first[i] + out.length[i], p, r);
      p += out.length[i], r += out.length[i];
    }
  }
};

}  // namespace

void anymdp_sample(const AnymdpTask& task) {
  const int64_t ns = task.ns;
  const Random once(task.key, 0);
  const double lower = larger(4.0 * static_cast<double>(ns), 100.0);
  const double above = larger(smaller(8.0 * static_cast<double>(ns), 500.0), lower + 1.0);
  *task.max_steps = static_cast<int64_t>(ceil(once.uniform(0, lower, above)));

  Sampler sampler(task);
  int64_t* ids = reinterpret_cast<int64_t*>(sampler.at);
  for (int64_t i = 0; i < task.num_observations; ++i) ids[i] = i;
  for (int64_t s = 0; s < ns; ++s) {
    const int64_t other = once.integer(1 + s, s, task.num_observations), id = ids[other];
    ids[other] = ids[s];
    task.state_mapping[s] = id;
  }

  *task.attempts = 0;
  for (int64_t attempt = 1; attempt <= task.max_attempts; ++attempt) {
    sampler.sample_ends(attempt);
    sampler.sample_transition(attempt);
    sampler.sample_reward_parts(attempt);
    if (!sampler.settle_rewards(attempt) || !sampler.worth_playing(*task.max_steps)) continue;
    sampler.write();
    *task.attempts = attempt;
    return;
  }
}

}  // namespace icrl::ICRL_ISA
