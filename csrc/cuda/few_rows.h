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

// Shared memory of who finishes groups.
template <class P>
struct Bench {
  double shares[P::kThreads];
  double G[P::kRows * P::kRows];
  double c[P::kRows * P::kRows];
  double rows[P::kWarps][(RowBench::kBytes + 7) / 8 * P::kRows];
  std::int32_t flag;
};

// True for all threads if it is for the first one.
template <class Who, class P>
__device__ inline bool spread(Who who, Bench<P>& bench, bool value) {
  if (who.thread() == 0) bench.flag = value;
  who.sync();
  const bool found = bench.flag != 0;
  who.sync();
  return found;
}

template <class P>
__device__ inline RowBench row_bench(Bench<P>& bench, int warp, std::int64_t T) {
  static_assert(P::kRows <= P::kWarps, "a warp a row");
  return RowBench(reinterpret_cast<char*>(bench.rows[warp]), T);
}

// What can be done before a group is measured. Whether this warp's row may be turned.
template <class Who, class P>
__device__ inline bool prepare_group(Who who, const Task& task, std::int64_t group, Bench<P>& bench) {
  const std::int64_t T = task.rows.T, row = who.warp();
  return task.vaccinates && row < T &&
         prepare_row(T, group, row, task.vaccine, row_bench(bench, who.warp(), T), bench.c + row * T);
}

// From the sums of a group's pieces first .. last - 1 to its matrix and, if the task vaccinates, to its weights.
template <class Who, class P>
__device__ inline void finish_group(Who who, const Task& task, std::int64_t group, int first, int last, bool may_turn,
                                    Bench<P>& bench) {
  const Triangle pairs{task.rows};
  const std::int64_t T = task.rows.T, row = who.warp();
  double* G = task.G + group * T * T;
  add_up(who, pairs, task.scratch.sums, first, last, 0, pairs.count(), bench.shares,
         [&](std::int64_t pair, double sum) {
           pairs.write(G, pair, sum);
           pairs.write(bench.G, pair, sum);
         });
  if (!task.vaccinates) return;
  if (may_turn) {
    solve_row(bench.G, T, group, row, task.vaccine, row_bench(bench, who.warp(), T), bench.c + row * T);
  }
  who.sync();
  for (std::int64_t j = who.thread(); j < T; j += who.threads()) {
    double weight = 0;
    for (std::int64_t i = 0; i < T; ++i) weight += bench.c[i * T + j];
    task.vaccine.weights[group * T + j] = weight;
    if (task.shows) show_number(task.scratch.shown + group * T + j, weight);
  }
  who.sync();
}

// Counts a piece, whose sums `who` has written, as measured; if it is the last one of its group, finishes the group.
template <class Who, class P>
__device__ inline void finish_piece(Who who, const Task& task, const Piece& piece, Bench<P>& bench) {
  who.sync();
  const bool finishes = who.thread() == 0 && arrive_last(task.scratch.counters + piece.group, piece.last - piece.first);
  if (!spread(who, bench, finishes)) return;
  const bool may_turn = prepare_group(who, task, piece.group, bench);
  finish_group(who, task, piece.group, piece.first, piece.last, may_turn, bench);
}

// A block measures a piece.
template <class E, class P>
__device__ inline void take_piece(const Task& task, std::int64_t index, Bench<P>& bench, double* tiles) {
  const WholeBlock who;
  const Piece piece = load_piece(task.plan, index);
  double* sums = task.scratch.sums + index * pairs_of(task.rows.T);
  if (piece.is_short()) {
    measure_exactly<E, 2>(who, Triangle{task.rows}, piece, sums);
  } else {
    measure_packed<E, P, P::template stretch<E>()>(task.rows, piece, who.warp(), tiles);
    who.sync();
    if (who.thread() < pairs_of(task.rows.T)) sums[who.thread()] = sum_of_tiles<P>(tiles, who.thread());
  }
  finish_piece(who, task, piece, bench);
}

}  // namespace gradvac::cuda
