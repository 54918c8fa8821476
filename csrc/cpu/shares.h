// Sharing out: every thread begins with its own share of the items, a run of them that is the same in every call, and
// goes on with what others have not begun. So a core mostly finds in its cache what it has read and written there;
// another core may be as far as memory is.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

namespace gradvac::cpu {

inline std::int64_t share_begin(std::int64_t first, std::int64_t last, int share, int shares) {
  return first + (last - first) * share / shares;
}

class Shares {
 public:
  Shares(std::int64_t items, int threads) : threads_(threads), taken_(new std::atomic<bool>[items] {}) {}

  // Runs each item of first .. last - 1 that no other thread has begun: own ones first, then the others' from their
  // end. All threads call it, with different shares; every item is run once in the life of this object. No barrier.
  template <class Run>
  void each(int share, std::int64_t first, std::int64_t last, const Run& run) {
    each(first, last, share_begin(first, last, share, threads_), share_begin(first, last, share + 1, threads_), run);
  }
  // The same with begin .. end - 1 for a share.
  template <class Run>
  void each(std::int64_t first, std::int64_t last, std::int64_t begin, std::int64_t end, const Run& run) {
    for (std::int64_t item = begin; item < end; ++item) take(item, run);
    for (std::int64_t item = begin; item-- > first;) take(item, run);
    for (std::int64_t item = last; item-- > end;) take(item, run);
  }
  // The same shares as of `each`, from their last item on.
  template <class Run>
  void each_backwards(int share, std::int64_t first, std::int64_t last, const Run& run) {
    const std::int64_t begin = share_begin(first, last, share, threads_);
    const std::int64_t end = share_begin(first, last, share + 1, threads_);
    for (std::int64_t item = end; item-- > begin;) take(item, run);
    for (std::int64_t item = end; item < last; ++item) take(item, run);
    for (std::int64_t item = first; item < begin; ++item) take(item, run);
  }

 private:
  template <class Run>
  void take(std::int64_t item, const Run& run) {
    std::atomic<bool>& taken = taken_[item];
    if (!taken.load(std::memory_order_relaxed) && !taken.exchange(true, std::memory_order_relaxed)) run(item);
  }

  int threads_;
  std::unique_ptr<std::atomic<bool>[]> taken_;
};

}  // namespace gradvac::cpu
