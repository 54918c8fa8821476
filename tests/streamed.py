"""Models to stream, and the check that a streamed step is that of one backward a task."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradvac_kernels as gvk

BETA = 0.2
TOLERANCE = {
    # Relative to a gradient's norm. Both ways sum the same products, in other orders: a few u of each task's gradient,
    # amplified by 1 / (1 - phi^2) of up to some tens, and by what cancels in the sum of the tasks.
    torch.float64: 1e-11,
    # 17 u; where the buffer itself is further than half of that from float64, twice its distance.
    torch.float32: 1e-6,
}


def named(count):
    return [f"task {i}" for i in range(count)]


def two(model, num_tasks, granularity="all_layer", **more):
    """The model twice, the first with a buffer, the second streamed."""
    made = []
    for each in (model, copy.deepcopy(model)):
        method = gvk.GradVac(beta=BETA)
        made.append((each, gvk.TaskGradients(each, named(num_tasks), granularity, method=method, **more)))
    return made


def draw_tasks(num_tasks, num_samples, step):
    return torch.randint(num_tasks, (num_samples,), generator=torch.Generator().manual_seed(step))


def one_backward_a_task(model, tasks, losses_of, inputs, task_of_sample, batch_dim=0):
    losses = {}
    for task in task_of_sample.unique().tolist():
        mine = (task_of_sample == task).nonzero().flatten().to(inputs[0].device)
        losses[tasks.tasks[task]] = losses_of(model, [x.index_select(batch_dim, mine) for x in inputs]).mean()
    return tasks.backward(losses)


def one_batch(model, tasks, losses_of, inputs, task_of_sample, **more):
    with tasks.batch(task_of_sample, **more):
        gvk.task_mean_loss(losses_of(model, inputs), task_of_sample).backward()
    return tasks.last


def distances(found_model, want_model, groups):
    """Of every parameter's gradient, relative to its norm; where that is rounding noise, to its group's."""
    found, want = dict(found_model.named_parameters()), dict(want_model.named_parameters())
    norms, result = [0.0] * len(groups), {}
    for slot in groups.parameters:
        grad = want[slot.name].grad
        norms[slot.group] += 0.0 if grad is None else float(grad.double().square().sum())
    for slot in groups.parameters:
        a, b = found[slot.name].grad, want[slot.name].grad
        assert (a is None) == (b is None), slot.name
        if a is not None:
            norm = max(float(b.norm()), 1e-4 * norms[slot.group] ** 0.5)  # such as a bias of keys: exactly, it is zero
            result[slot.name] = float((a.double() - b.double()).norm()) / norm if norm else float(a.norm())
    return result


def check_gradients(found_model, want_model, groups, tolerance=TOLERANCE[torch.float32]):
    for name, distance in distances(found_model, want_model, groups).items():
        assert distance <= tolerance, (name, distance)


def check_grams(found, want, tolerance=TOLERANCE[torch.float64]):
    """Relative to the norms of both rows."""
    norms = want.diagonal(dim1=1, dim2=2).sqrt()
    scale = norms[:, :, None] * norms[:, None, :]
    assert bool(((found - want).abs() <= tolerance * scale).all())


def hooks(model):
    """How many there are, on modules and parameters."""
    on_modules = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    found = sum(len(getattr(module, kind)) for module in model.modules() for kind in on_modules)
    on_parameters = ("_post_accumulate_grad_hooks", "_backward_hooks")
    return found + sum(len(getattr(p, kind) or ()) for p in model.parameters() for kind in on_parameters)


def no_traces(model, before=0):
    """No hooks but those of before, and no mode."""
    assert not torch.overrides._get_current_function_mode_stack()
    assert hooks(model) == before


def check_steps(
    model, losses_of, inputs_of, steps, num_tasks=3, num_samples=9, granularity="all_layer", batch_dim=0, device="cpu"
):
    """Both ways over some steps, each on the weights that the first one's steps made, beside the truth in float64."""
    pairs = {
        dtype: two(copy.deepcopy(model).to(device, dtype), num_tasks, granularity)
        for dtype in (torch.float64, torch.float32)
    }
    truth = pairs[torch.float64][0][0]
    optimizer = torch.optim.SGD(truth.parameters(), lr=0.01)
    turned, worst = 0, 0.0
    for step in range(steps):
        task_of_sample = draw_tasks(num_tasks, num_samples, step)
        for dtype, ((buffered, by_task), (streamed, by_batch)) in pairs.items():
            inputs = inputs_of(num_samples, torch.Generator().manual_seed(step))
            inputs = [x.to(device, dtype) if x.is_floating_point() else x.to(device) for x in inputs]
            want = one_backward_a_task(buffered, by_task, losses_of, inputs, task_of_sample, batch_dim)
            found = one_batch(streamed, by_batch, losses_of, inputs, task_of_sample, batch_dim=batch_dim)
            own = max(distances(buffered, truth, by_task.groups).values())
            check_gradients(streamed, truth, by_task.groups, max(TOLERANCE[dtype], 2 * own))
            worst = max(worst, *distances(streamed, buffered, by_task.groups).values())
            assert by_batch.last_task_ids == by_task.last_task_ids
            assert torch.equal(found.corrected, want.corrected)
            assert torch.allclose(by_batch.method.ema, by_task.method.ema, rtol=0, atol=1e-5)
            if dtype == torch.float64:  # in float32 the gradients themselves differ by more
                check_grams(found.gram, want.gram)
            turned += int(want.corrected.sum())
        optimizer.step()
        for copies in pairs.values():
            for each, _ in copies:
                if each is not truth:
                    each.load_state_dict(truth.state_dict())
    assert turned > 0
    no_traces(pairs[torch.float32][1][0], hooks(model))
    return worst


