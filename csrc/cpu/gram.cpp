// Gram of the whole buffer: segments in parallel, their sums added up in the order of the columns.
#include <omp.h>

#include "phases.h"
#include "shares.h"

namespace gradvac::cpu {

GramPhase::GramPhase(const Buffer& grads, const Segments& segments, int threads)
    : grads_(grads),
      segments_(segments),
      variant_(variant()),
      scratch_size_(round_up(variant_.gram_scratch(grads.T), kCacheLine / 8)),
      packed_size_(grads.T * (grads.T + 1) / 2),
      scratch_(scratch_size_ * threads),
      packed_(new double[packed_size_ * segments.count()]) {}

void GramPhase::measure(std::int64_t segment, int thread) {
  const Segment& columns = segments_[segment];
  variant_.gram[static_cast<int>(grads_.dtype)](grads_.data, grads_.T, grads_.row_stride, columns.begin, columns.end,
                                                is_small_group(grads_, columns.group),
                                                &scratch_[scratch_size_ * thread], &packed_[packed_size_ * segment]);
}

void GramPhase::add_up(std::int64_t group, double* G) const {
  const std::int64_t T = grads_.T;
  const double* packed = packed_.get();
  for (std::int64_t i = 0, entry = 0; i < T; ++i) {
    for (std::int64_t j = 0; j <= i; ++j, ++entry) {
      double sum = 0;
      for (std::int64_t s = segments_.first(group); s < segments_.first(group + 1); ++s) {
        sum += packed[packed_size_ * s + entry];
      }
      G[i * T + j] = G[j * T + i] = sum;
    }
  }
}

void gram(const Buffer& grads, double* G, int threads) {
  threads = useful_threads(grads, threads);
  const Segments segments(grads);
  GramPhase phase(grads, segments, threads);
  Shares measured(segments.count(), threads), added_up(grads.K, threads);
#pragma omp parallel num_threads(threads)
  {
    const FullFloats full;
    const int thread = omp_get_thread_num();
    measured.each(thread, 0, segments.count(), [&](std::int64_t s) { phase.measure(s, thread); });
#pragma omp barrier
    added_up.each(thread, 0, grads.K, [&](std::int64_t k) { phase.add_up(k, G + k * grads.T * grads.T); });
  }
}

}  // namespace gradvac::cpu
