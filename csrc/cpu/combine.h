// Combine: the weighted sum of the rows over a run of columns, in float64.
#pragma once

#include <type_traits>

#include "gradvac/cpu.h"
#include "simd.h"

namespace gradvac::cpu::GRADVAC_VARIANT {

constexpr int64_t kCombineTile = 512;   // columns: the sums and the rounded result stay in the first-level cache
constexpr int64_t kCombineAhead = 768;  // bytes: nearer, memory would not answer in time; farther, rows would not fit

// Vectors of sums at a time: a cache line of every row, or what of it the registers hold; two are rounded together.
template <class E>
constexpr int kCombineVectors = 64 / kDoubles / static_cast<int>(sizeof(E)) < 4 ? 2 : 4;

// to[c] = sums[c] + sum_r weight[r] row_r[c] for R rows. The first rows find no sums; sums lie in the order that the
// type is fast in, and the last rows round them in their own.
template <int R, bool kFirst, bool kLast, class E, class To>
inline void add_line(const E* rows, int64_t stride, const double (&weight)[R], const double* sums, To* to) {
  constexpr int kPairs = kCombineVectors<E> / 2, kPair = 2 * kDoubles;
  using Two = decltype(load_two(rows));
  constexpr int kParts = sizeof(Two) / sizeof(Two{}.v[0]);
  Two sum[kPairs];
#pragma GCC unroll 2
  for (int p = 0; p < kPairs; ++p) sum[p] = kFirst ? Two{} : load<Two>(sums + p * kPair);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const E* row = rows + r * stride;
    const auto ahead = reinterpret_cast<uintptr_t>(row) + kCombineAhead;  // a number: it may lie outside the rows
    prefetch(reinterpret_cast<const void*>(ahead));
#pragma GCC unroll 2
    for (int p = 0; p < kPairs; ++p) {
      const Two two = load_two(row + p * kPair);
#pragma GCC unroll 4
      for (int i = 0; i < kParts; ++i) sum[p].v[i] += two.v[i] * weight[r];
    }
  }
  if constexpr (kLast && std::is_same_v<E, Bfloat16> && std::is_same_v<To, Bfloat16>) {
    static_assert(kPairs == 2, "both at once");
    store_rounded(to, sum[0], sum[1]);
  } else {
#pragma GCC unroll 2
    for (int p = 0; p < kPairs; ++p) {
      if constexpr (kLast) {
        const Doubles two = in_order<E>(sum[p]);
        store_rounded(to + p * kPair, two.v[0], two.v[1]);
      } else {
        store(to + p * kPair, sum[p]);
      }
    }
  }
}

// The same over columns. What is less than a line is padded.
template <int R, bool kFirst, bool kLast, class E, class To>
inline void add_rows(const E* rows, int64_t stride, const double* weights, int64_t columns, const double* sums,
                     To* to) {
  constexpr int kLine = kCombineVectors<E> * kDoubles;
  static_assert(kCombineTile % kLine == 0, "sums of whole lines");
  double weight[R];  // copied: for all that the compiler knows, a store to `to` changes the weights
  for (int r = 0; r < R; ++r) weight[r] = weights[r];
  int64_t column = 0;
  for (; column + kLine <= columns; column += kLine) {
    add_line<R, kFirst, kLast>(rows + column, stride, weight, sums + column, to + column);
  }
  if (column < columns) {
    E padded[R][kLine] = {};
    for (int r = 0; r < R; ++r) {
      __builtin_memcpy(padded[r], rows + r * stride + column, (columns - column) * sizeof(E));
    }
    if constexpr (kLast) {
      To rounded[kLine];
      add_line<R, kFirst, kLast>(padded[0], kLine, weight, sums + column, rounded);
      __builtin_memcpy(to + column, rounded, (columns - column) * sizeof(To));
    } else {
      add_line<R, kFirst, kLast>(padded[0], kLine, weight, sums + column, to + column);
    }
  }
}

// The last rows, `count` of them.
template <int R, bool kFirst, class E, class To>
inline void add_last_rows(int64_t count, const E* rows, int64_t stride, const double* weights, int64_t columns,
                          const double* sums, To* to) {
  if (count >= R) return add_rows<R, kFirst, true>(rows, stride, weights, columns, sums, to);
  if constexpr (R > 1) add_last_rows<R - 1, kFirst>(count, rows, stride, weights, columns, sums, to);
}

// Streaming stores spare the read of lines that are wholly overwritten, and leave the cache to the gradients.
inline void stream_out(char* to, const char* from, int64_t bytes) {
  int64_t done = 0;
#if defined(__AVX2__)
  done = smaller(-reinterpret_cast<intptr_t>(to) & (kBytes - 1), bytes);
  __builtin_memcpy(to, from, done);
  for (; done + kBytes <= bytes; done += kBytes) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + done), _mm512_loadu_si512(from + done));
#else
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + done),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + done)));
#endif
  }
#endif
  __builtin_memcpy(to + done, from + done, bytes - done);
}

template <class Out, class E>
void combine_into(Out* out, const E* rows, int64_t T, int64_t stride, int64_t begin, int64_t end, const double* weights,
                  bool stream) {
  constexpr int kRows = 8;                    // at a time: the registers of AVX-512 hold their weights beside the sums
  alignas(kBytes) double sums[kCombineTile];  // whole lines, also past the columns
  alignas(kBytes) Out rounded[kCombineTile];
  for (int64_t column = begin; column < end; column += kCombineTile) {
    const int64_t columns = smaller(kCombineTile, end - column);
    const E* tile = rows + column;
    Out* to = stream ? rounded : out + column;
    if (T <= kRows) {
      add_last_rows<kRows, true>(T, tile, stride, weights, columns, sums, to);
    } else {
      add_rows<kRows, true, false>(tile, stride, weights, columns, sums, sums);
      int64_t row = kRows;
      for (; row + kRows < T; row += kRows) {
        add_rows<kRows, false, false>(tile + row * stride, stride, weights + row, columns, sums, sums);
      }
      add_last_rows<kRows, false>(T - row, tile + row * stride, stride, weights + row, columns, sums, to);
    }
    if (stream) {
      stream_out(reinterpret_cast<char*>(out + column), reinterpret_cast<const char*>(rounded), columns * sizeof(Out));
    }
  }
#if defined(__AVX2__)
  if (stream) _mm_sfence();
#endif
}

template <class E>
void combine(const void* data, int64_t T, int64_t row_stride, int64_t begin, int64_t end, const double* weights,
             void* out, Dtype out_dtype, bool stream) {
  const auto into = [=](auto* typed) {
    combine_into(typed, static_cast<const E*>(data), T, row_stride, begin, end, weights, stream);
  };
  switch (out_dtype) {
    case Dtype::float32: return into(static_cast<float*>(out));
    case Dtype::bfloat16: return into(static_cast<Bfloat16*>(out));
    case Dtype::float16: return into(static_cast<Float16*>(out));
    case Dtype::float64: return into(static_cast<double*>(out));
  }
}

}  // namespace gradvac::cpu::GRADVAC_VARIANT
