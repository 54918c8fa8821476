// The three verbs in one parallel region. Groups go through in batches that fit the last cache level, so that they are
// combined while they are there; of a larger group the tail still is, and it is combined first.
#include <omp.h>

#include "phases.h"

namespace gradvac::cpu {

namespace {

// First groups of the batches, and K.
std::vector<std::int64_t> batches(const Buffer& grads) {
  const std::int64_t room = cache_bytes() / 2;
  std::vector<std::int64_t> starts{0};
  std::int64_t filled = 0;
  for (std::int64_t k = 0; k < grads.K; ++k) {
    const std::int64_t columns = grads.bounds[2 * k + 1] - grads.bounds[2 * k];
    const std::int64_t bytes = columns * grads.T * static_cast<std::int64_t>(size_of(grads.dtype));
    if (filled > 0 && filled + bytes > room) {
      starts.push_back(k);
      filled = 0;
    }
    filled += bytes;
  }
  starts.push_back(grads.K);
  return starts;
}

}  // namespace

void vaccinate(const Buffer& grads, const Vaccine& vaccine, const Result& out, int threads) {
  threads = useful_threads(grads, threads);
  const std::int64_t T = grads.T;
  const Segments segments(grads);
  const std::vector<std::int64_t> starts = batches(grads);
  GramPhase gram(grads, segments, threads);
  CoefficientPhase coefficients(vaccine, grads.K, T, threads);
  const CombinePhase combine(grads, vaccine.weights, out);
#pragma omp parallel num_threads(threads)
  {
    const FullFloats full;
    for (std::size_t batch = 0; batch + 1 < starts.size(); ++batch) {
      const std::int64_t first = starts[batch], last = starts[batch + 1];
      const std::int64_t begin = segments.first(first), end = segments.first(last);
#pragma omp for schedule(dynamic, 1)
      for (std::int64_t s = begin; s < end; ++s) gram.measure(s, omp_get_thread_num());
#pragma omp for schedule(dynamic, 1)
      for (std::int64_t k = first; k < last; ++k) gram.add_up(k, coefficients.G(k));
#pragma omp for schedule(dynamic, 4)
      for (std::int64_t r = first * T; r < last * T; ++r) coefficients.solve(r / T, r % T, omp_get_thread_num());
#pragma omp for schedule(dynamic, 1)
      for (std::int64_t k = first; k < last; ++k) coefficients.weigh(k);
#pragma omp for schedule(dynamic, 1) nowait
      for (std::int64_t s = 0; s < end - begin; ++s) combine.combine(segments[end - 1 - s]);
    }
  }
}

}  // namespace gradvac::cpu
