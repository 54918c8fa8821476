"""``cross_gram`` of the first half of a buffer's rows with the second, against torch's matmul a group.

T counts the rows of both: so many are read.
"""

from __future__ import annotations

import pytest
import torch

import gradvac_kernels as gvk

from . import baselines
from .cases import GPU_GRID, Case
from .contest import Builder, Contest, Contestant, Operator, Record
from .replay import clock


def _ours(backend: str) -> Builder:
    def build(case: Case) -> Contestant:
        return Contestant(lambda grads: _halves(grads, case, backend), tolerance=1e-6)

    return build


def _halves(grads: torch.Tensor, case: Case, backend: str | None) -> torch.Tensor:
    half = case.T // 2
    return gvk.cross_gram(grads[:half], grads[half:], case.groups, backend=backend)


def _truth(case: Case, grads: torch.Tensor) -> torch.Tensor:
    return _halves(grads, case, "reference")


GRID = (
    *(Case(T, 10_000_000, 12) for T in (4, 16)),
    Case(16, 10_000_000, 12, torch.bfloat16),
    Case(16, 1_000_000, 100, torch.float16),
    *(Case(T, 1_000_000, 12) for T in (32, 64, 200)),
)

OPERATOR = Operator(
    "cross_gram",
    _truth,
    _ours,
    {"torch-sum": baselines.plain_sum, "torch-matmul": baselines.cross_gram_matmul},
    grid=GRID,
    full_grid=(*GRID, Case(16, 1_000_000, 100, torch.float64)),
    gpu_grid=GPU_GRID[7:],  # from 16 rows of bfloat16 on
)


@pytest.mark.benchmark(timer=clock)
def test_cross_gram(record: Record, contest: Contest, implementation: str) -> None:
    record(contest, implementation)
