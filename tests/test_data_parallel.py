"""Two processes of a job of three, with a part of each batch, against one process with all of it."""

import contextlib
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import gradvac_kernels as gvk
from gradvac_kernels import methods

TASKS = ["de", "fr", "hi"]
STEPS = 3
EVEN = {"de": (slice(0, 2), slice(2, 4)), "fr": (None, slice(0, 4)), "hi": (slice(0, 4), None)}
UNEVEN = {"de": (slice(0, 3), slice(3, 4)), "fr": (None, slice(0, 4)), "hi": (slice(0, 4), None)}
"""The samples of each task in each of two processes; of EVEN, means of means are means."""


class Reader(nn.Module):
    """Words to a number; samples of the first process take a detour through a layer of its own."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(40, 8)
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.Tanh()) for _ in range(3))
        self.detour = nn.Linear(8, 8)
        self.idle = nn.Linear(2, 2)
        self.out = nn.Linear(8, 1)

    def forward(self, words, part):
        x = self.words(words).mean(1)
        for layer in self.layers:
            x = layer(x)
        return self.out(self.detour(x) if part == 0 else x)


def samples(step, name, rows):
    """Of four of each task."""
    generator = torch.Generator().manual_seed(10 * step + TASKS.index(name))
    words, y = torch.randint(40, (4, 3), generator=generator), torch.randn(4, 1, generator=generator)
    return words[rows], y[rows]


def errors(model, step, name, parts, part):
    """[n, 1], of the task's samples in a process."""
    words, y = samples(step, name, parts[name][part])
    return (model(words, part) - y).square()


def losses_of(model, step, parts, reduction, rank):
    """By task, of a process's samples, or of all."""
    losses = {}
    for name, its in parts.items():
        found = [errors(model, step, name, parts, p) for p in (0, 1) if its[p] is not None and rank in (None, p)]
        if found:
            each = torch.cat(found)
            losses[name] = each.mean() if reduction == "mean" else each.sum() / 4
    return losses


def train(group, rank, parts, reduction, how, granularity, method=gvk.GradVac):
    """The steps of one of two processes; of one that has all samples, where rank is None."""
    torch.manual_seed(0)
    model = Reader()
    job = {} if rank is None else {"process_group": group, "process_reduction": reduction}
    tasks = gvk.TaskGradients(model, TASKS, granularity, method(num_tasks=3), **job)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        if how == "one backward a task" or rank is None:
            losses = losses_of(model, step, parts, reduction, rank)
            tasks.backward(dict(reversed(losses.items())) if rank == 1 else losses)  # in orders of their own
        else:
            mine = [name for name in TASKS if parts[name][rank] is not None]
            counts = [parts[name][rank].stop - parts[name][rank].start for name in mine]
            words, y = map(torch.cat, zip(*(samples(step, name, parts[name][rank]) for name in mine)))
            task_of_sample = [name for name, count in zip(mine, counts) for _ in range(count)]
            losses = losses_of(model, step, parts, reduction, rank)  # what stands there for others does not matter
            tasks.report_losses(torch.stack([losses.get(name, torch.tensor(torch.nan)) for name in TASKS]))
            with tasks.batch(task_of_sample, keep=how == "kept"):
                each = (model(words, rank) - y).square().squeeze(1)
                (gvk.task_mean_loss(each, task_of_sample) if reduction == "mean" else each.sum() / 4).backward()
            if how == "kept":
                tasks.apply()
        optimizer.step()
    state = [v.double().flatten() for v in tasks.method.state_dict().values() if torch.is_tensor(v)]
    return {
        "parameters": torch.cat([parameter.detach().flatten() for parameter in model.parameters()]),
        "gram": tasks.last.gram,
        "state": torch.cat([*state, torch.zeros(1)]),
        "idle": model.idle.weight.grad is None and model.detour.weight.grad is not None,
        "task_ids": tasks.last_task_ids,
    }


