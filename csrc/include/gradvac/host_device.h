// One source for the host compiler and nvcc.
#pragma once

#ifdef __CUDACC__
#define GRADVAC_HD __host__ __device__
#else
// In line, always: what is compiled for one instruction set must not be what the linker keeps for another.
#define GRADVAC_HD __attribute__((always_inline))
#endif
