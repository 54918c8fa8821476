import collections
import math

import pytest
import torch

import gradvac_kernels as gvk


def test_rows_are_permutations_of_the_others():
    order = gvk.task_order(7, 9, seed=3, step=12)
    assert order.shape == (7, 9, 8)
    for row in range(9):
        others = torch.tensor([r for r in range(9) if r != row])
        assert torch.equal(order[:, row].sort(1).values, others.expand(7, -1))


def test_one_task_has_no_others():
    assert gvk.task_order(2, 1, seed=0, step=0).shape == (2, 1, 0)
    assert gvk.task_order(0, 3, seed=0, step=0).shape == (0, 3, 2)


def test_a_slab_draws_what_the_whole_draws():
    whole = gvk.task_order(9, 6, seed=5, step=2)
    assert torch.equal(gvk.task_order(4, 6, seed=5, step=2, first_group=3), whole[3:7])


def test_every_counter_matters():
    def draw(**changes):
        return gvk.task_order(**({"num_groups": 8, "num_tasks": 6, "seed": 1, "step": 1} | changes))

    assert torch.equal(draw(), draw())
    for changes in ({"seed": 2}, {"step": 2}, {"first_group": 8}, {"seed": -1}, {"seed": 2**63 - 1}):
        assert not torch.equal(draw(), draw(**changes))
    order = draw()
    assert not torch.equal(order[0], order[1])  # drawn anew for every group


def test_all_permutations_are_equally_likely():
    draws = 6000
    order = gvk.task_order(draws, 4, seed=11, step=0)
    for row in range(4):
        counts = collections.Counter(tuple(o) for o in order[:, row].tolist())
        assert len(counts) == math.factorial(3)
        chi2 = sum((n - draws / 6) ** 2 / (draws / 6) for n in counts.values())
        assert chi2 < 20.5  # 5 degrees of freedom: 0.1 % of honest draws are above


def test_rows_draw_independently():
    order = gvk.task_order(4000, 5, seed=0, step=0)
    first = order[:, 0, 0] == 4
    second = order[:, 1, 0] == 4
    joint = (first & second).double().mean()
    assert joint == pytest.approx(1 / 16, abs=4 * math.sqrt(1 / 16 / 4000))


def test_the_sequence_is_part_of_the_interface():
    """A checkpoint holds seed and step only: these orders may never change."""
    assert gvk.task_order(2, 4, seed=42, step=7).tolist() == GOLDEN


GOLDEN = [
    [[3, 1, 2], [0, 2, 3], [3, 1, 0], [1, 2, 0]],
    [[3, 1, 2], [3, 0, 2], [0, 1, 3], [1, 2, 0]],
]


def splitmix(state, value):
    mask = 2**64 - 1
    x = ((state ^ value) + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def test_against_the_hash_in_plain_integers():
    seed, step, first = 2**64 - 5, 3, 10  # seed -5 as 64 bits
    order = gvk.task_order(2, 6, seed=-5, step=step, first_group=first)
    for k in range(2):
        for row in range(6):
            state = 0
            for value in (seed, step, first + k, row):
                state = splitmix(state, value)
            others = sorted((r for r in range(6) if r != row), key=lambda r: (splitmix(state, r) >> 1, r))
            assert order[k, row].tolist() == others


@pytest.mark.parametrize("T", [2, 5, 16, 40])
def test_native_draws_the_same(native, T):
    groups = gvk.ParameterGroups.from_sizes({"a": 50, "b": 60, "c": 70})[1:3]
    grads = torch.randn(T, groups.numel, generator=torch.Generator().manual_seed(T))
    ema = [torch.full((2, T, T), 0.5, dtype=torch.float64) for _ in range(2)]
    drawn = gvk.vaccinate(grads, groups, ema[0], seed=-9, step=4, backend=native)
    order = gvk.task_order(2, T, seed=-9, step=4, first_group=1)
    given = gvk.vaccinate(grads, groups, ema[1], order=order, backend=native)
    assert torch.equal(drawn.weights, given.weights)
    assert torch.equal(ema[0], ema[1])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"num_tasks": 0}, ValueError, "num_tasks: expected at least 1, got 0"),
        ({"num_groups": -1}, ValueError, "num_groups: expected at least 0, got -1"),
        ({"first_group": -1}, ValueError, "first_group: expected at least 0"),
        ({"seed": 0.5}, TypeError, "seed: expected an int, got 0.5"),
        ({"seed": 2**63}, ValueError, "seed: expected an int of 64 bits"),
        ({"step": True}, TypeError, "step: expected an int, got True"),
    ],
)
def test_bad_arguments(changes, error, message):
    with pytest.raises(error, match=message):
        gvk.task_order(**({"num_groups": 1, "num_tasks": 3, "seed": 0, "step": 0} | changes))
