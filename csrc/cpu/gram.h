// Gram: dot products of all pairs of rows over a run of columns.
//
// Lanes lie along the columns, so that rows are read as they are. Blocks of kBlock x kBlock pairs keep their
// accumulators in registers over a tile of columns; a tile's sums are then added up in float64. Where reading memory is
// what takes the time (up to kExactRows of more than 16 bits), and in small groups, whose few columns make gradients
// nearly parallel, so that every bit counts, products are accumulated in float64 throughout; else in float32 over
// chains of at most kChain a lane, whose sums are added up over the tile. All this, and the order of all additions,
// depends on the type, T and the number of columns only.
#pragma once

#include <type_traits>

#include "simd.h"

namespace gradvac::cpu::GRADVAC_VARIANT {

constexpr int64_t kExactRows = 8;
constexpr int64_t kChain = 16;  // additions in float32 to one accumulator
constexpr int kPairs = (kBlock * kBlock + 3) / 4 * 4;

// ---- how elements become vectors and products become sums

template <class Element>
struct InDoubles {
  using E = Element;
  using Acc = VecD;
  using Loaded = VecD;
  static constexpr int kStep = kDoubles, kParts = 1;
  static constexpr int64_t kPanel = 6;   // blocks of rows that stay in the first-level cache while the others pass
  static constexpr int64_t kTile = 512;  // columns: 16 rows of floats fill two thirds of a first-level cache
  static Loaded load(const E* p, int) { return load_doubles(p); }
  static Acc multiply_add(Acc acc, Loaded a, Loaded b) { return acc + a * b; }
};

template <class Element>
struct InFloats {
  using E = Element;
  using Acc = VecF;
  using Loaded = VecF;
  static constexpr int kStep = kFloats, kParts = 1;
  static constexpr int64_t kPanel = 2;
  // columns: a panel of 8 rows and a block of 4 more, 2 KiB of floats each, are two thirds of a small first-level cache
  static constexpr int64_t kTile = 512;
  static Loaded load(const E* p, int) { return load_floats(p); }
  static Acc multiply_add(Acc acc, Loaded a, Loaded b) { return acc + a * b; }
};

// Products of bfloat16 are exact in float32.
template <>
struct InFloats<Bfloat16> {
  using E = Bfloat16;
  using Acc = VecF;
  static constexpr int kStep = 2 * kFloats;
  static constexpr int64_t kPanel = 2, kTile = 1024;
#ifdef __AVX512BF16__
  using Loaded = __m512bh;
  static constexpr int kParts = 1;  // each lane adds two products
  static Loaded load(const E* p, int) { return bits<__m512bh>(_mm512_loadu_si512(p)); }
  static Acc multiply_add(Acc acc, Loaded a, Loaded b) { return bits<VecF>(_mm512_dpbf16_ps(bits<__m512>(acc), a, b)); }
#else
  using Loaded = VecF;
  static constexpr int kParts = 2;  // the even columns and the odd ones: half a word each, one instruction away
  static Loaded load(const E* p, int part) { return part == 0 ? load_even_floats(p) : load_odd_floats(p); }
  static Acc multiply_add(Acc acc, Loaded a, Loaded b) { return acc + a * b; }
#endif
};

// ---- one block of pairs

// sums += the sums over the lanes of the accumulators; on the diagonal, of those with n <= m.
template <bool kDiagonal, class Acc, int M, int N>
inline void add_sums(const Acc (&acc)[M][N], double* sums) {
#if defined(__AVX512F__)
  if constexpr (!kDiagonal && M * N == 16 && std::is_same_v<Acc, VecF>) return add_sums_of_sixteen(acc[0], sums);
#endif
#pragma GCC unroll 4
  for (int first = 0; first < kPairs; first += 4) {
    Acc four[4] = {};
#pragma GCC unroll 4
    for (int pair = first; pair < first + 4; ++pair) {
      const int m = pair / kBlock, n = pair % kBlock;
      if (m < M && n < (kDiagonal ? m + 1 : N)) four[pair - first] = acc[m < M ? m : 0][n < N ? n : 0];
    }
    add_sums_of_four(four, sums + first);
  }
}

// sums += the sums over the lanes of what add(accumulators, first column, last) accumulates. Flattened: a call would
// put the accumulators into memory.
template <class Policy, int M, int N, bool kDiagonal, class Add>
[[gnu::flatten]] inline void add_chains(int64_t columns, double* sums, const Add& add) {
  typename Policy::Acc acc[M][N] = {};
  if constexpr (std::is_same_v<typename Policy::Acc, VecD>) {
    add(acc, 0, columns);
  } else {
    constexpr int64_t kColumns = kChain * kFloats;
    for (int64_t begin = 0; begin < columns; begin += kColumns) {
      typename Policy::Acc chain[M][N] = {};
      add(chain, begin, columns < begin + kColumns ? columns : begin + kColumns);
#pragma GCC unroll 16
      for (int pair = 0; pair < M * N; ++pair) acc[pair / N][pair % N] += chain[pair / N][pair % N];
    }
  }
  add_sums<kDiagonal>(acc, sums);
}

// Rows of a tile, and where each will be read from next.
template <class E>
struct Rows {
  const E* data;
  int64_t T, stride, steps;
  const char* ahead;
  int64_t ahead_stride, ahead_step;  // bytes

