"""``python -m gradvac_kernels.env``: what is installed, which backends work here, and why the others do not."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

from .backends import available_backends, cpu, missing_backends
from .version import __version__


def report() -> dict[str, str]:
    """Versions, machine and backends, each as one line."""
    facts = {
        "gradvac_kernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch can use",
        "backends": ", ".join(available_backends()),
    }
    if cpu.why_unavailable() is None:
        facts["instruction set"] = f"{cpu.instruction_set()} (here: {', '.join(cpu.instruction_sets())})"
    facts.update({f"backend {name}": f"missing: {reason}" for name, reason in missing_backends().items()})
    return facts


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    for name, value in report().items():
        print(f"{name:16} {value}")
