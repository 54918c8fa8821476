"""Mistakes that public implementations of Gradient Vaccine make, a test each. See also test_numerics.py."""

import pytest
import torch
from cases import LAYOUTS, task_gradients

import gradvac_kernels as gvk

PAIR = gvk.ParameterGroups.from_sizes({"all": 2})


def at_cosine(phi):
    """Two unit gradients at this cosine."""
    return torch.tensor([[1.0, 0.0], [phi, (1 - phi**2) ** 0.5]], dtype=torch.float64)


def test_the_average_is_updated_outside_the_if(backend):
    """Inside it a target could never rise above 0: at a constant cosine of 0.8 it must get to 0.8 (1 - 0.99^200)."""
    ema = torch.zeros(1, 2, 2, dtype=torch.float64)
    for step in range(200):
        found = gvk.vaccinate(at_cosine(0.8), PAIR, ema, beta=0.01, step=step, backend=backend)
        assert not found.corrected.any()
    assert ema[0, 0, 1] == pytest.approx(0.8 * (1 - 0.99**200), abs=1e-12)
    assert ema[0, 1, 0] == pytest.approx(0.8 * (1 - 0.99**200), abs=1e-12)


def test_the_average_takes_the_similarity_before_the_correction(backend):
    ema = torch.full((1, 2, 2), 0.5, dtype=torch.float64)
    found = gvk.vaccinate(at_cosine(-0.6), PAIR, ema, beta=0.1, backend=backend)
    assert found.corrected[0, 0, 1]
    assert ema[0, 0, 1] == pytest.approx(0.9 * 0.5 + 0.1 * -0.6, abs=1e-12)


def test_a_correction_reaches_the_target_and_grows_the_norm_as_it_should(backend):
    phi, hat = -0.3, 0.4
    grads = at_cosine(phi)
    found = gvk.vaccinate(grads, PAIR, None, target=hat, vaccinated=[0], backend=backend)
    turned = found.gradient - grads[1]
    assert torch.cosine_similarity(turned, grads[1], dim=0) == pytest.approx(hat, abs=1e-12)
    assert turned.norm() == pytest.approx(((1 - phi**2) / (1 - hat**2)) ** 0.5, abs=1e-12)


def three():
    generator = torch.Generator().manual_seed(4)
    grads = torch.randn(3, 50, generator=generator, dtype=torch.float64)
    grads[1] -= 0.7 * grads[0]
    grads[2] -= 0.5 * grads[0] + 0.3 * grads[1]
    return grads, gvk.ParameterGroups.from_sizes({"all": 50})


def project(g, onto):
    return g - (g @ onto) / (onto @ onto) * onto


def test_the_current_gradient_meets_the_original_others(backend):
    """With target 0 (PCGrad) a correction is a projection, so the right similarities are known in closed form."""
    grads, groups = three()
    order = torch.tensor([[[1, 2], [0, 2], [0, 1]]])
    found = gvk.vaccinate(grads, groups, None, target=0.0, order=order, backend=backend)
    cos = torch.nn.functional.cosine_similarity
    once = project(grads[0], grads[1])
    # not the original g_0, nor a stale norm of it ...
    assert found.similarity[0, 0, 2] == pytest.approx(float(cos(once, grads[2], dim=0)), abs=1e-12)
    assert found.similarity[0, 0, 2] != pytest.approx(float(cos(grads[0], grads[2], dim=0)), abs=1e-3)
    # ... and not an already turned g_0 as the target of row 1
    assert found.similarity[0, 1, 0] == pytest.approx(float(cos(grads[1], grads[0], dim=0)), abs=1e-12)
    turned = [
        project(once, grads[2]),
        project(project(grads[1], grads[0]), grads[2]),
        project(project(grads[2], grads[0]), grads[1]),
    ]
    for row, other in ((0, 2), (1, 2), (2, 1)):  # each of these cosines was negative, or there would be no projection
        assert found.corrected[0, row, other]
    assert torch.allclose(found.gradient, sum(turned), rtol=0, atol=1e-12)


