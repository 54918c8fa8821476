"""Cross Gram matrices: dot products between two buffers, held to float64 and to the Gram."""

import math

import pytest
import torch
from cases import LAYOUTS, task_gradients
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gradvac_kernels as gvk

pytestmark = pytest.mark.no_vaccinate

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# As in test_gram.py. Two buffers of one model are held against each other, so are two ways to the same numbers.
BOUND = {torch.float32: 1e-7, torch.bfloat16: 1e-7, torch.float16: 1e-7, torch.float64: 2e-14}
# one of some pieces, some that are short, an empty one; each begins with a cache line, as its rows do
GROUPS = gvk.ParameterGroups.from_sizes({"a": 3, "b": 6001, "c": 0, "d": 700, "e": 4100, "f": 333}, align=32)


def two_batches(T, U, groups, dtype=torch.float32, skews=(0, 0)):
    """[T, P] and [U, P] that share a direction; padding is NaN."""
    a, b = (task_gradients(n, groups, step=i, dtype=dtype, skew=skews[i]) for i, n in enumerate((T, U)))
    return a, b


def norms(grads, groups):
    return torch.stack([grads[:, begin:end].double().norm(dim=1) for begin, end in groups.bounds.tolist()])


def exact(a, b, groups):
    """[K, T, U] by float64 matrix products over few columns at a time, their sums added up pairwise."""

    def of_group(begin, end):
        blocks = [x @ y.T for x, y in zip(*(g[:, begin:end].double().split(1024, dim=1) for g in (a, b)))]
        return torch.stack(blocks, dim=2).sum(2) if begin < end else torch.zeros(len(a), len(b), dtype=torch.float64)

    return torch.stack([of_group(begin, end) for begin, end in groups.bounds.tolist()])


def close(found, want, a, b, groups, bound):
    scale = norms(a, groups)[:, :, None] * norms(b, groups)[:, None, :]
    return found.shape == want.shape and bool(((found - want).abs() <= bound * scale).all())


def skip_in_the_interpreter(backend):
    if backend == "triton":
        pytest.skip("seconds in the interpreter, for what others show")


def swapped(a, b, groups, backend):
    return gvk.cross_gram(b, a, groups, backend=backend).mT


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("T", "U"), [(1, 1), (2, 7), (8, 8), (16, 17), (33, 20)])
def test_accuracy(backend, T, U, layout, dtype):
    groups = LAYOUTS[layout]
    a, b = two_batches(T, U, groups, dtype)
    if layout == "whole" or (layout == "long" and (T not in (8, 33) or dtype in (torch.float16, torch.float64))):
        skip_in_the_interpreter(backend)
    found = gvk.cross_gram(a, b, groups, backend=backend)
    assert found.dtype == torch.float64
    assert close(found, exact(a, b, groups), a, b, groups, BOUND[dtype])


@pytest.mark.parametrize(("T", "U"), [(1, 128), (128, 100), (70, 3)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_accuracy_with_many_tasks(backend, T, U, dtype):
    if dtype in (torch.float16, torch.float64) or T == 70:
        skip_in_the_interpreter(backend)
    groups = gvk.ParameterGroups.from_sizes({"a": 5000, "b": 37, "c": 0})
    a, b = two_batches(T, U, groups, dtype)
    assert close(gvk.cross_gram(a, b, groups, backend=backend), exact(a, b, groups), a, b, groups, BOUND[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "U"), [(3, 5), (18, 2), (3, 34)])
def test_rows_on_any_alignment_and_distance(backend, T, U, dtype):
    """Each buffer has its own; the bits are the same wherever the rows lie."""
    if dtype in (torch.float16, torch.float64):
        skip_in_the_interpreter(backend)
    groups = GROUPS
    plain = gvk.cross_gram(*two_batches(T, U, groups, dtype), groups, backend=backend)
    for skews in ((3, 0), (0, 1), (5, 2)):
        a, b = two_batches(T, U, groups, dtype, skews)
        found = gvk.cross_gram(a, b, groups, backend=backend)
        assert close(found, plain, a, b, groups, BOUND[dtype])
        assert backend == "reference" or torch.equal(found, plain)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [1, 6, 8, 17])
def test_of_a_buffer_and_itself_it_is_the_gram(backend, T, dtype):
    groups = GROUPS
    a = task_gradients(T, groups, dtype=dtype)
    found, G = gvk.cross_gram(a, a, groups, backend=backend), gvk.gram(a, groups, backend=backend)
    assert close(found, G, a, a, groups, 2 * BOUND[dtype])
    assert backend != "cpu" or torch.equal(found, G)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "U"), [(4, 4), (7, 19)])
