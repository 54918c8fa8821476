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

constexpr int kRows = 8;  // of a group, that are turned together

// A row on its way through the others.
struct Turning {
  double square;              // |g_i|^2
  const std::int64_t* order;  // [T - 1], the others
  double* v;                  // [T], <g'_i, g_r>
  double* c;                  // [T], g'_i = sum_r c_r g_r
  double* hats;               // [N], or null for a constant target
  double* similarity;         // [T]
  bool* corrected;            // [T]
};

// Of a variant too, but compiled apart from its kernels, which fuse multiply-adds: here every operation is rounded.
struct Solver {
  // The others in ascending order of their keys; false if there are too many, or two of the same key.
  bool (*draw)(std::uint64_t state, std::int64_t T, std::int64_t row, std::int64_t* order);
  // The inner loop for at most kRows rows of the group with Gram matrix G [T, T].
  void (*solve)(const Turning* rows, int count, const double* G, std::int64_t T, const Vaccine& vaccine);
};

struct Variant {
  const char* name;
  bool (*supported)();
  bool (*slow)();  // the next one is faster on this machine
  std::int64_t (*gram_scratch)(std::int64_t T);
  GramKernel gram[kDtypes];
  std::int64_t (*cross_gram_scratch)(std::int64_t T, std::int64_t U);
  CrossGramKernel cross_gram[kDtypes];
  CombineKernel combine[kDtypes];
  const Solver* solver;
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
