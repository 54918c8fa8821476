"""The package without its native module, the report of the environment, and the choice of instruction set."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gradvac_kernels as gvk
from gradvac_kernels.backends import cpu


def python(code, **environment):
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=plain | environment, timeout=120
    )


def test_report():
    done = subprocess.run([sys.executable, "-m", "gradvac_kernels.env"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = dict(
        line.split(None, 1) if not line.startswith("instruction set") else ("isa", line)
        for line in done.stdout.splitlines()
    )
    assert lines["torch"] == torch.__version__
    assert lines["gradvac_kernels"] == gvk.__version__
    here = [name for name in gvk.available_backends() if name != "cuda" or torch.cuda.is_available()]  # not the host's
    assert lines["backends"].split(", ") == here
    assert f"{cpu.instruction_set()} (here: {', '.join(cpu.instruction_sets())})" in lines["isa"]


WITHOUT = """
import sys
sys.modules["gradvac_kernels._cpu"] = None  # an import of it fails
import torch, gradvac_kernels as gvk
"""


def test_without_the_native_module_the_reference_works():
    done = python(
        WITHOUT
        + """
assert gvk.available_backends() == ("reference",)
groups = gvk.ParameterGroups.from_sizes({"a": 3})
print(gvk.gram(torch.ones(2, 3), groups).tolist())
try:
    gvk.gram(torch.ones(2, 3), groups, backend="cpu")
except ValueError as error:
    print(error)
"""
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "[[[3.0, 3.0], [3.0, 3.0]]]"
    assert "backend: 'cpu' cannot be used here: the native module gradvac_kernels._cpu is not built" in done.stdout


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ("types.SimpleNamespace(__version__='3.2.0')", "it needs Triton 3.6 or newer, found 3.2.0"),
        ("None", "Triton cannot be imported"),
    ],
)
def test_another_backend_serves_the_gpu_where_triton_is_old_or_missing(found, said):
    """torch 2.6 to 2.9 bring an old one."""
    done = python(
        f"""
import sys, types, torch
sys.modules["triton"] = {found}
from gradvac_kernels.backends import choose, missing_backends, triton
assert choose(torch.device("cuda")) is not triton
print(missing_backends()["triton"])
"""
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(said)


def test_the_report_says_why_a_backend_is_missing():
    done = python(WITHOUT + "import runpy; runpy.run_module('gradvac_kernels.env', run_name='__main__')")
    assert done.returncode == 0, done.stderr
    assert "backend cpu      missing: the native module gradvac_kernels._cpu is not built" in done.stdout


def test_the_default_is_the_fastest_instruction_set():
    """The one with the most instructions, but for bfloat16 dot products, which Intel's processors are slow at."""
    done = python("from gradvac_kernels.backends import cpu; print(cpu.instruction_set())", GRADVAC_CPU_ISA="")
    first, *others = cpu.instruction_sets()
    slow = first == "avx512_bf16" and "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    assert done.stdout.strip() == (others[0] if slow else first)


@pytest.mark.parametrize("name", cpu.instruction_sets())
def test_the_environment_forces_an_instruction_set(name):
    done = python("from gradvac_kernels.backends import cpu; print(cpu.instruction_set())", GRADVAC_CPU_ISA=name)
    assert done.stdout.strip() == name


def test_an_unknown_instruction_set_is_refused():
    done = python("import gradvac_kernels", GRADVAC_CPU_ISA="sse9")
    assert done.returncode != 0
    assert "GRADVAC_CPU_ISA: expected one of" in done.stderr
    assert "got 'sse9'" in done.stderr
