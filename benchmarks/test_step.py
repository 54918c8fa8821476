"""Whole training steps: no method at all, streamed, and with the buffer."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pytest

from . import steps
from .replay import clock, replay

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    grid = steps.FULL_GRID if metafunc.config.getoption("full") else steps.GRID
    metafunc.parametrize("step_case", grid, ids=str, indirect=True, scope="module")


@pytest.fixture(scope="module")
def step_case(request: pytest.FixtureRequest) -> tuple[steps.StepCase, dict[str, dict[str, Any]]]:
    """A case, with what was measured of all its ways."""
    if request.config.getoption("device") != "cpu":
        pytest.skip("on the CPU only")
    missing = [name for name in steps.REQUIRED if find_spec(name) is None]
    if missing:
        pytest.skip(f"the demo's data need {', '.join(missing)}")
    if not request.config.getoption("benchmark_only"):
        pytest.skip("timed, not checked: tests/test_streaming.py does that")
    return request.param, steps.measure(request.param)


@pytest.mark.parametrize("way", steps.WAYS)
@pytest.mark.benchmark(timer=clock)
def test_step(
    benchmark: BenchmarkFixture,
    step_case: tuple[steps.StepCase, dict[str, dict[str, Any]]],
    way: str,
    results: list[dict[str, Any]],
) -> None:
    case, found = step_case
    benchmark.name, benchmark.group = f"step[{way}-{case}]", f"step {case}"
    replay(benchmark, found[way]["seconds"])
    benchmark.extra_info = steps.row(case, way, found[way])
    results.append(benchmark.extra_info)
