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

template <class M>
GRADVAC_HD std::int64_t pairs_of_matrices(std::int64_t T) {
  return M::square ? pairs_of((T + M::kRows - 1) / M::kRows) : 1;
}

// Blocks that a piece is given: a short one has work for more than its matrices would take.
template <class M>
GRADVAC_HD std::int64_t blocks_of_piece(std::int64_t T) {
  const std::int64_t matrices = pairs_of_matrices<M>(T), warps = pairs_of(blocks_of_rows(T));
  const std::int64_t useful = (warps + M::kWarps - 1) / M::kWarps, most = 16;
  return matrices > most ? matrices : useful < most ? (useful > matrices ? useful : matrices) : most;
}

template <class E, class M>
__global__ void __launch_bounds__(M::kThreads, M::kBlocks) measure_many_rows(Task task) {
  const std::int64_t parts = blocks_of_piece<M>(task.rows.T), part = blockIdx.x % parts;
  const std::int64_t index = blockIdx.x / parts;
  const Piece piece = load_piece(task.plan.pieces, index);
  const std::int64_t first = load_constant(task.plan.first_piece + piece.group);
  const std::int64_t last = load_constant(task.plan.first_piece + piece.group + 1);
  double* sums = task.scratch.sums + index * pairs_of(task.rows.T);
  if (is_short(piece, last - first == 1)) {
    measure_exactly<E>(task.rows, piece, sums, part, parts);
  } else if (part < pairs_of_matrices<M>(task.rows.T)) {
    std::int64_t block, other;
    entry_of(part, &block, &other);
    measure_matrix<E, M>(task.rows, piece, block, other, shared_memory(), sums);
  }
}

constexpr int kExactThreads = 256;

template <class E>
__global__ void __launch_bounds__(kExactThreads) measure_in_double(Task task) {
  const Piece piece = load_piece(task.plan.pieces, blockIdx.x);
  measure_exactly<E>(task.rows, piece, task.scratch.sums + blockIdx.x * pairs_of(task.rows.T));
}

constexpr int kAddThreads = 256;

static __global__ void __launch_bounds__(kAddThreads) add_up_groups(Task task) {
  const std::int64_t T = task.rows.T, pairs = pairs_of(T), chunks = (pairs + kAddThreads - 1) / kAddThreads;
  const std::int64_t group = blockIdx.x / chunks, begin = blockIdx.x % chunks * kAddThreads;
  add_up(task.scratch.sums, load_constant(task.plan.first_piece + group),
         load_constant(task.plan.first_piece + group + 1), T, begin,
         begin + kAddThreads < pairs ? begin + kAddThreads : pairs, reinterpret_cast<double*>(shared_memory()),
         task.G + group * T * T);
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
