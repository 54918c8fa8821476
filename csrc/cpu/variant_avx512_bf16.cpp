#define GRADVAC_VARIANT avx512_bf16
#define GRADVAC_SUPPORTED                                                                                            \
  __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && \
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma")
// Intel's cores take four times as long for a dot product of bfloat16 as for a multiply-add of float32.
#define GRADVAC_SLOW __builtin_cpu_is("intel")
#include "variant.h"
