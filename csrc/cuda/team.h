// Who does a piece of work together: a block, or some warps of it.
#pragma once

#include "rows.h"

namespace gradvac::cuda {

struct WholeBlock {
  __device__ static int thread() { return static_cast<int>(threadIdx.x); }
  __device__ static int threads() { return static_cast<int>(blockDim.x); }
  __device__ static int warp() { return warp_of_block(); }
  __device__ static int warps() { return threads() / kLanes; }
  __device__ static void sync() { __syncthreads(); }
};

// `count` warps from `first` on; `id`, of 1 to 15, is another one for each team of a block.
template <int id, int first, int count>
struct Team {
  __device__ static int thread() { return static_cast<int>(threadIdx.x) - first * kLanes; }
  __device__ static constexpr int threads() { return count * kLanes; }
  __device__ static int warp() { return warp_of_block() - first; }
  __device__ static constexpr int warps() { return count; }
  __device__ static void sync() { sync_team(id, threads()); }
  __device__ static bool has_this_thread() { return thread() >= 0 && thread() < threads(); }
};

}  // namespace gradvac::cuda
