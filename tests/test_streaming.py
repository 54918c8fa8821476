"""One mixed batch against one backward a task: the same gradients, whatever the model, the samples and the trouble."""

import pytest
import streamed
import torch
from streamed import (
    BETA,
    check_gradients,
    check_steps,
    draw_tasks,
    named,
    no_traces,
    one_backward_a_task,
    one_batch,
    two,
)
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import gradvac_kernels as gvk
from gradvac_kernels.streaming import task_rows

GRANULARITIES = ["all_layer", "all_matrix", "whole_model"]


@pytest.fixture(autouse=True)
def _one_thread(_two_threads):
    """These models are too small to share; conftest's fixture restores the number."""
    torch.set_num_threads(1)


# ----------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize(("granularity", "steps"), [("all_layer", 20), ("all_matrix", 5), ("whole_model", 5)])
def test_the_demo_s_transformer(granularity, steps):
    check_steps(
        streamed.translator(), streamed.translator_losses, streamed.translator_inputs, steps, granularity=granularity
    )


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(("granularity", "steps"), [("all_layer", 20), ("all_matrix", 5), ("enc_dec", 5)])
def test_torch_s_transformer_with_tied_weights(granularity, steps, batch_first):
    check_steps(
        streamed.tied_transformer(batch_first),
        streamed.tied_losses(batch_first),
        streamed.tied_inputs(batch_first),
        steps,
        granularity=granularity,
        batch_dim=int(not batch_first),
    )


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_recurrent_layers(granularity):
    """One vector-Jacobian product a task, of each result that is used."""
    check_steps(streamed.recurrent(), streamed.sequence_losses, streamed.sequence_inputs, 5, granularity=granularity)


def test_a_result_that_its_operation_needs_again():
    """Torch's LSTM of float32 saves what it gave: nothing may seem to have written to it."""

    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = nn.LSTM(6, 5, batch_first=True), nn.Linear(5, 4)

        def forward(self, x, lengths):
            return self.head(self.lstm(x)[0].mean(1))

    torch.manual_seed(0)
    check_steps(Last(), streamed.sequence_losses, streamed.sequence_inputs, 3)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("way", ["index_add", "setitem", "grouped"])
def test_mixtures_of_experts(way, granularity):
    if way == "grouped" and not hasattr(torch, "_grouped_mm"):
        pytest.skip("this torch has no grouped products")
    check_steps(streamed.experts(way), streamed.sequence_losses, streamed.sequence_inputs, 5, granularity=granularity)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_filters_and_group_norms(granularity):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.ReLU(True),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, groups=2, dilation=1, stride=2, bias=False),
        nn.InstanceNorm2d(8, affine=True),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(2),
        nn.Conv1d(8, 4, 2, padding="same"),  # no rule for this padding: the general way
        nn.ConvTranspose1d(4, 4, 3),  # nor for these
        nn.PReLU(4),
        nn.Flatten(),
        nn.BatchNorm1d(24).eval(),
        nn.Linear(24, 3),
    )

    def losses_of(model, inputs):
        return (model(inputs[0]) - inputs[1]).square().mean(1)

    def inputs_of(n, generator):
        return [torch.randn(n, 3, 12, 12, generator=generator), torch.randn(n, 3, generator=generator)]

    check_steps(model, losses_of, inputs_of, 3, granularity=granularity)


class Uses(nn.Module):
    """Parameters in every other place."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(12, 6, padding_idx=0)
        self.weighed = nn.Embedding(12, 6, scale_grad_by_freq=True)
        self.first = nn.Parameter(torch.randn(1, 1, 6))
        self.mixing = nn.Parameter(torch.randn(5, 5))
        self.pieces = nn.Parameter(torch.randn(2, 6, 3))
        self.gate = nn.Parameter(torch.randn(6))
        self.start = nn.Parameter(torch.randn(6))
        self.bilinear = nn.Bilinear(6, 6, 6)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
        self.chosen = nn.Parameter(torch.randn(12, 6))
        self.shared = nn.Linear(6, 6)
        self.head = nn.Linear(6, 2)
        self.twice = nn.Parameter(torch.randn(6, 6))

    def forward(self, ids):
        x = self.table(ids) + self.weighed(ids)  # [B, 4, 6]
        x = torch.cat([self.first.expand(len(ids), -1, -1), x], 1)  # [B, 5, 6]
        x = torch.einsum("lm,bmd->bld", self.mixing, x)
        x = x + torch.cat([x @ self.pieces[0], x @ self.pieces[1]], -1).tanh()
        x = torch.where(x > 0, x, self.gate * 0.1)
        x *= self.gate.sigmoid()
        x = x + self.bilinear(x, x).tanh() + self.chosen[ids].mean(1, keepdim=True)
        h = self.start.repeat(len(ids), 1)  # [B, 6], of no sample yet
        for step in x.unbind(1):
            h = (self.shared(h) + step).tanh()
        h = h + F.linear(h, self.twice, self.twice[0]).tanh()  # two parts of one parameter in one operation
        return self.head(self.normed(h) + F.linear(h, self.shared.weight.T))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_parameters_in_every_other_place(granularity):
    torch.manual_seed(0)

    def losses_of(model, inputs):
        return (model(inputs[0]) - inputs[1]).square().mean(1)

    def inputs_of(n, generator):
        return [torch.randint(12, (n, 4), generator=generator), torch.randn(n, 2, generator=generator)]

    check_steps(Uses(), losses_of, inputs_of, 4, granularity=granularity)


LATER = torch.ones(5, 5, dtype=torch.bool).triu(1)
PADDING = torch.tensor([[0, 0, 0, 0, 1], [0, 0, 0, 1, 1], [0, 0, 0, 0, 0]] * 3).bool()  # [9, 5]
OWN = torch.randn(18, 5, 5, generator=torch.Generator().manual_seed(0))  # [B * heads, L, L]
ATTENTIONS = {
    "plain": ({}, {}),
    "weights": ({}, {"need_weights": True}),
    "causal": ({}, {"attn_mask": LATER, "is_causal": True}),
    "causal and padded": ({}, {"attn_mask": LATER, "is_causal": True, "key_padding_mask": PADDING}),
    "masked": ({}, {"attn_mask": LATER}),
    "masked by numbers": ({}, {"attn_mask": OWN[0], "key_padding_mask": -3.0 * PADDING}),
    "masked by head": ({}, {"attn_mask": OWN}),
    "masked by head and padded": ({}, {"attn_mask": OWN > 2, "key_padding_mask": PADDING}),
    "padded": ({}, {"key_padding_mask": PADDING}),
    "no bias": ({"bias": False}, {"key_padding_mask": PADDING}),
    "other widths": ({"kdim": 3, "vdim": 3}, {}),
    "biases of keys": ({"add_bias_kv": True, "add_zero_attn": True}, {}),
    "batch second": ({"batch_first": False}, {"attn_mask": LATER, "key_padding_mask": PADDING}),
}


@pytest.mark.parametrize("crossed", [False, True])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_every_way_to_attend(name, crossed):
    """Against torch's own, which is what one backward a task runs."""
    settings, masks = ATTENTIONS[name]

    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(6, 4)
            self.attention = nn.MultiheadAttention(4, 2, **{"batch_first": True} | settings)

        def forward(self, x, which):
            x = self.first(x)
            y = x.roll(1, -1)[..., : settings.get("kdim", 4)] if crossed or "kdim" in settings else x
            given = {"need_weights": False} | masks
            for mask, rows in (("key_padding_mask", 1), ("attn_mask", 2)):  # of these samples
                if mask in given and len(given[mask]) == 9 * rows:
                    given[mask] = given[mask].unflatten(0, (9, rows))[which].flatten(0, 1)
                if mask in given and given[mask].is_floating_point():
                    given[mask] = given[mask].to(x.dtype)
            if not self.attention.batch_first:
                x, y = x.transpose(0, 1), y.transpose(0, 1)
            out = self.attention(x, x if y is x else y, y, **given)[0]
            return out if self.attention.batch_first else out.transpose(0, 1)

    def losses_of(model, inputs):
        return (model(*inputs[:2]) - inputs[2]).square().mean((1, 2))

    def inputs_of(n, generator):
        aims = 3 * torch.randn(n, 1, 4, generator=generator)
        return [torch.randn(n, 5, 6, generator=generator), torch.arange(n), aims]

    torch.manual_seed(0)
    check_steps(Attends(), losses_of, inputs_of, 2)


