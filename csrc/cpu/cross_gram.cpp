// Cross Gram of two whole buffers: segments in parallel, their sums added up in the order of the columns.
#include <omp.h>

#include "phases.h"
#include "shares.h"

namespace gradvac::cpu {

void cross_gram(const Buffer& a, const Buffer& b, double* C, int threads) {
  const std::int64_t pairs = a.T * b.T;
  if (pairs == 0) return;
  const Buffer& larger = a.T < b.T ? b : a;  // a buffer and itself are cut as for its Gram
  threads = useful_threads(larger, threads);
  const Segments segments(larger);
  const Variant& kernels = variant();
  const std::int64_t scratch_size = round_up(kernels.cross_gram_scratch(a.T, b.T), kCacheLine / 8);
  AlignedDoubles scratch(scratch_size * threads), sums(pairs * segments.count());
  Shares measured(segments.count(), threads);
#pragma omp parallel num_threads(threads)
  {
    const FullFloats full;
    const int thread = omp_get_thread_num();
    measured.each(thread, 0, segments.count(), [&](std::int64_t s) {
      const Segment& columns = segments[s];
      kernels.cross_gram[static_cast<int>(a.dtype)](a.data, a.T, a.row_stride, b.data, b.T, b.row_stride, columns.begin,
                                                    columns.end, is_small_group(a, columns.group),
                                                    &scratch[scratch_size * thread], &sums[pairs * s]);
    });
#pragma omp barrier
#pragma omp for schedule(static)
    for (std::int64_t entry = 0; entry < a.K * pairs; ++entry) {
      const std::int64_t group = entry / pairs;
      double sum = 0;
      for (std::int64_t s = segments.first(group); s < segments.first(group + 1); ++s) {
        sum += sums[pairs * s + entry % pairs];
      }
      C[entry] = sum;
    }
  }
}

}  // namespace gradvac::cpu
