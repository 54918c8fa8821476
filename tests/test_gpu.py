"""The GPU backends on a GPU: the parity grid of the core, sizes past 2^31, bits, graphs, streams, no waiting."""

import pytest
import streamed
import torch
import torch.distributed as dist
from cases import LAYOUTS
from test_parity import check_run

import gradvac_kernels as gvk
from gradvac_kernels import methods
from gradvac_kernels.backends import choose, cuda, triton

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: torch.cuda.is_available() is False"),
]
GPU = "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(params=["triton", "cuda:two launches", "cuda:one launch"])
def backend(request, monkeypatch):
    """Name of a backend; "cuda:one launch" forces that path where it can be taken."""
    name, _, path = request.param.partition(":")
    missing = {"triton": triton, "cuda": cuda}[name].why_unavailable()
    if missing is not None:
        pytest.skip(f"{name}: {missing}")
    if path:
        monkeypatch.setattr(cuda, "_takes_one_launch", lambda _: path == "one launch")
    return name


@pytest.fixture(autouse=True)
def _plain_memory():
    """Filling memory with NaN launches kernels of its own, which a captured graph would hold."""
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(1)  # the oracle's products are small


def random_gradients(T, groups, dtype=torch.float32, seed=0):
    generator = torch.Generator(GPU).manual_seed(seed)
    grads = torch.randn(T, groups.numel, generator=generator, device=GPU).to(dtype)
    grads += torch.randn(groups.numel, generator=generator, device=GPU).to(dtype) * 0.7
    return grads


def targets(groups, T):
    return torch.full((len(groups), T, T), 0.2, dtype=torch.float64, device=GPU)


def vaccinate(backend, grads, groups, ema, **arguments):
    return gvk.vaccinate(grads, groups, ema, backend=backend, **arguments)


# ------------------------------------------------------------------------------------------------------------- parity


def test_triton_is_what_is_chosen():
    assert choose(torch.device(GPU)) is triton
    groups = LAYOUTS["ragged"]
    grads = random_gradients(4, groups)
    assert torch.equal(gvk.gram(grads, groups), gvk.gram(grads, groups, backend="triton"))


@pytest.mark.parametrize("layout", ["one", "ragged", "aligned", "long", "whole"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 2, 5, 8, 13, 14, 16, 17, 33])
def test_parity_with_the_oracle(backend, T, dtype, layout):
    steps = 2 if layout in ("long", "whole") or T > 16 else 5
    if dtype == torch.float64 and T > 13 and layout in ("long", "whole"):
        layout = "wide"  # 16 rows turned in 3 dimensions may nearly vanish: 1e-12 is lost there, in the oracle as well
    assert (check_run(backend, T, layout, dtype, steps, device=GPU) > 0) == (T > 1)


