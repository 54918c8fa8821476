"""``gram`` against torch's matmul a group; the plain sum is there as the price of reading the buffer once."""

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
        return Contestant(lambda grads: gvk.gram(grads, case.groups, backend=backend), tolerance=1e-6)

    return build


def _truth(case: Case, grads: torch.Tensor) -> torch.Tensor:
    return gvk.gram(grads, case.groups, backend="reference")


OPERATOR = Operator(
    "gram",
    _truth,
    _ours,
    {
        "torch-sum": baselines.plain_sum,
        "torch-matmul": baselines.gram_matmul,
        "torch-matmul-blocks": baselines.gram_matmul_blocks,
    },
    grid=(*(Case(T, 10_000_000, 12) for T in (2, 4)), *GRID, *(Case(T, 1_000_000, 12) for T in (32, 64, 128))),
    full_grid=FULL_GRID,
    gpu_grid=GPU_GRID,
)


@pytest.mark.benchmark(timer=clock)
def test_gram(record: Record, contest: Contest, implementation: str) -> None:
    record(contest, implementation)