  // The rows from `row` on, to ask for `count` of so many parts of what is read next, beginning with `part`.
  Rows from(int64_t row, int64_t part, int64_t parts, int64_t count = 1) const {
    const auto divisor = static_cast<uint32_t>(parts);  // of 64 bits it would take several times as long
    const int64_t step = (static_cast<uint32_t>(ahead_step) + divisor - 1) / divisor;
    Rows rows = *this;
    rows.data += row * stride;
    rows.T -= row;
    rows.ahead += row * ahead_stride + part * step * steps;
    rows.ahead_step = count * step;
    return rows;
  }
};

// sums[m kBlock + n] += <a_m, b_n>. On the diagonal b is a and only n <= m is computed. The rows a ask for what is read
// next, with kBoth the rows b too. All is copied from a and b first: through a reference each step would read it again.
template <class Policy, int M, int N, bool kDiagonal, bool kBoth>
inline void add_block(const Rows<typename Policy::E>& a, const Rows<typename Policy::E>& b, double* sums) {
  using Acc = typename Policy::Acc;
  const int64_t columns = a.steps * Policy::kStep;
  const typename Policy::E *a_data = a.data, *b_data = b.data;
  const char *a_ahead = a.ahead, *b_ahead = b.ahead;
  const int64_t a_stride = a.stride, b_stride = b.stride;
  const int64_t a_ahead_stride = a.ahead_stride, b_ahead_stride = b.ahead_stride;
  const int64_t a_step = a.ahead_step, b_step = b.ahead_step;
  add_chains<Policy, M, N, kDiagonal>(columns, sums, [=](Acc(&acc)[M][N], int64_t begin, int64_t end) {
    const char* a_next = a_ahead + begin / Policy::kStep * a_step;
    const char* b_next = b_ahead + begin / Policy::kStep * b_step;
    for (int64_t column = begin; column < end; column += Policy::kStep) {
#pragma GCC unroll 2
      for (int part = 0; part < Policy::kParts; ++part) {
        typename Policy::Loaded left[M];
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) left[m] = Policy::load(a_data + m * a_stride + column, part);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
          const typename Policy::Loaded right =
              kDiagonal ? left[n] : Policy::load(b_data + n * b_stride + column, part);
#pragma GCC unroll 4
          for (int m = kDiagonal ? n : 0; m < M; ++m) acc[m][n] = Policy::multiply_add(acc[m][n], left[m], right);
        }
      }
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) prefetch(a_next + m * a_ahead_stride);
      a_next += a_step;
      if constexpr (kBoth) {
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) prefetch(b_next + n * b_ahead_stride);
        b_next += b_step;
      }
    }
  });
}

// The block that begins with these rows, as high as there are rows a.
template <class Policy, bool kDiagonal, bool kBoth, int N = kBlock, int M = kBlock>
inline void add_highest_block(const Rows<typename Policy::E>& a, const Rows<typename Policy::E>& b, double* sums) {
  if constexpr (M > 1) {
    if (a.T < M) return add_highest_block<Policy, kDiagonal, kBoth, N, M - 1>(a, b, sums);
  }
  add_block<Policy, M, kDiagonal ? M : N, kDiagonal, kBoth>(a, b, sums);
}

// Where reading a vector also converts it, that is half of the work: a block below the diagonal and the one above it on
// the diagonal, whose rows b they share, fit the registers together.
template <class Policy>
constexpr bool kCorners = kBlock == 4 && std::is_same_v<typename Policy::Acc, VecD>;