def test_a_custom_operator_with_its_rule():
    @torch.library.custom_op("gradvac_tests::scaled", mutates_args=())
    def scaled(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * weight

    scaled.register_autograd(
        lambda ctx, grad: (grad * ctx.saved_tensors[1], (grad * ctx.saved_tensors[0]).sum(0)),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    )
    calls = []

    @gvk.register_rule(torch.ops.gradvac_tests.scaled)
    def rule(capture, function, args, kwargs):
        x, weight = args
        calls.append(x.shape)
        return capture.tap(function(x, capture.plain(weight)), capture.of(x), [weight], [x], grads)

    def grads(rows, saved, grad, dim, into):
        rows.add_sums(rows.arranged(grad * saved[0], dim), into[0])

    class Scaled(streamed.Towers):
        def forward(self, x):
            return self.head(torch.ops.gradvac_tests.scaled(self.body(x), self.scale))

    torch.manual_seed(0)
    check_steps(Scaled(), streamed.tower_losses, streamed.tower_inputs, 3)
    assert len(calls) == 2 * 3  # in two types


# ------------------------------------------------------------------------------------------------- tasks and samples


def test_fifty_tasks_of_unequal_sizes():
    """1 to 64 samples a task, in any order."""
    sizes = torch.randint(1, 65, (50,), generator=torch.Generator().manual_seed(3))
    task_of_sample = torch.arange(50).repeat_interleave(sizes)
    task_of_sample = task_of_sample[torch.randperm(len(task_of_sample), generator=torch.Generator().manual_seed(4))]
    (buffered, by_task), (model, by_batch) = two(streamed.towers(), 50)
    inputs = streamed.tower_inputs(len(task_of_sample), torch.Generator().manual_seed(0))
    for _ in range(2):
        want = one_backward_a_task(buffered, by_task, streamed.tower_losses, inputs, task_of_sample)
        found = one_batch(model, by_batch, streamed.tower_losses, inputs, task_of_sample)
        assert torch.equal(found.corrected, want.corrected)
        check_gradients(model, buffered, by_task.groups)


@pytest.mark.parametrize("scratch", [1, 300, 1 << 20])
@pytest.mark.parametrize("in_order", [True, False])
def test_equally_many_samples_a_task(in_order, scratch, monkeypatch):
    """Products of all tasks at once, in pieces of any size."""
    monkeypatch.setattr(task_rows, "_SCRATCH", scratch)
    (buffered, by_task), (model, by_batch) = two(streamed.translator().double(), 3)
    ids = torch.arange(12) // 4 if in_order else torch.arange(12) % 3
    inputs = streamed.translator_inputs(12, torch.Generator().manual_seed(0))
    for _ in range(2):
        want = one_backward_a_task(buffered, by_task, streamed.translator_losses, inputs, ids)
        found = one_batch(model, by_batch, streamed.translator_losses, inputs, ids)
        assert torch.equal(found.corrected, want.corrected)
        check_gradients(model, buffered, by_task.groups, streamed.TOLERANCE[torch.float64])


def test_missing_tasks_and_names():
    (buffered, by_task), (model, by_batch) = two(streamed.towers(), 5)
    for present in ([3, 1], [0, 3], [4]):
        names = [by_task.tasks[present[i % len(present)]] for i in range(7)]
        ids = torch.tensor([by_task.tasks.index(name) for name in names])
        inputs = streamed.tower_inputs(7, torch.Generator().manual_seed(0))
        one_backward_a_task(buffered, by_task, streamed.tower_losses, inputs, ids)
        with by_batch.batch(names):
            gvk.task_mean_loss(streamed.tower_losses(model, inputs), names).backward()
        assert by_batch.last_task_ids == tuple(sorted(present)) == by_task.last_task_ids
        assert torch.allclose(by_batch.method.ema, by_task.method.ema, rtol=0, atol=1e-6)
        check_gradients(model, buffered, by_task.groups)


@pytest.mark.parametrize("granularity", ["all_layer", "all_matrix"])
@pytest.mark.parametrize("in_order", [True, False])
def test_the_bits_of_the_buffer(granularity, in_order):
    """Kept in a buffer and turned there, or slab by slab: the same numbers, targets and orders."""
    (kept, by_apply), (model, by_batch) = two(streamed.translator(), 4, granularity)
    for step in range(4):
        task_of_sample = draw_tasks(4, 12, step)
        task_of_sample = task_of_sample.sort().values if in_order else task_of_sample
        inputs = streamed.translator_inputs(12, torch.Generator().manual_seed(step))
        by_apply.method.seed = by_batch.method.seed = 7
        with by_apply.batch(task_of_sample, keep=True):
            gvk.task_mean_loss(streamed.translator_losses(kept, inputs), task_of_sample).backward()
        want = by_apply.apply()
        found = one_batch(model, by_batch, streamed.translator_losses, inputs, task_of_sample)
        for a, b in zip(found, want):
            assert torch.equal(a.nan_to_num(9), b.nan_to_num(9))
        assert torch.equal(by_batch.method.ema, by_apply.method.ema)
        assert by_batch.method.step == by_apply.method.step == step + 1


def test_micro_batches_accumulate_in_the_buffer():
    (buffered, by_task), (model, by_batch) = two(streamed.towers(), 3)
    batches = [(draw_tasks(3, 8, s), streamed.tower_inputs(8, torch.Generator().manual_seed(s))) for s in range(3)]
    for task in range(3):
        for ids, inputs in batches:
            mine = ids == task
            if mine.any():
                with by_task.task(by_task.tasks[task]):
                    streamed.tower_losses(buffered, [x[mine] for x in inputs]).mean().backward()
    for ids, inputs in batches:
        with by_batch.batch(ids, keep=True):
            gvk.task_mean_loss(streamed.tower_losses(model, inputs), ids).backward()
    rows = [by_batch.task_ids.index(task) for task in by_task.task_ids]
    assert torch.allclose(by_batch.grads[rows], by_task.grads, rtol=1e-5, atol=1e-6)
    by_task.apply()
    by_batch.apply()
    assert by_batch.last.weights.shape == (len(by_batch.groups), 3)
    with by_batch.batch(ids):  # and a streamed step after it
        gvk.task_mean_loss(streamed.tower_losses(model, inputs), ids).backward()


def test_reduction_mean():
    (_, _), (model, by_sum) = two(streamed.towers(), 3)
    (_, _), (other, by_mean) = two(streamed.towers(), 3, reduction="mean")
    ids, inputs = torch.tensor([0, 2, 2, 0]), streamed.tower_inputs(4, torch.Generator().manual_seed(0))
    one_batch(model, by_sum, streamed.tower_losses, inputs, ids)
    one_batch(other, by_mean, streamed.tower_losses, inputs, ids)
    assert torch.equal(other.head.weight.grad, model.head.weight.grad / 2)


# ----------------------------------------------------------------------------------------------- the rest of training


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant):
    class Checkpointed(streamed.Towers):
        def forward(self, x):
            x = checkpoint(self.body, x.requires_grad_(), use_reentrant=use_reentrant)
            return self.head(self.norm(x) * self.scale)

    torch.manual_seed(0)
    check_steps(Checkpointed(), streamed.tower_losses, streamed.tower_inputs, 3)


