// Cross Gram: dot products of the rows of two buffers over a run of columns.
//
// Policies, tiles and the order of all additions are those of the Gram of as many rows as the larger buffer has: of a
// buffer and itself it gives the Gram's bits.
#pragma once

#include "gram.h"

namespace gradvac::cpu::GRADVAC_VARIANT {

inline int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }

// The block that begins with these rows, as large as they are many.
template <class Policy, int N = kBlock>
inline void add_largest_block(const Rows<typename Policy::E>& a, const Rows<typename Policy::E>& b, double* sums) {
  if constexpr (N > 1) {
    if (b.T < N) return add_largest_block<Policy, N - 1>(a, b, sums);
  }
  add_highest_block<Policy, false, true, N>(a, b, sums);
}

template <class Policy>
void add_cross_tile(const Rows<typename Policy::E>& a, const Rows<typename Policy::E>& b, double* sums) {
  const int64_t rows = blocks_of(a.T), others = blocks_of(b.T);
  for (int64_t panel = 0; panel < others; panel += Policy::kPanel) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = panel; j < smaller(others, panel + Policy::kPanel); ++j) {
        add_largest_block<Policy>(a.from(i * kBlock, j, others), b.from(j * kBlock, i, rows),
                                  sums + (i * others + j) * kPairs);
      }
    }
  }
}

template <class From, class Direct, class Packed>
void add_cross_columns(const From* a, int64_t T, int64_t a_stride, const From* b, int64_t U, int64_t b_stride,
                       int64_t columns, double* sums, void* buffer) {
  const int64_t packed_row = packed_stride<Packed>();
  constexpr int64_t kSize = sizeof(From), kStepBytes = Packed::kStep * kSize;
  auto* packed_a = static_cast<typename Packed::E*>(buffer);
  auto* packed_b = packed_a + T * packed_row;
  for (int64_t column = 0, width = 0; column < columns; column += width, a += width, b += width) {
    width = tile_width<Packed>(columns - column);
    const int64_t steps = (width + Packed::kStep - 1) / Packed::kStep;
    const char* ahead_a = reinterpret_cast<const char*>(a + Packed::kTile);
    const char* ahead_b = reinterpret_cast<const char*>(b + Packed::kTile);
    if constexpr (!std::is_same_v<Direct, void>) {
      if (width >= Packed::kStep) {
        add_cross_tile<Direct>({a, T, a_stride, steps, ahead_a, a_stride * kSize, kStepBytes},
                               {b, U, b_stride, steps, ahead_b, b_stride * kSize, kStepBytes}, sums);
        continue;
      }
    }
    pack<Packed>(a, T, a_stride, width, packed_a, packed_row);
    pack<Packed>(b, U, b_stride, width, packed_b, packed_row);
    add_cross_tile<Packed>({packed_a, T, packed_row, steps, ahead_a, a_stride * kSize, kStepBytes},
                           {packed_b, U, packed_row, steps, ahead_b, b_stride * kSize, kStepBytes}, sums);
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
  constexpr int64_t kSize = sizeof(From);
  const From *rows_a = static_cast<const From*>(a) + begin, *rows_b = static_cast<const From*>(b) + begin;
  const int64_t most = larger(T, U);
  const bool across = cross_lines(rows_a, most, a_stride * kSize) || cross_lines(rows_b, most, b_stride * kSize);
  const int64_t size = cross_sums_size(T, U);
  for (int64_t s = 0; s < size; ++s) scratch[s] = 0;
  auto add = small_group          ? add_cross_columns<From, InDoubles<From>, InDoubles<double>>
             : most <= kExactRows ? add_cross_columns<From, typename Ways::Direct, typename Ways::Packed>
             : across             ? add_cross_columns<From, void, typename Ways::LargePacked>
                                  : add_cross_columns<From, typename Ways::LargeDirect, typename Ways::LargePacked>;
  add(rows_a, T, a_stride, rows_b, U, b_stride, end - begin, scratch, scratch + size);
  for (int64_t i = 0; i < T; ++i) {
    for (int64_t j = 0; j < U; ++j) {
      const double* block = scratch + (i / kBlock * blocks_of(U) + j / kBlock) * kPairs;
      *C++ = block[i % kBlock * kBlock + j % kBlock];
    }
  }
}

}  // namespace gradvac::cpu::GRADVAC_VARIANT
