"""Temperature sampling: the probabilities, the draws, and a state that continues draw for draw."""

import io
import itertools
import math

import pytest
import torch

import gradvac_kernels as gvk

SIZES = {"en": 1000, "de": 250, "hi": 40, "smn": 1}


def test_probabilities():
    shares = [size / 1291 for size in SIZES.values()]
    for temperature in (1, 1.0, 5.0, 0.5, 100):
        found = gvk.TaskSampler(SIZES, temperature).probabilities
        powers = [share ** (1 / temperature) for share in shares]
        # a few float64 roundings, of powers of at most 2
        assert found.tolist() == pytest.approx([power / sum(powers) for power in powers], rel=1e-14)
        assert found.dtype == torch.float64
        assert float(found.sum()) == pytest.approx(1, abs=1e-15)
    assert gvk.TaskSampler(SIZES, math.inf).probabilities.tolist() == [0.25] * 4
    assert gvk.TaskSampler(SIZES, 1e-300).probabilities.tolist() == [1, 0, 0, 0]  # no overflow, no 0 / 0
    assert gvk.TaskSampler(SIZES, 5e-324).probabilities.tolist() == [1, 0, 0, 0]
    huge = gvk.TaskSampler([2**62, 2**60], 0.001)
    assert huge.probabilities.tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0, math.inf, 10**400])
@pytest.mark.parametrize("seed", [0, 1, -7, 2**63 - 1])
def test_draws_follow_the_probabilities(temperature, seed):
    """Chi-square of 20,000 draws against their expected counts, smallest 15; also by pairs of neighbours."""
    n = 20_000
    sampler = gvk.TaskSampler(SIZES, temperature, seed=seed)
    draws = sampler.sample(n)
    assert draws.shape == (n,)
    assert draws.dtype == torch.int64
    p = sampler.probabilities
    expected = n * p
    found = draws.bincount(minlength=4).double()
    # 3 degrees of freedom: above 21.1 with probability 1e-4 (16 cases, fixed seeds)
    assert float(((found - expected) ** 2 / expected).sum()) < 21.1
    pairs = (4 * draws[0::2] + draws[1::2]).bincount(minlength=16).double()
    expected = n / 2 * torch.outer(p, p).flatten()
    often = expected >= 5  # below, a count is not normal: they are one cell
    found = torch.cat([pairs[often], pairs[~often].sum()[None]])
    expected = torch.cat([expected[often], expected[~often].sum()[None].clamp(min=1e-9)])
    # at most 15 degrees of freedom: above 44.3 with probability 1e-4
    assert float(((found - expected) ** 2 / expected).sum()) < 44.3


def test_draws_are_a_function_of_seed_and_position():
    whole = gvk.TaskSampler(SIZES, 5.0, seed=3).sample(500)
    sampler = gvk.TaskSampler(SIZES, 5.0, seed=3)
    assert torch.equal(torch.cat([sampler.sample(n) for n in (0, 1, 99, 300, 100)]), whole)
    assert sampler.position == 500
    torch.manual_seed(1)  # nothing else draws along
    assert torch.equal(gvk.TaskSampler(list(SIZES.values()), 5.0, seed=3).sample(500), whole)
    assert not torch.equal(gvk.TaskSampler(SIZES, 5.0, seed=4).sample(500), whole)
    # pinned: checkpoints hold only seed and position, so the sequence must never change
    assert whole[:20].tolist() == [2, 3, 0, 2, 1, 2, 1, 3, 0, 0, 1, 0, 0, 0, 0, 2, 0, 2, 1, 1]


def test_names_and_the_iterator():
    sampler, named, drawn = (gvk.TaskSampler(SIZES, 5.0, seed=3) for _ in range(3))
    want = [list(SIZES)[index] for index in sampler.sample(50).tolist()]
    assert sampler.names == tuple(SIZES)
    assert named.sample_names(50) == want
    assert list(itertools.islice(drawn, 20)) == want[:20]
    assert drawn.sample_names(30) == want[20:]  # one position for all
    by_index = gvk.TaskSampler([3, 5])
    assert by_index.names == (0, 1)
    assert set(by_index.sample_names(20)) == {0, 1}


def test_a_task_of_probability_zero_is_never_drawn():
    sizes = [1, 2**60, 1]
    draws = gvk.TaskSampler(sizes, 0.01).sample(10_000)
    assert bool((draws == 1).all())
    assert gvk.TaskSampler([7]).sample(5).tolist() == [0] * 5


