// The three verbs in one parallel region. Small groups are one thread's from beginning to end. The others go through in
// batches that fit the last cache level, so that they are combined while they are there; of a larger group the tail
// still is, and it is combined first.
#include <omp.h>

#include <utility>
#include <vector>

#include "phases.h"

namespace gradvac::cpu {

namespace {

// Groups of one segment and few rows: a thread takes one from the first column to the last, while it is in its cache.
bool is_small(const Segments& segments, std::int64_t group, std::int64_t T) {
  constexpr std::int64_t kFewRows = 32;  // with more, the recurrence is worth sharing out
  return T <= kFewRows && segments.first(group + 1) - segments.first(group) <= 1;
}

// Runs of the other groups that fit the last cache level together: the first group of each, and one past the last.
std::vector<std::pair<std::int64_t, std::int64_t>> batches(const Buffer& grads, const Segments& segments) {
  const std::int64_t room = cache_bytes() / 2;
  std::vector<std::pair<std::int64_t, std::int64_t>> found;
  std::int64_t filled = 0;
  for (std::int64_t k = 0; k < grads.K; ++k) {
    if (is_small(segments, k, grads.T)) continue;
    const std::int64_t columns = grads.bounds[2 * k + 1] - grads.bounds[2 * k];
    const std::int64_t bytes = columns * grads.T * static_cast<std::int64_t>(size_of(grads.dtype));
    const bool follows = !found.empty() && found.back().second == k && filled + bytes <= room;
    filled = follows ? filled + bytes : bytes;
    if (follows) {
      ++found.back().second;
    } else {
      found.emplace_back(k, k + 1);
    }
  }
  return found;
}

}  // namespace

void vaccinate(const Buffer& grads, const Vaccine& vaccine, double* G, const Result& out, int threads) {
  threads = useful_threads(grads, threads);
  const Segments segments(grads);
  const auto runs = batches(grads, segments);
  GramPhase gram(grads, segments, threads);
  CoefficientPhase coefficients(vaccine, G, grads.K, grads.T, threads);
  const CombinePhase combine(grads, vaccine.weights, out);
  const std::int64_t blocks = coefficients.blocks(), matrix = grads.T * grads.T;
#pragma omp parallel num_threads(threads)
  {
    const FullFloats full;
    const int thread = omp_get_thread_num();
    for (const auto& run : runs) {
      const std::int64_t first = run.first, last = run.second;
      const std::int64_t begin = segments.first(first), end = segments.first(last);
#pragma omp for schedule(dynamic, 1)
      for (std::int64_t s = begin; s < end; ++s) gram.measure(s, thread);
#pragma omp for schedule(dynamic, 1)
      for (std::int64_t k = first; k < last; ++k) gram.add_up(k, G + k * matrix);
#pragma omp for schedule(dynamic, 1)
      for (std::int64_t b = first * blocks; b < last * blocks; ++b) {
        coefficients.solve_block(b / blocks, b % blocks, thread);
      }
#pragma omp for schedule(dynamic, 1)
      for (std::int64_t k = first; k < last; ++k) coefficients.weigh(k);
#pragma omp for schedule(dynamic, 1) nowait
      for (std::int64_t s = 0; s < end - begin; ++s) combine.combine(segments[end - 1 - s]);
    }
#pragma omp for schedule(dynamic, 1) nowait
    for (std::int64_t k = 0; k < grads.K; ++k) {
      if (!is_small(segments, k, grads.T)) continue;
      for (std::int64_t s = segments.first(k); s < segments.first(k + 1); ++s) gram.measure(s, thread);
      gram.add_up(k, G + k * matrix);
      for (std::int64_t block = 0; block < blocks; ++block) coefficients.solve_block(k, block, thread);
      coefficients.weigh(k);
      for (std::int64_t s = segments.first(k); s < segments.first(k + 1); ++s) combine.combine(segments[s]);
    }
  }
}

}  // namespace gradvac::cpu
