"""The rules that make it trustworthy: scales, zero and non-finite rows, cancellation, caps."""

import pytest
import torch
from cases import LAYOUTS, relative_error, task_gradients

import gradvac_kernels as gvk
from gradvac_kernels.numerics import MAX_TARGET


def run(backend, grads, groups, ema, **arguments):
    return gvk.vaccinate(grads, groups, ema, backend=backend, **arguments)


def targets(groups, T, value=0.3):
    return torch.full((len(groups), T, T), value, dtype=torch.float64)


@pytest.mark.parametrize("exponent", [-40, 40])
def test_a_scale_that_is_a_power_of_two_changes_no_bit(backend, exponent):
    groups, T = LAYOUTS["ragged"], 6
    grads = task_gradients(T, groups)
    plain, scaled = targets(groups, T), targets(groups, T)
    first = run(backend, grads, groups, plain)
    second = run(backend, grads * 2.0**exponent, groups, scaled)
    assert torch.equal(first.weights, second.weights)
    assert torch.equal(plain, scaled)
    assert torch.equal(first.gradient * 2.0**exponent, second.gradient)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_any_scale_changes_nothing_but_rounding(backend, scale):
    groups, T = LAYOUTS["ragged"], 6
    grads = task_gradients(T, groups)
    plain, scaled = targets(groups, T), targets(groups, T)
    first = run(backend, grads, groups, plain)
    second = run(backend, grads * scale, groups, scaled)
    assert first.corrected.any()
    # scaled entries are rounded to float32 (6e-8 each, at random), amplified by at most 1 / (1 - phi^2) < 4; the
    # one-column group, where gradients are parallel, keeps its phi of +-1 and has no digits to lose
    assert torch.allclose(first.weights, second.weights, rtol=1e-6, atol=1e-6 * float(first.weights.abs().max()))
    assert (plain - scaled).abs().max() <= 1e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tiny_norms_are_no_zeros(backend, dtype):
    """Norms of 1e-5, where an absolute epsilon of 1e-8 would read a similarity of -0.5 as -0.005."""
    groups = gvk.ParameterGroups.from_sizes({"a": 2})
    grads = torch.tensor([[1.0, 0.0], [-0.5, 0.75**0.5]]) * 1e-5
    found = run(backend, grads.to(dtype), groups, None, target=0.0)
    assert found.similarity[0, 0, 1] == pytest.approx(-0.5, abs=5e-3 if dtype == torch.float16 else 1e-6)
    assert found.corrected[0, 0, 1]


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan, 0.0])
def test_a_zero_or_non_finite_row_is_left_out_of_its_group(backend, bad):
    groups, T = LAYOUTS["ragged"], 5
    k, row = 3, 2
    begin, end = groups.bounds[k].tolist()
    grads = task_gradients(T, groups)
    if bad == 0.0:
        grads[row, begin:end] = 0
    else:
        grads[row, begin + 7] = bad
    ema = targets(groups, T)
    found = run(backend, grads, groups, ema)
    # neither measured, nor turned, nor turned towards; its targets stay
    assert bool(found.similarity[k, row].isnan().all())
    assert bool(found.similarity[k, :, row].isnan().all())
    assert not found.corrected[k, row].any()
    assert not found.corrected[k, :, row].any()
    assert bool((ema[k, row] == 0.3).all())
    assert bool((ema[k, :, row] == 0.3).all())
    assert found.weights[k, row] == 1.0
    # the others go on as if it were not there
    others = [r for r in range(T) if r != row]
    order = gvk.task_order(len(groups), T, seed=0, step=0)
    rest = torch.tensor(
        [[[others.index(j) for j in order[g, i].tolist() if j != row] for i in others] for g in range(len(groups))]
    )
    rest_ema = targets(groups, T - 1)
    want = run(backend, grads[others].contiguous(), groups, rest_ema, order=rest)
    assert torch.allclose(found.weights[k, others], want.weights[k], rtol=1e-12)
    assert torch.allclose(ema[k][others][:, others], rest_ema[k], rtol=1e-12)
    # other groups are not concerned
    assert not found.similarity[5, row, others].isnan().any()
    # the value reaches the output, so that a GradScaler sees it
    gradient = found.gradient[begin:end]
    assert (~gradient.isfinite()).nonzero().flatten().tolist() == ([] if bad == 0.0 else [7])


