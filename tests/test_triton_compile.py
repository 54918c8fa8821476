"""The Triton kernels compiled for GPUs that are not there, held to budgets: what their launches count on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gradvac_kernels.backends import triton

if triton._missing is not None:  # no Triton here, or one that is too old
    pytest.skip(triton._missing, allow_module_level=True)

CAPABILITIES = (80, 90, 100)
REGISTERS = 65536  # of a multiprocessor
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes a multiprocessor gives to its blocks
# Warps of a multiprocessor that must fit the registers, to keep enough loads under way: 16 bytes a row, lane and load.
KERNELS = ("outer", "dot", "double", "add_up", "cross_dot", "cross_double", "cross_add_up", "add_weighted", "solve")
WARPS = {**dict.fromkeys(KERNELS, 8), "add_weighted": 24, "add_weighted_few": 20}


@pytest.fixture(scope="module")
def launches():
    """Every launch, compiled for every architecture, in processes without the interpreter."""
    here = Path(__file__).parent
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(here.parent), environment.get("PYTHONPATH", "")])
    command = [sys.executable, here / "compile_triton.py", "--capability"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([*command, str(c)], env=environment, **pipes) for c in CAPABILITIES]
    lines = []
    for process in processes:
        output, errors = process.communicate()
        assert process.returncode == 0, errors[-3000:]
        lines += output.splitlines()
    return [json.loads(line) for line in lines]


def named(launch):
    return f"{launch['kernel']} {launch['case']} sm_{launch['capability']}: {launch}"


def test_all_kernels_on_all_architectures(launches):
    found = {(launch["kernel"], launch["capability"]) for launch in launches}
    assert found == {(kernel, capability) for kernel in WARPS for capability in CAPABILITIES}


def test_no_stack(launches):
    """Nothing is spilled, and no array lives in memory."""
    for launch in launches:
        assert launch["stack"] == 0, named(launch)


def test_enough_warps_fit(launches):
    for launch in launches:
        granted = -(-launch["registers"] // 8) * 8 * 32 * launch["warps"]  # in units of 256 a warp
        blocks = min(REGISTERS // granted, SHARED[launch["capability"]] // (launch["shared"] + 1024))
        assert blocks * launch["warps"] >= WARPS[launch["kernel"]], named(launch)


def test_loads_and_stores_of_16_bytes(launches):
    """One load a row at least where rows are aligned, none where they are not."""
    for launch in launches:
        rows = int(launch["case"].split()[0].removeprefix("T="))
        if launch["kernel"] == "outer":
            assert launch["loads_16"] >= rows or "unaligned" in launch["case"], named(launch)
            assert launch["loads_16"] == 0 or "unaligned" not in launch["case"], named(launch)
        if launch["kernel"] in ("dot", "cross_dot"):
            assert (launch["loads_16"] > 0) == ("unaligned" not in launch["case"]), named(launch)
        if launch["kernel"] in ("add_weighted", "add_weighted_few"):
            at_hand = 1 + (launch["kernel"] == "add_weighted_few")  # and the following ones
            assert launch["loads_16"] >= at_hand * min(4, rows), named(launch)
            assert launch["stores_16"] > 0, named(launch)


def test_products_of_many_rows_use_matrix_units(launches):
    for launch in launches:
        assert (launch["matrix"] > 0) == (launch["kernel"] in ("dot", "cross_dot")), named(launch)


def test_sums_of_products_are_fused_and_the_recurrence_is_not(launches):
    """In float64: half the operations there; here every one rounded, as PyTorch does."""
    for launch in launches:
        if launch["kernel"] == "solve":
            assert launch["fused"] == 0, named(launch)
        elif launch["kernel"] not in ("outer", "dot", "cross_dot"):
            assert launch["fused"] > 0, named(launch)
