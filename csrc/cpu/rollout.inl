// The simulator with vectors: the numbers of many steps are drawn at once, and records that learn nothing go in step with one
// another, so that one's loads are under way while another's arrive. The bits are those of simulate_plain.
namespace {

#include "cpu/model_based.inl"

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
    const __m512i at = _mm512_add_epi64(_mm512_set1_epi64(static_cast<int64_t>(step) + i), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
    __m512i c0 = at, c1 = _mm512_or_si512(_mm512_srli_epi64(at, 32), _mm512_set1_epi64(int64_t{kStep} << 24));
    __m512i c2 = _mm512_set1_epi64(static_cast<int64_t>(record)), c3 = _mm512_set1_epi64(static_cast<int64_t>(record >> 32));
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
    const __m256i at = _mm256_add_epi64(_mm256_set1_epi64x(static_cast<int64_t>(step) + i), _mm256_setr_epi64x(0, 1, 2, 3));
    __m256i c0 = at, c1 = _mm256_or_si256(_mm256_srli_epi64(at, 32), _mm256_set1_epi64x(int64_t{kStep} << 24));
    __m256i c2 = _mm256_set1_epi64x(static_cast<int64_t>(record)), c3 = _mm256_set1_epi64x(static_cast<int64_t>(record >> 32));
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

template <bool kLearns>
void go(Record<FastOps>* records, int n, int64_t steps, Numbers* numbers) {
  bool noise[kTogether];
  for (int k = 0; k < n; ++k) noise[k] = noisy(records[k]);
  for (int64_t from = 0; from < steps; from += kBlock) {
    const int size = steps - from < kBlock ? static_cast<int>(steps - from) : kBlock;
    for (int k = 0; k < n; ++k) {
      draw_numbers(records[k].seed, records[k].number, static_cast<uint64_t>(records[k].step), numbers[k]);
      if (noise[k]) draw_normals(numbers[k]);
    }
    for (int i = 0; i < size; ++i)
      for (int k = 0; k < n; ++k) {
        const Numbers& x = numbers[k];
        records[k].advance<kLearns>(from + i, x.place[i], x.choice[i], x.explore[i], [&] { return x.normal[i]; });
      }
  }
  for (int k = 0; k < n; ++k) records[k].store();
}

}  // namespace

// Records [from, to). scratch: rollout_scratch(c) floats.
void rollout_records(const RolloutCall& c, int64_t from, int64_t to, float* scratch) {
  Record<FastOps> records[kTogether];
  Numbers numbers[kTogether];
  const int64_t each = Record<FastOps>::scratch_floats(c);
  int n = 0;
  for (int64_t r = from; r < to; ++r) {
    records[n].load(c, r, scratch + n * each);
    if (records[n].learns())
      go<true>(records + n, 1, c.T, numbers);
    else if (++n == kTogether)
      go<false>(records, n, c.T, numbers), n = 0;
  }
  if (n) go<false>(records, n, c.T, numbers);
}

int64_t rollout_scratch(const RolloutCall& c) { return kTogether * Record<FastOps>::scratch_floats(c); }

// scratch: zeros, history_scratch(h) floats.
void model_based_history(const ModelHistory& h, int64_t r, float* scratch) { history<FastOps>(h, r, scratch); }
