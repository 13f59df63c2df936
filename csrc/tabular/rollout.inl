// The simulator with vectors: the numbers of many steps are drawn at once, and records that learn nothing go in step
// with one another, so that one's loads are under way while another's arrive. The bits are those of simulate_plain.
//
//   Numbers       what kBlock = 32 steps of a record draw, [32] each: place (the next state), noise and normal (the
//                 reward), choice (the action), explore (whether the action is uniform)
//   i, size       a step of the block; steps of the block that this call has
//   lanes         [kTogether = 8] records in step, n of them
//   scratch       rollout_scratch(c) floats
// Letters as in rollout_core.h.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>

#include "common/philox.h"
#include "tabular/model_based.inl"
#include "tabular/rollout.h"
#include "tabular/rollout_core.h"

namespace icrl::ICRL_ISA {
namespace {

constexpr int kBlock = 32;    // steps whose numbers are drawn at once
constexpr int kTogether = 8;  // records in step

struct Numbers {
  alignas(64) uint32_t place[kBlock], noise[kBlock], choice[kBlock], explore[kBlock];
  alignas(64) double normal[kBlock];
};

void draw_numbers(uint64_t seed, uint64_t record, uint64_t step, Numbers& out) {
#if defined(__AVX512F__)
  const __m512i m0 = _mm512_set1_epi64(kPhiloxM0), m1 = _mm512_set1_epi64(kPhiloxM1);
  for (int i = 0; i < kBlock; i += 8) {
    const __m512i at =
        _mm512_add_epi64(_mm512_set1_epi64(static_cast<int64_t>(step) + i), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
    __m512i c0 = at, c1 = _mm512_or_si512(_mm512_srli_epi64(at, 32), _mm512_set1_epi64(int64_t{kStep} << 24));
    __m512i c2 = _mm512_set1_epi64(static_cast<int64_t>(record)),
            c3 = _mm512_set1_epi64(static_cast<int64_t>(record >> 32));
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round, k0 += kPhiloxK0, k1 += kPhiloxK1) {  // upper halves are whatever they are
      const __m512i p0 = _mm512_mul_epu32(m0, c0), p1 = _mm512_mul_epu32(m1, c2);
      c0 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), c1, _mm512_set1_epi64(k0), 0x96);
      c2 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), c3, _mm512_set1_epi64(k1), 0x96);
      c1 = p1, c3 = p0;
    }
    const auto put = [i](uint32_t* to, __m512i x) {
      _mm256_store_si256(reinterpret_cast<__m256i*>(to + i), _mm512_cvtepi64_epi32(x));
    };
    put(out.place, c0), put(out.noise, c1), put(out.choice, c2), put(out.explore, c3);
  }
#elif defined(__AVX2__)
  const __m256i m0 = _mm256_set1_epi64x(kPhiloxM0), m1 = _mm256_set1_epi64x(kPhiloxM1);
  for (int i = 0; i < kBlock; i += 4) {
    const __m256i at =
        _mm256_add_epi64(_mm256_set1_epi64x(static_cast<int64_t>(step) + i), _mm256_setr_epi64x(0, 1, 2, 3));
    __m256i c0 = at, c1 = _mm256_or_si256(_mm256_srli_epi64(at, 32), _mm256_set1_epi64x(int64_t{kStep} << 24));
    __m256i c2 = _mm256_set1_epi64x(static_cast<int64_t>(record)),
            c3 = _mm256_set1_epi64x(static_cast<int64_t>(record >> 32));
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round, k0 += kPhiloxK0, k1 += kPhiloxK1) {
      const __m256i p0 = _mm256_mul_epu32(m0, c0), p1 = _mm256_mul_epu32(m1, c2);
      c0 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p1, 32), c1), _mm256_set1_epi64x(k0));
      c2 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p0, 32), c3), _mm256_set1_epi64x(k1));
      c1 = p1, c3 = p0;
    }
    const auto put = [i](uint32_t* to, __m256i x) {
      const __m256i even = _mm256_permutevar8x32_epi32(x, _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6));
      _mm_store_si128(reinterpret_cast<__m128i*>(to + i), _mm256_castsi256_si128(even));
    };
    put(out.place, c0), put(out.noise, c1), put(out.choice, c2), put(out.explore, c3);
  }
#else
  for (int i = 0; i < kBlock; ++i) {
    const Random4 x = philox(seed, record, step + static_cast<uint64_t>(i), kStep);
    out.place[i] = x.v[0], out.noise[i] = x.v[1], out.choice[i] = x.v[2], out.explore[i] = x.v[3];
  }
#endif
}