def test_an_infinite_step_poisons_nothing(backend):
    groups, T = LAYOUTS["ragged"], 4
    ema = targets(groups, T, 0.0)
    run(backend, task_gradients(T, groups), groups, ema, beta=0.5)
    before = ema.clone()
    run(backend, torch.full((T, groups.numel), torch.inf), groups, ema, beta=0.5, step=1)
    assert torch.equal(ema, before)
    found = run(backend, task_gradients(T, groups, step=2), groups, ema, beta=0.5, step=2)
    assert bool(found.gradient.isfinite().all())
    assert bool(ema.isfinite().all())


@pytest.mark.parametrize("target", [0.0, 0.5])
def test_opposite_gradients(backend, target):
    """g_2 = -g_1: the turned gradient vanishes, and nothing is NaN."""
    groups = gvk.ParameterGroups.from_sizes({"a": 300, "b": 6000})
    row = torch.randn(groups.numel, generator=torch.Generator().manual_seed(0))
    found = run(backend, torch.stack([row, -row]), groups, None, target=target)
    want = gvk.reference.vaccinate(torch.stack([row, -row]), groups, None, target=target)
    assert bool(found.weights.isfinite().all())
    assert torch.allclose(found.similarity[:, 0, 1], torch.tensor(-1.0, dtype=torch.float64), atol=1e-15)
    assert bool(found.gradient.isfinite().all())
    assert float(found.gradient.abs().max()) <= 1e-6 * float(row.abs().max())
    assert torch.allclose(found.weights, want.weights, atol=1e-6)  # the half angle of 1 - 1e-15 is 4e-8


def test_what_is_left_of_a_cancelled_gradient_is_not_measured(backend):
    """After g_1 has been turned to nothing by g_2 = -g_1, its similarity to g_3 would be that of rounding errors."""
    groups = gvk.ParameterGroups.from_sizes({"a": 500})
    generator = torch.Generator().manual_seed(5)
    row, other = torch.randn(500, generator=generator), torch.randn(500, generator=generator)
    grads = torch.stack([row, -row, other])
    order = torch.tensor([[[1, 2], [0, 2], [0, 1]]])
    ema = targets(groups, 3, 0.0)
    for result in (
        run(backend, grads, groups, ema, order=order),
        gvk.reference.vaccinate(grads, groups, targets(groups, 3, 0.0), order=order),
    ):
        assert result.similarity[0, 0, 1] == pytest.approx(-1, abs=1e-15)
        assert result.similarity[0, 0, 2].isnan()
        assert result.similarity[0, 1, 2].isnan()
        assert not result.similarity[0, 2].isnan()[:2].any()
    assert ema[0, 0, 2] == 0
    assert ema[0, 0, 1] == pytest.approx(-0.01, abs=1e-15)


def test_equal_gradients_are_left_alone(backend):
    groups = gvk.ParameterGroups.from_sizes({"a": 777, "b": 9000})
    row = torch.randn(groups.numel, generator=torch.Generator().manual_seed(2))
    found = run(backend, row.repeat(3, 1), groups, None, target=1.0)
    assert not found.corrected.any()
    assert bool((found.weights == 1).all())
    assert torch.allclose(
        torch.nan_to_num(found.similarity, nan=1.0), torch.ones(2, 3, 3, dtype=torch.float64), atol=1e-7
    )


@pytest.mark.parametrize("value", [1.0, MAX_TARGET, 1.0 - 2.0**-30])
def test_targets_are_capped_where_they_are_used(backend, value):
    groups = gvk.ParameterGroups.from_sizes({"a": 400})
    grads = task_gradients(2, groups)
    capped = run(backend, grads, groups, None, target=MAX_TARGET)
    ema = targets(groups, 2, value)
    found = run(backend, grads, groups, ema, beta=0.25)
    assert torch.equal(found.weights, capped.weights)
    assert bool(found.weights.isfinite().all())
    phi = found.similarity[0, 0, 1]
    assert ema[0, 0, 1] == pytest.approx(float(0.75 * value + 0.25 * phi), abs=1e-15)  # what is stored is not capped


