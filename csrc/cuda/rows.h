// Rows of the buffer as vectors of 16 bytes, and sums across the lanes of a warp.
#pragma once

#include "gradvac/cuda.h"
#include "platform.h"

namespace gradvac::cuda {

constexpr int kLanes = 32;
__device__ inline int lane_of_warp() { return static_cast<int>(threadIdx.x) % kLanes; }
__device__ inline int thread_of_block() { return static_cast<int>(threadIdx.x); }
__device__ inline int warp_of_block() { return thread_of_block() / kLanes; }
__device__ inline int threads_of_block() { return static_cast<int>(blockDim.x); }

struct alignas(16) Vector {
  std::uint32_t words[4];
};

// ---- the types of elements: as stored, in float32 and in float64

struct Float32 {
  using Stored = std::uint32_t;
  static constexpr int kWidth = 4;  // elements of a vector
  __device__ static float number(Stored x) { return __uint_as_float(x); }
  __device__ static float number(const Vector& v, int w) { return __uint_as_float(v.words[w]); }
};
struct Bfloat16 {
  using Stored = std::uint16_t;
  static constexpr int kWidth = 8;
  __device__ static float number(Stored x) { return __uint_as_float(static_cast<std::uint32_t>(x) << 16); }
  __device__ static float number(const Vector& v, int w) {
    const std::uint32_t pair = v.words[w / 2];
    return __uint_as_float(w % 2 == 0 ? pair << 16 : pair & 0xFFFF0000u);
  }
};
struct Float16 {
  using Stored = std::uint16_t;
  static constexpr int kWidth = 8;
  __device__ static float number(Stored x) { return half_to_float(x); }
  __device__ static float number(const Vector& v, int w) {
    return half_to_float(w % 2 == 0 ? v.words[w / 2] & 0xFFFFu : v.words[w / 2] >> 16);
  }
};
struct Float64 {
  using Stored = unsigned long long;
  static constexpr int kWidth = 2;
  __device__ static double number(Stored x) { return __longlong_as_double(static_cast<long long>(x)); }
  __device__ static double number(const Vector& v, int w) {
    return number(static_cast<Stored>(v.words[2 * w + 1]) << 32 | v.words[2 * w]);
  }
};

// A vector that lies at 16 bytes.
template <class E>
__device__ inline Vector load_whole(const typename E::Stored* numbers) {
  const uint4 loaded = load_constant(reinterpret_cast<const uint4*>(numbers));
  return {{loaded.x, loaded.y, loaded.z, loaded.w}};
}

// Columns column .. column + kWidth - 1 of a row; zeros from `end` on. `whole`: all are there, at 16 bytes.
template <class E>
__device__ inline Vector load_vector(const typename E::Stored* row, std::int64_t column, std::int64_t end, bool whole) {
  if (whole) return load_whole<E>(row + column);
  Vector v = {{0, 0, 0, 0}};
  constexpr int kSize = sizeof(typename E::Stored);
#pragma unroll
  for (int w = 0; w < E::kWidth; ++w) {
    const std::uint64_t x = column + w < end ? load_constant(row + column + w) : 0;
    if constexpr (kSize == 8) {
      v.words[2 * w] = static_cast<std::uint32_t>(x);
      v.words[2 * w + 1] = static_cast<std::uint32_t>(x >> 32);
    } else if constexpr (kSize == 4) {
      v.words[w] = static_cast<std::uint32_t>(x);
    } else {
      v.words[w / 2] |= static_cast<std::uint32_t>(x) << (16 * (w % 2));
    }
  }
  return v;
}

// ---- sums across a warp

// Which of `count` sums, at most 32, this lane has after `add_lanes`; none if it is not below `count`.
template <int count>
__device__ inline int sum_of_lane() {
  int sizes[6] = {count};
#pragma unroll
  for (int level = 0; level < 5; ++level) sizes[level + 1] = (sizes[level] + 1) / 2;
  int which = 0;
  const int lane = lane_of_warp();
#pragma unroll
  for (int level = 4; level >= 0; --level) {
    if ((lane >> (4 - level)) & 1) {
      if (which + sizes[level + 1] >= sizes[level]) return count;
      which += sizes[level + 1];
    }
  }
  return which;
}

// Adds up `sums` over the lanes; each lane keeps one of them, in the first place. Half of the sums change hands
// in every step: the lanes below 16 keep the first half, and so on.
template <class Sum, int count>
__device__ inline void add_lanes(Sum (&sums)[count]) {
  const int lane = lane_of_warp();
  int size = count;
#pragma unroll
  for (int level = 0; level < 5; ++level) {
    const int half = (size + 1) / 2, distance = 16 >> level;
    const bool upper = (lane & distance) != 0;
#pragma unroll
    for (int i = 0; i < (count + 1) / 2; ++i) {
      if (i < half) {
        const Sum second = i + half < size ? sums[i + half] : Sum(0);
        const Sum kept = upper ? second : sums[i], sent = upper ? sums[i] : second;
        sums[i] = kept + __shfl_xor_sync(0xFFFFFFFFu, sent, distance);
      }
    }
    size = half;
  }
}

}  // namespace gradvac::cuda