template <class Policy, int M = kBlock>
[[gnu::flatten]] inline void add_corner(const Rows<typename Policy::E>& a, const Rows<typename Policy::E>& b,
                                        double* sums, double* diagonal_sums) {
  static_assert(Policy::kParts == 1, "one load a step");
  if constexpr (M > 1) {
    if (a.T < M) return add_corner<Policy, M - 1>(a, b, sums, diagonal_sums);
  }
  typename Policy::Acc acc[M][kBlock] = {}, diagonal[kBlock][kBlock] = {};
  const char *a_next = a.ahead, *b_next = b.ahead;
  for (int64_t column = 0; column < a.steps * Policy::kStep; column += Policy::kStep) {
    typename Policy::Loaded right[kBlock];
#pragma GCC unroll 4
    for (int n = 0; n < kBlock; ++n) right[n] = Policy::load(b.data + n * b.stride + column, 0);
#pragma GCC unroll 4
    for (int n = 0; n < kBlock; ++n) {
#pragma GCC unroll 4
      for (int m = n; m < kBlock; ++m) diagonal[m][n] = Policy::multiply_add(diagonal[m][n], right[m], right[n]);
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const typename Policy::Loaded left = Policy::load(a.data + m * a.stride + column, 0);
#pragma GCC unroll 4
      for (int n = 0; n < kBlock; ++n) acc[m][n] = Policy::multiply_add(acc[m][n], left, right[n]);
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) prefetch(a_next + m * a.ahead_stride);
#pragma GCC unroll 4
    for (int n = 0; n < kBlock; ++n) prefetch(b_next + n * b.ahead_stride);
    a_next += a.ahead_step;
    b_next += b.ahead_step;
  }
  add_sums<false>(acc, sums);
  add_sums<true>(diagonal, diagonal_sums);
}

inline int64_t blocks_of(int64_t T) { return (T + kBlock - 1) / kBlock; }
inline int64_t block_index(int64_t row, int64_t column) { return row * (row + 1) / 2 + column; }

// What is read next is asked for by all blocks of these rows, evenly: all at once it would keep the caches from
// everything else. Below the first panel a row has blocks enough to its left, and those below it need not ask.
template <class Policy>
void add_tile(const Rows<typename Policy::E>& rows, double* sums) {
  const int64_t blocks = blocks_of(rows.T);
  const auto block_rows = [&](int64_t i, int64_t part, int64_t count = 1) {
    return rows.from(i * kBlock, part, i < Policy::kPanel ? blocks : i + 1, count);
  };
  for (int64_t panel = 0; panel < blocks; panel += Policy::kPanel) {
    for (int64_t i = panel; i < blocks; ++i) {
      for (int64_t j = panel; j < smaller(i, panel + Policy::kPanel); ++j) {
        double* block = sums + block_index(i, j) * kPairs;
        if constexpr (kCorners<Policy>) {
          if (j + 1 == i) {
            add_corner<Policy>(block_rows(i, j), block_rows(j, j, panel == 0 ? 2 : 1), block,
                               sums + block_index(j, j) * kPairs);
            continue;
          }
        }
        if (panel == 0) {
          add_highest_block<Policy, false, true>(block_rows(i, j), block_rows(j, i), block);
        } else {
          add_highest_block<Policy, false, false>(block_rows(i, j), block_rows(j, 0), block);
        }
      }
      // with corners, only the last block of the diagonal has nothing below it
      if (i < panel + Policy::kPanel && (!kCorners<Policy> || i + 1 == blocks)) {
        const Rows<typename Policy::E> diagonal = block_rows(i, i);
        add_highest_block<Policy, true, false>(diagonal, diagonal, sums + block_index(i, i) * kPairs);
      }
    }
  }
}

// ---- tiles in memory of their own: converted once, whole steps, and no two rows in the same cache sets

template <class To, class From>
inline void convert(const From* from, To* to) {  // one vector
  if constexpr (sizeof(To) == 8) {
    store(to, load_doubles(from));
  } else if constexpr (sizeof(To) == 4) {
    store(to, load_floats(from));
  } else {
    __builtin_memcpy(to, from, 2 * kFloats * sizeof(To));
  }
}