def test_a_layer_in_two_reentrant_checkpoints_is_refused():
    model = streamed.towers()
    tasks = gvk.TaskGradients(model, named(2))
    x = torch.randn(4, 6, requires_grad=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"), tasks.batch([0, 1, 0, 1]):  # noqa: PT012
        y = checkpoint(model.body[0], x, use_reentrant=True)
        y = checkpoint(lambda y: F.linear(y.tanh(), model.body[0].weight.T), y, use_reentrant=True)
        y.square().sum().backward()
    no_traces(model)


def test_autocast():
    """The gradients of one backward a task under autocast, as far as bfloat16 goes."""
    (buffered, by_task), (model, by_batch) = two(streamed.translator(), 3)
    ids = draw_tasks(3, 12, 0)
    inputs = streamed.translator_inputs(12, torch.Generator().manual_seed(0))

    def losses_of(model, inputs):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(*inputs)
        return streamed.next_token_losses(logits.float(), inputs[1])

    for inside in (False, True):  # backward within autocast too, as some do
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            one_batch(model, by_batch, losses_of, inputs, ids)
        one_backward_a_task(buffered, by_task, losses_of, inputs, ids)
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
        # bfloat16 rounds by 2^-9; a handful of layers and a turning after another
        check_gradients(model, buffered, by_task.groups, tolerance=20 * 2**-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types(dtype):
    (buffered, by_task), (model, by_batch) = two(streamed.towers().to(dtype), 3)
    ids = draw_tasks(3, 12, 0)
    inputs = [x.to(dtype) for x in streamed.tower_inputs(12, torch.Generator().manual_seed(0))]
    one_backward_a_task(buffered, by_task, streamed.tower_losses, inputs, ids)
    one_batch(model, by_batch, streamed.tower_losses, inputs, ids)
    # bfloat16 rounds every activation and sum by 2^-9; a dozen of them, and a turning, lie one after another
    check_gradients(model, buffered, by_task.groups, tolerance=2**-4 if dtype == torch.bfloat16 else 1e-13)


def test_grad_scaler_skips_an_overflow_and_goes_on():
    model = streamed.towers()
    tasks = gvk.TaskGradients(model, named(2), method=gvk.GradVac(beta=BETA))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    ids, inputs = torch.tensor([0, 1, 0, 1]), streamed.tower_inputs(4, torch.Generator().manual_seed(0))
    weights, targets = [], []
    for factor in (1.0, torch.inf, 1.0):
        optimizer.zero_grad()
        with tasks.batch(ids):
            losses = streamed.tower_losses(model, inputs) * torch.tensor([1.0, factor, 1.0, 1.0])
            scaler.scale(gvk.task_mean_loss(losses, ids)).backward()
        scaler.step(optimizer)
        scaler.update()
        weights.append(model.head.weight.detach().clone())
        targets.append(tasks.method.ema.clone())
    assert torch.equal(weights[0], weights[1])  # skipped
    assert not torch.equal(weights[1], weights[2])
    assert torch.equal(targets[0], targets[1])
    assert bool(targets[2].isfinite().all())
    assert not torch.equal(targets[1], targets[2])
    assert scaler.get_scale() == 2.0**7


def test_frozen_parameters_and_clipping():
    model = streamed.towers()
    model.body.requires_grad_(False)
    (buffered, by_task), (model, by_batch) = two(model, 3)
    for _, tasks in ((buffered, by_task), (model, by_batch)):
        tasks._model.norm.weight.requires_grad_(False)  # frozen later
    ids, inputs = draw_tasks(3, 9, 0), streamed.tower_inputs(9, torch.Generator().manual_seed(0))
    one_backward_a_task(buffered, by_task, streamed.tower_losses, inputs, ids)
    one_batch(model, by_batch, streamed.tower_losses, inputs, ids)
    assert model.body[0].weight.grad is None
    assert model.norm.weight.grad is None
    check_gradients(model, buffered, by_task.groups)
    assert float(nn.utils.clip_grad_norm_(model.parameters(), 1e-3)) > 1e-3
    assert float(model.head.weight.grad.norm()) <= 1e-3


def test_a_parameter_without_a_gradient():
    (buffered, by_task), (model, by_batch) = two(streamed.towers(), 3)
    ids, inputs = draw_tasks(3, 9, 0), streamed.tower_inputs(9, torch.Generator().manual_seed(0))
    model.idle.weight.grad = torch.ones(4, 8)
    for _ in range(2):
        want = one_backward_a_task(buffered, by_task, streamed.tower_losses, inputs, ids)
        found = one_batch(model, by_batch, streamed.tower_losses, inputs, ids)
        assert model.idle.weight.grad is None  # the optimizer passes over it
        assert torch.equal(found.corrected, want.corrected)
        idle = by_batch.groups.names.index("idle")
        assert bool(found.similarity[idle].isnan().all())
        assert bool((found.weights[idle] == 1).all())
        assert not bool(by_batch.method.ema[idle].any())
        check_gradients(model, buffered, by_task.groups)


def test_a_result_that_no_loss_uses():
    """A layer that ran forward, but not backward, holds nothing up."""
    (buffered, by_task), (model, by_batch) = two(streamed.towers(), 3)
    ids, inputs = draw_tasks(3, 9, 0), streamed.tower_inputs(9, torch.Generator().manual_seed(0))

    def losses_of(model, inputs):
        model.idle(model.body(inputs[0]))
        return streamed.tower_losses(model, inputs)

    one_backward_a_task(buffered, by_task, losses_of, inputs, ids)
    one_batch(model, by_batch, losses_of, inputs, ids)
    assert model.idle.weight.grad is None
    check_gradients(model, buffered, by_task.groups)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_task_with_a_nan(granularity):
    (buffered, by_task), (model, by_batch) = two(streamed.towers(), 3, granularity)
    ids, inputs = torch.tensor([0, 1, 2, 0, 1, 2]), streamed.tower_inputs(6, torch.Generator().manual_seed(0))
    one_backward_a_task(buffered, by_task, streamed.tower_losses, inputs, ids)
    one_batch(model, by_batch, streamed.tower_losses, inputs, ids)
    before = by_batch.method.ema.clone()
    inputs[1][1] = torch.nan
    want = one_backward_a_task(buffered, by_task, streamed.tower_losses, inputs, ids)
    found = one_batch(model, by_batch, streamed.tower_losses, inputs, ids)
    assert torch.equal(found.similarity.isnan(), want.similarity.isnan())
    assert torch.equal(found.corrected, want.corrected)
    assert torch.equal(by_batch.method.ema[:, 1], before[:, 1])
    assert torch.equal(by_batch.method.ema[:, :, 1], before[:, :, 1])
    assert not torch.equal(by_batch.method.ema[:, 0, 2], before[:, 0, 2])
    assert torch.allclose(by_batch.method.ema, by_task.method.ema, rtol=0, atol=1e-6)
    assert bool(model.head.weight.grad.isnan().any())  # a GradScaler sees it
    inputs[1][1] = 0.0
    one_batch(model, by_batch, streamed.tower_losses, inputs, ids)
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


# ---------------------------------------------------------------------------------------------------------- trouble


class Trouble(Exception):
    pass


class Breaks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise Trouble


def usable_after(model, tasks, before):
    """The model trains on as if the failed step had not been."""
    no_traces(model)
    assert tasks.method.step == 1
    assert torch.equal(tasks.method.ema, before)
    twin, by_twin = two(model, 3, "all_matrix")[0]
    by_twin.method.load_state_dict(tasks.method.state_dict())
    ids, inputs = draw_tasks(3, 9, 5), streamed.tower_inputs(9, torch.Generator().manual_seed(5))
    want = one_backward_a_task(twin, by_twin, streamed.tower_losses, inputs, ids)
    found = one_batch(model, tasks, streamed.tower_losses, inputs, ids)
    assert torch.equal(found.corrected, want.corrected)
    check_gradients(model, twin, tasks.groups)


def ready():
    model = streamed.towers()
    tasks = gvk.TaskGradients(model, named(3), "all_matrix", method=gvk.GradVac(beta=BETA))
    ids, inputs = draw_tasks(3, 9, 0), streamed.tower_inputs(9, torch.Generator().manual_seed(0))
    one_batch(model, tasks, streamed.tower_losses, inputs, ids)
    return model, tasks, ids, inputs, tasks.method.ema.clone()


def test_an_exception_in_the_middle_of_a_backward():
    model, tasks, ids, inputs, before = ready()

    def losses_of(model, inputs):
        x = Breaks.apply(model.body(inputs[0]))  # the groups after this one have been vaccinated by then
        return (model.head(model.norm(x) * model.scale) - inputs[1]).square().mean(1)

    with pytest.raises(Trouble):
        one_batch(model, tasks, losses_of, inputs, ids)
    usable_after(model, tasks, before)


def test_a_failed_backward_that_was_caught():
    model, tasks, ids, inputs, before = ready()
    with (  # noqa: PT012
        pytest.raises(RuntimeError, match="expected a backward that finishes, got no gradient of 'body"),
        tasks.batch(ids),
    ):
        x = Breaks.apply(model.body(inputs[0]))
        loss = (model.head(model.norm(x) * model.scale) - inputs[1]).square().mean()
        with pytest.raises(Trouble):
            loss.backward()
    usable_after(model, tasks, before)


def test_an_exception_in_forward():
    model, tasks, ids, inputs, before = ready()
    with pytest.raises(Trouble), tasks.batch(ids):  # noqa: PT012
        streamed.tower_losses(model, inputs)
        raise Trouble
    usable_after(model, tasks, before)


def test_two_backwards_need_keep():
    model, tasks, ids, inputs, before = ready()
    with pytest.raises(RuntimeError, match="keep=True"), tasks.batch(ids):  # noqa: PT012
        losses = streamed.tower_losses(model, inputs)
        losses[:4].sum().backward(retain_graph=True)
        losses[4:].sum().backward()
    usable_after(model, tasks, before)
    with tasks.batch(ids, keep=True):
        losses = streamed.tower_losses(model, inputs)
        losses[:4].sum().backward(retain_graph=True)
        losses[4:].sum().backward()
    parts = tasks.grads.clone()
    tasks.discard()
    with tasks.batch(ids, keep=True):
        streamed.tower_losses(model, inputs).sum().backward()
    assert torch.allclose(tasks.grads, parts, rtol=1e-5, atol=1e-6)


def test_no_backward():
    model, tasks, ids, inputs, before = ready()
    for keep in (False, True):
        with pytest.raises(RuntimeError, match="expected a backward"), tasks.batch(ids, keep=keep):
            streamed.tower_losses(model, inputs)
    usable_after(model, tasks, before)


def test_nested_and_mixed_contexts():
    model, tasks, ids, inputs, before = ready()
    other = gvk.TaskGradients(streamed.towers(), named(3))
    for inner in (tasks, other):
        with pytest.raises(RuntimeError, match="one task or batch at a time"), tasks.batch(ids), inner.batch(ids):
            pass
    with pytest.raises(RuntimeError, match="one task at a time"), tasks.batch(ids), tasks.task("task 0"):
        pass
    with pytest.raises(RuntimeError, match="inside a task"), tasks.batch(ids):
        tasks.apply()
    with tasks.task("task 0"):
        streamed.tower_losses(model, inputs).sum().backward()
    with pytest.raises(RuntimeError, match="discard"), tasks.batch(ids):
        pass
    tasks.discard()
    usable_after(model, tasks, before)


@pytest.mark.parametrize(
    ("task_of_sample", "error", "match"),
    [
        (torch.tensor([0, 3]), ValueError, "0..2, got"),
        (torch.tensor([-1, 0]), ValueError, "0..2, got"),
        (torch.tensor([0.0, 1.0]), TypeError, "task_of_sample: expected dtype int64 or int32"),
        (torch.tensor([[0, 1]]), ValueError, "task_of_sample: expected shape"),
        (["task 0", "who"], ValueError, "task_of_sample: expected tasks among"),
        ([0, 1.5], TypeError, "task_of_sample: expected ints"),
        ([], ValueError, "at least one sample"),
        ("task 0", TypeError, "a tensor or a sequence, got str"),
        (None, TypeError, "a tensor or a sequence, got NoneType"),
    ],
)
def test_bad_tasks(task_of_sample, error, match):
    _, tasks, *_ = ready()
    with pytest.raises(error, match=match), tasks.batch(task_of_sample):
        pass


def test_bad_batch_dim_and_method():
    model, tasks, ids, *_ = ready()
    for bad in (-1, True, 0.0, None):
        with pytest.raises(ValueError, match="batch_dim: expected an int"), tasks.batch(ids, batch_dim=bad):
            pass
    plain = gvk.TaskGradients(model, named(3), method=lambda grads, groups, task_ids, out: None)
    with pytest.raises(TypeError, match="vaccinates in parts"), plain.batch(ids):
        pass


# ------------------------------------------------------------------------------------------ what cannot be followed


def refused(model, forward, match, error=ValueError, samples=4, batch_dim=0):
    tasks = gvk.TaskGradients(model, named(2))
    ids = [i % 2 for i in range(samples)]
    with pytest.raises(error, match=match), tasks.batch(ids, batch_dim=batch_dim):
        forward().sum().backward()
    no_traces(model)
    assert tasks.method.step == 0


def test_batch_norm_is_refused_by_name():
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
    refused(model, lambda: None, "got BatchNorm1d '1', which normalises over the batch")
    linear = nn.Linear(6, 6)
    x = torch.randn(4, 6)
    refused(linear, lambda: F.batch_norm(linear(x), None, None, training=True), "got a batch_norm in training")


def test_what_mixes_samples_is_refused():
    model, x = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4)), torch.randn(4, 6)
    for mix, name in (
        (lambda y: y - y.mean(0), "mean works across the samples"),
        (lambda y: y.softmax(0), "softmax works across the samples"),
        (lambda y: (y @ y.T) @ y, "meets samples in different dimensions"),
        (lambda y: y.T @ y, "matmul works across the samples"),
        (lambda y: y + y.flip(0), "flip works across the samples"),
        (lambda y: y.cumsum(0), "cumsum works across the samples"),
        (lambda y: y + y[[1, 0, 3, 2]], "meets samples in different dimensions or orders"),
        (lambda y: y.view(2, 2, 6).sum(1).repeat(2, 1), "reshape|works across|known"),
        (lambda y: torch.fft.fft(y, dim=0).real, "fft works across the samples"),
        (lambda y: torch.linalg.pinv(y).T, "is not known to keep samples apart"),
    ):
        refused(model, lambda mix=mix: model[1](mix(model[0](x))), name)


