"""The backends. Each is one module with the same face: gram, cross_gram, coefficients, combine,
vaccinate, and whether it can be used."""

from __future__ import annotations

from types import ModuleType

import torch

from . import cpu, cuda, reference, triton

_BACKENDS: dict[str, ModuleType] = {  # the faster ones first
    "cpu": cpu,
    "triton": triton,
    "cuda": cuda,
    "reference": reference,
}


def available_backends() -> tuple[str, ...]:
    """Names of the backends that can be used here, the plain PyTorch reference first."""
    return tuple(name for name, backend in reversed(_BACKENDS.items()) if backend.why_unavailable() is None)


def missing_backends() -> dict[str, str]:
    """Names of the backends that cannot be used here, each with the reason."""
    reasons = {name: backend.why_unavailable() for name, backend in _BACKENDS.items()}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def choose(device: torch.device, name: str | None = None) -> ModuleType:
    """The backend called ``name``, or the fastest one that serves ``device``.

    Raises:
        ValueError: no such backend, or it is missing here, or it does not serve the device.
    """
    if name is None:
        for backend in _BACKENDS.values():
            if backend.why_unavailable() is None and backend.serves(device):
                return backend
        raise ValueError(f"grads: expected a device that a backend serves, got {device}")
    if name not in _BACKENDS:
        raise ValueError(f"backend: expected one of {available_backends()}, got {name!r}")
    chosen = _BACKENDS[name]
    reason = chosen.why_unavailable()
    if reason is not None:
        raise ValueError(f"backend: {name!r} cannot be used here: {reason}")
    if not chosen.serves(device):
        raise ValueError(f"backend: {name!r} does not serve tensors on {device}")
    return chosen
