"""GradVacAggregator in TorchJD: the properties that TorchJD asks of its aggregators, and its autojac engine.

TorchJD tests its own aggregators for these (tests/unit/aggregation there): the structure of the result, permutation
invariance, linearity under scaling, not conflicting. Gradient Vaccine draws orders and keeps targets, so the second
holds for the set of what may come out, the third for equal orders, and the fourth for two tasks and the target 0.
"""

import copy

import pytest
import torch

import gradvac_kernels as gvk

torchjd = pytest.importorskip("torchjd")
from gradvac_kernels.integrations.torchjd import GradVacAggregator  # noqa: E402

SHAPES = [(1, 1), (2, 7), (4, 3), (9, 11)]


def matrices():
    """Jacobians of any rank, with zeros among them, as TorchJD tries."""
    generator = torch.Generator().manual_seed(0)
    for m, n in SHAPES:
        for rank in {1, min(m, n)}:
            yield torch.randn(m, rank, generator=generator) @ torch.randn(rank, n, generator=generator)
        yield torch.zeros(m, n)
        stationary = torch.randn(m, n, generator=generator)
        yield stationary - stationary.mean(0)  # the sum of the rows is zero


@pytest.mark.parametrize("scale", [0.0, 1e-10, 1.0, 1e5, 1e15])
def test_the_result_has_the_structure(scale):
    for matrix in matrices():
        vector = GradVacAggregator()(scale * matrix)
        assert vector.shape == matrix.shape[1:]
        assert vector.dtype == matrix.dtype
        assert bool(vector.isfinite().all())


def test_only_matrices_are_taken():
    for bad in (torch.ones(3), torch.ones(2, 3, 4)):
        with pytest.raises(ValueError, match="dimension 2"):
            GradVacAggregator()(bad)


def outcomes(matrix):
    """All updates that some order gives, sorted, [outcomes, n]."""
    found = {}
    for seed in range(100):  # three rows have 2^3 orders: one is missed with probability 8 (7/8)^100 = 1e-5
        vector = GradVacAggregator(target=0.4, seed=seed)(matrix)
        found[tuple(round(x, 6) for x in vector.tolist())] = vector
    return torch.tensor(sorted(found))


def test_permutation_invariant_in_distribution():
    matrix = torch.randn(3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    want = outcomes(matrix)
    assert 1 < len(want) <= 8
    for permutation in ([1, 2, 0], [2, 1, 0]):
        assert torch.allclose(outcomes(matrix[permutation]), want, rtol=0, atol=2e-6)  # of the rounding above


def test_linear_under_scaling():
    """Positive factors on the rows scale what becomes of each row, and nothing else."""
    generator = torch.Generator().manual_seed(2)
    matrix = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    for settings in ({"target": 0.3}, {"beta": 0.5}):
        aggregator = GradVacAggregator(**settings)
        for _ in range(3):
            aggregator(torch.randn(5, 8, generator=generator, dtype=torch.float64))  # targets
        for _ in range(5):
            c1, c2 = torch.rand(2, 5, 1, generator=generator, dtype=torch.float64)
            a, b = torch.rand(2, generator=generator, dtype=torch.float64)
            x1, x2, x = (copy.deepcopy(aggregator)(c * matrix) for c in (c1, c2, a * c1 + b * c2))
            assert torch.allclose(x, a * x1 + b * x2, rtol=1e-9, atol=1e-12)


def test_two_tasks_do_not_conflict_with_target_zero():
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        matrix = torch.randn(2, 6, generator=generator, dtype=torch.float64)
        assert float((matrix @ GradVacAggregator(target=0.0)(matrix)).min()) > -1e-12


def test_the_update_has_no_graph():
    matrix = torch.randn(3, 4, requires_grad=True)
    assert not GradVacAggregator()(matrix).requires_grad


def test_equals_the_method_and_keeps_its_state():
    groups = gvk.ParameterGroups.from_sizes({"a": 4, "b": 7})
    aggregator, method = GradVacAggregator(groups, beta=0.2, seed=4), gvk.GradVac(beta=0.2, seed=4)
    jacobians = torch.randn(6, 3, 11, generator=torch.Generator().manual_seed(5))
    for jacobian in jacobians[:4]:
        assert torch.equal(aggregator(jacobian), method(jacobian, groups).gradient)
    fresh = GradVacAggregator(groups, beta=0.2)
    fresh.load_state_dict(aggregator.state_dict())
    for jacobian in jacobians[4:]:
        want = method(jacobian, groups).gradient
        assert torch.equal(aggregator(jacobian), want)
        assert torch.equal(fresh(jacobian), want)
    aggregator.reset()
    assert torch.equal(aggregator(jacobians[0]), GradVacAggregator(groups, beta=0.2, seed=4)(jacobians[0]))
    assert repr(aggregator).startswith("GradVacAggregator(groups=['a', 'b'], beta=0.2")
    assert str(aggregator) == "GradVacAggregator"


def test_a_jacobian_of_other_columns_is_refused():
    groups = gvk.ParameterGroups.from_sizes({"a": 4, "b": 7})
    with pytest.raises(ValueError, match="grads: expected shape"):
        GradVacAggregator(groups)(torch.randn(3, 10))
    with pytest.raises(TypeError, match="groups: expected"):
        GradVacAggregator([4, 7])


def test_groups_with_padding_are_refused():
    padded = gvk.ParameterGroups.from_sizes({"a": 3, "b": 5}, align=4)
    with pytest.raises(ValueError, match=r"groups: expected groups without padding \(align=1\), got 4 columns"):
        GradVacAggregator(padded)(torch.randn(2, 8))


def test_in_torchjd_s_engine():
    """``autojac`` fills ``.jac``, and our aggregator makes ``.grad``: as TaskGradients does."""
    from torchjd.autojac import backward, jac_to_grad

    torch.manual_seed(6)
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    twin = copy.deepcopy(model)
    x, y = torch.randn(3, 8, 5), torch.randn(3, 8, 1)
    tasks = gvk.TaskGradients(twin, ["a", "b", "c"], granularity="all_matrix", method=gvk.GradVac(beta=0.3))
    aggregator = GradVacAggregator(gvk.ParameterGroups.from_model(model, "all_matrix"), beta=0.3)
    for _ in range(3):
        losses = torch.stack([((model(xi) - yi) ** 2).mean() for xi, yi in zip(x, y)])
        for parameter in model.parameters():
            parameter.grad = None
        backward(losses)
        jac_to_grad(model.parameters(), aggregator)
        tasks.backward({name: ((twin(xi) - yi) ** 2).mean() for name, xi, yi in zip(tasks.tasks, x, y)})
        for ours, theirs in zip(twin.parameters(), model.parameters()):
            # float32 gradients of two engines
            assert torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5 * float(ours.grad.abs().max()))
