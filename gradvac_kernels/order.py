"""The order of Algorithm 1's inner loop: a counter-based hash ranks the other tasks, anew for every group and row.

There is no generator state: (seed, step, group, row) is the counter. ``csrc/include/gradvac/order.h`` computes the
same keys, so every backend and every rank of a distributed job draws the same order.
"""

from __future__ import annotations

import torch

_GOLDEN = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as int64
_MULTIPLY_1 = -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
_MULTIPLY_2 = -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB


def shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # int64 shifts are arithmetic: mask the sign's copies


def fold(state: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    # splitmix64's finaliser (Steele, Lea and Flood, OOPSLA 2014) over (state xor value) + golden; int64 wraps
    x = (state ^ value) + _GOLDEN
    x = (x ^ shift(x, 30)) * _MULTIPLY_1
    x = (x ^ shift(x, 27)) * _MULTIPLY_2
    return x ^ shift(x, 31)


def task_order(
    num_groups: int, num_tasks: int, seed: int, step: int | torch.Tensor, first_group: int, device: torch.device
) -> torch.Tensor:
    """``[K, T, T-1]`` int64: for each group and row, the other rows, ranked by their keys (ties by index)."""
    count = torch.arange(max(num_tasks, num_groups) + 1, device=device)
    rows = count[:num_tasks]
    state = torch.tensor(seed, device=device)
    state = fold(torch.zeros_like(state), state)
    state = fold(state, step if isinstance(step, torch.Tensor) else torch.tensor(step, device=device))
    state = fold(state, count[:num_groups] + first_group)  # [K]
    state = fold(state[:, None], rows)  # [K, T]
    others = count[: num_tasks - 1].expand(num_tasks, -1)
    others = others + (others >= rows[:, None])  # [T, T-1], every row but one's own
    keys = shift(fold(state[:, :, None], others), 1)  # [K, T, T-1], not negative: signed and unsigned agree
    return others.expand_as(keys).gather(2, keys.argsort(dim=2, stable=True))
