// One pass: a persistent launch that combines a group while its columns are still on the chip.
//
// All blocks are resident. Piece p belongs to block p mod blocks, and group k to block k mod blocks. In each block,
// some warps measure its pieces, in order; some wait for its groups to be measured and solve them; and some combine its
// pieces, group by group, the last ones first: from the caches of the multiprocessor that read them, and of the chip.
// Those who measure are never further ahead of those who combine than the caches reach, but for the rest of a group.
// Nobody waits for a later group, so the earliest one that is not combined always goes on.
//
// What takes the time is not the work but the latency of each step of it. So the warps of a block do not wait for each
// other: they measure into one of several slots, take turns in counting the pieces that are there, and ask for the next
// piece before they go on with this one. That the block which counts the last piece of a group solved it would not do:
// it would fall behind, and count the last piece of the next group as well.
#pragma once

#include "few_rows.h"

namespace gradvac::cuda {

constexpr int kSlots = 8;           // pieces that are measured and not counted
constexpr int kCombiningWarps = 8;  // of a block

// Shared memory of a block. Counters count from the start.
template <class P>
struct OnePassMemory {
  Bench<P> bench;
  double tiles[kSlots][P::kWarps * P::kPlaces];
  double weights[kCombiningWarps][P::kRows];
  std::int32_t filled[kSlots];   // warps that have measured their share of the piece there
  std::int32_t counted[kSlots];  // pieces there that were counted
  std::int32_t combined;         // columns
  std::int32_t next_group;       // to be combined
};

template <class E, class P>
struct OnePass {
  using Measuring = Team<1, 0, P::kWarps>;
  using Solving = Team<2, P::kWarps, P::kWarps>;
  using Combining = Team<3, 2 * P::kWarps, kCombiningWarps>;
  static constexpr int kThreads = (2 * P::kWarps + kCombiningWarps) * kLanes;

  const Task& task;
  const Result& out;
  int window;  // columns of a block that the caches hold
  OnePassMemory<P>& memory;

  __device__ int pieces() const { return static_cast<int>(task.plan.num_pieces); }

  template <class Happened>
  __device__ static void wait_until(Happened happened) {
    for (int polls = 0; !happened(); ++polls) {
      if (polls > kMostPolls) give_up();
      wait_a_little();
    }
  }
  // By a warp.
  template <class Happened>
  __device__ static void wait_together(Happened happened) {
    if (lane_of_warp() == 0) wait_until(happened);
    __syncwarp();
  }

  // Counts a piece that all warps have measured, into a slot; by one warp.
  __device__ void count(int index, const Piece& piece, int slot) const {
    if (!piece.is_short()) {
      double* sums = task.scratch.sums + index * pairs_of(task.rows.T);
      for (int pair = lane_of_warp(); pair < pairs_of(task.rows.T); pair += kLanes) {
        sums[pair] = sum_of_tiles<P>(memory.tiles[slot], pair);
      }
    }
    __syncwarp();
    if (lane_of_warp() == 0) {
      count_in_block(&memory.counted[slot]);
      arrive(task.scratch.counters + piece.group);
    }
    __syncwarp();
  }

  __device__ void measure() const {
    const int blocks = static_cast<int>(gridDim.x), warp = Measuring::warp();
    int columns = 0, used = 0;
    Piece next = load_piece(task.plan, blockIdx.x);
    for (int index = static_cast<int>(blockIdx.x); index < pieces(); index += blocks, ++used) {
      const Piece piece = next;
      if (index + blocks < pieces()) next = load_piece(task.plan, index + blocks);
      columns += static_cast<int>(piece.end - piece.begin);
      const int slot = used % kSlots, before = used / kSlots;
      wait_together([&] {
        return seen_in_block(&memory.counted[slot]) == before && (columns - seen_in_block(&memory.combined) <= window ||
                                                                  piece.group <= seen_in_block(&memory.next_group));
      });
      if (piece.is_short()) {
        measure_exactly<E, 2>(Measuring(), Triangle{task.rows}, piece,
                              task.scratch.sums + index * pairs_of(task.rows.T));
      } else {
        measure_packed<E, P, 8>(task.rows, piece, warp, memory.tiles[slot]);
      }
      __syncwarp();
      if (lane_of_warp() == 0) count_in_block(&memory.filled[slot]);
      if (used % P::kWarps == warp) {
        wait_together([&] { return seen_in_block(&memory.filled[slot]) == (before + 1) * P::kWarps; });
        count(index, piece, slot);
      }
    }
  }

