#include <omp.h>

#include "gradvac/cpu.h"
#include "variants.h"

namespace gradvac::cpu {

double streaming_read(const void* data, std::int64_t bytes, int threads) {
  constexpr std::int64_t kPiece = 1 << 20;
  double sum = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(+ : sum)
  for (std::int64_t piece = 0; piece < bytes / kPiece; ++piece) {
    sum += variant().read(static_cast<const char*>(data) + piece * kPiece, kPiece);
  }
  return sum;
}

double multiply_add_peak(std::int64_t rounds, int threads) {
  double done = 0;
#pragma omp parallel num_threads(threads) reduction(+ : done)
  done += variant().multiply_add(rounds);
  return done;
}

}  // namespace gradvac::cpu
