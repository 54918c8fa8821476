// Gram: products by matrix units, mma.m16n8k16, with fragments loaded straight from the rows.
//
// Matrix units cut off what they add up instead of rounding it: they add up no more than 16 columns, and those sums are
// added in float32 over at most 8, and in float64 across. float32 is split into three bfloat16; what the six products
// that count leave out is below 2^-24. Of the products of rows with themselves two are what two others are transposed.
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

  // Of 16 rows with 8 of the same: what all tiles find and the same transposed are twice the products.
  __device__ static void add_twice(float (&sums)[4], const Fragment& upper, const Fragment& lower,
                                   const Fragment& right) {
    const std::uint32_t high[4] = {upper.high[0], lower.high[0], upper.high[1], lower.high[1]};
    const std::uint32_t middle[4] = {upper.middle[0], lower.middle[0], upper.middle[1], lower.middle[1]};
    const std::uint32_t low[4] = {upper.low[0], lower.low[0], upper.low[1], lower.low[1]};
    std::uint32_t twice_high[4], twice_low[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      twice_high[i] = twice_bfloat16(high[i]);
      twice_low[i] = twice_bfloat16(low[i]);
    }
    multiply_bfloat16(sums, twice_low, right.high);  // the small ones first
    multiply_bfloat16(sums, middle, right.middle);
    multiply_bfloat16(sums, twice_high, right.middle);
    multiply_bfloat16(sums, high, right.high);
  }

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

// Vectors of a row whose products are added up in float32, at most.
template <class E>
constexpr int kChain = 32 / E::kWidth;

// ---- few rows: one tile of 8 rows

// T <= kRows rows. Where they are less than 8, the tile holds kGroups stretches of columns of each; of the products,
// those of two different stretches are of no use.
template <int rows>
struct Packed {
  static constexpr int kRows = rows, kGroups = 8 / rows;
  static constexpr int kThreads = rows == 8 ? 256 : 128, kWarps = kThreads / kLanes;
  static constexpr int kPlaces = 64;  // of a tile: its row times 8, and its column
  // Columns from one of a lane's vectors to the next.
  template <class E>
  GRADVAC_HD static constexpr int step() {
    return 4 * kGroups * E::kWidth;
  }
  // Vectors that a warp adds up of a row before another one goes on; their loads may all be under way together.
  template <class E>
  GRADVAC_HD static constexpr int stretch() {
    return E::kWidth == 8 ? 16 : 8;
  }
  // Blocks of a multiprocessor.
  template <class E>
  GRADVAC_HD static constexpr int blocks() {
    return (stretch<E>() == 16 ? 512 : 768) / kThreads;
  }
};

// Adds the products of 8 rows with themselves, of a vector of each. One of 16-bit numbers is the left factor as it
// comes, with one half of its columns for rows 0 to 7 and the other half for rows 8 to 15: of each half, what it finds
// with itself is wanted.
template <class E>
__device__ inline void add_squares(float (&products)[2], const Vector& v) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const std::uint32_t right[2] = {v.words[half], v.words[2 + half]};
    float found[4] = {0, 0, 0, 0};
    Fragment<E>::multiply(found, v.words, right);
    for (int e = 0; e < 2; ++e) products[e] += found[2 * half + e];
  }
}
// Of three parts, rows 0 to 7 of what is found, and rows 8 to 15, also transposed.
template <class E>
__device__ inline void add_squares(float (&products)[4], const Vector& v) {
  Fragment<E> x[1];
  split<E>(v, x);
  const std::uint32_t middle_and_high[4] = {x->middle[0], x->high[0], x->middle[1], x->high[1]};
  const std::uint32_t high_and_low[4] = {x->high[0], x->low[0], x->high[1], x->low[1]};
  float found[4] = {0, 0, 0, 0};
  multiply_bfloat16(found, middle_and_high, x->middle);  // the small ones first
  multiply_bfloat16(found, high_and_low, x->high);
  for (int e = 0; e < 4; ++e) products[e] += found[e];
}

// Sums of a tile as a lane has them: of rows 0 to 7, and from the third one on those of rows 8 to 15.
template <class E>
constexpr int kLaneSums = E::kWidth == 8 ? 2 : 4;
template <class E>
using LaneSums = double[kLaneSums<E>];

