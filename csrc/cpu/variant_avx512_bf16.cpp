#define GRADVAC_VARIANT avx512_bf16
#define GRADVAC_SUPPORTED                                                                                            \
  __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && \
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma")
#include "variant.h"