def test_mixing_within_a_task_is_exact():
    """Only tasks must be kept apart: their gradients are sums over their samples."""
    (buffered, by_task), (model, by_batch) = two(streamed.towers(), 2)
    ids, inputs = torch.tensor([0, 0, 0, 0]), streamed.tower_inputs(4, torch.Generator().manual_seed(0))

    def losses_of(model, inputs):
        y = model.body(inputs[0])
        y = y + y[[1, 0, 3, 2]]
        return (model.head(y) - inputs[1]).square().mean(1)

    one_backward_a_task(buffered, by_task, losses_of, inputs, ids)
    one_batch(model, by_batch, losses_of, inputs, ids)
    check_gradients(model, buffered, by_task.groups)


@pytest.mark.parametrize("length", [1, 4])
def test_ids_that_are_made_inside(length):
    def losses_of(model, inputs):
        (ids,) = inputs
        shifted, marked, copied = torch.zeros_like(ids), torch.zeros_like(ids), torch.zeros_like(ids)
        shifted[:, 1:] = ids[:, :-1]
        marked[ids > 3] = 1
        copied[ids < 6] = ids[ids < 6]
        several = torch.zeros(len(ids), 9, dtype=torch.int64).scatter_(1, ids, 1)
        lengths = torch.bucketize(ids.cumsum(1), torch.tensor([3, 9]))
        losses = sum(model(made).mean((1, 2)) for made in (shifted, marked, copied, several, lengths))
        return losses * (ids[:, 0] % 2 - 0.5)

    torch.manual_seed(0)
    check_steps(nn.Embedding(9, 4), losses_of, lambda n, g: [torch.randint(9, (n, length), generator=g)], 3)


