"""Native C++ kernels for tensors on the CPU (``csrc/cpu``), with as many threads as torch uses."""

from __future__ import annotations

import os

import torch

from ..numerics import MAX_TARGET, precision
from ..rows import turnable_rows

try:
    from .. import _cpu

    _missing = None
    if os.environ.get("GRADVAC_CPU_ISA"):
        _cpu.use_instruction_set(os.environ["GRADVAC_CPU_ISA"])
except ImportError as error:  # said on first use and by python -m gradvac_kernels.env, not on import
    _missing = f"the native module gradvac_kernels._cpu is not built ({error})"

_DTYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}  # gradvac::Dtype


def why_unavailable() -> str | None:
    """None where the native module is there."""
    return _missing


def serves(device: torch.device) -> bool:
    """Tensors in host memory."""
    return device.type == "cpu"


def instruction_set() -> str:
    """The variant of the kernels in use."""
    return _cpu.instruction_set()


def instruction_sets() -> tuple[str, ...]:
    """The variants that this machine can run, the fastest first."""
    return () if _missing else tuple(_cpu.instruction_sets())


def use_instruction_set(name: str) -> None:
    """Force a variant, as the environment variable ``GRADVAC_CPU_ISA`` does on import."""
    _cpu.use_instruction_set(name)


def gram(grads: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """``G[k, i, j] = <g_ik, g_jk>``, [K, T, T] float64."""
    T = grads.shape[0]
    G = torch.empty(len(bounds), T, T, dtype=torch.float64)
    _cpu.gram(*_buffer(grads, bounds), G.data_ptr(), torch.get_num_threads())
    return G


def combine(grads: torch.Tensor, weights: torch.Tensor, bounds: torch.Tensor, out: torch.Tensor) -> None:
    """``out[p] = sum_j weights[k(p), j] * grads[j, p]``."""
    _cpu.combine(
        *_buffer(grads, bounds), weights.data_ptr(), out.data_ptr(), _DTYPE[out.dtype], torch.get_num_threads()
    )


def vaccinate(
    grads: torch.Tensor,
    bounds: torch.Tensor,
    ema: torch.Tensor | None,
    *,
    beta: float,
    target: float | None,
    task_ids: torch.Tensor | None,
    vaccinated: torch.Tensor | None,
    order: torch.Tensor | None,
    seed: int,
    step: int | torch.Tensor,
    first_group: int,
    out: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gram, coefficients and combine in one call: a group is combined while it is still in the cache."""
    K, T = len(bounds), grads.shape[0]
    weights = torch.empty(K, T, dtype=torch.float64)
    similarity = torch.empty(K, T, T, dtype=torch.float64)
    corrected = torch.empty(K, T, T, dtype=torch.bool)
    order = None if order is None else order.contiguous()
    task_ids = None if task_ids is None else task_ids.contiguous()
    turnable = turnable_rows(T, task_ids, vaccinated, grads.device)
    _cpu.vaccinate(
        *_buffer(grads, bounds),
        _pointer(ema),
        0 if ema is None else ema.shape[1],
        beta,
        0.0 if target is None else target,
        MAX_TARGET,
        *precision(grads.dtype),
        _pointer(task_ids),
        _pointer(turnable),
        _pointer(order),
        seed,
        int(step),
        first_group,
        weights.data_ptr(),
        similarity.data_ptr(),
        corrected.data_ptr(),
        out.data_ptr(),
        _DTYPE[out.dtype],
        torch.get_num_threads(),
    )
    return weights, similarity, corrected


def _buffer(grads: torch.Tensor, bounds: torch.Tensor) -> tuple[int, int, int, int, int, int]:
    return (
        grads.data_ptr(),
        _DTYPE[grads.dtype],
        grads.shape[0],
        grads.stride(0),
        bounds.data_ptr(),
        len(bounds),
    )


def _pointer(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
