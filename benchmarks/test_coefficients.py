"""``coefficients``, from Gram matrices to weights, against the same in numpy and TorchJD's weighting."""

from __future__ import annotations

import itertools

import pytest
import torch

import gradvac_kernels as gvk

from . import baselines
from .cases import Case
from .contest import Builder, Contest, Contestant, Operator, Record
from .replay import clock


def _ours(backend: str) -> Builder:
    def build(case: Case) -> Contestant:
        ema, steps = case.targets(), itertools.count()

        def run(G: torch.Tensor) -> torch.Tensor:
            step = next(steps)
            return gvk.coefficients(G, case.groups, ema, beta=baselines.BETA, step=step, backend=backend).weights

        return Contestant(run, 1e-9)

    return build


def _truth(case: Case, G: torch.Tensor) -> torch.Tensor:
    return gvk.coefficients(G, case.groups, case.targets(), beta=baselines.BETA, backend="reference").weights


OPERATOR = Operator(
    "coefficients",
    _truth,
    _ours,
    {"numpy": baselines.coefficients_numpy, "torchjd-weighting": baselines.coefficients_torchjd},
    grid=(Case(8, 120_000, 12), Case(8, 1_000_000, 100), Case(16, 1_000_000, 100), Case(100, 1_000_000, 20)),
    full_grid=tuple(Case(T, 1_000_000, K) for T in (2, 4, 8, 16, 32, 64, 128) for K in (1, 12, 100)),
    gpu_grid=tuple(Case(T, 1_000_000, K, device="cuda") for T, K in ((8, 12), (8, 100), (16, 100), (64, 12))),
    takes_matrices=True,
)


@pytest.mark.benchmark(timer=clock)
def test_coefficients(record: Record, contest: Contest, implementation: str) -> None:
    record(contest, implementation)
