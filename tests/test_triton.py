"""The Triton backend on the host: its tables, its configurations, and its bits, in Triton's interpreter."""

import inspect
import itertools

import pytest
import torch
from cases import LAYOUTS, task_gradients
from hypothesis import given, settings
from hypothesis import strategies as st

import gradvac_kernels as gvk
from gradvac_kernels.backends import triton

if triton.why_unavailable() is not None:
    pytest.skip(triton.why_unavailable(), allow_module_level=True)

from gradvac_kernels.backends.pieces import RUN, piece_columns
from gradvac_kernels.backends.triton import combine_kernels, device, gram_kernels
from gradvac_kernels.backends.triton.plan import COMBINED, make_plan

CPU = torch.device("cpu")
interpreted = pytest.mark.skipif(not device.INTERPRETED, reason="with a GPU: tests/test_gpu.py")
sizes = st.lists(st.integers(0, 5 * RUN) | st.integers(0, 10_000_000), min_size=1, max_size=6)


def edges_of(groups):
    return tuple(groups.bounds.flatten().tolist())


@settings(max_examples=60, deadline=None)
@given(sizes=sizes, T=st.integers(1, 200), align=st.sampled_from([1, 8]))
def test_pieces_and_blocks_cover_every_group_once(sizes, T, align):
    groups = gvk.ParameterGroups.from_sizes({str(i): size for i, size in enumerate(sizes)}, align=align)
    plan = make_plan.__wrapped__(edges_of(groups), T, CPU)
    first = plan.first_piece.flatten().tolist()
    assert (first[0], first[-1], len(first)) == (0, len(plan.pieces), len(groups) + 1)
    blocks = plan.blocks.flip(0).tolist()
    for k, (begin, end) in enumerate(groups.bounds.tolist()):
        pieces = plan.pieces[first[k] : first[k + 1]].tolist()
        assert (pieces == []) == (end - begin <= RUN)
        mine = [block[1:] for block in blocks if block[0] == k]
        for parts, longest in ((pieces, piece_columns(end - begin, T)), (mine, COMBINED)):
            if parts:
                assert (parts[0][0], parts[-1][1]) == (begin, end)
                assert all(a[1] == b[0] for a, b in itertools.pairwise(parts))
                assert all(0 < stop - start <= longest for start, stop in parts)
                assert all(stop - start == longest for start, stop in parts[:-1])
        assert bool(mine) == (end > begin)
    long = [begin for begin, end in groups.bounds.tolist() if end - begin > RUN]
    assert all(begin % plan.alignment == 0 for begin in long) if plan.alignment else set(long) <= {0}
    assert [block[0] for block in blocks] == sorted(block[0] for block in blocks)


@settings(max_examples=200, deadline=None)
@given(columns=st.integers(RUN + 1, 10**11), T=st.integers(1, 1000))
def test_pieces_are_whole_runs_or_parts_of_one_and_few(columns, T):
    length = piece_columns(columns, T)
    assert length in range(RUN // 4, columns + 2 * RUN * -(-T // 512), RUN // 4)
    assert length <= RUN or length % RUN == 0
    assert -(-columns // length) <= 2048


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(0, 4 * RUN), min_size=2, max_size=5), data=st.data())
def test_a_slab_is_cut_as_the_whole_buffer(sizes, data):
    groups = gvk.ParameterGroups.from_sizes({str(i): size for i, size in enumerate(sizes)})
    first = data.draw(st.integers(0, len(sizes) - 1))
    slab = groups[first : data.draw(st.integers(first + 1, len(sizes)))]
    whole, part = (make_plan.__wrapped__(edges_of(g), 8, CPU) for g in (groups, slab))
    at = whole.first_piece.flatten().tolist()
    wanted = whole.pieces[at[first] : at[first + len(slab)]] - groups.offsets[first]
    assert torch.equal(part.pieces, wanted)


