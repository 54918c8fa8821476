"""GradVac, the object: the functional call with its state, and the state through checkpoints, subsets and errors."""

import subprocess
import sys
import textwrap

import pytest
import torch
from cases import LAYOUTS, inside, task_gradients

import gradvac_kernels as gvk

GROUPS = LAYOUTS["ragged"]
K, N = len(GROUPS), 4


def gradients(step, tasks=N, dtype=torch.float32):
    return task_gradients(tasks, GROUPS, step=step, dtype=dtype)


def same(found, want):
    """The fields of two vaccinations, bit for bit, NaN for NaN."""
    return all(torch.equal(torch.nan_to_num(a, nan=9.0), torch.nan_to_num(b, nan=9.0)) for a, b in zip(found, want))


def snapshot(method):
    return method.step, method.num_tasks, method.seed, None if method.ema is None else method.ema.clone()


def unchanged(method, before):
    step, num_tasks, seed, ema = before
    assert (method.step, method.num_tasks, method.seed) == (step, num_tasks, seed)
    assert (method.ema is None) if ema is None else torch.equal(method.ema, ema)


def after(steps, **settings):
    method = gvk.GradVac(beta=0.1, seed=5, **settings)
    for step in range(steps):
        method(gradients(step), GROUPS)
    return method


# ------------------------------------------------------------------------------------------------------------- calls


@pytest.mark.parametrize("settings", [{}, {"vaccinated": (2, 0)}, {"vaccinated": ()}, {"beta": 1.0}, {"seed": -3}])
def test_equals_the_functional_call_step_by_step(settings):
    method = gvk.GradVac(**settings)
    ema = torch.zeros(K, N, N, dtype=torch.float64)
    assert (method.step, method.ema) == (0, None)
    for step in range(5):
        found = method(gradients(step), GROUPS)
        want = gvk.vaccinate(gradients(step), GROUPS, ema, **settings, step=step)
        assert same(found, want)
        assert torch.equal(method.ema, ema)
        assert method.ema.dtype == torch.float64
        assert method.step == step + 1


def test_the_defaults_are_the_paper_s():
    method = gvk.GradVac()
    assert (method.beta, method.vaccinated, method.target, method.num_tasks) == (1e-2, None, None, None)


def test_a_constant_target_has_no_moving_average():
    method = gvk.GradVac(target=0.5, seed=2)
    for step in range(3):
        found = method(gradients(step), GROUPS)
        assert same(found, gvk.vaccinate(gradients(step), GROUPS, None, target=0.5, seed=2, step=step))
        assert method.ema is None
    assert method.state_dict() == {"ema": None, "num_tasks": N, "seed": 2, "step": 3}
    fresh = gvk.GradVac(target=0.5)
    fresh.load_state_dict(method.state_dict())
    assert same(fresh(gradients(3), GROUPS), method(gradients(3), GROUPS))


def test_nobody_vaccinated_is_the_plain_sum():
    grads = gradients(0)
    found = gvk.GradVac(vaccinated=())(grads, GROUPS)
    assert bool((found.weights == 1).all())
    assert not found.corrected.any()
    # summed in float64, rounded once to float32: half a unit, 2^-24 of the sum
    want = inside(GROUPS, grads.double().sum(0))
    assert bool(((inside(GROUPS, found.gradient) - want).abs() <= 2.0**-24 * 1.0001 * want.abs()).all())


def test_out_is_where_the_update_goes():
    out = torch.full((GROUPS.numel,), torch.nan)
    found = gvk.GradVac()(gradients(0), GROUPS, out=out)
    assert found.gradient is out
    assert torch.equal(out, gvk.GradVac()(gradients(0), GROUPS).gradient)


# ---------------------------------------------------------------------------------------------- numbers of tasks


