"""Where the samples lie after operations put together at random, against what changes when a sample does."""

import random

import pytest
import test_samples
import torch
from torch.nn import functional as F

from gradvac_kernels.streaming.capture import Capture
from gradvac_kernels.streaming.places import Samples

PROGRAMS = 300  # a seed


def an_index(draw, size):
    """Of a dimension: any places, the order changed, or nothing."""
    kind = draw.randrange(4)
    if kind == 0:
        return torch.tensor([draw.randrange(size) for _ in range(draw.randrange(1, size + 2))])
    return torch.tensor(draw.sample(range(size), size if kind < 3 else draw.randrange(size + 1)), dtype=torch.int64)


def a_step(draw, x):
    """An operation on a tensor of this shape, the same whenever it is called."""
    dim = draw.randrange(x.dim())
    size, index = x.shape[dim], an_index(draw, x.shape[dim])
    before = (slice(None),) * dim
    begin, end = sorted((draw.randrange(size + 1), draw.randrange(size + 1)))
    mask = torch.tensor([draw.random() < 0.6 for _ in range(size)])
    order = draw.sample(range(x.dim()), x.dim())
    other = draw.randrange(x.dim())
    rest = [d for d in range(x.dim()) if d != dim]

    def put_back(x, write):
        out = torch.zeros(x.shape)
        write(out, x[(*before, index)].tanh())
        return out

    def in_parts(x):
        out = torch.empty(x.shape)
        out[(*before, slice(begin))].copy_(x[(*before, slice(begin))])
        out[(*before, slice(begin, None))] = x[(*before, slice(begin, None))] * 2
        return out

    def last_state(x):
        return torch.gru(x, x.new_zeros(1, x.shape[0], 2), GRU, True, 1, 0.0, True, False, True)[1]

    steps = [
        lambda x: x[(*before, index)],
        lambda x: x[(None, *before, index)],
        lambda x: x[(*before, mask)],
        lambda x: x[(*before, begin if begin < size else -1)],
        lambda x: x[(*before, slice(begin, end))],
        lambda x: x[(*before, slice(None, None, 2))],
        lambda x: x.index_select(dim, index),
        lambda x: x.permute(order),
        lambda x: x.unsqueeze(dim),
        lambda x: x.flatten(min(dim, other), max(dim, other)),
        lambda x: x.unflatten(dim, (-1, 2) if draw_two else (2, -1)),
        lambda x: x.reshape(-1, x.shape[-1]),
        lambda x: x.flatten(),
        lambda x: x + x[(*before, index)] if len(index) == size else x * 2,
        lambda x: torch.cat([x, x[(*before, slice(begin, end))] * 2], dim),
        lambda x: torch.stack([x, x], dim),
        lambda x: torch.stack(x.unbind(dim), other),
        lambda x: x.mean(dim),
        lambda x: x.softmax(dim),
        lambda x: x.sum(rest) if rest else x,
        lambda x: x @ x.mT if x.dim() > 1 else x,
        lambda x: torch.einsum("...i,...i->...i", x, x[..., :1].expand_as(x)),
        lambda x: torch.einsum("...ij->...ji", x) if x.dim() > 1 else x,
        lambda x: F.pad(x, (1, 0)),
        lambda x: x.repeat_interleave(2, dim),
        lambda x: x.expand(2, *x.shape),
        lambda x: x.diagonal(0, dim, other) if dim != other else x,
        lambda x: put_back(x, lambda out, part: out.index_add_(dim, index, part)),
        lambda x: put_back(x, lambda out, part: out.__setitem__((*before, index), part)),
        lambda x: put_back(x, lambda out, part: out.transpose(0, dim).index_copy_(0, index, part.transpose(0, dim))),
        in_parts,
        lambda x: last_state(x) if x.dim() == 3 and x.shape[-1] == 3 else x,
    ]
    draw_two = draw.random() < 0.5
    return draw.choice(steps)


torch.manual_seed(0)
GRU = torch.nn.GRU(3, 2, batch_first=True).all_weights[0]


def a_program(draw):
    """Up to six steps, and a tensor ``[B, L, D]`` that they work on."""
    count = draw.choice((2, 3, 4))
    x = test_samples.random(count, draw.choice((count, 2, 3)), draw.choice((2, 3, 4))).requires_grad_()
    steps, y = [], x
    for _ in range(20):
        if len(steps) < 6 and 0 < y.dim() < 6 and 0 < y.numel() < 500:
            step = a_step(draw, y)
            try:
                y = step(y)
            except (RuntimeError, IndexError, ValueError):  # not of these shapes
                continue
            steps.append(step)
    return steps, x


def run(steps, x):
    found = [x]
    for step in steps:
        found.append(step(found[-1]))
    return found


def places(steps, x):
    """Of every result; none where the program is refused."""
    weight = torch.nn.Parameter(torch.zeros(1))
    capture = Capture({"weight": weight}, [], torch.arange(len(x)), len(x), 0, test_samples.Nowhere())
    try:
        with capture:
            return [capture.tracker.of(found) for found in run(steps, x)]
    except ValueError as error:
        if not str(error).startswith("batch: expected"):
            raise
        return []


@pytest.mark.parametrize("seed", range(6))
def test_no_place_is_wrong(seed):
    draw, placed = random.Random(seed), 0
    for _ in range(PROGRAMS):
        steps, x = a_program(draw)
        where, before = places(steps, x), run(steps, x)
        for sample in range(len(x)):
            changed = x.detach().clone()
            changed[sample] += 1 + test_samples.random(*x.shape[1:])
            for place, old, new in zip(where, before, run(steps, changed)):
                if isinstance(place, Samples):
                    assert place.size == old.shape[place.dim]
                    rows = place.rows.view([-1 if d == place.dim else 1 for d in range(old.dim())])
                    assert not bool(((new - old).abs() > 1e-5).logical_and(rows != sample).any())
                    placed += 1
    assert placed > PROGRAMS
