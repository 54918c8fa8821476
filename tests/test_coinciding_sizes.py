"""Models in which something is as long as there are samples, by chance: exact, or refused, never wrong in silence."""

import copy

import pytest
import streamed
import torch
from torch import nn
from torch.nn import functional as F

import gradvac_kernels as gvk

N = 4  # samples, positions, classes, channels and features
TASKS = torch.tensor([0, 1, 0, 0])
IDS = torch.arange(N)


def model_of(**parts):
    torch.manual_seed(0)
    return nn.ModuleDict(parts).double()


def mean_square(y):
    return y.square().flatten(1).mean(1)


def both_ways(model, losses_of, inputs, tasks=TASKS):
    """The model with a buffer, and streamed."""
    made = [(each, gvk.TaskGradients(each, ["a", "b"])) for each in (model, copy.deepcopy(model))]
    (buffered, by_task), (mixed, by_batch) = made
    streamed.one_backward_a_task(buffered, by_task, losses_of, inputs, tasks)
    with by_batch.batch(tasks):
        gvk.task_mean_loss(losses_of(mixed, inputs), tasks).backward()
    streamed.check_gradients(mixed, buffered, by_task.groups, streamed.TOLERANCE[torch.float64])


def check_refused(model, losses_of, inputs, match):
    model = copy.deepcopy(model)
    tasks = gvk.TaskGradients(model, ["a", "b"])
    with pytest.raises(ValueError, match=match), tasks.batch(TASKS):
        gvk.task_mean_loss(losses_of(model, inputs), TASKS).backward()
    streamed.no_traces(model)
    assert all(parameter.grad is None for parameter in model.parameters())


