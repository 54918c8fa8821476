"""Eigenvalues of Hessians, against known ones and against torch.func.hessian; what did not converge says so."""

import copy
import math

import pytest
import torch
from torch import nn

import gradvac_kernels as gvk
from gradvac_kernels import curvature, flat


class Vectors(nn.Module):
    """What a quadratic is a function of."""

    def __init__(self, sizes=(4, 3), dtype=torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.layers = nn.ParameterList([torch.randn(n, generator=generator).to(dtype) for n in sizes])

    def flat(self):
        return torch.cat(list(self.layers))


def quadratic(matrix, model):
    """A loss with the Hessian ``matrix`` everywhere."""
    return lambda: 0.5 * model.flat() @ matrix.to(model.flat().dtype) @ model.flat() + model.flat().sum()


def symmetric(eigenvalues, seed=0):
    """[n, n] float64 with these eigenvalues, in directions that are no axes."""
    n = len(eigenvalues)
    Q, _ = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    return Q @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ Q.T


SPECTRA = {
    "positive": [5.0, 2.0, 1.0, 0.5, 0.25, 0.0, -1.0],
    "a negative dominant one": [2.0, 1.0, 0.5, 0.0, -1.0, -2.0, -7.0],
    "negative definite": [-0.5, -1.0, -2.0, -3.0, -4.0, -5.0, -6.0],
    "negative semidefinite": [0.0, -1.0, -2.0, -3.0, -4.0, -5.0, -6.0],
    "a saddle": [3.0, 1.0, 0.5, 0.0, -0.5, -1.0, -3.0],
    "minus the identity": [-2.0] * 7,
    "a multiple one": [4.0, 4.0, 4.0, 1.0, 0.0, -1.0, -2.0],
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e9])
def test_the_largest_eigenvalue_of_a_quadratic(spectrum, scale):
    H = scale * symmetric(SPECTRA[spectrum])
    model = Vectors()
    groups = gvk.ParameterGroups.from_model(model, "all_matrix")
    found = curvature.top_eigenvalue(quadratic(H, model), model, groups, tolerance=1e-6, max_iterations=300)
    assert bool(found.converged)
    size = scale * max(map(abs, SPECTRA[spectrum]))
    # an eigenvalue lies within the residual, which is at most the tolerance of the largest |H v|
    assert float(found.eigenvalue) == pytest.approx(scale * max(SPECTRA[spectrum]), abs=1e-6 * size)
    assert float(found.residual) <= 1e-6 * size
    v = found.vector
    assert float((H @ v - found.eigenvalue * v).norm()) == pytest.approx(float(found.residual), abs=1e-14 * size)
    assert float(v.norm()) == pytest.approx(1, abs=1e-14)  # float64 rounding
    assert 1 <= int(found.iterations) <= 600
    assert found.eigenvalue.shape == found.converged.shape == found.iterations.shape == found.residual.shape == ()
    assert (found.eigenvalue.dtype, found.residual.dtype) == (torch.float64, torch.float64)
    assert (found.iterations.dtype, found.converged.dtype) == (torch.int64, torch.bool)


@pytest.mark.parametrize("align", [1, 16])
def test_blocks_of_a_quadratic(align):
    """Blocks with ends of either sign, and none between them: what couples two groups is in no block."""
    H = symmetric([9.0, 4.0, 1.0, 0.0, -2.0, -5.0, -8.0], seed=2)
    model = Vectors()
    groups = gvk.ParameterGroups.from_model(model, "all_matrix", align=align)
    found = curvature.top_eigenvalue(
        quadratic(H, model), model, groups, per_group=True, tolerance=1e-6, max_iterations=1000
    )
    assert bool(found.converged.all())
    assert found.vector.shape == (groups.numel,)
    at = 0
    for k, size in enumerate(groups.sizes):
        block = H[at : at + size, at : at + size]
        assert float(found.eigenvalue[k]) == pytest.approx(float(torch.linalg.eigvalsh(block)[-1]), abs=1e-5)
        begin, end = groups.bounds[k].tolist()
        v = found.vector[begin:end]
        assert float(v.norm()) == pytest.approx(1, abs=1e-14)
        assert float((block @ v - found.eigenvalue[k] * v).norm()) <= 1.1 * float(found.residual[k]) + 1e-14
        at += size
    assert float(found.vector.norm()) == pytest.approx(math.sqrt(2), abs=1e-14)  # zero in the padding


