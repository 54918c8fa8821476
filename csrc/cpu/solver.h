// The recurrence for some rows of a group, a lane each: roots and quotients take long, so all rows take theirs
// together. Plain loops, which the compiler turns into vectors of each instruction set.
#pragma once

#include <stdint.h>

#include "gradvac/cpu.h"
#include "gradvac/order.h"
#include "variants.h"

namespace gradvac::cpu::GRADVAC_VARIANT {

#if defined(__AVX2__)
constexpr int64_t kCompared = 256;  // keys of which each is compared with all: faster than sorting
#else
constexpr int64_t kCompared = 64;
#endif
constexpr int64_t kShort = 32;  // rows that are updated faster than a branch is guessed

static bool draw(uint64_t state, int64_t T, int64_t row, int64_t* order) {
  if (T > kCompared) return false;
  uint64_t keys[kCompared];
  for (int64_t j = 0; j < T; ++j) keys[j] = order_key(state, j);
  keys[row] = ~uint64_t{0};  // above all: its place is the last, which there is not
  int64_t places = 0;
  for (int64_t j = 0; j < T; ++j) {
    int64_t place = 0;
    for (int64_t r = 0; r < T; ++r) place += keys[r] < keys[j];
    if (j != row) order[place] = j;
    places += place;
  }
  return places == T * (T - 1) / 2;  // less if two keys are the same
}

static void solve(const Turning* rows, int count, const double* G, int64_t T, const Vaccine& vaccine) {
  const Rule rule = vaccine.rule;
  const auto id = [&](int64_t row) { return vaccine.task_ids == nullptr ? row : vaccine.task_ids[row]; };
  double n2[kRows] = {}, added[kRows] = {};  // zero, in a lane without a row: it measures nothing
  double v[kRows] = {}, square[kRows] = {}, hat[kRows] = {}, phi[kRows], a[kRows];
  int64_t measured[kRows], turned[kRows];  // of the width of a lane
  for (int r = 0; r < count; ++r) {
    const Row state(rows[r].square);
    n2[r] = state.n2;
    added[r] = state.added;
  }
  for (int64_t t = 0; t < T - 1; ++t) {
    for (int r = 0; r < count; ++r) {
      const Turning& row = rows[r];
      const int64_t j = row.order[t];
      v[r] = row.v[j];
      square[r] = G[j * T + j];
      hat[r] = row.hats == nullptr ? vaccine.target : row.hats[id(j)];
    }
    for (int r = 0; r < kRows; ++r) {
      Row state(0);
      state.n2 = n2[r];
      state.added = added[r];
      const Meeting meeting = state.meet(v[r], Other(square[r], hat[r], rule), rule);
      n2[r] = state.n2;
      added[r] = state.added;
      phi[r] = meeting.phi;
      a[r] = meeting.a;
      measured[r] = meeting.measured;
      turned[r] = meeting.turned;
    }
    for (int r = 0; r < count; ++r) {
      if (!measured[r]) continue;
      const Turning& row = rows[r];
      const int64_t j = row.order[t];
      row.similarity[j] = phi[r];
      row.corrected[j] = turned[r] != 0;
      row.c[j] += a[r];
      if (row.hats != nullptr) row.hats[id(j)] = moving_average(hat[r], phi[r], rule.beta);
      if (T > kShort && !turned[r]) continue;
      double* __restrict its = row.v;
      const double* __restrict G_j = G + j * T;
      const double weight = a[r];
      for (int64_t other = 0; other < T; ++other) its[other] += weight * G_j[other];
    }
  }
}

extern const Solver solver;
const Solver solver = {draw, solve};

}  // namespace gradvac::cpu::GRADVAC_VARIANT
