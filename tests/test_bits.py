"""The native kernels give the same bits for any number of threads, on every run, and on a slab of the groups."""

import os
import subprocess
import sys

import pytest
import torch
from cases import task_gradients

import gradvac_kernels as gvk

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Of one segment, of several, and one that is one thread's or not, as threads are few or many (20,000 columns, T > 13).
MANY = gvk.ParameterGroups.from_sizes(
    {str(k): size for k, size in enumerate((40_000, 0, 1, 700, 16_384, 33_000, 5, 20_000))}
)


def everything(grads, groups, backend, threads=2):
    torch.set_num_threads(threads)
    ema = torch.full((len(groups), len(grads), len(grads)), 0.2, dtype=torch.float64)
    weights = torch.randn(len(MANY), len(grads), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = gvk.vaccinate(grads, groups, ema, seed=3, step=9, backend=backend)
    return [
        gvk.gram(grads, groups, backend=backend),
        gvk.combine(grads, weights[groups.first : groups.first + len(groups)].contiguous(), groups, backend=backend),
        found.gradient,
        found.weights,
        found.similarity.nan_to_num(7.0),
        found.corrected,
        found.gram,
        ema,
    ]


def same_bits(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [2, 7, 16, 21, 40])
def test_threads_and_repetition(native, T, dtype):
    grads = task_gradients(T, MANY, dtype=dtype)
    once = everything(grads, MANY, native, threads=1)
    for threads in (1, 2, 3, 8, 2):
        assert same_bits(once, everything(grads, MANY, native, threads=threads))


@pytest.mark.parametrize("T", [7, 40])
def test_fewer_threads_than_asked_for(T, tmp_path):
    """One thread is given where three are asked for: it does the others' shares too."""
    if "cpu" not in gvk.available_backends():
        pytest.skip("the native module is not built")
    call = "import sys, torch, test_bits as t; grads = t.task_gradients(int(sys.argv[1]), t.MANY)"
    save = "torch.save([*t.everything(grads, t.MANY, 'cpu', 3), t.gvk.cross_gram(grads, grads, t.MANY)], sys.argv[2])"
    path = os.pathsep.join([*sys.path, os.path.dirname(__file__)])
    environment = {**os.environ, "OMP_THREAD_LIMIT": "1", "PYTHONPATH": path}
    command = [sys.executable, "-c", f"{call}; {save}", str(T), str(tmp_path / "found")]
    subprocess.run(command, env=environment, check=True)
    grads = task_gradients(T, MANY)
    expected = [*everything(grads, MANY, "cpu", 3), gvk.cross_gram(grads, grads, MANY)]
    assert same_bits(torch.load(tmp_path / "found"), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T", [5, 18])
@pytest.mark.parametrize("align", [1, 64])
def test_a_slab_gives_what_the_whole_buffer_gives(native, T, dtype, align):
    groups = gvk.ParameterGroups.from_sizes(dict(zip(MANY.names, MANY.sizes)), align=align)
    grads = task_gradients(T, groups, dtype=dtype)
    gram, combined, gradient, *rest = everything(grads, groups, native)
    for start, stop in ((0, 1), (0, 8), (3, 6), (5, 8), (2, 3)):
        slab = groups[start:stop]
        begin = groups.offsets[start]
        copied = grads[:, begin : begin + slab.numel].clone()
        in_place = grads[:, begin : begin + slab.numel]
        for part in (copied, in_place):
            found = everything(part, slab, native)
            assert torch.equal(found[0], gram[start:stop])
            for k, (first, last) in enumerate(slab.bounds.tolist()):
                whole = slice(*groups.bounds[start + k].tolist())
                assert torch.equal(found[1][first:last], combined[whole])
                assert torch.equal(found[2][first:last], gradient[whole])
            assert same_bits(found[3:], [tensor[start:stop] for tensor in rest])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [9, 40])
def test_rows_on_no_alignment_give_the_same_bits(native, T, dtype):
    groups = gvk.ParameterGroups.from_sizes({"a": 3, "b": 16384 + 600, "c": 5000}, align=32)
    plain = everything(task_gradients(T, groups, dtype=dtype), groups, native)
    assert same_bits(plain, everything(task_gradients(T, groups, dtype=dtype, skew=5), groups, native))


def test_another_seed_or_step_gives_another_result(native):
    grads = task_gradients(7, MANY)
    found = {
        (seed, step): gvk.vaccinate(grads, MANY, None, target=0.3, seed=seed, step=step, backend=native).gradient
        for seed in (0, 1)
        for step in (0, 1)
    }
    assert len({tuple(gradient[:700].tolist()) for gradient in found.values()}) == 4


def test_pieces_are_equal_to_the_whole_call(native):
    """vaccinate is gram, coefficients and combine: combining its weights gives its gradient, bit for bit."""
    grads = task_gradients(7, MANY)
    found = gvk.vaccinate(grads, MANY, None, target=0.3, backend=native)
    assert torch.equal(gvk.combine(grads, found.weights, MANY, backend=native), found.gradient)


def test_flushing_of_subnormals_changes_nothing(native):
    """torch.set_flush_denormal acts on the calling thread only: the sums may not depend on who does them."""
    groups = gvk.ParameterGroups.from_sizes({"a": 1 << 20})
    grads = torch.full((2, 1 << 20), 1e-39)
    weights = torch.full((1, 2), 1e10, dtype=torch.float64)
    usual = gvk.combine(grads, weights, groups, backend=native)
    assert bool((usual > 0).all())
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush subnormals")
    try:
        flushing = [gvk.combine(grads, weights, groups, backend=native) for _ in range(3)]
    finally:
        torch.set_flush_denormal(False)
    assert all(torch.equal(usual, found) for found in flushing)