// Adds the products of kChain vectors, vector_at(u), kTogether of them at a time.
template <class E, int kTogether = kChain<E>, class VectorAt>
__device__ inline void add_chain(LaneSums<E>& totals, VectorAt vector_at) {
  float products[kLaneSums<E>] = {};
#pragma unroll kTogether
  for (int u = 0; u < kChain<E>; ++u) add_squares<E>(products, vector_at(u));
#pragma unroll
  for (int e = 0; e < kLaneSums<E>; ++e) totals[e] += static_cast<double>(products[e]);
}

// What a warp has added up, as a tile [P::kPlaces].
template <class E>
__device__ inline void write_tile(const LaneSums<E>& totals, double* tile) {
  const int lane = lane_of_warp();
  double sums[2] = {totals[0], totals[1]};
  if constexpr (kLaneSums<E> == 4) {
    for (int e = 0; e < 2; ++e) tile[2 * lane + e] = totals[2 + e];
    __syncwarp();
    for (int e = 0; e < 2; ++e) sums[e] += totals[2 + e] + tile[(2 * lane + e) % 8 * 8 + lane / 4];
    __syncwarp();
  }
  for (int e = 0; e < 2; ++e) tile[2 * lane + e] = sums[e];  // where the unit leaves them
}

// What the warps of a block add up of a piece, in turns of `stretch` vectors of a row each. Loads of kAtOnce of them
// are under way together.
template <class E, class P, int stretch, int kAtOnce>
__device__ inline void add_stretches(LaneSums<E>& totals, const Rows& rows, const Piece& piece) {
  constexpr int kStep = P::template step<E>(), kStretch = stretch * kStep;
  const int lane = lane_of_warp(), warp = warp_of_block(), row = lane / 4 / P::kGroups;
  const int column = (lane / 4 % P::kGroups * 4 + lane % 4) * E::kWidth;
  const int length = static_cast<int>(piece.end - piece.begin);
  const bool aligned = rows.aligned && piece.begin % E::kWidth == 0, is_there = row < rows.T;
  const typename E::Stored* numbers = rows.row<E>(is_there ? row : 0) + piece.begin + column;
  for (int start = warp * kStretch; start < length; start += P::kWarps * kStretch) {
    const auto load = [&](int u, bool whole) {
      return is_there ? load_vector<E>(numbers, start + u * kStep, length - column, whole) : Vector{{0, 0, 0, 0}};
    };
    const bool whole = aligned && start + kStretch <= length;
#pragma unroll 1
    for (int first = 0; first < stretch; first += kAtOnce) {
      if (whole) {
        Vector vectors[kAtOnce];
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) vectors[u] = load(first + u, true);
#pragma unroll
        for (int chain = 0; chain < kAtOnce; chain += kChain<E>) {
          add_chain<E>(totals, [&](int u) { return vectors[chain + u]; });
        }
      } else {  // narrow loads, and no more than the registers hold
#pragma unroll 1
        for (int chain = first; chain < first + kAtOnce; chain += kChain<E>) {
          add_chain<E, 1>(totals, [&](int u) { return load(chain + u, false); });
        }
      }
    }
  }
}

// The same into tiles [P::kWarps, P::kPlaces]. Of a short piece every warp gets its part.
template <class E, class P, int kAtOnce>
__device__ inline void measure_packed(const Rows& rows, const Piece& piece, double* tiles) {
  constexpr int kAll = P::kWarps * P::template step<E>();
  const std::int64_t length = piece.end - piece.begin;
  LaneSums<E> totals = {};
  if (E::kWidth == 8 && length <= 4 * kAll) {
    add_stretches<E, P, kChain<E>, kChain<E>>(totals, rows, piece);
  } else if (E::kWidth == 8 && length <= 8 * kAll) {
    add_stretches<E, P, 8, 8>(totals, rows, piece);
  } else {
    add_stretches<E, P, P::template stretch<E>(), kAtOnce>(totals, rows, piece);
  }
  write_tile<E>(totals, tiles + warp_of_block() * P::kPlaces);
}

