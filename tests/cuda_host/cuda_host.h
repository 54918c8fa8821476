// A host that plays the device: the CUDA sources compiled as C++, each CUDA thread a fiber.
//
// It has the names of csrc/cuda/platform.h and of CUDA that the kernels use. Fibers change at barriers, shuffles and
// what passes between blocks; one that waits for others looks again when something was shown, and if nobody is left who
// could show anything, that is a deadlock. By default blocks run in turns; `fuzz(seed)` lets them run in a random
// order, at random speeds, and begin in one. All run on one thread of the host, so every access is in order: a missing
// fence does not show here, a missing barrier does, and so does a deadlock.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

struct uint4 {
  std::uint32_t x, y, z, w;
};

namespace gradvac::host {

struct Index {
  unsigned x;
};
extern Index thread_index, block_index, block_size, grid_size;

// ---- for the tests

void fuzz(std::uint64_t seed);   // 0: in turns
void set_residents(int blocks);  // how many blocks are on the device at once
std::int64_t switches();         // between blocks, since the start
std::int64_t launches();         // likewise

// ---- for the kernels

char* shared_memory();
void wait_for_block();
void wait_for_warp();
std::uint64_t exchange(std::uint64_t bits, int lane);  // what that lane of the warp has
void exchange_all(const std::uint32_t* words, int count, std::uint32_t (*all)[8]);
void let_others();  // another block may go on
void show();        // what waits for others may look again
void wait_to_be_shown();
[[noreturn]] void fail(const char* reason);

using Body = void (*)(void* call);
int run(Body body, void* call, std::int64_t blocks, int threads, std::size_t shared);
const char* describe_error(int error);

}  // namespace gradvac::host

#define threadIdx (::gradvac::host::thread_index)
#define blockIdx (::gradvac::host::block_index)
#define blockDim (::gradvac::host::block_size)
#define gridDim (::gradvac::host::grid_size)

// ---- CUDA's own

template <class To, class From>
inline To gradvac_host_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline float __uint_as_float(std::uint32_t x) { return gradvac_host_bits<float>(x); }
inline std::uint32_t __float_as_uint(float x) { return gradvac_host_bits<std::uint32_t>(x); }
inline double __longlong_as_double(long long x) { return gradvac_host_bits<double>(x); }
inline long long __double_as_longlong(double x) { return gradvac_host_bits<long long>(x); }
inline float __double2float_rz(double x) {
  const float nearest = static_cast<float>(x);
  return fabs(static_cast<double>(nearest)) > fabs(x) ? nextafterf(nearest, 0.0f) : nearest;
}
inline void __syncthreads() { gradvac::host::wait_for_block(); }
inline void __syncwarp() { gradvac::host::wait_for_warp(); }
template <class T>
inline T __shfl_sync(unsigned, T value, int lane) {
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = gradvac::host::exchange(bits, lane);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int distance) {
  return __shfl_sync(mask, value, static_cast<int>(threadIdx.x % 32) ^ distance);
}

// ---- the project's own: csrc/cuda/platform.h

namespace gradvac::cuda {

using host::shared_memory;

template <class T>
inline T load_constant(const T* p) {
  if (reinterpret_cast<std::uintptr_t>(p) % sizeof(T) != 0) host::fail("a load is not at a multiple of its size");
  return *p;
}
inline double load_shared_by_blocks(const double* p) { return *p; }

inline void store16(void* p, std::uint32_t a, std::uint32_t b, std::uint32_t c, std::uint32_t d) {
  const std::uint32_t words[4] = {a, b, c, d};
  if (reinterpret_cast<std::uintptr_t>(p) % 16 != 0) host::fail("a store of 16 bytes is not at 16 bytes");
  std::memcpy(p, words, sizeof words);
}

inline int set_all_bits(void* memory, std::int64_t bytes, void*) {
  std::memset(memory, 0xFF, bytes);
  return 0;
}
inline bool arrive_last(std::int32_t* counter, std::int64_t all) {
  host::let_others();
  const bool is_last = (*counter)++ + 2 == all;
  host::let_others();
  return is_last;
}
inline std::int32_t draw(std::int32_t* counter) {
  host::let_others();
  return ++*counter;
}
inline void show_number(double* place, double x) {
  host::let_others();
  *place = __double_as_longlong(x) == -1 ? NAN : x;
  host::show();
  host::let_others();
}
inline bool is_shown(const double* place, double* x) {
  host::let_others();
  *x = *place;
  return __double_as_longlong(*x) != -1;
}

constexpr int kMostPolls = 1 << 20;
inline void wait_a_little() { host::wait_to_be_shown(); }
inline void give_up() { host::fail("a block waited for good"); }

float half_to_float(std::uint32_t bits);
std::uint32_t float_to_half(float x);
std::uint32_t float_to_bfloat16(float x);
inline double widened_here(float x) { return x; }
inline std::uint32_t floats_to_bfloat16(float first, float second) {
  return float_to_bfloat16(first) | float_to_bfloat16(second) << 16;
}
inline std::uint32_t floats_to_float16(float first, float second) {
  return float_to_half(first) | float_to_half(second) << 16;
}
inline std::uint32_t twice_bfloat16(std::uint32_t bits) {
  const float first = __uint_as_float(bits << 16), second = __uint_as_float(bits & 0xFFFF0000u);
  return floats_to_bfloat16(2 * first, 2 * second);
}
void multiply_bfloat16(float (&sums)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]);
void multiply_float16(float (&sums)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]);

struct Launch {
  std::int64_t blocks;
  int threads;
  std::size_t shared;
  void* stream;
};

template <class... P, class... A>
int launch(void (*kernel)(P...), const Launch& how, const A&... arguments) {
  auto call = [&] { kernel(static_cast<P>(arguments)...); };
  return host::run([](void* p) { (*static_cast<decltype(call)*>(p))(); }, &call, how.blocks, how.threads, how.shared);
}

constexpr int kTooMany = 9;
using host::describe_error;

template <class... P>
int probe(void (*)(P...)) {
  return 0;
}
inline int set_device(int) { return 0; }

}  // namespace gradvac::cuda
