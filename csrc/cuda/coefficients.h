// Coefficients: the inner loop of Algorithm 1 in Gram space. A warp makes a row of a group.
#pragma once

#include "gradvac/order.h"
#include "rows.h"

namespace gradvac::cuda {

// What a warp needs of shared memory for a row of T.
struct RowBench {
  double* v;       // [T], <g'_i, g_r>
  double* square;  // [T], |g_r|^2, NaN where a row has no known task
  double* hats;    // [T], similarity targets
  std::int32_t* order;

  GRADVAC_HD static std::int64_t bytes(std::int64_t T) { return (3 * 8 * T + 4 * T + 7) / 8 * 8; }
  __device__ RowBench(char* memory, std::int64_t T)
      : v(reinterpret_cast<double*>(memory)),
        square(v + T),
        hats(square + T),
        order(reinterpret_cast<std::int32_t*>(hats + T)) {}
};

__device__ inline std::int64_t task_of(const Vaccine& vaccine, std::int64_t row) {
  return vaccine.task_ids == nullptr ? row : vaccine.task_ids[row];
}
__device__ inline bool is_known(const Vaccine& vaccine, std::int64_t id) {
  return id >= 0 && (vaccine.ema == nullptr || id < vaccine.N);
}

// Ranks the other rows, or takes over the order that was given; what is no other row becomes -1.
__device__ inline void draw_order(const Vaccine& vaccine, std::int64_t T, std::int64_t group, std::int64_t row,
                                  const RowBench& bench) {
  const int lane = lane_of_warp();
  if (vaccine.order != nullptr) {
    for (std::int64_t t = lane; t < T - 1; t += kLanes) {
      const std::int64_t j = vaccine.order[(group * T + row) * (T - 1) + t];
      bench.order[t] = j >= 0 && j < T && j != row ? static_cast<std::int32_t>(j) : -1;
    }
    __syncwarp();
    return;
  }
  const std::int64_t step = vaccine.counter == nullptr ? vaccine.step : *vaccine.counter;
  const std::uint64_t state = order_state(vaccine.seed, step, vaccine.first_group + group, row);
  double* keys = bench.v;  // as bits; not in use yet
  for (std::int64_t r = lane; r < T; r += kLanes) {
    keys[r] = __longlong_as_double(static_cast<long long>(order_key(state, r)));
  }
  __syncwarp();
  for (std::int64_t j = lane; j < T; j += kLanes) {
    const long long key = __double_as_longlong(keys[j]);
    std::int64_t rank = 0;
    for (std::int64_t r = 0; r < T; ++r) {
      const long long other = __double_as_longlong(keys[r]);
      rank += r != row && (other < key || (other == key && r < j));
    }
    if (j != row) bench.order[rank] = static_cast<std::int32_t>(j);
  }
  __syncwarp();
}

// One row: its coefficients c [T], its similarities, what was turned, its targets. G [T, T], in any memory.
__device__ inline void solve_row(const double* G, std::int64_t T, std::int64_t group, std::int64_t row,
                                 const Vaccine& vaccine, const RowBench& bench, double* c) {
  const int lane = lane_of_warp();
  const std::int64_t entry = (group * T + row) * T, id = task_of(vaccine, row);
  for (std::int64_t r = lane; r < T; r += kLanes) {
    const bool known = is_known(vaccine, task_of(vaccine, r));
    c[r] = r == row ? 1.0 : 0.0;
    bench.square[r] = known ? G[r * T + r] : __longlong_as_double(0x7FF8000000000000ll);
    vaccine.similarity[entry + r] = __longlong_as_double(0x7FF8000000000000ll);
    vaccine.corrected[entry + r] = false;
  }
  __syncwarp();
  bool turnable = T > 1 && vaccine.rule.limits.usable(bench.square[row]);
  if (vaccine.num_vaccinated >= 0) {
    bool named = false;
    for (std::int64_t v = 0; v < vaccine.num_vaccinated; ++v) named = named || vaccine.vaccinated[v] == id;
    turnable = turnable && named;
  }
  if (!turnable) return;

  draw_order(vaccine, T, group, row, bench);
  double* hats = vaccine.ema == nullptr ? nullptr : vaccine.ema + (group * vaccine.N + id) * vaccine.N;
  for (std::int64_t r = lane; r < T; r += kLanes) {
    const std::int64_t other = task_of(vaccine, r);
    bench.v[r] = G[row * T + r];
    bench.hats[r] = hats == nullptr ? vaccine.target : is_known(vaccine, other) ? hats[other] : 0.0;
  }
  __syncwarp();
  Row state(bench.square[row]);
  for (std::int64_t t = 0; t < T - 1; ++t) {
    const std::int64_t j = bench.order[t];
    if (j < 0) continue;
    const double hat = bench.hats[j];
    const Meeting meeting = state.meet(bench.v[j], bench.square[j], hat, vaccine.rule);
    if (!meeting.measured) continue;
    __syncwarp();  // all have read v[j] and its target
    if (meeting.turned) {
      for (std::int64_t r = lane; r < T; r += kLanes) bench.v[r] += meeting.a * G[j * T + r];
    }
    if (lane == 0) {
      vaccine.similarity[entry + j] = meeting.phi;
      if (meeting.turned) {
        vaccine.corrected[entry + j] = true;
        c[j] += meeting.a;
      }
      if (hats != nullptr) {
        bench.hats[j] = moving_average(hat, meeting.phi, vaccine.rule.beta);
        hats[task_of(vaccine, j)] = bench.hats[j];
      }
    }
    __syncwarp();
  }
}

}  // namespace gradvac::cuda
