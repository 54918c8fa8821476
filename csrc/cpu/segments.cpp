#include <algorithm>
#include <cinttypes>
#include <cstdio>

#include "phases.h"

#ifdef GRADVAC_X86
#include <immintrin.h>
#endif

namespace gradvac::cpu {

namespace {
constexpr std::int64_t kElementsAThread = 1 << 15;  // about what waking a thread costs

// Columns of a segment: few rows make long ones, or starting a segment would show. A group is cut into equal parts, an
// even number of them: threads that share it then end together.
std::int64_t segment_columns(std::int64_t T, std::int64_t columns) {
  constexpr std::int64_t kTile = 512;  // of gram.h, or half of a longer one: no part but the last ends amid it
  const std::int64_t most = std::clamp<std::int64_t>((1 << 18) / T, 1 << 14, 1 << 16);
  if (columns <= most) return columns;
  const std::int64_t parts = round_up((columns + most - 1) / most, 2);
  return round_up((columns + parts - 1) / parts, kTile);
}
}  // namespace

Segments::Segments(const Buffer& grads) {
  for (std::int64_t k = 0; k < grads.K; ++k) {
    const std::int64_t columns = segment_columns(grads.T, columns_of(grads, k));
    first_.push_back(count());
    const std::int64_t end = grads.bounds[2 * k + 1];
    for (std::int64_t begin = grads.bounds[2 * k]; begin < end; begin += columns) {
      list_.push_back({k, begin, std::min(begin + columns, end)});
    }
  }
  first_.push_back(count());
}

std::int64_t columns_of_all(const Buffer& grads) {
  std::int64_t columns = 0;
  for (std::int64_t k = 0; k < grads.K; ++k) columns += columns_of(grads, k);
  return columns;
}

int useful_threads(const Buffer& grads, int threads) {
  const std::int64_t worth = columns_of_all(grads) * grads.T / kElementsAThread;
  return static_cast<int>(std::max<std::int64_t>(1, std::min<std::int64_t>(threads, worth)));
}

#ifdef GRADVAC_X86
constexpr unsigned int kFlushing = 0x8040;  // flush to zero, denormals are zero
constexpr unsigned int kQuiet = 0x1F80;     // no exception traps
FullFloats::FullFloats() : before_(_mm_getcsr()) { _mm_setcsr((before_ & ~kFlushing) | kQuiet); }
FullFloats::~FullFloats() { _mm_setcsr(before_); }
#else
FullFloats::FullFloats() {}
FullFloats::~FullFloats() {}
#endif

namespace {
// Not sysconf(_SC_LEVEL3_CACHE_SIZE): glibc multiplies by cores that a virtual machine may not have.
std::int64_t system_cache_bytes(int level, std::int64_t guess) {
  char path[64];
  std::snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu0/cache/index%d/size", level);
  std::int64_t kib = 0;
  if (std::FILE* file = std::fopen(path, "r")) {
    if (std::fscanf(file, "%" SCNd64 "K", &kib) != 1) kib = 0;
    std::fclose(file);
  }
  return kib > 0 ? kib << 10 : guess;
}
}  // namespace

std::int64_t core_cache_bytes() {
  static const std::int64_t size = system_cache_bytes(2, 1 << 20);
  return size;
}

std::int64_t last_cache_bytes() {
  static const std::int64_t size = system_cache_bytes(3, 8 << 20);
  return size;
}

}  // namespace gradvac::cpu