@pytest.mark.parametrize(
    ("sizes", "temperature", "drawn", "index"),
    [
        ([1, 2**60], 0.01, 0, 1),  # the least number there is: not the first task, of probability 0
        (range(1, 11), 3.0, 2**53 - 1, 9),  # the largest: none past the last, though the sum is rounded to 1 - 2^-53
    ],
)
def test_the_ends_of_the_range(monkeypatch, sizes, temperature, drawn, index):
    monkeypatch.setattr(gvk.sampling, "shift", lambda key, bits: torch.full_like(key, drawn))
    assert gvk.TaskSampler(sizes, temperature).sample(3).tolist() == [index] * 3


def test_a_loaded_state_continues():
    sampler = gvk.TaskSampler(SIZES, math.inf, seed=8)
    sampler.sample(123)
    file = io.BytesIO()
    torch.save(sampler.state_dict(), file)
    file.seek(0)
    fresh = gvk.TaskSampler(SIZES, math.inf)  # the seed comes with the state
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(fresh.sample(200), sampler.sample(200))
    assert fresh.state_dict() == sampler.state_dict()


BAD_STATES = {
    "no dict": (lambda s: list(s.items()), ValueError, "state: expected a dict .*, got list"),
    "a key missing": (lambda s: {n: s[n] for n in s if n != "seed"}, ValueError, "state: expected a dict with exactly"),
    "a key more": (lambda s: s | {"n": 1}, ValueError, "state: expected a dict .*'n'"),
    "a float position": (lambda s: s | {"position": 3.0}, TypeError, r"state\['position'\]: expected an int"),
    "a negative one": (lambda s: s | {"position": -1}, ValueError, r"state\['position'\]: expected at least 0"),
    "no seed": (lambda s: s | {"seed": None}, TypeError, r"state\['seed'\]: expected an int"),
    "other sizes": (lambda s: s | {"sizes": [1, 2]}, ValueError, r"state\['sizes'\]: expected .*, got \[1, 2\]"),
    "another temperature": (lambda s: s | {"temperature": 1.0}, ValueError, r"state\['temperature'\]: expected 5.0"),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_a_bad_state_changes_nothing(case):
    change, error, message = BAD_STATES[case]
    sampler, twin = (gvk.TaskSampler(SIZES, 5.0, seed=3) for _ in range(2))
    for one in (sampler, twin):
        one.sample(10)
    with pytest.raises(error, match=message):
        sampler.load_state_dict(change(gvk.TaskSampler(SIZES, 5.0, seed=4).state_dict()))
    assert torch.equal(sampler.sample(100), twin.sample(100))


BAD = {
    "no sizes": ({"sizes": {}}, ValueError, "sizes: expected at least one task, got none"),
    "a number": ({"sizes": 3}, TypeError, "sizes: expected a mapping of names to sizes or a sequence, got int"),
    "a str": ({"sizes": "abc"}, TypeError, "sizes: expected a mapping of names to sizes or a sequence, got str"),
    "an empty task": ({"sizes": {"de": 3, "hi": 0}}, ValueError, r"sizes\['hi'\]: expected at least 1, got 0"),
    "a share": ({"sizes": [0.5, 0.5]}, TypeError, r"sizes\[0\]: expected an int, got 0.5"),
    "cold": ({"temperature": 0.0}, ValueError, "temperature: expected a number above 0, got 0.0"),
    "below": ({"temperature": -1}, ValueError, "temperature: expected a number above 0, got -1"),
    "NaN": ({"temperature": math.nan}, ValueError, "temperature: expected a number above 0, got nan"),
    "no number": ({"temperature": "1"}, TypeError, "temperature: expected a float, got '1'"),
    "a float seed": ({"seed": 1.0}, TypeError, "seed: expected an int, got 1.0"),
    "a seed of 65 bits": ({"seed": 2**64}, ValueError, "seed: expected an int of 64 bits"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    changes, error, message = BAD[case]
    with pytest.raises(error, match=message):
        gvk.TaskSampler(**({"sizes": SIZES} | changes))


@pytest.mark.parametrize(("n", "error"), [(-1, ValueError), (1.0, TypeError), (None, TypeError), (True, TypeError)])
def test_a_bad_number_of_draws(n, error):
    sampler = gvk.TaskSampler(SIZES)
    with pytest.raises(error, match="n: expected"):
        sampler.sample(n)
    assert sampler.position == 0
