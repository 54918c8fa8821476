// The order of Algorithm 1's inner loop, drawn from a counter. gradvac_kernels/order.py computes the same keys.
#pragma once

#include <cstdint>

#include "gradvac/host_device.h"

namespace gradvac {

// splitmix64's finaliser (Steele, Lea and Flood, OOPSLA 2014)
GRADVAC_HD inline std::uint64_t fold(std::uint64_t state, std::uint64_t value) {
  std::uint64_t x = (state ^ value) + 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

// What the keys of one row's loop have in common. `group` is the group's identity in the whole model.
GRADVAC_HD inline std::uint64_t order_state(std::int64_t seed, std::int64_t step, std::int64_t group,
                                            std::int64_t row) {
  std::uint64_t state = fold(0, static_cast<std::uint64_t>(seed));
  state = fold(state, static_cast<std::uint64_t>(step));
  state = fold(state, static_cast<std::uint64_t>(group));
  return fold(state, static_cast<std::uint64_t>(row));
}

// The other rows are visited in ascending order of this key, ties by index.
GRADVAC_HD inline std::uint64_t order_key(std::uint64_t state, std::int64_t other) {
  return fold(state, static_cast<std::uint64_t>(other)) >> 1;
}

}  // namespace gradvac