# ------------------------------------------------------------------------------------------------------- a network


def network(dtype=torch.float64):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)


def data(dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(20, 3, generator=generator).to(dtype), torch.randn(20, 2, generator=generator).to(dtype)


def loss_of(model, dtype=torch.float64):
    x, y = data(dtype)
    return lambda: (model(x) - y).square().mean()


def hessian(model, groups):
    """[P, P] of the loss, by torch.func."""
    x, y = data()

    def loss(columns):
        named = {slot.name: view for slot, view in zip(groups.parameters, flat.views(columns, groups))}
        return (torch.func.functional_call(model, named, x) - y).square().mean()

    return torch.func.hessian(loss)(flat.flatten(flat.parameters(model, groups), groups))


# The residual bounds the error, and here it is at most the tolerance times an eigenvalue of about 3. In float32 the
# products themselves are off by some 1e-7 of the largest, times the layers they go through: well below 1e-5.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
@pytest.mark.parametrize("granularity", ["whole_model", "all_layer", "all_matrix"])
def test_a_network_against_the_explicit_hessian(granularity, dtype, tolerance):
    model = network()
    groups = gvk.ParameterGroups.from_model(model, granularity)
    H = hessian(model, groups)
    twin = copy.deepcopy(model).to(dtype)
    size = float(torch.linalg.eigvalsh(H).abs().max())
    arguments = {"tolerance": tolerance, "max_iterations": 2000}
    whole = curvature.top_eigenvalue(loss_of(twin, dtype), twin, groups, **arguments)
    assert bool(whole.converged)
    assert float(whole.eigenvalue) == pytest.approx(float(torch.linalg.eigvalsh(H)[-1]), abs=2 * tolerance * size)
    parts = curvature.top_eigenvalue(loss_of(twin, dtype), list(twin.parameters()), groups, per_group=True, **arguments)
    assert bool(parts.converged.all())
    assert parts.eigenvalue.shape == (len(groups),)
    for k, (begin, end) in enumerate(groups.bounds.tolist()):
        block = H[begin:end, begin:end]
        want = float(torch.linalg.eigvalsh(block)[-1])
        assert float(parts.eigenvalue[k]) == pytest.approx(want, abs=2 * tolerance * size)
    assert float(whole.eigenvalue) >= float(parts.eigenvalue.max()) - 2 * tolerance * size  # interlacing
    if granularity == "whole_model":
        assert torch.equal(parts.eigenvalue[0], whole.eigenvalue)
        assert torch.equal(parts.vector, whole.vector)


def test_nothing_is_left_behind():
    model = network()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    before = copy.deepcopy(model.state_dict())
    groups = gvk.ParameterGroups.from_model(model)
    random = torch.get_rng_state()
    with torch.no_grad():  # as an evaluation would have it
        once, again, other = (curvature.top_eigenvalue(loss_of(model), model, groups, seed=s) for s in (4, 4, 5))
    for field, same in zip(once, again):
        assert torch.equal(field, same)
    assert not torch.equal(once.vector, other.vector)
    assert not once.vector.requires_grad
    assert torch.equal(torch.get_rng_state(), random)
    assert all(bool((parameter.grad == 3).all()) for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_loss_is_evaluated_once():
    model, calls = network(), []
    groups = gvk.ParameterGroups.from_model(model)
    curvature.top_eigenvalue(lambda: calls.append(0) or loss_of(model)(), model, groups, per_group=True)
    assert len(calls) == 1


def test_half_precision_is_rough_but_works():
    model = network()
    groups = gvk.ParameterGroups.from_model(model)
    want = float(torch.linalg.eigvalsh(hessian(model, groups))[-1])
    half = copy.deepcopy(model).bfloat16()
    found = curvature.top_eigenvalue(loss_of(half, torch.bfloat16), half, groups, tolerance=0.03)
    assert bool(found.converged)
    assert found.vector.dtype == torch.float32
    # a handful of roundings to 2^-9 between the weights and the product, and the residual
    assert float(found.eigenvalue) == pytest.approx(want, rel=8 * 2.0**-9 + 0.03)


# ------------------------------------------------------------------------------------------------------- odd Hessians


def test_a_zero_hessian():
    model = network()
    groups = gvk.ParameterGroups.from_model(model)
    losses = {
        "linear": lambda: sum(parameter.sum() for parameter in model.parameters()),
        "in one parameter": lambda: model[0].bias.sum(),  # the others are unused
        "with a graph": lambda: sum((parameter.square() * 0).sum() for parameter in model.parameters()),
    }
    for loss in losses.values():
        for per_group in (False, True):
            found = curvature.top_eigenvalue(loss, model, groups, per_group=per_group)
            assert not found.eigenvalue.any()
            assert not found.residual.any()
            assert bool(found.converged.all())
            assert bool((found.iterations == 1).all())


def test_a_group_that_the_loss_does_not_use():
    model = network()
    groups = gvk.ParameterGroups.from_model(model)
    found = curvature.top_eigenvalue(lambda: model[2].weight.square().sum(), model, groups, per_group=True)
    assert found.eigenvalue == pytest.approx(torch.tensor([0.0, 2.0, 0.0], dtype=torch.float64), abs=1e-14)
    assert bool(found.converged.all())


@pytest.mark.parametrize("spectrum", ["positive", "a negative dominant one", "a saddle"])
def test_what_did_not_converge_says_so(spectrum):
    H = symmetric(SPECTRA[spectrum])
    model = Vectors()
    groups = gvk.ParameterGroups.from_model(model)
    found = curvature.top_eigenvalue(quadratic(H, model), model, groups, tolerance=1e-12, max_iterations=3)
    assert not bool(found.converged)
    assert int(found.iterations) == 6  # both iterations to their ends
    v = found.vector
    assert float(v @ H @ v) == pytest.approx(float(found.eigenvalue), abs=1e-13)  # a lower bound all the same
    assert float(found.eigenvalue) <= max(SPECTRA[spectrum])
    assert float((H @ v - found.eigenvalue * v).norm()) == pytest.approx(float(found.residual), abs=1e-13)
    assert float(found.residual) > 1e-12 * 7


@pytest.mark.parametrize(
    ("spectrum", "least"),
    [
        ([1.0, 0.9, 0.8, 0.0, 0.0, 0.0, -50.0], 0.0),  # the first is drawn to -50, the shifted one climbs
        ([5.0, 4.9, 4.8, 0.0, 0.0, 0.0, -1.0], 4.845),  # of these, the shifted one is the slower: 4.8425
    ],
)
def test_the_better_of_two_unfinished_iterations_is_given(spectrum, least):
    H = symmetric(spectrum)
    model = Vectors()
    groups = gvk.ParameterGroups.from_model(model)
    found = curvature.top_eigenvalue(quadratic(H, model), model, groups, tolerance=1e-9, max_iterations=20)
    assert not bool(found.converged)
    assert least < float(found.eigenvalue) <= spectrum[0]


def test_an_eigenvalue_below_a_known_bound_has_not_converged():
    """This start of the shifted iteration is, to so rough a tolerance, an eigenvector of the eigenvalue 1."""
    H = symmetric([5.0, 1.0, 1.0, 1.0, 1.0, 1.0, -4.9], seed=2)
    model = Vectors()
    groups = gvk.ParameterGroups.from_model(model)
    found = curvature.top_eigenvalue(quadratic(H, model), model, groups, tolerance=0.3, max_iterations=3, seed=2)
    assert float(found.eigenvalue) > 3  # from the first
    assert not bool(found.converged)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_hessian(value):
    model = Vectors()
    groups = gvk.ParameterGroups.from_model(model, "all_matrix")
    found = curvature.top_eigenvalue(
        lambda: model.layers[0].square().sum() * value + model.layers[1].square().sum(), model, groups, per_group=True
    )
    assert found.eigenvalue.isnan().tolist() == [True, False]
    assert found.converged.tolist() == [False, True]
    assert not bool(curvature.top_eigenvalue(lambda: model.flat().square().sum() * value, model, groups).converged)


# ---------------------------------------------------------------------------------------------------------- bad input

MODEL = network()
GROUPS = gvk.ParameterGroups.from_model(MODEL)
BAD = {
    "no callable": ({"loss": torch.ones(())}, TypeError, "loss: expected a callable, got Tensor"),
    "no tensor": ({"loss": lambda: 1.0}, TypeError, "loss: expected a tensor, got float"),
    "nothing": ({"loss": lambda: None}, TypeError, "loss: expected a tensor, got NoneType"),
    "a vector": (
        {"loss": lambda: MODEL[0].bias * 2},
        ValueError,
        r"loss: expected a real scalar that requires grad, got shape \[5\]",
    ),
    "no graph": ({"loss": lambda: torch.ones(())}, ValueError, "loss: .* requires_grad=False"),
    "no groups": ({"groups": 3}, TypeError, "groups: expected ParameterGroups"),
    "another model": ({"model": nn.Linear(2, 2)}, ValueError, "model: expected a trainable parameter '0.weight'"),
    "a tolerance of zero": ({"tolerance": 0.0}, ValueError, "tolerance: expected a finite number above 0, got 0.0"),
    "a tolerance of NaN": ({"tolerance": math.nan}, ValueError, "tolerance: expected a finite number above 0, got nan"),
    "a huge tolerance": ({"tolerance": 10**400}, ValueError, "tolerance: expected a finite number above 0, got inf"),
    "a tolerance of a str": ({"tolerance": "1"}, TypeError, "tolerance: expected a float, got '1'"),
    "no iterations": ({"max_iterations": 0}, ValueError, "max_iterations: expected at least 1, got 0"),
    "half an iteration": ({"max_iterations": 0.5}, TypeError, "max_iterations: expected an int, got 0.5"),
    "no seed": ({"seed": None}, TypeError, "seed: expected an int, got None"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    changes, error, message = BAD[case]
    with pytest.raises(error, match=message):
        curvature.top_eigenvalue(**({"loss": loss_of(MODEL), "model": MODEL, "groups": GROUPS} | changes))


# ------------------------------------------------------------------------------------------------------- task Fisher


def test_task_fisher():
    T, groups = 4, gvk.ParameterGroups.from_sizes({"a": 3, "b": 0, "c": 40})  # more tasks than columns, and fewer
    grads = torch.randn(T, groups.numel, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = curvature.task_fisher_top_eigenvalue(gvk.gram(grads, groups))
    assert found.shape == (3,)
    for value, (begin, end) in zip(found.tolist(), groups.bounds.tolist()):
        part = grads[:, begin:end]
        want = float(torch.linalg.eigvalsh(part.T @ part / T)[-1]) if end > begin else 0.0
        assert value == pytest.approx(want, rel=1e-12)  # float64 eigenvalues, the dominant one of each
    G = gvk.gram(grads, groups)
    G[0, 1, 2] = G[0, 2, 1] = math.nan
    assert curvature.task_fisher_top_eigenvalue(G).isnan().tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("G", "error", "message"),
    [
        ([[1.0]], TypeError, "G: expected a tensor, got list"),
        (torch.ones(2, 3, 3), TypeError, "G: expected dtype float64, got float32"),
        (torch.ones(3, 3).double(), ValueError, r"G: expected shape \[\?, \?, \?\], got \[3, 3\]"),
        (torch.ones(2, 3, 4).double(), ValueError, r"G: expected shape \[K, T, T\] .*, got \[2, 3, 4\]"),
        (torch.ones(2, 0, 0).double(), ValueError, r"G: expected shape \[K, T, T\] .*, got \[2, 0, 0\]"),
    ],
)
def test_bad_gram_matrices(G, error, message):
    with pytest.raises(error, match=message):
        curvature.task_fisher_top_eigenvalue(G)
