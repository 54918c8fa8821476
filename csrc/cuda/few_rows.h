// Few rows: Gram matrix and coefficients of a group by the block that finishes the last of its pieces.
#pragma once

#include "coefficients.h"
#include "combine.h"

namespace gradvac::cuda {

struct Task {
  Rows rows;
  Plan plan;
  Scratch scratch;
  double* G;
  Vaccine vaccine;
  bool vaccinates;  // else the Gram matrices are all that is wanted
};

// Shared memory of a block.
template <class O>
struct Bench {
  static constexpr int kDoubles = O::kWarps * O::kPairs > O::kThreads ? O::kWarps * O::kPairs : O::kThreads;
  double sums[kDoubles];
  double G[O::kRows * O::kRows];
  double c[O::kRows * O::kRows];
  double weights[O::kRows];
  double rows[O::kWarps][4 * O::kRows];  // RowBench
  std::int32_t flag;
  std::int32_t unused[3];
};

static_assert(sizeof(Bench<Outer<2>>) % 16 == 0 && sizeof(Bench<Outer<4>>) % 16 == 0 &&
                  sizeof(Bench<Outer<8>>) % 16 == 0,
              "vectors follow");

// True for all threads if it is for the first one.
template <class O>
__device__ inline bool spread(Bench<O>& bench, bool value) {
  if (threadIdx.x == 0) bench.flag = value;
  __syncthreads();
  const bool found = bench.flag != 0;
  __syncthreads();
  return found;
}

template <class O>
__device__ inline void finish_group(const Task& task, std::int64_t group, std::int64_t first, std::int64_t last,
                                    Bench<O>& bench) {
  const std::int64_t T = task.rows.T;
  const int thread = static_cast<int>(threadIdx.x);
  double* G = task.G + group * T * T;
  add_up(Triangle{task.rows}, task.scratch.sums, first, last, 0, pairs_of(T), bench.sums, G);
  if (!task.vaccinates) return;
  for (std::int64_t e = thread; e < T * T; e += O::kThreads) bench.G[e] = load_shared_by_blocks(G + e);
  __syncthreads();
  const RowBench row_bench(reinterpret_cast<char*>(bench.rows[warp_of_block()]), T);
  for (std::int64_t row = warp_of_block(); row < T; row += O::kWarps) {
    solve_row(bench.G, T, group, row, task.vaccine, row_bench, bench.c + row * T);
    __syncwarp();
  }
  __syncthreads();
  for (std::int64_t j = thread; j < T; j += O::kThreads) {
    double weight = 0;
    for (std::int64_t i = 0; i < T; ++i) weight += bench.c[i * T + j];
    task.vaccine.weights[group * T + j] = weight;
  }
  __syncthreads();
}

__device__ inline bool is_short(const Piece& piece, bool is_one_piece) {
  return is_one_piece && piece.end - piece.begin <= kRun;
}

// Measures a piece; if it is the last one of its group to be finished, finishes the group, and says so.
template <class E, class O, class Keep>
__device__ inline bool take_piece(const Task& task, std::int64_t index, Bench<O>& bench, Keep keep) {
  const Piece piece = load_piece(task.plan.pieces, index);
  const std::int64_t first = load_constant(task.plan.first_piece + piece.group);
  const std::int64_t last = load_constant(task.plan.first_piece + piece.group + 1);
  double* sums = task.scratch.sums + index * pairs_of(task.rows.T);
  if (is_short(piece, last - first == 1)) {
    measure_exactly<E>(Triangle{task.rows}, piece, sums);
  } else {
    measure_outer<E, O>(task.rows, piece, bench.sums, sums, keep);
  }
  const bool finishes = threadIdx.x == 0 && arrive(task.scratch.counters + piece.group) == last - first - 1;
  if (!spread(bench, finishes)) return false;
  finish_group(task, piece.group, first, last, bench);
  return true;
}

}  // namespace gradvac::cuda
