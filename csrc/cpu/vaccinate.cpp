// The three verbs in one parallel region. Small groups are one thread's from beginning to end, so that they are
// combined out of its own cache. The others go through in batches that fit the last cache level; of a larger group each
// thread still has the tail of its share there, and combines it first.
#include <omp.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "phases.h"
#include "shares.h"

namespace gradvac::cpu {

namespace {

struct Plan {
  std::vector<std::int64_t> alone;                              // groups, each one thread's
  std::vector<std::int64_t> shares;                             // of these: thread t's begins at shares[t]
  std::vector<std::pair<std::int64_t, std::int64_t>> together;  // runs of the others: the first, and one past the last
};

// Shares of about as many columns; in each the large groups come first, so that the threads end together.
void share_out(const Buffer& grads, int threads, Plan* plan) {
  auto& groups = plan->alone;
  std::int64_t columns = 0, before = 0;
  for (const std::int64_t k : groups) columns += columns_of(grads, k);
  const auto share_is_full = [&] {
    const auto begun = static_cast<std::int64_t>(plan->shares.size());
    return begun < threads && before * threads >= columns * begun;
  };
  for (std::size_t i = 0; i < groups.size(); ++i) {
    while (share_is_full()) plan->shares.push_back(static_cast<std::int64_t>(i));
    before += columns_of(grads, groups[i]);
  }
  plan->shares.resize(threads + 1, static_cast<std::int64_t>(groups.size()));
  for (int thread = 0; thread < threads; ++thread) {
    std::stable_sort(groups.begin() + plan->shares[thread], groups.begin() + plan->shares[thread + 1],
                     [&](std::int64_t a, std::int64_t b) { return columns_of(grads, a) > columns_of(grads, b); });
  }
}

Plan plan(const Buffer& grads, const Segments& segments, int threads) {
  constexpr std::int64_t kFewRows = 32;  // with more, the recurrence is worth sharing out
  constexpr std::int64_t kOverflow = 4;  // core caches in a group of which reading the tail again still pays
  constexpr std::int64_t kShares = 4;    // groups a thread, or some would wait long for the last
  const std::int64_t column_bytes = grads.T * static_cast<std::int64_t>(size_of(grads.dtype));
  const std::int64_t fair_share = columns_of_all(grads) / (kShares * threads);

  Plan found;
  std::int64_t filled = 0;
  for (std::int64_t k = 0; k < grads.K; ++k) {
    const std::int64_t columns = columns_of(grads, k), bytes = columns * column_bytes;
    const bool one_segment = segments.first(k + 1) - segments.first(k) <= 1;
    const bool shared_out = bytes <= kOverflow * core_cache_bytes() && columns <= fair_share;
    if (grads.T <= kFewRows && (one_segment || shared_out)) {
      found.alone.push_back(k);
      continue;
    }
    auto& runs = found.together;
    const bool follows = !runs.empty() && runs.back().second == k && filled + bytes <= last_cache_bytes() / 2;
    filled = follows ? filled + bytes : bytes;
    if (follows) {
      ++runs.back().second;
    } else {
      runs.emplace_back(k, k + 1);
    }
  }
  share_out(grads, threads, &found);
  return found;
}

}  // namespace

void vaccinate(const Buffer& grads, const Vaccine& vaccine, double* G, const Result& out, int threads) {
  threads = useful_threads(grads, threads);
  const Segments segments(grads);
  const Plan groups = plan(grads, segments, threads);
  GramPhase gram(grads, segments, threads);
  CoefficientPhase coefficients(vaccine, G, grads.K, grads.T, threads);
  const CombinePhase combine(grads, vaccine.weights, out);
  const std::int64_t blocks = coefficients.blocks(), matrix = grads.T * grads.T;
  const auto alone = static_cast<std::int64_t>(groups.alone.size());
  Shares measured(segments.count(), threads), combined(segments.count(), threads), vaccinated(alone, threads),
      solved(grads.K * blocks, threads);
#pragma omp parallel num_threads(threads)
  {
    const FullFloats full;
    const int thread = omp_get_thread_num();
    for (const auto& run : groups.together) {
      const std::int64_t first = run.first, last = run.second;
      const std::int64_t begin = segments.first(first), end = segments.first(last);
      measured.each(thread, begin, end, [&](std::int64_t s) { gram.measure(s, thread); });
#pragma omp barrier
#pragma omp for schedule(static)
      for (std::int64_t k = first; k < last; ++k) gram.add_up(k, G + k * matrix);
      solved.each(thread, first * blocks, last * blocks,
                  [&](std::int64_t block) { coefficients.solve_block(block / blocks, block % blocks, thread); });
#pragma omp barrier
#pragma omp for schedule(static)
      for (std::int64_t k = first; k < last; ++k) coefficients.weigh(k);
      combined.each_backwards(thread, begin, end, [&](std::int64_t s) { combine.combine(segments[s]); });
    }
    vaccinated.each(0, alone, groups.shares[thread], groups.shares[thread + 1], [&](std::int64_t i) {
      const std::int64_t k = groups.alone[i];
      for (std::int64_t s = segments.first(k); s < segments.first(k + 1); ++s) gram.measure(s, thread);
      gram.add_up(k, G + k * matrix);
      for (std::int64_t block = 0; block < blocks; ++block) coefficients.solve_block(k, block, thread);
      coefficients.weigh(k);
      for (std::int64_t s = segments.first(k + 1); s-- > segments.first(k);) combine.combine(segments[s]);
    });
  }
}

}  // namespace gradvac::cpu
