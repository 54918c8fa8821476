// Gram: the sums of one piece of a group, and what makes them a Gram matrix. Everything here is called by all threads
// of a block. The order of all additions depends on the type, the number of rows and the group's own columns only.
#pragma once

#include "rows.h"

namespace gradvac::cuda {

struct Rows {
  const void* data;
  std::int64_t T, row_stride;
  bool aligned;

  template <class E>
  __device__ const typename E::Stored* row(std::int64_t i) const {
    return static_cast<const typename E::Stored*>(data) + i * row_stride;
  }
};

// Columns of a group, and which of all pieces are the group's: a row of the table of pieces.
struct Piece {
  std::int64_t begin, end;
  int group, first, last;

  // Few columns make gradients nearly parallel, so that every bit counts.
  __device__ bool is_short() const { return last - first == 1 && end - begin <= kRun; }
};
__device__ inline Piece load_piece(const Plan& plan, std::int64_t i) {
  const std::int64_t* row = plan.pieces + 5 * i;
  const auto small = [&](int i) { return static_cast<int>(load_constant(row + i)); };
  return {load_constant(row + 1), load_constant(row + 2), small(0), small(3), small(4)};
}

GRADVAC_HD constexpr int pairs_of(int rows) { return rows * (rows + 1) / 2; }
GRADVAC_HD inline std::int64_t pairs_of(std::int64_t rows) { return rows * (rows + 1) / 2; }

// Row and column of an entry of the lower triangle, counted row by row.
__device__ inline void entry_of(std::int64_t pair, std::int64_t* i, std::int64_t* j) {
  std::int64_t row = static_cast<std::int64_t>((sqrt(8.0 * static_cast<double>(pair) + 1) - 1) / 2);
  while (pairs_of(row) > pair) --row;
  while (pairs_of(row + 1) <= pair) ++row;
  *i = row;
  *j = pair - pairs_of(row);
}

GRADVAC_HD inline std::int64_t along(std::int64_t rows, int height) { return (rows + height - 1) / height; }

// All pairs of rows of one buffer: a triangle of entries, and of blocks of `height` x `height` of them.
struct Triangle {
  Rows rows;

  GRADVAC_HD std::int64_t count() const { return pairs_of(rows.T); }
  GRADVAC_HD std::int64_t blocks(int height) const { return pairs_of(along(rows.T, height)); }
  __device__ void block_at(std::int64_t which, int, std::int64_t* block, std::int64_t* other) const {
    entry_of(which, block, other);
  }
  __device__ const Rows& side(int) const { return rows; }
  __device__ bool is_diagonal(std::int64_t block, std::int64_t other) const { return block == other; }
  __device__ bool has(std::int64_t i, std::int64_t j) const { return j <= i && i < rows.T; }
  __device__ std::int64_t place(std::int64_t i, std::int64_t j) const { return pairs_of(i) + j; }
  __device__ void write(double* G, std::int64_t pair, double sum) const {
    std::int64_t i, j;
    entry_of(pair, &i, &j);
    G[i * rows.T + j] = sum;
    G[j * rows.T + i] = sum;
  }
};

// ---- float64 throughout: short groups, whose few columns make gradients nearly parallel, so that every bit counts,
// and float64 gradients. A warp takes blocks of kBlock x kBlock pairs.

constexpr int kManyPairs = 4;

// `part` of `parts` of the pairs, with the loads of kAhead columns a lane under way together.
template <class E, int kBlock = kManyPairs, int kAhead = 1, class Pairs>
__device__ inline void measure_exactly(const Pairs& pairs, const Piece& piece, double* sums, std::int64_t part = 0,
                                       std::int64_t parts = 1) {
  const Rows &rows = pairs.side(0), &others = pairs.side(1);
  const int warps = threads_of_block() / kLanes;
  for (std::int64_t which = part * warps + warp_of_block(); which < pairs.blocks(kBlock); which += parts * warps) {
    std::int64_t block, other;
    pairs.block_at(which, kBlock, &block, &other);
    double products[kBlock * kBlock] = {};
#pragma unroll kAhead
    for (std::int64_t column = piece.begin + lane_of_warp(); column < piece.end; column += kLanes) {
      double x[kBlock], y[kBlock];
#pragma unroll
      for (int i = 0; i < kBlock; ++i) {
        const std::int64_t row = block * kBlock + i, column_row = other * kBlock + i;
        x[i] = row < rows.T ? static_cast<double>(E::number(load_constant(rows.row<E>(row) + column))) : 0.0;
        y[i] = column_row < others.T ? static_cast<double>(E::number(load_constant(others.row<E>(column_row) + column)))
                                     : 0.0;
      }
#pragma unroll
      for (int i = 0; i < kBlock; ++i) {
#pragma unroll
        for (int j = 0; j < kBlock; ++j) products[i * kBlock + j] = fma(x[i], y[j], products[i * kBlock + j]);
      }
    }
    add_lanes(products);
    const int place = sum_of_lane<kBlock * kBlock>();
    const std::int64_t i = block * kBlock + place / kBlock, j = other * kBlock + place % kBlock;
    if (place < kBlock * kBlock && pairs.has(i, j)) sums[pairs.place(i, j)] = products[0];
  }
}

// ---- from the sums of pieces to Gram matrices

// Calls `write(pair, sum)` for the pairs `begin` .. `end` - 1 of a group: the sums of its pieces, in their order;
// shares [threads] doubles of shared memory.
template <class Pairs, class Write>
__device__ inline void add_up(const Pairs& pairs, const double* sums, std::int64_t first, std::int64_t last,
                              std::int64_t begin, std::int64_t end, double* shares, Write write) {
  constexpr int kAtOnce = 16;  // loads under way together: all that this takes is their latency
  const int thread = thread_of_block(), threads = threads_of_block();
  const std::int64_t count = pairs.count();
  const int together = end - begin < threads ? static_cast<int>(end - begin) : threads, slices = threads / together;
  for (std::int64_t start = begin; start < end; start += together) {
    const std::int64_t pair = start + thread % together, stride = slices * count;
    const int slice = thread / together;
    double sum = 0;
    if (pair < end && slice < slices) {
      std::int64_t left = (last - first - slice + slices - 1) / slices;
      const double* from = sums + (first + slice) * count + pair;
      for (; left >= kAtOnce; left -= kAtOnce, from += kAtOnce * stride) {
        double parts[kAtOnce];
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) parts[u] = from[u * stride];
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) sum += parts[u];
      }
#pragma unroll 4
      for (; left > 0; --left, from += stride) sum += *from;
    }
    shares[thread] = sum;
    __syncthreads();
    if (slice == 0 && pair < end) {
      for (int other = 1; other < slices; ++other) sum += shares[other * together + thread];
      write(pair, sum);
    }
    __syncthreads();
  }
}

}  // namespace gradvac::cuda
