#define GRADVAC_VARIANT avx512
#define GRADVAC_SUPPORTED                                                                                          \
  __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && \
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma")
#include "variant.h"
