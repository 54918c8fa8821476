"""``vaccinate`` against no method at all (the plain sum), two passes in torch, and TorchJD's GradVac."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import gradvac_kernels as gvk
from gradvac_kernels.backends import cuda

from . import baselines
from .cases import FULL_GRID, GPU_GRID, GPU_GROUPS, GRID, Case
from .contest import Builder, Contest, Contestant, NotRun, Operator, Record
from .replay import clock


def ours(backend: str) -> Builder:
    def build(case: Case) -> Contestant:
        ema = case.targets()
        out = case.empty(case.P)  # kept, as GradientBuffer keeps it
        steps = itertools.count()

        def run(grads: torch.Tensor) -> torch.Tensor:
            step = next(steps)
            return gvk.vaccinate(
                grads,
                case.groups,
                ema,
                beta=baselines.BETA,
                vaccinated=case.vaccinated,
                step=step,
                out=out,
                backend=backend,
            ).gradient

        return Contestant(run, baselines.tolerance(case.dtype, least=1e-5))

    return build


def _cuda_path(one_launch: bool) -> Builder:
    """The CUDA backend on a path that it might not choose."""

    def build(case: Case) -> Contestant:
        ema, out, steps = case.targets(), case.empty(case.P), itertools.count()
        rule: dict[str, Any] = {"beta": baselines.BETA, "target": None, "task_ids": None, "vaccinated": None}
        rule |= {"order": None, "seed": 0, "first_group": 0}
        if case.device == "cpu" or case.T > 8:
            raise NotRun("there is one path for it")

        def run(grads: torch.Tensor) -> torch.Tensor:
            cuda.vaccinate(grads, case.groups.bounds, ema, out=out, one_launch=one_launch, step=next(steps), **rule)
            return out

        return Contestant(run, baselines.tolerance(case.dtype, least=1e-5))

    return build


_PATHS: dict[str, Builder] = {}
if "cuda" in gvk.available_backends():
    _PATHS = {"cuda-one-launch": _cuda_path(True), "cuda-two-launches": _cuda_path(False)}

OPERATOR = Operator(
    "vaccinate",
    lambda case, grads: baselines.exact(grads, case.groups),
    ours,
    {
        **_PATHS,
        "torch-sum": baselines.plain_sum,
        "torch-sum-out": baselines.plain_sum_out,
        "torch-two-pass": baselines.two_pass,
        "torch-two-pass-compiled": baselines.two_pass_compiled,
        "explicit-vectors": baselines.explicit_vectors,
        "torchjd": baselines.torchjd,
        "torchjd-weighting": baselines.torchjd_weighting,
        "torchjd-whole": baselines.torchjd_whole,
    },
    grid=GRID,
    full_grid=FULL_GRID,
    gpu_grid=(*GPU_GRID, *GPU_GROUPS),
)


@pytest.mark.benchmark(timer=clock)
def test_vaccinate(record: Record, contest: Contest, implementation: str) -> None:
    record(contest, implementation)