def test_a_configuration_for_any_number_of_rows():
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for T in range(1, 300):
            for hopper in (False, True):
                config = inspect.unwrap(gram_kernels.choose_config)(T, dtype, hopper)  # what a GPU is given
                assert gram_kernels.block_pairs(T, config.rows) >= 1
                assert config.kernel == "double" if dtype == torch.float64 else config.kernel in ("outer", "dot")
                assert config.kernel != "outer" or config.rows == T
                if config.unit == 32:  # columns summed in float32: with more, float16 was seen beyond its bound
                    assert config.columns * config.chain <= (128 if dtype == torch.bfloat16 else 64)


@interpreted
@pytest.mark.parametrize(
    ("T", "dtype", "config"),
    [
        (5, torch.float32, gram_kernels.Config("double", 4, 128, 4)),
        (5, torch.float32, gram_kernels.Config("dot", 16, 16, 1, chain=2)),
        (5, torch.bfloat16, gram_kernels.Config("dot", 16, 64, 1, chain=3)),
        (18, torch.float32, gram_kernels.Config("dot", 16, 32, 1, chain=4)),
        (18, torch.bfloat16, gram_kernels.Config("dot", 32, 32, 1, chain=4)),
        (18, torch.bfloat16, gram_kernels.Config("dot", 64, 32, 4, chain=2, unit=32)),
        (18, torch.float16, gram_kernels.Config("dot", 64, 64, 4, unit=32)),
        (18, torch.bfloat16, gram_kernels.Config("dot", 64, 64, 4, chain=2, unit=32)),
        (18, torch.bfloat16, gram_kernels.Config("dot", 16, 64, 1, chain=2, unit=32)),
        (18, torch.bfloat16, gram_kernels.Config("double", 8, 64, 4)),
        (9, torch.bfloat16, gram_kernels.Config("outer", 9, 256, 1)),
    ],
)
def test_any_configuration_gives_the_gram(T, dtype, config, monkeypatch):
    monkeypatch.setattr(gram_kernels, "parts", lambda dtype: 1 if dtype.itemsize == 2 else 3)  # as on a GPU
    # one begins at 16 bytes and has one column more than whole steps of any of these
    groups = gvk.ParameterGroups.from_sizes({"and a column": RUN + 513, "short": 3, "one": 4700, "two": 9001})
    grads = task_gradients(T, groups, dtype=dtype)
    plan = make_plan(edges_of(groups), T, CPU)
    G, arrived = gram_kernels.measure(grads, plan, config)
    exact = gvk.gram(grads.double(), groups, backend="reference")
    lengths = exact.diagonal(dim1=1, dim2=2).sqrt()
    # chains of 32 roundings of 2^-24 at most, over some lanes or runs: 1e-7 of |g_i||g_j|
    assert bool(((G - exact).abs() <= 1e-7 * lengths[:, :, None] * lengths[:, None]).all())
    assert torch.equal(G, G.mT)
    assert not bool(arrived.any())


@interpreted
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")  # infinity times zero
def test_two_units_a_load():
    """What is not finite concerns its row only, also in the columns of the other unit; and the bits are those of any
    alignment."""
    groups, T = gvk.ParameterGroups.from_sizes({"one": RUN + 72}), 5
    plan = make_plan(edges_of(groups), T, CPU)
    found = []
    for skew, value in ((0, -torch.inf), (1, -torch.inf), (0, 0.0)):
        grads = task_gradients(T, groups, dtype=torch.bfloat16, skew=skew)
        grads[2, 40] = value
        found.append(gram_kernels.measure(grads, plan, gram_kernels.Config("dot", 64, 64, 4, unit=32))[0])
    assert torch.equal(found[0].nan_to_num(7.0), found[1].nan_to_num(7.0))
    hit = torch.zeros(T, T, dtype=torch.bool)
    hit[2] = hit[:, 2] = True
    assert torch.equal(found[0][0].isfinite(), ~hit)
    assert torch.equal(found[0][0][~hit], found[2][0][~hit])


