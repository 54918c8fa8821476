"""Every method through TaskGradients: a backward a task and one mixed batch give the same, losses reach the method."""

import copy

import pytest
import torch

import gradvac_kernels as gvk
from gradvac_kernels import methods

aggregation = pytest.importorskip("torchjd.aggregation")

TASKS = ["de", "fr", "hi"]
METHODS = {
    "Sum": methods.Sum,
    "Mean": methods.Mean,
    "PCGrad": methods.PCGrad,
    "MGDA": methods.MGDA,
    "GradNorm": lambda: methods.GradNorm(lr=0.2),
    "CATS": lambda: methods.CATS(lr=0.5),
    "FromTorchJD": lambda: methods.FromTorchJD(aggregation.UPGradWeighting()),
}


def model_and_data():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).double()
    x, y = torch.randn(5, 12, 6).double(), torch.randn(5, 12, 2).double()
    return model, x, y, torch.arange(12) % 3


def losses_of_samples(model, x, y):
    return ((model(x) - y) ** 2).mean(1)


@pytest.mark.parametrize("granularity", ["all_matrix", "all_layer", "whole_model"])
@pytest.mark.parametrize("name", METHODS)
def test_streamed_and_buffered_are_the_same(name, granularity):
    model, x, y, task_of_sample = model_and_data()
    twin = copy.deepcopy(model)
    streamed = gvk.TaskGradients(model, TASKS, granularity, METHODS[name]())
    buffered = gvk.TaskGradients(twin, TASKS, granularity, METHODS[name]())
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, twin)]
    for xi, yi in zip(x, y):
        with streamed.batch(task_of_sample):
            samples = losses_of_samples(model, xi, yi)
            means = torch.stack([samples[task_of_sample == task].mean() for task in range(3)])
            means.sum().backward()
            streamed.report_losses(means)
        found = buffered.backward(
            {
                task: losses_of_samples(twin, xi[task_of_sample == i], yi[task_of_sample == i]).mean()
                for i, task in enumerate(TASKS)
            }
        )
        for a, b in zip(streamed.last, found):  # float64: sums in another order; UPGrad's solver iterates
            assert torch.allclose(a, b, rtol=1e-6, atol=1e-8, equal_nan=True)
        for a, b in zip(model.parameters(), twin.parameters()):
            assert torch.allclose(a.grad, b.grad, rtol=1e-6, atol=1e-8)
        for optimizer in optimizers:
            optimizer.step()
    if name in ("GradNorm", "CATS"):  # they have learned something
        assert float((found.weights - found.weights.mean(1, keepdim=True)).abs().max()) > 1e-2


@pytest.mark.parametrize("granularity", ["all_layer", "enc_dec", "whole_model"])
def test_gram_matrices_of_matrices_add_up_to_coarser_ones(granularity):
    torch.manual_seed(1)
    model = torch.nn.Transformer(16, 2, 2, 2, 32, dropout=0.0, batch_first=True)
    x = torch.randn(3, 4, 5, 16)
    grams = {}
    for chosen in ("all_matrix", granularity):
        tasks = gvk.TaskGradients(model, TASKS, chosen, methods.Sum())
        grams[chosen] = tasks.backward({task: model(xi, xi).square().mean() for task, xi in zip(TASKS, x)}).gram
        groups = tasks.groups
    of_parameter = {slot.name: groups.names[slot.group] for slot in groups.parameters}
    names = gvk.ParameterGroups.from_model(model, "all_matrix").names
    for k, name in enumerate(groups.names):
        parts = [grams["all_matrix"][index] for index, one in enumerate(names) if of_parameter[one] == name]
        norm = grams[granularity][k].diagonal().sqrt()
        # the products of float32 gradients are exact in float64; sums over up to 2^14 columns in another order
        assert float(((sum(parts) - grams[granularity][k]) / (norm[:, None] * norm)).abs().max()) < 2**14 * 2**-53


