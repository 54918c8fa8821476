// Coefficients: the inner loop of Algorithm 1 in Gram space, one row of one group at a time.
#include <omp.h>

#include <algorithm>
#include <limits>

#include "gradvac/order.h"
#include "phases.h"

namespace gradvac::cpu {

CoefficientPhase::CoefficientPhase(const Vaccine& vaccine, std::int64_t K, std::int64_t T, int threads)
    : vaccine_(vaccine),
      T_(T),
      G_(new double[K * T * T]),
      C_(new double[K * T * T]),
      v_(new double[threads * T]),
      ranked_(new Ranked[threads * T]),
      order_(new std::int64_t[threads * T]) {}

const std::int64_t* CoefficientPhase::draw(std::int64_t group, std::int64_t row, int thread) {
  if (vaccine_.order != nullptr) return vaccine_.order + (group * T_ + row) * (T_ - 1);
  const std::uint64_t state = order_state(vaccine_.seed, vaccine_.step, vaccine_.first_group + group, row);
  Ranked* ranked = &ranked_[thread * T_];
  std::int64_t* order = &order_[thread * T_];
  std::int64_t count = 0;
  for (std::int64_t other = 0; other < T_; ++other) {
    if (other != row) ranked[count++] = {order_key(state, other), other};
  }
  std::sort(ranked, ranked + count,
            [](const Ranked& a, const Ranked& b) { return a.key != b.key ? a.key < b.key : a.other < b.other; });
  for (std::int64_t t = 0; t < count; ++t) order[t] = ranked[t].other;
  return order;
}

void CoefficientPhase::solve(std::int64_t group, std::int64_t row, int thread) {
  const Vaccine& vaccine = vaccine_;
  const std::int64_t T = T_, entry = (group * T + row) * T;
  const double* G = &G_[group * T * T];
  double* c = &C_[entry];
  double* similarity = vaccine.similarity + entry;
  bool* corrected = vaccine.corrected + entry;
  std::fill(c, c + T, 0.0);
  c[row] = 1;
  std::fill(similarity, similarity + T, std::numeric_limits<double>::quiet_NaN());
  std::fill(corrected, corrected + T, false);

  const double square = G[row * T + row];
  if (T == 1 || (vaccine.turnable != nullptr && !vaccine.turnable[row]) || !vaccine.rule.limits.usable(square)) return;
  const auto id = [&](std::int64_t r) { return vaccine.task_ids == nullptr ? r : vaccine.task_ids[r]; };
  double* hats = vaccine.ema == nullptr ? nullptr : vaccine.ema + (group * vaccine.N + id(row)) * vaccine.N;
  double* v = &v_[thread * T];
  std::copy(G + row * T, G + (row + 1) * T, v);
  Row state(square);
  const std::int64_t* order = draw(group, row, thread);
  for (std::int64_t t = 0; t < T - 1; ++t) {
    const std::int64_t j = order[t];
    const double* G_j = G + j * T;
    const double hat = hats == nullptr ? vaccine.target : hats[id(j)];
    const Meeting meeting = state.meet(v[j], G_j[j], hat, vaccine.rule);
    if (!meeting.measured) continue;
    similarity[j] = meeting.phi;
    if (meeting.turned) {
      corrected[j] = true;
      c[j] += meeting.a;
      for (std::int64_t r = 0; r < T; ++r) v[r] += meeting.a * G_j[r];
    }
    if (hats != nullptr) hats[id(j)] = moving_average(hat, meeting.phi, vaccine.rule.beta);
  }
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
  constexpr std::int64_t kWorthAThread = 1 << 16;  // multiply-adds
  const std::int64_t useful = K * T * T * T / kWorthAThread + 1;
  if (useful < threads) threads = static_cast<int>(useful);
  CoefficientPhase phase(vaccine, K, T, threads);
  std::copy(G, G + K * T * T, phase.G(0));
#pragma omp parallel num_threads(threads)
  {
    const FullFloats full;
#pragma omp for schedule(dynamic, 4)
    for (std::int64_t r = 0; r < K * T; ++r) phase.solve(r / T, r % T, omp_get_thread_num());
#pragma omp for schedule(dynamic, 1)
    for (std::int64_t k = 0; k < K; ++k) phase.weigh(k);
  }
}

}  // namespace gradvac::cpu
