"""The methods that find weights from Gram matrices, each against the field's test vector and an independent solver."""

import copy
import math

import numpy as np
import pytest
import torch
from scipy import optimize

import gradvac_kernels as gvk
from gradvac_kernels import methods

aggregation = pytest.importorskip("torchjd.aggregation")

ONE = gvk.ParameterGroups.from_sizes({"all": 3})
J = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]], dtype=torch.float64)
GROUPS = gvk.ParameterGroups.from_sizes({"a": 60, "b": 700, "c": 90})
KINDS = ("normal", "agreeing", "singular", "scaled", "opposite", "equal", "nearly_singular")


def gradients(num_tasks, kind="normal", seed=0, groups=GROUPS):
    """[T, P] float64."""
    generator = torch.Generator().manual_seed(1000 * num_tasks + seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows = normal(num_tasks, groups.numel)
    if kind == "agreeing":
        rows += 0.8 * normal(1, groups.numel)
    elif kind == "singular":
        rank = max(1, num_tasks // 2)
        rows = normal(num_tasks, rank) @ normal(rank, groups.numel)
    elif kind == "scaled":
        rows *= 10.0 ** torch.linspace(-4, 4, num_tasks, dtype=torch.float64)[:, None]
    elif kind == "opposite":
        rows[1] = -2 * rows[0]
    elif kind == "equal":
        rows[1] = rows[0]
    elif kind == "nearly_singular":
        rows = rows[:1] * torch.linspace(1, 2, num_tasks, dtype=torch.float64)[:, None] + 1e-4 * rows
    return rows


def losses_of(num_tasks, step=0):
    return torch.linspace(1, 2, num_tasks, dtype=torch.float64) * math.exp(-0.1 * step) + 0.05 * torch.arange(num_tasks)


def make(name, **settings):
    return getattr(methods, name)(**settings)


# ----------------------------------------------------------------------------------------------- the field's vector

TABLE = {
    "Sum": (methods.Sum, [1, 1]),
    "Mean": (methods.Mean, [0.5, 0.5]),
    "PCGrad": (methods.PCGrad, [2.2222, 1.5789]),
    "MGDA": (methods.MGDA, [0.6, 0.4]),
    "CAGrad": (lambda: methods.FromTorchJD(aggregation.CAGradWeighting(c=0.5)), [0.7041, 0.5]),
    "IMTL-G": (lambda: methods.FromTorchJD(aggregation.IMTLGWeighting()), [0.5923, 0.4077]),
    "Aligned-MTL": (lambda: methods.FromTorchJD(aggregation.AlignedMTLWeighting()), [0.5591, 0.4083]),
    "UPGrad": (lambda: methods.FromTorchJD(aggregation.UPGradWeighting()), [1.1111, 0.7895]),
    "ConFIG": (lambda: methods.FromTorchJD(aggregation.ConFIG()), [1.2265, 0.8441]),
}


@pytest.mark.parametrize("name", TABLE)
def test_the_vector_of_the_literature(name):
    make_method, weights = TABLE[name]
    found = make_method()(J, ONE)
    want = torch.tensor([weights], dtype=torch.float64)
    # four decimals are known; TorchJD's iterative solvers and its regularised Gramians are good to 3e-4
    assert torch.allclose(found.weights, want, rtol=0, atol=3e-4 if name in ("CAGrad", "UPGrad") else 5.1e-5)
    assert torch.allclose(found.gradient, want[0] @ J, rtol=0, atol=3e-3)


# ------------------------------------------------------------------------------------------------------------ PCGrad


@pytest.mark.parametrize("vaccinated", [None, (0, 2)])
def test_pcgrad_is_gradvac_with_target_zero_bit_for_bit(vaccinated):
    pcgrad = methods.PCGrad(vaccinated=vaccinated, seed=3)
    gradvac = gvk.GradVac(target=0.0, vaccinated=vaccinated, seed=3)
    for step in range(4):
        found, want = (method(gradients(5, seed=step).float(), GROUPS) for method in (pcgrad, gradvac))
        for a, b in zip(found, want):
            assert torch.equal(torch.nan_to_num(a, nan=9.0), torch.nan_to_num(b, nan=9.0))
    assert pcgrad.state_dict() == gradvac.state_dict()


# -------------------------------------------------------------------------------------------------------------- MGDA


def shortest(rows):
    """The weights of the shortest convex combination, by non-negative least squares: ``|A x - b|`` is least where
    ``x' G x + s^2 (1' x - 1)^2`` is, and x over its sum is the point of the simplex."""
    scale = float(rows.norm(dim=1).min())
    A = np.vstack([rows.T.numpy(), scale * np.ones((1, len(rows)))])
    b = np.zeros(len(A))
    b[-1] = scale
    x = optimize.nnls(A, b, maxiter=10_000)[0]
    return torch.tensor(x / x.sum())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_tasks", [2, 3, 8, 32])
def test_mgda_against_least_squares(num_tasks, kind):
    grads = gradients(num_tasks, kind)
    found = methods.MGDA()(grads, GROUPS)
    assert bool((found.weights >= 0).all())
    # sums of T numbers of at most 1
    assert torch.allclose(found.weights.sum(1), torch.ones(len(GROUPS), dtype=torch.float64), rtol=0, atol=1e-14)
    for k, (begin, end) in enumerate(GROUPS.bounds.tolist()):
        rows = grads[:, begin:end]
        want, least = shortest(rows), rows.norm(dim=1).min()
        if kind not in ("singular", "equal"):  # where several weights are equally good
            assert torch.allclose(found.weights[k], want, rtol=0, atol=1e-6)
            if kind != "opposite":  # there the shortest vector is zero, and nothing tells the others from the two
                assert bool((found.weights[k][want < 1e-12] == 0).all())  # nothing, not little
        # The shortest vector is unique; it is found to 1e-6 of the shortest gradient.
        assert float((found.gradient[begin:end] - want @ rows).norm() / least) < 1e-6
        # It meets the conditions of a minimum: no gradient leans back over it.
        shortest_one = found.gradient[begin:end]
        assert float((rows @ shortest_one - shortest_one @ shortest_one).min() / least**2) > -1e-6


def test_mgda_does_not_depend_on_the_scale():
    grads = gradients(6, "agreeing")
    want = methods.MGDA()(grads, GROUPS).weights
    for scale in (2.0**-40, 2.0**40):  # powers of two: the same bits
        assert torch.equal(methods.MGDA()(grads * scale, GROUPS).weights, want)


# ---------------------------------------------------------------------------------------------------------- GradNorm


def test_gradnorm_descends_its_loss():
    """The step is that of autograd on the paper's loss, with norms over their mean and the goal held constant."""
    method, lr, alpha = methods.GradNorm(alpha=1.5, lr=0.05), 0.05, 1.5
    T = 5
    first, w = losses_of(T), torch.ones(len(GROUPS), T, dtype=torch.float64)
    for step in range(20):
        grads, losses = gradients(T, seed=step), losses_of(T, step) * (1 + 0.1 * torch.arange(T) * (step % 3))
        first = losses if step == 0 else first
        found = method(grads, GROUPS, losses=losses)
        assert torch.allclose(found.weights, w, rtol=1e-12)
        for k, (begin, end) in enumerate(GROUPS.bounds.tolist()):
            n = grads[:, begin:end].norm(dim=1)
            n = n / n.mean()
            r = (losses / first) / (losses / first).mean()
            free = w[k].clone().requires_grad_()
            goal = ((w[k] * n).mean() * r**alpha).detach()
            (slope,) = torch.autograd.grad((free * n - goal).abs().sum(), free)
            moved = (w[k] - lr * slope).clamp(min=0)
            w[k] = moved * w[k].sum() / moved.sum()
        assert torch.allclose(method.state["weights"].sum(1), torch.tensor(float(T), dtype=torch.float64))


def test_gradnorm_brings_gradients_in_step():
    """With equal training rates and constant gradients all weighted norms become equal, to the size of a step."""
    grads, losses = gradients(4) * torch.tensor([[1.0], [2.0], [4.0], [8.0]], dtype=torch.float64), torch.ones(4)
    method = methods.GradNorm(lr=1e-3)
    for _ in range(3000):
        found = method(grads, GROUPS, losses=losses)
    for k, (begin, end) in enumerate(GROUPS.bounds.tolist()):
        lengths = found.weights[k] * grads[:, begin:end].norm(dim=1)
        # a weight swings by lr n / mean n; n / mean n is at most 2.2 here
        assert float((lengths / lengths.mean() - 1).abs().max()) < 4 * 1e-3 * 2.2 * 2.2


# -------------------------------------------------------------------------------------------------------------- CATS


def lagrangian_step(alpha, dual, G, losses, lr, dual_lr, budget, floor):
    """One step for one group, in plain words; the projection by a root search instead of a sort."""
    N = len(alpha)
    G, losses = G / G.diagonal().mean(), losses / losses.mean()
    free = alpha.clone().requires_grad_()
    (slope,) = torch.autograd.grad((free @ losses + dual * (free @ G @ free)) / (1 + dual), free)
    target = alpha - lr / N * slope
    shift = optimize.brentq(lambda t: float((target - t).clamp(min=floor / N).sum() - 1), -10, 10, xtol=1e-15)
    return (target - shift).clamp(min=floor / N), max(0.0, dual + dual_lr * float(alpha @ G @ alpha - budget))


def test_cats_descends_and_ascends_the_lagrangian():
    T, settings = 5, {"lr": 0.3, "dual_lr": 0.5, "floor": 0.2}
    method = methods.CATS(**settings)
    alpha = [torch.full((T,), 1 / T, dtype=torch.float64) for _ in GROUPS.names]
    dual = [0.0 for _ in GROUPS.names]
    for step in range(30):
        grads, losses = gradients(T, "agreeing", seed=step), losses_of(T, step)
        found = method(grads, GROUPS, losses=losses)
        G = gvk.gram(grads, GROUPS)
        for k in range(len(GROUPS)):
            assert torch.allclose(found.weights[k], alpha[k], rtol=0, atol=1e-12)
            alpha[k], dual[k] = lagrangian_step(alpha[k], dual[k], G[k], losses, budget=1 / T, **settings)
    assert torch.allclose(method.state["multiplier"], torch.tensor(dual, dtype=torch.float64), rtol=1e-10)
    assert max(dual) > 0


def test_cats_ends_at_the_constrained_minimum():
    """With constant gradients and losses: least ``alpha' L`` where ``alpha' G alpha <= budget``, as SLSQP finds it."""
    T, budget = 4, 0.4
    grads, losses = gradients(T, "agreeing", groups=ONE), losses_of(T)
    method = methods.CATS(budget=budget, lr=0.02, dual_lr=0.02, floor=0.0, interval=None)
    G = gvk.gram(grads, ONE)
    for _ in range(20_000):
        method.observe(G, ONE, losses)
    G = G[0]
    G, relative = (G / G.diagonal().mean()).numpy(), (losses / losses.mean()).numpy()
    want = optimize.minimize(
        lambda a: a @ relative,
        np.full(T, 1 / T),
        jac=lambda a: relative,
        bounds=[(0, 1)] * T,
        constraints=[
            {"type": "eq", "fun": lambda a: a.sum() - 1},
            {"type": "ineq", "fun": lambda a: budget - a @ G @ a, "jac": lambda a: -2 * G @ a},
        ],
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 1000},
    )
    assert want.success
    assert np.allclose(method.state["alpha"][0].numpy(), want.x, rtol=0, atol=1e-5)


def test_cats_holds_its_budget_with_some_of_the_tasks():
    """Gradients of equal norm with cosine 0.3 and equal losses: combined they are too long, however many there are."""
    ones = torch.ones(3, 12, 12, dtype=torch.float64)
    G = 0.3 * ones + 0.7 * torch.eye(12, dtype=torch.float64)
    for present in (12, 8, 2):
        method = methods.CATS(num_tasks=12)
        for step in range(12):
            ids = [(step + i) % 12 for i in range(present)]
            method.observe(G[:, :present, :present].contiguous(), GROUPS, torch.ones(present), ids)
        # the budget is 1 / m and m equal weights give (1 + 0.3 (m - 1)) / m
        excess = 0.3 * (present - 1) / present
        assert torch.allclose(method.state["multiplier"], torch.tensor(12 * 0.1 * excess, dtype=torch.float64))
        assert torch.allclose(method.state["alpha"], torch.tensor(1 / 12, dtype=torch.float64))


def test_cats_takes_losses_of_any_sign():
    G = torch.eye(4, dtype=torch.float64).expand(3, 4, 4).contiguous()
    for losses in ([-1.0, -3.0, -2.0, -2.0], [-1.0, -2.0, 1.5, 1.5000001]):
        method, largest = methods.CATS(lr=0.1), losses.index(max(losses))
        method.observe(G, GROUPS, torch.tensor(losses, dtype=torch.float64))
        alpha = method.state["alpha"][0]
        assert int(alpha.argmin()) == largest
        assert float((alpha - 0.25).abs().max()) <= 0.1 / 4 * 2 * 4  # lr / N times the relative loss, at most N, twice


def test_an_observation_waits_for_nobody_and_changes_no_step_under_way():
    method, grads = methods.CATS(interval=None, lr=0.5), gradients(4)
    G = gvk.gram(grads, GROUPS)
    with torch.inference_mode():
        method.observe(G, GROUPS, losses_of(4))
    kept = method.state["alpha"]
    before = kept.clone()
    with method.in_parts(GROUPS, 4, grads.device) as step:
        method.observe(G, GROUPS, losses_of(4))
        found = step.vaccinate(grads[:, :60].contiguous(), GROUPS[:1], None, None)
    assert torch.equal(found.weights[0], before[0])
    assert torch.equal(kept, before)


def test_cats_learns_every_so_many_steps_or_from_others():
    often, seldom, never = (methods.CATS(interval=interval) for interval in (1, 3, None))
    for step in range(3):
        for method in (often, seldom):
            method(gradients(4, seed=step), GROUPS, losses=losses_of(4, step))
        never(gradients(4, seed=step), GROUPS)  # needs no losses
        changed = [not torch.equal(m.state["alpha"], torch.full_like(m.state["alpha"], 0.25)) for m in (often, seldom)]
        assert changed == [True, step == 2]
    assert bool((never.state["alpha"] == 0.25).all())
    other = gradients(4, seed=2)
    never.observe(gvk.gram(other, GROUPS), GROUPS, losses_of(4, 2))
    once = methods.CATS()
    once(other, GROUPS, losses=losses_of(4, 2))
    assert torch.equal(never.state["alpha"], once.state["alpha"])
    assert never.step == 3


# ----------------------------------------------------------------------------------------------------- from TorchJD

WEIGHTINGS = {
    "upgrad": lambda: aggregation.UPGradWeighting(),
    "cagrad": lambda: aggregation.CAGradWeighting(c=0.4),
    "aligned": lambda: aggregation.AlignedMTLWeighting(),
    "imtl": lambda: aggregation.IMTLGWeighting(),
    "mgda": lambda: aggregation.MGDAWeighting(epsilon=1e-12, max_iters=1000),
    "dualproj": lambda: aggregation.DualProjWeighting(),
}


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_weightings_of_torchjd_group_by_group(name):
    grads = gradients(6, "agreeing")
    found = methods.FromTorchJD(WEIGHTINGS[name]())(grads, GROUPS)
    for k, (begin, end) in enumerate(GROUPS.bounds.tolist()):
        rows = grads[:, begin:end]
        want = WEIGHTINGS[name]()(rows @ rows.T)
        # Two Grams of float64 differ by some 1e-15; solvers that iterate may make 1e-7 of it.
        assert torch.allclose(found.weights[k], want.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["ConFIG", "NashMTL"])
def test_aggregators_of_torchjd_group_by_group(name):
    grads = gradients(4, "agreeing")
    make_one = aggregation.ConFIG if name == "ConFIG" else lambda: aggregation.NashMTL(n_tasks=4)
    found = methods.FromTorchJD(make_one(), relative=False)(grads, GROUPS)  # NashMTL bounds the update's length
    for begin, end in GROUPS.bounds.tolist():
        want = make_one()(grads[:, begin:end])
        assert torch.allclose(found.gradient[begin:end], want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize(("num_tasks", "columns"), [(6, 3), (5, 2), (14, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fewer_columns_than_tasks(num_tasks, columns, dtype):
    """The Gram matrix is singular there, and what is rounding in it must not be magnified."""
    groups = gvk.ParameterGroups.from_sizes({"bias": columns})
    grads = torch.randn(num_tasks, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
    found, want = methods.FromTorchJD(aggregation.ConFIG())(grads, groups), aggregation.ConFIG()(grads.double())
    # TorchJD inverts a matrix of unit rows of condition number below 100
    assert float((found.gradient - want).norm() / want.norm()) < (1e-5 if dtype == torch.float32 else 1e-12)


def test_torchjd_s_epsilons_do_not_switch_small_gradients_off():
    grads = gradients(3, "agreeing")
    for weighting in (aggregation.CAGradWeighting(c=0.5), aggregation.UPGradWeighting()):
        want = methods.FromTorchJD(weighting)(grads, GROUPS).weights
        for scale in (2.0**-30, 2.0**30):
            assert torch.allclose(methods.FromTorchJD(weighting)(grads * scale, GROUPS).weights, want, rtol=1e-6)


def test_a_step_that_fails_teaches_a_stateful_weighting_nothing():
    method, fresh = (methods.FromTorchJD(aggregation.GradVacWeighting(beta=0.5)) for _ in range(2))
    grads = gradients(2, seed=1)

    def fail():
        with method.in_parts(GROUPS, 2, grads.device) as step:
            step.vaccinate(grads[:, :60].contiguous(), GROUPS[:1], None, None)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.equal(method(grads, GROUPS).weights, fresh(grads, GROUPS).weights)


def test_a_stateful_weighting_keeps_its_state_by_group():
    method = methods.FromTorchJD(aggregation.GradVacWeighting(beta=0.3))
    alone = [aggregation.GradVacWeighting(beta=0.3) for _ in GROUPS.names]
    for step in range(3):
        grads = gradients(2, "normal", seed=step)  # two tasks have one order only
        found = method(grads, GROUPS)
        for k, (begin, end) in enumerate(GROUPS.bounds.tolist()):
            rows = grads[:, begin:end]
            assert torch.allclose(found.weights[k], alone[k](rows @ rows.T), rtol=1e-9)
    with pytest.raises(NotImplementedError, match="GradVacWeighting"):
        method.state_dict()


def test_what_is_not_torchjd_s_is_refused():
    with pytest.raises(TypeError, match="weighting: expected a Weighting or an Aggregator"):
        methods.FromTorchJD(lambda G: G[0])


# ------------------------------------------------------------------------------------------- what all have in common

ALL = {
    "Sum": methods.Sum,
    "Mean": methods.Mean,
    "MGDA": methods.MGDA,
    "GradNorm": methods.GradNorm,
    "CATS": methods.CATS,
    "FromTorchJD": lambda: methods.FromTorchJD(aggregation.UPGradWeighting()),
    "PCGrad": methods.PCGrad,
    "GradVac": gvk.GradVac,
}


def step_of(method, grads, step=0, **more):
    losses = losses_of(len(grads), step) if method.needs_losses else None
    return method(grads, GROUPS, losses=losses, **more)


@pytest.mark.parametrize("name", ALL)
def test_the_update_is_the_weighted_sum(name):
    grads, method = gradients(4, "agreeing"), ALL[name]()
    for step in range(3):
        out = torch.full((GROUPS.numel,), torch.nan, dtype=torch.float64)
        found = step_of(method, grads, step, out=out)
        assert found.gradient is out
        want = torch.cat([w @ grads[:, a:b] for w, (a, b) in zip(found.weights, GROUPS.bounds.tolist())])
        assert torch.allclose(out, want, rtol=1e-12, atol=1e-12 * float(want.abs().max()))
        assert torch.equal(found.gram, gvk.gram(grads, GROUPS))


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("PCGrad", "GradVac")])
def test_similarity_is_that_of_the_gradients(name):
    grads = gradients(4)
    grads[1, :60] = 0
    found = step_of(ALL[name](), grads)
    for k, (begin, end) in enumerate(GROUPS.bounds.tolist()):
        want = torch.nn.functional.cosine_similarity(grads[:, None, begin:end], grads[None, :, begin:end], dim=2)
        want.fill_diagonal_(torch.nan)
        if k == 0:
            want[1] = want[:, 1] = torch.nan
        assert torch.allclose(found.similarity[k], want, rtol=1e-12, atol=1e-14, equal_nan=True)
    assert not bool(found.corrected.any())


@pytest.mark.parametrize("bad", [0.0, math.inf, math.nan])
@pytest.mark.parametrize("name", [name for name in ALL if name not in ("PCGrad", "GradVac")])
def test_a_bad_row_is_left_out_of_its_group(name, bad):
    """There, the others are weighted as if it were not in the batch; elsewhere all is as it would have been."""
    method, reference, without = ALL[name](), ALL[name](), ALL[name]()
    for each in (method, reference, without):
        each.bind(4)
    clean = gradients(4, "agreeing")
    grads = clean.clone()
    grads[2, GROUPS.offsets[1] + 5 if bad else slice(GROUPS.offsets[1], GROUPS.offsets[2])] = bad
    others = [0, 1, 3]
    found, want = step_of(method, grads), step_of(reference, clean)
    alone = step_of(without, clean[others], task_ids=others)
    for k in (0, 2):
        assert torch.equal(found.weights[k], want.weights[k])
    if name != "Mean":
        assert torch.allclose(found.weights[1, others], alone.weights[1], rtol=1e-9)
    assert float(found.weights[1, 2]) == (0.0 if bad == 0 else 1.0)
    middle = found.gradient[GROUPS.offsets[1] : GROUPS.offsets[2]]
    assert bool(middle.isfinite().all()) == (bad == 0)
    for key, values in method.state.items():  # what was learned is finite, and for the row in this group as before
        if key in ("alpha", "weights"):
            assert bool(values.isfinite().all())
            assert float(values[1, 2]) == (0.25 if key == "alpha" else 1.0)


@pytest.mark.parametrize("name", ALL)
def test_in_parts_equals_one_call(name):
    whole, parts = ALL[name](), ALL[name]()
    for step in range(4):
        grads = gradients(4, "agreeing", seed=step)
        want = step_of(whole, grads, step)
        with parts.in_parts(GROUPS, 4, grads.device) as part:
            found = []
            for k in (2, 0, 1):
                slab = GROUPS[k : k + 1]
                begin, end = GROUPS.bounds[k].tolist()
                found.append((k, part.vaccinate(grads[:, begin:end].contiguous(), slab, None, None)))
            part.losses = losses_of(4, step) if parts.needs_losses else None
        for k, one in found:
            assert torch.equal(one.weights[0], want.weights[k])
    if name != "FromTorchJD":
        assert str(whole.state_dict()) == str(parts.state_dict())


@pytest.mark.parametrize("name", [*ALL, "GradVac"])
def test_a_slab_has_groups_of_the_step(name):
    method = ALL.get(name, methods.GradVac)()
    cpu = torch.device("cpu")
    for other in (GROUPS[:1], GROUPS[2:]):  # in a step of group 1 alone
        begin, end = GROUPS.offsets[other.first], GROUPS.offsets[other.first + 1]
        slab = gradients(4)[:, begin:end].contiguous()
        refused = pytest.raises(ValueError, match="groups: expected some of the step's, 1 to 1, got")
        with refused, method.in_parts(GROUPS[1:2], 4, cpu) as step:
            step.vaccinate(slab, other, None, None)
    assert method.step == 0
    for arguments, error in (((None, 4), TypeError), ((GROUPS, "4"), TypeError), ((GROUPS, 0), ValueError)):
        with pytest.raises(error, match=r"(groups|num_rows): expected"), method.in_parts(*arguments, cpu):
            pass


@pytest.mark.parametrize("name", ["Sum", "MGDA", "CATS"])
def test_a_square_that_overflowed_is_not_a_zero(name):
    """Of parts of infinite products a sum may be minus infinity."""
    G = torch.eye(4, dtype=torch.float64).repeat(3, 1, 1)
    G[1, 2, 2] = -torch.inf
    with ALL[name]().in_parts(GROUPS, 4, G.device) as step:
        step.losses = losses_of(4)
        assert float(step.weigh(G, GROUPS, None, torch.float32).weights[1, 2]) == 1.0


class OfEqualLength(methods.Weighting):
    """A method of a user's own, as in the README."""

    def weights(self, measured, state):
        return measured.G.diagonal(dim1=1, dim2=2).rsqrt()


def test_a_method_of_a_user_s_own():
    grads = gradients(4)
    found = step_of(OfEqualLength(), grads)
    for k, (begin, end) in enumerate(GROUPS.bounds.tolist()):
        block = grads[:, begin:end]
        assert torch.allclose(found.gradient[begin:end], (block / block.norm(dim=1, keepdim=True)).sum(0))
        assert torch.allclose(found.weights[k], 1 / block.norm(dim=1))


@pytest.mark.parametrize("name", ["MGDA", "CATS", "GradNorm"])
@pytest.mark.parametrize("num_tasks", [20, 33])
def test_slabs_give_the_same_bits_with_many_tasks(name, num_tasks):
    groups = gvk.ParameterGroups.from_sizes({str(k): 1 + 7 * k % 59 for k in range(40)})
    whole, parts = ALL[name](), ALL[name]()
    for step in range(2):
        grads, losses = gradients(num_tasks, seed=step, groups=groups), losses_of(num_tasks, step)
        want = whole(grads, groups, losses=losses)
        with parts.in_parts(groups, num_tasks, grads.device) as part:
            part.losses = losses
            for k, (begin, end) in enumerate(groups.bounds.tolist()):
                found = part.vaccinate(grads[:, begin:end].contiguous(), groups[k : k + 1], None, None)
                assert torch.equal(found.weights[0], want.weights[k])
    assert all(torch.equal(a, b) for a, b in zip(whole.state.values(), parts.state.values()))


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("PCGrad", "GradVac")])
def test_which_rows_are_left_out_depends_on_the_type(name):
    """Squared norms of float32 gradients lie in [2^-126, 3.4e38]; the same rows in float64 are measured."""
    method = ALL[name]()
    for exponent in (-64, 66):
        grads = gradients(3, "agreeing")
        grads[1] *= 2.0**exponent / grads[1].norm()
        for dtype, kept in ((torch.float32, False), (torch.float64, True)):
            step = method._begin(GROUPS, 3, grads.device)
            step.weigh(gvk.gram(grads, GROUPS), GROUPS, None, dtype)
            assert bool(step.measured[0].usable[1:2, 1].all()) == kept or exponent == -64
            assert bool(step.measured[0].usable[:, 0].all())
        assert not bool(step.measured[0].usable.all(1).any()) or kept


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    ("ids", "error"),
    [
        ([0], ValueError),
        ([0, 0, 0], ValueError),
        ([0, 1, 4], ValueError),
        (torch.tensor([0.0, 1.0, 2.0]), TypeError),
        (torch.tensor([True, False, True]), TypeError),
        (torch.tensor([[0, 1, 2]]), ValueError),
        (torch.tensor(1), ValueError),
        (torch.tensor([0, 1, 1]), ValueError),
        ("012", TypeError),
    ],
)
def test_bad_ids_change_nothing(name, ids, error):
    method, out = ALL[name](), torch.full((GROUPS.numel,), 7.0, dtype=torch.float64)
    method.bind(4)
    with pytest.raises(error, match="task_ids"):
        step_of(method, gradients(3), task_ids=ids, out=out)
    assert bool((out == 7).all())
    assert method.step == 0
    assert getattr(method, "state", {}) == {}


@pytest.mark.parametrize("name", [name for name in ALL if name != "FromTorchJD"])
def test_a_checkpoint_continues_bit_for_bit(name, tmp_path):
    method = ALL[name]()
    for step in range(3):
        step_of(method, gradients(4, seed=step), step)
    torch.save(method.state_dict(), tmp_path / "state.pt")
    fresh = ALL[name]()
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for step in range(3, 5):
        a, b = (step_of(each, gradients(4, seed=step), step) for each in (method, fresh))
        assert torch.equal(a.weights, b.weights)
        assert torch.equal(a.gradient, b.gradient)


@pytest.mark.parametrize("name", ["GradNorm", "CATS", "MGDA"])
def test_a_bad_state_is_refused_and_changes_nothing(name):
    method = ALL[name]()
    step_of(method, gradients(4))
    good = method.state_dict()
    before = copy.deepcopy(good)
    bad = [{}, None, good | {"more": 1}, good | {"num_tasks": 5}, good | {"step": -1}, good | {"num_tasks": 0}]
    for key in method.state:
        bad += [good | {key: None}, good | {key: good[key].float()}, good | {key: good[key][..., :-1]}]
        bad.append(good | {key: [1.0]})
        bad += [good | {key: torch.full_like(good[key], value)} for value in (-1.0, math.inf)]
    for state in bad:
        with pytest.raises((TypeError, ValueError), match=r"state"):
            method.load_state_dict(state)
        assert str(method.state_dict()) == str(before)
    for key in method.state:  # what was given and what is kept are copies
        good[key].fill_(5.0)
        assert str(method.state_dict()) == str(before)
        method.load_state_dict(good)
        good[key].fill_(6.0)
        assert bool((method.state[key] == 5.0).all())
        method.load_state_dict(before)


@pytest.mark.parametrize("name", ALL)
def test_some_of_the_tasks(name):
    """A batch without some tasks leaves what was learned of them as it was."""
    method = ALL[name]()
    method.bind(5)
    step_of(method, gradients(5))
    before = {key: value.clone() for key, value in getattr(method, "state", {}).items()}
    step_of(method, gradients(3, seed=1), task_ids=[4, 0, 2])
    for key, value in getattr(method, "state", {}).items():
        if key in ("alpha", "weights"):
            assert torch.equal(value[:, [1, 3]], before[key][:, [1, 3]])
            assert not torch.equal(value, before[key])
            assert torch.allclose(value.sum(1), before[key].sum(1), rtol=1e-14)
    with pytest.raises(ValueError, match="task_ids: expected ids"):
        step_of(method, gradients(3))


@pytest.mark.parametrize("name", ["GradNorm", "CATS"])
def test_losses_are_needed(name):
    method = ALL[name]()
    for losses, error in ((None, ValueError), (torch.ones(3), ValueError), ([1.0] * 4, TypeError)):
        with pytest.raises(error, match="losses: expected"):
            method(gradients(4), GROUPS, losses=losses)
    with pytest.raises(ValueError, match="losses: expected"), method.in_parts(GROUPS, 4, torch.device("cpu")) as step:
        step.vaccinate(gradients(4), GROUPS, None, None)
    assert method.state == {}
    assert method.step == 0


@pytest.mark.parametrize(
    ("name", "settings", "error"),
    [
        ("GradNorm", {"alpha": -1.0}, ValueError),
        ("GradNorm", {"lr": "1"}, TypeError),
        ("GradNorm", {"num_tasks": 0}, ValueError),
        ("CATS", {"budget": -1}, ValueError),
        ("CATS", {"lr": math.nan}, ValueError),
        ("CATS", {"dual_lr": True}, TypeError),
        ("CATS", {"interval": 0}, ValueError),
        ("CATS", {"interval": 1.5}, TypeError),
        ("CATS", {"floor": 1.0}, ValueError),
        ("MGDA", {"num_tasks": 1.0}, TypeError),
    ],
)
def test_bad_settings(name, settings, error):
    with pytest.raises(error, match=f"{next(iter(settings))}: expected"):
        make(name, **settings)


def test_other_groups_than_before_are_refused():
    method = methods.CATS()
    step_of(method, gradients(4))
    with pytest.raises(ValueError, match="groups: expected the 3 groups"):
        method(J, ONE, task_ids=[0, 1], losses=torch.ones(2))


@pytest.mark.parametrize("name", ALL)
def test_bind(name):
    method = ALL[name]()
    method.bind(4)
    with pytest.raises(ValueError, match="num_tasks 5"):
        method.bind(5)
    assert method.num_tasks == 4
