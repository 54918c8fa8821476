"""``vaccinate`` against no method at all (the plain sum), two passes in torch, and TorchJD's GradVac."""

from __future__ import annotations

import itertools

import pytest
import torch

import gradvac_kernels as gvk

from . import baselines
from .cases import FULL_GRID, GPU_GRID, GRID, Case
from .contest import Builder, Contest, Contestant, Operator, Record
from .memory import peak_memory
from .replay import clock

_MEMORY_FROM = 256 << 20  # bytes of a buffer beside which the memory of a call can be told from noise


def _ours(backend: str) -> Builder:
    def build(case: Case) -> Contestant:
        ema = case.targets()
        out = case.empty(case.P)  # kept, as GradientBuffer keeps it
        steps = itertools.count()

        def run(grads: torch.Tensor) -> torch.Tensor:
            step = next(steps)
            return gvk.vaccinate(
                grads, case.groups, ema, beta=baselines.BETA, step=step, out=out, backend=backend
            ).gradient

        return Contestant(run, baselines.tolerance(case.dtype, least=1e-5))

    return build


OPERATOR = Operator(
    "vaccinate",
    lambda case, grads: baselines.exact(grads, case.groups),
    _ours,
    {
        "torch-sum": baselines.plain_sum,
        "torch-sum-out": baselines.plain_sum_out,
        "torch-two-pass": baselines.two_pass,
        "torch-two-pass-compiled": baselines.two_pass_compiled,
        "torchjd": baselines.torchjd,
        "torchjd-weighting": baselines.torchjd_weighting,
        "torchjd-whole": baselines.torchjd_whole,
    },
    grid=GRID,
    full_grid=FULL_GRID,
    gpu_grid=GPU_GRID,
)


@pytest.mark.benchmark(timer=clock)
def test_vaccinate(record: Record, contest: Contest, implementation: str) -> None:
    row = record(contest, implementation)
    if row and contest.case.device == "cpu" and contest.case.nbytes >= _MEMORY_FROM:
        row["peak_memory_bytes"] = peak_memory(implementation, contest.case)
