"""Two processes with a part of each batch, against one process with all of it."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

import gradvac_kernels as gvk
from gradvac_kernels import methods

TASKS = ["de", "fr", "hi"]
STEPS = 3


class Towers(nn.Module):
    """Shared layers, and one head a task."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh())
        self.heads = nn.ModuleDict({name: nn.Linear(5, 1) for name in [*TASKS, "idle"]})

    def forward(self, x, name):
        return self.heads[name](self.shared(x))


def towers():
    torch.manual_seed(0)
    return Towers()


def samples(step, name):
    """Four of each task."""
    generator = torch.Generator().manual_seed(10 * step + TASKS.index(name))
    return torch.randn(4, 6, generator=generator), torch.randn(4, 1, generator=generator)


def errors(model, step, name, rows):
    x, y = samples(step, name)
    return (model(x[rows], name) - y[rows]).square()


EVEN = {"de": (slice(0, 2), slice(2, 4)), "fr": (None, slice(0, 4)), "hi": (slice(0, 4), None)}
APART = {"de": (slice(0, 3), slice(3, 4)), "fr": (None, slice(0, 4)), "hi": (slice(0, 4), None)}
"""The samples of each task in each of two processes; of EVEN, means of means are means."""


def train(rank, parts, reduction, method=None):
    """The samples of one of two processes; of both, where rank is None."""
    model = towers()
    tasks = gvk.TaskGradients(model, TASKS, method=method)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        mine = {name: slice(None) if rank is None else part[rank] for name, part in parts.items()}
        found = {name: errors(model, step, name, rows) for name, rows in mine.items() if rows is not None}
        losses = {name: each.mean() if reduction == "mean" else each.sum() / 4 for name, each in found.items()}
        for name in reversed(losses) if rank else losses:  # each process in an order of its own
            with tasks.task(name):
                losses[name].backward(retain_graph=True)
        tasks.report_losses(losses)
        if rank is not None:
            tasks.all_reduce(reduction=reduction)
        tasks.apply()
        optimizer.step()
    return {
        "parameters": torch.cat([parameter.detach().flatten() for parameter in model.parameters()]),
        "state": torch.cat([v.double().flatten() for v in tasks.method.state_dict().values() if torch.is_tensor(v)]),
        "idle": model.heads["idle"].weight.grad is None,
        "task_ids": tasks.last_task_ids,
    }


def stream(rank, keep):
    """One mixed batch of all tasks; the rows of one of two processes, or all."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 1))
    tasks = gvk.TaskGradients(model, TASKS)
    for step in range(STEPS):
        rows = slice(None) if rank is None else slice(7 * rank, 7 + 5 * rank)  # both have some of the second task
        x, y = (torch.cat(part)[rows] for part in zip(*(samples(step, name) for name in TASKS)))
        with tasks.batch(torch.arange(3).repeat_interleave(4)[rows], keep=keep):
            ((model(x) - y).square().sum() / 4).backward()
        if keep:
            tasks.all_reduce(reduction="sum")
            tasks.apply()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
    return {
        "parameters": torch.cat([parameter.detach().flatten() for parameter in model.parameters()]),
        "state": tasks.method.ema.flatten(),
        "task_ids": tasks.last_task_ids,
    }


def mean_of_some(rank):
    """The rows after all_reduce, of the first layer."""
    model = towers()
    tasks = gvk.TaskGradients(model, TASKS, granularity="all_matrix")
    for name, parts in reversed(APART.items()):
        if parts[rank] is not None:
            with tasks.task(name):
                errors(model, 0, name, parts[rank]).mean().backward()
    tasks.all_reduce()
    assert tasks.groups.names[0] == "shared.0.weight"
    weight = tasks.grads[:, : tasks.groups.sizes[0]].clone()
    return {"grads": weight.view(3, 8, 6), "task_ids": tasks.task_ids}


def refusals():
    """What each wrong call says, in a process of a job."""
    model, x = towers(), torch.ones(2, 6)
    wrapped, said = nn.parallel.DistributedDataParallel(model), {}

    def note(name, call):
        try:
            call()
        except (ValueError, RuntimeError) as error:
            said[name] = f"{type(error).__name__}: {error}"

    note("wrapped", lambda: gvk.TaskGradients(wrapped, TASKS))
    note("a part is wrapped", lambda: gvk.TaskGradients(nn.Sequential(nn.Linear(2, 2), wrapped), TASKS))
    tasks = gvk.TaskGradients(model, TASKS)

    def run_wrapped():
        with tasks.batch([0, 1]):
            wrapped(x, "de").sum().backward()

    note("run wrapped", run_wrapped)
    note("nothing", tasks.all_reduce)
    note("reduction", lambda: tasks.all_reduce(reduction="max"))

    def inside():
        with tasks.task("de"):
            tasks.all_reduce()

    note("inside", inside)
    return said


CASES = {
    "even": lambda rank: train(rank, EVEN, "mean"),
    "apart": lambda rank: train(rank, APART, "sum"),
    "losses": lambda rank: train(rank, EVEN, "mean", methods.CATS(num_tasks=3)),
    "losses apart": lambda rank: train(rank, APART, "sum", methods.GradNorm(num_tasks=3)),
    "streamed": lambda rank: stream(rank, keep=rank is not None),
}


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    found = {name: case(rank) for name, case in CASES.items()}
    torch.save(found | {"mean of some": mean_of_some(rank), "refusals": refusals()}, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(work, args=(folder,), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_all_processes_train_as_one_would(processes, case):
    first, second = (found[case] for found in processes)
    alone = CASES[case](None)
    for key, value in first.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, second[key])
            # sums in another order: 4 roundings of 2^-24 of terms about 1, which three steps amplify tenfold
            assert torch.allclose(value.double(), alone[key].double(), rtol=0, atol=1e-5)
        else:
            assert value == second[key] == alone[key]


def test_a_mean_is_of_the_processes_that_captured_the_task(processes):
    first, second = (found["mean of some"] for found in processes)
    assert first["task_ids"] == second["task_ids"] == (0, 1, 2)
    assert torch.equal(first["grads"], second["grads"])
    model, expected = towers(), []
    for name, parts in APART.items():
        means = [errors(model, 0, name, rows).mean() for rows in parts if rows is not None]
        expected.append(torch.autograd.grad(torch.stack(means).mean(), model.shared[0].weight)[0])
    # means of up to four terms about 1
    assert torch.allclose(first["grads"], torch.stack(expected), rtol=0, atol=1e-6)


def test_refusals(processes):
    said = processes[0]["refusals"]
    assert said["wrapped"].startswith("ValueError: model: expected the module that DistributedDataParallel '' holds")
    assert "DistributedDataParallel '1'" in said["a part is wrapped"]
    assert said["run wrapped"].startswith("ValueError: batch: expected the model itself to run")
    assert said["nothing"] == "RuntimeError: all_reduce: expected captured gradients, got a call without any"
    assert said["reduction"] == "ValueError: reduction: expected 'mean' or 'sum', got 'max'"
    assert said["inside"].startswith("RuntimeError: all_reduce: expected captured gradients, got a call inside a task")
    assert processes[1]["refusals"] == said