// Where a pair of the rows is in a tile, in the first of its groups.
template <class P>
__device__ inline int place_of_pair(int pair) {
  int row = 0;
  while (pair > row) pair -= ++row;
  return row * P::kGroups * 8 + pair * P::kGroups;
}

// The pair there, from the tiles of all warps: tiles [P::kWarps, P::kPlaces].
template <class P>
__device__ inline double sum_of_tiles(const double* tiles, int place) {
  double sum = 0;
  for (int group = 0; group < P::kGroups; ++group) {
    for (int warp = 0; warp < P::kWarps; ++warp) sum += tiles[warp * P::kPlaces + place + group * 9];
  }
  return sum;
}

// ---- many rows

// A block of kRows x kRows pairs: rows and others, each `blocks` times 8. Where it is not `square`, it lies on the
// diagonal, and its lower triangle is enough.
template <int blocks_, bool square_>
struct Matrix {
  static constexpr int blocks = blocks_, kRows = 8 * blocks;
  static constexpr bool square = square_;
  static constexpr int kSides = square ? 2 : 1, kVectors = kSides * blocks;
  static constexpr int kThreads = 128, kWarps = kThreads / kLanes;
  static constexpr int kAtOnce = 8 / kVectors;  // steps whose loads are under way together
  // of a multiprocessor
  static constexpr int kBlocks = blocks > 2 ? (square ? 2 : 3) : square ? 4 : 5;
  // columns of 8 in the strip `strip` of 16 rows, and the tiles before it
  GRADVAC_HD static constexpr int width(int strip) { return square ? blocks : 2 * strip + 2; }
  GRADVAC_HD static constexpr int before(int strip) { return square ? blocks * strip : strip * (strip + 1); }
  static constexpr int kTiles = square ? blocks * blocks / 2 : (blocks / 2) * (blocks / 2 + 1);
  static constexpr int kSums = kTiles * 4 * kLanes;  // of a warp
  static constexpr std::size_t kShared = sizeof(double) * kWarps * kSums;
};

// One tile of 16 columns a side, of float32: all that is found is a square.
template <class E, class M>
constexpr bool kFindsTwice = E::kWidth == 4 && M::blocks == 2 && !M::square;

