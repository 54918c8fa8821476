"""An independent implementation: TorchJD's GradVac, on equal orders.

TorchJD (0.18) also works on the Gramian, with a recurrence of its own: it keeps C and C G, and takes |g'_i|^2 as
c_i' G c_i at each pair. What differs by design:
  - it knows no groups (one aggregator a group, each with its moving average) and no subsets of tasks;
  - ``eps`` (1e-8 unless told) is added to |g'_i||g_j| and to |g_j| sqrt(1 - hat^2): a relative change of about
    eps / (|g_i||g_j|), nothing at norms of 1e4 and everything at norms of 1e-5. ``eps=0`` switches it off;
  - phi and the targets are not capped, and zero rows are not left out: the gradients here are neither;
  - orders come from torch's global generator: one randperm of the other rows for each row, in turn.
"""

import pytest
import torch
from cases import relative_error

import gradvac_kernels as gvk

aggregation = pytest.importorskip("torchjd.aggregation")

GROUPS = gvk.ParameterGroups.from_sizes({"a": 40, "b": 700, "c": 33})


@pytest.fixture(autouse=True)
def _one_thread(_two_threads):
    """These matrices are too small to share; conftest's fixture restores the number."""
    torch.set_num_threads(1)


def gradients(num_tasks, step, norm=None):
    """[T, P] float64: rows that share a direction, some against it; ``norm`` scales each to about that length."""
    generator = torch.Generator().manual_seed(100 * num_tasks + step)
    agreement = torch.linspace(-0.6, 1.2, num_tasks, dtype=torch.float64)[:, None]
    noise = torch.randn(num_tasks, GROUPS.numel, generator=generator, dtype=torch.float64)
    rows = noise + agreement * torch.randn(GROUPS.numel, generator=generator, dtype=torch.float64)
    return rows if norm is None else rows * (norm / rows.norm(dim=1, keepdim=True))


def drawn(num_tasks, seed, skip_own=False):
    """[K, T, T-1]: what TorchJD will draw, group after group, once torch is seeded with ``seed``.

    GradVac permutes the other rows of each row; PCGrad permutes all rows and skips the row itself.
    """
    torch.manual_seed(seed)
    order = torch.empty(len(GROUPS), num_tasks, num_tasks - 1, dtype=torch.int64)
    for k in range(len(GROUPS)):
        for i in range(num_tasks):
            others = torch.tensor([j for j in range(num_tasks) if j != i])
            if skip_own:
                permutation = torch.randperm(num_tasks)
                order[k, i] = permutation[permutation != i]
            else:
                order[k, i] = others[torch.randperm(num_tasks - 1)]
    return order


class TorchJD:
    """One aggregator a group."""

    def __init__(self, beta, **settings):
        self.aggregators = [aggregation.GradVac(beta=beta, **settings) for _ in range(len(GROUPS))]

    def __call__(self, grads, seed):
        torch.manual_seed(seed)
        bounds = GROUPS.bounds.tolist()
        return torch.cat([a(grads[:, begin:end]) for a, (begin, end) in zip(self.aggregators, bounds)])

    @property
    def ema(self):
        return torch.stack([a.gramian_weighting._phi_t for a in self.aggregators])


def targets(num_tasks):
    return torch.zeros(len(GROUPS), num_tasks, num_tasks, dtype=torch.float64)


def compare(call, num_tasks, steps, tolerance, *, beta=0.3, norm=None, with_order=True, **settings):
    """The updates and the moving averages, step by step."""
    ema, theirs, corrected = targets(num_tasks), TorchJD(beta, **settings), 0
    for step in range(steps):
        grads = gradients(num_tasks, step, norm)
        order = drawn(num_tasks, seed=step) if with_order else None
        found = call(grads, GROUPS, ema, beta=beta, order=order, step=step)
        assert relative_error(found.gradient, theirs(grads, seed=step)) <= tolerance
        assert (ema - theirs.ema).abs().max() <= tolerance
        corrected += int(found.corrected.sum())
    pairs = steps * len(GROUPS) * num_tasks * (num_tasks - 1)
    assert 0 < corrected < pairs
    assert float(ema.abs().max()) > 0.05


