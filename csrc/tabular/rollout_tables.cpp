// Tasks made ready for simulation: see icrl_kernels/tabular/rollout_tables.py for the shapes.
#include <pybind11/pybind11.h>

#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "common/parallel.h"

namespace icrl {
namespace {

constexpr double kEntryNanoseconds = 0.5;  // about what an entry of a dense table takes

struct Tasks {
  const float *transition, *reward;         // dense [N,S,A,S], or the packed values
  const int64_t* offset;                    // [N,S,A], or null where dense
  const int32_t *first, *length;            // [N,S,A], or null
  const uint8_t* terminal;                  // [N,S]
  const int64_t *num_states, *num_actions;  // [N]
  const uint8_t* action_mask;               // [N,S,A], or null: every state has all of its task's actions
  int64_t N, S, A;

  bool left(int64_t n, int64_t s, int64_t a) const {  // whether a step can start there
    return s < num_states[n] && a < num_actions[n] && !terminal[n * S + s] &&
           (!action_mask || action_mask[(n * S + s) * A + a]);
  }
  int64_t from(int64_t row) const { return offset ? first[row] : 0; }  // the first stored successor
  int64_t at(int64_t row) const { return offset ? offset[row] : row * S; }
};

Tasks tasks(uintptr_t transition, uintptr_t reward, uintptr_t offset, uintptr_t first, uintptr_t length,
            uintptr_t terminal, uintptr_t num_states, uintptr_t num_actions, uintptr_t action_mask, int64_t N,
            int64_t S, int64_t A) {
  return {reinterpret_cast<const float*>(transition),
          reinterpret_cast<const float*>(reward),
          reinterpret_cast<const int64_t*>(offset),
          reinterpret_cast<const int32_t*>(first),
          reinterpret_cast<const int32_t*>(length),
          reinterpret_cast<const uint8_t*>(terminal),
          reinterpret_cast<const int64_t*>(num_states),
          reinterpret_cast<const int64_t*>(num_actions),
          reinterpret_cast<const uint8_t*>(action_mask),
          N,
          S,
          A};
}

// The first and past the last entry that is not zero; sixteen at a time, as most of a dense row lies outside its
// window.
std::pair<int64_t, int64_t> window_of(const float* p, int64_t n) {
  const auto zeros = [&](int64_t j) {
    bool any = false;
    for (int64_t k = j; k < j + 16; ++k) any |= p[k] != 0;
    return !any;
  };
  int64_t low = 0, high = n;
  while (low + 16 <= n && zeros(low)) low += 16;
  while (low < n && p[low] == 0) ++low;
  while (high - 16 > low && zeros(high - 16)) high -= 16;
  while (high > low && p[high - 1] == 0) --high;
  return {low, high};
}

// window [N,S,A,2]: first successor, how many; none where no step can start. Returns the first row with mass past its
// task's own states, or -1.
int64_t rollout_windows(uintptr_t transition, uintptr_t offset, uintptr_t first, uintptr_t length, uintptr_t terminal,
                        uintptr_t num_states, uintptr_t num_actions, uintptr_t action_mask, uintptr_t window_,
                        int64_t N, int64_t S, int64_t A, int threads) {
  const Tasks t = tasks(transition, 0, offset, first, length, terminal, num_states, num_actions, action_mask, N, S, A);
  auto* window = reinterpret_cast<int16_t*>(window_);
  std::vector<int64_t> bad(static_cast<size_t>(N), -1);
  parallel_for(N, team_for(kEntryNanoseconds * static_cast<double>(N * S * A * S), threads), [&](int64_t n) {
    for (int64_t s = 0; s < S; ++s)
      for (int64_t a = 0; a < A; ++a) {
        const int64_t row = (n * S + s) * A + a;
        int16_t* w = window + 2 * row;
        w[0] = w[1] = 0;
        if (!t.left(n, s, a)) continue;
        const int64_t size = t.offset ? t.length[row] : S;
        auto [low, high] = window_of(t.transition + t.at(row), size);
        if (low == high) continue;
        low += t.from(row), high += t.from(row);
        if (high > t.num_states[n] && bad[static_cast<size_t>(n)] < 0) bad[static_cast<size_t>(n)] = row;
        w[0] = static_cast<int16_t>(low), w[1] = static_cast<int16_t>(high - low);
      }
  });
  for (const int64_t row : bad)
    if (row >= 0) return row;
  return -1;
}

// Cumulative sums; the last positive entry becomes 2, so that no rounding can run past it. False for negative, NaN or
// infinite entries or a sum that is not 1.
bool accumulate(const float* p, int64_t n, float* c) {
  double sum = 0;
  bool ok = n > 0;
  for (int64_t j = 0; j < n; ++j) {
    ok &= p[j] >= 0;
    sum += p[j];
    c[j] = static_cast<float>(sum);
  }
  if (n > 0) c[n - 1] = 2;
  return ok && std::fabs(sum - 1) <= 1e-4;
}

// Fills cumulative at `offset_out`, and reward_out where it is not null. Returns (kind, flat index) of the first bad
// entry; kind: 0 none, 1 transition row, 2 reward row, 3 start row.
std::pair<int, int64_t> rollout_tables(uintptr_t transition, uintptr_t reward, uintptr_t offset, uintptr_t first,
                                       uintptr_t length, uintptr_t terminal, uintptr_t num_states,
                                       uintptr_t num_actions, uintptr_t action_mask, uintptr_t start_,
                                       uintptr_t window_, uintptr_t offset_out_, uintptr_t cumulative_,
                                       uintptr_t reward_out_, uintptr_t start_cumulative_, int64_t N, int64_t S,
                                       int64_t A, int threads) {
  const Tasks t =
      tasks(transition, reward, offset, first, length, terminal, num_states, num_actions, action_mask, N, S, A);
  const auto* start = reinterpret_cast<const float*>(start_);
  const auto* window = reinterpret_cast<const int16_t*>(window_);
  const auto* offset_out = reinterpret_cast<const int64_t*>(offset_out_);
  auto *cumulative = reinterpret_cast<float*>(cumulative_), *reward_out = reinterpret_cast<float*>(reward_out_);
  auto* start_cumulative = reinterpret_cast<float*>(start_cumulative_);
  std::vector<std::pair<int, int64_t>> bad(static_cast<size_t>(N));
  parallel_for(N, team_for(kEntryNanoseconds * static_cast<double>(N * S * A * S), threads), [&](int64_t n) {
    auto& fault = bad[static_cast<size_t>(n)];
    const int64_t ns = t.num_states[n];
    float* c = start_cumulative + n * S;
    const float* p = start + n * S;
    const auto [low, high] = window_of(p, S);
    bool ok = high <= ns && accumulate(p + low, high - low, c + low);
    for (int64_t s = 0; s < low; ++s) c[s] = 0;
    for (int64_t s = high; s < S; ++s) c[s] = 2;
    for (int64_t s = low; s < high && ok; ++s) ok = !(t.terminal[n * S + s] && p[s] > 0);
    if (!ok) fault = {3, n};
    for (int64_t s = 0; s < S && !fault.first; ++s)
      for (int64_t a = 0; a < A && !fault.first; ++a) {
        const int64_t row = (n * S + s) * A + a, w = window[2 * row + 1];
        if (!t.left(n, s, a)) continue;
        const int64_t from = t.at(row) + window[2 * row] - t.from(row), to = offset_out[row];
        if (!accumulate(t.transition + from, w, cumulative + to)) {
          fault = {1, row};
          continue;
        }
        ok = true;
        for (int64_t j = 0; j < w; ++j) ok &= std::isfinite(t.reward[from + j]);
        if (!ok) fault = {2, row};
        for (int64_t j = 0; j < w && reward_out; ++j) reward_out[to + j] = t.reward[from + j];
      }
  });
  for (const auto& b : bad)
    if (b.first) return b;
  return {0, 0};
}

}  // namespace

void bind_rollout_tables(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("rollout_windows", &rollout_windows, py::call_guard<py::gil_scoped_release>());
  m.def("rollout_tables", &rollout_tables, py::call_guard<py::gil_scoped_release>());
}

}  // namespace icrl
