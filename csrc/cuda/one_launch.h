// One launch: blocks measure the pieces and then combine the tiles, in turns that they draw.
//
// The first groups have long been solved when the last ones are measured: their tiles are combined meanwhile, and no
// launch ends before the next one begins. A block whose tile has no weights yet waits for them, and so only for turns
// before its own: whatever blocks are resident, the earliest turn that is not done always goes on.
#pragma once

#include "few_rows.h"

namespace gradvac::cuda {

// Shared memory of a block.
template <class P>
struct TurnMemory {
  FewRowsMemory<P> measure;
  double weights[P::kRows];
  std::int32_t turn;
};

template <class Happened>
__device__ inline void wait_until(Happened happened) {
  for (int polls = 0; !happened(); ++polls) {
    if (polls > kMostPolls) give_up();
    wait_a_little();
  }
}

template <class E, class P>
__device__ inline void take_turn(const Task& task, const Result& out, TurnMemory<P>& memory) {
  const Plan& plan = task.plan;
  const int thread = thread_of_block();
  if (thread == 0) memory.turn = draw(task.scratch.counters + plan.K);
  __syncthreads();
  const std::int64_t turn = memory.turn;
  if (turn < plan.num_pieces) {
    take_piece<E, 8>(task, turn, memory.measure);
    return;
  }
  const Tile tile = load_tile(plan, plan.num_pieces + plan.num_tiles - 1 - turn);  // the first columns first
  if (thread < task.rows.T) {
    const double* weight = task.scratch.shown + tile.group * task.rows.T + thread;
    wait_until([&] { return is_shown(weight, memory.weights + thread); });
  }
  __syncthreads();
  combine_tile<E, P::kRows>(task.rows, tile, [&](std::int64_t j) { return memory.weights[j]; }, out);
}

}  // namespace gradvac::cuda
