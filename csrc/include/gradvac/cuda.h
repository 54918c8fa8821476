// The CUDA backend's face: raw pointers into device memory, sizes, a stream and an error code back; no torch.
//
// Everything is launched on the current device, nothing waits, and nothing is read back. `scratch` is device memory
// that may hold anything; what it is for ends with the launches.
#pragma once

#include <cstdint>

#include "gradvac/dtype.h"
#include "gradvac/recurrence.h"

namespace gradvac::cuda {

using Stream = void*;  // a cudaStream_t
using Error = int;     // a cudaError_t, 0 for success

// grads [T, P] with contiguous rows `row_stride` elements apart; every row begins at 16 bytes if `aligned`.
struct Buffer {
  const void* data;
  Dtype dtype;
  std::int64_t T, row_stride;
  bool aligned;
};

// How the columns of the K groups are dealt out. A group of no more than kRun columns is one piece, so is an empty one.
struct Plan {
  std::int64_t K;
  // [num_pieces, 5]: group, first column, one past the last; by group, in order. And the group's first piece and the
  // one past its last.
  const std::int64_t* pieces;
  const std::int64_t* first_piece;  // [K + 1]
  std::int64_t num_pieces;
  const std::int64_t* tiles;  // [num_tiles, 3]: the same columns, as many as a block makes, from the last to the first
  std::int64_t num_tiles;
};

constexpr std::int64_t kRun = 4096;   // columns whose products are added up in float32; float64 adds up the runs
constexpr std::int64_t kTile = 4096;  // columns of the result that a block makes, or a quarter of them

struct Result {
  void* data;  // [P]
  Dtype dtype;
  bool aligned;  // to 16 bytes
};

struct Vaccine {
  double* ema;  // [K, N, N], or null for a constant target
  std::int64_t N;
  double target;  // the constant target, where ema is null
  Rule rule;
  const std::int64_t* task_ids;    // [T], or null: row t is task t
  const std::int64_t* vaccinated;  // [num_vaccinated] ids
  std::int64_t num_vaccinated;     // below 0: every row may be turned
  const std::int64_t* order;       // [K, T, T-1], or null: drawn from the counter
  std::int64_t seed, step;
  const std::int64_t* counter;  // the step, where it lives on the device; or null
  std::int64_t first_group;
  double* weights;     // [K, T] out
  double* similarity;  // [K, T, T] out
  bool* corrected;     // [K, T, T] out
};

struct Scratch {
  double* sums;            // [num_pieces, T (T + 1) / 2]
  double* rows;            // [K, T, T]
  double* shown;           // [K, T], and behind it
  std::int32_t* counters;  // [K + 1]
};

// Whether the kernels can run on the current device.
Error probe_device();
// The runtime that is linked in has a current device of its own: make it that of the memory.
Error use_device(int device);
Error gram(const Buffer& grads, const Plan& plan, const Scratch& scratch, double* G, Stream stream);
// C [K, T, U] of a [T, P] and b [U, P] of one type; they may overlap. sums [num_pieces, T, U] is scratch.
Error cross_gram(const Buffer& a, const Buffer& b, const Plan& plan, double* sums, double* C, Stream stream);
// The inner loop of Algorithm 1 for Gram matrices [K, T, T].
Error coefficients(const double* G, std::int64_t K, std::int64_t T, const Vaccine& vaccine, const Scratch& scratch,
                   Stream stream);
Error combine(const Buffer& grads, const double* weights, const Plan& plan, const Result& out, Stream stream);
// In one launch, where there is one: for few rows of no more than 32 bits.
Error vaccinate(const Buffer& grads, const Plan& plan, const Vaccine& vaccine, const Scratch& scratch, double* G,
                const Result& out, bool one_launch, Stream stream);

const char* describe(Error error);

}  // namespace gradvac::cuda