def test_the_first_call_says_how_many_tasks_there_are():
    method = gvk.GradVac()
    method(gradients(0), GROUPS)
    assert method.num_tasks == N
    with pytest.raises(ValueError, match="task_ids: expected ids for the 2 of 4 tasks"):
        method(gradients(1, 2), GROUPS)
    method(gradients(1, 2), GROUPS, task_ids=[3, 1])
    assert method.ema.shape == (K, N, N)


@pytest.mark.parametrize("target", [None, 0.5])
@pytest.mark.parametrize("make", [list, torch.tensor])
def test_batches_of_some_tasks(make, target):
    method = gvk.GradVac(num_tasks=6, beta=0.2, seed=1, target=target)
    ema = None if target is not None else torch.zeros(K, 6, 6, dtype=torch.float64)
    for step, ids in enumerate(([4, 1, 3], [0], [5, 4, 3, 2, 1, 0], [2, 5])):
        found = method(gradients(step, len(ids)), GROUPS, task_ids=make(ids))
        want = gvk.vaccinate(
            gradients(step, len(ids)), GROUPS, ema, beta=0.2, target=target, task_ids=ids, seed=1, step=step
        )
        assert same(found, want)
        assert method.ema is None if target is not None else torch.equal(method.ema, ema)


BAD_CALLS = {
    "fewer rows without ids": ({"grads": gradients(9, 3)}, ValueError, "task_ids: expected ids for the 3 of 4 tasks"),
    "more rows without ids": ({"grads": gradients(9, 5)}, ValueError, "task_ids: expected ids for the 5 of 4 tasks"),
    "more rows than tasks": ({"grads": gradients(9, 5), "task_ids": [0, 1, 2, 3, 4]}, ValueError, "task_ids|ema|grads"),
    "an id past N": ({"task_ids": [0, 1, 2, 4]}, ValueError, r"task_ids: expected ids in 0\.\.3"),
    "an id twice": ({"task_ids": [0, 1, 2, 2]}, ValueError, "task_ids: expected every task at most once"),
    "too few ids": ({"task_ids": [0, 1]}, ValueError, r"task_ids: expected shape \[4\]"),
    "other ids": ({"task_ids": "abcd"}, TypeError, "task_ids: expected ints"),
    "fewer groups": (
        {"grads": gradients(9)[:, :38], "groups": GROUPS[:3]},
        ValueError,
        "groups: expected the 7 groups",
    ),
    "no groups": ({"groups": {"a": 1}}, TypeError, "groups: expected ParameterGroups, got dict"),
    "groups a number": ({"groups": 7}, TypeError, "groups: expected ParameterGroups, got int"),
    "other columns": ({"grads": gradients(9)[:, 1:]}, ValueError, "grads: expected shape"),
    "integers": ({"grads": torch.zeros(N, GROUPS.numel).int()}, TypeError, "grads: expected dtype"),
    "no rows": ({"grads": gradients(9)[:0], "task_ids": []}, ValueError, "grads: expected at least one row"),
    "grads a list": ({"grads": [[0.0]]}, TypeError, "grads: expected a tensor, got list"),
    "grads a number": ({"grads": 0.0}, TypeError, "grads: expected a tensor, got float"),
    "grads a scalar": ({"grads": torch.tensor(0.0)}, ValueError, "grads: expected shape"),
    "a bad result": ({"out": torch.zeros(3)}, ValueError, "out: expected shape"),
}


@pytest.mark.parametrize("settings", [{}, {"target": 0.3}], ids=["moving", "constant"])
@pytest.mark.parametrize("case", BAD_CALLS)
def test_a_failing_call_changes_nothing(case, settings):
    changes, error, message = BAD_CALLS[case]
    if case == "fewer groups" and settings:
        pytest.skip("a constant target keeps nothing by group")
    method = after(2, **settings)
    before = snapshot(method)
    out = torch.full((GROUPS.numel,), 123.0)
    with pytest.raises(error, match=message):
        method(**({"grads": gradients(9), "groups": GROUPS, "out": out} | changes))
    unchanged(method, before)
    assert bool((out == 123.0).all())
    assert same(method(gradients(2), GROUPS), after(2, **settings)(gradients(2), GROUPS))


