// Cross Gram: dot products of the rows of two buffers over a run of columns.
//
// Policies, tiles and the order of all additions are those of the Gram of as many rows as the larger buffer has: of a
// buffer and itself it gives the Gram's bits.
#pragma once

#include "gram.h"

namespace gradvac::cpu::GRADVAC_VARIANT {

inline int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }

// Rows of one of the buffers, from the first column of a tile on.
template <class E>
struct Side {
  const E* rows;
  int64_t T, stride;
  int64_t ahead;  // columns on, what is read next

  Side from(int64_t row, bool ask) const { return {rows + row * stride, T - row, stride, ask ? ahead : 0}; }
};

// sums[m kBlock + n] += <a_m, b_n>, `columns` a multiple of kStep.
template <class Policy, int M, int N>
inline void add_cross_block(const Side<typename Policy::E>& a, const Side<typename Policy::E>& b, int64_t columns,
                            double* sums) {
  using Acc = typename Policy::Acc;
  add_chains<Policy, M, N, false>(columns, sums, [=](Acc(&acc)[M][N], int64_t begin, int64_t end) {
    for (int64_t column = begin; column < end; column += Policy::kStep) {
#pragma GCC unroll 2
      for (int part = 0; part < Policy::kParts; ++part) {
        typename Policy::Loaded left[M];
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) left[m] = Policy::load(a.rows + m * a.stride + column, part);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
          const typename Policy::Loaded right = Policy::load(b.rows + n * b.stride + column, part);
#pragma GCC unroll 4
          for (int m = 0; m < M; ++m) acc[m][n] = Policy::multiply_add(acc[m][n], left[m], right);
        }
      }
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) prefetch(a.rows + m * a.stride + column + a.ahead);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) prefetch(b.rows + n * b.stride + column + b.ahead);
    }
  });
}

// The block that begins with these rows, as large as they are many.
template <class Policy, int M = kBlock, int N = kBlock>
inline void add_largest_block(const Side<typename Policy::E>& a, const Side<typename Policy::E>& b, int64_t columns,
                              double* sums) {
  if constexpr (M > 1) {
    if (a.T < M) return add_largest_block<Policy, M - 1, N>(a, b, columns, sums);
  }
  if constexpr (N > 1) {
    if (b.T < N) return add_largest_block<Policy, M, N - 1>(a, b, columns, sums);
  }
  add_cross_block<Policy, M, N>(a, b, columns, sums);
}

template <class Policy>
void add_cross_tile(const Side<typename Policy::E>& a, const Side<typename Policy::E>& b, int64_t columns,
                    double* sums) {
  const int64_t rows = blocks_of(a.T), others = blocks_of(b.T);
  for (int64_t panel = 0; panel < others; panel += Policy::kPanel) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = panel; j < smaller(others, panel + Policy::kPanel); ++j) {
        add_largest_block<Policy>(a.from(i * kBlock, j == 0), b.from(j * kBlock, i == 0), columns,
                                  sums + (i * others + j) * kPairs);
      }
    }
  }
}

template <class From, class Direct, class Packed>
void add_cross_columns(const Side<From>& a, const Side<From>& b, int64_t columns, double* sums, void* buffer) {
  const int64_t packed_row = packed_stride<Packed>();
  auto* packed_a = static_cast<typename Packed::E*>(buffer);
  auto* packed_b = packed_a + a.T * packed_row;
  for (int64_t column = 0, width = 0; column < columns; column += width) {
    width = tile_width<Packed>(columns - column);
    if constexpr (!std::is_same_v<Direct, void>) {
      if (width >= Packed::kStep) {
        add_cross_tile<Direct>({a.rows + column, a.T, a.stride, Packed::kTile},
                               {b.rows + column, b.T, b.stride, Packed::kTile}, width, sums);
        continue;
      }
    }
    pack<Packed>(a.rows + column, a.T, a.stride, width, packed_a, packed_row);
    pack<Packed>(b.rows + column, b.T, b.stride, width, packed_b, packed_row);
    const int64_t steps = (width + Packed::kStep - 1) / Packed::kStep;
    add_cross_tile<Packed>({packed_a, a.T, packed_row, 0}, {packed_b, b.T, packed_row, 0}, steps * Packed::kStep, sums);
  }
}

inline int64_t cross_sums_size(int64_t T, int64_t U) { return (blocks_of(T) * blocks_of(U) * kPairs + 7) / 8 * 8; }

// Doubles of scratch: the sums of the blocks, and room for one packed tile of the widest type.
inline int64_t cross_gram_scratch(int64_t T, int64_t U) {
  return cross_sums_size(T, U) + (T + U) * packed_stride<InDoubles<double>>();
}

template <class Ways>
void cross_gram(const void* a, int64_t T, int64_t a_stride, const void* b, int64_t U, int64_t b_stride, int64_t begin,
                int64_t end, bool small_group, double* scratch, double* C) {
  using From = typename Ways::From;
  const int64_t size = cross_sums_size(T, U);
  for (int64_t s = 0; s < size; ++s) scratch[s] = 0;
  auto add = small_group ? add_cross_columns<From, InDoubles<From>, InDoubles<double>>
             : larger(T, U) <= kExactRows
                 ? add_cross_columns<From, typename Ways::Direct, typename Ways::Packed>
                 : add_cross_columns<From, typename Ways::LargeDirect, typename Ways::LargePacked>;
  add({static_cast<const From*>(a) + begin, T, a_stride, 0}, {static_cast<const From*>(b) + begin, U, b_stride, 0},
      end - begin, scratch, scratch + size);
  for (int64_t i = 0; i < T; ++i) {
    for (int64_t j = 0; j < U; ++j) {
      const double* block = scratch + (i / kBlock * blocks_of(U) + j / kBlock) * kPairs;
      *C++ = block[i % kBlock * kBlock + j % kBlock];
    }
  }
}

}  // namespace gradvac::cpu::GRADVAC_VARIANT
