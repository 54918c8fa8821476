// Which kernels make a call, by the type and the number of the rows.
#include <algorithm>

#include "cross_gram.h"

namespace gradvac::cuda {

namespace {

constexpr std::int64_t kMostBlocks = 0x7FFFFFFF;

#define GRADVAC_TRY(call)                         \
  do {                                            \
    const Error error = static_cast<Error>(call); \
    if (error != 0) return error;                 \
  } while (0)

Rows rows_of(const Buffer& grads) { return {grads.data, grads.T, grads.row_stride, grads.aligned}; }

// How many rows are few: their outer products fit the registers, and memory is what takes the time.
constexpr std::int64_t kFewRows16 = 8, kFewRows32 = 16;
constexpr std::int64_t kOnePassRows = 8;  // and what else one pass has to remember

bool has_few_rows(const Buffer& grads) {
  switch (grads.dtype) {
    case Dtype::float32: return grads.T <= kFewRows32;
    case Dtype::float64: return false;
    default: return grads.T <= kFewRows16;
  }
}

// Calls `take(Outer<rows>)` for the smallest that holds T, which is at most `most`.
template <std::int64_t most, class Take>
Error with_outer(std::int64_t T, Take take) {
  if (T <= 2) return take(Outer<2>());
  if (T <= 4) return take(Outer<4>());
  if constexpr (most > 8) {
    if (T > 12) return take(Outer<16>());
    if (T > 8) return take(Outer<12>());
  }
  return take(Outer<8>());
}

// Calls `take(Element)` for the type of the rows.
template <class Take>
Error with_element(Dtype dtype, Take take) {
  switch (dtype) {
    case Dtype::float32: return take(Float32());
    case Dtype::bfloat16: return take(Bfloat16());
    case Dtype::float16: return take(Float16());
    default: return take(Float64());
  }
}

Error measure_few(const Buffer& grads, const Task& task, Stream stream) {
  return with_element(grads.dtype, [&](auto element) -> Error {
    using E = decltype(element);
    if constexpr (E::kWidth == 2) {
      return 0;  // float64 has no few rows
    } else {
      return with_outer<sizeof(typename E::Stored) == 4 ? kFewRows32 : kFewRows16>(grads.T, [&](auto outer) -> Error {
        using O = decltype(outer);
        return launch(measure_few_rows<E, O>, {task.plan.num_pieces, O::kThreads, sizeof(Bench<O>), false, stream},
                      task);
      });
    }
  });
}

template <class E, class M>
Error measure_blocks(const Task& task, Stream stream) {
  const std::int64_t count = task.plan.num_pieces * blocks_of_piece<M>(Triangle{task.rows});
  if (count > kMostBlocks) return kTooMany;
  return launch(measure_many_rows<E, M>, {count, M::kThreads, M::kShared, false, stream}, task);
}

Error measure_many(const Buffer& grads, const Task& task, Stream stream) {
  GRADVAC_TRY(with_element(grads.dtype, [&](auto element) -> Error {
    using E = decltype(element);
    if constexpr (E::kWidth == 2) {
      return launch(measure_in_double<E>, {task.plan.num_pieces, kExactThreads, 0, false, stream}, task);
    } else {
      if (grads.T <= 16) return measure_blocks<E, Matrix<2, false>>(task, stream);
      if (grads.T <= 32) return measure_blocks<E, Matrix<4, false>>(task, stream);
      if (grads.T <= 64) return measure_blocks<E, Matrix<8, false>>(task, stream);
      return measure_blocks<E, Matrix<4, true>>(task, stream);
    }
  }));
  const std::int64_t count = task.plan.K * chunks_of(pairs_of(grads.T));
  if (count > kMostBlocks) return kTooMany;
  return launch(add_up_groups, {count, kAddThreads, sizeof(double) * kAddThreads, false, stream}, task);
}

template <class E, class M>
Error measure_cross_blocks(const CrossTask& task, Stream stream) {
  const std::int64_t count = task.plan.num_pieces * blocks_of_piece<M>(task.pairs);
  if (count > kMostBlocks) return kTooMany;
  return launch(measure_cross<E, M>, {count, M::kThreads, M::kShared, false, stream}, task);
}

// Whether a launch has anything to do.
bool is_empty(const Buffer& grads, const Plan& plan) { return plan.K == 0 || grads.T == 0; }

Error clear_counters(const Scratch& scratch, std::int64_t count, Stream stream) {
  return static_cast<Error>(clear(scratch.counters, count, stream));
}

}  // namespace

Error probe_device() { return static_cast<Error>(probe(add_up_groups)); }

Error use_device(int device) { return static_cast<Error>(set_device(device)); }

Error gram(const Buffer& grads, const Plan& plan, const Scratch& scratch, double* G, Stream stream) {
  if (is_empty(grads, plan)) return 0;
  const Task task{rows_of(grads), plan, scratch, G, {}, false};
  if (!has_few_rows(grads)) return measure_many(grads, task, stream);
  GRADVAC_TRY(clear_counters(scratch, plan.K, stream));
  return measure_few(grads, task, stream);
}

Error cross_gram(const Buffer& a, const Buffer& b, const Plan& plan, double* sums, double* C, Stream stream) {
  const CrossTask task{{rows_of(a), rows_of(b)}, plan, sums, C};
  const std::int64_t count = plan.K * chunks_of(task.pairs.count());
  if (count == 0) return 0;
  if (count > kMostBlocks) return kTooMany;
  GRADVAC_TRY(with_element(a.dtype, [&](auto element) -> Error {
    using E = decltype(element);
    if constexpr (E::kWidth == 2) {
      return launch(measure_cross_in_double<E>, {plan.num_pieces, kExactThreads, 0, false, stream}, task);
    } else {
      if (std::max(a.T, b.T) <= 16) return measure_cross_blocks<E, Matrix<2, true>>(task, stream);
      return measure_cross_blocks<E, Matrix<4, true>>(task, stream);
    }
  }));
  return launch(add_up_cross, {count, kAddThreads, sizeof(double) * kAddThreads, false, stream}, task);
}

Error coefficients(const double* G, std::int64_t K, std::int64_t T, const Vaccine& vaccine, const Scratch& scratch,
                   Stream stream) {
  if (K == 0 || T == 0) return 0;
  if (K * T > kMostBlocks) return kTooMany;
  GRADVAC_TRY(clear_counters(scratch, K, stream));
  return launch(solve_rows, {K * T, kLanes, static_cast<std::size_t>(RowBench::bytes(T)), false, stream}, G, T, vaccine,
                scratch);
}

Error combine(const Buffer& grads, const double* weights, const Plan& plan, const Result& out, Stream stream) {
  if (is_empty(grads, plan) || plan.num_tiles == 0) return 0;
  if (plan.num_tiles > kMostBlocks) return kTooMany;
  return with_element(grads.dtype, [&](auto element) -> Error {
    using E = decltype(element);
    const Launch how{plan.num_tiles, kCombineThreads, 0, false, stream};
    if (grads.T <= 2) return launch(combine_rows<E, 2>, how, rows_of(grads), plan, weights, out);
    if (grads.T <= 4) return launch(combine_rows<E, 4>, how, rows_of(grads), plan, weights, out);
    return launch(combine_rows<E, 8>, how, rows_of(grads), plan, weights, out);
  });
}

bool has_one_pass(const Buffer& grads, const Result& out) {
  return has_few_rows(grads) && grads.T <= kOnePassRows && grads.aligned && out.aligned;
}

Error vaccinate(const Buffer& grads, const Plan& plan, const Vaccine& vaccine, const Scratch& scratch, double* G,
                const Result& out, Path path, Stream stream) {
  if (is_empty(grads, plan)) return 0;
  const Task task{rows_of(grads), plan, scratch, G, vaccine, true};
  if (!has_few_rows(grads)) {
    GRADVAC_TRY(measure_many(grads, task, stream));
    GRADVAC_TRY(coefficients(G, plan.K, grads.T, vaccine, scratch, stream));
    return combine(grads, vaccine.weights, plan, out, stream);
  }
  if (path == Path::two_passes) {
    GRADVAC_TRY(clear_counters(scratch, plan.K, stream));
    GRADVAC_TRY(measure_few(grads, task, stream));
    return combine(grads, vaccine.weights, plan, out, stream);
  }
  Machine machine;
  GRADVAC_TRY(examine(&machine));
  GRADVAC_TRY(clear_counters(scratch, 2 * plan.K, stream));
  return with_element(grads.dtype, [&](auto element) -> Error {
    using E = decltype(element);
    if constexpr (E::kWidth == 2) {
      return 0;
    } else {
      return with_outer<kOnePassRows>(grads.T, [&](auto outer) -> Error {
        using O = decltype(outer);
        // What a multiprocessor has is shared by its blocks, and 1 KiB of each block's share is the system's.
        const std::int64_t share = std::min<std::int64_t>(
            machine.shared_per_block, machine.shared_per_multiprocessor / OnePass<E, O>::kBlocks - 1024);
        const std::int64_t step = grads.T * O::kThreads * static_cast<std::int64_t>(sizeof(Vector));
        const std::int64_t slots =
            std::max<std::int64_t>(0, share - static_cast<std::int64_t>(sizeof(Bench<O>))) / step;
        const std::size_t shared = sizeof(Bench<O>) + slots * step;
        int resident = 0;
        GRADVAC_TRY(occupancy(&resident, vaccinate_in_one_pass<E, O>, O::kThreads, shared));
        const std::int64_t blocks = std::min<std::int64_t>(plan.num_pieces, resident * machine.multiprocessors);
        return launch(vaccinate_in_one_pass<E, O>, {blocks, O::kThreads, shared, true, stream}, task, out,
                      static_cast<int>(slots));
      });
    }
  });
}

const char* describe(Error error) { return describe_error(error); }

}  // namespace gradvac::cuda