# ---------------------------------------------------------------------------------------------------------- models


def next_token_losses(logits, target, batch_dim=0):
    flat = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
    return flat.view_as(target).mean(1 - batch_dim)


class Towers(nn.Module):
    """A Linear of every kind of input, norms, and a head that is used by some samples' loss only."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.LayerNorm(8), nn.Linear(8, 8, bias=False))
        self.norm = nn.RMSNorm(8)
        self.scale = nn.Parameter(torch.ones(8))
        self.head = nn.Linear(8, 4)
        self.idle = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.norm(self.body(x)).tanh() * self.scale)


def towers():
    torch.manual_seed(0)
    return Towers()


def tower_inputs(num_samples, generator):
    return [torch.randn(num_samples, 6, generator=generator), torch.randn(num_samples, 4, generator=generator)]


def tower_losses(model, inputs):
    return (model(inputs[0]) - inputs[1]).square().mean(1)


def translator():
    pytest.importorskip("babel", reason="the demo's extra is not installed")
    from gradvac_kernels.demo.model import Translator

    torch.manual_seed(0)
    return Translator(40, width=32, heads=2, hidden=48)


def translator_inputs(num_samples, generator):
    source = torch.randint(3, 40, (num_samples, 9), generator=generator)
    source[:, 6:] *= torch.randint(2, (num_samples, 1), generator=generator)  # some are padded
    return [source, torch.randint(3, 40, (num_samples, 7), generator=generator)]


def translator_losses(model, inputs):
    return next_token_losses(model(*inputs), inputs[1].roll(-1, 1))


class TiedTransformer(nn.Module):
    """torch's nn.Transformer with learned positions and one embedding for input and output."""

    def __init__(self, batch_first):
        super().__init__()
        self.batch_first = batch_first
        self.embedding = nn.Embedding(30, 16)
        self.positions = nn.Parameter(0.1 * torch.randn(12, 16))
        self.transformer = nn.Transformer(16, 2, 2, 2, 24, dropout=0.0, batch_first=batch_first)

    def embed(self, ids):
        x = self.embedding(ids)
        positions = self.positions[: ids.shape[int(self.batch_first)]]
        return x + (positions if self.batch_first else positions[:, None])

    def forward(self, source, target):
        length = target.shape[int(self.batch_first)]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=source.device)
        return self.transformer(self.embed(source), self.embed(target), tgt_mask=mask) @ self.embedding.weight.T


