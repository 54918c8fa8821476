// Combine: segments in parallel, each the weighted sum of its rows.
#include <omp.h>

#include "phases.h"
#include "shares.h"

namespace gradvac::cpu {

CombinePhase::CombinePhase(const Buffer& grads, const double* weights, const Result& out)
    : grads_(grads), weights_(weights), out_(out), variant_(variant()) {
  // Where the cache holds the gradients and the result, the result stays there for the optimizer; else what is read
  // after it would push it out again.
  const std::int64_t column_bytes = grads.T * static_cast<std::int64_t>(size_of(grads.dtype)) + size_of(out.dtype);
  stream_ = columns_of_all(grads) * column_bytes > last_cache_bytes();
}

void CombinePhase::combine(const Segment& segment) const {
  variant_.combine[static_cast<int>(grads_.dtype)](grads_.data, grads_.T, grads_.row_stride, segment.begin, segment.end,
                                                   weights_ + segment.group * grads_.T, out_.data, out_.dtype, stream_);
}

void combine(const Buffer& grads, const double* weights, const Result& out, int threads) {
  const Segments segments(grads);
  const CombinePhase phase(grads, weights, out);
  threads = useful_threads(grads, threads);
  Shares combined(segments.count(), threads);
#pragma omp parallel num_threads(threads)
  {
    const FullFloats full;
    combined.each(omp_get_thread_num(), 0, segments.count(), [&](std::int64_t s) { phase.combine(segments[s]); });
  }
}

}  // namespace gradvac::cpu
