// Combine: the weighted sum of the rows, in float64.
#pragma once

#include "gram.h"

namespace gradvac::cuda {

// The nearest float32 towards zero, its last bit set if that is not the number itself: rounding it to 16 bits then
// rounds the number. A normal one lacks the last 29 bits, and is told by them: a conversion back, which is left to the
// others, would take longer than all the rest.
__device__ inline float round_to_odd(double x) {
  const float cut = __double2float_rz(x);
  const std::uint32_t bits = __float_as_uint(cut), exponent = bits & 0x7F800000u;
  bool exact = (__double_as_longlong(x) & 0x1FFFFFFF) == 0 || exponent == 0x7F800000u;
  if (exponent == 0) exact = widened_here(cut) == x;
  return __uint_as_float(exact ? bits : bits | 1u);
}

// ---- the types of results: a number of one, and word `i` of several

struct ToFloat64 {
  using Stored = double;
  __device__ static double number(double x) { return x; }
  __device__ static std::uint32_t word(const double* x, int i) {
    const auto bits = static_cast<unsigned long long>(__double_as_longlong(x[i / 2]));
    return static_cast<std::uint32_t>(i % 2 == 0 ? bits : bits >> 32);
  }
};
struct ToFloat32 {
  using Stored = float;
  __device__ static float number(double x) { return static_cast<float>(x); }
  __device__ static std::uint32_t word(const double* x, int i) { return __float_as_uint(number(x[i])); }
};
template <std::uint32_t (*floats_to_halves)(float, float)>
struct To16Bits {
  using Stored = std::uint16_t;
  __device__ static std::uint16_t number(double x) {
    return static_cast<std::uint16_t>(floats_to_halves(round_to_odd(x), 0));
  }
  __device__ static std::uint32_t word(const double* x, int i) {
    return floats_to_halves(round_to_odd(x[2 * i]), round_to_odd(x[2 * i + 1]));
  }
};
using ToBfloat16 = To16Bits<floats_to_bfloat16>;
using ToFloat16 = To16Bits<floats_to_float16>;

// Calls `take(type of the result)`.
template <class Take>
__device__ inline void with_result(Dtype dtype, Take take) {
  // no switch: it would become a jump by a table
  if (dtype == Dtype::float64) {
    take(ToFloat64());
  } else if (dtype == Dtype::float32) {
    take(ToFloat32());
  } else if (dtype == Dtype::bfloat16) {
    take(ToBfloat16());
  } else {
    take(ToFloat16());
  }
}

// Columns column .. column + width - 1 of the result, which begin at 16 bytes or, if they are less, at their size.
template <int width>
__device__ inline void store(const Result& out, std::int64_t column, const double (&values)[width]) {
  with_result(out.dtype, [&](auto type) {
    using To = decltype(type);
    constexpr int kWords = width * static_cast<int>(sizeof(typename To::Stored)) / 4;
    std::uint32_t words[kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = To::word(values, i);
    auto* p = reinterpret_cast<std::uint32_t*>(static_cast<typename To::Stored*>(out.data) + column);
    if constexpr (kWords >= 4) {
#pragma unroll
      for (int i = 0; i < kWords; i += 4) store16(p + i, words[i], words[i + 1], words[i + 2], words[i + 3]);
    } else {
#pragma unroll
      for (int i = 0; i < kWords; ++i) p[i] = words[i];
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
template <class E, class Weight>
__device__ inline void combine_numbers(const Rows& rows, std::int64_t begin, std::int64_t stop, Weight weight_of,
                                       const Result& out) {
  for (std::int64_t column = begin + thread_of_block(); column < stop; column += threads_of_block()) {
    double value = 0;
#pragma unroll 4
    for (std::int64_t j = 0; j < rows.T; ++j) {
      value = fma(weight_of(j), static_cast<double>(E::number(load_constant(rows.row<E>(j) + column))), value);
    }
    with_result(out.dtype, [&](auto type) {
      using To = decltype(type);
      static_cast<typename To::Stored*>(out.data)[column] = To::number(value);
    });
  }
}

// Whether the loads of a thread's next step are under way while it adds those of this one: alone they are too few. Then
// there are no more rows than are loaded at once.
template <class E>
GRADVAC_HD constexpr bool asks_ahead(int at_once) {
  return steps_of<E>(at_once) * at_once < 4;
}

// A tile, by a block, with weight_of(row). Loads of kAtOnce rows and some vectors of each are under way together. What
// is no whole vector is made number by number.
template <class E, int kAtOnce, class Weight>
__device__ inline void combine_tile(const Rows& rows, const Tile& tile, Weight weight_of, const Result& out) {
  constexpr int kSteps = steps_of<E>(kAtOnce);
  const std::int64_t begin = tile.begin, stop = tile.end;
  const bool aligned = rows.aligned && out.aligned && begin % 8 == 0;
  const std::int64_t end = aligned ? stop - (stop - begin) % E::kWidth : begin;  // of the vectors
  const std::int64_t step = static_cast<std::int64_t>(threads_of_block()) * E::kWidth;
  using Vectors = Vector[kSteps][kAtOnce];
  using Values = double[kSteps][E::kWidth];
  const auto load = [&](Vectors& vectors, std::int64_t start, std::int64_t first) {
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        const std::int64_t column = start + s * step;  // where nothing is, 0 is added: branches part the loads
        vectors[s][u] =
            first + u < rows.T && column < end ? load_whole<E>(rows.row<E>(first + u) + column) : Vector{{0, 0, 0, 0}};
      }
    }
  };
  const auto add = [&](Values& values, const Vectors& vectors, std::int64_t first) {
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
  };
  std::int64_t start = begin + static_cast<std::int64_t>(thread_of_block()) * E::kWidth;
  Vectors next;
  if constexpr (asks_ahead<E>(kAtOnce)) load(next, start, 0);
  for (; start < end; start += kSteps * step) {
    Values values = {};
    if constexpr (asks_ahead<E>(kAtOnce)) {
      Vectors vectors;
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
#pragma unroll
        for (int s = 0; s < kSteps; ++s) vectors[s][u] = next[s][u];
      }
      load(next, start + kSteps * step, 0);
      add(values, vectors, 0);
    } else {
      for (std::int64_t first = 0; first < rows.T; first += kAtOnce) {
        Vectors vectors;
        load(vectors, start, first);
        add(values, vectors, first);
      }
    }
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      if (start + s * step < end) store(out, start + s * step, values[s]);
    }
  }
  combine_numbers<E>(rows, end, stop, weight_of, out);
}

}  // namespace gradvac::cuda