// Adds up the products of a piece of rows kRows block ... and kRows other ...; bench M::kShared bytes. A warp takes
// whole lines of every row: kAtOnce steps of 4 vectors, one beside the other.
template <class E, class M, class Pairs>
__device__ inline void measure_matrix(const Pairs& pairs, const Piece& piece, std::int64_t block, std::int64_t other,
                                      char* bench, double* sums) {
  constexpr int kParts = E::kWidth / 4, kStep = 4 * E::kWidth, kStride = M::kWarps * M::kAtOnce * kStep;
  constexpr int kSteps = kChain<E> < M::kAtOnce ? kChain<E> : M::kAtOnce;  // that are added up in float32
  const int thread = static_cast<int>(threadIdx.x), lane = lane_of_warp(), warp = warp_of_block();
  const bool aligned = pairs.side(0).aligned && pairs.side(1).aligned && piece.begin % E::kWidth == 0;
  const bool one_side = M::square && pairs.is_diagonal(block, other);
  double totals[M::kTiles][4] = {};
  for (std::int64_t start = piece.begin; start < piece.end; start += kStride) {
    const std::int64_t first = start + (warp * M::kAtOnce * 4 + lane % 4) * E::kWidth;
    float products[M::kTiles][4];
    Vector vectors[M::kAtOnce][M::kSides][M::blocks];
    const auto load_step = [&](int u, int place, bool whole) {
#pragma unroll
      for (int side = 0; side < M::kSides; ++side) {
        const Rows& rows = pairs.side(side);
#pragma unroll
        for (int b = 0; b < M::blocks; ++b) {
          const std::int64_t row = (side == 0 ? block : other) * M::kRows + 8 * b + lane / 4;
          const bool is_there = row < rows.T && !(side == 1 && one_side);
          vectors[place][side][b] =
              is_there ? load_vector<E>(rows.row<E>(row), first + u * kStep, piece.end, whole) : Vector{{0, 0, 0, 0}};
        }
      }
    };
    const auto multiply_step = [&](int place) {
      Fragment<E> fragments[M::kSides][M::blocks][kParts];
#pragma unroll
      for (int side = 0; side < M::kSides; ++side) {
#pragma unroll
        for (int b = 0; b < M::blocks; ++b) {
          Vector v = vectors[place][side][b];
#pragma unroll
          for (int w = 0; w < 4; ++w) v.words[w] = one_side ? vectors[place][0][b].words[w] : v.words[w];
          split<E>(v, fragments[side][b]);
        }
      }
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
#pragma unroll
        for (int strip = 0; strip < M::blocks / 2; ++strip) {
#pragma unroll
          for (int b = 0; b < M::width(strip); ++b) {
            float found[4] = {0, 0, 0, 0};
            const auto &upper = fragments[0][2 * strip][part], &lower = fragments[0][2 * strip + 1][part];
            const auto& right = fragments[M::kSides - 1][b][part];
            if constexpr (kFindsTwice<E, M>) {
              Fragment<E>::add_twice(found, upper, lower, right);
            } else {
              Fragment<E>::add(found, upper, lower, right);
            }
#pragma unroll
            for (int e = 0; e < 4; ++e) products[M::before(strip) + b][e] += found[e];
          }
        }
      }
    };
    const auto begin_chain = [&] {
#pragma unroll
      for (int tile = 0; tile < M::kTiles; ++tile) {
#pragma unroll
        for (int e = 0; e < 4; ++e) products[tile][e] = 0;
      }
    };
    const auto add_chain = [&] {
#pragma unroll
      for (int tile = 0; tile < M::kTiles; ++tile) {
#pragma unroll
        for (int e = 0; e < 4; ++e) totals[tile][e] += static_cast<double>(products[tile][e]);
      }
    };
    if (aligned && start + kStride <= piece.end) {
#pragma unroll
      for (int u = 0; u < M::kAtOnce; ++u) load_step(u, u, true);
#pragma unroll
      for (int chain = 0; chain < M::kAtOnce; chain += kSteps) {
        begin_chain();
#pragma unroll
        for (int u = chain; u < chain + kSteps; ++u) multiply_step(u);
        add_chain();
      }
    } else {  // narrow loads, and no more than the registers hold
#pragma unroll 1
      for (int chain = 0; chain < M::kAtOnce; chain += kSteps) {
        begin_chain();
#pragma unroll 1
        for (int u = chain; u < chain + kSteps; ++u) {
          load_step(u, 0, false);
          multiply_step(0);
        }
        add_chain();
      }
    }
  }
  double* found_by_warps = reinterpret_cast<double*>(bench);  // [kWarps][kSums]
#pragma unroll
  for (int tile = 0; tile < M::kTiles; ++tile) {
#pragma unroll
    for (int e = 0; e < 4; ++e) found_by_warps[warp * M::kSums + (tile * 4 + e) * kLanes + lane] = totals[tile][e];
  }
  __syncthreads();
  // place: tile, e, lane; the unit gives row lane / 4 (+ 8 from e = 2 on) and column 2 (lane % 4) + e % 2 of a tile
  for (int place = thread; place < M::kSums; place += M::kThreads) {
    const int tile = place / (4 * kLanes), e = place / kLanes % 4;
    int strip = 0;
    while (M::before(strip + 1) <= tile) ++strip;
    const std::int64_t i = block * M::kRows + 16 * strip + 8 * (e / 2) + lane / 4;
    const std::int64_t j = other * M::kRows + 8 * (tile - M::before(strip)) + 2 * (lane % 4) + e % 2;
    if (!pairs.has(i, j)) continue;
    const auto sum_at = [&](int place) {
      double sum = 0;
      for (int w = 0; w < M::kWarps; ++w) sum += found_by_warps[w * M::kSums + place];
      return sum;
    };
    double sum = sum_at(place);
    if constexpr (kFindsTwice<E, M>) {
      const int row = static_cast<int>(j), column = static_cast<int>(i);  // transposed
      sum = (sum + sum_at((column / 8 * 4 + row / 8 * 2 + column % 2) * kLanes + row % 8 * 4 + column % 8 / 2)) / 2;
    }
    sums[pairs.place(i, j)] = sum;
  }
}

}  // namespace gradvac::cuda