def small_steps(group, rank):
    """What does not fit a training."""
    weight = nn.Linear(4, 1, bias=False)
    nn.init.ones_(weight.weight)
    tasks = gvk.TaskGradients(weight, TASKS, method=methods.GradNorm(num_tasks=3), process_group=group)
    tasks.report_losses(torch.tensor([1.0, 2.0, 4.0] if rank else [3.0, float("nan"), 0.0]))
    if rank:  # the other one has captured nothing
        with tasks.task("hi"):
            weight(torch.ones(4)).backward()
    tasks.apply()
    found = {"alone": weight.weight.grad.clone(), "losses": tasks.method.state_dict()["first_losses"]}
    half = nn.Linear(4, 1, bias=False).half()
    nn.init.ones_(half.weight)
    tasks = gvk.TaskGradients(half, TASKS, method=methods.Sum(), process_group=group)
    tasks.backward({"de": (60_000 * half.weight).sum()})  # twice that is beyond float16
    return found | {"half": half.weight.grad.clone()}


class Backwards(nn.Module):
    """Its last layer is registered first."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(8))

    def forward(self, x):
        for layer in reversed(self.layers):
            x = layer(x).tanh()
        return x


def room_for_slabs(group):
    """Columns of the arena after each step, of 3 tasks and 8 groups of 1056."""
    torch.manual_seed(0)
    tasks, x, room = gvk.TaskGradients(Backwards(), TASKS, process_group=group), torch.randn(6, 32), []
    for _ in range(3):
        with tasks.batch([0, 1, 2, 0, 1, 2]):
            tasks._model(x).square().sum().backward()
        room.append(0 if tasks._arena is None else len(tasks._arena._memory) // 3)
    return room


def step_after_an_exception(group, rank):
    """In the middle of a backward of all processes, while a large slab is under way."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 1024), nn.Tanh(), nn.Linear(1024, 2048)), torch.randn(6, 8)
    made, ids = gvk.TaskGradients(model, TASKS, method=methods.Sum(), process_group=group), [0, 1, 2, 0, 1, 2]

    def step(fail):
        def stop(grad):
            raise ZeroDivisionError

        with made.batch(ids):
            hidden = model[1](model[0]((1 + rank) * x))
            if fail:
                hidden.register_hook(stop)
            model[2](hidden).square().sum().backward()
        return made.last.gradient.clone()

    before = step(False)
    with contextlib.suppress(ZeroDivisionError):
        step(True)
    return torch.equal(step(False), before)


def refusals(group, rank):
    """What each wrong call says, in a process of a job."""
    model, words, said = Reader(), torch.zeros(2, 3, dtype=torch.int64), {}
    wrapped = nn.parallel.DistributedDataParallel(model, process_group=group, find_unused_parameters=True)

    def note(name, call):
        try:
            call()
            said[name] = "nothing"
        except (TypeError, ValueError, RuntimeError) as error:
            said[name] = f"{type(error).__name__}: {error}"

    def run_wrapped():
        with gvk.TaskGradients(model, TASKS).batch([0, 1]):
            wrapped(words, 0).sum().backward()

    def sharded(frozen):
        head = nn.Linear(2, 2)
        base = fully_shard(nn.Linear(2, 2), mesh=DeviceMesh.from_group(group, "cpu")).requires_grad_(not frozen)
        gvk.TaskGradients(nn.Sequential(base, head), TASKS)

    def flattened():
        whole = FullyShardedDataParallel(nn.Linear(4, 4), group, use_orig_params=True, device_id=torch.device("cpu"))
        gvk.TaskGradients(whole.module, TASKS)

    note("wrapped", lambda: gvk.TaskGradients(wrapped, TASKS))
    note("a part is wrapped", lambda: gvk.TaskGradients(nn.Sequential(nn.Linear(2, 2), wrapped), TASKS))
    note("sharded", lambda: sharded(False))
    note("frozen and sharded", lambda: sharded(True))
    note("flattened", flattened)
    note("run wrapped", run_wrapped)
    note("reduction", lambda: gvk.TaskGradients(model, TASKS, process_reduction="max"))
    note("group", lambda: gvk.TaskGradients(model, TASKS, process_group="gloo"))
    note("other tasks", lambda: gvk.TaskGradients(model, TASKS[::-1] if rank else TASKS, process_group=group))
    note("nothing", gvk.TaskGradients(model, TASKS, process_group=group).apply)
    with torch.no_grad():
        model.idle.bias += rank
    note("other parameters", lambda: gvk.TaskGradients(model, TASKS, process_group=group))
    return said