def test_what_the_model_makes_is_not_placed_by_its_size():
    """Four different values of four samples, and as many experts: sizes say nothing."""
    values, weight = nn.Embedding(9, 4), nn.Parameter(torch.ones(4, 4))
    ids = torch.tensor([5, 3, 8, 1])

    def of_values(model, inputs):
        different, which = ids.unique(return_inverse=True)
        return values(different)[which].square().mean(1)

    def of_experts(model, inputs):
        busy = (ids % 4).bincount(minlength=4) > 0
        return (values(ids) + busy[:, None] * weight).square().mean(1)

    for losses_of, name in ((of_values, "unique"), (of_experts, "bincount")):
        tasks = gvk.TaskGradients(nn.ModuleList([values, nn.ParameterList([weight])]), named(2))
        with pytest.raises(ValueError, match=name):
            one_batch(None, tasks, losses_of, None, torch.tensor([0, 1, 0, 1]))


HALF = torch.tensor([0, 1, 0, 1]) == 0  # the samples of the first of two tasks


@pytest.mark.parametrize(
    "put",
    [
        lambda y, x: torch.vstack([y[HALF], x[~HALF]]),
        lambda y, x: torch.cat([y[HALF], torch.zeros(2, 6)]),
        lambda y, x: F.pad(y[HALF], (0, 0, 0, 2)),
        lambda y, x: nn.utils.rnn.pad_sequence([y[0], x[1], x[2], x[3]], True),
        lambda y, x: torch.stack([y[0], torch.zeros(6), torch.zeros(6), torch.zeros(6)]),
        lambda y, x: x.index_put((HALF,), y[HALF]),
        lambda y, x: x.masked_scatter(HALF[:, None], y[HALF]),
        lambda y, x: torch.slice_scatter(x, y[:1], 0, 0, 1),
        lambda y, x: F.one_hot(torch.tensor([2, 0]), 4).T.float() @ y[HALF],
        lambda y, x: y[:1] + x,
        lambda y, x: torch.cat([y[:1].expand(4, 6), x], 1)[:, 3:9],
        lambda y, x: torch.einsum("bd,bd->bd", y[:1], x),
    ],
)
def test_samples_of_one_task_beside_others_are_not_all_of_it(put):
    model, x = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4)), torch.randn(4, 6)
    refused(model, lambda: model[1](put(model[0](x), x)), r"batch: expected (every value|samples in one)")


