// Few rows: Gram matrix and coefficients of a group by the block that finishes the last of its pieces.
#pragma once

#include "coefficients.h"
#include "combine.h"
#include "matrix.h"

namespace gradvac::cuda {

struct Task {
  Rows rows;
  Plan plan;
  Scratch scratch;
  double* G;
  Vaccine vaccine;
  bool vaccinates;  // else the Gram matrices are all that is wanted
  bool shows;       // the weights to others, who wait for them
};

// Shared memory of a block.
template <class P>
struct FewRowsMemory {
  double tiles[P::kWarps * P::kPlaces];
  double shares[P::kThreads];
  double G[P::kRows * P::kRows];
  double c[P::kRows * P::kRows];
  double rows[P::kWarps][(RowBench::kBytes + 7) / 8 * P::kRows];
  std::int32_t flag;
};

// From the sums of a group's pieces to its matrix and, if the task vaccinates, to its weights.
template <class P>
__device__ inline void finish_group(const Task& task, const Piece& last, FewRowsMemory<P>& memory) {
  static_assert(P::kRows <= P::kWarps, "a warp a row");
  const Triangle pairs{task.rows};
  const std::int64_t T = task.rows.T, group = last.group, row = warp_of_block();
  const RowBench bench(reinterpret_cast<char*>(memory.rows[row]), T);
  double *G = task.G + group * T * T, *c = memory.c + row * T;
  const bool may_turn = task.vaccinates && row < T && prepare_row(T, group, row, task.vaccine, bench, c);
  add_up(pairs, task.scratch.sums, last.first, last.last, 0, pairs.count(), memory.shares,
         [&](std::int64_t pair, double sum) {
           pairs.write(G, pair, sum);
           pairs.write(memory.G, pair, sum);
         });
  if (!task.vaccinates) return;
  if (may_turn) solve_row(memory.G, T, group, row, task.vaccine, bench, c);
  __syncthreads();
  for (std::int64_t j = thread_of_block(); j < T; j += threads_of_block()) {
    double weight = 0;
    for (std::int64_t i = 0; i < T; ++i) weight += memory.c[i * T + j];
    task.vaccine.weights[group * T + j] = weight;
    if (task.shows) show_number(task.scratch.shown + group * T + j, weight);
  }
}

// Measures a piece, with loads of kAtOnce vectors under way together. The block that measures the last one of a group
// finishes the group.
template <class E, int kAtOnce, class P>
__device__ inline void take_piece(const Task& task, std::int64_t index, FewRowsMemory<P>& memory) {
  const Piece piece = load_piece(task.plan, index);
  const int thread = thread_of_block();
  double* sums = task.scratch.sums + index * pairs_of(task.rows.T);
  if (piece.is_short()) {
    measure_exactly<E, 2>(Triangle{task.rows}, piece, sums);
  } else {
    measure_packed<E, P, kAtOnce>(task.rows, piece, memory.tiles);
    __syncthreads();
    if (thread < pairs_of(task.rows.T)) sums[thread] = sum_of_tiles<P>(memory.tiles, place_of_pair<P>(thread));
  }
  __syncthreads();
  if (thread == 0) {
    memory.flag = arrive_last(task.scratch.counters + piece.group, piece.last - piece.first);
  }
  __syncthreads();
  if (memory.flag) finish_group(task, piece, memory);
}

}  // namespace gradvac::cuda
