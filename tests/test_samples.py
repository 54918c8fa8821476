"""Where the samples lie, operation by operation, against what changes when a sample does."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gradvac_kernels.streaming.capture import Capture
from gradvac_kernels.streaming.operations import name_of
from gradvac_kernels.streaming.places import Lost, Pattern, Samples

B, L, D = 4, 3, 6


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


IDS = torch.tensor([[1, 5, 0], [2, 2, 3], [4, 0, 1], [3, 3, 5]])  # [B, L]
MASK = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 1, 0]]).bool()  # [B, L]
ORDER = torch.tensor([2, 0, 3, 1])

KEEPING = {
    "add": lambda x: x + 1,
    "in place": lambda x: x.clone().mul_(2).relu_(),
    "broadcast": lambda x: x[:, :1] * x,
    "broadcast to more": lambda x: x[:, 0] + x.transpose(0, 1),
    "constants": lambda x: x * random(L, 1) + random(B, 1, D),
    "where": lambda x: torch.where(x > 0, x, x.new_zeros(())),
    "masked": lambda x: x.masked_fill(~MASK[..., None], 0),
    "cast": lambda x: x.double().to(torch.float32).contiguous(),
    "dropout": lambda x: F.dropout(x, 0.0, training=True),
    "gelu": F.gelu,
    "softmax": lambda x: x.softmax(-1) + F.log_softmax(x, dim=1),
    "cumsum": lambda x: x.cumsum(1),
    "sort": lambda x: x.sort(-1).values,
    "topk": lambda x: x.topk(2, -1).values,
    "glu": lambda x: F.glu(x, -1),
    "flip": lambda x: x.flip(1),
    "normalize": lambda x: F.normalize(x, dim=-1),
    "layer norm": lambda x: F.layer_norm(x, (D,)),
    "rms norm": lambda x: F.rms_norm(x, (L, D)),
    "group norm": lambda x: F.group_norm(x.transpose(1, 2), 2),
    "transpose": lambda x: x.transpose(0, 1),
    "permute": lambda x: x.permute(2, 0, 1),
    "T": lambda x: x[:, 0].T,
    "mT": lambda x: x.mT,
    "movedim": lambda x: x.movedim(0, -1),
    "unsqueeze": lambda x: x.unsqueeze(0).unsqueeze(-1),
    "squeeze": lambda x: x[:, :1].squeeze(1),
    "flatten": lambda x: x.flatten(0, 1),
    "flatten behind": lambda x: x.flatten(1),
    "flatten second": lambda x: x.transpose(0, 1).flatten(0, 1),
    "split heads": lambda x: x.view(B, L, 2, 3).transpose(1, 2).reshape(B * 2, L, 3),
    "split and join heads": lambda x: x.view(B, L, 2, 3).transpose(1, 2).reshape(B * 2, L, 3).view(B, 2, L, 3),
    "heads of second": lambda x: x.transpose(0, 1).contiguous().view(L, B * 2, 3).transpose(0, 1).view(B, 2, L, 3),
    "unflatten": lambda x: x.flatten(0, 1).unflatten(0, (B, L)),
    "view as": lambda x: x.flatten(1).view_as(x),
    "slice": lambda x: x[:, 1:],
    "slice samples": lambda x: x[1:3],
    "every other sample": lambda x: x[::2],
    "one sample": lambda x: x[2],
    "one position": lambda x: x[:, -1],
    "none and ellipsis": lambda x: x[..., None, :2],
    "gather samples": lambda x: x[ORDER],
    "index select": lambda x: x.index_select(0, ORDER[:3]).index_select(1, torch.tensor([0, 2])),
    "packed tokens": lambda x: x[MASK],
    "last token of each": lambda x: x[torch.arange(B), torch.tensor([2, 0, 1, 1])],
    "gather": lambda x: x.gather(1, IDS[..., None].expand(-1, -1, D).clamp(max=L - 1)),
    "spectrum": lambda x: torch.fft.rfft(x, dim=-1).real + x.diff(dim=2)[..., :4] + x.cummax(1).values[..., :4],
    "scattered": lambda x: torch.zeros(B, L, 7).scatter_add(2, IDS[..., None].expand(-1, -1, D), x),
    "buckets": lambda x: torch.bucketize(IDS, ORDER.sort().values)[..., None] * x,
    "chunk": lambda x: x.chunk(2, -1)[1],
    "split samples": lambda x: x.split([1, 3])[1],
    "diagonal": lambda x: x[:, :, :B].transpose(1, 2).diagonal(),
    "unbind": lambda x: x.unbind(1)[2],
    "cat": lambda x: torch.cat([x, x * 2], 1),
    "cat samples": lambda x: torch.cat([x[:2], x], 0),
    "sample by sample": lambda x: torch.stack([(one - one.detach().mean()).mean(0) for one in x], 1),
    "of one sample": lambda x: x[1].softmax(0).flip(0).cumsum(0),
    "stack": lambda x: torch.stack([x, x], 1) + torch.stack([x, x], -1).movedim(-1, 1),
    "expand": lambda x: x[:, :1].expand(-1, 5, -1),
    "repeat": lambda x: x.repeat(2, 1, 1),
    "repeat interleave": lambda x: x.repeat_interleave(2, 0).repeat_interleave(2, dim=1),
    "mean": lambda x: x.mean(1),
    "mean kept": lambda x: x.mean((1, 2), keepdim=True),
    "max": lambda x: x.max(2).values + x.amax(-1),
    "norm": lambda x: x.norm(dim=-1) + torch.linalg.vector_norm(x, dim=2),
    "sums": lambda x: x.transpose(0, 2).sum(0),
    "matmul": lambda x: x @ random(D, 5),
    "matmul behind": lambda x: random(5, L) @ x,
    "scores": lambda x: x @ x.mT,
    "columns": lambda x: random(5, D) @ x[:, 0].T,
    "matvec": lambda x: x @ random(D),
    "vecmat": lambda x: random(L) @ x,
    "bmm": lambda x: torch.bmm(x, x.transpose(1, 2)),
    "baddbmm": lambda x: torch.baddbmm(x[:, :, :3], x, random(B, D, L)),
    "einsum": lambda x: torch.einsum("bld,bmd->blm", x, x),
    "einsum with dots": lambda x: torch.einsum("...ld,...d->l...", x, x[:, 0]),
    "einsum with dots behind": lambda x: torch.einsum("bl...,l->...b", x, random(L)),
    "einsum of one with many": lambda x: torch.einsum("...d,...d->...d", x[2:3, 0], random(5, D)),
    "einsum without an arrow": lambda x: torch.einsum("ld,bld", random(L, D), x),
    "linear": lambda x: F.linear(x, random(5, D), random(5)),
    "attention": lambda x: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], MASK[:, None, None]),
    "multi-head": lambda x: nn.MultiheadAttention(D, 2, batch_first=True)(x, x, x)[0],
    "recurrent": lambda x: nn.LSTM(D, 4, 2, batch_first=True, bidirectional=True)(x)[0],
    "recurrent of second": lambda x: nn.GRU(D, 4)(x.transpose(0, 1), x[None, :, 0, :4].contiguous())[0],
    "last states": lambda x: nn.LSTM(D, 4, 2)(x.transpose(0, 1))[1][1],
    "one step": lambda x: nn.GRUCell(D, 4)(x[:, 0], nn.LSTMCell(D, 4)(x[:, 1])[1]),
    "states of constants": lambda x: nn.GRU(D, D, batch_first=True)(random(B, L, D), x[None, :, 0].contiguous())[0],
    "states of what has none": lambda x: nn.LSTM(D, D)(torch.zeros(2, B, D), (x[None, :, 0], x[None, :, 1]))[0],
    "steps from a state": lambda x: nn.GRUCell(D, D)(torch.zeros(B, D), x[:, 0]),
    "packed sequences": lambda x: packed(x)[0].data,
    "packed, last states": lambda x: packed(x)[1],
    "packed and back": lambda x: nn.utils.rnn.pad_packed_sequence(packed(x)[0], total_length=L)[0],
    "convolution": lambda x: F.conv1d(x, random(2, L, 3)),
    "pool": lambda x: F.max_pool1d(x, 2) + F.adaptive_avg_pool1d(x, 3),
    "pad": lambda x: F.pad(x, (1, 1)),
    "one hot": lambda x: F.one_hot(IDS, 6) * x,
    "table": lambda x: F.embedding(IDS, random(6, D)) + x,
    "written": lambda x: _written(x),
    "written in parts": lambda x: _written_in_parts(x),
    "written at strides": lambda x: _written_at(x, B * D),
    "set in parts": lambda x: _set_in_parts(x),
    "put back": lambda x: torch.zeros(B, L, D).index_add_(0, ORDER[:3], x[ORDER[:3]] * 2),
    "put back by name": lambda x: torch.zeros(B, L, D).index_copy(dim=0, index=ORDER[:3], source=x[ORDER[:3]]),
    "put back by parts": lambda x: _put_back(x),
    "put back among samples": lambda x: (x * 1).index_add(0, ORDER, x[ORDER]).index_add(1, IDS[1] // 2, x),
    "unpacked tokens": lambda x: _unpacked(x),
    "nothing beside": lambda x: torch.cat([x, x[..., D:] * 2], -1),
    "no samples beside": lambda x: torch.cat(
        [x, x[ORDER[:0]].flatten(1).unflatten(1, (L, D)).chunk(2, -1)[0].repeat(1, 1, 2)]
    ),
    "by name": lambda x: torch.where(
        condition=x > 0, input=x, other=torch.mm(input=x[:, 0], mat2=random(D, D))[:, None]
    ),
    "products by name": lambda x: torch.addmm(input=x[:, 0], mat1=x[:, 1], mat2=random(D, D)),
    "batched by name": lambda x: torch.baddbmm(input=x[:, :, :L], batch1=x, batch2=x.mT),
    "chosen by a tuple": lambda x: x[:, (0, 2)],
    "chosen by a range": lambda x: x[:, range(2)],
    "chosen by NumPy": lambda x: x[:, np.array([2, 0]), 1:],
    "complex": lambda x: torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * 1j).flatten(-2),
    "rows of a table": lambda x: random(6, D).index_select(0, IDS[:, 0]) + x[:, 0],
    "zero in part": lambda x: _cleared(x),
    "looked up": lambda x: random(B, 9).gather(1, IDS)[..., None] * x,
}


def packed(x):
    lengths = torch.tensor([2, 3, 1, 2])
    sequences = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    return nn.GRU(D, 4)(sequences)


def _cleared(x):
    out = x * 1
    out[:, 0].zero_()
    return out


def _written(x):
    out = x.clone()
    out[:, 0] = x[:, 1]
    out[:, 1:] = 0.5
    return out


def _written_in_parts(x):
    out = torch.empty(L, B, D)
    out[..., :2].copy_(x[:, :, 2:4].transpose(0, 1))
    out[..., 2:].copy_(x[:, :, 2:].transpose(0, 1))
    return out


def _set_in_parts(x):
    out = x.new_zeros(2, B, L, D)
    out[1, ..., :2] = x[..., :2]
    out[0] = x
    return out[:, :, 1:]


def _put_back(x):
    out = torch.zeros(B, L, D)
    for chosen in (ORDER[:0], ORDER[:1], ORDER[1:3], ORDER[1:]):
        part = x[None, chosen].reshape(-1, L, D).unflatten(-1, (2, -1)).softmax(-1).flatten(-2)
        out[chosen] += torch.cat(part.chunk(2, -1), -1)
    return out


def _unpacked(x):
    out = torch.zeros(B, L, D)
    out[MASK] = x[MASK] * 2
    return out


LOSING = {
    "mean of samples": lambda x: x.mean(0),
    "mean of all": lambda x: x.mean(),
    "softmax": lambda x: x.softmax(0),
    "cumsum": lambda x: x.cumsum(0),
    "shifted": lambda x: x[1:] + x[:-1],
    "against each other": lambda x: x[:, 0] @ x[:, 0].T,
    "contracted": lambda x: x[:, 0].T @ x[:, 0],
    "einsum": lambda x: torch.einsum("bld,cld->bc", x, x),
    "split over two": lambda x: x.view(2, 2, L, D).transpose(1, 2),
    "layer norm": lambda x: F.layer_norm(x, (B, L, D)),
    "batch norm": lambda x: F.batch_norm(x, torch.zeros(L), torch.ones(L)).logcumsumexp(0),
    "unknown": lambda x: torch.fft.fft(x, dim=0).real,
    "flip": lambda x: torch.flip(x, dims=(1, 0)),
    "flip one": lambda x: x.flip([0]),
    "roll": lambda x: torch.roll(x, 1, dims=0),
    "roll all": lambda x: x.roll(1),
    "pad samples": lambda x: F.pad(x, (0, 0, 0, 0, 1, -1)),
    "table of samples": lambda x: F.embedding(ORDER, x[:, 0]),
    "kernel of samples": lambda x: F.conv1d(random(2, L, D), x[:, :, :3]),
    "weight of samples": lambda x: F.linear(x[:, 0], x[:, 1]),
    "written to other samples": lambda x: _written_to_others(x),
    "seen before it was written": lambda x: _seen_before(x),
    "written across dimensions": lambda x: _written_across(x, lambda out: out.view(B, B + 1, D)[:, :B]),
    "written across windows": lambda x: _written_across(
        x, lambda out: out.view(-1).unfold(0, B * D, B * D + D).view(-1, B, D)
    ),
    "nothing written": lambda x: _written_across(x[:0], lambda out: out[2:2, 0]),
    "written across": lambda x: _written_at(x, 1),
    "written from another on": lambda x: _written_at(x, 2 * D),
    "scattered over samples": lambda x: torch.zeros(B, L, D).scatter_add(0, ORDER[:, None, None].expand(B, L, D), x),
    "put elsewhere": lambda x: torch.zeros(B, L, D).index_add_(0, ORDER[:2], x[ORDER[2:]]),
    "put among others": lambda x: (x * 1).index_copy(0, ORDER, x),
    "chosen by a list": lambda x: _by_list(x),
    "attention over samples": lambda x: F.scaled_dot_product_attention(x.transpose(0, 1), *[x.transpose(0, 1)] * 2),
    "recurrent over samples": lambda x: nn.LSTM(D, 4)(x)[0],
    "one sequence of samples": lambda x: nn.GRU(D, 4)(x[:, 0])[0],
    "packed otherwise": lambda x: _packed_otherwise(x),
    "by name": lambda x: _gru(x, batch_first=True),
    "linear over samples": lambda x: F.linear(x.movedim(0, -1), random(5, B)),
    "sorted": lambda x: x.sort(0).values,
    "gathered": lambda x: x.gather(0, torch.zeros(B, L, D, dtype=torch.int64)),
}


def _written_to_others(x):
    out = torch.zeros(B, L, D)
    out[1:].copy_(x[:-1])
    return out


def _by_list(x):
    return random(6, 7).requires_grad_()[x.argmax(-1)[:, 0], [0, 1, 2, 3]]


def _seen_before(x):
    out = torch.zeros(B, L, D)
    before = out[:, 0]
    out[:, 0].copy_(x[:, 1])
    return before


def _written_across(x, view):
    out = torch.zeros(B + 1, B, D)
    part = view(out)
    part.copy_(x[: len(part), 0].expand(part.shape))
    return out


def _gru(x, **last):
    return torch.gru(x, x[None, :, 0].contiguous(), nn.GRU(D, D).all_weights[0], True, 1, 0.0, True, False, **last)[0]


def _states_of_others(x):
    return nn.RNN(D, D)(x.transpose(0, 1), x[None, ORDER, 0])[0]


def _packed_otherwise(x):
    sequences = packed(x)[0]
    data = x.flatten(0, 1)[: len(sequences.data)]  # sample by sample, not step by step
    return nn.utils.rnn.pad_packed_sequence(sequences._replace(data=data), batch_first=True)[0]


def _written_at(x, offset):
    out = torch.zeros(L, B, D)
    out.as_strided((B, D), (D, 1), offset).copy_(x[:, 0])
    return out


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x.__setitem__(slice(0, 2), x[2:].clone()),
        lambda x: x[:].copy_(x.clone().flip([0])),
        lambda x: x[:1].add_(x[1:2].clone()),
        lambda x: x.transpose_(0, 1),
        lambda x: torch.zeros(B, L, D).index_add_(0, ORDER[:2], x[ORDER[:2]]).index_add_(0, ORDER[:2], x[ORDER[2:]]),
    ],
)
def test_samples_are_not_moved_in_place(operation):
    """Views of them, or what they are a view of, would be placed wrongly."""
    with pytest.raises(ValueError, match=r"in place|in one dimension and order"):
        follow(lambda x: operation(x * 1), random(B, L, D).requires_grad_(), torch.arange(B))


class Nowhere:
    fired = frozenset()


def follow(operation, x, rows):
    """The result, and where its samples lie, each sample a task of its own."""
    weight = nn.Parameter(torch.zeros(1))
    capture = Capture({"weight": weight}, [], rows, len(rows), 0, Nowhere())
    torch.manual_seed(0)
    with capture:
        out = operation(x)
    return out, capture.tracker.of(out)


def depends_on(operation, x, sample):
    """Which elements of the result change with a sample."""
    torch.manual_seed(0)
    before = operation(x)
    changed = x.detach().clone()
    changed[sample] += 1 + random(L, D)
    torch.manual_seed(0)
    return (operation(changed) - before).abs() > 1e-6


@pytest.mark.parametrize("name", KEEPING)
def test_the_place_is_where_the_sample_is(name):
    operation = KEEPING[name]
    x = random(B, L, D).requires_grad_()
    out, place = follow(operation, x, torch.arange(B))
    assert isinstance(place, Samples), place.reason if place else None
    assert len(place.rows) == out.shape[place.dim]
    reached = torch.zeros(out.shape, dtype=torch.bool)
    for sample in range(B):
        changes = depends_on(operation, x, sample)
        here = (place.rows == sample).view([-1 if d == place.dim else 1 for d in range(out.dim())]).expand(out.shape)
        assert not bool((changes & ~here).any()), f"sample {sample} reaches others' places"
        reached |= changes
    assert bool(reached.any())


@pytest.mark.parametrize("operation", [lambda x: x + x[ORDER], lambda x: _states_of_others(x)])
def test_samples_of_two_tensors_in_other_orders_are_refused(operation):
    with pytest.raises(ValueError, match=r"in one dimension and order, got others: .* meets samples"):
        follow(operation, random(B, L, D).requires_grad_(), torch.arange(B))


@pytest.mark.parametrize("name", LOSING)
def test_mixed_samples_have_no_place(name):
    _, place = follow(LOSING[name], random(B, L, D).requires_grad_(), torch.arange(B))
    assert isinstance(place, Lost)
    assert place.reason


@pytest.mark.parametrize("name", KEEPING)
def test_tasks_of_several_samples_in_any_order(name):
    """The same with two tasks: rows are tasks, and whatever the place, it agrees with that of the samples."""
    x, tasks = random(B, L, D).requires_grad_(), torch.tensor([1, 0, 0, 1])
    _, by_sample = follow(KEEPING[name], x, torch.arange(B))
    _, by_task = follow(KEEPING[name], x, tasks)
    assert isinstance(by_task, Samples)
    assert by_task.same(Samples(by_sample.dim, tasks[by_sample.rows]))


def test_what_is_made_inside_has_no_samples():
    for operation in (
        lambda x: torch.arange(B),
        lambda x: x.new_zeros(B, D),
        lambda x: torch.randn_like(x),
        lambda x: torch.ones(len(x), x.shape[1]),
    ):
        _, place = follow(operation, random(B, L, D).requires_grad_(), torch.arange(B))
        assert place is None


def test_a_batch_put_together_inside_is_none():
    """What is made here may be anything, such as positions: if it is used as samples, the backward says so."""
    lines = [random(L) for _ in range(B)]
    for operation in (
        lambda x: torch.tensor([[1.0, 2.0]] * B),
        lambda x: torch.arange(B),
        lambda x: torch.stack([torch.arange(B), torch.arange(B)], 1),
        lambda x: torch.cat([torch.arange(B).sin()[:, None], torch.arange(B).cos()[:, None]], 1),
        lambda x: torch.stack(lines),
        lambda x: nn.utils.rnn.pad_sequence([torch.tensor([1] * (i + 1)) for i in range(B)], batch_first=True),
    ):
        assert follow(operation, random(B, L, D), torch.arange(B))[1] is None


def test_batches_or_samples_of_the_same_size_are_not_told_apart():
    square = [random(B) for _ in range(B)]  # as long as there are samples
    assert isinstance(follow(lambda x: torch.stack(square), random(B, L, D), torch.arange(B))[1], Lost)
    batches = [random(B, D), random(B, D)]
    assert follow(lambda x: torch.stack(batches), random(B, L, D), torch.arange(B))[1].dim == 1
    assert follow(lambda x: torch.cat(batches, 1), random(B, L, D), torch.arange(B))[1].dim == 0


class Seen(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad


class Unseen(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.from_numpy(x.detach().numpy().copy())

    @staticmethod
    def backward(ctx, grad):
        return grad


def test_what_is_not_seen_is_placed_only_where_there_is_no_doubt():
    rows = torch.arange(B)
    x = random(B, L, D).requires_grad_()
    square = random(B, B, D).requires_grad_()
    assert follow(lambda x: Seen.apply(x.transpose(0, 1) * 1), square, rows)[1].dim == 1
    assert follow(lambda x: Unseen.apply(x * 1), x, rows)[1].dim == 0
    assert isinstance(follow(lambda x: Unseen.apply(x.transpose(0, 1) * 1), x, rows)[1], Lost)
    outside = Unseen.apply(x)
    assert follow(lambda x: outside * 1, x, rows)[1].dim == 0
    turned = Unseen.apply(square).transpose(0, 1)
    assert isinstance(follow(lambda x: turned * 1, x, rows)[1], Lost)
    unknown = follow(lambda x: torch.linalg.pinv(x.transpose(0, 1)), random(B, B, D), rows)[1]
    assert isinstance(unknown, Lost)
    assert follow(lambda x: torch.as_tensor(x.transpose(0, 1)), square, rows)[1].dim == 1
    positions = random(B, D).requires_grad_()  # of as many positions as there are samples
    with pytest.raises(ValueError, match="got others: add meets samples"):
        follow(lambda x: x + positions * 1, random(B, B, D), rows)
    elsewhere = nn.Parameter(random(B, D))
    assert follow(lambda x: x * 1 + elsewhere, square, rows)[1].dim == 0


def test_casts_and_shapes_take_nothing_from_what_they_follow():
    rows, x = torch.arange(B), random(B, L, D).requires_grad_()
    weight = random(1, 1, D).requires_grad_()
    for operation in (weight.to, weight.type_as, weight.expand_as, lambda x: weight.to(x).expand_as(x)):
        _, place = follow(lambda x, operation=operation: operation(x * 1), x, rows)
        assert place is None


def test_nothing_is_left_on_tensors():
    out, _ = follow(lambda x: x * 2, random(B, L, D).requires_grad_(), torch.arange(B))
    assert "_gradvac_place" in vars(out)
    weight, kept = nn.Parameter(torch.zeros(1)), []
    capture = Capture({"weight": weight}, [], torch.arange(B), B, 0, Nowhere())
    with capture.watch(), capture:
        kept.append(random(B, L) * 2)
    assert not vars(kept[0])


def test_patterns():
    assert Pattern(torch.tensor([0, 0, 1, 1, 1, 1])).run == 2
    assert Pattern(torch.tensor([0, 1, 2, 0, 1, 2])).period == 3
    assert Pattern(torch.tensor([2, 2, 2])).uniform
    assert not Pattern(torch.tensor([2, 2, 1])).uniform
    assert Samples(0, torch.tensor([1, 1])).same(Samples(1, torch.tensor([1, 1, 1])))  # all of one task: anywhere
    assert not Samples(0, torch.tensor([1, 0])).same(Samples(1, torch.tensor([1, 0])))


def test_names():
    add = [torch.add, torch.Tensor.add, torch.Tensor.add_, torch.Tensor.__iadd__, torch.ops.aten.add.Tensor]
    assert {name_of(function) for function in add} == {"add"}
    assert name_of(torch.Tensor.T.__get__) == "get T"
    assert name_of(torch.Tensor.__getitem__) == "getitem"
    assert name_of(torch._C._nn.linear) == "linear"