@pytest.mark.parametrize("write", ["slice", "copy", "row", "rows", "ids", "parts of ids"])
def test_a_part_of_one_task_is_not_the_whole(write):
    model, x = nn.ModuleList([nn.Embedding(9, 6), nn.Linear(6, 6)]), torch.randn(4, 6)
    ids = torch.arange(12).view(4, 3) % 9

    def put():
        out = torch.zeros(4, 6)
        if write == "slice":
            out[:1] = model[1](x[:1])
        elif write == "copy":
            out[:1].copy_(model[1](x[:1]))
        elif write == "row":
            out[0] = model[1](x)[0]
        elif write == "rows":
            for i in range(4):
                out[i] = model[1](x)[i] if i % 2 else x[i]
        else:
            out = torch.zeros(4, 3, dtype=torch.int64)
            for row, its in enumerate(ids):
                if write == "ids":
                    out[row] = its
                else:
                    out[row, :2] = its[1:]
            return model[1](model[0](out))
        return model[1](out)

    refused(model, put, "batch: expected")


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad * weight, (grad * x).sum(0)


def test_what_has_no_sample_or_is_not_seen_is_refused():
    model, x = nn.Linear(6, 6), torch.randn(4, 6)
    refused(model, lambda: model(x).square().mean() + 0.1 * model.weight.square().sum(), "'weight'|parameters")
    refused(model, lambda: Doubled.apply(model(x), model.bias), "every use of 'bias' to belong to a sample")
    refused(model, lambda: model(torch.randn(3, 6)), "every use of '(weight|bias)' to belong to a sample")


def test_samples_in_another_dimension_than_stated():
    model = nn.Linear(6, 6)
    refused(model, lambda: model(torch.randn(5, 4, 6)), "to belong to a sample")  # they are second
    refused(model, lambda: model(torch.randn(5, 4, 6)), "to belong to a sample", samples=5, batch_dim=1)


def test_what_cannot_be_followed_is_refused_by_name():
    inner = nn.Sequential(nn.Linear(6, 6))
    inner.add_module("compiled", torch.compile(nn.Linear(6, 6)))
    refused(inner, lambda: None, "got OptimizedModule 'compiled'")


# ------------------------------------------------------------------------------------- what once went wrong in silence


def test_other_derivatives_in_the_context_add_nothing():
    """A saliency, then the backward, are those of the backward alone; what would be of second order is refused."""
    (buffered, by_task), (model, by_batch) = two(streamed.towers(), 3)
    ids, inputs = draw_tasks(3, 9, 0), streamed.tower_inputs(9, torch.Generator().manual_seed(0))
    one_backward_a_task(buffered, by_task, streamed.tower_losses, inputs, ids)
    with by_batch.batch(ids):
        x = inputs[0].clone().requires_grad_()
        (saliency,) = torch.autograd.grad(model(x).sum(), x)
        assert bool(saliency.any())
        gvk.task_mean_loss(streamed.tower_losses(model, inputs), ids).backward()
    check_gradients(model, buffered, by_task.groups)
    with pytest.raises(ValueError, match="first derivatives only"), by_batch.batch(ids):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)
    with pytest.raises(ValueError, match=r"got torch\.autograd\.grad of a parameter"), by_batch.batch(ids):
        torch.autograd.grad(model(x).sum(), model.head.weight)


