// Gram of many rows: products by matrix units, mma.m16n8k16, with fragments loaded straight from the rows.
//
// Matrix units cut off what they add up instead of rounding it: they add up no more than 16 columns, and those sums are
// added in float32 over a run and in float64 across. float32 is split into three bfloat16; what the six products that
// count leave out is below 2^-24.
#pragma once

#include "gram.h"

namespace gradvac::cuda {

// A lane's share of 8 rows x 16 columns: of row lane / 4, the four columns from 4 (lane % 4) on. As both factors hold
// the same columns in the same places, it does not matter which ones the unit takes them for.
template <class E>
struct Fragment;

template <class E>
struct Fragment16 {
  std::uint32_t words[2];

  __device__ static void add(float (&sums)[4], const E& upper, const E& lower, const E& right) {
    const std::uint32_t a[4] = {upper.words[0], lower.words[0], upper.words[1], lower.words[1]};
    E::multiply(sums, a, right.words);
  }
};
template <>
struct Fragment<Bfloat16> : Fragment16<Fragment<Bfloat16>> {
  __device__ static void multiply(float (&sums)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
    multiply_bfloat16(sums, a, b);
  }
};
template <>
struct Fragment<Float16> : Fragment16<Fragment<Float16>> {
  __device__ static void multiply(float (&sums)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
    multiply_float16(sums, a, b);
  }
};
template <>
struct Fragment<Float32> {
  std::uint32_t high[2], middle[2], low[2];

  __device__ static void add(float (&sums)[4], const Fragment& upper, const Fragment& lower, const Fragment& right) {
    const std::uint32_t high[4] = {upper.high[0], lower.high[0], upper.high[1], lower.high[1]};
    const std::uint32_t middle[4] = {upper.middle[0], lower.middle[0], upper.middle[1], lower.middle[1]};
    const std::uint32_t low[4] = {upper.low[0], lower.low[0], upper.low[1], lower.low[1]};
    multiply_bfloat16(sums, low, right.high);  // the small ones first
    multiply_bfloat16(sums, high, right.low);
    multiply_bfloat16(sums, middle, right.middle);
    multiply_bfloat16(sums, middle, right.high);
    multiply_bfloat16(sums, high, right.middle);
    multiply_bfloat16(sums, high, right.high);
  }
};

// The fragments of a vector of a row: one of four float32, two of eight 16-bit numbers.
template <class E>
__device__ inline void split(const Vector& v, Fragment<E> (&fragments)[E::kWidth / 4]) {
#pragma unroll
  for (int f = 0; f < 2; ++f) {
    fragments[f].words[0] = v.words[2 * f];
    fragments[f].words[1] = v.words[2 * f + 1];
  }
}
template <>
__device__ inline void split<Float32>(const Vector& v, Fragment<Float32> (&fragments)[1]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    std::uint32_t high[2], middle[2], low[2];
#pragma unroll
    for (int w = 0; w < 2; ++w) {
      const float x = Float32::number(v, 2 * half + w);
      high[w] = float_to_bfloat16(x);
      const float rest = x - Bfloat16::number(static_cast<std::uint16_t>(high[w]));
      middle[w] = float_to_bfloat16(rest);
      low[w] = float_to_bfloat16(rest - Bfloat16::number(static_cast<std::uint16_t>(middle[w])));
    }
    fragments[0].high[half] = high[0] | high[1] << 16;
    fragments[0].middle[half] = middle[0] | middle[1] << 16;
    fragments[0].low[half] = low[0] | low[1] << 16;
  }
}

// A block of kRows x kRows pairs: rows and others, each `blocks` times 8. On the diagonal (and not `square`) its lower
// triangle is enough.
template <int blocks_, bool square_>
struct Matrix {
  static constexpr int blocks = blocks_, kRows = 8 * blocks;
  static constexpr bool square = square_;
  static constexpr int kThreads = 256, kWarps = kThreads / kLanes;
  static constexpr int kBlocks = blocks <= 4 && !square ? 2 : 0;  // of a multiprocessor; 0: as many as fit
  // columns of 8 in the strip `strip` of 16 rows, and the tiles before it
  GRADVAC_HD static constexpr int width(int strip) { return square ? blocks : 2 * strip + 2; }
  GRADVAC_HD static constexpr int before(int strip) { return square ? blocks * strip : strip * (strip + 1); }
  static constexpr int kTiles = square ? blocks * blocks / 2 : (blocks / 2) * (blocks / 2 + 1);
  static constexpr int kSums = kTiles * 4 * kLanes;  // of a warp
  static constexpr std::size_t kShared = (sizeof(double) + sizeof(float) * kWarps) * kSums;
};