def test_swapped_buffers_give_the_transpose(backend, T, U, dtype):
    groups = GROUPS
    a, b = two_batches(T, U, groups, dtype)
    found = gvk.cross_gram(a, b, groups, backend=backend)
    assert close(swapped(a, b, groups, backend), found, a, b, groups, 2 * BOUND[dtype])
    assert backend != "cpu" or torch.equal(swapped(a, b, groups, backend), found)


@pytest.mark.parametrize("T", [5, 20])
def test_buffers_that_overlap(backend, T):
    """They are only read: rows of one buffer, in any order and more than once."""
    groups = GROUPS
    grads = task_gradients(T, groups)
    before = grads.clone()
    for a, b in ((grads[1:], grads[:-2]), (grads[::2], grads), (grads[:1].expand(T, -1), grads)):
        found = gvk.cross_gram(a, b, groups, backend=backend)
        assert close(found, exact(a, b, groups), a, b, groups, BOUND[torch.float32])
    assert torch.equal(grads.nan_to_num(7.0), before.nan_to_num(7.0))


@pytest.mark.parametrize(("T", "U"), [(0, 3), (3, 0), (0, 0)])
def test_no_rows(backend, T, U):
    groups = LAYOUTS["ragged"]
    a, b = (torch.zeros(n, groups.numel) for n in (T, U))
    assert gvk.cross_gram(a, b, groups, backend=backend).shape == (len(groups), T, U)


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "U"), [(3, 5), (18, 9)])
def test_a_row_that_is_not_finite_is_alone(backend, T, U, dtype, value):
    """One of each buffer, in a short group and in a long one."""
    if dtype in (torch.float16, torch.float64) or math.isnan(value):
        skip_in_the_interpreter(backend)
    groups = GROUPS
    clean = two_batches(T, U, groups, dtype)
    a, b = (grads.clone() for grads in clean)
    for k in (1, 3):
        a[1, groups.offsets[k] + 17] = value
        b[2, groups.offsets[k] + 18] = value
    found, want = (gvk.cross_gram(*pair, groups, backend=backend) for pair in ((a, b), clean))
    hit = torch.zeros_like(found, dtype=torch.bool)
    hit[[1, 3], 1] = True
    hit[1, :, 2] = hit[3, :, 2] = True
    assert torch.equal(found.isfinite(), ~hit)
    assert close(found.where(~hit, want), want, *clean, groups, 0.0 if backend != "reference" else BOUND[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "U"), [(5, 3), (18, 33)])
def test_a_slab_gives_what_the_whole_buffers_give(backend, T, U, dtype):
    if dtype in (torch.float16, torch.float64):
        skip_in_the_interpreter(backend)
    groups = GROUPS
    a, b = two_batches(T, U, groups, dtype)
    whole = gvk.cross_gram(a, b, groups, backend=backend)
    for start, stop in ((1, 3), (4, 6)):
        columns = slice(groups.offsets[start], groups.offsets[start] + groups[start:stop].numel)
        for x, y in ((a[:, columns], b[:, columns]), (a[:, columns].clone(), b[:, columns])):
            found = gvk.cross_gram(x, y, groups[start:stop], backend=backend)
            assert close(found, whole[start:stop], x, y, groups[start:stop], BOUND[dtype])
            assert backend == "reference" or torch.equal(found, whole[start:stop])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "U"), [(2, 2), (16, 5), (21, 33)])
