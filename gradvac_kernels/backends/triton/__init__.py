"""Triton kernels for tensors on a GPU: at most four launches a step, whatever T and K, and nothing read back.

A layout of groups copies its tables to the device when it is first used, as Triton compiles a kernel then: both are
done before a CUDA graph is captured if the call was made once before.
"""

from __future__ import annotations

from typing import Any

import torch

from ...numerics import precision

_OLDEST = (3, 6)

try:
    import triton

    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < _OLDEST:
        _missing: str | None = f"it needs Triton {_OLDEST[0]}.{_OLDEST[1]} or newer, found {triton.__version__}"
    else:
        from . import coefficient_kernels, combine_kernels, cross_gram_kernels, device, gram_kernels
        from .plan import Plan, make_plan

        _missing = None
except ImportError as error:
    _missing = f"Triton cannot be imported ({error})"


def why_unavailable() -> str | None:
    """None where Triton is there and a GPU to run on (or its interpreter)."""
    if _missing is not None or device.INTERPRETED or torch.cuda.is_available() or torch.xpu.is_available():
        return _missing
    return "no GPU that Triton serves"


def serves(device_: torch.device) -> bool:
    """GPUs; the CPU where TRITON_INTERPRET=1 runs the kernels in Python."""
    return device.serves(device_)


def gram(grads: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """``G[k, i, j] = <g_ik, g_jk>``, [K, T, T] float64."""
    with device.current(grads.device):
        return gram_kernels.measure(grads, _plan(grads, bounds))[0]


def cross_gram(a: torch.Tensor, b: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """``C[k, i, j] = <a_ik, b_jk>``, [K, T, T'] float64."""
    if len(a) == 0 or len(b) == 0:
        return a.new_empty(len(bounds), len(a), len(b), dtype=torch.float64)
    with device.current(a.device):
        return cross_gram_kernels.cross_measure(a, b, _plan(a if len(a) > len(b) else b, bounds))


def combine(grads: torch.Tensor, weights: torch.Tensor, bounds: torch.Tensor, out: torch.Tensor) -> None:
    """``out[p] = sum_j weights[k(p), j] * grads[j, p]``."""
    with device.current(grads.device):
        combine_kernels.combine(grads, weights, _plan(grads, bounds), out)


def coefficients(
    G: torch.Tensor, ema: torch.Tensor | None, **rule: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The inner loop of Algorithm 1 for ``G`` [K, T, T]; ``rule`` as ``reference.coefficients`` takes it."""
    with device.current(G.device):
        return _solve(G, torch.zeros(len(G), dtype=torch.int32, device=G.device), ema, **rule)


def vaccinate(
    grads: torch.Tensor, bounds: torch.Tensor, ema: torch.Tensor | None, *, out: torch.Tensor, **rule: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gram, coefficients, combine."""
    with device.current(grads.device):
        plan = _plan(grads, bounds)
        G, arrived = gram_kernels.measure(grads, plan)
        found = _solve(G, arrived, ema, limits=precision(grads.dtype), **rule)
        combine_kernels.combine(grads, found[0], plan, out)
    return *found, G


def _solve(
    G: torch.Tensor, arrived: torch.Tensor, ema: torch.Tensor | None, **rule: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rule |= {name: _contiguous(rule[name]) for name in ("task_ids", "vaccinated", "order")}
    return coefficient_kernels.coefficients(G, arrived, ema, **rule)


def _plan(grads: torch.Tensor, bounds: torch.Tensor) -> Plan:
    combined = combine_kernels.block_columns(grads)
    return make_plan(tuple(bounds.flatten().tolist()), grads.shape[0], grads.device, combined)


def _contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()
