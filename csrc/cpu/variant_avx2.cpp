#define GRADVAC_VARIANT avx2
// F16C came with Ivy Bridge, before AVX2
#define GRADVAC_SUPPORTED __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")
#include "variant.h"
