"""Native C++ kernels for tensors on the CPU (``csrc/cpu``), with as many threads as torch uses."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch

from ..numerics import MAX_TARGET, Precision, precision
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
    """The variants that this machine can run, those with the most instructions first."""
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


def cross_gram(a: torch.Tensor, b: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """``C[k, i, j] = <a_ik, b_jk>``, [K, T, T'] float64."""
    C = torch.empty(len(bounds), len(a), len(b), dtype=torch.float64)
    _cpu.cross_gram(*_buffer(a, bounds), b.data_ptr(), len(b), b.stride(0), C.data_ptr(), torch.get_num_threads())
    return C


def combine(grads: torch.Tensor, weights: torch.Tensor, bounds: torch.Tensor, out: torch.Tensor) -> None:
    """``out[p] = sum_j weights[k(p), j] * grads[j, p]``."""
    _cpu.combine(
        *_buffer(grads, bounds), weights.data_ptr(), out.data_ptr(), _DTYPE[out.dtype], torch.get_num_threads()
    )


def coefficients(
    G: torch.Tensor, ema: torch.Tensor | None, *, limits: Precision, **rule: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The inner loop of Algorithm 1 for ``G`` [K, T, T]; ``rule`` as ``reference.coefficients`` takes it."""
    K, T, _ = G.shape
    native = _native(K, T, ema, limits, **rule)
    _cpu.coefficients(*(G.data_ptr(), K, T, *native.arguments, torch.get_num_threads()))
    return native.results


def vaccinate(
    grads: torch.Tensor, bounds: torch.Tensor, ema: torch.Tensor | None, *, out: torch.Tensor, **rule: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gram, coefficients and combine in one call: a group is combined while it is still in the cache."""
    K, T = len(bounds), grads.shape[0]
    native, G = _native(K, T, ema, precision(grads.dtype), **rule), torch.empty(K, T, T, dtype=torch.float64)
    result = out.data_ptr(), _DTYPE[out.dtype], torch.get_num_threads()
    _cpu.vaccinate(*(*_buffer(grads, bounds), *native.arguments, G.data_ptr(), *result))
    return *native.results, G


class _Native(NamedTuple):
    """The arguments between Gram matrices and weights, in the order of the native functions."""

    arguments: tuple[Any, ...]
    results: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    kept: tuple[torch.Tensor | None, ...]  # the arguments are only addresses of these


def _native(
    K: int,
    T: int,
    ema: torch.Tensor | None,
    limits: Precision,
    *,
    beta: float,
    target: float | None,
    task_ids: torch.Tensor | None,
    vaccinated: torch.Tensor | None,
    order: torch.Tensor | None,
    seed: int,
    step: int | torch.Tensor,
    first_group: int,
) -> _Native:
    weights = torch.empty(K, T, dtype=torch.float64)
    similarity = torch.empty(K, T, T, dtype=torch.float64)
    corrected = torch.empty(K, T, T, dtype=torch.bool)
    order = None if order is None else order.contiguous()
    task_ids = None if task_ids is None else task_ids.contiguous()
    turnable = turnable_rows(T, task_ids, vaccinated, weights.device)
    arguments = (
        _pointer(ema),
        0 if ema is None else ema.shape[1],
        beta,
        0.0 if target is None else target,
        MAX_TARGET,
        *limits,
        _pointer(task_ids),
        _pointer(turnable),
        _pointer(order),
        seed,
        int(step),
        first_group,
        weights.data_ptr(),
        similarity.data_ptr(),
        corrected.data_ptr(),
    )
    return _Native(arguments, (weights, similarity, corrected), (ema, order, task_ids, turnable))


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