def test_the_same_bits_for_any_number_of_threads(native, T, U, dtype):
    groups = gvk.ParameterGroups.from_sizes({"a": 40_000, "b": 0, "c": 1, "d": 700, "e": 16_384, "f": 33_000})
    a, b = two_batches(T, U, groups, dtype)
    found = []
    for threads in (1, 2, 3, 8, 2):
        torch.set_num_threads(threads)
        found.append(gvk.cross_gram(a, b, groups, backend=native))
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_flushing_of_subnormals_changes_nothing(native):
    groups = gvk.ParameterGroups.from_sizes({"a": 1 << 18})
    a, b = torch.full((3, 1 << 18), 1e-39), torch.ones(2, 1 << 18)
    usual = gvk.cross_gram(a, b, groups, backend=native)
    assert bool((usual > 0).all())
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush subnormals")
    try:
        flushing = gvk.cross_gram(a, b, groups, backend=native)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(usual, flushing)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    T=st.integers(1, 20),
    U=st.integers(1, 20),
    sizes=st.lists(st.integers(0, 700), min_size=1, max_size=4),
    seed=st.integers(0, 2**31),
)
def test_properties(backend, T, U, sizes, seed):
    groups = gvk.ParameterGroups.from_sizes({str(k): size for k, size in enumerate(sizes)})
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(n, groups.numel, generator=generator) for n in (T, U))
    C = gvk.cross_gram(a, b, groups, backend=backend)
    # additive over columns: a coarser granularity is the sum of the finer one
    whole = gvk.ParameterGroups.from_sizes({"all": groups.numel})
    assert close(gvk.cross_gram(a, b, whole, backend=backend), C.sum(0, keepdim=True), a, b, whole, 2e-7)
    # bilinear: rows in another order, and rows that are added up
    shuffled = torch.randperm(T, generator=generator)
    assert close(gvk.cross_gram(a[shuffled], b, groups, backend=backend), C[:, shuffled], a[shuffled], b, groups, 2e-7)
    assert torch.equal(gvk.cross_gram(a * 2.0**20, b, groups, backend=backend), C * 2.0**20)
    # the off-diagonal block of the Gram of both
    G = gvk.gram(torch.cat([a, b]), groups, backend=backend)
    assert close(C, G[:, :T, T:], a, b, groups, 2e-7)


def test_float16_does_not_overflow(backend):
    groups = gvk.ParameterGroups.from_sizes({"a": 4000, "b": 5000})
    grads = torch.full((20, 9000), 300.0, dtype=torch.float16)  # a product alone is past 65504
    for rows in (3, 20):
        found = gvk.cross_gram(grads[:rows], grads, groups, backend=backend)
        want = torch.tensor([4000.0, 5000.0], dtype=torch.float64)[:, None, None] * 300.0**2
        assert torch.allclose(found, want.expand_as(found), rtol=1e-7)


def test_two_batches_of_a_task_estimate_its_mean_gradient():
    """What it is for: the squared norm of one batch's gradient holds the noise, the product of two does not."""
    groups = gvk.ParameterGroups.from_sizes({"a": 20_000})
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(4, 20_000, generator=generator)
    a, b = (mean + 3 * torch.randn(4, 20_000, generator=generator) for _ in range(2))
    estimate = gvk.cross_gram(a, b, groups)[0].diagonal() / 20_000
    # of 20,000 products, each of variance (1 + 9)^2 + 1 or so: 0.07 for one standard deviation
    assert torch.allclose(estimate, torch.ones(4, dtype=torch.float64), atol=0.35)
    assert bool((gvk.gram(a, groups)[0].diagonal() / 20_000 > 9).all())
