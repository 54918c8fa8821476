// Gram: dot products of all pairs of rows over a run of columns.
//
// Lanes lie along the columns, so that rows are read as they are. Blocks of kBlock x kBlock pairs keep their
// accumulators in registers over a tile of columns; a tile's sums are then added up in float64. Where reading memory is
// what takes the time (T up to kExactRows) products are accumulated in float64 throughout, else in float32 over chains
// of at most 32 a lane. The order of all additions depends on T and the number of columns only.
#pragma once

#include "simd.h"

namespace gradvac::cpu::GRADVAC_VARIANT {

constexpr int64_t kExactRows = 16;
constexpr int64_t kChain = 32;  // additions in float32 before float64 takes over
constexpr int64_t kPanel = 3;   // blocks of rows that stay in the first-level cache while the others pass
constexpr int kPairs = (kBlock * kBlock + kDoubles - 1) / kDoubles * kDoubles;

template <class Element>
struct InDoubles {
  using E = Element;
  using Acc = VecD;
  using Loaded = VecD;
  static constexpr int kStep = kDoubles;
  static constexpr int64_t kTile = 512;  // columns: 16 rows of floats fill two thirds of a first-level cache
  static Loaded load(const E* p) { return load_doubles(p); }
  static Acc multiply_add(Acc acc, Loaded a, Loaded b) { return acc + a * b; }
};

template <class Element>
struct InFloats {
  using E = Element;
  using Acc = VecF;
  using Loaded = VecF;
  static constexpr int kStep = kFloats;
  static constexpr int64_t kTile = kChain * kFloats;
  static Loaded load(const E* p) { return load_floats(p); }
  static Acc multiply_add(Acc acc, Loaded a, Loaded b) { return acc + a * b; }
};

#ifdef __AVX512BF16__
template <>
struct InFloats<Bfloat16> {  // products of bfloat16 are exact in float32; each lane adds two of them
  using E = Bfloat16;
  using Acc = VecF;
  using Loaded = __m512bh;
  static constexpr int kStep = 2 * kFloats;
  static constexpr int64_t kTile = kChain * kFloats;
  static Loaded load(const E* p) { return bits<__m512bh>(_mm512_loadu_si512(p)); }
  static Acc multiply_add(Acc acc, Loaded a, Loaded b) {
    return bits<VecF>(_mm512_dpbf16_ps(bits<__m512>(acc), a, b));
  }
};
#endif

// The next kStep columns of M rows, zeros past `columns`.
template <class Policy>
inline typename Policy::Loaded load_tail(const typename Policy::E* p, int64_t columns) {
  typename Policy::E padded[Policy::kStep] = {};
  __builtin_memcpy(padded, p, columns * sizeof(*p));
  return Policy::load(padded);
}

// sums[m kBlock + n] += <a_m, b_n>; on the diagonal b is a and only n <= m is computed.
template <class Policy, int M, int N, bool kDiagonal>
inline void add_block(const typename Policy::E* a, const typename Policy::E* b, int64_t stride, int64_t columns,
                      double* sums) {
  typename Policy::Acc acc[M][N] = {};
  auto step = [&](auto load) {
    typename Policy::Loaded left[M];
    for (int m = 0; m < M; ++m) left[m] = load(a + m * stride);
    for (int n = 0; n < N; ++n) {
      const typename Policy::Loaded right = kDiagonal ? left[n] : load(b + n * stride);
      for (int m = kDiagonal ? n : 0; m < M; ++m) acc[m][n] = Policy::multiply_add(acc[m][n], left[m], right);
    }
  };
  int64_t column = 0;
  for (; column + Policy::kStep <= columns; column += Policy::kStep) {
    step([&](const typename Policy::E* p) { return Policy::load(p + column); });
    if (kDiagonal) {  // each row is on the diagonal once a tile: there, its next tile is asked for
      for (int m = 0; m < M; ++m) __builtin_prefetch(a + m * stride + column + Policy::kTile);
    }
  }
  if (column < columns) {
    step([&](const typename Policy::E* p) { return load_tail<Policy>(p + column, columns - column); });
  }
  VecD folded[kPairs] = {};
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < (kDiagonal ? m + 1 : N); ++n) folded[m * kBlock + n] = fold_lanes(acc[m][n]);
  }
  for (int first = 0; first < kPairs; first += kDoubles) {
    store(sums + first, load<VecD>(sums + first) + sum_each(folded + first));
  }
}

template <class Policy, int M, bool kDiagonal>
inline void add_block_of(int64_t rows, const typename Policy::E* a, const typename Policy::E* b, int64_t stride,
                         int64_t columns, double* sums) {
  if (rows == M) return add_block<Policy, M, kDiagonal ? M : kBlock, kDiagonal>(a, b, stride, columns, sums);
  if constexpr (M > 1) add_block_of<Policy, M - 1, kDiagonal>(rows, a, b, stride, columns, sums);
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t block_index(int64_t row, int64_t column) { return row * (row + 1) / 2 + column; }

// sums: kPairs for each pair of blocks, zero at first
template <class Policy>
void add_tiles(const typename Policy::E* rows, int64_t T, int64_t stride, int64_t columns, double* sums) {
  const int64_t blocks = (T + kBlock - 1) / kBlock;
  for (int64_t column = 0; column < columns; column += Policy::kTile) {
    const int64_t width = smaller(Policy::kTile, columns - column);
    const auto* tile = rows + column;
    for (int64_t panel = 0; panel < blocks; panel += kPanel) {
      for (int64_t i = panel; i < blocks; ++i) {
        const auto* a = tile + i * kBlock * stride;
        const int64_t height = smaller(kBlock, T - i * kBlock);
        for (int64_t j = panel; j < smaller(i, panel + kPanel); ++j) {
          add_block_of<Policy, kBlock, false>(height, a, tile + j * kBlock * stride, stride, width,
                                              sums + block_index(i, j) * kPairs);
        }
        if (i < panel + kPanel) {
          add_block_of<Policy, kBlock, true>(height, a, a, stride, width, sums + block_index(i, i) * kPairs);
        }
      }
    }
  }
}

inline int64_t gram_scratch(int64_t T) { return block_index((T + kBlock - 1) / kBlock, 0) * kPairs; }

template <class Small, class Large>
void gram(const void* data, int64_t T, int64_t row_stride, int64_t begin, int64_t end, double* scratch,
          double* packed) {
  for (int64_t s = 0; s < gram_scratch(T); ++s) scratch[s] = 0;
  const auto* rows = static_cast<const typename Small::E*>(data) + begin;
  (T <= kExactRows ? add_tiles<Small> : add_tiles<Large>)(rows, T, row_stride, end - begin, scratch);
  for (int64_t i = 0; i < T; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      *packed++ = scratch[block_index(i / kBlock, j / kBlock) * kPairs + i % kBlock * kBlock + j % kBlock];
    }
  }
}

}  // namespace gradvac::cpu::GRADVAC_VARIANT
