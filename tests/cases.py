"""Task gradients to test with: layouts of groups, and rows that partly agree, with known exact results."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

import gradvac_kernels as gvk

LAYOUTS = {
    "one": gvk.ParameterGroups.from_sizes({"a": 700}),
    # one-column and empty groups, sizes around a vector, a tile (512) and a segment (16384)
    "ragged": gvk.ParameterGroups.from_sizes({"a": 1, "b": 0, "c": 37, "d": 513, "e": 16, "f": 1200, "g": 511}),
    "aligned": gvk.ParameterGroups.from_sizes({"a": 5, "b": 100, "c": 0, "d": 31}, align=16),
    # whole vectors
    "whole": gvk.ParameterGroups.from_sizes({"a": 3, "b": 9001, "c": 0, "d": 4096, "e": 20000, "f": 4100}, align=8),
    "wide": gvk.ParameterGroups.from_sizes({"b": 9001, "d": 4096, "e": 20000, "f": 4100}, align=8),
    "long": gvk.ParameterGroups.from_sizes({"a": 3, "b": 16384 + 600, "c": 20000}),
}


def task_gradients(
    num_tasks: int,
    groups: gvk.ParameterGroups,
    *,
    step: int = 0,
    dtype: torch.dtype = torch.float32,
    skew: int = 0,
    zero_rows: bool = False,
    device: str = "cpu",
) -> torch.Tensor:
    """[T, P] rows that share a direction, some against it, of very different norms. Padding is NaN.

    ``skew`` > 0 puts them into a wider buffer at an odd column: strided rows, on no alignment.
    """
    generator = torch.Generator().manual_seed(1000 * num_tasks + step)
    P = groups.numel
    shared = torch.randn(P, generator=generator)
    agreement = torch.linspace(-0.6, 1.5, num_tasks)[:, None]
    scale = 10.0 ** torch.linspace(-2, 2, num_tasks)[:, None]
    values = scale * (torch.randn(num_tasks, P, generator=generator) + agreement * shared)
    if zero_rows:
        for k, (begin, end) in enumerate(groups.bounds.tolist()):
            values[(k + step) % num_tasks, begin:end] = 0
    inside = torch.zeros(P, dtype=torch.bool)
    for begin, end in groups.bounds.tolist():
        inside[begin:end] = True
    values[:, ~inside] = torch.nan
    buffer = torch.full((num_tasks, P + 2 * skew), torch.nan, dtype=dtype, device=device)
    buffer[:, skew : skew + P] = values.to(dtype)
    return buffer[:, skew : skew + P]


class Expected(NamedTuple):
    gradient: torch.Tensor
    weights: torch.Tensor
    similarity: torch.Tensor
    corrected: torch.Tensor
    gram: torch.Tensor
    ema: torch.Tensor


@functools.cache
def oracle_run(
    num_tasks: int,
    layout: str,
    dtype: torch.dtype,
    steps: int,
    vaccinated: tuple[int, ...] | None = None,
    zero_rows: bool = False,
    target: float | None = None,
) -> list[Expected]:
    """What Algorithm 1 on explicit float64 vectors gives, step by step."""
    groups = LAYOUTS[layout]
    ema = None if target is not None else torch.zeros(len(groups), num_tasks, num_tasks, dtype=torch.float64)
    results = []
    for step in range(steps):
        grads = task_gradients(num_tasks, groups, step=step, dtype=dtype, zero_rows=zero_rows)
        found = gvk.reference.vaccinate(
            grads,
            groups,
            ema,
            beta=0.1,
            target=target,
            vaccinated=vaccinated,
            seed=7,
            step=step,
            out=torch.zeros(groups.numel, dtype=torch.float64),
        )
        results.append(Expected(*found, torch.empty(0) if ema is None else ema.clone()))
    return results


def inside(groups: gvk.ParameterGroups, columns: torch.Tensor) -> torch.Tensor:
    """The columns that belong to a group."""
    return torch.cat([columns[..., begin:end] for begin, end in groups.bounds.tolist()], dim=-1)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|found - expected| / |expected|, infinite for NaN."""
    error = (found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-300)
    return float(torch.nan_to_num(error, nan=torch.inf))


def rounding(backend: str, dtype: torch.dtype) -> float:
    """Largest relative error of rounding to ``dtype``; the interpreter of Triton cuts bfloat16 off instead."""
    return torch.finfo(dtype).eps / (1 if (backend, dtype) == ("triton", torch.bfloat16) else 2)
