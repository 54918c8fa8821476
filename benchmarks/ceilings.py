"""The two ceilings of the machine, as fast as they can be reached here: streaming reads and float32 multiply-adds."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

try:
    from gradvac_kernels import _cpu
except ImportError:  # then torch alone has to find the ceilings
    _cpu = None

STREAMING_READ = "streaming read"  # in bytes a second
MULTIPLY_ADDS = "multiply-adds"  # a second
_SIDE = 2048  # of the square matrices multiplied
_MULTIPLY_ADDS = 1 << 31  # in registers: some milliseconds, in which starting the threads is lost


@dataclass(frozen=True)
class Probe:
    """One way to come near a ceiling; the ceiling is what the best of its probes reaches."""

    ceiling: str
    name: str
    run: Callable[[], object]
    amount: float
    """Bytes or multiply-adds of one run."""

    def run_on(self, _: torch.Tensor) -> object:
        """As an implementation is run; the gradients are none of its business."""
        return self.run()


def last_level_cache(device: str = "cpu") -> int:
    """Bytes of the largest cache of the first core, or of the GPU."""
    if device != "cpu":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size.removesuffix("K")) << 10 for size in sizes), default=64 << 20)


def gpu_probes() -> list[Probe]:
    """Memory and matrix units of the GPU: a copy counts what it reads and what it writes."""
    x, y = (torch.ones(1 << 29, device="cuda") for _ in range(2))
    sides = 4 * _SIDE
    a, b = (torch.randn(sides, sides, device="cuda").bfloat16() for _ in range(2))
    return [
        Probe(STREAMING_READ, "copy", lambda: y.copy_(x), 2.0 * x.nbytes),
        Probe(STREAMING_READ, "torch sum", x.sum, float(x.nbytes)),
        Probe(STREAMING_READ, "torch max", x.max, float(x.nbytes)),
        Probe(MULTIPLY_ADDS, "torch bfloat16 matmul", lambda: a @ b, float(sides**3)),
    ]


def probes(device: str) -> list[Probe]:
    """Every probe of both ceilings that can be run here, on memory several times the size of the caches."""
    if device != "cpu":
        return gpu_probes()
    threads = torch.get_num_threads()
    rows = 256
    x = torch.ones(rows, max(256 << 20, 4 * last_level_cache()) // (4 * rows))
    flat, line = x.view(-1), torch.ones(x.shape[1])
    a, b = torch.randn(_SIDE, _SIDE), torch.randn(_SIDE, _SIDE)
    reads: dict[str, Callable[[], object]] = {
        "torch sum": flat.sum,
        "torch mv": lambda: torch.mv(x, line),
    }
    found = [Probe(MULTIPLY_ADDS, "torch matmul", lambda: a @ b, float(_SIDE**3))]
    if _cpu is not None:
        reads["native"] = lambda: _cpu.streaming_read(x.data_ptr(), x.nbytes, threads)
        iterations = int(_MULTIPLY_ADDS / _cpu.multiply_add_peak(1, threads))
        amount = _cpu.multiply_add_peak(iterations, threads)
        run = functools.partial(_cpu.multiply_add_peak, iterations, threads)
        found.append(Probe(MULTIPLY_ADDS, "native", run, amount))
    return found + [Probe(STREAMING_READ, name, run, float(x.nbytes)) for name, run in reads.items()]
