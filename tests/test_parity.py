"""Every backend against the oracle: Algorithm 1 on explicit float64 vectors."""

import pytest
import torch
from cases import LAYOUTS, inside, oracle_run, relative_error, task_gradients

import gradvac_kernels as gvk

# The Gram is within 1e-7 |g_i||g_j|; the recurrence is float64 and amplifies it by about 1 / (1 - phi^2), which these
# cases keep below 4; the result is rounded once to float32, 6e-8. float64: 2^-53 sqrt(P), amplified alike.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6, torch.float64: 1e-12}
GRAM = {torch.float32: 1e-7, torch.bfloat16: 1e-7, torch.float16: 1e-7, torch.float64: 2e-14}
WIDE = {
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.float64: torch.float64,
}


def check_run(backend, T, layout, dtype, steps, *, vaccinated=None, zero_rows=False, target=None, skew=0, device="cpu"):
    if backend == "triton" and device == "cpu":  # the interpreter takes a second for what a kernel does in microseconds
        steps = min(steps, 5 if T <= 5 else 2 if T <= 8 else 1)
    groups = LAYOUTS[layout]
    expected = oracle_run(T, layout, dtype, steps, vaccinated, zero_rows, target)
    ema = None if target is not None else torch.zeros(len(groups), T, T, dtype=torch.float64, device=device)
    tolerance = TOLERANCE[dtype]
    turned = 0
    for step in range(steps):
        grads = task_gradients(T, groups, step=step, dtype=dtype, zero_rows=zero_rows, skew=skew, device=device)
        wide = torch.full((groups.numel + 2 * skew,), torch.nan, dtype=WIDE[dtype], device=device)
        out = wide[skew : skew + groups.numel]
        found = gvk.vaccinate(
            grads,
            groups,
            ema,
            beta=0.1,
            target=target,
            vaccinated=vaccinated,
            seed=7,
            step=step,
            out=out,
            backend=backend,
        )
        want = expected[step]
        assert found.gradient is out
        found = type(found)(*(result.cpu() for result in found))
        assert relative_error(inside(groups, found.gradient), inside(groups, want.gradient)) <= tolerance
        lengths = torch.stack([grads[:, begin:end].double().norm(dim=1) for begin, end in groups.bounds.tolist()]).cpu()
        # a weight matters by the length of what it multiplies
        assert ((found.weights - want.weights) * lengths).abs().max() <= tolerance * (
            want.weights * lengths
        ).abs().max()
        scale = lengths[:, :, None] * lengths[:, None, :]
        assert bool(((found.gram - want.gram).abs() <= GRAM[dtype] * scale).all())
        assert torch.equal(found.similarity.isnan(), want.similarity.isnan())
        assert torch.allclose(found.similarity, want.similarity, rtol=0, atol=tolerance, equal_nan=True)
        if ema is not None:
            assert (ema.cpu() - want.ema).abs().max() <= tolerance
        turned += int(found.corrected.sum())
        # a pair may differ only where phi is the target to within the tolerance
        differ = found.corrected != want.corrected
        assert differ.sum() <= 1e-3 * differ.numel()
    return turned


@pytest.mark.parametrize("layout", ["one", "ragged", "aligned"])
@pytest.mark.parametrize("T", [1, 2, 3, 5, 8])
def test_float32_over_40_steps(backend, T, layout):
    assert (check_run(backend, T, layout, torch.float32, 40) > 0) == (T > 1)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("T", [3, 16, 18])
def test_groups_of_several_segments(backend, T, dtype):
    if backend == "triton" and T == 16:
        pytest.skip("seconds in the interpreter, for what 3 and 18 tasks show")
    assert check_run(backend, T, "long", dtype, 2, vaccinated=(0, T - 1)) > 0


