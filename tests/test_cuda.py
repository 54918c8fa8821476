"""The CUDA kernels on a host that plays the device: both paths, and the protocol between blocks in random schedules."""

import pytest
import torch
from cases import LAYOUTS, task_gradients

import gradvac_kernels as gvk
from gradvac_kernels.backends import cuda, pieces

host = cuda._cuda if cuda._DEVICE == "cpu" else None
pytestmark = pytest.mark.skipif(host is None, reason="the CUDA sources are not compiled for the host here")
# empty ones, a short one, some of a few pieces, and one of more pieces than there are blocks
GROUPS = gvk.ParameterGroups.from_sizes(
    {"a": 3, "b": 5000, "c": 0, "d": 9001, "e": 4096, "f": 20000, "g": 0, "h": 4100}, align=8
)


@pytest.fixture
def device():
    """The host's device, to be changed."""
    yield host
    host.fuzz(0)
    host.set_residents(3)


def vaccinate(grads, groups, *, one_launch, out_dtype=None, **arguments):
    """All that a step gives, with NaN as 9."""
    T = len(grads)
    ema = torch.full((len(groups), T, T), 0.3, dtype=torch.float64)
    out = torch.zeros(groups.numel, dtype=out_dtype or grads.dtype)
    rule = {"beta": 0.1, "target": None, "task_ids": None, "vaccinated": None, "order": None, "seed": 7, "step": 3}
    rule |= {"first_group": groups.first, **arguments}
    found = cuda.vaccinate(grads, groups.bounds, ema, out=out, one_launch=one_launch, **rule)
    return [result.nan_to_num(9.0) for result in (out, *found, ema)]


def test_the_tables_are_cut_as_the_kernels_count():
    assert host.RUN == pieces.RUN


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("T", [1, 2, 3, 4, 5, 8])
def test_one_launch_and_two_give_the_same_bits(device, T, dtype, out_dtype):
    """The pieces, and the order of all additions, are the same; so is what is rounded."""
    grads = task_gradients(T, GROUPS, dtype=dtype)
    expected = vaccinate(grads, GROUPS, one_launch=False, out_dtype=out_dtype)
    for residents in (1, 3, 100):
        device.set_residents(residents)
        found = vaccinate(grads, GROUPS, one_launch=True, out_dtype=out_dtype)
        assert all(torch.equal(a, b) for a, b in zip(found, expected)), residents


@pytest.mark.parametrize(
    ("T", "dtype", "residents"),
    [(2, torch.float32, 2), (5, torch.bfloat16, 3), (8, torch.float32, 4), (3, torch.bfloat16, 7)],
)
def test_one_launch_in_any_schedule(device, T, dtype, residents):
    """300 schedules each: blocks of random speeds, which change wherever they could see each other."""
    grads = task_gradients(T, GROUPS, dtype=dtype)
    expected = vaccinate(grads, GROUPS, one_launch=False)
    device.set_residents(residents)
    before = device.switches()
    for seed in range(1, 301):
        device.fuzz(seed)
        found = vaccinate(grads, GROUPS, one_launch=True)
        assert all(torch.equal(a, b) for a, b in zip(found, expected)), seed
    assert device.switches() - before > 300 * 20


@pytest.mark.parametrize(("T", "dtype"), [(6, torch.float32), (12, torch.bfloat16), (17, torch.float64)])
def test_other_launches_in_any_schedule(device, T, dtype):
    """Who finishes a group, and who adds up its weights, is whoever comes last."""
    groups = GROUPS[:5]
    grads = task_gradients(T, groups, dtype=dtype)
    expected = vaccinate(grads, groups, one_launch=False)
    for seed in range(1, 26):
        device.fuzz(seed)
        found = vaccinate(grads, groups, one_launch=False)
        assert all(torch.equal(a, b) for a, b in zip(found, expected)), seed


@pytest.mark.parametrize(("T", "U", "dtype"), [(6, 3, torch.float32), (12, 40, torch.bfloat16), (5, 2, torch.float64)])
def test_cross_gram_in_any_schedule(device, T, U, dtype):
    groups = GROUPS[:5]
    a, b = (task_gradients(rows, groups, step=rows, dtype=dtype) for rows in (T, U))
    expected = gvk.cross_gram(a, b, groups, backend="cuda")
    for seed in range(1, 26):
        device.fuzz(seed)
        assert torch.equal(gvk.cross_gram(a, b, groups, backend="cuda"), expected), seed


