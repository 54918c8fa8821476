"""Gram matrices: accuracy and structure."""

import pytest
import torch
from cases import LAYOUTS, task_gradients
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gradvac_kernels as gvk

pytestmark = pytest.mark.no_vaccinate

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# What the kernels promise; products are exact in float64, and so is the truth but for 2^-53 a sum. Those of float64
# gradients are rounded too: a random walk of 2^-53 a step ends at 1.6e-14 after 20,000 columns.
BOUND = {torch.float32: 1e-7, torch.bfloat16: 1e-7, torch.float16: 1e-7, torch.float64: 2e-14}


def exact(grads, groups):
    """[K, T, T] by float64 matrix products over few columns at a time, their sums added up pairwise."""

    def of_group(columns):
        blocks = [block @ block.T for block in columns.double().split(1024, dim=1)]
        return torch.stack(blocks, dim=2).sum(2) if blocks else torch.zeros(len(grads), len(grads), dtype=torch.float64)

    return torch.stack([of_group(grads[:, begin:end]) for begin, end in groups.bounds.tolist()])


def error(found, grads, groups):
    """Largest |G - exact| / (|g_i| |g_j|) over pairs of rows that are not zero."""
    truth = exact(grads, groups)
    norms = truth.diagonal(dim1=1, dim2=2).sqrt()
    scale = norms[:, :, None] * norms[:, None, :]
    assert torch.equal(found[scale == 0], torch.zeros_like(found[scale == 0]))
    return float(torch.where(scale > 0, (found - truth).abs() / scale, 0.0).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("T", [1, 2, 3, 4, 5, 7, 8, 11, 16, 17, 18, 19, 20, 33])
def test_accuracy(backend, T, layout, dtype):
    if backend == "triton" and (layout == "whole" or (layout == "long" and T not in (8, 17, 33))):
        pytest.skip("seconds in the interpreter, where each number of rows is seen in short groups")
    groups = LAYOUTS[layout]
    grads = task_gradients(T, groups, dtype=dtype)
    found = gvk.gram(grads, groups, backend=backend)
    assert found.shape == (len(groups), T, T)
    assert found.dtype == torch.float64
    assert error(found, grads, groups) <= BOUND[dtype]
    assert torch.equal(found, found.mT)


@pytest.mark.parametrize("T", [100, 128, 150])
@pytest.mark.parametrize("dtype", DTYPES)
def test_accuracy_with_many_tasks(backend, T, dtype):
    if backend == "triton" and T == 128:
        pytest.skip("seconds in the interpreter, for what 100 and 150 tasks show")
    groups = gvk.ParameterGroups.from_sizes({"a": 5000, "b": 37})
    grads = task_gradients(T, groups, dtype=dtype)
    assert error(gvk.gram(grads, groups, backend=backend), grads, groups) <= BOUND[dtype]


@pytest.mark.parametrize("T", [2, 8, 24])
@pytest.mark.parametrize("values", ["uniform", "heavy tails"])
def test_accuracy_on_other_distributions(backend, T, values):
    groups = gvk.ParameterGroups.from_sizes({"a": 50_000})
    grads = torch.rand(T, 50_000, generator=torch.Generator().manual_seed(T))
    if values == "heavy tails":
        grads = torch.exp(8 * (grads - 0.5)) * torch.sign(grads - 0.3)
    assert error(gvk.gram(grads, groups, backend=backend), grads, groups) <= 1e-7


@pytest.mark.parametrize(
    ("T", "dtype", "bound"),
    [
        (2, torch.float32, 1e-13),
        (8, torch.float32, 1e-13),
        (9, torch.float32, 7e-7),
        (24, torch.float32, 7e-7),
        (2, torch.float16, 1e-6),
        (24, torch.float16, 7e-7),
    ],
)
def test_accuracy_on_equal_entries(native, T, dtype, bound):
    """The worst case of a chain of additions: all roundings alike. Up to 8 rows of 32 bits the chains are in float64.
    Else the last half of a chain of 16 float32 additions may each be off by 2^-24 of half the sum, 8 * 2^-25 = 2.4e-7,
    the half before by a quarter of that, and so on: 3.2e-7. Adding up 8 chains, on the narrowest vectors, makes
    4.4 * 2^-24 more (4/8 + ... + 8/8 of the sum are off), and 2 additions across the lanes 2 * 2^-24: 7e-7. Wider
    vectors have fewer chains and up to 4 additions across: less. Few rows of 16 bits are read in tiles twice as long:
    16 chains, 8 * 2^-24, 1e-6."""
    groups = gvk.ParameterGroups.from_sizes({"a": 100_000})
    for value in (0.1, 0.37, 1 / 3):
        grads = torch.full((T, 100_000), value, dtype=dtype)
        truth = 100_000 * torch.tensor(value, dtype=dtype).double() ** 2
        assert float((gvk.gram(grads, groups, backend=native) / truth - 1).abs().max()) <= bound


@pytest.mark.parametrize("skew", [1, 3, 7])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [6, 34])
def test_rows_on_any_alignment(native, T, dtype, skew):
    """The same bits wherever the rows lie: many rows that begin amid a cache line are packed first."""
    groups = gvk.ParameterGroups.from_sizes({"a": 3, "b": 16384 + 600, "c": 20000}, align=32)
    plain = task_gradients(T, groups, dtype=dtype)
    skewed = task_gradients(T, groups, dtype=dtype, skew=skew)
    assert torch.equal(gvk.gram(plain, groups, backend=native), gvk.gram(skewed, groups, backend=native))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [3, 9])
