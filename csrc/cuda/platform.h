// What the kernels need beyond CUDA's own words: memory, inter-block and matrix instructions, and launches, under names
// of the project's. tests/ has the same names for a host that plays the device.
#pragma once

#ifdef GRADVAC_CUDA_HOST
#include "cuda_host.h"
#else

#include <cuda_runtime.h>

#include <cstdint>

namespace gradvac::cuda {

// ---- memory

__device__ inline char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

// Through the cache for what no kernel writes meanwhile.
template <class T>
__device__ inline T load_constant(const T* p) {
  return __ldg(p);
}
// What another block may have written during this launch: not from a cache of this block's.
__device__ inline double load_shared_by_blocks(const double* p) {
  double x;
  asm volatile("ld.global.cg.f64 %0, [%1];" : "=d"(x) : "l"(p) : "memory");
  return x;
}

// To global memory, at 16 bytes. In words of PTX: the compiler may take a plain store apart.
__device__ inline void store16(void* p, std::uint32_t a, std::uint32_t b, std::uint32_t c, std::uint32_t d) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

// ---- between blocks

// Memory of counters and of numbers that will be shown: before the launch, every bit is set.
inline cudaError_t set_all_bits(void* memory, std::int64_t bytes, void* stream) {
  return cudaMemsetAsync(memory, 0xFF, bytes, static_cast<cudaStream_t>(stream));
}
// Whether this is the last one of `all` to arrive: then it sees what the others wrote before they did. Only then are
// the caches of the multiprocessor given up.
__device__ inline bool arrive_last(std::int32_t* counter, std::int64_t all) {
  std::int32_t before;
  asm volatile("atom.add.release.gpu.global.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  if (before + 2 != all) return false;
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
  return true;
}
// 0 for the first one that draws, 1 for the second, and so on.
__device__ inline std::int32_t draw(std::int32_t* counter) {
  std::int32_t before;
  asm volatile("atom.add.relaxed.gpu.global.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before + 1;
}
// A number that others wait for, and nothing but it: they need not see what else was written before.
__device__ inline void show_number(double* place, double x) {
  const long long bits = __double_as_longlong(x);
  const long long shown = bits == -1 ? 0x7FF8000000000000ll : bits;  // all bits set are a NaN: this one is as good
  asm volatile("st.relaxed.gpu.global.s64 [%0], %1;" ::"l"(place), "l"(shown) : "memory");
}
__device__ inline bool is_shown(const double* place, double* x) {
  long long bits;
  asm volatile("ld.relaxed.gpu.global.s64 %0, [%1];" : "=l"(bits) : "l"(place) : "memory");
  *x = __longlong_as_double(bits);
  return bits != -1;
}
constexpr int kMostPolls = 1 << 27;  // ten seconds or more; waiting for good would hang the machine
__device__ inline void wait_a_little() { __nanosleep(64); }
__device__ inline void give_up() { __trap(); }

// ---- arithmetic

__device__ inline float half_to_float(std::uint32_t bits) {
  float x;
  asm("{ .reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h; }" : "=f"(x) : "r"(bits));
  return x;
}

// Where it is called, and nowhere else: of a plain conversion the compiler may take the result or leave it.
__device__ inline double widened_here(float x) {
  double wide;
  asm volatile("cvt.f64.f32 %0, %1;" : "=d"(wide) : "f"(x));
  return wide;
}

// Two of them, the first one in the lower half.
__device__ inline std::uint32_t floats_to_bfloat16(float first, float second) {
  std::uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
  return bits;
}

__device__ inline std::uint32_t floats_to_float16(float first, float second) {
  std::uint32_t bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
  return bits;
}

// Of each of two: exactly.
__device__ inline std::uint32_t twice_bfloat16(std::uint32_t bits) {
  std::uint32_t twice;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(twice) : "r"(bits), "r"(0x40004000u), "r"(0x80008000u));
  return twice;
}

// sums += a b, for a [16, 16], b [16, 8] in the layout of mma.m16n8k16
__device__ inline void multiply_bfloat16(float (&sums)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ inline void multiply_float16(float (&sums)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ---- launches

struct Launch {
  std::int64_t blocks;
  int threads;
  std::size_t shared;  // bytes
  void* stream;
};

// More than 48 KiB is to be asked for.
template <class... P>
cudaError_t allow_shared(void (*kernel)(P...), std::size_t bytes) {
  if (bytes <= 48 << 10) return cudaSuccess;
  int device = 0, most = 0;  // all there is: a graph that was captured before may need more than this launch
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return error != cudaSuccess ? error : cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
}

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), const Launch& how, const A&... arguments) {
  const cudaError_t error = allow_shared(kernel, how.shared);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(how.blocks));
  config.blockDim = dim3(static_cast<unsigned>(how.threads));
  config.dynamicSmemBytes = how.shared;
  config.stream = static_cast<cudaStream_t>(how.stream);
  return cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...);
}

constexpr int kTooMany = cudaErrorInvalidConfiguration;
inline const char* describe_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

// Whether a kernel was compiled for the current device, and a driver is there to run it.
template <class... P>
cudaError_t probe(void (*kernel)(P...)) {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, kernel);
}

inline cudaError_t set_device(int device) { return cudaSetDevice(device); }

}  // namespace gradvac::cuda

#endif
