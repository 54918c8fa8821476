// The variants of the kernels, one an instruction set, compiled from the same source and chosen at run time.
#pragma once

#include <cstdint>

#include "gradvac/cpu.h"

namespace gradvac::cpu {

// scratch: as many doubles as the variant's gram_scratch(T) says
// packed[i (i + 1) / 2 + j] = <g_i, g_j> over columns [begin, end), j <= i; small_group: they belong to one
using GramKernel = void (*)(const void* data, std::int64_t T, std::int64_t row_stride, std::int64_t begin,
                            std::int64_t end, bool small_group, double* scratch, double* packed);
// scratch: as cross_gram_scratch(T, U) says; C[i U + j] = <a_i, b_j> over those columns
using CrossGramKernel = void (*)(const void* a, std::int64_t T, std::int64_t a_stride, const void* b, std::int64_t U,
                                 std::int64_t b_stride, std::int64_t begin, std::int64_t end, bool small_group,
                                 double* scratch, double* C);
// out[p] = sum_j weights[j] g_j[p] for p in [begin, end); `stream` past the cache
using CombineKernel = void (*)(const void* data, std::int64_t T, std::int64_t row_stride, std::int64_t begin,
                               std::int64_t end, const double* weights, void* out, Dtype out_dtype, bool stream);

struct Variant {
  const char* name;
  bool (*supported)();
  bool (*slow)();  // the next one is faster on this machine
  std::int64_t (*gram_scratch)(std::int64_t T);
  GramKernel gram[kDtypes];
  std::int64_t (*cross_gram_scratch)(std::int64_t T, std::int64_t U);
  CrossGramKernel cross_gram[kDtypes];
  CombineKernel combine[kDtypes];
  double (*read)(const void* data, std::int64_t bytes);
  double (*multiply_add)(std::int64_t rounds);
};

// Those with the most instructions first.
const Variant* const* variants(int* count);
// The one in use: the fastest supported, or what `use` said.
const Variant& variant();
// Null for the fastest; false where there is no such variant or the machine lacks it.
bool use(const char* name);

}  // namespace gradvac::cpu
