// The types of gradients and results.
#pragma once

#include <cstddef>

namespace gradvac {

enum class Dtype { float32 = 0, bfloat16 = 1, float16 = 2, float64 = 3 };
constexpr int kDtypes = 4;
constexpr std::size_t size_of(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }

}  // namespace gradvac
