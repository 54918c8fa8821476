"""Combine: weighted sums, in every pair of types."""

import pytest
import torch
from cases import LAYOUTS, inside, rounding, task_gradients

import gradvac_kernels as gvk

pytestmark = pytest.mark.no_vaccinate

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def exact(grads, weights, groups):
    out = torch.zeros(groups.numel, dtype=torch.float64)
    for k, (begin, end) in enumerate(groups.bounds.tolist()):
        out[begin:end] = weights[k] @ grads[:, begin:end].double()
    return out


def magnitude(grads, weights, groups):
    """[P], sum_j |w_j g_j|: what rounding errors are relative to."""
    return exact(torch.nan_to_num(grads).abs(), weights.abs(), groups)


def random_weights(groups, T):
    return torch.randn(len(groups), T, generator=torch.Generator().manual_seed(T), dtype=torch.float64)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [1, 2, 5, 8, 9, 16, 21])
def test_sums(backend, T, dtype, layout):
    groups = LAYOUTS[layout]
    grads, weights = task_gradients(T, groups, dtype=dtype), random_weights(groups, T)
    out = gvk.combine(grads, weights, groups, backend=backend)
    assert out.dtype == dtype
    # summed in float64 (T roundings of 2^-53 of the magnitude), then rounded once to the type of the result
    tolerance = (
        magnitude(grads, weights, groups) * T * 2.0**-53
        + exact(grads, weights, groups).abs() * rounding(backend, dtype) * 1.01
    )
    tolerance += torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    difference = (out.double() - exact(grads, weights, groups)).abs()
    assert bool((inside(groups, difference) <= inside(groups, tolerance)).all())


@pytest.mark.parametrize("result", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [4, 21])  # at once, and by sums that wait in memory
def test_any_type_into_any_type(backend, T, dtype, result):
    groups = LAYOUTS["aligned"]
    grads, weights = task_gradients(T, groups, dtype=dtype), random_weights(groups, T)
    out = torch.full((groups.numel,), torch.nan, dtype=result)
    assert gvk.combine(grads, weights, groups, out=out, backend=backend) is out
    want = exact(grads, weights, groups)
    error = (out.double() - want).abs()
    # a sum next to the middle of two values of the type may go either way: half a unit, and a little more
    allowed = (
        want.abs() * rounding(backend, result) * 1.01
        + magnitude(grads, weights, groups) * T * 2.0**-53
        + torch.finfo(result).tiny
    )
    assert bool((inside(groups, error) <= inside(groups, allowed)).all())


def test_only_the_groups_are_written(backend):
    groups = LAYOUTS["aligned"]
    grads = task_gradients(3, groups)  # NaN in the padding
    out = torch.full((groups.numel,), 123.0)
    gvk.combine(grads, torch.ones(len(groups), 3, dtype=torch.float64), groups, out=out, backend=backend)
    owned = torch.zeros(groups.numel, dtype=torch.bool)
    for begin, end in groups.bounds.tolist():
        owned[begin:end] = True
    assert bool((out[~owned] == 123.0).all())
    assert bool(out[owned].isfinite().all())
    fresh = gvk.combine(grads, torch.ones(len(groups), 3, dtype=torch.float64), groups, backend=backend)
    assert bool((fresh[~owned] == 0).all())


def test_nothing_is_written_beside_the_result(backend):
    groups = LAYOUTS["long"]
    for shift in (0, 1, 5):
        wide = torch.full((groups.numel + 64,), 7.0)
        out = wide[shift : shift + groups.numel]
        gvk.combine(task_gradients(3, groups), torch.ones(3, 3, dtype=torch.float64), groups, out=out, backend=backend)
        assert bool((wide[:shift] == 7).all())
        assert bool((wide[shift + groups.numel :] == 7).all())
        assert not bool((out == 7).any())


