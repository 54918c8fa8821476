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

// How many rows are few: one tile of a matrix unit holds all pairs of them.
constexpr std::int64_t kFewRows = 8;

bool has_few_rows(const Buffer& grads) { return grads.T <= kFewRows && grads.dtype != Dtype::float64; }

// Calls `take(Packed<rows>)` for the smallest that holds T, which is at most kFewRows.
template <class Take>
Error with_packed(std::int64_t T, Take take) {
  if (T <= 2) return take(Packed<2>());
  if (T <= 4) return take(Packed<4>());
  return take(Packed<8>());
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
      return with_packed(grads.T, [&](auto packed) -> Error {
        using P = decltype(packed);
        return launch(measure_few_rows<E, P>, {task.plan.num_pieces, P::kThreads, sizeof(FewRowsMemory<P>), stream},
                      task);
      });
    }
  });
}

template <class E, class M>
Error measure_blocks(const Task& task, Stream stream) {
  const std::int64_t count = task.plan.num_pieces * blocks_of_piece<M>(Triangle{task.rows});
  if (count > kMostBlocks) return kTooMany;
  return launch(measure_many_rows<E, M>, {count, M::kThreads, M::kShared, stream}, task);
}

Error measure_many(const Buffer& grads, const Task& task, Stream stream) {
  GRADVAC_TRY(with_element(grads.dtype, [&](auto element) -> Error {
    using E = decltype(element);
    if constexpr (E::kWidth == 2) {
      return launch(measure_in_double<E>, {task.plan.num_pieces, kExactThreads, 0, stream}, task);
    } else {
      if (grads.T <= 16) return measure_blocks<E, Matrix<2, false>>(task, stream);
      if (grads.T <= 32) return measure_blocks<E, Matrix<4, false>>(task, stream);
      return measure_blocks<E, Matrix<4, true>>(task, stream);
    }
  }));
  const std::int64_t count = task.plan.K * chunks_of(pairs_of(grads.T));
  if (count > kMostBlocks) return kTooMany;
  return launch(add_up_groups, {count, kAddThreads, sizeof(double) * kAddThreads, stream}, task);
}

template <class E, class M>
Error measure_cross_blocks(const CrossTask& task, Stream stream) {
  const std::int64_t count = task.plan.num_pieces * blocks_of_piece<M>(task.pairs);
  if (count > kMostBlocks) return kTooMany;
  return launch(measure_cross<E, M>, {count, M::kThreads, M::kShared, stream}, task);
}

// Whether a launch has anything to do.
bool is_empty(const Buffer& grads, const Plan& plan) { return plan.K == 0 || grads.T == 0; }

// Before the first block arrives.
Error begin_counting(const Scratch& scratch, std::int64_t K, Stream stream) {
  return static_cast<Error>(set_all_bits(scratch.counters, K * sizeof(*scratch.counters), stream));
}

}  // namespace

Error probe_device() { return static_cast<Error>(probe(add_up_groups)); }

Error use_device(int device) { return static_cast<Error>(set_device(device)); }

Error gram(const Buffer& grads, const Plan& plan, const Scratch& scratch, double* G, Stream stream) {
  if (is_empty(grads, plan)) return 0;
  const Task task{rows_of(grads), plan, scratch, G, {}, false, false};
  if (!has_few_rows(grads)) return measure_many(grads, task, stream);
  GRADVAC_TRY(begin_counting(scratch, plan.K, stream));
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
      return launch(measure_cross_in_double<E>, {plan.num_pieces, kExactThreads, 0, stream}, task);
    } else {
      if (std::max(a.T, b.T) <= 16) return measure_cross_blocks<E, Matrix<2, true>>(task, stream);
      return measure_cross_blocks<E, Matrix<4, true>>(task, stream);
    }
  }));
  return launch(add_up_cross, {count, kAddThreads, sizeof(double) * kAddThreads, stream}, task);
}

Error coefficients(const double* G, std::int64_t K, std::int64_t T, const Vaccine& vaccine, const Scratch& scratch,
                   Stream stream) {
  if (K == 0 || T == 0) return 0;
  if (K * T > kMostBlocks) return kTooMany;
  GRADVAC_TRY(begin_counting(scratch, K, stream));
  return launch(solve_rows, {K * T, kLanes, static_cast<std::size_t>(RowBench::bytes(T)), stream}, G, T, vaccine,
                scratch);
}

Error combine(const Buffer& grads, const double* weights, const Plan& plan, const Result& out, Stream stream) {
  if (is_empty(grads, plan) || plan.num_tiles == 0) return 0;
  if (plan.num_tiles > kMostBlocks) return kTooMany;
  return with_element(grads.dtype, [&](auto element) -> Error {
    using E = decltype(element);
    const Launch how{plan.num_tiles, kCombineThreads, 0, stream};
    if (grads.T <= 2) return launch(combine_rows<E, 2>, how, rows_of(grads), plan, weights, out);
    if (grads.T <= 4) return launch(combine_rows<E, 4>, how, rows_of(grads), plan, weights, out);
    return launch(combine_rows<E, 8>, how, rows_of(grads), plan, weights, out);
  });
}

Error vaccinate(const Buffer& grads, const Plan& plan, const Vaccine& vaccine, const Scratch& scratch, double* G,
                const Result& out, bool one_launch, Stream stream) {
  if (is_empty(grads, plan)) return 0;
  const Task task{rows_of(grads), plan, scratch, G, vaccine, true, one_launch};
  if (!has_few_rows(grads)) {
    GRADVAC_TRY(measure_many(grads, task, stream));
    GRADVAC_TRY(coefficients(G, plan.K, grads.T, vaccine, scratch, stream));
    return combine(grads, vaccine.weights, plan, out, stream);
  }
  if (!one_launch) {
    GRADVAC_TRY(begin_counting(scratch, plan.K, stream));
    GRADVAC_TRY(measure_few(grads, task, stream));
    return combine(grads, vaccine.weights, plan, out, stream);
  }
  const std::int64_t shown = plan.K * grads.T;  // and the counters behind them, one more for the turns
  GRADVAC_TRY(set_all_bits(scratch.shown, shown * sizeof(double) + (plan.K + 1) * sizeof(std::int32_t), stream));
  return with_element(grads.dtype, [&](auto element) -> Error {
    using E = decltype(element);
    if constexpr (E::kWidth == 2) {
      return 0;
    } else {
      return with_packed(grads.T, [&](auto packed) -> Error {
        using P = decltype(packed);
        const std::int64_t turns = plan.num_pieces + plan.num_tiles;
        if (turns > kMostBlocks) return kTooMany;
        return launch(vaccinate_in_one_launch<E, P>, {turns, P::kThreads, sizeof(TurnMemory<P>), stream}, task, out);
      });
    }
  });
}

const char* describe(Error error) { return describe_error(error); }

}  // namespace gradvac::cuda
