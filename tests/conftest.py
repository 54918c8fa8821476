"""Every test runs on every backend and, of the native one, on every variant that this machine has."""

import pytest
import torch

from gradvac_kernels.backends import available_backends, cpu

BACKENDS = [name for name in available_backends() if name != "cpu"]
if "cpu" in available_backends():
    BACKENDS += [f"cpu:{variant}" for variant in cpu.instruction_sets()]


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Name of a backend; "cpu:avx2" forces that variant for the test."""
    name, _, variant = request.param.partition(":")
    if not variant:
        yield name
        return
    before = cpu.instruction_set()
    cpu.use_instruction_set(variant)
    yield name
    cpu.use_instruction_set(before)


@pytest.fixture(
    params=[name for name in BACKENDS if name.startswith("cpu:")]
    or [pytest.param("", marks=pytest.mark.skip("the native module is not built"))]
)
def native(request):
    """The native backend, once a variant: what only it promises."""
    before = cpu.instruction_set()
    cpu.use_instruction_set(request.param.partition(":")[2])
    yield "cpu"
    cpu.use_instruction_set(before)


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """torch.empty is full of NaN (or of the largest ints): an output that nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
