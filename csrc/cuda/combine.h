// Combine: the weighted sum of the rows, in float64.
#pragma once

#include "gram.h"

namespace gradvac::cuda {

// The nearest float32 towards zero, its last bit set if that is not the number itself: rounding it to 16 bits then
// rounds the number.
__device__ inline float round_to_odd(double x) {
  const float cut = __double2float_rz(x);
  const std::uint32_t bits = __float_as_uint(cut);
  const bool exact = static_cast<double>(cut) == x || x != x || (bits & 0x7F800000u) == 0x7F800000u;
  return __uint_as_float(exact ? bits : bits | 1u);
}

// Columns column .. column + width - 1 of the result, as far as `end`. `whole`: all are there, at 16 bytes.
template <int width>
__device__ inline void store(const Result& out, std::int64_t column, std::int64_t end, bool whole,
                             const double (&values)[width]) {
  const auto narrow = [&](auto* p, auto convert) {
#pragma unroll
    for (int w = 0; w < width; ++w) {
      if (column + w < end) p[column + w] = convert(values[w]);
    }
  };
  // `words` of 32 bits, four at once where there are as many
  const auto wide = [&](void* p, auto words) {
    constexpr int kWords = sizeof(words) / 4;
    if constexpr (kWords >= 4) {
#pragma unroll
      for (int w = 0; w < kWords; w += 4) {
        store16(static_cast<std::uint32_t*>(p) + w, words.at[w], words.at[w + 1], words.at[w + 2], words.at[w + 3]);
      }
    } else {
#pragma unroll
      for (int w = 0; w < kWords; ++w) static_cast<std::uint32_t*>(p)[w] = words.at[w];
    }
  };
  if (out.dtype == Dtype::float64) {
    double* p = static_cast<double*>(out.data);
    if (!whole) return narrow(p, [](double x) { return x; });
    struct {
      std::uint32_t at[2 * width];
    } words;
#pragma unroll
    for (int w = 0; w < width; ++w) {
      const auto bits = static_cast<unsigned long long>(__double_as_longlong(values[w]));
      words.at[2 * w] = static_cast<std::uint32_t>(bits);
      words.at[2 * w + 1] = static_cast<std::uint32_t>(bits >> 32);
    }
    wide(p + column, words);
  } else if (out.dtype == Dtype::float32) {
    float* p = static_cast<float*>(out.data);
    if (!whole) return narrow(p, [](double x) { return static_cast<float>(x); });
    struct {
      std::uint32_t at[width];
    } words;
#pragma unroll
    for (int w = 0; w < width; ++w) words.at[w] = __float_as_uint(static_cast<float>(values[w]));
    wide(p + column, words);
  } else {
    std::uint16_t* p = static_cast<std::uint16_t*>(out.data);
    const bool brain = out.dtype == Dtype::bfloat16;
    const auto convert = [brain](double x) {
      const float odd = round_to_odd(x);
      return brain ? float_to_bfloat16(odd) : float_to_half(odd);
    };
    if (!whole) return narrow(p, [&](double x) { return static_cast<std::uint16_t>(convert(x)); });
    struct {
      std::uint32_t at[width / 2];
    } words;
#pragma unroll
    for (int w = 0; w < width; w += 2) words.at[w / 2] = convert(values[w]) | convert(values[w + 1]) << 16;
    wide(p + column, words);
  }
}

constexpr int kCombineThreads = 256;

// A tile of the result: weights [T] of its group, from an earlier launch. Loads of kAtOnce rows, and of as many columns
// as make eight loads, but no more than 16 a thread, are under way together.
template <class E, int kAtOnce>
__device__ inline void combine_tile(const Rows& rows, const Piece& tile, const double* weights, const Result& out) {
  constexpr int kSteps = 8 / kAtOnce < 16 / E::kWidth ? 8 / kAtOnce : 16 / E::kWidth;
  const bool aligned = rows.aligned && out.aligned && tile.begin % 8 == 0;
  const std::int64_t step = static_cast<std::int64_t>(blockDim.x) * E::kWidth;
  for (std::int64_t start = tile.begin + static_cast<std::int64_t>(threadIdx.x) * E::kWidth; start < tile.end;
       start += kSteps * step) {
    const bool whole = aligned && start + (kSteps - 1) * step + E::kWidth <= tile.end;
    double values[kSteps][E::kWidth] = {};
    for (std::int64_t first = 0; first < rows.T; first += kAtOnce) {
      Vector vectors[kSteps][kAtOnce];
      double weight[kAtOnce];
      const auto load_all = [&](bool at_once) {
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) {
          if (first + u >= rows.T) continue;
          weight[u] = load_constant(weights + first + u);
#pragma unroll
          for (int s = 0; s < kSteps; ++s) {
            vectors[s][u] = load_vector<E>(rows.row<E>(first + u), start + s * step, tile.end, at_once);
          }
        }
      };
      if (whole) {
        load_all(true);
      } else {
        load_all(false);
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        if (first + u >= rows.T) continue;
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
#pragma unroll
          for (int w = 0; w < E::kWidth; ++w) {
            values[s][w] = fma(weight[u], static_cast<double>(E::number(vectors[s][u], w)), values[s][w]);
          }
        }
      }
    }
#pragma unroll
    for (int s = 0; s < kSteps; ++s) store(out, start + s * step, tile.end, whole, values[s]);
  }
}

}  // namespace gradvac::cuda
