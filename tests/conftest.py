"""Every test runs on every backend and, of the native one, on every variant that this machine has.

Where there is no GPU, the Triton kernels run in Triton's interpreter and the CUDA kernels in fibers, on tensors in host
memory. Where there is one, tests/test_gpu.py holds them to the oracle there.
"""

import functools
import os

import pytest
import torch

if not (torch.cuda.is_available() or torch.xpu.is_available()):
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are made

import cuda_host

from gradvac_kernels.backends import available_backends, choose, cpu, cuda, triton

if not torch.cuda.is_available() and cuda_host.why_unavailable() is None:
    cuda._cuda, cuda._missing, cuda._DEVICE = cuda_host.load(), None, "cpu"
    cuda._cache = lambda device: 1 << 20

if triton.why_unavailable() is None and triton.device.INTERPRETED:
    # The interpreter's time goes by operations, however wide: longer vectors than a GPU takes, but no longer than the
    # shortest piece, so that whole ones are read too, nor than a float32 chain of matrix products may be; and larger
    # blocks, of float32 itself, where there are matrix units.
    from gradvac_kernels.backends.triton import cross_gram_kernels, gram_kernels

    def _widen(choose):
        @functools.wraps(choose)
        def wide(num_rows, dtype, hopper):
            config = choose(num_rows, dtype, hopper)
            if config.kernel == "dot":
                rows = min(max(16, 1 << (num_rows - 1).bit_length()), 64)
                return config._replace(rows=rows, columns=128, chain=1, unit=16)
            return config._replace(columns=min(8 * config.columns, 1024))

        return wide

    gram_kernels.choose_config = _widen(gram_kernels.choose_config)
    cross_gram_kernels.choose_blocks = _widen(cross_gram_kernels.choose_blocks)
    for _module in (gram_kernels, cross_gram_kernels):
        _module.parts = lambda dtype: 1
        _module.choose_sums = lambda num_rows: (8, 1024) if num_rows <= 40 else (32, 256)

    import interpreter

    interpreter.repair()
    interpreter.quicken()


def _on_the_host(name):
    try:
        return choose(torch.device("cpu"), name) is not None
    except ValueError:
        return False


BACKENDS = [name for name in available_backends() if name not in ("cpu", "cuda") and _on_the_host(name)]
if "cpu" in available_backends():
    BACKENDS += [f"cpu:{variant}" for variant in cpu.instruction_sets()]
if _on_the_host("cuda"):
    BACKENDS += ["cuda:two launches", "cuda:one launch"]


def pytest_collection_modifyitems(items):
    """The two paths of the CUDA kernels differ in vaccinate only: without it, one is enough."""
    items[:] = [x for x in items if not (x.get_closest_marker("no_vaccinate") and "cuda:one launch" in x.name)]


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Name of a backend; "cpu:avx2" forces that variant for the test, "cuda:one launch" that path."""
    name, _, variant = request.param.partition(":")
    if not variant:
        yield name
        return
    if name == "cuda":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuda, "_takes_one_launch", lambda _: variant == "one launch")
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