template <class Policy, class From>
void pack(const From* rows, int64_t T, int64_t stride, int64_t columns, typename Policy::E* packed,
          int64_t packed_stride) {
  for (int64_t row = 0; row < T; ++row, rows += stride, packed += packed_stride) {
    int64_t column = 0;
    for (; column + Policy::kStep <= columns; column += Policy::kStep) convert(rows + column, packed + column);
    if (column < columns) {
      From padded[Policy::kStep] = {};
      __builtin_memcpy(padded, rows + column, (columns - column) * sizeof(From));
      convert(padded, packed + column);
    }
  }
}

// ---- all columns

inline int64_t sums_size(int64_t T) { return (block_index(blocks_of(T), 0) * kPairs + 7) / 8 * 8; }

// Elements between packed rows: a cache line past the tile, so that rows do not share cache sets.
template <class Policy>
int64_t packed_stride() {
  return Policy::kTile + 64 / static_cast<int64_t>(sizeof(typename Policy::E));
}

// Doubles of scratch: the sums of the blocks, and room for one packed tile of the widest type.
inline int64_t gram_scratch(int64_t T) { return sums_size(T) + T * packed_stride<InDoubles<double>>(); }

// Rows whose vectors lie across two cache lines, so many that each is read often: cheaper to pack than to read.
inline bool cross_lines(const void* rows, int64_t T, int64_t stride_bytes) {
  return kBytes == 64 && T > 32 && (reinterpret_cast<intptr_t>(rows) | stride_bytes) % kBytes != 0;
}

// Columns of the next tile: whole steps, and in the end what is less than one.
template <class Policy>
int64_t tile_width(int64_t columns) {
  if (columns >= Policy::kTile) return Policy::kTile;
  return columns < Policy::kStep ? columns : columns - columns % Policy::kStep;
}

// Whole steps are read where they are, if Direct says how; less than one, and all where it does not, is packed.
template <class From, class Direct, class Packed>
void add_columns(const From* rows, int64_t T, int64_t stride, int64_t columns, double* sums, void* buffer) {
  const int64_t packed_row = packed_stride<Packed>();
  constexpr int64_t kSize = sizeof(From), kStepBytes = Packed::kStep * kSize;
  auto* packed = static_cast<typename Packed::E*>(buffer);
  for (int64_t column = 0, width = 0; column < columns; column += width) {
    width = tile_width<Packed>(columns - column);
    const int64_t steps = (width + Packed::kStep - 1) / Packed::kStep;
    const From* tile = rows + column;
    const char* ahead = reinterpret_cast<const char*>(tile) + Packed::kTile * kSize;
    if constexpr (!std::is_same_v<Direct, void>) {
      static_assert(Direct::kStep == Packed::kStep, "the same tiles");
      if (width >= Packed::kStep) {
        add_tile<Direct>({tile, T, stride, steps, ahead, stride * kSize, kStepBytes}, sums);
        continue;
      }
    }
    pack<Packed>(tile, T, stride, width, packed, packed_row);
    add_tile<Packed>({packed, T, packed_row, steps, ahead, stride * kSize, kStepBytes}, sums);
  }
}

// How a type is measured: whole tiles and packed ones, of few rows and of many.
template <class From_, class Direct_, class Packed_, class LargeDirect_, class LargePacked_>
struct Ways {
  using From = From_;
  using Direct = Direct_;
  using Packed = Packed_;
  using LargeDirect = LargeDirect_;
  using LargePacked = LargePacked_;
};

template <class Ways>
void gram(const void* data, int64_t T, int64_t row_stride, int64_t begin, int64_t end, bool small_group,
          double* scratch, double* packed) {
  using From = typename Ways::From;
  const From* rows = static_cast<const From*>(data) + begin;
  const bool across = cross_lines(rows, T, row_stride * static_cast<int64_t>(sizeof(From)));
  void* buffer = scratch + sums_size(T);
  for (int64_t s = 0; s < sums_size(T); ++s) scratch[s] = 0;
  auto add = small_group       ? add_columns<From, InDoubles<From>, InDoubles<double>>
             : T <= kExactRows ? add_columns<From, typename Ways::Direct, typename Ways::Packed>
             : across          ? add_columns<From, void, typename Ways::LargePacked>
                               : add_columns<From, typename Ways::LargeDirect, typename Ways::LargePacked>;
  add(rows, T, row_stride, end - begin, scratch, buffer);
  for (int64_t i = 0; i < T; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      *packed++ = scratch[block_index(i / kBlock, j / kBlock) * kPairs + i % kBlock * kBlock + j % kBlock];
    }
  }
}

}  // namespace gradvac::cpu::GRADVAC_VARIANT
