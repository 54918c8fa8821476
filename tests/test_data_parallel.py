"""Two processes with a part of each batch, against one process with all of it."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn

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


def train(rank, parts, reduction, how, granularity, method=gvk.GradVac):
    """The steps of one of two processes; of one that has all samples, where rank is None."""
    torch.manual_seed(0)
    model = Reader()
    job = {} if rank is None else {"process_group": dist.group.WORLD, "process_reduction": reduction}
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
            tasks.report_losses(losses_of(model, step, parts, reduction, rank))
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


def refusals():
    """What each wrong call says, in a process of a job."""
    model, words = Reader(), torch.zeros(2, 3, dtype=torch.int64)
    wrapped, said = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True), {}

    def note(name, call):
        try:
            call()
        except (TypeError, ValueError, RuntimeError) as error:
            said[name] = f"{type(error).__name__}: {error}"

    note("wrapped", lambda: gvk.TaskGradients(wrapped, TASKS))
    note("a part is wrapped", lambda: gvk.TaskGradients(nn.Sequential(nn.Linear(2, 2), wrapped), TASKS))
    note("reduction", lambda: gvk.TaskGradients(model, TASKS, process_reduction="max"))
    note("group", lambda: gvk.TaskGradients(model, TASKS, process_group="gloo"))
    tasks = gvk.TaskGradients(model, TASKS, process_group=dist.group.WORLD)

    def run_wrapped():
        with gvk.TaskGradients(model, TASKS).batch([0, 1]):
            wrapped(words, 0).sum().backward()

    note("run wrapped", run_wrapped)
    note("nothing", tasks.apply)
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
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2, timeout=timedelta(minutes=2)
    )
    found = {name: train(rank, *training) for name, training in TRAININGS.items()}
    torch.save(found | {"refusals": refusals()}, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(work, args=(folder,), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("training", TRAININGS)
def test_all_processes_train_as_one_would(processes, training):
    first, second = (found[training] for found in processes)
    alone = train(None, *TRAININGS[training])
    for key, value in first.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, second[key])
            # sums in another order: 4 roundings of 2^-24 of terms about 1, which three steps amplify tenfold
            assert torch.allclose(value.double(), alone[key].double(), rtol=0, atol=1e-5)
        else:
            assert value == second[key] == alone[key]


def test_refusals(processes):
    said = processes[0]["refusals"]
    assert said["wrapped"].startswith("ValueError: model: expected the module that DistributedDataParallel '' holds")
    assert "DistributedDataParallel '1'" in said["a part is wrapped"]
    assert said["reduction"] == "ValueError: process_reduction: expected 'mean' or 'sum', got 'max'"
    assert said["group"] == "TypeError: process_group: expected a ProcessGroup, got 'gloo'"
    assert said["run wrapped"].startswith("ValueError: batch: expected the model itself to run")
    assert said["nothing"] == "RuntimeError: apply: expected captured gradients, got a call without any in any process"
    assert processes[1]["refusals"] == said
