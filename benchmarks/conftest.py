"""Options, the contests that the tests share, and the table and the file of results at the end of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from . import report
from .ceilings import Probe, probes
from .contest import Contest, Record, backends
from .replay import replay

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

_ROWS = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    options = parser.getgroup("gradvac_kernels")
    options.addoption("--full", action="store_true", help="the large grid of cases (takes hours)")
    options.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where the gradients are")
    options.addoption("--results", type=Path, metavar="JSON", help="write the results, for python -m benchmarks.report")


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("benchmarks/ needs pytest-benchmark: pip install 'gradvac_kernels[bench]'")
    if config.getoption("device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch.cuda.is_available() is False")
    config.stash[_ROWS] = []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "contest" not in metafunc.fixturenames:
        return
    op, device = metafunc.module.OPERATOR, metafunc.config.getoption("device")
    cases = op.cases(device, metafunc.config.getoption("full"))
    metafunc.parametrize("implementation", list(op.implementations(device)))
    # Of the scope of the fixture: pytest then runs the tests of a case one after another, on one contest.
    metafunc.parametrize("contest", cases, ids=str, indirect=True, scope="module")


@pytest.fixture(scope="session")
def results(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """The rows of this run."""
    return request.config.stash[_ROWS]


@pytest.fixture(scope="session")
def ceiling_probes(request: pytest.FixtureRequest) -> list[Probe]:
    return probes(request.config.getoption("device"))


@pytest.fixture(scope="module")
def contest(request: pytest.FixtureRequest) -> Contest:
    """The contest of one case, shared by the tests of its implementations as far as they are selected."""
    selected = [item.callspec.params for item in request.session.items if item.module is request.module]
    names = [params["implementation"] for params in selected if params["contest"] is request.param]
    return Contest(request.module.OPERATOR, request.param, names)


@pytest.fixture
def record(benchmark: BenchmarkFixture, ceiling_probes: list[Probe], request: pytest.FixtureRequest) -> Record:
    """Hands one implementation's times to pytest-benchmark, and returns them as a row of the results."""

    def hand_over(contest: Contest, name: str) -> dict[str, Any]:
        def refuse() -> None:
            if name in contest.wrong:  # no time for a wrong result; ours has to be right, a peer may drop out
                (pytest.fail if name in backends(contest.case.device) else pytest.skip)(contest.wrong[name])

        refuse()
        title = contest.op.name if contest.op.suite == "operators" else f"{contest.op.suite} of {contest.op.name}"
        benchmark.name = f"{title}[{name}-{contest.case}]"
        benchmark.group = f"{title} {contest.case}"
        if benchmark.disabled:  # --benchmark-disable: the results were checked, and that was all
            replay(benchmark, [0.0])
            return {}
        if not contest.seconds:
            contest.measure(ceiling_probes)
        refuse()
        replay(benchmark, contest.seconds[name])
        row = contest.row(name)
        benchmark.extra_info = row
        request.config.stash[_ROWS].append(row)
        path = request.config.getoption("results")
        if path is not None:  # whatever ends the run, what was measured is there
            _write(_partial(path), request.config.stash[_ROWS], contest.case.device)
        return row

    return hand_over


def _partial(path: Path) -> Path:
    return path.with_suffix(".json.partial")


def _write(path: Path, rows: list[dict[str, Any]], device: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(report.dump(report.collect(rows, device)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config) -> None:
    rows = config.stash[_ROWS]
    if not rows:
        return
    device, path = config.getoption("device"), config.getoption("results")
    terminalreporter.section("gradvac_kernels: time of each implementation / ours")
    terminalreporter.write_line(report.markdown(report.collect(rows, device)))
    if path is None:
        return
    complete = exitstatus == pytest.ExitCode.OK
    _write(path if complete else _partial(path), rows, device)
    if complete:
        _partial(path).unlink(missing_ok=True)
        terminalreporter.write_line(f"written: {path}")
    else:
        terminalreporter.write_line(f"not complete, or tests failed: written to {_partial(path)}", red=True)