@pytest.mark.small
@pytest.mark.parametrize("T", [2, 3, 8, 16, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parity_in_small(backend, T, dtype):
    """Every kernel, in few launches; the ends of the arrays are the ends of the memory."""
    for layout in ("long", "whole"):
        assert check_run(backend, T, layout, dtype, 1, vaccinated=(0, T - 1), device=GPU) > 0


@pytest.mark.parametrize("T", [2, 8])
def test_parity_over_40_steps(backend, T):
    assert check_run(backend, T, "ragged", torch.float32, 40, device=GPU) > 0


@pytest.mark.parametrize("T", [64, 65, 100, 128, 200])
def test_parity_with_many_tasks(backend, T):
    assert check_run(backend, T, "ragged", torch.float32, 3, vaccinated=(0, T // 2, T - 1), device=GPU) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parity_of_unaligned_strided_rows(backend, dtype):
    assert check_run(backend, 6, "long", dtype, 2, skew=3, device=GPU) > 0


def test_parity_with_zero_rows_and_constant_targets(backend):
    assert check_run(backend, 5, "ragged", torch.float32, 5, zero_rows=True, device=GPU) > 0
    for target in (-0.3, 0.0, 1.0):
        assert check_run(backend, 5, "ragged", torch.float32, 2, target=target, device=GPU) > 0


@pytest.mark.parametrize(
    ("power", "bound"), [(1, 1e-7), (3, 2e-7), (0, 6e-7)], ids=["normal", "heavy tails", "outliers"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("T", [2, 3, 8, 9, 13, 16, 24, 32, 48, 64, 100, 128])
def test_error_of_the_gram(backend, T, dtype, power, bound):
    """|G - exact| <= 1e-7 |g_i||g_j|, on a group of many runs and one of a few.

    Where one of 16 products outweighs the others, a matrix unit cuts off up to 2^-23 of their sum: 1.2e-7; and it cuts
    every small one to a few bits below the large one, up to 15 x 2^-25 more. That is what outliers (power 0) are for.
    """
    groups = gvk.ParameterGroups.from_sizes({"a": 3_000_000, "b": 10_000}, align=8)
    grads = random_gradients(T, groups, torch.float32)
    if power == 0:
        grads *= 1e-3
        grads[:, ::16] = 1 + grads[:, ::16]
    grads = grads.pow(power or 1).to(dtype)
    exact = gvk.gram(grads.double(), groups, backend="reference")
    lengths = exact.diagonal(dim1=1, dim2=2).sqrt()
    error = ((gvk.gram(grads, groups, backend=backend) - exact).abs() / lengths[:, :, None] / lengths[:, None]).max()
    print(f"error of the Gram, T={T} {dtype}, normal ** {power}: {float(error):.1e}")
    assert error <= bound


@pytest.mark.small
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("T", "U"), [(3, 8), (40, 17)])
def test_cross_gram_in_small(backend, T, U, dtype):
    check_cross_gram(backend, T, U, dtype, gvk.ParameterGroups.from_sizes({"a": 5, "b": 9000, "c": 0, "d": 333}))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("T", "U"), [(1, 5), (8, 8), (16, 17), (40, 33), (100, 2)])
def test_cross_gram(backend, T, U, dtype):
    check_cross_gram(backend, T, U, dtype, gvk.ParameterGroups.from_sizes({"a": 3_000_000, "b": 10_000}, align=8))


def check_cross_gram(backend, T, U, dtype, groups):
    """Its bound, and its bits: once more, and for a slab of unaligned rows."""
    a, b = (random_gradients(rows, groups, dtype, seed=rows) for rows in (T, U))
    C = gvk.cross_gram(a, b, groups, backend=backend)
    exact = gvk.cross_gram(a.double(), b.double(), groups, backend="reference")
    lengths = [torch.stack([g[:, x:y].double().norm(dim=1) for x, y in groups.bounds.tolist()]) for g in (a, b)]
    bound = 2e-14 if dtype == torch.float64 else 1e-7
    assert bool(((C - exact).abs() <= bound * lengths[0][:, :, None] * lengths[1][:, None]).all())
    assert torch.equal(gvk.cross_gram(a, b, groups, backend=backend), C)
    for k in range(len(groups)):
        columns = slice(groups.offsets[k], groups.offsets[k + 1])
        x, y = torch.nn.functional.pad(a[:, columns], (1, 0))[:, 1:], b[:, columns].contiguous()
        assert torch.equal(gvk.cross_gram(x, y, groups[k : k + 1], backend=backend)[0], C[k])


def test_orders_are_drawn_on_the_device(backend):
    """A given order and the drawn one give the same bits."""
    groups, T = LAYOUTS["ragged"], 7
    grads = random_gradients(T, groups)
    emas = [targets(groups, T) for _ in range(3)]
    order = gvk.task_order(len(groups), T, seed=5, step=1 << 33, device=GPU)
    assert torch.equal(order.cpu(), gvk.task_order(len(groups), T, seed=5, step=1 << 33))
    found = vaccinate(backend, grads, groups, emas[0], seed=5, step=1 << 33)
    given = vaccinate(backend, grads, groups, emas[1], order=order)
    counted = vaccinate(backend, grads, groups, emas[2], seed=5, step=torch.tensor(1 << 33, device=GPU))
    for other in (given, counted):
        assert all(torch.equal(a, b) for a, b in zip(found[:2], other[:2]))
    assert torch.equal(emas[0], emas[1])
    assert torch.equal(emas[0], emas[2])


# --------------------------------------------------------------------------------------------------------------- bits


@pytest.mark.parametrize(
    ("T", "dtype"), [(2, torch.float32), (8, torch.bfloat16), (24, torch.float32), (64, torch.bfloat16)]
)
def test_the_same_bits_on_every_run(backend, T, dtype):
    groups = gvk.ParameterGroups.from_sizes({str(i): 50_000 * i for i in range(8)}, align=8)
    grads = random_gradients(T, groups, dtype)
    runs = []
    for _ in range(5):
        ema = targets(groups, T)
        runs.append((*vaccinate(backend, grads, groups, ema, seed=1), ema))
    for run in runs[1:]:
        assert all(torch.equal(a.nan_to_num(9), b.nan_to_num(9)) for a, b in zip(run, runs[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("T", [1, 2, 3, 5, 8])
def test_one_launch_and_two_give_the_same_bits(T, dtype):
    if cuda.why_unavailable() is not None:
        pytest.skip(cuda.why_unavailable())
    groups = gvk.ParameterGroups.from_sizes({str(i): 40_000 * i + 9 for i in range(30)}, align=8)
    grads, results = random_gradients(T, groups, dtype), []
    rule = {"beta": 0.1, "target": None, "task_ids": None, "vaccinated": None, "order": None, "seed": 0, "step": 0}
    for one_launch in (False, True, True):
        ema, out = targets(groups, T), torch.zeros(groups.numel, dtype=dtype, device=GPU)
        found = cuda.vaccinate(grads, groups.bounds, ema, out=out, one_launch=one_launch, first_group=0, **rule)
        results.append([result.nan_to_num(9) for result in (out, ema, *found)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("T", [3, 8, 20])
def test_the_same_bits_for_a_slab(backend, T):
    groups = gvk.ParameterGroups.from_sizes({"a": 5, "b": 70_000, "c": 4_097, "d": 333})
    grads = random_gradients(T, groups)
    whole_ema, part_ema = targets(groups, T), targets(groups[1:3], T)
    whole = vaccinate(backend, grads, groups, whole_ema, seed=2)
    columns = grads[:, groups.offsets[1] : groups.offsets[3]].contiguous()
    part = vaccinate(backend, columns, groups[1:3], part_ema, seed=2)
    assert torch.equal(part.weights, whole.weights[1:3])
    assert torch.equal(part_ema, whole_ema[1:3])
    assert torch.equal(part.gradient, whole.gradient[groups.offsets[1] : groups.offsets[3]])


@pytest.mark.parametrize(
    ("T", "dtype"),
    [(3, torch.float32), (8, torch.bfloat16), (16, torch.bfloat16), (16, torch.float32), (64, torch.bfloat16)],
)
def test_the_same_bits_for_any_alignment(backend, T, dtype):
    """Narrow loads in the whole buffer, loads of 16 bytes in the slab."""
    groups = gvk.ParameterGroups.from_sizes({"a": 5, "b": 80_000, "c": 333})
    grads = random_gradients(T, groups, dtype)
    columns = grads[:, groups.offsets[1] : groups.offsets[2]].contiguous()
    assert torch.equal(gvk.gram(columns, groups[1:2], backend=backend)[0], gvk.gram(grads, groups, backend=backend)[1])


def test_more_than_2_31_elements(backend):
    """Groups on both sides of the 2^31st element give what they give alone."""
    sizes = {"a": 700_000_000, "b": 9_000, "c": 30_000_000}
    groups = gvk.ParameterGroups.from_sizes(sizes, align=8)
    grads = torch.empty(3, groups.numel, dtype=torch.bfloat16, device=GPU)
    assert grads.numel() > 1 << 31
    for i, row in enumerate(grads):
        row.normal_(generator=torch.Generator(GPU).manual_seed(i))
    weights = torch.rand(3, 3, dtype=torch.float64, device=GPU)
    G, out = gvk.gram(grads, groups, backend=backend), gvk.combine(grads, weights, groups, backend=backend)
    for k in range(3):
        alone = grads[:, groups.offsets[k] : groups.offsets[k + 1]]
        assert torch.equal(gvk.gram(alone.contiguous() if k else alone, groups[k : k + 1], backend=backend)[0], G[k])
        tail = alone[:, -5000:].double()
        expected = (weights[k] @ tail).to(torch.bfloat16).double()
        found = out[groups.offsets[k] : groups.offsets[k + 1]][-5000:].double()
        # torch rounds to bfloat16 by way of float32: once in a while to the other neighbour, 2^-7 of the number away
        assert bool(((found - expected).abs() <= 2**-7 * expected.abs()).all())


# --------------------------------------------------------------------------------------- graphs, streams, no waiting


@pytest.mark.parametrize("layout", ["long", "whole"])
def test_a_captured_graph_is_right_for_changed_inputs(backend, layout):
    groups, T = LAYOUTS[layout], 8
    grads, ema, out = random_gradients(T, groups), targets(groups, T), torch.zeros(groups.numel, device=GPU)
    step = torch.zeros((), dtype=torch.int64, device=GPU)
    vaccinate(backend, grads, groups, ema, step=step, out=out)  # compiles, and copies the tables
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = vaccinate(backend, grads, groups, ema, step=step, out=out)
        step += 1
    ema.fill_(0.2)
    step.zero_()
    expected_ema = targets(groups, T)
    for replay in range(4):
        grads.copy_(random_gradients(T, groups, seed=100 + replay))
        graph.replay()
        expected = vaccinate(backend, grads, groups, expected_ema, step=replay)
        assert torch.equal(found.gradient, expected.gradient)
        assert torch.equal(found.weights, expected.weights)
        assert torch.equal(ema, expected_ema)


def test_a_method_in_a_captured_graph():
    groups, T = LAYOUTS["ragged"], 5
    grads = random_gradients(T, groups)
    method, plain = gvk.GradVac(beta=0.2, capturable=True), gvk.GradVac(beta=0.2)
    method(grads, groups)
    plain(grads, groups)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = method(grads, groups)
    for _ in range(3):
        graph.replay()
        assert torch.equal(found.weights, plain(grads, groups).weights)
    assert method.step == plain.step == 4


def test_two_streams_at_once(backend):
    groups, T = gvk.ParameterGroups.from_sizes({"a": 3_000_000, "b": 500, "c": 70_000}), 8
    inputs = [random_gradients(T, groups, seed=seed) for seed in range(2)]
    expected = [vaccinate(backend, grads, groups, targets(groups, T)).gradient.clone() for grads in inputs]
    emas = [[targets(groups, T) for _ in range(20)] for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    results = [[], []]
    for turn in range(20):
        for which, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[which].append(vaccinate(backend, inputs[which], groups, emas[which][turn]).gradient)
    torch.cuda.synchronize()
    for which in range(2):
        assert all(torch.equal(result, expected[which]) for result in results[which])


@pytest.mark.parametrize("layout", ["ragged", "whole"])
def test_the_host_never_waits(backend, layout):
    groups, T = LAYOUTS[layout], 6
    grads, out = random_gradients(T, groups), torch.empty(groups.numel, device=GPU)
    method = gvk.GradVac(vaccinated=(0, 2, 5), num_tasks=8)
    ids = [5, 4, 3, 2, 1, 0]
    method(grads, groups, task_ids=ids, out=out)
    ema = targets(groups, T)
    vaccinate(backend, grads, groups, ema, out=out)
    gvk.cross_gram(grads, grads, groups, backend=backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            method(grads, groups, task_ids=ids, out=out)
        vaccinate(backend, grads, groups, ema, out=out)
        gvk.gram(grads, groups, backend=backend)
        gvk.cross_gram(grads, grads, groups, backend=backend)
        weights = torch.ones(len(groups), T, dtype=torch.float64, device=GPU)
        gvk.combine(grads, weights, groups, out=out, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


METHODS = {
    "Sum": methods.Sum,
    "PCGrad": methods.PCGrad,
    "MGDA": methods.MGDA,
    "GradNorm": methods.GradNorm,
    "CATS": methods.CATS,
}


@pytest.mark.parametrize("name", METHODS)
def test_methods_are_those_of_the_cpu_and_never_wait(name):
    groups, T, ids = LAYOUTS["ragged"], 6, [5, 4, 3, 2, 1, 0]
    here, there = METHODS[name](num_tasks=8), METHODS[name](num_tasks=8)
    tracker = gvk.SimilarityTracker(groups, 8)
    for step in range(4):
        grads, losses = random_gradients(T, groups, seed=step), torch.linspace(1, 2, T, device=GPU) / (1 + step)
        torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first call compiles and copies tables
        try:
            found = there(grads, groups, ids, losses=losses)
            tracker.update(found, ids)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        want = here(grads.cpu(), groups, ids, losses=losses.cpu())
        # Gram matrices differ by 1e-7 |g_i||g_j|; gradients that share a direction are far from singular
        assert torch.allclose(found.weights.cpu(), want.weights, rtol=0, atol=1e-4)
    assert tracker.steps == 4


def test_at_most_four_launches(backend):
    from torch.profiler import ProfilerActivity, profile

    for T, layout in ((2, "long"), (8, "ragged"), (8, "whole"), (100, "long")):
        groups = LAYOUTS[layout]
        grads, ema, out = random_gradients(T, groups), targets(groups, T), torch.empty(groups.numel, device=GPU)
        vaccinate(backend, grads, groups, ema, vaccinated=[1], out=out)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            vaccinate(backend, grads, groups, ema, vaccinated=[1], out=out)
            torch.cuda.synchronize()
        events = [event.name for event in trace.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        kernels = [name for name in events if not name.startswith("Memset")]  # of counters
        assert 1 <= len(kernels) <= 4, events


def test_compiled_without_a_graph_break(backend):
    groups, T = LAYOUTS["ragged"], 4
    grads = random_gradients(T, groups)

    @torch.compile(fullgraph=True)
    def step(grads, ema):
        return gvk.vaccinate(grads * 2, groups, ema, seed=3, backend=backend).gradient + 1

    emas = [targets(groups, T), targets(groups, T)]
    expected = vaccinate(backend, grads * 2, groups, emas[0], seed=3).gradient + 1
    assert torch.equal(step(grads, emas[1]), expected)
    assert torch.equal(emas[0], emas[1])


@pytest.mark.small
def test_nothing_is_touched_outside_for_any_ids_and_order(backend):
    groups, T, N, big = LAYOUTS["ragged"], 4, 5, 1 << 40
    grads, memory = random_gradients(T, groups), torch.full((3, len(groups), N, N), 0.25, device=GPU).double()
    for ids, order in (([0, -1, big, 3], None), ([0, 1, 2, 3], [[7, -1, big], [1, 1, 1], [0, 1, 3], [2, 1, 0]])):
        given = None if order is None else torch.tensor([order] * len(groups), device=GPU)
        vaccinate(backend, grads, groups, memory[1], task_ids=torch.tensor(ids, device=GPU), order=given)
        assert bool((memory[0] == 0.25).all() and (memory[2] == 0.25).all())


# ----------------------------------------------------------------------------------------------------------- training


def test_training_is_that_on_the_cpu():
    """Three tasks, five steps of SGD: both devices walk the same way."""

    def train(device):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Linear(64, 3)).to(device)
        tasks = gvk.TaskGradients(model, tasks=["a", "b", "c"], granularity="all_layer", method=gvk.GradVac(beta=0.3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        generator = torch.Generator().manual_seed(1)
        for _ in range(5):
            x = torch.randn(32, 16, generator=generator).to(device)
            y = model(x)
            tasks.backward({name: (y[:, i] - x[:, i]).square().mean() for i, name in enumerate("abc")})
            optimizer.step()
        return torch.cat([parameter.detach().flatten().cpu() for parameter in model.parameters()])

    torch.backends.cuda.matmul.allow_tf32 = False
    # float32 products in another order, 5 steps of 0.1: some 1e-6
    assert torch.allclose(train("cpu"), train(GPU), rtol=0, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------- streaming


@pytest.mark.parametrize("granularity", ["all_layer", "all_matrix", "whole_model"])
def test_one_mixed_batch_is_one_backward_a_task(granularity, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # which recurrent layers would use
    streamed.check_steps(
        streamed.towers(), streamed.tower_losses, streamed.tower_inputs, 5, granularity=granularity, device=GPU
    )
    model, losses_of, inputs_of = (
        f(True) for f in (streamed.tied_transformer, streamed.tied_losses, streamed.tied_inputs)
    )
    streamed.check_steps(model, losses_of, inputs_of, 5, granularity=granularity, device=GPU)
    for model in (streamed.recurrent(), streamed.experts("index_add"), streamed.experts("setitem")):
        streamed.check_steps(
            model, streamed.sequence_losses, streamed.sequence_inputs, 5, granularity=granularity, device=GPU
        )


@pytest.mark.skipif(not (dist.is_available() and dist.is_nccl_available()), reason="no NCCL")
@pytest.mark.parametrize("granularity", ["all_layer", "whole_model"])
def test_a_job_of_one_process(tmp_path, granularity):
    """What NCCL adds up of one process is what it was."""
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        model, inputs = streamed.towers().to(GPU), [x.to(GPU) for x in streamed.tower_inputs(9, torch.Generator())]
        alone = gvk.TaskGradients(model, streamed.named(3), granularity)
        job = gvk.TaskGradients(model, streamed.named(3), granularity, process_group=dist.group.WORLD)
        for step in range(3):
            ids, found = streamed.draw_tasks(3, 9, step), []
            for tasks in (alone, job):
                streamed.one_batch(model, tasks, streamed.tower_losses, inputs, ids)
                found.append(tasks.last.gradient.clone())
                streamed.one_batch(model, tasks, streamed.tower_losses, inputs, ids, keep=True)
                found.append(tasks.apply().gradient.clone())
            assert torch.equal(found[0], found[2])
            assert torch.equal(found[1], found[3])
        assert torch.equal(alone.method.ema, job.method.ema)
    finally:
        dist.destroy_process_group()


def test_streaming_under_autocast_and_a_scaler():
    """The targets move, and the gradients are those of one backward a task as far as float16 goes."""
    (buffered, by_task), (model, by_batch) = streamed.two(streamed.tied_transformer(True).to(GPU), 3)
    ids = streamed.draw_tasks(3, 12, 0)
    inputs = [x.to(GPU) for x in streamed.tied_inputs(True)(12, torch.Generator().manual_seed(0))]

    def losses_of(model, inputs):
        with torch.autocast(GPU, torch.float16):
            logits = model(*inputs)
        return 256 * streamed.next_token_losses(logits.float(), inputs[1])

    streamed.one_backward_a_task(buffered, by_task, losses_of, inputs, ids)
    streamed.one_batch(model, by_batch, losses_of, inputs, ids)
    streamed.check_gradients(model, buffered, by_task.groups, tolerance=20 * 2**-11)  # float16 rounds by 2^-11
    assert bool(by_batch.method.ema.any())
