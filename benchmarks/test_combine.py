"""``combine`` against torch's matmul a group; the plain sum is the same with all weights 1."""

from __future__ import annotations

import pytest
import torch

import gradvac_kernels as gvk

from . import baselines
from .cases import FULL_GRID, GPU_GRID, GRID, Case
from .contest import Builder, Contest, Contestant, Operator, Record
from .replay import clock


def _ours(backend: str) -> Builder:
    def build(case: Case) -> Contestant:
        weights, out = case.weights(), case.empty(case.P)
        return Contestant(
            lambda grads: gvk.combine(grads, weights, case.groups, out=out, backend=backend),
            baselines.tolerance(case.dtype, least=1e-6),
        )

    return build


def _truth(case: Case, grads: torch.Tensor) -> torch.Tensor:
    out = case.empty(case.P, dtype=torch.float64)
    return gvk.combine(grads, case.weights(), case.groups, out=out, backend="reference")


OPERATOR = Operator(
    "combine",
    _truth,
    _ours,
    {
        "torch-sum": baselines.plain_sum,
        "torch-sum-out": baselines.plain_sum_out,
        "torch-matmul": baselines.combine_matmul,
        "torch-matmul-out": baselines.combine_matmul_out,
    },
    grid=GRID,
    full_grid=FULL_GRID,
    gpu_grid=GPU_GRID,
)


@pytest.mark.benchmark(timer=clock)
def test_combine(record: Record, contest: Contest, implementation: str) -> None:
    record(contest, implementation)