def tied_transformer(batch_first):
    torch.manual_seed(0)
    return TiedTransformer(batch_first)


def tied_inputs(batch_first):
    def inputs_of(num_samples, generator):
        shapes = [(num_samples, 7), (num_samples, 5)]
        return [torch.randint(30, s if batch_first else s[::-1], generator=generator) for s in shapes]

    return inputs_of


def tied_losses(batch_first):
    return lambda model, inputs: next_token_losses(model(*inputs), inputs[1], int(not batch_first))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(6, 4, 2, bidirectional=True)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.cell, self.head = nn.LSTMCell(8, 4), nn.Linear(8, 4)

    def forward(self, x, lengths):
        x, states = self.gru(x.transpose(0, 1))
        state = states[:2].transpose(0, 1).flatten(1)[None]
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), enforce_sorted=False)
        packed, (last, _) = self.lstm(packed, (state, torch.zeros_like(state)))
        x, _ = nn.utils.rnn.pad_packed_sequence(packed, batch_first=True)
        return self.head(x[:, 0].relu() + last[0]) + self.cell(x[:, 1])[1]


class Experts(nn.Module):
    """A mixture of four experts, of which the last gets no tokens, in the ways in which they are written."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.before, self.gate, self.norm = nn.Linear(6, 8), nn.Linear(8, 4, bias=False), nn.LayerNorm(8)
        self.up, self.down = nn.Parameter(0.3 * torch.randn(4, 8, 12)), nn.Parameter(0.3 * torch.randn(4, 12, 8))
        self.bias = nn.Parameter(0.1 * torch.randn(4, 12))
        self.after = nn.Linear(8, 4)

    def forward(self, x, lengths):
        x = self.before(x)
        tokens = self.norm(x).flatten(0, 1)
        none = torch.tensor([0.0, 0.0, 0.0, -torch.inf]).to(x)
        shares, chosen = (self.gate(tokens) + none).softmax(-1).topk(2, -1)
        grouped = self.way == "grouped" and x.dtype == torch.float32  # torch has it in no wider type
        made = (self.grouped if grouped else self.one_by_one)(tokens, shares, chosen)
        return self.after(x + made.view_as(x)).mean(1)

    def one_by_one(self, tokens, shares, chosen):
        made = torch.zeros(tokens.shape, dtype=tokens.dtype, device=tokens.device)
        for expert in torch.arange(4, device=tokens.device).flip(0):
            which, place = torch.where(chosen == expert)
            hidden = (tokens[which] @ self.up[expert] + self.bias[expert]).relu()
            out = hidden @ self.down[expert] * shares[which, place, None]
            if self.way == "index_add":
                made.index_add_(0, which, out)
            else:
                made[which] += out
        return made

    def grouped(self, tokens, shares, chosen):
        experts, order = chosen.flatten().sort()
        ends = experts.bincount(minlength=4).cumsum(0).int()
        hidden = (torch._grouped_mm(tokens[order // 2], self.up, ends) + self.bias[experts]).relu()
        made = torch._grouped_mm(hidden, self.down, ends) * shares.flatten()[order, None]
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        return made[back].unflatten(0, (-1, 2)).sum(1)


def recurrent():
    torch.manual_seed(0)
    return Recurrent()


def experts(way):
    torch.manual_seed(0)
    return Experts(way)


def sequence_inputs(num_samples, generator):
    lengths = torch.randint(2, 6, (num_samples,), generator=generator)
    return [torch.randn(num_samples, 5, 6, generator=generator), lengths]


def sequence_losses(model, inputs):
    return F.cross_entropy(model(*inputs), inputs[1] % 4, reduction="none")
