// Cross Gram: dot products of the rows of two buffers. A block a piece and block of pairs, as for the Gram of many
// rows; then the sums.
#pragma once

#include "kernels.h"

namespace gradvac::cuda {

// All pairs of a row of one buffer and a row of another.
struct Rectangle {
  Rows left, right;

  GRADVAC_HD std::int64_t count() const { return left.T * right.T; }
  GRADVAC_HD std::int64_t blocks(int height) const { return along(left.T, height) * along(right.T, height); }
  __device__ void block_at(std::int64_t which, int height, std::int64_t* block, std::int64_t* other) const {
    *block = which / along(right.T, height);
    *other = which % along(right.T, height);
  }
  __device__ const Rows& side(int which) const { return which == 0 ? left : right; }
  __device__ bool is_diagonal(std::int64_t, std::int64_t) const { return false; }
  __device__ bool has(std::int64_t i, std::int64_t j) const { return i < left.T && j < right.T; }
  __device__ std::int64_t place(std::int64_t i, std::int64_t j) const { return i * right.T + j; }
  __device__ void write(double* C, std::int64_t pair, double sum) const { C[pair] = sum; }
};

struct CrossTask {
  Rectangle pairs;
  Plan plan;
  double* sums;  // [num_pieces, T, U]
  double* C;
};

template <class E, class M>
__global__ void __launch_bounds__(M::kThreads, M::kBlocks) measure_cross(CrossTask task) {
  measure_part<E, M>(task.pairs, task.plan, task.sums);
}

template <class E>
__global__ void __launch_bounds__(kExactThreads) measure_cross_in_double(CrossTask task) {
  measure_exactly<E, kManyPairs, 2>(task.pairs, load_piece(task.plan, blockIdx.x),
                                    task.sums + blockIdx.x * task.pairs.count());
}

static __global__ void __launch_bounds__(kAddThreads) add_up_cross(CrossTask task) {
  add_up_chunk(task.pairs, task.plan, task.sums, task.C);
}

}  // namespace gradvac::cuda