@pytest.mark.parametrize("result", DTYPES)
def test_any_address(native, result):
    """The result begins and the rows begin amid an element, as memory from elsewhere may."""
    groups = gvk.ParameterGroups.from_sizes({"a": 45})
    grads, weights = task_gradients(9, groups, dtype=result), random_weights(groups, 9)
    size = result.itemsize
    rows = torch.frombuffer(bytearray(9 * 45 * size + 1), dtype=result, offset=1).view(9, 45).copy_(grads)
    out = torch.frombuffer(bytearray(45 * size + 1), dtype=result, offset=1)
    assert rows.data_ptr() % 2 == out.data_ptr() % 2 == 1
    gvk.combine(rows, weights, groups, out=out, backend=native)
    assert torch.equal(out, gvk.combine(grads, weights, groups, backend=native))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_of_either_type(backend, dtype):
    groups = LAYOUTS["ragged"]
    grads = task_gradients(2, groups)
    weights = random_weights(groups, 2).to(dtype)
    found = gvk.combine(grads, weights, groups, backend=backend)
    assert torch.allclose(found.double(), exact(grads, weights.double(), groups), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_non_finite_values_reach_the_result(backend, dtype, value):
    groups = gvk.ParameterGroups.from_sizes({"a": 40})
    grads = torch.ones(3, 40, dtype=dtype)
    grads[1, [0, 17, 39]] = value
    for weight in (1.0, -2.0, 0.0):
        weights = torch.tensor([[1.0, weight, 1.0]], dtype=torch.float64)
        out = gvk.combine(grads, weights, groups, backend=backend)
        assert (~out.isfinite()).nonzero().flatten().tolist() == [0, 17, 39]


@pytest.mark.parametrize("result", DTYPES)
def test_what_cancels_is_zero(backend, result):
    groups = gvk.ParameterGroups.from_sizes({"a": 40, "b": 1})
    grads = task_gradients(1, groups).expand(2, -1).contiguous()
    out = torch.full((groups.numel,), torch.nan, dtype=result)
    gvk.combine(grads, torch.tensor([[1.0, -1.0]] * 2, dtype=torch.float64), groups, out=out, backend=backend)
    assert bool((out == 0).all())


def test_float16_results_overflow_to_infinity_and_keep_subnormals(backend):
    groups = gvk.ParameterGroups.from_sizes({"a": 6})
    values = torch.tensor([[65504.0, 65519.9, 65520.0, 2.0**-24, 2.0**-25, 3.1e-5]])
    out = torch.empty(6, dtype=torch.float16)
    gvk.combine(values, torch.ones(1, 1, dtype=torch.float64), groups, out=out, backend=backend)
    assert torch.equal(out, values[0].to(torch.float16))


@pytest.mark.parametrize("result", [torch.bfloat16, torch.float16])
def test_rounding_is_torch_s(native, result):
    """All bit patterns of the type, and what lies a little beside and half-way between them."""
    base = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(result).float()
    base = base[base.isfinite()]
    values = torch.cat(
        [base, base * (1 + 2.0**-12), base * (1 + 2.0**-9), base * (1 + 2.0**-20), base * (1 - 2.0**-9)]
    )[None]
    groups = gvk.ParameterGroups.from_sizes({"a": values.shape[1]})
    out = torch.empty(values.shape[1], dtype=result)
    gvk.combine(values, torch.ones(1, 1, dtype=torch.float64), groups, out=out, backend=native)
    assert torch.equal(out, values[0].to(result))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_bit_pattern_is_read_as_torch_does(native, dtype):
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)[None]
    groups = gvk.ParameterGroups.from_sizes({"a": values.shape[1]})
    out = torch.empty(values.shape[1], dtype=torch.float64)
    gvk.combine(values, torch.ones(1, 1, dtype=torch.float64), groups, out=out, backend=native)
    assert torch.equal(torch.nan_to_num(out, nan=12345.0), torch.nan_to_num(values[0].double(), nan=12345.0))


def test_large_results_stream_past_the_cache(native):
    """Where the cache cannot hold it all the stores are streaming ones: the same sums, also at odd addresses."""
    P = 16_000_000
    groups = gvk.ParameterGroups.from_sizes({"a": P - 3, "b": 3})
    grads = torch.randn(2, P, generator=torch.Generator().manual_seed(1))
    weights = torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=torch.float64)
    out = torch.full((P + 3,), torch.nan)[3:]
    gvk.combine(grads, weights, groups, out=out, backend=native)
    assert torch.equal(out, exact(grads, weights, groups).float())
