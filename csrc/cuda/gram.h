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

struct Piece {
  std::int64_t group, begin, end;
};
__device__ inline Piece load_piece(const std::int64_t* table, std::int64_t i) {
  return {load_constant(table + 3 * i), load_constant(table + 3 * i + 1), load_constant(table + 3 * i + 2)};
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
  __device__ bool has(std::int64_t i, std::int64_t j) const { return j <= i && i < rows.T; }
  __device__ std::int64_t place(std::int64_t i, std::int64_t j) const { return pairs_of(i) + j; }
  __device__ void write(double* G, std::int64_t pair, double sum) const {
    std::int64_t i, j;
    entry_of(pair, &i, &j);
    G[i * rows.T + j] = sum;
    G[j * rows.T + i] = sum;
  }
};

// ---- few rows: outer products in registers

// How T <= rows rows are measured: by `threads` threads, each of which keeps the sums of all pairs.
template <int rows>
struct Outer {
  static constexpr int kRows = rows, kPairs = pairs_of(rows);
  static constexpr int kThreads = 128;
  static constexpr int kBlocks = rows <= 8 ? 4 : 2;                  // that a multiprocessor's registers are enough for
  static constexpr int kAtOnce = rows <= 2 ? 4 : rows <= 4 ? 2 : 1;  // steps whose loads are under way together
  static constexpr int kWarps = kThreads / kLanes;
};

template <class E, class O>
__device__ inline void load_rows(Vector (&vectors)[O::kRows], const Rows& rows, std::int64_t column, std::int64_t end,
                                 bool whole) {
  const auto load_all = [&](bool at_once) {
#pragma unroll
    for (int i = 0; i < O::kRows; ++i) {
      vectors[i] = i < rows.T ? load_vector<E>(rows.row<E>(i), column, end, at_once) : Vector{{0, 0, 0, 0}};
    }
  };
  if (whole) {
    load_all(true);
  } else {
    load_all(false);
  }
}

template <class E, class O>
__device__ inline void add_outer(float (&sums)[O::kPairs], const Vector (&vectors)[O::kRows]) {
#pragma unroll
  for (int w = 0; w < E::kWidth; ++w) {
    float x[O::kRows];
#pragma unroll
    for (int i = 0; i < O::kRows; ++i) x[i] = E::number(vectors[i], w);
#pragma unroll
    for (int i = 0; i < O::kRows; ++i) {
#pragma unroll
      for (int j = 0; j <= i; ++j) sums[pairs_of(i) + j] = fmaf(x[i], x[j], sums[pairs_of(i) + j]);
    }
  }
}

// Adds up the products of a piece: runs in float32, their sums in float64. sums [T (T + 1) / 2]; bench: as many doubles
// as there are warps times O::kPairs, in shared memory. `keep(vectors)` is shown what was read, step by step.
template <class E, class O, class Keep>
__device__ inline void measure_outer(const Rows& rows, const Piece& piece, double* bench, double* sums, Keep keep) {
  constexpr int kStep = O::kThreads * E::kWidth, kLeft = left_of(O::kPairs);
  constexpr int kAtOnce = O::kAtOnce * kStep <= kRun ? O::kAtOnce : static_cast<int>(kRun / kStep);
  const int thread = static_cast<int>(threadIdx.x);
  const bool aligned = rows.aligned && piece.begin % E::kWidth == 0;
  double totals[kLeft] = {};
  for (std::int64_t run = piece.begin; run < piece.end; run += kRun) {
    const std::int64_t stop = run + kRun < piece.end ? run + kRun : piece.end;
    float products[O::kPairs] = {};
    for (std::int64_t start = run; start < stop; start += kAtOnce * kStep) {
      Vector vectors[kAtOnce][O::kRows];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const std::int64_t column = start + u * kStep + thread * E::kWidth;
        load_rows<E, O>(vectors[u], rows, column, stop, aligned && column + E::kWidth <= stop);
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        if (start + u * kStep < stop) keep(vectors[u]);
        add_outer<E, O>(products, vectors[u]);
      }
    }
    add_lanes(products);
#pragma unroll
    for (int slot = 0; slot < kLeft; ++slot) totals[slot] += static_cast<double>(products[slot]);
  }
#pragma unroll
  for (int slot = 0; slot < kLeft; ++slot) {
    const int pair = sum_at<O::kPairs>(slot);
    if (pair < O::kPairs) bench[warp_of_block() * O::kPairs + pair] = totals[slot];
  }
  __syncthreads();
  for (std::int64_t pair = thread; pair < pairs_of(rows.T); pair += O::kThreads) {
    double sum = 0;
    for (int warp = 0; warp < O::kWarps; ++warp) sum += bench[warp * O::kPairs + pair];
    sums[pair] = sum;
  }
  __syncthreads();
}

// ---- float64 throughout: short groups, whose few columns make gradients nearly parallel, so that every bit counts,
// and float64 gradients. A warp takes blocks of kBlock x kBlock pairs.

constexpr int kBlock = 4;

// `part` of `parts` of the pairs.
template <class E, class Pairs>
__device__ inline void measure_exactly(const Pairs& pairs, const Piece& piece, double* sums, std::int64_t part = 0,
                                       std::int64_t parts = 1) {
  const Rows &rows = pairs.side(0), &others = pairs.side(1);
  const int warps = static_cast<int>(blockDim.x) / kLanes;
  for (std::int64_t which = part * warps + warp_of_block(); which < pairs.blocks(kBlock); which += parts * warps) {
    std::int64_t block, other;
    pairs.block_at(which, kBlock, &block, &other);
    double products[kBlock * kBlock] = {};
#pragma unroll 2
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
    const int place = sum_at<kBlock * kBlock>(0);
    const std::int64_t i = block * kBlock + place / kBlock, j = other * kBlock + place % kBlock;
    if (place < kBlock * kBlock && pairs.has(i, j)) sums[pairs.place(i, j)] = products[0];
  }
  __syncthreads();
}

// ---- from the sums of pieces to Gram matrices

// Pairs `begin` .. `end` - 1 of the group's matrix G, from the sums of its pieces, in their order; shares [threads]
// doubles of shared memory.
template <class Pairs>
__device__ inline void add_up(const Pairs& pairs, const double* sums, std::int64_t first, std::int64_t last,
                              std::int64_t begin, std::int64_t end, double* shares, double* G) {
  constexpr int kAtOnce = 8;  // loads under way together
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const std::int64_t count = pairs.count();
  const int together = count < threads ? static_cast<int>(count) : threads, slices = threads / together;
  for (std::int64_t start = begin; start < end; start += together) {
    const std::int64_t pair = start + thread % together;
    const int slice = thread / together;
    double sum = 0;
    if (pair < end && slice < slices) {
      for (std::int64_t piece = first + slice; piece < last; piece += kAtOnce * slices) {
        double parts[kAtOnce];
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) {
          const std::int64_t index = piece + u * slices;
          parts[u] = index < last ? load_shared_by_blocks(sums + index * count + pair) : 0.0;
        }
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) sum += parts[u];
      }
    }
    shares[thread] = sum;
    __syncthreads();
    if (slice == 0 && pair < end) {
      for (int other = 1; other < slices; ++other) sum += shares[other * together + thread];
      pairs.write(G, pair, sum);
    }
    __syncthreads();
  }
}

}  // namespace gradvac::cuda
