"""Where Triton's programs run, and what they may assume of memory there."""

from __future__ import annotations

import contextlib
import functools
from contextlib import AbstractContextManager

import torch
import triton

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""TRITON_INTERPRET=1: kernels run in Python, on tensors in host memory."""

FUSED = {"enable_fp_fusion": True}
"""Of a launch: a product and the sum it goes into are rounded once. Triton's own default changes from 3.10 on."""


def serves(device: torch.device) -> bool:
    """GPUs; the CPU for the interpreter."""
    return device.type in ("cuda", "xpu") or (INTERPRETED and device.type == "cpu")


def current(device: torch.device) -> AbstractContextManager[object]:
    """Launches go to the current device: make it that of the tensors."""
    if device.type == "cpu":
        return contextlib.nullcontext()
    return torch.get_device_module(device).device(device)


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Compute capability 9: matrix units of four warps, which take one factor from registers."""
    return device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device)[0] == 9


def aligned(columns: torch.Tensor) -> bool:
    """Every row begins at a multiple of 16 bytes: whole vectors can be loaded where a group does."""
    width = 16 // columns.dtype.itemsize
    return columns.data_ptr() % 16 == 0 and all(stride % width == 0 for stride in columns.stride()[:-1])