def test_any_address(native, T, dtype):
    """The rows begin amid an element, as memory from elsewhere may."""
    columns = 5000  # no small group; some are left over after whole vectors
    groups = gvk.ParameterGroups.from_sizes({"a": columns})
    grads = task_gradients(T, groups, dtype=dtype)
    memory = bytearray(T * columns * dtype.itemsize + 1)
    rows = torch.frombuffer(memory, dtype=dtype, offset=1).view(T, columns).copy_(grads)
    assert rows.data_ptr() % 2 == 1
    assert torch.equal(gvk.gram(rows, groups, backend=native), gvk.gram(grads, groups, backend=native))
    assert torch.equal(
        gvk.cross_gram(rows, rows, groups, backend=native), gvk.cross_gram(grads, grads, groups, backend=native)
    )


def test_expanded_rows(backend):
    groups = LAYOUTS["ragged"]
    row = task_gradients(1, groups)
    found = gvk.gram(row.expand(5, -1), groups, backend=backend)
    assert torch.allclose(found, found[:, :1, :1].expand_as(found), rtol=1e-14)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    T=st.integers(1, 24),
    sizes=st.lists(st.integers(0, 700), min_size=1, max_size=4),
    align=st.sampled_from([1, 8]),
    seed=st.integers(0, 2**31),
)
def test_properties(backend, T, sizes, align, seed):
    groups = gvk.ParameterGroups.from_sizes({str(k): size for k, size in enumerate(sizes)}, align=align)
    grads = torch.randn(T, groups.numel, generator=torch.Generator().manual_seed(seed))
    G = gvk.gram(grads, groups, backend=backend)
    assert torch.equal(G, G.mT)
    # positive semidefinite: eigenvalues are off by at most |error| <= 1e-7 trace
    trace = G.diagonal(dim1=1, dim2=2).sum(1)
    assert bool((torch.linalg.eigvalsh(G).min(1).values >= -1e-7 * trace - 1e-300).all())
    # equivariant to a permutation of the tasks
    shuffled = torch.randperm(T, generator=torch.Generator().manual_seed(seed))
    permuted = gvk.gram(grads[shuffled], groups, backend=backend)
    norms = G.diagonal(dim1=1, dim2=2).sqrt()
    tolerance = 2e-7 * norms[:, :, None] * norms[:, None, :]
    assert bool(((permuted - G[:, shuffled][:, :, shuffled]).abs() <= tolerance[:, shuffled][:, :, shuffled]).all())
    # additive over columns: a coarser granularity is the sum of the finer one
    whole = gvk.ParameterGroups.from_sizes({"all": groups.numel})
    masked = torch.zeros_like(grads)
    for begin, end in groups.bounds.tolist():
        masked[:, begin:end] = grads[:, begin:end]
    total = gvk.gram(masked, whole, backend=backend)[0]
    lengths = total.diagonal().sqrt()
    assert bool(((G.sum(0) - total).abs() <= 2e-7 * lengths[:, None] * lengths + 1e-300).all())
    # scaled by a power of two: not a bit changes
    assert torch.equal(gvk.gram(grads * 2.0**20, groups, backend=backend), G * 2.0**40)


def test_float16_does_not_overflow(backend):
    groups = gvk.ParameterGroups.from_sizes({"a": 4000})
    grads = torch.full((3, 4000), 300.0, dtype=torch.float16)  # a product alone is past 65504
    expected = torch.full((1, 3, 3), 4000 * 300.0**2, dtype=torch.float64)
    assert torch.allclose(gvk.gram(grads, groups, backend=backend), expected, rtol=1e-7)
    assert torch.allclose(
        gvk.gram(grads.expand(3, -1).repeat(7, 1), groups, backend=backend), expected[0, 0, 0], rtol=1e-7
    )


def test_ten_million_columns():
    """The bound that is promised, at the size that is promised, on the fastest backend there is."""
    groups = gvk.ParameterGroups.from_sizes({"a": 10_000_000})
    grads = torch.randn(2, groups.numel, generator=torch.Generator().manual_seed(0)) + 0.1
    assert error(gvk.gram(grads, groups), grads, groups) <= 1e-7
