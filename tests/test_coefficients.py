"""Coefficients by themselves: what vaccinate does between its two passes, for Gram matrices from anywhere."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import task_gradients

import gradvac_kernels as gvk

GROUPS = gvk.ParameterGroups.from_sizes({"a": 700, "b": 1, "c": 0, "d": 5000})
BACKENDS = gvk.available_backends()


def targets(num_tasks):
    return torch.full((len(GROUPS), num_tasks, num_tasks), 0.3, dtype=torch.float64)


def equal(a, b):
    return torch.equal(a.nan_to_num(9), b.nan_to_num(9))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_tasks", [1, 2, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gram_coefficients_combine_is_vaccinate(num_tasks, dtype, backend):
    """The same bits, step after step."""
    apart, together = targets(num_tasks), targets(num_tasks)
    for step in range(2):
        grads = task_gradients(num_tasks, GROUPS, step=step, dtype=dtype)
        want = gvk.vaccinate(grads, GROUPS, together, beta=0.2, seed=3, step=step, backend=backend)
        G = gvk.gram(grads, GROUPS, backend=backend)
        found = gvk.coefficients(G, GROUPS, apart, dtype=dtype, beta=0.2, seed=3, step=step, backend=backend)
        assert equal(found.weights, want.weights)
        assert equal(found.similarity, want.similarity)
        assert torch.equal(found.corrected, want.corrected)
        assert torch.equal(apart, together)
        assert torch.equal(gvk.combine(grads, found.weights, GROUPS, backend=backend), want.gradient)


@pytest.mark.parametrize("backend", BACKENDS)
def test_shards_of_one_gradient_add_up(backend):
    """Gram matrices of two halves of the columns, added: the coefficients of the whole."""
    grads = task_gradients(5, gvk.ParameterGroups.from_sizes({"a": 3000}), step=1, dtype=torch.float64)
    whole = gvk.ParameterGroups.from_sizes({"a": 3000})
    half = gvk.ParameterGroups.from_sizes({"a": 1500})
    G = gvk.gram(grads[:, :1500], half, backend=backend) + gvk.gram(grads[:, 1500:], half, backend=backend)
    arguments = {"target": 0.4, "vaccinated": [1, 3], "backend": backend}
    found = gvk.coefficients(G, whole, None, dtype=torch.float64, **arguments)
    want = gvk.reference.vaccinate(grads, whole, None, target=0.4, vaccinated=[1, 3])
    # Sums in float64, of 3000 products: 1e-13, amplified by 1 / (1 - phi^2) of a few
    assert torch.allclose(found.weights, want.weights, rtol=1e-11)
    assert torch.equal(found.corrected, want.corrected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_slab_s_identity_chooses_the_orders(backend):
    grads = task_gradients(6, GROUPS, step=2)
    G = gvk.gram(grads, GROUPS, backend=backend)
    whole = gvk.coefficients(G, GROUPS, None, target=0.4, step=5, backend=backend)
    part = gvk.coefficients(G[2:].contiguous(), GROUPS[2:], None, target=0.4, step=5, backend=backend)
    assert equal(part.similarity, whole.similarity[2:])


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"G": torch.zeros(4, 3, 3)}, TypeError, "G: expected dtype float64"),
        ({"G": torch.zeros(3, 3, 3, dtype=torch.float64)}, ValueError, "G: expected shape"),
        ({"G": torch.zeros(4, 3, 2, dtype=torch.float64)}, ValueError, "G: expected shape"),
        ({"G": torch.zeros(4, 0, 0, dtype=torch.float64)}, ValueError, "G: expected shape"),
        ({"G": torch.zeros(4, 3, 6, dtype=torch.float64)[:, :, ::2]}, ValueError, "G: expected a contiguous"),
        ({"groups": None}, TypeError, "groups: expected ParameterGroups"),
        ({"dtype": torch.int64}, TypeError, "dtype: expected one of"),
        ({"dtype": "float"}, TypeError, "dtype: expected one of"),
        ({"ema": None}, ValueError, "ema: expected exactly one of"),
        ({"ema": targets(2)}, ValueError, "ema: expected shape"),
        ({"beta": 2.0}, ValueError, "beta: expected"),
        ({"task_ids": [0, 0, 1]}, ValueError, "task_ids: expected every task at most once"),
        ({"backend": "none"}, ValueError, "backend: expected one of"),
    ],
)
def test_bad_input_changes_nothing(change, error, match):
    ema = targets(3)
    arguments = {"G": torch.eye(3, dtype=torch.float64).repeat(4, 1, 1), "groups": GROUPS, "ema": ema} | change
    with pytest.raises(error, match=match):
        gvk.coefficients(**arguments)
    assert torch.equal(ema, targets(3))


TRAPS = """
import ctypes, torch
import gradvac_kernels as gvk
torch.manual_seed(0)
grads, groups = torch.randn(9, 300), gvk.ParameterGroups.from_sizes({"a": 300})
grads[3] = 0
G, ema = gvk.gram(grads, groups), torch.zeros(1, 9, 9, dtype=torch.float64)
ctypes.CDLL("libm.so.6").feenableexcept(1 | 4)  # invalid, division by zero
gvk.coefficients(G, groups, ema, backend="cpu")
"""


@pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="glibc's traps on x86")
def test_a_program_that_traps_floating_point_exceptions_is_not_stopped():
    subprocess.run([sys.executable, "-c", TRAPS], check=True, cwd=Path(gvk.__file__).parents[1])
