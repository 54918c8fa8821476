// Combine: the weighted sum of the rows, in float64.
#pragma once

#include <type_traits>

#include "gram.h"

namespace gradvac::cuda {

// The nearest float32 towards zero, its last bit set if that is not the number itself: rounding it to 16 bits then
// rounds the number. A normal one lacks the last 29 bits, and is told by them: a conversion back would take longer than
// all the rest.
__device__ inline float round_to_odd(double x) {
  const float cut = __double2float_rz(x);
  const std::uint32_t bits = __float_as_uint(cut), exponent = bits & 0x7F800000u;
  bool exact = (__double_as_longlong(x) & 0x1FFFFFFF) == 0 || exponent == 0x7F800000u;
  if (exponent == 0) exact = static_cast<double>(cut) == x;
  return __uint_as_float(exact ? bits : bits | 1u);
}

// Calls `take(pointer to what is stored, conversion to it)` for the type of the result.
template <class Take>
__device__ inline void with_result(const Result& out, Take take) {
  if (out.dtype == Dtype::float64) {
    take(static_cast<double*>(out.data), [](double x) { return x; });
  } else if (out.dtype == Dtype::float32) {
    take(static_cast<float*>(out.data), [](double x) { return static_cast<float>(x); });
  } else if (out.dtype == Dtype::bfloat16) {
    take(static_cast<std::uint16_t*>(out.data),
         [](double x) { return static_cast<std::uint16_t>(float_to_bfloat16(round_to_odd(x))); });
  } else {
    take(static_cast<std::uint16_t*>(out.data),
         [](double x) { return static_cast<std::uint16_t>(float_to_half(round_to_odd(x))); });
  }
}

__device__ inline std::uint32_t word_of(const double* x, int i) {
  const auto bits = static_cast<unsigned long long>(__double_as_longlong(x[i / 2]));
  return static_cast<std::uint32_t>(i % 2 == 0 ? bits : bits >> 32);
}
__device__ inline std::uint32_t word_of(const float* x, int i) { return __float_as_uint(x[i]); }
__device__ inline std::uint32_t word_of(const std::uint16_t* x, int i) {
  return static_cast<std::uint32_t>(x[2 * i]) | static_cast<std::uint32_t>(x[2 * i + 1]) << 16;
}

// Columns column .. column + width - 1 of the result, which begin at 16 bytes or, if they are less, at their size.
template <int width>
__device__ inline void store(const Result& out, std::int64_t column, const double (&values)[width]) {
  with_result(out, [&](auto* p, auto convert) {
    std::remove_reference_t<decltype(*p)> converted[width];
#pragma unroll
    for (int w = 0; w < width; ++w) converted[w] = convert(values[w]);
    constexpr int kWords = width * static_cast<int>(sizeof(*p)) / 4;
    auto* words = reinterpret_cast<std::uint32_t*>(p + column);
    if constexpr (kWords >= 4) {
#pragma unroll
      for (int i = 0; i < kWords; i += 4) {
        store16(words + i, word_of(converted, i), word_of(converted, i + 1), word_of(converted, i + 2),
                word_of(converted, i + 3));
      }
    } else {
#pragma unroll
      for (int i = 0; i < kWords; ++i) words[i] = word_of(converted, i);
    }
  });
}

// What a block makes, of one group.
struct Tile {
  std::int64_t group, begin, end;
};
__device__ inline Tile load_tile(const Plan& plan, std::int64_t i) {
  const std::int64_t* row = plan.tiles + 3 * i;
  return {load_constant(row), load_constant(row + 1), load_constant(row + 2)};
}

constexpr int kCombineThreads = 128;

// Vectors of a row that make eight loads, of `at_once` rows each, but no more than 16 numbers; one of 16 bits, whose
// conversions take the time: more blocks of a multiprocessor then.
template <class E>
GRADVAC_HD constexpr int steps_of(int at_once) {
  return E::kWidth == 8 ? 1 : 8 / at_once < 16 / E::kWidth ? 8 / at_once : 16 / E::kWidth;
}
template <class E>
GRADVAC_HD constexpr int blocks_that_combine(int at_once) {
  return E::kWidth < 8 ? 5 : at_once < 4 ? 8 : 7;
}

// Columns begin .. stop - 1 of the result, number by number.
template <class E, class Who, class Weight>
__device__ inline void combine_numbers(Who who, const Rows& rows, std::int64_t begin, std::int64_t stop,
                                       Weight weight_of, const Result& out) {
  for (std::int64_t column = begin + who.thread(); column < stop; column += who.threads()) {
    double value = 0;
#pragma unroll 4
    for (std::int64_t j = 0; j < rows.T; ++j) {
      value = fma(weight_of(j), static_cast<double>(E::number(load_constant(rows.row<E>(j) + column))), value);
    }
    with_result(out, [&](auto* p, auto convert) { p[column] = convert(value); });
  }
}

// A tile, by a block, with weight_of(row). Loads of kAtOnce rows and some vectors of each are under way together. What
// is no whole vector is made number by number.
template <class E, int kAtOnce, class Weight>
__device__ inline void combine_tile(const Rows& rows, const Tile& tile, Weight weight_of, const Result& out) {
  constexpr int kSteps = steps_of<E>(kAtOnce);
  const WholeBlock who;
  const std::int64_t begin = tile.begin, stop = tile.end;
  const bool aligned = rows.aligned && out.aligned && begin % 8 == 0;
  const std::int64_t end = aligned ? stop - (stop - begin) % E::kWidth : begin;  // of the vectors
  const std::int64_t step = static_cast<std::int64_t>(who.threads()) * E::kWidth;
  for (std::int64_t start = begin + static_cast<std::int64_t>(who.thread()) * E::kWidth; start < end;
       start += kSteps * step) {
    double values[kSteps][E::kWidth] = {};
    for (std::int64_t first = 0; first < rows.T; first += kAtOnce) {
      Vector vectors[kSteps][kAtOnce];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
          const std::int64_t column = start + s * step;  // where nothing is, 0 is added: branches part the loads
          vectors[s][u] = first + u < rows.T && column < end ? load_whole<E>(rows.row<E>(first + u) + column)
                                                             : Vector{{0, 0, 0, 0}};
        }
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const double weight = first + u < rows.T ? weight_of(first + u) : 0.0;
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
#pragma unroll
          for (int w = 0; w < E::kWidth; ++w) {
            values[s][w] = fma(weight, static_cast<double>(E::number(vectors[s][u], w)), values[s][w]);
          }
        }
      }
    }
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      if (start + s * step < end) store(out, start + s * step, values[s]);
    }
  }
  combine_numbers<E>(who, rows, end, stop, weight_of, out);
}

}  // namespace gradvac::cuda
