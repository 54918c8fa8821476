"""Peak memory of one ``vaccinate`` beyond the gradients and the result, each in a process of its own.

``python -m benchmarks.memory cpu 8 10000000 12 float32`` prints it in bytes.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import torch

from .cases import Case

_STATUS = Path("/proc/self/status")
_ROOT = Path(__file__).parent.parent


def peak_memory(implementation: str, case: Case) -> int | None:
    """Bytes, or None where the system does not tell."""
    if not _STATUS.exists():
        return None
    sizes = (case.T, case.P, case.K, case.dtype_name)
    command = [sys.executable, "-m", "benchmarks.memory", implementation, *map(str, sizes)]
    return int(subprocess.run(command, cwd=_ROOT, check=True, capture_output=True, text=True).stdout)


def _measure(implementation: str, case: Case) -> int:
    from .test_vaccinate import OPERATOR

    build = OPERATOR.implementations("cpu")[implementation]
    small = Case(case.T, 1000 * case.K, case.K, case.dtype)
    build(small).run(small.buffer(0))  # loads the libraries and starts the threads, once a process
    contestant, grads = build(case), case.buffer(0)
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what glibc keeps of freed memory would hide what the call needs
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _peak()
    contestant.run(grads)
    # A result that is kept was not touched before, so that its pages count here as those of a new one do.
    return _peak() - before - case.P * case.dtype.itemsize


def _peak() -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10


if __name__ == "__main__":
    name, T, P, K, dtype = sys.argv[1:]
    print(_measure(name, Case(int(T), int(P), int(K), getattr(torch, dtype))))