def test_losses_by_name_and_for_some_tasks():
    model, x, y, _ = model_and_data()
    tasks = gvk.TaskGradients(model, TASKS, method=methods.GradNorm())
    for step in range(2):
        for row, task in enumerate(("hi", "de")):
            with tasks.task(task):
                loss = losses_of_samples(model, x[step][row::2], y[step][row::2]).mean()
                loss.backward()
            tasks.report_losses({task: 7.0})
            tasks.report_losses({task: loss})  # the last one counts
        tasks.apply()
        first = tasks.method.state["first_losses"]
        assert first.isnan().tolist() == [False, True, False]
        if step == 0:
            assert float(first[0]) == loss.item()
    assert bool((tasks.method.state["weights"][:, 1] == 1).all())


def test_reported_losses_are_copies():
    model, x, y, _ = model_and_data()
    tasks, total = gvk.TaskGradients(model, ["de"], method=methods.GradNorm()), torch.zeros(())
    with tasks.task("de"):
        loss = losses_of_samples(model, x[0], y[0]).mean()
        loss.backward()
    total += loss.detach()
    tasks.report_losses({"de": total})
    total.zero_()
    tasks.apply()
    assert float(tasks.method.state["first_losses"]) == pytest.approx(loss.item(), rel=1e-6)


def test_missing_losses_are_said_and_change_nothing():
    model, x, y, task_of_sample = model_and_data()
    x, y = x[0], y[0]
    tasks = gvk.TaskGradients(model, TASKS, method=methods.CATS())
    tasks.report_losses({"fr": 1.0, "hi": 1.0})
    with pytest.raises(ValueError, match=r"losses: expected report_losses.*'de'"), tasks.batch(task_of_sample):
        losses_of_samples(model, x, y).sum().backward()
    with tasks.task("de"):
        losses_of_samples(model, x, y).sum().backward()
    for bad in (10**400, torch.ones(1).to_sparse()):
        with pytest.raises(ValueError, match=r"losses\['fr'\]: expected a"):
            tasks.report_losses({"fr": bad})
    with pytest.raises(ValueError, match="losses: expected report_losses"):
        tasks.apply()
    assert tasks.method.state == {}
    assert tasks.last is None
    # what was reported belonged to those steps
    with pytest.raises(ValueError, match=r"\['de', 'fr', 'hi'\]"), tasks.batch(task_of_sample):
        losses_of_samples(model, x, y).sum().backward()


@pytest.mark.parametrize(
    ("losses", "error"),
    [
        ({"xx": 1.0}, ValueError),
        ({"de": torch.ones(2)}, ValueError),
        ({"de": torch.ones((), dtype=torch.complex64)}, ValueError),
        (torch.ones(2), ValueError),
        (torch.ones(3, dtype=torch.int64), TypeError),
        ([1.0, 2.0, 3.0], TypeError),
        ({"de": "low"}, TypeError),
    ],
)
def test_bad_losses(losses, error):
    tasks = gvk.TaskGradients(model_and_data()[0], TASKS, method=methods.CATS())
    with pytest.raises(error, match="losses"):
        tasks.report_losses(losses)


def test_a_method_for_another_number_of_tasks_is_refused():
    with pytest.raises(ValueError, match="num_tasks 3"):
        gvk.TaskGradients(model_and_data()[0], TASKS, method=methods.CATS(num_tasks=4))


def test_a_tracker_follows_the_training():
    model, x, y, task_of_sample = model_and_data()
    tasks = gvk.TaskGradients(model, TASKS, method=methods.Sum())
    tracker = gvk.SimilarityTracker(tasks.groups, tasks.tasks)
    twin = copy.deepcopy(model)
    cosines = []
    for xi, yi in zip(x, y):
        with tasks.batch(task_of_sample):
            losses_of_samples(model, xi, yi).sum().backward()
        tracker.update(tasks.last, tasks.last_task_ids)
        rows = []
        for task in range(3):
            twin.zero_grad()
            losses_of_samples(twin, xi[task_of_sample == task], yi[task_of_sample == task]).sum().backward()
            rows.append(torch.cat([parameter.grad.flatten() for parameter in twin.parameters()]))
        rows = torch.stack(rows)
        cosines.append(torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=2))
        # with the plain sum nothing is changed
        assert torch.allclose(
            torch.cat([p.grad.flatten() for p in model.parameters()]), rows.sum(0), rtol=1e-10, atol=1e-12
        )
    assert torch.allclose(tracker.mean("cosine")[-1], torch.stack(cosines).mean(0), rtol=0, atol=1e-12)