# Both are float64 recurrences: sqrt(700) 2^-53 in a Gram and a few 2^-53 in each of tens of corrections, amplified by
# 1 / (1 - phi^2) < 4, stay below 1e-12; the moving averages carry such errors on, and do not grow them.
EXACT = 1e-12


@pytest.mark.parametrize("num_tasks", [2, 3, 5, 12])
def test_equal_orders(backend, num_tasks):
    def call(*arguments, **more):
        return gvk.vaccinate(*arguments, **more, backend=backend)

    compare(call, num_tasks, 3 if (backend, num_tasks) == ("triton", 12) else 10, EXACT, eps=0.0)


@pytest.mark.parametrize("num_tasks", [2, 4])
def test_the_oracle_too(num_tasks):
    compare(gvk.reference.vaccinate, num_tasks, 10, EXACT, eps=0.0)


def test_two_tasks_have_one_order(backend):
    def call(*arguments, **more):
        return gvk.vaccinate(*arguments, **more, backend=backend)

    compare(call, 2, 20, EXACT, eps=0.0, with_order=False)


@pytest.mark.parametrize("norm", [1e2, 1e4])
def test_the_epsilon_of_theirs_fades_with_the_norm(norm):
    # a group holds at least 33 of the 773 columns, so norms there are about norm / 5 or more: phi and each correction
    # change by eps / |g|^2 = 25e-8 / norm^2, amplified by less than 4, over tens of corrections
    compare(gvk.vaccinate, 5, 10, 1e-5 / norm**2 + EXACT, norm=norm)


def test_the_epsilon_of_theirs_switches_the_method_off_for_small_gradients():
    """At norms of 1e-5 TorchJD reads similarities a hundred times too small; scaled up, it agrees with us."""
    num_tasks, norm = 3, 1e-5
    order, ours = drawn(num_tasks, seed=0), targets(num_tasks)
    small, large = TorchJD(1.0), TorchJD(1.0)
    found = gvk.vaccinate(gradients(num_tasks, 0, norm), GROUPS, ours, beta=1.0, order=order)
    small(gradients(num_tasks, 0, norm), seed=0)
    update = large(gradients(num_tasks, 0, 1e4), seed=0)
    assert small.ema.abs().max() < 0.05 * ours.abs().max()
    assert (large.ema - ours).abs().max() <= 1e-10
    assert relative_error(found.gradient * (1e4 / norm), update) <= 1e-10


def test_float32_gradients(backend):
    """The same from float32 rows: our Gram is within 1e-7 |g_i||g_j|, theirs gets the same rows in float64."""
    num_tasks, ema, theirs = 4, targets(4), TorchJD(0.3, eps=0.0)
    for step in range(10):
        grads = gradients(num_tasks, step).float()
        found = gvk.vaccinate(grads, GROUPS, ema, beta=0.3, order=drawn(num_tasks, seed=step), backend=backend)
        # amplified by less than 4, over a few corrections; the result is rounded once to float32
        assert relative_error(found.gradient, theirs(grads.double(), seed=step)) <= 1e-6
        assert (ema - theirs.ema).abs().max() <= 1e-6


def test_a_constant_target_of_zero_is_pcgrad():
    """Against TorchJD's PCGrad (Yu et al., 2020)."""
    num_tasks, theirs = 5, aggregation.PCGrad()
    for step in range(5):
        grads = gradients(num_tasks, step)
        order = drawn(num_tasks, seed=step, skip_own=True)
        found = gvk.vaccinate(grads, GROUPS, None, target=0.0, order=order)
        torch.manual_seed(step)
        want = torch.cat([theirs(grads[:, begin:end]) for begin, end in GROUPS.bounds.tolist()])
        assert relative_error(found.gradient, want) <= EXACT
        assert found.corrected.any()
