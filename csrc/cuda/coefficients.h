// Coefficients: the inner loop of Algorithm 1 in Gram space. A warp makes a row of a group.
#pragma once

#include "gradvac/order.h"
#include "rows.h"

namespace gradvac::cuda {

// What a warp needs of shared memory for a row of T.
struct RowBench {
  double* v;         // [T], <g'_i, g_r>
  double* square;    // [T], |g_r|^2, NaN where a row has no known task
  double* hats;      // [T], similarity targets
  double* norm;      // [T], of `Other`: roots take long, and here all lanes take theirs together
  double* sin_goal;  // [T], likewise
  std::int32_t* order;

  static constexpr int kBytes = 5 * 8 + 4;  // of a row
  GRADVAC_HD static std::int64_t bytes(std::int64_t T) { return (kBytes * T + 7) / 8 * 8; }
  __device__ RowBench(char* memory, std::int64_t T)
      : v(reinterpret_cast<double*>(memory)),
        square(v + T),
        hats(square + T),
        norm(hats + T),
        sin_goal(norm + T),
        order(reinterpret_cast<std::int32_t*>(sin_goal + T)) {}
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

// Targets of a row's task, or null where one is for all.
__device__ inline double* targets_of(const Vaccine& vaccine, std::int64_t group, std::int64_t id) {
  return vaccine.ema == nullptr ? nullptr : vaccine.ema + (group * vaccine.N + id) * vaccine.N;
}

// What of a row does not depend on the Gram matrix: order, targets, and what is so if it is not turned. Whether it may
// be.
__device__ inline bool prepare_row(std::int64_t T, std::int64_t group, std::int64_t row, const Vaccine& vaccine,
                                   const RowBench& bench, double* c) {
  const int lane = lane_of_warp();
  const std::int64_t entry = (group * T + row) * T, id = task_of(vaccine, row);
  for (std::int64_t r = lane; r < T; r += kLanes) {
    c[r] = r == row ? 1.0 : 0.0;
    vaccine.similarity[entry + r] = __longlong_as_double(0x7FF8000000000000ll);
    vaccine.corrected[entry + r] = false;
  }
  bool may_turn = T > 1 && is_known(vaccine, id);
  if (vaccine.num_vaccinated >= 0) {
    bool named = false;
    for (std::int64_t v = 0; v < vaccine.num_vaccinated; ++v) named = named || vaccine.vaccinated[v] == id;
    may_turn = may_turn && named;
  }
  if (!may_turn) return false;
  const double* hats = targets_of(vaccine, group, id);
  for (std::int64_t r = lane; r < T; r += kLanes) {
    const std::int64_t other = task_of(vaccine, r);
    bench.hats[r] = hats == nullptr ? vaccine.target : is_known(vaccine, other) ? hats[other] : 0.0;
  }
  draw_order(vaccine, T, group, row, bench);
  return true;
}

// A row that was prepared and may be turned: its coefficients c [T], its similarities, what was turned, its targets. G
// [T, T], in any memory.
__device__ inline void solve_row(const double* G, std::int64_t T, std::int64_t group, std::int64_t row,
                                 const Vaccine& vaccine, const RowBench& bench, double* c) {
  const int lane = lane_of_warp();
  const std::int64_t entry = (group * T + row) * T;
  double* hats = targets_of(vaccine, group, task_of(vaccine, row));
  for (std::int64_t r = lane; r < T; r += kLanes) {
    const bool known = is_known(vaccine, task_of(vaccine, r));
    const Other other(known ? G[r * T + r] : __longlong_as_double(0x7FF8000000000000ll), bench.hats[r], vaccine.rule);
    bench.square[r] = other.square;
    bench.norm[r] = other.norm;
    bench.sin_goal[r] = other.sin_goal;
    bench.v[r] = G[row * T + r];
  }
  __syncwarp();
  if (!vaccine.rule.limits.usable(bench.square[row])) return;
  Row state(bench.square[row]);
  for (std::int64_t t = 0; t < T - 1; ++t) {
    const std::int64_t j = bench.order[t];
    if (j < 0) continue;
    const double hat = bench.hats[j];
    const Other other(bench.square[j], bench.norm[j], hat, bench.sin_goal[j], vaccine.rule);
    const Meeting meeting = state.meet(bench.v[j], other, vaccine.rule);
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