@pytest.mark.parametrize(
    "grads",
    [gradients(0)[:, 1:], gradients(0).int(), [[0.0]], 0.0, torch.zeros(2_000_000)],
    ids=["columns", "int", "list", "number", "one row"],
)
def test_a_failing_first_call_settles_nothing(grads):
    method = gvk.GradVac()
    groups = gvk.ParameterGroups.from_sizes({"a": len(grads)}) if getattr(grads, "ndim", 2) == 1 else GROUPS
    with pytest.raises((TypeError, ValueError), match="grads: expected"):
        method(grads, groups)
    unchanged(method, (0, None, 0, None))
    assert same(method(gradients(0, 2), GROUPS), gvk.GradVac()(gradients(0, 2), GROUPS))


@pytest.mark.parametrize("target", [None, 0.5])
def test_a_first_call_that_fails_late_settles_nothing(target):
    method = gvk.GradVac(target=target)
    with pytest.raises(ValueError, match="out: expected shape"):
        method(gradients(0), GROUPS, out=torch.zeros(3))
    with pytest.raises(ValueError, match="task_ids: expected every task at most once"):
        method(gradients(0), GROUPS, task_ids=[0, 1, 2, 2])
    unchanged(method, (0, None, 0, None))


# ------------------------------------------------------------------------------------- what survives an odd step


def test_targets_survive_a_step_with_fewer_tasks_of_another_type():
    method = after(6, num_tasks=N)
    before = method.ema.clone()
    assert bool((before[0] != 0).any())
    ids = [2, 0]
    method(gradients(6, 2, torch.bfloat16), GROUPS, task_ids=ids)
    assert method.ema.dtype == torch.float64
    touched = torch.zeros(N, N, dtype=torch.bool)
    touched[2, 0] = touched[0, 2] = True
    assert torch.equal(method.ema[:, ~touched], before[:, ~touched])
    measured = torch.tensor(GROUPS.sizes) > 0
    assert bool((method.ema[:, touched] != before[:, touched])[measured].all())
    want = before.clone()
    gvk.vaccinate(gradients(6, 2, torch.bfloat16), GROUPS, want, beta=0.1, task_ids=ids, seed=5, step=6)
    assert torch.equal(method.ema, want)
    # and goes on from there
    found = method(gradients(7), GROUPS)
    assert same(found, gvk.vaccinate(gradients(7), GROUPS, want, beta=0.1, seed=5, step=7))


def test_a_constant_similarity_is_approached():
    """Cosine 0.8, 200 steps, beta 0.01: 0.8 (1 - 0.99^200) = 0.693; updated only on corrections it would stay 0."""
    grads, groups = torch.tensor([[1.0, 0.0], [0.8, 0.6]]), gvk.ParameterGroups.from_sizes({"a": 2})
    method = gvk.GradVac()
    for _ in range(200):
        method(grads, groups)
    # phi is 0.8 to within the float32 inputs, 6e-8
    assert method.ema[0, 0, 1] == method.ema[0, 1, 0] == pytest.approx(0.8 * (1 - 0.99**200), abs=1e-7)


# ------------------------------------------------------------------------------------------------------ checkpoints


def test_a_loaded_state_continues_bit_for_bit():
    method = after(4)
    state = method.state_dict()
    assert set(state) == {"ema", "num_tasks", "seed", "step"}
    fresh = gvk.GradVac(beta=0.1)  # the seed comes with the state
    fresh.load_state_dict(state)
    for step in (4, 5):
        assert same(fresh(gradients(step), GROUPS), method(gradients(step), GROUPS))
        assert torch.equal(fresh.ema, method.ema)


def test_a_state_is_a_copy():
    method = after(2)
    state = method.state_dict()
    kept = state["ema"].clone()
    fresh = gvk.GradVac(beta=0.1)
    fresh.load_state_dict(state)
    method(gradients(2), GROUPS)
    fresh(gradients(3), GROUPS)
    assert torch.equal(state["ema"], kept)
    assert (state["step"], state["num_tasks"]) == (2, N)


