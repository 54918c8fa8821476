// Gram of many rows: products by matrix units, mma.m16n8k16, with fragments loaded straight from the rows.
//
// Matrix units cut off what they add up instead of rounding it: they add up no more than 16 columns, and those sums are
// added in float32 over a few, and in float64 across. float32 is split into three bfloat16; what the six products that
// count leave out is below 2^-24.
#pragma once

#include "gram.h"

namespace gradvac::cuda {

// Columns after which float64 takes over: chains of 8 in float32. Of 32, in a group of few runs, 1e-7 is not kept.
constexpr std::int64_t kMatrixRun = 1024;

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
    const float x = Float32::number(v, 2 * half), y = Float32::number(v, 2 * half + 1);
    const std::uint32_t high = floats_to_bfloat16(x, y);
    const float x_rest = x - __uint_as_float(high << 16), y_rest = y - __uint_as_float(high & 0xFFFF0000u);
    const std::uint32_t middle = floats_to_bfloat16(x_rest, y_rest);
    fragments[0].high[half] = high;
    fragments[0].middle[half] = middle;
    fragments[0].low[half] =
        floats_to_bfloat16(x_rest - __uint_as_float(middle << 16), y_rest - __uint_as_float(middle & 0xFFFF0000u));
  }
}

// A block of kRows x kRows pairs: rows and others, each `blocks` times 8. On the diagonal (and not `square`) its lower
// triangle is enough.
template <int blocks_, bool square_>
struct Matrix {
  static constexpr int blocks = blocks_, kRows = 8 * blocks;
  static constexpr bool square = square_;
  static constexpr int kThreads = 256, kWarps = kThreads / kLanes;
  // of a multiprocessor; 0: as many as fit
  static constexpr int kBlocks = square ? (blocks <= 2 ? 2 : 1) : blocks <= 4 ? 2 : 0;
  // columns of 8 in the strip `strip` of 16 rows, and the tiles before it
  GRADVAC_HD static constexpr int width(int strip) { return square ? blocks : 2 * strip + 2; }
  GRADVAC_HD static constexpr int before(int strip) { return square ? blocks * strip : strip * (strip + 1); }
  static constexpr int kTiles = square ? blocks * blocks / 2 : (blocks / 2) * (blocks / 2 + 1);
  static_assert(kTiles % 2 == 0, "added up in halves");
  static constexpr int kSums = kTiles * 4 * kLanes, kHalf = kSums / 2;  // of a warp
  static constexpr std::size_t kShared = sizeof(double) * kSums + sizeof(float) * kWarps * kHalf;
};

// Adds up the products of a piece of rows kRows block ... and kRows other ...; bench M::kShared bytes.
template <class E, class M, class Pairs>
__device__ inline void measure_matrix(const Pairs& pairs, const Piece& piece, std::int64_t block, std::int64_t other,
                                      char* bench, double* sums) {
  constexpr int kStep = M::kWarps * 4 * E::kWidth, kParts = E::kWidth / 4, kSides = M::square ? 2 : 1;
  const int thread = static_cast<int>(threadIdx.x), lane = lane_of_warp(), warp = warp_of_block();
  const bool aligned = pairs.side(0).aligned && pairs.side(1).aligned && piece.begin % E::kWidth == 0;
  double* totals = reinterpret_cast<double*>(bench);                    // [kSums], each place one thread's
  float* found_by_warps = reinterpret_cast<float*>(totals + M::kSums);  // [kWarps][kHalf]
  for (int place = thread; place < M::kSums; place += M::kThreads) totals[place] = 0;
  for (std::int64_t run = piece.begin; run < piece.end; run += kMatrixRun) {
    const std::int64_t stop = run + kMatrixRun < piece.end ? run + kMatrixRun : piece.end;
    float products[M::kTiles][4] = {};
#pragma unroll 1
    for (std::int64_t start = run; start < stop; start += kStep) {
      const std::int64_t column = start + (warp * 4 + lane % 4) * E::kWidth;
      const bool whole = aligned && column + E::kWidth <= stop;
      Fragment<E> fragments[kSides][M::blocks][kParts];
#pragma unroll
      for (int side = 0; side < kSides; ++side) {
        const Rows& rows = pairs.side(side);
        Vector vectors[M::blocks];
        const auto load_all = [&](bool at_once) {
#pragma unroll
          for (int b = 0; b < M::blocks; ++b) {
            const std::int64_t row = (side == 0 ? block : other) * M::kRows + 8 * b + lane / 4;
            vectors[b] = row < rows.T ? load_vector<E>(rows.row<E>(row), column, stop, at_once) : Vector{{0, 0, 0, 0}};
          }
        };
        if (whole) {
          load_all(true);
        } else {
          load_all(false);
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
    for (int half = 0; half < 2; ++half) {  // of the tiles: less shared memory
#pragma unroll
      for (int tile = 0; tile < M::kTiles / 2; ++tile) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          found_by_warps[warp * M::kHalf + (tile * 4 + e) * kLanes + lane] = products[half * M::kTiles / 2 + tile][e];
        }
      }
      __syncthreads();
#pragma unroll 1
      for (int place = thread; place < M::kHalf; place += M::kThreads) {
        double total = totals[half * M::kHalf + place];
        for (int w = 0; w < M::kWarps; ++w) total += static_cast<double>(found_by_warps[w * M::kHalf + place]);
        totals[half * M::kHalf + place] = total;
      }
      __syncthreads();
    }
  }
  // place: tile, e, lane; the unit gives row lane / 4 (+ 8 from e = 2 on) and column 2 (lane % 4) + e % 2 of a tile
  for (int place = thread; place < M::kSums; place += M::kThreads) {
    const int tile = place / (4 * kLanes), e = place / kLanes % 4;
    int strip = 0;
    while (M::before(strip + 1) <= tile) ++strip;
    const std::int64_t i = block * M::kRows + 16 * strip + 8 * (e / 2) + lane / 4;
    const std::int64_t j = other * M::kRows + 8 * (tile - M::before(strip)) + 2 * (lane % 4) + e % 2;
    if (pairs.has(i, j)) sums[pairs.place(i, j)] = totals[place];
  }
}

}  // namespace gradvac::cuda
