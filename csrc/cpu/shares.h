// Sharing out: every thread begins with its own share of the items, a run of them that is the same in every call, and
// goes on with what others have not begun. So a core finds in its cache what it has read and written there, and none of
// it has to come from another core, which may be as far as memory is.
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

  // Calls run(item) for those of first .. last - 1 that fall to the thread whose share this is: each to one, once.
  template <class Run>
  void each(int share, std::int64_t first, std::int64_t last, const Run& run) {
    const std::int64_t begin = share_begin(first, last, share, threads_);
    const std::int64_t end = share_begin(first, last, share + 1, threads_);
    for (std::int64_t item = begin; item < end; ++item) take(item, run);
    for (std::int64_t item = begin; item-- > first;) take(item, run);  // the others' from their end
    for (std::int64_t item = last; item-- > end;) take(item, run);
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
