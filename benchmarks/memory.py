"""Peak memory of one call beyond what was there before it."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")


def peak_memory(run: Callable[[torch.Tensor], object], grads: torch.Tensor) -> int | None:
    """Bytes, the result included if it is a new one; on the host to some 100 KiB, and None where the system does not
    tell."""
    gc.collect()
    if grads.device.type != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(grads)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if not _STATUS.exists():
        return None
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what glibc keeps of freed memory would hide what the call needs
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    except OSError:
        return None
    before = _peak()
    run(grads)
    return _peak() - before


def _peak() -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10
