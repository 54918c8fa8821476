// The kernels: what a block of each does.
#pragma once

#include "one_launch.h"

namespace gradvac::cuda {

// ---- few rows: a block a piece, and the last one of each group finishes it

template <class E, class P>
__global__ void __launch_bounds__(P::kThreads, P::template blocks<E>()) measure_few_rows(Task task) {
  take_piece<E, P::template stretch<E>()>(task, blockIdx.x, *reinterpret_cast<FewRowsMemory<P>*>(shared_memory()));
}

template <class P>
constexpr int kTurnBlocks = 768 / P::kThreads;  // of a multiprocessor: those that wait take little of it

template <class E, class P>
__global__ void __launch_bounds__(P::kThreads, kTurnBlocks<P>) vaccinate_in_one_launch(Task task, Result out) {
  take_turn<E>(task, out, *reinterpret_cast<TurnMemory<P>*>(shared_memory()));
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
  const std::int64_t matrices = matrices_of<M>(pairs), warps = pairs.blocks(kManyPairs);
  const std::int64_t useful = (warps + M::kWarps - 1) / M::kWarps, most = 16;
  return matrices > most ? matrices : useful < most ? (useful > matrices ? useful : matrices) : most;
}

template <class E, class M, class Pairs>
__device__ inline void measure_part(const Pairs& pairs, const Plan& plan, double* sums) {
  const std::int64_t parts = blocks_of_piece<M>(pairs), part = blockIdx.x % parts, index = blockIdx.x / parts;
  const Piece piece = load_piece(plan, index);
  sums += index * pairs.count();
  if (piece.is_short()) {
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
  const Piece piece = load_piece(task.plan, blockIdx.x);
  measure_exactly<E, kManyPairs, 2>(Triangle{task.rows}, piece, task.scratch.sums + blockIdx.x * pairs_of(task.rows.T));
}

constexpr int kAddThreads = 256, kAddPairs = 32;

// Blocks that a group's pairs take: kAddPairs each, so that many threads share the pieces out.
GRADVAC_HD inline std::int64_t chunks_of(std::int64_t pairs) { return (pairs + kAddPairs - 1) / kAddPairs; }

template <class Pairs>
__device__ inline void add_up_chunk(const Pairs& pairs, const Plan& plan, const double* sums, double* G) {
  const std::int64_t count = pairs.count(), group = blockIdx.x / chunks_of(count);
  const std::int64_t begin = blockIdx.x % chunks_of(count) * kAddPairs, end = begin + kAddPairs;
  double* matrix = G + group * pairs.side(0).T * pairs.side(1).T;
  add_up(pairs, sums, load_constant(plan.first_piece + group), load_constant(plan.first_piece + group + 1), begin,
         end < count ? end : count, reinterpret_cast<double*>(shared_memory()),
         [&](std::int64_t pair, double sum) { pairs.write(matrix, pair, sum); });
}

static __global__ void __launch_bounds__(kAddThreads) add_up_groups(Task task) {
  add_up_chunk(Triangle{task.rows}, task.plan, task.scratch.sums, task.G);
}

// A warp a row of a group; the last one of the group adds up its weights.
static __global__ void __launch_bounds__(kLanes)
    solve_rows(const double* G, std::int64_t T, Vaccine vaccine, Scratch scratch) {
  const std::int64_t group = blockIdx.x / T, row = blockIdx.x % T;
  double* c = scratch.rows + group * T * T;
  const RowBench bench(shared_memory(), T);
  const bool may_turn = prepare_row(T, group, row, vaccine, bench, c + row * T);
  if (may_turn) solve_row(G + group * T * T, T, group, row, vaccine, bench, c + row * T);
  __syncwarp();
  int is_last = 0;
  if (lane_of_warp() == 0) is_last = arrive_last(scratch.counters + group, T);
  if (__shfl_sync(0xFFFFFFFFu, is_last, 0) == 0) return;
  __syncwarp();
  for (std::int64_t j = lane_of_warp(); j < T; j += kLanes) {
    double weight = 0;
    for (std::int64_t i = 0; i < T; ++i) weight += load_shared_by_blocks(c + i * T + j);
    vaccine.weights[group * T + j] = weight;
  }
}

// ---- combine: a block a tile

template <class E, int kAtOnce>
__global__ void __launch_bounds__(kCombineThreads, blocks_that_combine<E>(kAtOnce))
    combine_rows(Rows rows, Plan plan, const double* weights, Result out) {
  const Tile tile = load_tile(plan, blockIdx.x);
  const double* of_group = weights + tile.group * rows.T;
  combine_tile<E, kAtOnce>(rows, tile, [&](std::int64_t j) { return load_constant(of_group + j); }, out);
}

}  // namespace gradvac::cuda