def test_every_group_and_row_draws_its_own_order(backend):
    """With one order for all, groups that hold the same gradients would give the same weights."""
    grads, _ = three()
    same = gvk.ParameterGroups.from_sizes({str(k): 50 for k in range(12)})
    found = gvk.vaccinate(grads.repeat(1, 12), same, None, target=0.0, backend=backend)
    assert len({tuple(w) for w in found.weights.tolist()}) > 1


def test_targets_are_not_symmetric(backend):
    grads, groups = three()
    ema = torch.zeros(1, 3, 3, dtype=torch.float64)
    for step in range(5):
        gvk.vaccinate(grads, groups, ema, beta=0.5, step=step, backend=backend)
    assert (ema - ema.mT).abs().max() > 1e-3
    assert bool((ema.diagonal(dim1=1, dim2=2) == 0).all())


def test_similarity_of_half_precision_gradients_is_not_lost(backend):
    """Gram matrices in float16 overflow at norms of 256, and silently give the plain sum."""
    grads, groups = three()
    large = (grads * 300).to(torch.float16)
    found = gvk.vaccinate(large, groups, None, target=0.0, backend=backend)
    want = gvk.reference.vaccinate(large, groups, None, target=0.0)
    assert found.corrected.any()
    assert torch.equal(found.corrected, want.corrected)
    assert torch.allclose(found.weights, want.weights, rtol=1e-6)


def test_the_average_survives_smaller_batches_and_other_types():
    """By task, in float64, whatever the batch holds."""
    groups = LAYOUTS["ragged"]
    method = gvk.GradVac(beta=0.5, num_tasks=4)
    method(task_gradients(4, groups), groups)
    before = method.ema.clone()
    method(task_gradients(2, groups, step=1, dtype=torch.bfloat16), groups, task_ids=[3, 1])
    assert method.ema.dtype == torch.float64
    changed = (method.ema != before).any(0)
    assert changed.nonzero().tolist() == [[1, 3], [3, 1]]


def test_the_average_is_in_the_checkpoint():
    groups = LAYOUTS["ragged"]
    method = gvk.GradVac(beta=0.5)
    method(task_gradients(3, groups), groups)
    assert torch.equal(method.state_dict()["ema"], method.ema)
    assert method.state_dict()["step"] == 1


def test_fixed_target_zero_is_pcgrad(backend):
    """Yu et al. 2020, Algorithm 1, written out."""
    groups, T = LAYOUTS["ragged"], 6
    grads = task_gradients(T, groups, dtype=torch.float64)
    order = gvk.task_order(len(groups), T, seed=0, step=0)
    want = torch.zeros(groups.numel, dtype=torch.float64)
    for k, (begin, end) in enumerate(groups.bounds.tolist()):
        for i in range(T):
            g = grads[i, begin:end].clone()
            for j in order[k, i].tolist():
                other = grads[j, begin:end]
                if g.numel() > 1 and g @ other < 0:
                    g = project(g, other)
            want[begin:end] += g
    found = gvk.vaccinate(grads, groups, None, target=0.0, backend=backend).gradient
    several = [
        slice(b, e) for b, e in groups.bounds.tolist() if e - b > 1
    ]  # one column: projections leave rounding only
    for columns in several:
        assert torch.allclose(found[columns], want[columns], rtol=0, atol=1e-10 * float(want[columns].abs().max()))


@pytest.mark.parametrize("target", [0.0, 0.5])
def test_what_is_left_of_opposite_rows_of_equal_entries_is_not_measured(backend, target):
    """All roundings of such rows are alike, and their cosine is some 1e-7 off -1."""
    groups = gvk.ParameterGroups.from_sizes({"a": 8192})
    grads = torch.stack(
        [
            torch.full((8192,), 1.0515958),
            torch.full((8192,), -1.0106298),
            torch.randn(8192, generator=torch.Generator().manual_seed(0)),
        ]
    )
    order = torch.tensor([[[1, 2], [0, 2], [0, 1]]])
    found = gvk.vaccinate(grads, groups, None, target=target, order=order, backend=backend)
    assert found.similarity[0, 0, 1] == pytest.approx(-1, abs=1e-6)
    assert bool(found.similarity[0, 0, 2].isnan())
