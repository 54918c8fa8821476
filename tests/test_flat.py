"""Flat vectors: products, norms and sums by group against float64, and the way from parameters and back."""

import pytest
import torch
from cases import LAYOUTS, task_gradients
from torch import nn

import gradvac_kernels as gvk
from gradvac_kernels import flat

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
GROUPS = gvk.ParameterGroups.from_sizes({"a": 5, "b": 0, "c": 70_000, "d": 31}, align=16)


def vectors(groups, dtype=torch.float32):
    """Two vectors that partly agree, NaN in the padding."""
    return task_gradients(2, groups, dtype=dtype).unbind()


def by_group(groups, x):
    return [x[begin:end].double() for begin, end in groups.bounds.tolist()]


def network(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Conv2d(2, 3, 2), nn.Linear(4, 2, bias=False))
    model[1].to(memory_format=torch.channels_last)
    model[2].weight.data = torch.randn(4, 2).T  # dense, but not in the order of its dimensions
    return model.to(dtype)


# ---------------------------------------------------------------------------------------------- dot, norm and axpy


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [*LAYOUTS.values(), GROUPS], ids=[*LAYOUTS, "blocks"])
def test_dot_and_norm(groups, dtype):
    x, y = vectors(groups, dtype)
    found, length = flat.dot(x, y, groups), flat.norm(x, groups)
    assert found.shape == length.shape == (len(groups),)
    assert found.dtype == length.dtype == torch.float64
    truth = torch.stack([(a * b).sum() for a, b in zip(by_group(groups, x), by_group(groups, y))])
    size = torch.stack([(a * b).abs().sum() for a, b in zip(by_group(groups, x), by_group(groups, y))])
    # two float64 sums of up to 70,000 products in different orders: sqrt(70,000) 2^-53 each for random roundings; of
    # 16 bits, products are summed in float32 over short chains, within 1e-7 |x| |y|
    lengths = torch.stack([a.norm() * b.norm() for a, b in zip(by_group(groups, x), by_group(groups, y))])
    bound = 1e-7 * lengths if dtype.itemsize == 2 else 6e-14 * size
    assert bool(((found - truth).abs() <= bound).all())
    # half of what the Gram matrices promise, 1e-7, for the root
    truth = torch.stack([a.norm() for a in by_group(groups, x)])
    assert bool(((length - truth).abs() <= 5e-8 * truth).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_axpy(dtype):
    x, y = vectors(GROUPS, dtype)
    alpha = torch.tensor([0.5, 3.0, -1.7, 0.0], dtype=torch.float64)
    padding = torch.ones(GROUPS.numel, dtype=torch.bool)
    for begin, end in GROUPS.bounds.tolist():
        padding[begin:end] = False
    for factors in (alpha, alpha.float(), 2, -0.3):
        written = torch.where(padding, 9.0, y)
        assert flat.axpy(factors, x, written, GROUPS) is written
        each = factors.double() if isinstance(factors, torch.Tensor) else [factors] * 4
        for k, (begin, end) in enumerate(GROUPS.bounds.tolist()):  # the same operations: the same bits
            want = y[begin:end].double() + each[k] * x[begin:end].double()
            assert torch.equal(written[begin:end], want.to(dtype))
        assert bool((written[padding] == 9.0).all())


def test_axpy_rounds_once():
    groups = gvk.ParameterGroups.from_sizes({"a": 1})
    x, y = torch.tensor([1.0 + 2.0**-6], dtype=torch.bfloat16), torch.tensor([-1.0 - 2.0**-5], dtype=torch.bfloat16)
    flat.axpy(1.0 + 2.0**-6, x, y, groups)
    assert y.item() == 2.0**-12  # the product 1 + 2^-5 + 2^-12, rounded to bfloat16 by itself, would leave 0


def test_axpy_takes_different_types():
    x, y = vectors(GROUPS, torch.bfloat16)[0], vectors(GROUPS, torch.float64)[1]
    want = y + 0.1 * x.double()
    flat.axpy(0.1, x, y, GROUPS)
    assert torch.equal(y[:5], want[:5])


X = torch.ones(GROUPS.numel)


def test_alpha_may_lie_in_y():
    groups = gvk.ParameterGroups.from_sizes({"a": 2, "b": 3})
    y = torch.arange(1.0, 6.0, dtype=torch.float64)
    flat.axpy(y[:2], torch.ones(5, dtype=torch.float64), y, groups)
    assert y.tolist() == [2, 3, 5, 6, 7]


BAD = {
    "x a list": (lambda: flat.dot([1.0], X, GROUPS), TypeError, "x: expected a tensor, got list"),
    "x too short": (lambda: flat.norm(X[1:], GROUPS), ValueError, r"x: expected shape \[\d+\], got"),
    "x of ints": (lambda: flat.norm(X.int(), GROUPS), TypeError, "x: expected dtype float32 or"),
    "x strided": (lambda: flat.norm(X.repeat(2)[::2], GROUPS), ValueError, "x: expected a contiguous .* stride 2"),
    "no groups": (lambda: flat.dot(X, X, [3]), TypeError, "groups: expected ParameterGroups, got list"),
    "y a matrix": (lambda: flat.dot(X, X[None], GROUPS), ValueError, "y: expected shape"),
    "y of another type": (lambda: flat.dot(X, X.double(), GROUPS), TypeError, "y: expected dtype torch.float32"),
    "y elsewhere": (lambda: flat.dot(X, X.to("meta"), GROUPS), ValueError, "y: expected device cpu, got meta"),
    "alpha a str": (lambda: flat.axpy("1", X, X.clone(), GROUPS), TypeError, "alpha: expected a number or a tensor"),
    "alpha a bool": (lambda: flat.axpy(True, X, X.clone(), GROUPS), TypeError, "alpha: expected a number or a tensor"),
    "alpha too long": (lambda: flat.axpy(torch.ones(5), X, X.clone(), GROUPS), ValueError, r"alpha: .* \[4\], got \[5"),
    "y overlaps": (lambda: flat.axpy(1.0, X, X, GROUPS), ValueError, "y: expected memory of its own, .* overlaps x"),
    "y a leaf": (
        lambda: flat.axpy(1.0, X, X.clone().requires_grad_(), GROUPS),
        ValueError,
        "y: expected a tensor to write to",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_vectors(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()
    assert bool((X == 1).all())


# ------------------------------------------------------------------------------------------- to and from parameters


@pytest.mark.parametrize("align", [1, 8])
def test_parameters_come_back(align):
    model = network()
    groups = gvk.ParameterGroups.from_model(model, align=align)
    found = flat.parameters(model, groups)
    assert [id(tensor) for tensor in found] == [id(tensor) for tensor in model.parameters()]
    assert flat.parameters(found, groups) == found
    columns = flat.flatten(found, groups)
    for view, parameter in zip(flat.views(columns, groups), found):
        assert torch.equal(view, parameter)
        assert view.stride() == parameter.stride()
        assert view.untyped_storage().data_ptr() == columns.untyped_storage().data_ptr()
    assert columns.square().sum() == pytest.approx(float(flat.norm(columns, groups).square().sum()), rel=1e-6)


def test_flatten_writes_where_it_is_told():
    model = network(torch.bfloat16)
    groups = gvk.ParameterGroups.from_model(model, align=8)
    tensors = [None, *flat.parameters(model, groups)[1:]]
    out = torch.full((groups.numel,), 7.0, dtype=torch.float64)
    assert flat.flatten(tensors, groups, out=out) is out
    fresh = flat.flatten(tensors, groups, dtype=torch.float64)
    inside = torch.zeros(groups.numel, dtype=torch.bool)
    for begin, end in groups.bounds.tolist():
        inside[begin:end] = True
    assert torch.equal(fresh, torch.where(inside, out, 0.0))
    assert bool((out[~inside] == 7).all())
    assert not fresh[:12].any()  # the first parameter, None
    assert flat.flatten(tensors, groups).dtype == torch.bfloat16


def test_autograd_goes_through_views():
    model = network()
    groups = gvk.ParameterGroups.from_model(model)
    columns = flat.flatten(flat.parameters(model, groups), groups).requires_grad_()
    sum(((index + 1) * view).sum() for index, view in enumerate(flat.views(columns, groups))).backward()
    for index, view in enumerate(flat.views(columns.grad, groups)):
        assert bool((view == index + 1).all())


MODEL = network()
LAYOUT = gvk.ParameterGroups.from_model(MODEL)
OUT = torch.full((LAYOUT.numel,), 7.0)
BAD_PARAMETERS = {
    "no slots": (lambda: flat.parameters(MODEL, GROUPS), ValueError, "groups: expected groups of a model's parameters"),
    "no model": (lambda: flat.parameters(3, LAYOUT), TypeError, "model: expected a sequence of tensors, got int"),
    "another model": (lambda: flat.parameters(nn.Linear(3, 4), LAYOUT), ValueError, "trainable parameter '0.weight'"),
    "too few": (lambda: flat.parameters([MODEL[0].weight], LAYOUT), ValueError, "model: expected 5 tensors, got 1"),
    "another order": (
        lambda: flat.parameters(list(MODEL.parameters())[::-1], LAYOUT),
        ValueError,
        r"model: expected '0.weight' of shape \[4, 3\]",
    ),
    "another memory order": (
        lambda: flat.parameters([torch.empty(slot.shape) for slot in LAYOUT.parameters], LAYOUT),
        ValueError,
        r"model: expected '1.weight' of .* strides \(8, 1, 4, 2\), got .* strides \(8, 4, 2, 1\)",
    ),
    "a number": (lambda: flat.flatten([1.0], LAYOUT), TypeError, r"tensors\[0\]: expected a tensor, got float"),
    "too many": (lambda: flat.flatten([None] * 6, LAYOUT), ValueError, "tensors: expected 5 tensors, got 6"),
    "nothing": (lambda: flat.flatten([None] * 5, LAYOUT), ValueError, "tensors: expected at least one tensor"),
    "another shape": (
        lambda: flat.flatten([None, torch.ones(3), None, None, None], LAYOUT),
        ValueError,
        r"tensors\[1\]: expected shape \[4\], got \[3\]",
    ),
    "elsewhere": (
        lambda: flat.flatten([None, torch.ones(4, device="meta"), None, None, None], LAYOUT, out=OUT),
        ValueError,
        r"tensors\[1\]: expected device cpu, got meta",
    ),
    "a small out": (
        lambda: flat.flatten([None] * 5, LAYOUT, out=torch.ones(3)),
        ValueError,
        r"out: expected shape \[\d+\], got \[3\]",
    ),
    "sparse": (
        lambda: flat.flatten([torch.ones(4, 3), torch.ones(4).to_sparse(), None, None, None], LAYOUT, out=OUT),
        ValueError,
        r"tensors\[1\]: expected layout torch.strided, got torch.sparse_coo",
    ),
    "complex": (
        lambda: flat.flatten([torch.ones(4, 3), torch.ones(4) * 1j, None, None, None], LAYOUT, out=OUT),
        TypeError,
        r"tensors\[1\]: expected real numbers, got torch.complex64",
    ),
    "views of no parameters": (lambda: flat.views(X, GROUPS), ValueError, "groups: expected groups of a model's"),
    "ints": (lambda: flat.flatten([None] * 5, LAYOUT, out=torch.ones(LAYOUT.numel).int()), TypeError, "out: .* dtype"),
    "a view of ints": (
        lambda: flat.views(torch.ones(LAYOUT.numel).int(), LAYOUT),
        TypeError,
        "columns: expected dtype",
    ),
}


@pytest.mark.parametrize("case", BAD_PARAMETERS)
def test_bad_parameters(case):
    call, error, message = BAD_PARAMETERS[case]
    with pytest.raises(error, match=message):
        call()
    assert bool((OUT == 7).all())
    assert bool((OUT == 7).all())