@pytest.mark.parametrize(
    ("T", "dtype"),
    [(2, torch.float16), (4, torch.bfloat16), (5, torch.float32), (8, torch.bfloat16), (17, torch.float32)],
)
def test_pieces_of_any_length_are_added_up_in_float64(monkeypatch, T, dtype):
    """Groups beyond 8M columns have several runs in one, short ones are shared among the warps in other ways. Longer
    chains are some 1e-9 off, another order of float64 1e-15."""
    groups = gvk.ParameterGroups.from_sizes({"a": 20_000})
    grads, found = task_gradients(T, groups, dtype=dtype), []
    for columns in (4096, 1024, 2048, 5 * 4096):
        monkeypatch.setattr(cuda, "piece_columns", lambda *_, columns=columns: columns)
        cuda._make_plan.cache_clear()
        found.append(gvk.gram(grads, groups, backend="cuda")[0])
    cuda._make_plan.cache_clear()
    norms = found[0].diagonal().sqrt()
    for other in found[1:]:
        assert float(((other - found[0]).abs() / norms[:, None] / norms).max()) < 1e-13


def test_a_launch_that_fails_is_an_error_and_harms_no_later_one(device):
    grads = task_gradients(4, GROUPS)
    expected = vaccinate(grads, GROUPS, one_launch=True)
    device.set_residents(0)
    with pytest.raises(RuntimeError, match="CUDA"):
        vaccinate(grads, GROUPS, one_launch=True)
    device.set_residents(3)
    assert all(torch.equal(a, b) for a, b in zip(vaccinate(grads, GROUPS, one_launch=True), expected))


def test_where_there_is_no_one_launch():
    """Many rows, or float64: the others then, whatever was asked for."""
    for T, dtype in ((9, torch.float32), (4, torch.float64)):
        grads = task_gradients(T, GROUPS, dtype=dtype)
        found, expected = (vaccinate(grads, GROUPS, one_launch=one_launch) for one_launch in (True, False))
        assert all(torch.equal(a, b) for a, b in zip(found, expected))


@pytest.mark.parametrize(
    ("T", "fits", "asked", "launches"),
    [
        (4, True, None, 1),
        (4, False, None, 2),
        (5, False, None, 1),
        (4, False, True, 1),
        (4, True, False, 2),
        (8, True, False, 2),
        (9, True, True, 4),
    ],
)
def test_how_many_launches(monkeypatch, T, fits, asked, launches):
    """One is chosen where all gradients fit the cache, to the byte, and for more than 4 rows."""
    grads = task_gradients(T, GROUPS)
    monkeypatch.setattr(cuda, "_cache", lambda _: grads.nbytes - (not fits))
    before = host.launches()
    vaccinate(grads, GROUPS, one_launch=asked)
    assert host.launches() - before == launches


@pytest.mark.parametrize("one_launch", [False, True])
def test_nothing_is_touched_outside_for_any_ids_and_order(one_launch):
    """What lives on a device is not checked by value: the kernels stay in their memory on any content."""
    groups, T, N, big = LAYOUTS["ragged"], 4, 5, 1 << 40
    grads = task_gradients(T, groups)[:, : groups.numel].contiguous()
    wide = torch.zeros(T, 2280)
    wide[:, : groups.numel] = grads
    grads = wide[:, : groups.numel]
    memory = torch.full((3, len(groups), N, N), 0.25, dtype=torch.float64)
    rule = {"beta": 0.1, "target": None, "vaccinated": None, "seed": 0, "step": 0, "first_group": 0}
    for ids, order in (([0, -1, big, 3], None), ([0, 1, 2, 3], [[7, -1, big], [1, 1, 1], [0, 1, 3], [2, 1, 0]])):
        given = None if order is None else torch.tensor([order] * len(groups))
        out = torch.zeros(groups.numel)
        rule |= {"one_launch": one_launch, "task_ids": torch.tensor(ids), "order": given}
        cuda.vaccinate(grads, groups.bounds, memory[1], out=out, **rule)
        assert bool((memory[0] == 0.25).all() and (memory[2] == 0.25).all())
    assert bool((memory[1] != 0.25).any())


def test_too_many_rows_are_refused():
    groups = gvk.ParameterGroups.from_sizes({"a": 2})
    with pytest.raises(ValueError, match="grads: expected at most 2304 rows"):
        gvk.gram(torch.zeros(3585, 2), groups, backend="cuda")


def test_the_number_of_matrices_may_be_large():
    """coefficients alone, for more rows than a block has threads."""
    T = 300
    groups = gvk.ParameterGroups.from_sizes({"a": 10, "b": 1})
    x = task_gradients(T, groups)
    G = gvk.gram(x, groups, backend="reference")
    emas = [torch.zeros(2, T, T, dtype=torch.float64) for _ in range(2)]
    found, want = (
        gvk.coefficients(G, groups, ema, beta=0.2, vaccinated=[0, 7, T - 1], backend=name)
        for ema, name in zip(emas, ("cuda", "cpu"))
    )
    assert torch.equal(found.corrected, want.corrected)
    assert torch.equal(emas[0], emas[1])  # the same recurrence, each operation rounded
    assert torch.equal(found.weights, want.weights)
