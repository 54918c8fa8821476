// What the machine can do at best: reading memory in order, and multiply-adds in registers.
#pragma once

#include "simd.h"

namespace gradvac::cpu::GRADVAC_VARIANT {

inline double read_all(const void* data, int64_t bytes) {
  constexpr int kStreams = 8;
  const char* p = static_cast<const char*>(data);
  VecF sums[kStreams] = {};
  for (int64_t at = 0; at + kStreams * kBytes <= bytes; at += kStreams * kBytes) {
    for (int s = 0; s < kStreams; ++s) sums[s] += load<VecF>(p + at + s * kBytes);
  }
  for (int s = 1; s < kStreams; ++s) sums[0] += sums[s];
  return sums[0][0];
}

inline double multiply_add(int64_t rounds) {
  constexpr int kChains = 12;   // independent, to cover the latency
  volatile float given = 0.5f;  // the compiler may not know the numbers, or it would fold the rounds
  VecF acc[kChains];
  for (int c = 0; c < kChains; ++c) acc[c] = VecF{} + given * c;
  const VecF a = VecF{} + given, b = VecF{} + given;
  for (int64_t r = 0; r < rounds; ++r) {
    for (int c = 0; c < kChains; ++c) acc[c] = acc[c] * a + b;
  }
  for (int c = 0; c < kChains; ++c) given = acc[c][c % kFloats];
  return static_cast<double>(rounds) * kChains * kFloats;
}

}  // namespace gradvac::cpu::GRADVAC_VARIANT
