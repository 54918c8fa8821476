// One source for the host compiler and nvcc.
#pragma once

#ifdef __CUDACC__
#define GRADVAC_HD __host__ __device__
#else
#define GRADVAC_HD
#endif