// Adds up the products of a piece of rows 8 block ... and 8 other ...; sums [T (T + 1) / 2], bench M::kShared bytes.
template <class E, class M>
__device__ inline void measure_matrix(const Rows& rows, const Piece& piece, std::int64_t block, std::int64_t other,
                                      char* bench, double* sums) {
  constexpr int kStep = M::kWarps * 4 * E::kWidth, kParts = E::kWidth / 4, kSides = M::square ? 2 : 1;
  const int thread = static_cast<int>(threadIdx.x), lane = lane_of_warp(), warp = warp_of_block();
  const bool aligned = rows.aligned && piece.begin % E::kWidth == 0;
  double* totals = reinterpret_cast<double*>(bench);                    // [kSums], each place one thread's
  float* found_by_warps = reinterpret_cast<float*>(totals + M::kSums);  // [kWarps][kSums]
  for (int place = thread; place < M::kSums; place += M::kThreads) totals[place] = 0;
  for (std::int64_t run = piece.begin; run < piece.end; run += kRun) {
    const std::int64_t stop = run + kRun < piece.end ? run + kRun : piece.end;
    float products[M::kTiles][4] = {};
#pragma unroll 1
    for (std::int64_t start = run; start < stop; start += kStep) {
      const std::int64_t column = start + (warp * 4 + lane % 4) * E::kWidth;
      const bool whole = aligned && column + E::kWidth <= stop;
      Fragment<E> fragments[kSides][M::blocks][kParts];
#pragma unroll
      for (int side = 0; side < kSides; ++side) {
        Vector vectors[M::blocks];
#pragma unroll
        for (int b = 0; b < M::blocks; ++b) {
          const std::int64_t row = (side == 0 ? block : other) * M::kRows + 8 * b + lane / 4;
          vectors[b] = row < rows.T ? load_vector<E>(rows.row<E>(row), column, stop, whole) : Vector{{0, 0, 0, 0}};
        }
#pragma unroll
        for (int b = 0; b < M::blocks; ++b) split<E>(vectors[b], fragments[side][b]);
      }
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
#pragma unroll
        for (int strip = 0; strip < M::blocks / 2; ++strip) {
#pragma unroll
          for (int b = 0; b < M::width(strip); ++b) {
            float found[4] = {0, 0, 0, 0};
            Fragment<E>::add(found, fragments[0][2 * strip][part], fragments[0][2 * strip + 1][part],
                             fragments[kSides - 1][b][part]);
#pragma unroll
            for (int e = 0; e < 4; ++e) products[M::before(strip) + b][e] += found[e];
          }
        }
      }
    }
#pragma unroll
    for (int tile = 0; tile < M::kTiles; ++tile) {
#pragma unroll
      for (int e = 0; e < 4; ++e) found_by_warps[warp * M::kSums + (tile * 4 + e) * kLanes + lane] = products[tile][e];
    }
    __syncthreads();
#pragma unroll 1
    for (int place = thread; place < M::kSums; place += M::kThreads) {
      double total = totals[place];
      for (int w = 0; w < M::kWarps; ++w) total += static_cast<double>(found_by_warps[w * M::kSums + place]);
      totals[place] = total;
    }
    __syncthreads();
  }
  // place: tile, e, lane; the unit gives row lane / 4 (+ 8 from e = 2 on) and column 2 (lane % 4) + e % 2 of a tile
  for (int place = thread; place < M::kSums; place += M::kThreads) {
    const int tile = place / (4 * kLanes), e = place / kLanes % 4;
    int strip = 0;
    while (M::before(strip + 1) <= tile) ++strip;
    const std::int64_t i = block * M::kRows + 16 * strip + 8 * (e / 2) + lane / 4;
    const std::int64_t j = other * M::kRows + 8 * (tile - M::before(strip)) + 2 * (lane % 4) + e % 2;
    if (j <= i && i < rows.T) sums[pairs_of(i) + j] = totals[place];
  }
}

}  // namespace gradvac::cuda