def test_backward_for_some_parameters_only():
    (buffered, by_task), (model, by_batch) = two(streamed.towers(), 3, "all_matrix")
    ids, inputs = draw_tasks(3, 9, 0), streamed.tower_inputs(9, torch.Generator().manual_seed(0))
    one_backward_a_task(buffered, by_task, streamed.tower_losses, inputs, ids)
    with by_batch.batch(ids):
        loss = gvk.task_mean_loss(streamed.tower_losses(model, inputs), ids)
        loss.backward(inputs=[model.body[0].weight])
    assert torch.allclose(model.body[0].weight.grad, buffered.body[0].weight.grad, rtol=1e-5)
    assert model.head.weight.grad is None
    assert model.body[0].bias.grad is None


def test_a_graph_of_an_earlier_context_is_refused():
    model, tasks, ids, inputs, _ = ready()
    with tasks.batch(ids):
        loss = streamed.tower_losses(model, inputs).sum()
        loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="in the context of the forward"):
        loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="in the context of the forward"), tasks.batch(ids):
        loss.backward()


def test_a_layer_inside_and_outside_a_reentrant_checkpoint():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x):
            return self.last(checkpoint(self.first, self.first(x).tanh(), use_reentrant=True))

    torch.manual_seed(0)
    check_steps(Twice(), streamed.tower_losses, streamed.tower_inputs, 3)


class Casts(nn.Module):
    """Parameters that are brought to a type or a shape, views that overlap or have no unit stride, and written ones."""

    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.randn(1, 1, 6))
        self.band = nn.Parameter(torch.randn(69))
        self.tall = nn.Parameter(torch.randn(6, 12, 2))
        self.norm = nn.Parameter(torch.randn(6))
        self.fill = nn.ParameterDict({"value": torch.randn(()), "row": torch.randn(6)})
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        h = torch.cat([self.first.to(x).expand(len(x), -1, -1), x[:, None].expand(-1, 2, -1)], 1)  # [B, 3, 6]
        h = F.layer_norm(h, (6,), self.norm.type_as(h))
        h = torch.cat([h] * 11, -1)[..., :64] @ self.band.unfold(0, 64, 1).T  # [B, 3, 6]
        h = h + F.linear(h.tanh(), self.tall[:, ::2, 0]) + F.linear(input=h, weight=self.tall[:, 6:, 1].type_as(h))
        h = h.masked_fill(mask=h > 1, value=self.fill.value)
        h[:, 0] = self.fill.row
        h[x[:, 0] > 0.5, 1] = self.fill.row.tanh()
        return self.head(h.sum(1))


@pytest.mark.parametrize("granularity", ["all_layer", "whole_model"])
def test_casts_overlaps_and_writes(granularity):
    torch.manual_seed(0)
    check_steps(Casts(), streamed.tower_losses, streamed.tower_inputs, 3, granularity=granularity)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoints_of_computed_parameters(use_reentrant):
    """What is recomputed, is recomputed under the same eyes."""

    class Computed(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Parameter(torch.randn(6))
            self.mixing = nn.Parameter(torch.randn(6, 6))
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
            self.head = nn.Linear(6, 4)

        def block(self, x):
            return self.normed(torch.einsum("bi,ij->bj", x * self.gate.exp(), self.mixing)).tanh()

        def forward(self, x):
            return self.head(checkpoint(self.block, x.requires_grad_(), use_reentrant=use_reentrant))

    torch.manual_seed(0)
    check_steps(Computed(), streamed.tower_losses, streamed.tower_inputs, 3)


def test_nested_checkpoints_of_as_many_tokens_as_samples():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x):
            x = self.a(x[:, None] * torch.linspace(-2, 2, 9, dtype=x.dtype)[:, None])  # [9, 9, 6]
            inner = lambda h: self.b(checkpoint(self.a, self.b(h).tanh(), use_reentrant=False))  # noqa: E731
            return 5 * self.head(checkpoint(inner, x, use_reentrant=False)).mean(1)

    torch.manual_seed(0)
    check_steps(Nested(), streamed.tower_losses, streamed.tower_inputs, 8)