@interpreted
@pytest.mark.parametrize(
    ("T", "dtype", "wide"), [(1, torch.float16, torch.float32), (3, torch.bfloat16, torch.float32)]
)
def test_longer_blocks_give_the_same_bits(T, dtype, wide):
    """Those of few rows: whole blocks, what is left of one, and those that are not aligned."""
    groups = gvk.ParameterGroups.from_sizes(
        {"long": 9 * COMBINED + 8, "left": 3 * COMBINED + 3, "skewed": 5 * COMBINED}
    )
    grads = task_gradients(T, groups, dtype=dtype)
    weights = torch.rand(len(groups), T, dtype=torch.float64)
    found = []
    for columns in (COMBINED, 4 * COMBINED):
        plan = make_plan(edges_of(groups), T, CPU, columns)
        out = torch.full((groups.numel + 8,), 7, dtype=wide)
        combine_kernels.combine(grads, weights, plan, out[: groups.numel])
        assert bool((out[groups.numel :] == 7).all())
        found.append(out)
    assert torch.equal(*found)
    exact = torch.cat([w @ g.double() for w, g in zip(weights, grads.split(groups.sizes, 1))])
    assert torch.equal(found[0][: groups.numel], exact.to(wide))


def test_longer_blocks_where_there_is_enough_for_all():
    few = torch.empty(8, 10**8, dtype=torch.bfloat16, device="meta")
    assert combine_kernels.block_columns(few) == 8 * COMBINED
    assert combine_kernels.block_columns(few[:, : 10**6]) == COMBINED
    assert combine_kernels.block_columns(few.float()) == COMBINED
    assert combine_kernels.block_columns(few.new_empty(9, 10**8)) == COMBINED


@interpreted
@pytest.mark.parametrize(("T", "dtype"), [(3, torch.float32), (8, torch.bfloat16), (17, torch.float32)])
def test_the_same_bits_for_any_alignment_and_slab(T, dtype):
    groups = LAYOUTS["long"]  # its groups begin at columns 0, 3 and 16987
    together = {
        skew: gvk.gram(task_gradients(T, groups, dtype=dtype, skew=skew), groups, backend="triton") for skew in (0, 1)
    }
    assert torch.equal(together[0], together[1])
    grads = task_gradients(T, groups, dtype=dtype)
    for k in range(len(groups)):
        slab = groups[k : k + 1]
        columns = grads[:, groups.offsets[k] : groups.offsets[k + 1]].contiguous()  # aligned, and not in the whole
        assert torch.equal(gvk.gram(columns, slab, backend="triton")[0], together[0][k])


@interpreted
def test_a_slab_is_vaccinated_as_in_the_whole_buffer():
    groups = LAYOUTS["ragged"]
    grads = task_gradients(6, groups)
    ema = torch.full((len(groups), 6, 6), 0.3, dtype=torch.float64)
    part = ema[3:6].clone()
    whole = gvk.vaccinate(grads, groups, ema, seed=4, step=2, backend="triton")
    slab = groups[3:6]
    columns = grads[:, groups.offsets[3] : groups.offsets[6]].contiguous()
    found = gvk.vaccinate(columns, slab, part, seed=4, step=2, backend="triton")
    assert torch.equal(found.weights, whole.weights[3:6])
    assert torch.equal(part, ema[3:6])
    assert torch.equal(found.gradient, whole.gradient[groups.offsets[3] : groups.offsets[6]])


@interpreted
def test_nothing_is_read_or_written_past_the_arrays_for_any_ids_and_order():
    """Ids and orders on a device are not checked: whatever they hold, the kernels stay inside their arrays."""
    groups, T, N = LAYOUTS["one"], 4, 5
    grads = task_gradients(T, groups)
    from gradvac_kernels.backends.triton import vaccinate

    big = 1 << 40
    memory = torch.full((3, N, N), 0.25, dtype=torch.float64)  # guards on both sides of the targets
    for ids, order in (([0, -1, big, 3], None), ([0, 1, 2, 3], [[[7, -1, big], [1, 1, 1], [0, 1, 3], [2, 1, 0]]])):
        found = vaccinate(
            grads,
            groups.bounds,
            memory[1:2],
            beta=0.5,
            target=None,
            task_ids=torch.tensor(ids),
            vaccinated=torch.tensor([0, 1, big, 3, -1]),
            order=None if order is None else torch.tensor(order),
            seed=0,
            step=0,
            first_group=0,
            out=torch.empty(groups.numel),
        )
        assert bool((memory[0] == 0.25).all() and (memory[2] == 0.25).all())
        assert bool(found[0].isfinite().all())
