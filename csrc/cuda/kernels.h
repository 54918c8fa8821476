// The kernels: what a block of each does.
#pragma once

#include "matrix.h"
#include "one_pass.h"

namespace gradvac::cuda {

// ---- few rows: a block a piece, and the last one of each group finishes it

template <class E, class O>
__global__ void __launch_bounds__(O::kThreads, O::kBlocks) measure_few_rows(Task task) {
  Bench<O>& bench = *reinterpret_cast<Bench<O>*>(shared_memory());
  take_piece<E>(task, blockIdx.x, bench, [](const Vector(&)[O::kRows]) {});
}

template <class E, class O>
__global__ void __launch_bounds__(O::kThreads, OnePass<E, O>::kBlocks)
    vaccinate_in_one_pass(Task task, Result out, int slots) {
  char* memory = shared_memory();
  Bench<O>& bench = *reinterpret_cast<Bench<O>*>(memory);
  OnePass<E, O>{task, out, bench, reinterpret_cast<Vector*>(memory + sizeof(Bench<O>)), slots}.run();
}

// ---- many rows: a block a piece and block of pairs; then the sums, then a warp a row

// Not `square`: one matrix holds all pairs.
template <class M, class Pairs>
GRADVAC_HD std::int64_t matrices_of(const Pairs& pairs) {
  return M::square ? pairs.blocks(M::kRows) : 1;
}

// Blocks that a piece is given: a short one has work for more than its matrices would take.
template <class M, class Pairs>
GRADVAC_HD std::int64_t blocks_of_piece(const Pairs& pairs) {
  const std::int64_t matrices = matrices_of<M>(pairs), warps = pairs.blocks(kBlock);
  const std::int64_t useful = (warps + M::kWarps - 1) / M::kWarps, most = 16;
  return matrices > most ? matrices : useful < most ? (useful > matrices ? useful : matrices) : most;
}

template <class E, class M, class Pairs>
__device__ inline void measure_part(const Pairs& pairs, const Plan& plan, double* sums) {
  const std::int64_t parts = blocks_of_piece<M>(pairs), part = blockIdx.x % parts, index = blockIdx.x / parts;
  const Piece piece = load_piece(plan.pieces, index);
  const std::int64_t first = load_constant(plan.first_piece + piece.group);
  const std::int64_t last = load_constant(plan.first_piece + piece.group + 1);
  sums += index * pairs.count();
  if (is_short(piece, last - first == 1)) {
    measure_exactly<E>(pairs, piece, sums, part, parts);
  } else if (part < matrices_of<M>(pairs)) {
    std::int64_t block = 0, other = 0;
    if (M::square) pairs.block_at(part, M::kRows, &block, &other);
    measure_matrix<E, M>(pairs, piece, block, other, shared_memory(), sums);
  }
}

template <class E, class M>
__global__ void __launch_bounds__(M::kThreads, M::kBlocks) measure_many_rows(Task task) {
  measure_part<E, M>(Triangle{task.rows}, task.plan, task.scratch.sums);
}

constexpr int kExactThreads = 256;

template <class E>
__global__ void __launch_bounds__(kExactThreads) measure_in_double(Task task) {
  const Piece piece = load_piece(task.plan.pieces, blockIdx.x);
  measure_exactly<E>(Triangle{task.rows}, piece, task.scratch.sums + blockIdx.x * pairs_of(task.rows.T));
}

constexpr int kAddThreads = 256;

// Blocks that a group's pairs take.
GRADVAC_HD inline std::int64_t chunks_of(std::int64_t pairs) { return (pairs + kAddThreads - 1) / kAddThreads; }

template <class Pairs>
__device__ inline void add_up_chunk(const Pairs& pairs, const Plan& plan, const double* sums, double* G) {
  const std::int64_t count = pairs.count(), group = blockIdx.x / chunks_of(count);
  const std::int64_t begin = blockIdx.x % chunks_of(count) * kAddThreads, end = begin + kAddThreads;
  add_up(pairs, sums, load_constant(plan.first_piece + group), load_constant(plan.first_piece + group + 1), begin,
         end < count ? end : count, reinterpret_cast<double*>(shared_memory()),
         G + group * pairs.side(0).T * pairs.side(1).T);
}

static __global__ void __launch_bounds__(kAddThreads) add_up_groups(Task task) {
  add_up_chunk(Triangle{task.rows}, task.plan, task.scratch.sums, task.G);
}

// A warp a row of a group; the last one of the group adds up its weights.
static __global__ void __launch_bounds__(kLanes)
    solve_rows(const double* G, std::int64_t T, Vaccine vaccine, Scratch scratch) {
  const std::int64_t group = blockIdx.x / T, row = blockIdx.x % T;
  double* c = scratch.rows + group * T * T;
  solve_row(G + group * T * T, T, group, row, vaccine, RowBench(shared_memory(), T), c + row * T);
  __syncwarp();
  std::int32_t arrived = 0;
  if (lane_of_warp() == 0) arrived = arrive(scratch.counters + group);
  if (__shfl_sync(0xFFFFFFFFu, arrived, 0) != T - 1) return;
  __syncwarp();
  for (std::int64_t j = lane_of_warp(); j < T; j += kLanes) {
    double weight = 0;
    for (std::int64_t i = 0; i < T; ++i) weight += load_shared_by_blocks(c + i * T + j);
    vaccine.weights[group * T + j] = weight;
  }
}

// ---- combine: a block a tile

template <class E, int kAtOnce>
__global__ void __launch_bounds__(kCombineThreads, 2)
    combine_rows(Rows rows, Plan plan, const double* weights, Result out) {
  const Piece tile = load_piece(plan.tiles, blockIdx.x);
  combine_tile<E, kAtOnce>(rows, tile, weights + tile.group * rows.T, out);
}

}  // namespace gradvac::cuda