def features(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


TABLE = features(N, N)
POSITIONS = {
    "added": lambda m, x: m["head"](x + m["positions"](IDS)[None]),
    "a table of no gradient": lambda m, x: m["head"](x + m["inner"](TABLE)[None]),
    "added to one": lambda m, x: m["head"](x[:, :1] + m["positions"](IDS)[None]),
    "beside": lambda m, x: m["head2"](torch.cat([x, m["positions"](IDS)[None].expand(N, -1, -1)], -1)),
    "beside in another dimension": lambda m, x: m["head"](torch.stack([x, m["positions"](IDS).expand(N, -1, -1)], 2)),
    "multiplied": lambda m, x: m["head"](m["positions"](IDS) @ x),
    "multiplied by letters": lambda m, x: m["head"](torch.einsum("bld,ld->bld", x, m["positions"](IDS))),
    "multiplied and added": lambda m, x: m["head"](torch.baddbmm(m["positions"](IDS)[None], x, x)),
    "repeated": lambda m, x: m["head"](x + m["positions"](IDS)[None].repeat(N, 1, 1)),
    "copied": lambda m, x: m["head"](x * m["positions"](IDS).expand(N, -1, -1).contiguous()),
    "repeated and multiplied": lambda m, x: m["head"](m["positions"](IDS).repeat(N, 1, 1) @ x),
    "repeated beside": lambda m, x: m["head2"](torch.cat([x, m["positions"](IDS)[None].repeat(N, 1, 1)], -1)),
}


@pytest.mark.parametrize("name", POSITIONS)
def test_positions_from_outside_meet_inputs_without_a_gradient(name):
    """Only what is made of the positions has a gradient, so that it alone would say where samples are."""
    model = model_of(
        positions=nn.Embedding(N, N), inner=nn.Linear(N, N), head=nn.Linear(N, 2), head2=nn.Linear(2 * N, 2)
    )
    check_refused(model, lambda m, inputs: mean_square(POSITIONS[name](m, inputs[0])), [features(N, N, N)], "expected")


@pytest.mark.parametrize("classes", [N, N - 1])
def test_names_of_classes_from_outside(classes):
    """In the loss it is seen that rows of an embedding, as many as samples, are none."""
    model = model_of(encoder=nn.Linear(N, N), names=nn.Embedding(N, N))

    ids = torch.arange(classes)

    def losses_of(m, inputs):
        logits = m["encoder"](inputs[0]) @ m["names"](ids).T
        return F.cross_entropy(logits, inputs[1], reduction="none")

    inputs = [features(N, N), torch.tensor([0, 1, 2, 1])]
    if classes == N:
        check_refused(model, losses_of, inputs, "one dimension and order, got others: matmul meets")
    else:
        both_ways(model, losses_of, inputs)


@pytest.mark.parametrize("product", [lambda x, w: x @ w.T, F.linear])
def test_names_of_classes_beside_features_without_a_gradient(product):
    model = model_of(names=nn.Embedding(N, N))

    def losses_of(m, inputs):
        return F.cross_entropy(product(inputs[0], m["names"](IDS)), inputs[1], reduction="none")

    check_refused(model, losses_of, [features(N, N), torch.tensor([0, 1, 2, 1])], "got others: .* meets samples")


@pytest.mark.parametrize("look_up", [lambda i: TABLE[i], lambda i: TABLE.index_select(0, i)])
def test_a_table_from_outside(look_up):
    """Row b of it is not sample b, as what each looks up in it shows."""
    model = model_of(head=nn.Linear(N, 2))
    rows = torch.tensor([1, 0, 3, 2])
    check_refused(
        model, lambda m, inputs: mean_square(m["head"](look_up(inputs[0]))), [rows], "belongs to other samples"
    )


def test_rows_of_a_parameter():
    model = model_of(table=nn.Embedding(N, N), head=nn.Linear(N, 2))
    rows = torch.tensor([1, 0, 3, 2])
    both_ways(model, lambda m, x: mean_square(m["head"](m["table"].weight.index_select(0, x[0]))), [rows])


def test_parameters_that_fill_samples_are_refused():
    model = model_of(inner=nn.Linear(N, N), one=nn.Linear(1, 1))

    def losses_of(m, inputs):
        h = m["inner"](inputs[0])
        h[:, 1].fill_(m["one"].bias[0])
        return mean_square(h)

    check_refused(model, losses_of, [features(N, N)], "batch: expected fill")


def test_samples_of_a_task_may_be_compared_after_the_last_parameter():
    """As supervised contrastive losses do."""
    model = model_of(encoder=nn.Linear(N, N))

    def losses_of(m, inputs):
        z = F.normalize(m["encoder"](inputs[0]), dim=-1)
        others = (inputs[1][:, None] == inputs[1]) & ~torch.eye(len(z), dtype=torch.bool)
        return ((z @ z.T).masked_fill(~others, 0.0)).sum(1)

    both_ways(model, losses_of, [features(N, N), TASKS])


def test_constants_written_into_a_part():
    """What is written into a view of it holds samples too."""
    model = model_of(a=nn.Linear(N, N), b=nn.Linear(N, N), head=nn.Linear(N, 2))

    def losses_of(m, inputs, mixes=False):
        shifted = torch.zeros(len(inputs[0]), N, N, dtype=torch.float64)
        shifted[:, 1:].copy_(inputs[0])
        h = m["b"](shifted)
        return mean_square(m["head"](m["a"](inputs[0]) + (h - h.mean(0) if mixes else h)[:, 1:]))

    both_ways(model, losses_of, [features(N, N - 1, N)])
    check_refused(model, lambda m, x: losses_of(m, x, mixes=True), [features(N, N - 1, N)], "mean works across")


@pytest.mark.parametrize("through", ["itself", "a view", "its base"])
def test_constants_moved_through_another_view(through):
    model = model_of(head=nn.Linear(N * N, 2))

    def losses_of(m, inputs):
        x, order = inputs[0].clone(), torch.tensor([2, 0, 3, 1])
        flat = x.view(len(x), -1)
        moved = flat if through == "its base" else x
        moved[:] = moved[order]
        return mean_square(m["head"](flat if through == "a view" else x.flatten(1)))

    check_refused(model, losses_of, [features(N, N, N)], "to belong to one sample|in place")


def test_a_product_from_the_right():
    model = model_of(inner=nn.Linear(N, N), head=nn.Linear(N, 2))
    weight = features(N, N)
    check_refused(
        model,
        lambda m, x: mean_square(m["head"](m["inner"](x[0]).__rmatmul__(weight))),
        [features(N, N)],
        "works across",
    )


def test_a_convolution_without_a_batch():
    model = model_of(inner=nn.Linear(5, 5), filters=nn.Conv1d(N, N, 3, padding=1))
    check_refused(
        model, lambda m, x: mean_square(m["filters"](m["inner"](x[0]))), [features(N, 5)], "with a batch only"
    )


def test_sequences_without_a_gradient_are_packed():
    model, lengths = model_of(gru=nn.GRU(N, N, batch_first=True)), torch.tensor([3, 2, 4, 1])

    def losses_of(m, inputs):
        packed = nn.utils.rnn.pack_padded_sequence(*inputs, batch_first=True, enforce_sorted=False)
        return mean_square(m["gru"](packed)[1][-1])

    both_ways(model, losses_of, [features(N, 5, N), lengths])


def test_parameters_under_vmap_are_refused():
    model = model_of(inner=nn.Linear(N, N))
    check_refused(
        model, lambda m, x: mean_square(torch.vmap(m["inner"])(x[0])), [features(N, N)], "outside of torch.func"
    )


class Kernel(torch.autograd.Function):
    """As kernels are called: into an empty tensor, unseen."""

    @staticmethod
    def forward(ctx, x):
        y = torch.empty_like(x)
        y.numpy()[:] = 2 * x.detach().numpy()
        return y

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def test_a_kernel_of_one_s_own():
    model = model_of(inner=nn.Linear(5, 5), head=nn.Linear(5, 2))
    both_ways(model, lambda m, x: mean_square(m["head"](Kernel.apply(m["inner"](x[0])))), [features(N, 5)])
