"""How the cost of ``vaccinate`` grows with T, P, K and the share of tasks vaccinated, beside that of the plain sum."""

from __future__ import annotations

import pytest

from . import baselines
from .cases import FULL_SCALING, SCALING
from .contest import Contest, Operator, Record
from .replay import clock
from .test_vaccinate import ours

_GRID = tuple(dict.fromkeys(case for cases in SCALING.values() for case in cases))

OPERATOR = Operator(
    "vaccinate",
    lambda case, grads: baselines.exact(grads, case.groups, case.vaccinated),
    ours,
    {"torch-sum-out": baselines.plain_sum_out},
    grid=_GRID,
    full_grid=tuple(dict.fromkeys((*_GRID, *(case for cases in FULL_SCALING.values() for case in cases)))),
    gpu_grid=(),
    suite="scaling",
    seconds=0.5,
    reference=False,
)


@pytest.mark.benchmark(timer=clock)
def test_scaling(record: Record, contest: Contest, implementation: str) -> None:
    record(contest, implementation)