def test_a_fresh_state_resets():
    method = after(2)
    method.load_state_dict(gvk.GradVac(seed=8).state_dict())
    assert (method.ema, method.step, method.seed) == (None, 0, 8)
    assert same(method(gradients(0), GROUPS), gvk.GradVac(beta=0.1, seed=8)(gradients(0), GROUPS))


def test_checkpoints_continue_in_a_fresh_process(tmp_path):
    method = after(3, vaccinated=(1, 3))
    torch.save(method.state_dict(), tmp_path / "state.pt")
    torch.save([gradients(step) for step in range(3, 6)], tmp_path / "grads.pt")
    code = f"""
        import torch
        import gradvac_kernels as gvk

        torch.set_num_threads(1)
        method = gvk.GradVac(beta=0.1, vaccinated=(1, 3))
        method.load_state_dict(torch.load("state.pt", weights_only=True))
        groups = gvk.ParameterGroups.from_sizes({dict(zip(GROUPS.names, GROUPS.sizes))})
        results = [tuple(method(grads, groups)) for grads in torch.load("grads.pt", weights_only=True)]
        torch.save((results, method.state_dict()), "results.pt")
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, check=True, timeout=120)
    results, state = torch.load(tmp_path / "results.pt", weights_only=True)
    for step, found in enumerate(results, start=3):
        assert same(found, method(gradients(step), GROUPS))
    assert torch.equal(state["ema"], method.ema)
    assert (state["step"], state["num_tasks"], state["seed"]) == (6, N, 5)


BAD_STATES = {
    "no dict": (lambda s: list(s.items()), ValueError, "state: expected a dict .*, got list"),
    "nothing": (lambda s: {}, ValueError, r"state: expected a dict with exactly the keys .*, got \[\]"),
    "a key missing": (lambda s: {n: s[n] for n in s if n != "step"}, ValueError, "state: expected a dict with exactly"),
    "a key more": (lambda s: s | {"beta": 0.1}, ValueError, "state: expected a dict .*, got .*'beta'"),
    "a key renamed": (lambda s: {n.replace("ema", "phi"): s[n] for n in s}, ValueError, "state: .* 'phi'"),
    "a float step": (lambda s: s | {"step": 3.0}, TypeError, r"state\['step'\]: expected an int"),
    "a negative step": (lambda s: s | {"step": -1}, ValueError, r"state\['step'\]: expected at least 0"),
    "no seed": (lambda s: s | {"seed": None}, TypeError, r"state\['seed'\]: expected an int"),
    "a large seed": (lambda s: s | {"seed": 2**63}, ValueError, r"state\['seed'\]: expected an int of 64 bits"),
    "no tasks": (lambda s: s | {"num_tasks": 0}, ValueError, r"state\['num_tasks'\]: expected at least 1"),
    "other tasks": (lambda s: s | {"num_tasks": 3}, ValueError, r"state\['num_tasks'\]: expected 4, got 3"),
    "tasks a float": (lambda s: s | {"num_tasks": 4.0}, TypeError, r"state\['num_tasks'\]: expected an int"),
    "ema a list": (lambda s: s | {"ema": s["ema"].tolist()}, TypeError, r"state\['ema'\]: expected a tensor, got list"),
    "ema float32": (lambda s: s | {"ema": s["ema"].float()}, TypeError, r"state\['ema'\]: expected dtype float64"),
    "ema of fewer tasks": (lambda s: s | {"ema": s["ema"][:, :3, :3]}, ValueError, r"state\['ema'\]: expected shape"),
    "ema flat": (lambda s: s | {"ema": s["ema"][0]}, ValueError, r"state\['ema'\]: expected shape"),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_a_bad_state_changes_nothing(case):
    change, error, message = BAD_STATES[case]
    method = after(2)
    before = snapshot(method)
    with pytest.raises(error, match=message):
        method.load_state_dict(change(after(3).state_dict()))
    unchanged(method, before)


def test_targets_of_an_unknown_number_of_tasks_are_refused():
    state = after(3).state_dict() | {"num_tasks": None}
    fresh = gvk.GradVac()
    with pytest.raises(ValueError, match="num_tasks"):
        fresh.load_state_dict(state)
    unchanged(fresh, (0, None, 0, None))


def test_targets_for_a_constant_target_are_refused():
    method = gvk.GradVac(target=0.5)
    with pytest.raises(ValueError, match=r"state\['ema'\]: expected None for a method with a constant target"):
        method.load_state_dict(after(2).state_dict())
    unchanged(method, (0, None, 0, None))


# ------------------------------------------------------------------------------------------------------ construction


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"beta": -0.1}, ValueError, r"beta: expected a number in \[0, 1\], got -0.1"),
        ({"beta": 1.5}, ValueError, "beta: expected a number in"),
        ({"beta": float("nan")}, ValueError, "beta: expected a number in"),
        ({"beta": "0.1"}, TypeError, "beta: expected a float, got '0.1'"),
        ({"beta": None}, TypeError, "beta: expected a float"),
        ({"target": 1.1}, ValueError, r"target: expected a cosine in \[-1, 1\], got 1.1"),
        ({"target": float("nan")}, ValueError, "target: expected a cosine"),
        ({"target": True}, TypeError, "target: expected a float"),
        ({"num_tasks": 0}, ValueError, "num_tasks: expected at least 1, got 0"),
        ({"num_tasks": 2.0}, TypeError, "num_tasks: expected an int"),
        ({"num_tasks": True}, TypeError, "num_tasks: expected an int"),
        ({"seed": 0.5}, TypeError, "seed: expected an int"),
        ({"seed": 2**63}, ValueError, "seed: expected an int of 64 bits"),
        ({"vaccinated": 1}, TypeError, "vaccinated: expected .* ints"),
        ({"vaccinated": "de"}, TypeError, "vaccinated: expected ints"),
        ({"vaccinated": (0.5,)}, TypeError, "vaccinated: expected ints"),
        ({"vaccinated": (True,)}, TypeError, "vaccinated: expected ints"),
        ({"vaccinated": (-1,)}, ValueError, "vaccinated: expected ids"),
        ({"vaccinated": (0, 3), "num_tasks": 3}, ValueError, r"vaccinated: expected ids in 0\.\.2"),
    ],
)
def test_bad_settings(settings, error, message):
    with pytest.raises(error, match=message):
        gvk.GradVac(**settings)


def test_capturable_keeps_the_step_in_a_tensor():
    groups = gvk.ParameterGroups.from_sizes({"a": 40, "b": 70})
    methods = [gvk.GradVac(beta=0.3, seed=5, capturable=capturable) for capturable in (False, True)]
    for step in range(4):
        grads = torch.randn(5, 110, generator=torch.Generator().manual_seed(step))
        plain, counted = (method(grads, groups) for method in methods)
        assert torch.equal(plain.weights, counted.weights)
    tensor = methods[1]._step
    methods[1](grads, groups)
    assert methods[1]._step is tensor  # what a captured graph counts on
    assert methods[1].step == methods[0].step + 1 == 5
    assert methods[1].state_dict()["step"] == 5
    fresh = gvk.GradVac(beta=0.3, capturable=True)
    fresh.load_state_dict(methods[0].state_dict())
    assert torch.equal(fresh(grads, groups).weights, methods[0](grads, groups).weights)
    first_in_inference = gvk.GradVac(capturable=True)
    with torch.inference_mode():
        first_in_inference(grads, groups)
    first_in_inference(grads, groups)
    assert first_in_inference.step == 2
    with pytest.raises(TypeError, match="capturable: expected a bool, got 1"):
        gvk.GradVac(capturable=1)
