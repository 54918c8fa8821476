// Coefficients: the inner loop of Algorithm 1 in Gram space, some rows of a group at a time.
#include <omp.h>

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "gradvac/order.h"
#include "phases.h"
#include "shares.h"

namespace gradvac::cpu {

CoefficientPhase::CoefficientPhase(const Vaccine& vaccine, const double* G, std::int64_t K, std::int64_t T, int threads)
    : vaccine_(vaccine),
      solver_(*variant().solver),
      G_(G),
      T_(T),
      rows_size_(kRows * T + kCacheLine / 8),
      C_(new double[K * T * T]),
      v_(new double[threads * rows_size_]),
      order_(new std::int64_t[threads * rows_size_]) {}

const std::int64_t* CoefficientPhase::draw(std::int64_t group, std::int64_t row, std::int64_t* order) const {
  if (vaccine_.order != nullptr) return vaccine_.order + (group * T_ + row) * (T_ - 1);
  const std::uint64_t state = order_state(vaccine_.seed, vaccine_.step, vaccine_.first_group + group, row);
  if (solver_.draw(state, T_, row, order)) return order;
  std::vector<std::pair<std::uint64_t, std::int64_t>> ranked;
  ranked.reserve(T_ - 1);
  for (std::int64_t other = 0; other < T_; ++other) {
    if (other != row) ranked.emplace_back(order_key(state, other), other);
  }
  std::sort(ranked.begin(), ranked.end());
  for (std::int64_t t = 0; t < T_ - 1; ++t) order[t] = ranked[t].second;
  return order;
}

// False if the row is not to be turned.
bool CoefficientPhase::begin(std::int64_t group, std::int64_t row, double* v, std::int64_t* order, Turning* turning) {
  const std::int64_t T = T_, entry = (group * T + row) * T;
  const double* G = G_ + group * T * T;
  std::fill(&C_[entry], &C_[entry] + T, 0.0);
  C_[entry + row] = 1;
  std::fill(vaccine_.similarity + entry, vaccine_.similarity + entry + T, std::numeric_limits<double>::quiet_NaN());
  std::fill(vaccine_.corrected + entry, vaccine_.corrected + entry + T, false);
  const double square = G[row * T + row];
  const bool turnable = vaccine_.turnable == nullptr || vaccine_.turnable[row];
  if (T == 1 || !turnable || !vaccine_.rule.limits.usable(square)) return false;
  std::copy(G + row * T, G + (row + 1) * T, v);
  double* hats = vaccine_.ema == nullptr ? nullptr : vaccine_.ema + (group * vaccine_.N + id(row)) * vaccine_.N;
  *turning = {
      square, draw(group, row, order), v, &C_[entry], hats, vaccine_.similarity + entry, vaccine_.corrected + entry};
  return true;
}

void CoefficientPhase::solve(std::int64_t group, std::int64_t first, std::int64_t last, int thread) {
  Turning rows[kRows];
  int count = 0;
  for (std::int64_t row = first; row < last; ++row) {
    const std::int64_t place = thread * rows_size_ + count * T_;
    count += begin(group, row, &v_[place], &order_[place], &rows[count]);
  }
  if (count > 0) solver_.solve(rows, count, G_ + group * T_ * T_, T_, vaccine_);
}

void CoefficientPhase::weigh(std::int64_t group) {
  const std::int64_t T = T_;
  double* weights = vaccine_.weights + group * T;
  std::fill(weights, weights + T, 0.0);
  for (std::int64_t i = 0; i < T; ++i) {
    const double* c = &C_[(group * T + i) * T];
    for (std::int64_t j = 0; j < T; ++j) weights[j] += c[j];
  }
}

void coefficients(const double* G, std::int64_t K, std::int64_t T, const Vaccine& vaccine, int threads) {
  constexpr std::int64_t kWorthAThread = 1 << 16;  // multiply-adds, of which a meeting takes some itself
  const std::int64_t useful = K * T * T * (T + 16) / kWorthAThread + 1;
  if (useful < threads) threads = static_cast<int>(useful);
  CoefficientPhase phase(vaccine, G, K, T, threads);
  Shares solved(K * phase.blocks(), threads);
#pragma omp parallel num_threads(threads)
  {
    const FullFloats full;
    const int thread = omp_get_thread_num();
    solved.each(thread, 0, K * phase.blocks(),
                [&](std::int64_t block) { phase.solve_block(block / phase.blocks(), block % phase.blocks(), thread); });
#pragma omp barrier
#pragma omp for schedule(static)
    for (std::int64_t k = 0; k < K; ++k) phase.weigh(k);
  }
}

}  // namespace gradvac::cpu