  __device__ void solve() const {
    const Solving who;
    for (int group = static_cast<int>(blockIdx.x); group < static_cast<int>(task.plan.K);
         group += static_cast<int>(gridDim.x)) {
      const int first = static_cast<int>(load_constant(task.plan.first_piece + group));
      const int last = static_cast<int>(load_constant(task.plan.first_piece + group + 1));
      const bool may_turn = prepare_group(who, task, group, memory.bench);
      if (who.thread() == 0) wait_until([&] { return have_arrived(task.scratch.counters + group, last - first); });
      who.sync();
      finish_group(who, task, group, first, last, may_turn, memory.bench);
    }
  }

  // Of this block's pieces: the last one of the group that begins with piece `first`, or of the next one that has any;
  // -1 after the last of them.
  __device__ int last_own_piece(int first) const {
    const int blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
    const int own = block + (first - block + blocks - 1) / blocks * blocks;
    if (own >= pieces()) return -1;
    const int last = static_cast<int>(load_constant(task.plan.pieces + 5 * own + 4));
    return own + (last - 1 - own) / blocks * blocks;
  }

  // A warp's share of a piece, in vectors: every kCombiningWarps-th of its lanes' worth, from the `first` one on.
  struct Share {
    int first;
    __device__ int thread() const { return first * kLanes + lane_of_warp(); }
    __device__ static constexpr int threads() { return kCombiningWarps * kLanes; }
  };

  // Half of the rows are asked for while the other half is added.
  __device__ void combine_piece(Share who, const Piece& piece, const double* weights) const {
    constexpr int kHalf = P::kRows / 2, kWidth = E::kWidth, kStep = Share::threads() * kWidth;
    const bool aligned = task.rows.aligned && out.aligned && piece.begin % 8 == 0;
    const int length = static_cast<int>(piece.end - piece.begin), end = aligned ? length - length % kWidth : 0;
    const typename E::Stored* numbers = task.rows.row<E>(0) + piece.begin;
    Vector vectors[2][kHalf];
    const auto load = [&](int half, int start) {
#pragma unroll
      for (int u = 0; u < kHalf; ++u) {
        const int row = half * kHalf + u;
        vectors[half][u] = row < task.rows.T && start < end
                               ? load_whole<E>(numbers + row * task.rows.row_stride + start)
                               : Vector{{0, 0, 0, 0}};
      }
    };
    int start = who.thread() * kWidth;
    load(0, start);
    for (; start < end; start += kStep) {
      double values[kWidth] = {};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (half == 0) {
          load(1, start);
        } else {
          load(0, start + kStep);
        }
#pragma unroll
        for (int u = 0; u < kHalf; ++u) {
          const int row = half * kHalf + u;
          const double weight = row < task.rows.T ? weights[row] : 0.0;
#pragma unroll
          for (int w = 0; w < kWidth; ++w) {
            values[w] = fma(weight, static_cast<double>(E::number(vectors[half][u], w)), values[w]);
          }
        }
      }
      store(out, piece.begin + start, values);
    }
    combine_numbers<E>(who, task.rows, piece.begin + end, piece.end, [&](std::int64_t j) { return weights[j]; }, out);
  }

  __device__ void combine() const {
    const int blocks = static_cast<int>(gridDim.x), warp = Combining::warp(), lane = lane_of_warp();
    const bool shows = warp == 0 && lane == 0;
    double* weights = memory.weights[warp];
    int columns = 0, shift = 0, group = -1, index = last_own_piece(0);
    Piece next = load_piece(task.plan, index);
    while (index >= 0) {
      const Piece piece = next;
      index = index - blocks >= piece.first ? index - blocks : last_own_piece(piece.last);
      if (index >= 0) next = load_piece(task.plan, index);
      if (piece.group != group) {
        group = piece.group;
        if (shows) {
          show_in_block(&memory.combined, columns);
          show_in_block(&memory.next_group, group);
        }
        __syncwarp();  // all have read the last group's
        if (lane < task.rows.T) {
          const double* place = task.scratch.shown + group * task.rows.T + lane;
          wait_until([&] { return is_shown(place, weights + lane); });
        }
        __syncwarp();
      }
      combine_piece(Share{(warp + shift) % kCombiningWarps}, piece, weights);
      const int length = static_cast<int>(piece.end - piece.begin);
      columns += length;
      shift += kCombiningWarps - length / (kLanes * E::kWidth) % kCombiningWarps;  // the next warp in turn goes on
      shift %= kCombiningWarps;
    }
    if (shows) show_in_block(&memory.next_group, static_cast<int>(task.plan.K));
  }

  __device__ void run() const {
    for (int slot = static_cast<int>(threadIdx.x); slot < kSlots; slot += kThreads) {
      memory.filled[slot] = memory.counted[slot] = 0;
    }
    if (threadIdx.x == 0) memory.combined = memory.next_group = 0;
    __syncthreads();
    if (Measuring::has_this_thread()) {
      measure();
    } else if (Solving::has_this_thread()) {
      solve();
    } else {
      combine();
    }
  }
};

}  // namespace gradvac::cuda