// normal() of each number: the middle of the distribution for all, then the tails (15%) together.
void draw_normals(Numbers& out) {
  alignas(64) double p[kBlock], q[kBlock], z[kBlock];
  int32_t at[kBlock];
  int n = 0;
  for (int i = 0; i < kBlock; ++i) {
    const double x = (out.noise[i] + 0.5) * 0x1p-32, y = x - 0.5;
    p[i] = x, q[i] = y, out.normal[i] = normal_middle(y);
  }
  for (int i = 0; i < kBlock; ++i) at[n] = i, n += std::fabs(q[i]) > 0.425;
  for (int k = 0; k < n; ++k) p[k] = p[at[k]], q[k] = q[at[k]];  // at[k] >= k: nothing is overwritten before its turn
  const int padded = (n + 7) & ~7;
  for (int k = n; k < padded; ++k) p[k] = 0.25, q[k] = -0.25;
  for (int k = 0; k < padded; ++k) z[k] = normal_tail(p[k], q[k]);
  for (int k = 0; k < n; ++k) out.normal[at[k]] = z[k];
}

bool noisy(const Record<FastOps>& r) {
  float most = 0;
  for (int64_t s = 0; s < r.ns; ++s) most = r.noise_state[s] > most ? r.noise_state[s] : most;
  for (int64_t i = 0; i < r.ns * r.A; ++i) most = r.noise_action[i] > most ? r.noise_action[i] : most;
  return most > 0;
}

// A learner, step by step: it needs each reward at once.
RolloutFault go_alone(Record<FastOps>& record, int64_t steps, Numbers& x) {
  const bool noise = noisy(record);
  for (int64_t from = 0; from < steps; from += kBlock) {
    const int size = steps - from < kBlock ? static_cast<int>(steps - from) : kBlock;
    draw_numbers(record.seed, record.number, static_cast<uint64_t>(record.step), x);
    if (noise) draw_normals(x);
    for (int i = 0; i < size && !record.fault.kind; ++i)
      record.advance<true>(from + i, x.place[i], x.choice[i], x.explore[i], [&] { return x.normal[i]; });
    if (record.fault.kind) return record.fault;
  }
  if (!record.fault.kind) record.store();
  return record.fault;
}

enum Source { kChoices, kUniform, kTable, kRandom, kOutside };  // where actions come from

// A record among others: only the way of its states is found step by step, the rest of a block of steps afterwards. One
// that meets what is out of range stays where it is, and its block is not written.
struct Lane {
  Record<FastOps> record;
  Numbers x;
  alignas(64) float place[kBlock];
  int16_t state[kBlock], action[kBlock], next[kBlock];
  uint8_t done[kBlock], behaviour[kBlock];
  int64_t at[kBlock];  // of the reward
  bool noise;
  uint32_t explores;  // bit i: step i of the block is uniform
  int64_t s;
  int last;  // the step of the block that truncates the episode, if it comes that far
  Source source;
  const int16_t* choices;
  const float* table;
  int64_t from;  // the block's first step, of this call

  void begin() { noise = noisy(record); }

  void turn() {  // an episode begins, or a block
    const Record<FastOps>& r = record;
    s = r.s;
    const int64_t left = r.horizon - r.elapsed - 1;  // elapsed counts from before the block
    last = static_cast<int>(left < 0 ? 0 : left < kBlock ? left : kBlock);
    const int64_t who = r.who;
    source = r.c->actions ? kOutside : who == r.P ? kUniform : who > r.P ? kRandom : r.choices ? kChoices : kTable;
    if (source == kChoices) choices = r.choices + who * r.S;
    if (source == kTable) table = r.probabilities + who * r.S * r.A;
  }

  void draw(int64_t from_, int size) {
    from = from_;
    draw_numbers(record.seed, record.number, static_cast<uint64_t>(record.step), x);
    if (noise) draw_normals(x);
    for (int i = 0; i < kBlock; ++i) place[i] = uniform(x.place[i]);
    explores = 0;
    if (record.epsilon > 0 && !record.c->actions)
      for (int i = 0; i < size; ++i)
        explores |=
            uint32_t{uniform(x.explore[i]) < record.epsilon - record.decay * static_cast<float>(record.step + i)} << i;
    turn();
  }

