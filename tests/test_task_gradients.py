"""From losses to .grad: every gradient against torch.autograd.grad, every update against the oracle."""

import copy
import io

import pytest
import torch
from torch import nn

import gradvac_kernels as gvk

TASKS = ["de", "fr", "hi"]
BETA = 0.2


@pytest.fixture(autouse=True)
def _one_thread(_two_threads):
    """These models are too small to share; conftest's fixture restores the number."""
    torch.set_num_threads(1)


class Towers(nn.Module):
    """Shared layers, one head a task, and a head that nobody uses."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh())
        self.heads = nn.ModuleDict({name: nn.Linear(5, 4) for name in [*TASKS, "idle"]})

    def forward(self, x, name):
        return self.heads[name](self.shared(x))


def towers(dtype=torch.float32):
    torch.manual_seed(0)
    return Towers().to(dtype)


def batch(name, step=0, rows=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(10 * step + TASKS.index(name))
    x = torch.randn(rows, 6, generator=generator)
    direction = torch.randn(4, 6, generator=torch.Generator().manual_seed(99 + TASKS.index(name)))
    return x.to(dtype), (x @ direction.T).tanh().to(dtype)


def loss_of(model, name, step=0, dtype=torch.float32):
    x, y = batch(name, step, dtype=dtype)
    return (model(x, name) - y).square().mean()


def losses_of(model, names=TASKS, step=0, dtype=torch.float32):
    return {name: loss_of(model, name, step, dtype) for name in names}


def parameters_of(model, tasks):
    named = dict(model.named_parameters())
    return [named[slot.name] for slot in tasks.groups.parameters]


def columns_of(tensors, tasks):
    """[P]: a tensor a parameter, each in its columns; what pads a group is zero."""
    columns = torch.zeros(tasks.groups.numel, dtype=tensors[0].dtype)
    for slot, tensor in zip(tasks.groups.parameters, tensors, strict=True):
        columns[slot.offset : slot.offset + slot.numel] = tensor.detach().flatten()
    return columns


def explicit(model, tasks, losses):
    """[T, P]: torch.autograd.grad of each loss; zero where a loss does not use a parameter."""
    parameters, rows = parameters_of(model, tasks), []
    for loss in losses.values():
        grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        dense = [torch.zeros_like(p) if g is None else g.to_dense() for p, g in zip(parameters, grads)]
        rows.append(columns_of(dense, tasks))
    return torch.stack(rows)


def gradient_of(model, tasks):
    """[P]: what the optimizer will see, zero for None."""
    parameters = parameters_of(model, tasks)
    return columns_of([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters], tasks)


def new_targets(tasks):
    return torch.zeros(len(tasks.groups), len(tasks.tasks), len(tasks.tasks), dtype=torch.float64)


def task_gradients(model, tasks=TASKS, beta=BETA, **more):
    return gvk.TaskGradients(model, tasks, method=gvk.GradVac(beta=beta), **more)


def no_hooks(model):
    return not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


def close(found, want):
    # The Gram is within 1e-7 |g_i||g_j|, amplified by 1 / (1 - phi^2) of a few; rounded once to float32
    return torch.allclose(found, want, rtol=1e-5, atol=1e-6 * float(want.abs().max()))


def check_backward(model, tasks, losses, ema, step, names=None):
    """One short step against autograd and the oracle, which takes ``ema`` along."""
    rows = explicit(model, tasks, losses)
    ids = [tasks.tasks.index(name) for name in names or losses]
    want = gvk.reference.vaccinate(rows, tasks.groups, ema, beta=BETA, task_ids=ids, step=step)
    found = tasks.backward(losses)
    assert found is tasks.last
    assert close(gradient_of(model, tasks), want.gradient)
    assert torch.allclose(found.weights, want.weights, rtol=1e-5)
    assert torch.allclose(tasks.method.ema, ema, rtol=0, atol=1e-6)
    assert no_hooks(model)
    return rows


# ---------------------------------------------------------------------------------------------------- short and long


@pytest.mark.parametrize(
    "granularity", ["whole_model", "all_layer", "all_matrix", lambda name: name.rpartition(".")[2]]
)
def test_the_short_way_over_steps(granularity):
    model = towers()
    tasks = task_gradients(model, granularity=granularity)
    optimizer, ema = torch.optim.SGD(model.parameters(), lr=0.5), new_targets(tasks)
    for step in range(5):
        optimizer.zero_grad()
        check_backward(model, tasks, losses_of(model, step=step), ema, step)
        optimizer.step()
    assert bool((tasks.method.ema != 0).any())
    assert tasks.method.step == 5


def test_the_long_way_equals_the_short_way():
    short, long = towers(), towers()
    by_backward, by_task = task_gradients(short), task_gradients(long)
    for step in range(3):
        by_backward.backward(losses_of(short, step=step))
        for name in TASKS:
            with by_task.task(name):
                loss_of(long, name, step).backward()
        assert by_task.apply() is by_task.last
        assert torch.equal(gradient_of(short, by_backward), gradient_of(long, by_task))
        assert torch.equal(by_backward.method.ema, by_task.method.ema)


def test_captured_rows_are_autograd_s_bits():
    model = towers()
    tasks = task_gradients(model)
    losses = losses_of(model)
    want = explicit(model, tasks, losses)
    assert tasks.task_ids == ()
    assert tasks.grads.shape == (0, tasks.groups.numel)
    for row, (name, loss) in enumerate(losses.items()):
        with tasks.task(name):
            loss.backward()
        assert tasks.task_ids == tuple(range(row + 1))
        assert torch.equal(tasks.grads, want[: row + 1])  # zero + g is g
    tasks.apply()
    assert tasks.task_ids == ()
    assert tasks.grads.shape == (0, tasks.groups.numel)
    assert tasks.last.similarity.shape == (len(tasks.groups), 3, 3)


def test_losses_may_share_one_forward():
    model = towers()
    tasks = task_gradients(model)
    x, _ = batch("de")
    hidden = model.shared(x)
    losses = {name: model.heads[name](hidden).square().mean() for name in TASKS}
    check_backward(model, tasks, losses, new_targets(tasks), 0)


def test_one_loss_for_two_tasks():
    model = towers()
    tasks = task_gradients(model)
    loss = loss_of(model, "de")
    row = explicit(model, tasks, {"de": loss})[0]
    tasks.backward({"de": loss, "fr": loss})
    assert close(gradient_of(model, tasks), 2 * row)


def test_last():
    model = towers()
    tasks = task_gradients(model, granularity="all_matrix")
    assert tasks.last is None
    first = tasks.backward(losses_of(model))
    assert tasks.last is first
    assert first.weights.shape == (len(tasks.groups), 3)
    shared, head = tasks.groups.names.index("shared.0.weight"), tasks.groups.names.index("heads.de.weight")
    assert first.similarity[shared].isnan().equal(torch.eye(3, dtype=torch.bool))
    assert bool(first.similarity[head].isnan().all())  # of one task only: nothing to measure
    second = tasks.backward(losses_of(model, ["hi"], step=1))
    assert tasks.last is second
    assert second.weights.shape == (len(tasks.groups), 1)


def test_a_mean_is_the_sum_by_the_tasks_of_the_step():
    total, mean = towers(), towers()
    summed, averaged = task_gradients(total), task_gradients(mean, reduction="mean")
    for step, names in enumerate((TASKS, ["hi", "de"])):
        summed.backward(losses_of(total, names, step))
        averaged.backward(losses_of(mean, names, step))
        assert torch.equal(gradient_of(mean, averaged), gradient_of(total, summed) / len(names))
        assert torch.equal(averaged.last.weights, summed.last.weights)
        assert torch.equal(averaged.method.ema, summed.method.ema)


def test_any_method_will_do():
    seen = []

    def plain_sum(grads, groups, task_ids, out):
        seen.append((grads.clone(), groups, list(task_ids)))
        gvk.combine(grads, torch.ones(len(groups), len(grads)), groups, out=out)
        return gvk.Vaccination(out, *[torch.empty(0)] * 4)

    model = towers()
    tasks = gvk.TaskGradients(model, TASKS, method=plain_sum)
    losses = losses_of(model, ["hi", "de"])
    want = explicit(model, tasks, losses)
    tasks.backward(losses)
    ((grads, groups, ids),) = seen
    assert (groups, ids) == (tasks.groups, [2, 0])
    assert torch.equal(grads, want)
    assert close(gradient_of(model, tasks), want.sum(0))


# ---------------------------------------------------------------------------------------------------------- no copies


def test_gradients_lie_in_the_buffer_and_nowhere_else():
    model = towers()
    tasks = task_gradients(model)
    width = 4
    places = None
    for step in range(3):
        for row, name in enumerate(TASKS):
            with tasks.task(name):
                loss_of(model, name, step).backward()
                start = tasks.grads[row].data_ptr()
                for slot, parameter in zip(tasks.groups.parameters, parameters_of(model, tasks)):
                    assert parameter.grad.data_ptr() == start + width * slot.offset
        captured = tasks.grads.data_ptr()
        tasks.apply()
        result = tasks.last.gradient
        for slot, parameter in zip(tasks.groups.parameters, parameters_of(model, tasks)):
            if "idle" not in slot.name:
                assert parameter.grad.data_ptr() == result.data_ptr() + width * slot.offset
                assert parameter.grad.untyped_storage().data_ptr() == result.untyped_storage().data_ptr()
                assert parameter.grad.shape == parameter.shape
        places = places or (captured, result.data_ptr())
        assert places == (captured, result.data_ptr())  # the same memory in every step


@pytest.mark.skipif("cpu" not in gvk.available_backends(), reason="the reference converts blocks to float64")
def test_apply_allocates_nothing_of_the_size_of_the_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 200), nn.Linear(200, 100))
    tasks = gvk.TaskGradients(model, TASKS)
    for step in range(2):
        for seed, name in enumerate(TASKS):
            with tasks.task(name):
                x = torch.randn(2, 100, generator=torch.Generator().manual_seed(10 * step + seed))
                model(x).square().mean().backward()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            tasks.apply()
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    assert 0 < allocated < 4 * tasks.groups.numel / 20  # weights, similarities; a row would be 4 P bytes


# --------------------------------------------------------------------------------------- which tasks, how often, when


def test_micro_batches_add():
    model = towers()
    tasks = task_gradients(model)
    losses = [losses_of(model, step=step) for step in range(3)]
    parts = [explicit(model, tasks, micro) for micro in losses]
    for micro in losses[:2]:
        for name in TASKS:
            with tasks.task(name):
                micro[name].backward()
    with tasks.task("fr"):  # again, and twice within
        loss_of(model, "fr", 2).backward()
        loss_of(model, "fr", 2).backward()
    want = parts[0] + parts[1]
    want[1] = want[1] + parts[2][1] + parts[2][1]
    assert tasks.task_ids == (0, 1, 2)
    assert torch.equal(tasks.grads, want)  # the same additions, in the same order
    ema = new_targets(tasks)
    expected = gvk.reference.vaccinate(want, tasks.groups, ema, beta=BETA, task_ids=[0, 1, 2])
    tasks.apply()
    assert close(gradient_of(model, tasks), expected.gradient)
    tasks.backward(losses_of(model, step=5))  # and nothing of it is left
    rows = explicit(model, tasks, losses_of(model, step=5))
    expected = gvk.reference.vaccinate(rows, tasks.groups, ema, beta=BETA, step=1)
    assert close(gradient_of(model, tasks), expected.gradient)


def test_tasks_may_be_missing_and_come_in_any_order():
    model = towers()
    tasks = task_gradients(model)
    ema = new_targets(tasks)
    for step, names in enumerate((TASKS, ["hi", "de"], ["fr"], ["hi", "fr", "de"])):
        before = tasks.method.ema.clone() if step else None
        check_backward(model, tasks, losses_of(model, names, step), ema, step)
        if before is not None:
            absent = torch.tensor([name not in names for name in TASKS])
            assert torch.equal(tasks.method.ema[:, absent], before[:, absent])
            assert torch.equal(tasks.method.ema[:, :, absent], before[:, :, absent])


def test_rows_come_in_the_order_of_entering():
    model = towers()
    tasks = task_gradients(model)
    for name in ("hi", "de", "hi"):
        with tasks.task(name):
            loss_of(model, name).backward()
    assert tasks.task_ids == (2, 0)
    want = explicit(model, tasks, losses_of(model, ["hi", "de"]))
    assert torch.equal(tasks.grads, torch.stack([want[0] * 2, want[1]]))


def test_discard():
    model = towers()
    tasks = task_gradients(model)
    with tasks.task("de"):
        loss_of(model, "de").backward()
    tasks.discard()
    assert tasks.task_ids == ()
    with pytest.raises(RuntimeError, match="apply: expected captured gradients"):
        tasks.apply()
    check_backward(model, tasks, losses_of(model), new_targets(tasks), 0)


# ------------------------------------------------------------------------------------------------ kinds of parameters


def test_a_parameter_that_one_task_does_not_use_is_zero_in_its_row():
    model = towers()
    tasks = task_gradients(model, ["fr", "de"], granularity="all_matrix")
    tasks.backward({name: loss_of(model, name) for name in ("fr", "de")})  # rows full of other values
    model.zero_grad()
    with tasks.task("de"):
        loss_of(model, "de").backward()
    with tasks.task("fr"):
        loss_of(model, "fr").backward()
    for name, row in (("de", 1), ("fr", 0)):
        slot = next(s for s in tasks.groups.parameters if s.name == f"heads.{name}.weight")
        assert bool((tasks.grads[row, slot.offset : slot.offset + slot.numel] == 0).all())
        assert bool((tasks.grads[1 - row, slot.offset : slot.offset + slot.numel] != 0).all())
    tasks.apply()
    assert model.heads["de"].weight.grad is not None


def test_a_parameter_that_nobody_uses_is_left_alone():
    model = towers()
    tasks = task_gradients(model)
    model.heads["idle"].weight.grad = torch.ones_like(model.heads["idle"].weight)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    tasks.backward(losses_of(model, ["de", "fr"]))
    for head in ("idle", "hi"):
        assert model.heads[head].weight.grad is None
        assert model.heads[head].bias.grad is None
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == ("idle" in name or "hi" in name)


def test_tied_parameters():
    torch.manual_seed(0)
    embedding, output = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
    output.weight = embedding.weight
    model = nn.ModuleDict({"embedding": embedding, "middle": nn.Linear(6, 6), "output": output})
    tasks = task_gradients(model)
    assert [slot.name for slot in tasks.groups.parameters] == ["embedding.weight", "middle.weight", "middle.bias"]
    ema = new_targets(tasks)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        losses = {}
        for name in TASKS:
            words = torch.randint(11, (7,), generator=generator)
            scores = output(model["middle"](embedding(words)))
            losses[name] = nn.functional.cross_entropy(scores, words.flip(0))
        rows = check_backward(model, tasks, losses, ema, step)
        assert bool((rows[:, : 11 * 6] != 0).all())  # through both uses
        assert output.weight.grad is embedding.weight.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_groups_begin_with_a_cache_line(dtype):
    model = towers(dtype)
    tasks = task_gradients(model)
    for name in TASKS:
        with tasks.task(name):
            loss_of(model, name, dtype=dtype).backward()
    assert len(tasks.grads) == len(TASKS)
    for row in tasks.grads:
        assert all((row.data_ptr() + offset * dtype.itemsize) % 64 == 0 for offset in tasks.groups.offsets)


def test_frozen_parameters_have_no_columns_and_keep_their_grad():
    model = towers()
    frozen = model.shared[0].weight.requires_grad_(False)
    kept = frozen.grad = torch.full_like(frozen, 7.0)
    tasks = task_gradients(model)
    assert "shared.0.weight" not in [slot.name for slot in tasks.groups.parameters]
    assert sum(tasks.groups.sizes) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    check_backward(model, tasks, losses_of(model), new_targets(tasks), 0)
    assert frozen.grad is kept
    assert bool((kept == 7).all())


def test_a_parameter_frozen_later_gets_no_gradient():
    model = towers()
    tasks = task_gradients(model)
    tasks.backward(losses_of(model))
    model.shared[0].weight.requires_grad_(False)
    model.zero_grad()
    tasks.backward(losses_of(model, step=1))
    assert model.shared[0].weight.grad is None
    assert model.shared[0].bias.grad is not None


def test_scalars_and_empty_parameters():
    model = nn.ParameterDict({"scale": torch.tensor(2.0), "none": torch.zeros(0, 3), "rows": torch.ones(2, 3)})
    tasks = task_gradients(model, ["a", "b"], granularity="all_matrix")
    losses = {
        "a": model["scale"] * model["rows"].sum() + model["none"].sum(),
        "b": (model["scale"] * model["rows"]).square().sum(),
    }
    check_backward(model, tasks, losses, new_targets(tasks), 0)
    assert model["scale"].grad.shape == ()
    assert model["none"].grad.shape == (0, 3)


def test_sparse_gradients():
    torch.manual_seed(0)
    model = nn.ModuleDict({"embedding": nn.Embedding(9, 4, sparse=True), "head": nn.Linear(4, 2)})
    tasks = task_gradients(model)
    words = {"de": [0, 1, 1, 2], "fr": [1, 2, 5], "hi": [7]}

    def losses():
        return {
            name: model["head"](model["embedding"](torch.tensor(used))).square().mean() for name, used in words.items()
        }

    for name, loss in losses().items():
        with tasks.task(name):
            loss.backward()
    assert torch.allclose(tasks.grads, explicit(model, tasks, losses()), rtol=1e-6)  # repeated words add in any order
    tasks.discard()
    check_backward(model, tasks, losses(), new_targets(tasks), 0)
    grad = model["embedding"].weight.grad
    assert grad.layout == torch.strided
    assert bool((grad[[3, 4, 6, 8]] == 0).all())
    assert bool((grad[[0, 1, 2, 5, 7]] != 0).any(1).all())


class Transposed(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 3).t())

    def forward(self, x):
        return x.flatten(1)[:, :6] @ self.weight.t()


@pytest.mark.filterwarnings("error:grad and param do not obey the gradient layout contract")
@pytest.mark.parametrize("make", [lambda: nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last), Transposed])
def test_parameters_in_another_memory_order(make):
    """A fused optimizer walks the memory of a parameter and its gradient together: the strides have to agree."""
    torch.manual_seed(0)
    model, plain = make(), make()
    plain.load_state_dict(model.state_dict())
    tasks = gvk.TaskGradients(model, ["a", "b"], method=gvk.GradVac(vaccinated=()))
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1, fused=True) for m in (model, plain)]
    x = torch.randn(2, 3, 6, 6)
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        tasks.backward({"a": model(x).square().mean(), "b": model(x).sin().mean()})
        (plain(x).square().mean() + plain(x).sin().mean()).backward()
        for ours, theirs in zip(model.parameters(), plain.parameters()):
            assert ours.grad.stride() == theirs.grad.stride()
            assert torch.allclose(ours.grad, theirs.grad, rtol=1e-5, atol=1e-7)
        for optimizer in optimizers:
            optimizer.step()
    for ours, theirs in zip(model.parameters(), plain.parameters()):
        assert torch.allclose(ours, theirs, atol=1e-3)  # of steps of 0.1: Adam divides by small numbers


def test_the_rows_of_the_last_step_are_known():
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    tasks = gvk.TaskGradients(model, ["a", "b", "c"])
    tasks.backward({"c": model(torch.randn(3)).sum(), "a": model(torch.randn(3)).sum()})
    assert tasks.last_task_ids == (2, 0)
    assert tasks.task_ids == ()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"tasks": {"a", "b"}}, TypeError, "tasks: expected a sequence"),
        ({"method": gvk.GradVac}, TypeError, "method: expected a callable"),
        ({"method": gvk.GradVac(vaccinated=[2])}, ValueError, r"method.vaccinated: expected ids in 0..1, got \[2\]"),
    ],
)
def test_what_cannot_work_is_refused_at_once(changes, error, message):
    with pytest.raises(error, match=message):
        gvk.TaskGradients(**({"model": nn.Linear(2, 2), "tasks": ["a", "b"]} | changes))


def test_mixed_kinds_of_parameters_are_refused():
    model = towers()
    model.heads["fr"].double()
    with pytest.raises(ValueError, match=r"model: expected .* one dtype.*float32 on cpu, heads.fr\..*: torch.float64"):
        task_gradients(model)
    model = towers()
    model.heads["fr"].to("meta")
    with pytest.raises(ValueError, match=r"model: .* one device.*float32 on cpu, heads.fr\..*: torch.float32 on meta"):
        task_gradients(model)
    model.heads["fr"].requires_grad_(False)
    task_gradients(model)


def thaw(model):
    model.heads["idle"].weight.requires_grad_(True)


def replace(model):
    model.shared[0].bias = nn.Parameter(torch.zeros(8))


def add(model):
    model.extra = nn.Linear(2, 2)


def narrow(model):
    model.shared[0].bfloat16()


def reshape(model):
    model.shared[0].bias.data = torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (thaw, "model: expected the trainable parameters of before, got a new one, 'heads.idle.weight'"),
        (replace, "model: expected the trainable parameters of before, got a new one, 'shared.0.bias'"),
        (add, "model: expected the trainable parameters of before, got a new one, 'extra.weight'"),
        (narrow, "model: expected 'shared.0.weight' as before, torch.float32 .*, got torch.bfloat16"),
        (reshape, r"model: expected 'shared.0.bias' as before, .* of shape \[8\], got .* of shape \[2, 4\]"),
    ],
)
def test_a_model_that_changed_is_refused(change, message):
    model = towers()
    model.heads["idle"].weight.requires_grad_(False)
    tasks = task_gradients(model)
    change(model)
    with pytest.raises(ValueError, match=message), tasks.task("de"):
        pytest.fail("entered")
    assert no_hooks(model)
    assert tasks.task_ids == ()


# ----------------------------------------------------------------------------------------- what .grad held, and errors


def test_what_grad_held_is_back_after_task_and_replaced_by_apply():
    model = towers()
    tasks = task_gradients(model)
    held = []
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
        held.append(parameter.grad)
    model.shared[0].bias.grad = held[1] = None
    with tasks.task("de"):
        loss_of(model, "de").backward()
    for parameter, grad in zip(model.parameters(), held):
        assert parameter.grad is grad
        assert grad is None or bool((grad == 3).all())
    want = explicit(model, tasks, losses_of(model, ["de"]))
    tasks.apply()
    assert torch.equal(gradient_of(model, tasks), want[0])  # one task: its own gradient
    assert all(grad is None or bool((grad == 3).all()) for grad in held)


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise FloatingPointError("on purpose")


@pytest.mark.parametrize("where", ["before", "in", "after"])
def test_an_exception_drops_the_step_and_nothing_else(where):
    model, twin = towers(), towers()
    tasks, untroubled = task_gradients(model), task_gradients(twin)
    for each, its_model in ((tasks, model), (untroubled, twin)):
        each.backward(losses_of(its_model))
    held = [parameter.grad for parameter in model.parameters()]
    values = [None if grad is None else grad.clone() for grad in held]
    with tasks.task("fr"):
        loss_of(model, "fr", 1).backward()

    def fails():
        loss = loss_of(model, "de", 1)
        if where != "before":
            (Fails.apply(loss) if where == "in" else loss).backward()
        raise FloatingPointError

    with pytest.raises(FloatingPointError), tasks.task("de"):
        fails()
    assert no_hooks(model)
    assert tasks.task_ids == ()
    for parameter, grad, value in zip(model.parameters(), held, values):
        assert parameter.grad is grad
        assert grad is None or torch.equal(grad, value)
    assert tasks.method.step == 1
    with pytest.raises(RuntimeError, match="apply: expected captured gradients"):
        tasks.apply()
    for each, its_model in ((tasks, model), (untroubled, twin)):
        each.backward(losses_of(its_model, step=2))
    assert torch.equal(tasks.method.ema, untroubled.method.ema)
    assert torch.equal(gradient_of(model, tasks), gradient_of(twin, untroubled))


def test_an_exception_in_the_short_way():
    model = towers()
    tasks = task_gradients(model)
    losses = losses_of(model)
    with pytest.raises(FloatingPointError):
        tasks.backward(losses | {"fr": Fails.apply(losses["fr"])})
    assert tasks.task_ids == ()
    assert tasks.method.step == 0
    assert all(parameter.grad is None for parameter in model.parameters())
    assert no_hooks(model)
    check_backward(model, tasks, losses_of(model), new_targets(tasks), 0)


def test_a_failing_method_leaves_grad_alone():
    def fails(grads, groups, task_ids, out):
        raise FloatingPointError

    model = towers()
    tasks = gvk.TaskGradients(model, TASKS, method=fails)
    held = model.shared[0].weight.grad = torch.ones_like(model.shared[0].weight)
    with pytest.raises(FloatingPointError):
        tasks.backward(losses_of(model))
    assert model.shared[0].weight.grad is held
    assert bool((held == 1).all())
    assert no_hooks(model)
    assert tasks.task_ids == ()  # or the next step would add to these gradients


def test_one_task_at_a_time():
    model = towers()
    tasks = task_gradients(model)
    with tasks.task("de"):
        with pytest.raises(RuntimeError, match="task: expected one task at a time"), tasks.task("fr"):
            pytest.fail("entered")
        with pytest.raises(RuntimeError, match=r"apply: .* inside a task"):
            tasks.apply()
        loss_of(model, "de").backward()
    assert tasks.task_ids == (0,)
    assert torch.equal(tasks.grads, explicit(model, tasks, losses_of(model, ["de"])))
    with pytest.raises(RuntimeError, match="one task at a time"), tasks.task("de"), tasks.task("fr"):
        pytest.fail("entered")
    assert tasks.task_ids == ()
    assert no_hooks(model)


def test_apply_needs_gradients():
    tasks = task_gradients(towers())
    with pytest.raises(RuntimeError, match="apply: expected captured gradients, got a call without any"):
        tasks.apply()


def penalised(model):
    loss = loss_of(model, "de")
    loss.backward(create_graph=True)


def zeroed(model):
    model.zero_grad()
    loss_of(model, "de").backward()


@pytest.mark.parametrize("backward", [penalised, zeroed])
@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_a_grad_that_was_replaced_is_not_lost(backward):
    """create_graph=True adds out of place, and zero_grad() drops the view: .grad is then another tensor."""
    model = towers()
    tasks = task_gradients(model)
    with tasks.task("de"):
        backward(model)
    assert torch.equal(tasks.grads, explicit(model, tasks, losses_of(model, ["de"])))
    tasks.apply()
    assert not any(parameter.grad is not None and parameter.grad.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": 3}, TypeError, "model: expected a torch.nn.Module, got int"),
        ({"tasks": "de"}, TypeError, "tasks: expected a sequence of at least one name"),
        ({"tasks": []}, TypeError, "tasks: expected a sequence of at least one name"),
        ({"tasks": [1, 2]}, TypeError, "tasks: expected a sequence"),
        ({"tasks": 3}, TypeError, "tasks: expected a sequence"),
        ({"tasks": ["de", "fr", "de"]}, ValueError, r"tasks: expected different names, got \['de', 'fr', 'de'\]"),
        ({"granularity": "layer"}, ValueError, "granularity: expected one of"),
        ({"reduction": "max"}, ValueError, "reduction: expected 'sum' or 'mean', got 'max'"),
        ({"method": gvk.GradVac(num_tasks=4)}, ValueError, "method: expected num_tasks 3, got 4"),
        ({"method": "gradvac"}, TypeError, "method: expected"),
    ],
)
def test_bad_construction(arguments, error, message):
    with pytest.raises(error, match=message):
        gvk.TaskGradients(**({"model": towers(), "tasks": TASKS} | arguments))


def test_a_refused_model_leaves_the_method_alone():
    method = gvk.GradVac()
    with pytest.raises(TypeError, match="dtype: expected a floating-point"):
        gvk.TaskGradients(nn.ParameterList([torch.zeros(2, dtype=torch.complex64)]), TASKS, method=method)
    assert method.num_tasks is None


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda losses: {}, ValueError, "losses: expected a mapping of at least one task"),
        (lambda losses: list(losses.values()), ValueError, "losses: expected a mapping"),
        (lambda losses: None, ValueError, "losses: expected a mapping"),
        (
            lambda losses: losses | {"nl": losses["de"]},
            ValueError,
            r"losses: expected tasks among \['de', .*, got 'nl'",
        ),
        (lambda losses: losses | {"hi": 1.0}, TypeError, r"losses\['hi'\]: expected a tensor, got float"),
        (
            lambda losses: losses | {"hi": losses["de"].repeat(2)},
            ValueError,
            r"losses\['hi'\]: .* scalar .* shape \[2\]",
        ),
        (lambda losses: losses | {"hi": losses["de"].detach()}, ValueError, r"losses\['hi'\]: .* requires_grad=False"),
    ],
)
def test_bad_losses(change, error, message):
    model = towers()
    tasks = task_gradients(model)
    with pytest.raises(error, match=message):
        tasks.backward(change(losses_of(model)))
    assert tasks.task_ids == ()
    assert tasks.method.step == 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_unknown_task():
    tasks = task_gradients(towers())
    with (
        pytest.raises(ValueError, match=r"name: expected one of the tasks \['de', 'fr', 'hi'\], got 'nl'"),
        tasks.task("nl"),
    ):
        pytest.fail("entered")


# ------------------------------------------------------------------------------------------------- mixed precision


def test_an_infinite_loss_under_a_grad_scaler():
    """The inf reaches .grad, the scaler skips the step, and the targets stay finite: those concerned, as they were."""
    model, plain = towers(), towers()
    tasks, unscaled = task_gradients(model), task_gradients(plain)
    optimizer, plain_optimizer = (torch.optim.SGD(m.parameters(), lr=0.3) for m in (model, plain))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(4):
        before = copy.deepcopy(model.state_dict())
        ema = None if step == 0 else tasks.method.ema.clone()
        overflow = step == 2
        optimizer.zero_grad()
        for name in TASKS:
            with tasks.task(name):
                factor = torch.inf if overflow and name == "de" else 1.0
                scaler.scale(loss_of(model, name, step) * factor).backward()
        tasks.apply()
        assert overflow == (not bool(model.shared[0].weight.grad.isfinite().all()))
        scaler.step(optimizer)
        scaler.update()
        assert bool(tasks.method.ema.isfinite().all())
        moved = any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert moved == (not overflow)
        if overflow:
            assert scaler.get_scale() == 2.0**9
            shared = [i for i, name in enumerate(tasks.groups.names) if name.startswith("shared")]
            assert torch.equal(tasks.method.ema[:, 0], ema[:, 0])
            assert torch.equal(tasks.method.ema[:, :, 0], ema[:, :, 0])
            assert bool((tasks.method.ema[shared, 1, 2] != ema[shared, 1, 2]).all())
        elif step < 2:  # a scale that is a power of two changes no bit
            unscaled.backward(losses_of(plain, step=step))
            plain_optimizer.step()
            assert torch.equal(tasks.method.ema, unscaled.method.ema)
            for name, value in plain.state_dict().items():
                assert torch.equal(value, model.state_dict()[name])


def test_autocast():
    model = towers()
    tasks = task_gradients(model)
    ema = new_targets(tasks)
    for step in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            losses = losses_of(model, step=step)
        check_backward(model, tasks, losses, ema, step)
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.shared.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_models_of_other_types(dtype):
    model = towers(dtype)
    tasks = task_gradients(model)
    ema = new_targets(tasks)
    for step in range(3):
        losses = losses_of(model, step=step, dtype=dtype)
        rows = explicit(model, tasks, losses)
        want = gvk.reference.vaccinate(rows, tasks.groups, ema, beta=BETA, step=step)
        tasks.backward(losses)
        found = gradient_of(model, tasks)
        assert found.dtype == dtype
        # rounded once to the type; where the weights differ by 1e-6, possibly to the value beside it
        assert torch.allclose(found, want.gradient, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
        assert torch.allclose(tasks.method.ema, ema, rtol=0, atol=1e-6)
    assert tasks.method.ema.dtype == torch.float64


# ---------------------------------------------------------------------------------------------------------- training


def test_training_equals_a_loop_written_by_hand():
    model, twin = towers(), towers()
    tasks, layout = task_gradients(model), task_gradients(twin)
    optimizer, by_hand = (torch.optim.SGD(m.parameters(), lr=0.2, momentum=0.9) for m in (model, twin))
    ema, course = new_targets(tasks), []
    for step in range(20):
        optimizer.zero_grad()
        losses = losses_of(model, step=step % 4)
        course.append(sum(losses.values()).item())
        tasks.backward(losses)
        optimizer.step()

        rows = explicit(twin, layout, losses_of(twin, step=step % 4))
        update = gvk.reference.vaccinate(rows, layout.groups, ema, beta=BETA, step=step).gradient
        for slot, parameter in zip(layout.groups.parameters, parameters_of(twin, layout)):
            used = "idle" not in slot.name
            parameter.grad = update[slot.offset : slot.offset + slot.numel].view(slot.shape) if used else None
        by_hand.step()
    for parameter, expected in zip(model.parameters(), twin.parameters()):
        # 1e-6 a step, over 20 steps with momentum
        assert torch.allclose(parameter, expected, rtol=0, atol=1e-5)
    assert torch.allclose(tasks.method.ema, ema, rtol=0, atol=1e-5)
    assert bool(tasks.last.corrected.any())
    assert sum(course[-4:]) < 0.6 * sum(course[:4])


def test_adamw_and_clipping():
    model = towers()
    tasks = task_gradients(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    course = []
    for step in range(15):
        optimizer.zero_grad()
        losses = losses_of(model, step=step % 3)
        course.append(sum(losses.values()).item())
        tasks.backward(losses)
        before = gradient_of(model, tasks)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        assert float(norm) == pytest.approx(float(before.norm()), rel=1e-5)
        # clipped in place, in the buffer; torch divides by norm + 1e-6
        assert torch.allclose(gradient_of(model, tasks), before * min(1.0, 0.1 / (float(norm) + 1e-6)), rtol=1e-5)
        assert float(tasks.last.gradient.norm()) <= 0.1 * (1 + 1e-5)
        optimizer.step()
    assert sum(course[-3:]) < 0.6 * sum(course[:3])


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zeroing_grad_between_steps(set_to_none):
    model = towers()
    tasks = task_gradients(model)
    ema = new_targets(tasks)
    for step in range(3):
        model.zero_grad(set_to_none=set_to_none)
        check_backward(model, tasks, losses_of(model, step=step), ema, step)


@pytest.mark.parametrize("load_first", [True, False])
def test_a_checkpoint_in_the_middle_of_training(load_first):
    def train(model, tasks, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            names = TASKS if step % 3 else ["hi", "de"]
            tasks.backward(losses_of(model, names, step))
            optimizer.step()

    def start():
        model = towers()
        return model, torch.optim.AdamW(model.parameters(), lr=0.05), gvk.GradVac(beta=BETA, seed=4)

    model, optimizer, method = start()
    tasks = gvk.TaskGradients(model, TASKS, method=method)
    train(model, tasks, optimizer, range(4))
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), method.state_dict()], file)
    train(model, tasks, optimizer, range(4, 8))

    file.seek(0)
    states = torch.load(file, weights_only=True)
    resumed, its_optimizer, its_method = start()
    resumed.load_state_dict(states[0])
    its_optimizer.load_state_dict(states[1])
    if load_first:
        its_method.load_state_dict(states[2])
        its_tasks = gvk.TaskGradients(resumed, TASKS, method=its_method)
    else:
        its_tasks = gvk.TaskGradients(resumed, TASKS, method=its_method)
        its_method.load_state_dict(states[2])
    train(resumed, its_tasks, its_optimizer, range(4, 8))
    for name, value in model.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])
    assert torch.equal(method.ema, its_method.ema)


def test_a_transformer():
    torch.manual_seed(0)
    model = nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, batch_first=True)
    tasks = task_gradients(model)
    assert "encoder.layers.0" in tasks.groups.names
    ema = new_targets(tasks)
    for step in range(2):
        generator = torch.Generator().manual_seed(step)
        losses = {}
        for name in TASKS:
            source, target = torch.randn(2, 3, 5, 8, generator=generator)
            losses[name] = (model(source, target) - target).square().mean()
        check_backward(model, tasks, losses, ema, step)
    by_stack = task_gradients(model, granularity="enc_dec")
    assert by_stack.groups.names == ("encoder", "decoder")
    check_backward(model, by_stack, {"hi": model(source, target).mean()}, new_targets(by_stack), 0)


def test_a_compiled_model():
    model, plain = towers(), towers()
    tasks, eager = task_gradients(torch.compile(model, backend="aot_eager")), task_gradients(plain)
    assert [n.replace("_orig_mod.", "") for n in tasks.groups.names] == list(eager.groups.names)
    for step in range(2):
        tasks.backward(losses_of(tasks._model, step=step))
        eager.backward(losses_of(plain, step=step))
        assert close(gradient_of(tasks._model, tasks), gradient_of(plain, eager))
    torch._dynamo.reset()
