// One pass: a persistent launch that combines a group while its columns are still on the chip.
//
// All blocks are resident. Piece p belongs to block p mod blocks, which measures its pieces in order and keeps the
// vectors that it read last in shared memory, each thread its own. As soon as a group's weights are there, the block
// combines its pieces of that group, the last ones first: from what it kept or, where that was overwritten, from the
// buffer, which the second-level cache may still hold. A block waits for others only when it has measured all its
// pieces; the others then need nothing from it.
#pragma once

#include "few_rows.h"

namespace gradvac::cuda {

template <class E, class O>
struct OnePass {
  static constexpr int kStep = O::kThreads * E::kWidth;  // columns
  static constexpr int kBlocks = 3;                      // of a multiprocessor: more to remember than in two passes
  static_assert(kRun % kStep == 0, "a run is whole steps");

  const Task& task;
  const Result& out;
  Bench<O>& bench;
  Vector* kept;    // [slots][T][threads]
  int slots;       // steps
  int steps = 0;   // measured and shown to `keep` so far; step s is in slot s % slots until s + slots
  int before = 0;  // of those, how many lie in groups that were combined

  __device__ Vector* place(int step) const {
    return kept + step % slots * static_cast<int>(task.rows.T) * O::kThreads + threadIdx.x;
  }

  __device__ void measure(int index) {
    const bool finished = take_piece<E>(task, index, bench, [&](const Vector(&vectors)[O::kRows]) {
      if (slots > 0) {
        Vector* p = place(steps);
#pragma unroll
        for (int i = 0; i < O::kRows; ++i) {
          if (i < task.rows.T) p[i * O::kThreads] = vectors[i];
        }
      }
      ++steps;
    });
    if (finished && threadIdx.x == 0)
      publish(ready(load_constant(task.plan.pieces + 3 * static_cast<std::int64_t>(index))));
  }

  __device__ std::int32_t* ready(std::int64_t group) const { return task.scratch.counters + task.plan.K + group; }

  __device__ void combine_step(const Piece& piece, int k, const Vector* from) const {
    const std::int64_t column = piece.begin + (static_cast<std::int64_t>(k) * kStep + threadIdx.x * E::kWidth);
    if (column >= piece.end) return;
    const bool fits = column + E::kWidth <= piece.end && piece.begin % 8 == 0;
    double values[E::kWidth] = {};
    Vector vectors[O::kRows];
    if (from == nullptr) {
      load_rows<E, O>(vectors, task.rows, column, piece.end, fits && task.rows.aligned);
    } else {
#pragma unroll
      for (int i = 0; i < O::kRows; ++i) {
        if (i < task.rows.T) vectors[i] = from[i * O::kThreads];
      }
    }
#pragma unroll
    for (int i = 0; i < O::kRows; ++i) {
      if (i < task.rows.T) {
#pragma unroll
        for (int w = 0; w < E::kWidth; ++w) {
          values[w] = fma(bench.weights[i], static_cast<double>(E::number(vectors[i], w)), values[w]);
        }
      }
    }
    store(out, column, piece.end, fits && out.aligned, values);
  }

  // This block's pieces of a group whose weights are there.
  __device__ void combine(int group, int first_own, int last_own, bool is_one_piece) {
    const int T = static_cast<int>(task.rows.T), blocks = static_cast<int>(gridDim.x);
    for (int j = threadIdx.x; j < T; j += O::kThreads) {
      // No thread still reads the last ones: all have met since, in `spread`.
      bench.weights[j] = load_shared_by_blocks(task.vaccine.weights + static_cast<std::int64_t>(group) * T + j);
    }
    __syncthreads();
    int end = before;
    for (int index = first_own; index <= last_own; index += blocks) {
      const Piece piece = load_piece(task.plan.pieces, index);
      if (!is_short(piece, is_one_piece)) end += steps_of(piece);
    }
    int step = end;  // of the one after what is combined next
    for (int index = last_own; index >= first_own; index -= blocks) {
      const Piece piece = load_piece(task.plan.pieces, index);
      const bool was_kept = !is_short(piece, is_one_piece);
      for (int k = steps_of(piece) - 1; k >= 0; --k) {
        if (was_kept) --step;
        combine_step(piece, k, was_kept && step + slots >= steps ? place(step) : nullptr);
      }
    }
    before = end;
  }

  // Combines the groups from `group` on whose pieces of this block, all before `next`, are measured and whose weights
  // are there; returns the first that is left.
  __device__ int combine_from(int group, int next) {
    const int blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
    for (; group < static_cast<int>(task.plan.K); ++group) {
      const int first = static_cast<int>(load_constant(task.plan.first_piece + group));
      const int last = static_cast<int>(load_constant(task.plan.first_piece + group + 1)) - 1;
      const int first_own = first + (block - first % blocks + blocks) % blocks;
      if (first_own > last) continue;
      const int last_own = first_own + (last - first_own) / blocks * blocks;
      if (last_own >= next || !spread(bench, threadIdx.x == 0 && is_published(ready(group)))) break;
      combine(group, first_own, last_own, first == last);
    }
    return group;
  }

  __device__ void run() {
    const int pieces = static_cast<int>(task.plan.num_pieces), blocks = static_cast<int>(gridDim.x);
    int group = 0;
    for (int index = static_cast<int>(blockIdx.x); index < pieces; index += blocks) {
      measure(index);
      group = combine_from(group, index + 1);
    }
    for (int polls = 0; group < static_cast<int>(task.plan.K); ++polls) {
      const int before = group;
      group = combine_from(group, pieces);
      if (group > before) polls = 0;
      if (polls > kMostPolls) give_up();
      wait_a_little();
    }
  }

  __device__ static int steps_of(const Piece& piece) {
    return static_cast<int>((piece.end - piece.begin + kStep - 1) / kStep);
  }
};

}  // namespace gradvac::cuda