def test_t5_with_gradient_checkpointing():
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0, use_cache=False))
    model.gradient_checkpointing_enable()
    model.train()

    def losses_of(model, inputs):
        return streamed.next_token_losses(model(input_ids=inputs[0], labels=inputs[1]).logits, inputs[1])

    check_steps(model, losses_of, lambda n, g: list(torch.randint(2, 50, (2, n, 6), generator=g)), 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_forward_pass_is_the_same(dtype):
    """RMSNorm's own epsilon, of small activations, too."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.RMSNorm(8), nn.LayerNorm(8), nn.Linear(8, 4)).to(dtype)
    tasks, x = gvk.TaskGradients(model, named(2)), (0.01 * torch.randn(4, 6)).to(dtype)
    want = model(x)
    with tasks.batch([0, 1, 0, 1]):
        found = model(x)
        assert torch.equal(found, want)
        found.sum().backward()


def test_what_cannot_be_written_in_place_says_so():
    model, x = nn.Linear(6, 6), torch.randn(4, 6)

    def grown():
        weight = model.bias.repeat(4, 1)
        weight += model(x)
        return weight

    refused(model, grown, "add of samples and parameters out of place, got it in place")
    model.weight.register_hook(lambda grad: grad * 2)
    with pytest.raises(ValueError, match="without hooks, got one on 'weight'"):
        gvk.TaskGradients(model, named(2)).batch([0]).__enter__()


# ------------------------------------------------------------------------------------------------------------ memory


def test_slabs_are_given_back_and_sized_once():
    model = streamed.translator()
    tasks = gvk.TaskGradients(model, named(4))
    ids = torch.arange(12) % 4
    sizes = []
    for step in range(3):
        inputs = streamed.translator_inputs(12, torch.Generator().manual_seed(step))
        one_batch(model, tasks, streamed.translator_losses, inputs, ids)
        sizes.append(len(tasks._arena._memory))
    assert sizes[0] == sizes[1] == sizes[2]
    largest = max(tasks.groups.sizes)
    embedding = tasks.groups.sizes[tasks.groups.names.index("embedding")]  # tied: open from the first to the last
    assert sizes[0] <= 4 * (largest + embedding) + 3 * 64
    assert "grads" not in vars(tasks._buffer)  # no T x P buffer


def test_coarse_groups_have_no_slab():
    model = streamed.translator()
    tasks = gvk.TaskGradients(model, named(4), "whole_model")
    inputs = streamed.translator_inputs(12, torch.Generator().manual_seed(0))
    one_batch(model, tasks, streamed.translator_losses, inputs, torch.arange(12) % 4)
    largest = max(slot.numel for slot in tasks.groups.parameters)
    assert len(tasks._arena._memory) <= 4 * largest + 64


class Lookup(nn.Module):
    """A large table of which few rows are looked up, beside parameters that are whole."""

    def __init__(self, tied):
        super().__init__()
        self.first = nn.Linear(6, 6)  # so that the table's is not the first group, whose orders are those of no group
        self.words = nn.ModuleDict({"table": nn.Embedding(500, 6, padding_idx=3), "norm": nn.LayerNorm(6)})
        self.head = nn.Linear(6, 4)
        self.tied = tied

    def forward(self, ids):
        x = self.words["norm"](checkpoint(self.words["table"], ids, use_reentrant=False)).mean(1)
        x = self.first(x)
        if self.tied:
            x = x + (x @ self.words["table"].weight[:40].T).tanh() @ self.words["table"].weight[7:47]
        return self.head(x)


def lookup_inputs(num_samples, generator):
    ids = torch.randint(500, (num_samples, 4), generator=generator)
    ids[:, 0] = torch.randint(3, 5, (num_samples,), generator=generator)
    return [ids, torch.randn(num_samples, 4, generator=generator)]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_an_embedding_costs_the_rows_that_were_looked_up(granularity, tied):
    torch.manual_seed(0)
    model = Lookup(tied)
    check_steps(model, streamed.tower_losses, lookup_inputs, 4, granularity=granularity)
    tasks = gvk.TaskGradients(model, named(3), granularity)
    inputs = lookup_inputs(9, torch.Generator().manual_seed(0))
    for _ in range(2):
        model.words["table"].weight.grad = torch.full((500, 6), torch.nan)  # what was there is not seen
        one_batch(model, tasks, streamed.tower_losses, inputs, draw_tasks(3, 9, 0))
        untouched = torch.ones(500, dtype=torch.bool)
        untouched[inputs[0]] = False
        assert tied or not bool(model.words["table"].weight.grad[untouched].any())
    whole = 3 * 500 * 6
    assert (len(tasks._arena._memory) > whole) if tied else (len(tasks._arena._memory) < whole / 4)


# -------------------------------------------------------------------------------------------------- task_mean_loss


@pytest.mark.parametrize("batch_dim", [0, 1])
def test_task_mean_loss(batch_dim):
    torch.manual_seed(0)
    losses = torch.rand(5, 3, dtype=torch.float64)
    weights = torch.rand(5, 3, dtype=torch.float64).round()
    weights[1] = 0.0
    tasks = ["b", "c", "a", "b", "a"]
    want = sum(
        (losses[mine] * weights[mine]).sum() / weights[mine].sum() for mine in ([0, 3], [2, 4])
    )  # no weight in "c"
    given = (losses, weights) if batch_dim == 0 else (losses.T, weights.T)
    assert torch.allclose(gvk.task_mean_loss(given[0], tasks, given[1], batch_dim), want)
    assert torch.allclose(
        gvk.task_mean_loss(losses[:, 0], torch.tensor([1, 1, 7, 1, 7])),
        losses[[0, 1, 3], 0].mean() + losses[[2, 4], 0].mean(),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_task_mean_loss_counts_further_than_its_type(dtype):
    """bfloat16 stops at 256, float16 at 65504."""
    losses = torch.ones(70_000, dtype=dtype, requires_grad=True)
    loss = gvk.task_mean_loss(losses, [0] * 1000 + [1] * 69_000)
    loss.backward()
    assert (loss.item(), loss.dtype) == (2.0, torch.float32)
    assert torch.equal(losses.grad, torch.tensor([1 / 1000] * 1000 + [1 / 69_000] * 69_000).to(dtype))


def test_task_mean_loss_adds_many_weights():
    """In float32, one after another, they would be a thousandth off."""
    losses = torch.ones(200_000, requires_grad=True)
    gvk.task_mean_loss(losses, torch.zeros(len(losses), dtype=torch.int64), torch.full_like(losses, 0.1)).backward()
    assert losses.grad.tolist() == pytest.approx([1 / 200_000] * 200_000, rel=1e-6)


def test_task_mean_loss_of_no_samples_is_zero():
    assert gvk.task_mean_loss(torch.ones(0), []).item() == 0
    assert gvk.task_mean_loss(torch.ones(0, 3), torch.zeros(0, dtype=torch.int64)).item() == 0


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((torch.ones(3, dtype=torch.int64), [0, 0, 0]), TypeError, "losses: expected a floating-point tensor"),
        (([1.0], [0]), TypeError, "losses: expected a floating-point tensor"),
        (
            (torch.ones(3), [0, 0]),
            ValueError,
            r"task_of_sample: expected one task for each of 3 samples, got shape \[2\]",
        ),
        ((torch.ones(3), None), TypeError, "task_of_sample: expected a tensor or a sequence, got None"),
        ((torch.ones(3), torch.zeros(3, 1)), ValueError, r"task_of_sample: .* 3 samples, got shape \[3, 1\]"),
        ((torch.ones(3), [0, 0, 0], None, -1), ValueError, "batch_dim: expected at least 0, got -1"),
        ((torch.ones(3), [0, 0, 0], None, 1.0), TypeError, "batch_dim: expected an int, got 1.0"),
        ((torch.ones(3, 2), [0, 0, 0], torch.ones(3)), ValueError, "weights: expected the shape of losses"),
        ((torch.tensor(1.0), [0]), ValueError, r"losses: expected a dimension 0 of samples, got shape \[\]"),
    ],
)
def test_bad_task_mean_loss(arguments, error, match):
    with pytest.raises(error, match=match):
        gvk.task_mean_loss(*arguments)