@pytest.mark.parametrize(("entry", "usable"), [(1e-17, True), (3e-21, False), (1e17, True), (1e20, False)])
@pytest.mark.parametrize("T", [2, 20])
def test_range_of_float32_squares(backend, entry, usable, T):
    """Beyond about 1e18 a gradient counts as non-finite, below 1e-19 as zero, in every backend and in the oracle."""
    groups = gvk.ParameterGroups.from_sizes({"a": 100})
    grads = task_gradients(T, groups)
    grads[0] = entry
    for found in (
        run(backend, grads, groups, targets(groups, T)),
        gvk.reference.vaccinate(grads, groups, targets(groups, T)),
    ):
        assert bool(found.similarity[0, 0, 1:].isnan().all()) != usable
        assert bool(found.similarity[0, 1:, 0].isnan().all()) != usable


def test_float64_has_its_own_range(backend):
    groups = gvk.ParameterGroups.from_sizes({"a": 100})
    grads = task_gradients(3, groups, dtype=torch.float64)
    for scale in (1e-60, 1e60):
        found = run(backend, grads * scale, groups, None, target=0.2)
        want = gvk.reference.vaccinate(grads, groups, None, target=0.2)
        assert torch.allclose(found.weights, want.weights, rtol=1e-12)


def test_nearly_opposite_gradients(backend):
    """The error of the result is about the Gram's over 1 - phi^2."""
    groups = gvk.ParameterGroups.from_sizes({"a": 20_000})
    generator = torch.Generator().manual_seed(8)
    row, noise = torch.randn(2, 20_000, generator=generator)
    for size in (0.3, 0.03, 0.003):
        grads = torch.stack([row, -row + size * noise])
        want = gvk.reference.vaccinate(grads, groups, None, target=0.1, out=torch.empty(20_000, dtype=torch.float64))
        found = run(backend, grads, groups, None, target=0.1, out=torch.empty(20_000, dtype=torch.float64))
        assert relative_error(found.gradient, want.gradient) <= 1e-7 / size**2


def test_empty_and_one_task_batches(backend):
    groups = LAYOUTS["ragged"]
    grads = task_gradients(1, groups)
    found = run(backend, grads, groups, targets(groups, 1))
    assert torch.equal(found.gradient, grads[0])
    assert bool((found.weights == 1).all())
    nothing = gvk.ParameterGroups.from_sizes({"a": 0})
    empty = run(backend, torch.empty(3, 0), nothing, targets(nothing, 3))
    assert empty.gradient.shape == (0,)
    assert bool((empty.weights == 1).all())


def test_a_permutation_of_the_tasks_permutes_the_result(backend):
    """With the order permuted alike."""
    groups, T = LAYOUTS["ragged"], 6
    grads = task_gradients(T, groups)
    shuffle = torch.randperm(T, generator=torch.Generator().manual_seed(1))  # new row r is old row shuffle[r]
    place = shuffle.argsort()
    order = gvk.task_order(len(groups), T, seed=1, step=0)
    plain, permuted = targets(groups, T), targets(groups, T)
    first = run(backend, grads, groups, plain, order=order)
    second = run(backend, grads[shuffle].contiguous(), groups, permuted, order=place[order[:, shuffle]].contiguous())
    assert relative_error(second.gradient, first.gradient) <= 1e-6
    assert torch.allclose(permuted, plain[:, shuffle][:, :, shuffle], atol=1e-7)
    differ = second.corrected != first.corrected[:, shuffle][:, :, shuffle]
    assert differ.sum() <= 1  # a tie of phi and target may fall either way


def test_a_target_that_is_no_number_turns_nothing(backend):
    groups = LAYOUTS["ragged"]
    grads = task_gradients(4, groups)
    found = run(backend, grads, groups, targets(groups, 4, torch.nan))
    assert not found.corrected.any()
    assert bool((found.weights == 1).all())
    with pytest.raises(ValueError, match=r"state\['ema'\]: expected finite targets"):
        gvk.GradVac().load_state_dict({"ema": targets(groups, 4, torch.nan), "num_tasks": 4, "seed": 0, "step": 1})
