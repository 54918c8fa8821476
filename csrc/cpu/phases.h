// The pieces that the three verbs are made of, to be run by the threads of one parallel region.
//
// A piece of columns is a segment. Segments depend on the groups only, never on the number of threads, and what they
// give is added up in their order: so do the bits.
#pragma once

#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "gradvac/cpu.h"
#include "variants.h"

namespace gradvac::cpu {

struct Segment {
  std::int64_t group, begin, end;
};

class Segments {
 public:
  explicit Segments(const Buffer& grads);
  std::int64_t count() const { return static_cast<std::int64_t>(list_.size()); }
  const Segment& operator[](std::int64_t s) const { return list_[s]; }
  std::int64_t first(std::int64_t group) const { return first_[group]; }  // of K + 1

 private:
  std::vector<Segment> list_;
  std::vector<std::int64_t> first_;
};

inline std::int64_t columns_of(const Buffer& grads, std::int64_t group) {
  return grads.bounds[2 * group + 1] - grads.bounds[2 * group];
}
std::int64_t columns_of_all(const Buffer& grads);

// Few columns: every product is added up in float64.
inline bool is_small_group(const Buffer& grads, std::int64_t group) { return columns_of(grads, group) <= 4096; }

// Threads worth waking for this much data, at most `threads`.
int useful_threads(const Buffer& grads, int threads);
// Every thread of a region computes with subnormals, whatever torch.set_flush_denormal said to some of them, and
// without traps: a lane may divide by zero where its result is not taken.
class FullFloats {
 public:
  FullFloats();
  FullFloats(const FullFloats&) = delete;
  FullFloats& operator=(const FullFloats&) = delete;
  ~FullFloats();

 private:
  unsigned int before_ = 0;
};

// Bytes of a core's own cache, and of the last level.
std::int64_t core_cache_bytes();
std::int64_t last_cache_bytes();

constexpr std::int64_t kCacheLine = 64;
constexpr std::int64_t round_up(std::int64_t size, std::int64_t unit) { return (size + unit - 1) / unit * unit; }

// Uninitialised doubles that begin with a cache line.
class AlignedDoubles {
 public:
  explicit AlignedDoubles(std::int64_t count)
      : data_(static_cast<double*>(::operator new(count * sizeof(double), std::align_val_t(kCacheLine)))) {}
  AlignedDoubles(const AlignedDoubles&) = delete;
  AlignedDoubles& operator=(const AlignedDoubles&) = delete;
  ~AlignedDoubles() { ::operator delete(data_, std::align_val_t(kCacheLine)); }
  double& operator[](std::int64_t i) { return data_[i]; }

 private:
  double* data_;
};

class GramPhase {
 public:
  GramPhase(const Buffer& grads, const Segments& segments, int threads);
  void measure(std::int64_t segment, int thread);
  void add_up(std::int64_t group, double* G) const;  // G [T, T]

 private:
  const Buffer& grads_;
  const Segments& segments_;
  const Variant& variant_;
  std::int64_t scratch_size_, packed_size_;
  AlignedDoubles scratch_;            // [threads, scratch_size_]
  std::unique_ptr<double[]> packed_;  // [segments, packed_size_]
};

class CoefficientPhase {
 public:
  CoefficientPhase(const Vaccine& vaccine, const double* G, std::int64_t K, std::int64_t T, int threads);
  // Rows first .. last - 1 of a group, at most kRows: one waits for roots and quotients while others go on.
  void solve(std::int64_t group, std::int64_t first, std::int64_t last, int thread);
  void weigh(std::int64_t group);

  std::int64_t blocks() const { return (T_ + kRows - 1) / kRows; }  // of rows
  void solve_block(std::int64_t group, std::int64_t block, int thread) {
    solve(group, block * kRows, block * kRows + kRows < T_ ? block * kRows + kRows : T_, thread);
  }

 private:
  bool begin(std::int64_t group, std::int64_t row, double* v, std::int64_t* order, Turning* turning);
  const std::int64_t* draw(std::int64_t group, std::int64_t row, std::int64_t* order) const;
  std::int64_t id(std::int64_t row) const { return vaccine_.task_ids == nullptr ? row : vaccine_.task_ids[row]; }

  const Vaccine& vaccine_;
  const Solver& solver_;
  const double* G_;                        // [K, T, T]
  std::int64_t T_, rows_size_;             // the latter a cache line more, so that threads share none
  std::unique_ptr<double[]> C_;            // [K, T, T]
  std::unique_ptr<double[]> v_;            // [threads, rows_size_], of it [kRows, T]
  std::unique_ptr<std::int64_t[]> order_;  // [threads, rows_size_], of it [kRows, T]
};

class CombinePhase {
 public:
  CombinePhase(const Buffer& grads, const double* weights, const Result& out);
  void combine(const Segment& segment) const;

 private:
  const Buffer& grads_;
  const double* weights_;
  const Result& out_;
  const Variant& variant_;
  bool stream_;
};

}  // namespace gradvac::cpu