TRAININGS = {
    f"{how}, {granularity}, {reduction}": (parts, reduction, how, granularity)
    for how in ("one backward a task", "kept", "streamed")
    for granularity in ("all_layer", "whole_model", "all_matrix")
    for reduction, parts in (("mean", EVEN), ("sum", UNEVEN))
}
TRAININGS |= {
    f"{how}, CATS, {reduction}": (parts, reduction, how, "all_layer", methods.CATS)
    for how in ("kept", "streamed")
    for reduction, parts in (("mean", EVEN), ("sum", UNEVEN))
}


def work(rank, folder):
    torch.set_num_threads(1)
    meeting, patience = f"file://{folder}/meeting", timedelta(minutes=2)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=3, timeout=patience)
    group = dist.new_group([0, 1], timeout=patience)
    if rank < 2:
        found = {name: train(group, rank, *training) for name, training in TRAININGS.items()}
        found["room"] = room_for_slabs(group)
        found["small steps"] = small_steps(group, rank)
        found["step after an exception"] = step_after_an_exception(group, rank)
        found["refusals"] = refusals(group, rank)
        torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(work, args=(folder,), nprocs=3)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("training", TRAININGS)
def test_all_processes_train_as_one_would(processes, training):
    first, second = (found[training] for found in processes)
    alone = train(None, None, *TRAININGS[training])
    for key, value in first.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, second[key])
            # sums in another order: 4 roundings of 2^-24 of terms about 1, which three steps amplify tenfold
            assert torch.allclose(value.double(), alone[key].double(), rtol=0, atol=1e-5)
        else:
            assert value == second[key] == alone[key]


def test_the_first_step_shows_in_which_order_groups_are_complete(processes):
    """Then one slab is filled while one is under way, instead of all eight; what was made for those is given back."""
    for found in processes:
        assert found["room"][0] == 0
        assert 2 * 1056 <= found["room"][1] == found["room"][2] <= 2 * 1120


def test_slabs_that_were_under_way_at_an_exception_are_left_alone(processes):
    assert all(found["step after an exception"] for found in processes)


def test_small_steps(processes):
    for found in (its["small steps"] for its in processes):
        assert torch.equal(found["alone"], torch.ones(1, 4))  # not halved: one process has the task
        assert torch.equal(found["losses"].nan_to_num(-1.0), torch.tensor([-1.0, -1.0, 4.0], dtype=torch.float64))
        assert torch.equal(found["half"], torch.full((1, 4), 60_000.0, dtype=torch.float16))


def test_refusals(processes):
    said = processes[0]["refusals"]
    assert said["wrapped"].startswith("ValueError: model: expected a module without DistributedDataParallel, got")
    assert "got it as '1'" in said["a part is wrapped"]
    assert said["sharded"] == "ValueError: model: expected whole parameters, got '0.weight', which is sharded"
    assert said["frozen and sharded"] == "nothing"
    assert said["flattened"].startswith("ValueError: model: expected whole parameters")
    assert said["run wrapped"].startswith("ValueError: batch: expected the model itself to run")
    assert said["reduction"] == "ValueError: process_reduction: expected 'mean' or 'sum', got 'max'"
    assert said["group"] == "TypeError: process_group: expected a ProcessGroup, got 'gloo'"
    assert said["other tasks"] == said["other parameters"]
    assert said["other tasks"].startswith("ValueError: process_group: expected the same tasks")
    assert said["nothing"] == "RuntimeError: apply: expected captured gradients, got a call without any in any process"
    assert processes[1]["refusals"] == said