  inline __attribute__((always_inline)) void advance(int i) {
    const Record<FastOps>& r = record;
    int64_t a;
    if (source == kOutside)  // judged before
      a = r.c->actions[r.r * r.c->T + from + i];
    else if (source == kUniform || (explores >> i & 1))
      a = r.anything(x.choice[i], s);
    else if (source == kRandom)
      record.s = s, a = FastOps::search(record.random_row(), r.na, uniform(x.choice[i]));
    else {
      a = source == kChoices ? choices[s] : FastOps::search(table + s * r.A, r.na, uniform(x.choice[i]));
      if (__builtin_expect(r.no_action(a), 0)) return record.fail_action(from + i, s);
    }
    const int64_t sa = s * r.A + a, offset = r.offset[sa], first = r.window[2 * sa], length = r.window[2 * sa + 1];
    if (__builtin_expect(r.leaves(r.window + 2 * sa, offset), 0)) return fail(RolloutFault::row, sa);
    const int64_t j = FastOps::search(r.cumulative + offset, length, place[i]), to = first + j;
    if (__builtin_expect(j == length, 0)) return fail(RolloutFault::thresholds, sa);
    at[i] = offset + j;
    state[i] = static_cast<int16_t>(s), action[i] = static_cast<int16_t>(a), next[i] = static_cast<int16_t>(to);
    behaviour[i] = static_cast<uint8_t>(r.who);
    const int how = r.terminal[to] ? 1 : i >= last ? 2 : 0;
    done[i] = static_cast<uint8_t>(how);
    s = to;
    if (how) end_episode(i);
  }

  __attribute__((noinline)) void fail(RolloutFault::Kind kind, int64_t sa) {
    record.fail(kind, record.n * record.S * record.A + sa);
  }

  __attribute__((noinline)) void end_episode(int i) {
    const int64_t step = record.step;
    record.step += i + 1;
    record.begin_episode();
    record.step = step, record.elapsed = -(i + 1);  // write adds the block
    turn();
  }

  void write(int size) {
    Record<FastOps>& r = record;
    const RolloutOut& out = r.c->out;
    const int64_t o = r.r * r.c->T + from;
    float* gain = out.reward + o;
    for (int i = 0; i < size; ++i) gain[i] = r.reward[at[i]];
    if (noise)
      for (int i = 0; i < size; ++i) {
        const float std = r.noise_state[next[i]] + r.noise_action[state[i] * r.A + action[i]];
        const float noised = static_cast<float>(gain[i] + static_cast<double>(std) * x.normal[i]);
        gain[i] = std > 0 ? noised : gain[i];
      }
    const auto n = static_cast<size_t>(size);
    memcpy(out.next_state + o, next, 2 * n), memcpy(out.done + o, done, n);
    if (out.state) {
      memcpy(out.state + o, state, 2 * n), memcpy(out.action + o, action, 2 * n);
      if (r.c->actions)
        memset(out.behaviour + o, 255, n);
      else
        memcpy(out.behaviour + o, behaviour, n);
    }
    if (r.G == 4)
      for (int i = 0; i < size; ++i) memcpy(out.labels + (o + i) * 4, r.references + state[i] * 4, 8);
    else
      for (int i = 0; i < size; ++i)
        for (int64_t g = 0; g < r.G; ++g) out.labels[(o + i) * r.G + g] = r.references[state[i] * r.G + g];
    r.s = s, r.step += size, r.elapsed += size;
  }
};

RolloutFault go_together(Lane* lanes, int n, int64_t steps) {
  for (int k = 0; k < n; ++k) lanes[k].begin();
  for (int64_t from = 0; from < steps; from += kBlock) {
    const int size = steps - from < kBlock ? static_cast<int>(steps - from) : kBlock;
    for (int k = 0; k < n; ++k) lanes[k].draw(from, size);
    if (n == kTogether)
      for (int i = 0; i < size; ++i)
        for (int k = 0; k < kTogether; ++k) lanes[k].advance(i);
    else
      for (int i = 0; i < size; ++i)
        for (int k = 0; k < n; ++k) lanes[k].advance(i);
    for (int k = 0; k < n; ++k) {
      if (lanes[k].record.fault.kind) return lanes[k].record.fault;
      lanes[k].write(size);
    }
  }
  for (int k = 0; k < n; ++k)
    if (lanes[k].record.fault.kind) return lanes[k].record.fault;
  for (int k = 0; k < n; ++k) lanes[k].record.store();
  return {};
}

}  // namespace

// Records [from, to), up to the first fault, which is returned. scratch: rollout_scratch(c) floats.
RolloutFault rollout_records(const RolloutCall& c, int64_t from, int64_t to, float* scratch) {
  Lane lanes[kTogether];
  const int64_t each = Record<FastOps>::scratch_floats(c);
  int n = 0;
  for (int64_t r = from; r < to; ++r) {
    Record<FastOps>& record = lanes[n].record;
    record.load(c, r, scratch + n * each);
    RolloutFault fault;
    if (record.learns())
      fault = go_alone(record, c.T, lanes[n].x);
    else if (++n == kTogether)
      fault = go_together(lanes, n, c.T), n = 0;
    if (fault.kind) return fault;
  }
  return n ? go_together(lanes, n, c.T) : RolloutFault{};
}

int64_t rollout_scratch(const RolloutCall& c) { return kTogether * Record<FastOps>::scratch_floats(c); }

void model_based_history(const ModelHistory& h, int64_t r, float* scratch) { history<FastOps>(h, r, scratch); }

}  // namespace icrl::ICRL_ISA
