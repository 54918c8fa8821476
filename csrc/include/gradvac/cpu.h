// The CPU backend's face: raw pointers and sizes, no torch.
#pragma once

#include <cstdint>

#include "gradvac/dtype.h"
#include "gradvac/recurrence.h"

namespace gradvac::cpu {

// grads [T, P] with contiguous rows `row_stride` elements apart; bounds [K, 2], first column and one past the last.
struct Buffer {
  const void* data;
  Dtype dtype;
  std::int64_t T, row_stride;
  const std::int64_t* bounds;
  std::int64_t K;
};

struct Result {
  void* data;  // [P]
  Dtype dtype;
};

struct Vaccine {
  double* ema;  // [K, N, N], or null for a constant target
  std::int64_t N;
  double target;  // the constant target, where ema is null
  Rule rule;
  const std::int64_t* task_ids;  // [T], or null: row t is task t
  const bool* turnable;          // [T], or null: every row may be turned
  const std::int64_t* order;     // [K, T, T-1], or null: drawn from the counter
  std::int64_t seed, step, first_group;
  double* weights;     // [K, T] out
  double* similarity;  // [K, T, T] out
  bool* corrected;     // [K, T, T] out
};

void gram(const Buffer& grads, double* G, int threads);
// C [K, T, U] of a [T, P] and b [U, P] of one type and the same groups; they may overlap.
void cross_gram(const Buffer& a, const Buffer& b, double* C, int threads);
// The inner loop of Algorithm 1 for Gram matrices [K, T, T].
void coefficients(const double* G, std::int64_t K, std::int64_t T, const Vaccine& vaccine, int threads);
void combine(const Buffer& grads, const double* weights, const Result& out, int threads);
// All three; G [K, T, T] gets the Gram matrices.
void vaccinate(const Buffer& grads, const Vaccine& vaccine, double* G, const Result& out, int threads);

// The ceilings that benchmarks hold the kernels against.
double streaming_read(const void* data, std::int64_t bytes, int threads);
double multiply_add_peak(std::int64_t rounds, int threads);  // the number of float32 multiply-adds done

}  // namespace gradvac::cpu