@pytest.mark.parametrize("T", [16, 17, 33, 100])
def test_many_tasks_with_a_subset_vaccinated(backend, T):
    assert check_run(backend, T, "ragged", torch.float32, 40 if T < 100 else 5, vaccinated=(0, T // 2, T - 1)) > 0


@pytest.mark.parametrize("T", [20, 100, 128])
def test_many_tasks_all_vaccinated(backend, T):
    if backend == "triton" and T > 20:
        pytest.skip("a minute in the interpreter, where 100 tasks are seen with some of them vaccinated")
    assert check_run(backend, T, "one", torch.float32, 2) > 0


@pytest.mark.parametrize("T", [2, 7, 19])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types(backend, T, dtype):
    some = (0, 9, 18) if backend == "triton" and T == 19 else None  # all take long in the interpreter
    assert check_run(backend, T, "ragged", dtype, 10, vaccinated=some) > 0


def test_several_hundred_steps(backend):
    assert check_run(backend, 4, "aligned", torch.float32, 300) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unaligned_strided_rows(backend, dtype):
    assert check_run(backend, 6, "ragged", dtype, 5, skew=3) > 0


@pytest.mark.parametrize("vaccinated", [(), (2,), (4, 0)])
def test_subsets(backend, vaccinated):
    turned = check_run(backend, 5, "ragged", torch.float32, 40, vaccinated=vaccinated)
    assert (turned > 0) == bool(vaccinated)


def test_zero_rows(backend):
    assert check_run(backend, 5, "ragged", torch.float32, 20, zero_rows=True) > 0


@pytest.mark.parametrize("target", [-1.0, -0.3, 0.0, 0.5, 1.0])
def test_constant_targets(backend, target):
    assert (check_run(backend, 5, "ragged", torch.float32, 3, target=target) > 0) == (target > -1.0)


def test_tasks_by_id(backend):
    """Rows of a batch that holds some of the tasks, in any order, use and update those tasks' entries."""
    groups, N = LAYOUTS["ragged"], 6
    generator = torch.Generator().manual_seed(3)
    start = torch.rand(len(groups), N, N, generator=generator, dtype=torch.float64)
    emas = [start.clone(), start.clone()]
    for step, ids in enumerate(([4, 1, 3], [0], [5, 4, 3, 2, 1, 0], [2, 5])):
        grads = task_gradients(len(ids), groups, step=step)
        arguments = {"task_ids": ids, "vaccinated": [1, 2, 5], "beta": 0.2, "step": step}
        before = emas[0].clone()
        found = gvk.vaccinate(grads, groups, emas[0], backend=backend, **arguments)
        want = gvk.reference.vaccinate(grads, groups, emas[1], **arguments)
        assert relative_error(found.gradient, want.gradient) <= 1e-6
        assert torch.allclose(emas[0], emas[1], rtol=0, atol=1e-6)
        untouched = torch.ones(N, dtype=torch.bool)
        untouched[[i for i in ids if i in (1, 2, 5)]] = False
        assert torch.equal(emas[0][:, untouched], before[:, untouched])
        assert not torch.equal(emas[0], before) or ids == [0]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("T", [1, 5, 8, 18])
def test_it_returns_the_gram(backend, T, dtype):
    """The same bits, of the whole buffer and of a slab."""
    if backend == "triton" and (T in (1, 8) or dtype in (torch.float16, torch.float64)):
        pytest.skip("seconds in the interpreter, for what others show")
    groups = LAYOUTS["whole"]
    grads = task_gradients(T, groups, dtype=dtype)
    for some in (groups, groups[1:4]):
        begin = groups.offsets[some.first]
        columns = grads[:, begin : begin + some.numel]
        found = gvk.vaccinate(columns, some, None, target=0.5, vaccinated=[0], backend=backend).gram
        assert torch.equal(found, gvk.gram(columns, some, backend=backend))


def test_given_order(backend):
    groups, T = LAYOUTS["ragged"], 4
    grads = task_gradients(T, groups)
    order = gvk.task_order(len(groups), T, seed=5, step=11).flip(2).contiguous()
    emas = [torch.full((len(groups), T, T), 0.4, dtype=torch.float64) for _ in range(3)]
    found = gvk.vaccinate(grads, groups, emas[0], order=order, backend=backend)
    want = gvk.reference.vaccinate(grads, groups, emas[1], order=order)
    other = gvk.vaccinate(grads, groups, emas[2], backend=backend)
    assert torch.allclose(found.weights, want.weights, rtol=1e-6)
    assert not torch.allclose(found.weights, other.weights, rtol=1e-3)


def test_vector_from_the_literature(backend):
    """J = [[-4, 1, 1], [6, 1, 1]]: by hand from Algorithm 1, beta 1/2."""
    grads, groups = torch.tensor([[-4.0, 1, 1], [6, 1, 1]]), gvk.ParameterGroups.from_sizes({"all": 3})
    ema = torch.zeros(1, 2, 2, dtype=torch.float64)
    first = gvk.vaccinate(grads, groups, ema, beta=0.5, backend=backend)
    assert torch.allclose(first.weights, torch.tensor([[2.2222, 1.5789]], dtype=torch.float64), atol=5e-5)
    assert ema[0, 0, 1] == ema[0, 1, 0] == pytest.approx(-0.42060, abs=5e-6)
    second = gvk.vaccinate(grads, groups, ema, beta=0.5, step=1, backend=backend)
    assert torch.allclose(second.weights, torch.tensor([[1.8580, 1.4064]], dtype=torch.float64), atol=5e-5)
    assert ema[0, 0, 1] == pytest.approx(-0.63089, abs=5e-6)
    fixed = gvk.vaccinate(grads, groups, None, target=0.5, backend=backend)
    assert torch.allclose(fixed.weights, torch.tensor([[2.67583, 1.79381]], dtype=torch.float64), atol=5e-6)


def test_a_step_in_a_tensor(backend):
    groups, T = LAYOUTS["ragged"], 4
    grads = task_gradients(T, groups)
    emas = [torch.zeros(len(groups), T, T, dtype=torch.float64) for _ in range(3)]
    counted = gvk.vaccinate(grads, groups, emas[0], seed=2, step=torch.tensor([1 << 40]), backend=backend)
    found = gvk.vaccinate(grads, groups, emas[1], seed=2, step=1 << 40, backend=backend)
    want = gvk.reference.vaccinate(grads, groups, emas[2], seed=2, step=torch.tensor(1 << 40))
    assert torch.equal(counted.weights, found.weights)
    assert torch.equal(emas[0], emas[1])
    assert torch.allclose(found.weights, want.weights, rtol=1e-6)
