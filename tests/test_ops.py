"""The only door: schemas under opcheck, torch.compile, fakes, and every error of bad input, by the argument's name."""

import functools
import warnings

import pytest
import torch
from cases import LAYOUTS, inside, task_gradients
from torch._subclasses.fake_tensor import FakeTensorMode

import gradvac_kernels as gvk
from gradvac_kernels.backends import cpu, cuda, triton

K, T, P = 2, 3, 12
GROUPS = gvk.ParameterGroups.from_sizes({"a": 5, "b": 7})
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
NAMES = [None, *gvk.available_backends()]
OPS = torch.ops.gradvac


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def targets(num_tasks=T, groups=GROUPS):
    return torch.full((len(groups), num_tasks, num_tasks), 0.3, dtype=torch.float64)


def same(found, want):
    """Bit for bit, NaN for NaN, through tuples."""
    if isinstance(found, tuple):
        return len(found) == len(want) and all(map(same, found, want))
    return found.dtype == want.dtype and found.shape == want.shape and torch.equal(bits(found), bits(want))


def bits(tensor):
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8)


# ---------------------------------------------------------------------------------------------------------- opcheck


@pytest.fixture
def _nan_equals_nan(monkeypatch):
    """opcheck compares outputs with assert_close; what was not measured is NaN by design."""
    monkeypatch.setattr(torch.testing, "assert_close", functools.partial(torch.testing.assert_close, equal_nan=True))


def passes(op, *arguments):
    results = torch.library.opcheck(op.default, arguments)
    assert len(results) >= 4
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_gram_and_combine(dtype, backend):
    grads, weights = random(T, P, dtype=dtype), random(K, T, dtype=torch.float64)
    passes(OPS.gram, grads, GROUPS.bounds, backend)
    passes(OPS.cross_gram, grads, random(T + 1, P, dtype=dtype, seed=1), GROUPS.bounds, backend)
    passes(OPS.cross_gram, grads, grads, GROUPS.bounds, backend)
    passes(OPS.combine, grads, weights, GROUPS.bounds, torch.zeros(P, dtype=dtype), backend)


VACCINATIONS = {
    "moving": {},
    "constant": {"ema": None, "target": 0.5},
    "by id": {"ema": targets(5), "task_ids": torch.tensor([4, 0, 2])},
    "subset": {"vaccinated": torch.tensor([2, 0])},
    "none": {"vaccinated": torch.tensor([], dtype=torch.int64)},
    "counted": {"counter": torch.tensor(6)},
    "ordered": {"order": gvk.task_order(K, T, seed=1, step=1)},
    "all": {
        "ema": targets(4),
        "task_ids": torch.tensor([3, 0, 1]),
        "vaccinated": torch.tensor([3]),
        "order": gvk.task_order(K, T, seed=1, step=1),
    },
}


def check_vaccinate(dtype, backend, ema=0, target=None, task_ids=None, vaccinated=None, order=None, counter=None):
    ema = targets() if isinstance(ema, int) else ema
    rule = (ema, 0.1, target, task_ids, vaccinated, order, 5, 6, counter, 1, backend)
    grads = random(T, P, dtype=dtype)
    passes(OPS.vaccinate, grads, GROUPS.bounds, torch.zeros(P, dtype=dtype), *rule)
    passes(OPS.coefficients, gvk.gram(grads, GROUPS), dtype, *rule)


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("variant", VACCINATIONS)
@pytest.mark.usefixtures("_nan_equals_nan")
def test_opcheck_vaccinate(variant, backend):
    check_vaccinate(torch.float32, backend, **VACCINATIONS[variant])


@pytest.mark.parametrize("backend", gvk.available_backends())
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.usefixtures("_nan_equals_nan")
def test_opcheck_vaccinate_other_types(dtype, backend):
    check_vaccinate(dtype, backend, **VACCINATIONS["all"])


@pytest.mark.parametrize(("num_groups", "num_tasks"), [(3, 4), (0, 4), (3, 1)])
def test_opcheck_task_order(num_groups, num_tasks):
    passes(OPS.task_order, num_groups, num_tasks, -1, 2, 7, torch.device("cpu"))


# ---------------------------------------------------------------------------------------------------- torch.compile


@pytest.fixture(autouse=True)
def _no_compiled_code_left():
    yield
    torch._dynamo.reset()


def check_compiled(function, *arguments, backend="aot_eager", **options):
    """Equal results, and equal changes in place, bit for bit."""
    copies = [a.clone() for a in arguments]
    want = function(*arguments)
    found = torch.compile(function, backend=backend, fullgraph=True, **options)(*copies)
    assert same(found, want)
    assert all(map(same, copies, arguments))


def gram_and_more(grads):
    return gvk.gram(grads * 2, GROUPS) + 1


def cross_gram(a, b):
    return gvk.cross_gram(a * 2, b, GROUPS) + 1


def combine(grads, weights):
    return gvk.combine(grads, weights, GROUPS) + 1


def combine_into(grads, weights, out):
    return gvk.combine(grads, weights, GROUPS, out=out) * 2


def vaccinate(grads, ema):
    return gvk.vaccinate(grads, GROUPS, ema, beta=0.1, vaccinated=[0, 2], step=3)


def vaccinate_by_id_into(grads, ema, out):
    found = gvk.vaccinate(grads, GROUPS, ema, beta=0.1, task_ids=[4, 0, 2], seed=8, out=out)
    return found.gradient * 2, found.weights, found.similarity, found.corrected, found.gram


def vaccinate_towards_a_constant(grads, order):
    return gvk.vaccinate(grads, GROUPS, None, target=0.5, order=order)


def task_order(grads):
    return gvk.task_order(4, grads.shape[0], seed=5, step=6, first_group=1) + 1


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (gram_and_more, ()),
        (cross_gram, (random(T + 1, P, seed=1),)),
        (combine, (random(K, T),)),
        (combine_into, (random(K, T, dtype=torch.float64), torch.full((P,), torch.nan))),
        (vaccinate, (targets(),)),
        (vaccinate_by_id_into, (targets(5), torch.full((P,), torch.nan))),
        (vaccinate_towards_a_constant, (gvk.task_order(K, T, seed=3, step=0),)),
        (task_order, ()),
    ],
)
def test_compiled_equals_eager(function, arguments):
    check_compiled(function, random(T, P), *(a.clone() for a in arguments))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_compiled_other_types(dtype):
    check_compiled(vaccinate, random(T, P, dtype=dtype), targets())


def test_compiled_with_inductor(monkeypatch):
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:
        pytest.skip(f"inductor has no C++ compiler: {error}")
    # one run of the C++ compiler: no probes of vector instructions, no kernels that fill memory
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    arguments = (random(T, P), targets(5), torch.full((P,), torch.nan))
    check_compiled(vaccinate_by_id_into, *arguments, backend="inductor", options={"cpp.vec_isa_ok": False})


@pytest.fixture
def counting():
    """A backend for torch.compile, with AOTAutograd, that counts its graphs."""
    from torch._dynamo.backends.common import aot_autograd

    def count(graph, inputs):
        count.graphs += 1
        return graph.forward

    count.graphs = 0
    backend = aot_autograd(fw_compiler=count)
    return count, backend


def test_compiled_once_for_every_number_of_tasks(counting):
    count, backend = counting
    function = torch.compile(vaccinate, backend=backend, fullgraph=True, dynamic=True)
    for num_tasks in (3, 5, 4):
        ema, eager_ema = targets(num_tasks), targets(num_tasks)
        found = function(random(num_tasks, P), ema)
        assert same(found, vaccinate(random(num_tasks, P), eager_ema))
        assert same(ema, eager_ema)
    assert count.graphs == 1


def test_compiled_once_for_every_step(counting):
    """A training loop counts steps: no graph may be bound to one of them (torch gives up after 8 graphs)."""
    count, backend = counting

    def one_step(grads, ema, step):
        return gvk.vaccinate(grads, GROUPS, ema, beta=0.1, step=step)

    function = torch.compile(one_step, backend=backend, fullgraph=True)
    ema, eager_ema = targets(), targets()
    for step in range(12):
        found = function(random(T, P, seed=step), ema, step)
        assert same(found, one_step(random(T, P, seed=step), eager_ema, step))
    assert same(ema, eager_ema)
    assert count.graphs <= 3  # step 0, step 1, any other


def test_compiled_orders_of_every_step(counting):
    count, backend = counting

    def orders(step, seed):
        return gvk.task_order(2, 5, seed=seed, step=step)

    function = torch.compile(orders, backend=backend, fullgraph=True)
    for step in range(12):
        assert same(function(step, 100 - step), orders(step, 100 - step))
    assert count.graphs <= 3


# ------------------------------------------------------------------------------------------------------------ fakes


def describe(tensor):
    return tuple(tensor.shape), tensor.dtype, tensor.device


def check_shapes(groups, device, dtype):
    """[T, P] in, nothing computed."""
    grads = torch.empty(T, P, dtype=dtype, device=device)
    device = grads.device
    assert describe(gvk.gram(grads, groups)) == ((K, T, T), torch.float64, device)
    other = torch.empty(T + 2, P, dtype=dtype, device=device)
    assert describe(gvk.cross_gram(grads, other, groups)) == ((K, T, T + 2), torch.float64, device)
    weights = torch.empty(K, T, dtype=torch.float64, device=device)
    assert describe(gvk.combine(grads, weights, groups)) == ((P,), dtype, device)
    out = torch.empty(P, dtype=torch.float32, device=device)
    assert gvk.combine(grads, weights, groups, out=out) is out
    ema = torch.empty(K, 5, 5, dtype=torch.float64, device=device)
    found = gvk.vaccinate(grads, groups, ema, task_ids=[4, 0, 1])
    assert describe(found.gradient) == ((P,), dtype, device)
    assert describe(found.weights) == ((K, T), torch.float64, device)
    assert describe(found.similarity) == ((K, T, T), torch.float64, device)
    assert describe(found.corrected) == ((K, T, T), torch.bool, device)
    assert describe(found.gram) == ((K, T, T), torch.float64, device)
    assert gvk.vaccinate(grads, groups, None, target=0.0, out=out).gradient is out
    assert describe(gvk.task_order(4, T, seed=0, step=0, device=device)) == ((4, T, T - 1), torch.int64, device)
    with pytest.raises(ValueError, match="ema: expected shape"):
        gvk.vaccinate(grads, groups, ema)


@pytest.mark.parametrize("dtype", DTYPES)
def test_meta_tensors(dtype):
    check_shapes(GROUPS, "meta", dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fake_tensors(device, dtype):
    with FakeTensorMode():
        check_shapes(gvk.ParameterGroups.from_sizes({"a": 5, "b": 7}), device, dtype)


# ----------------------------------------------------------------------------------------------------------- errors

BAD_GRADS = {
    "a list": (lambda g: g.tolist(), TypeError, "grads: expected a tensor, got list"),
    "integers": (lambda g: g.long(), TypeError, "grads: expected dtype float32 or .*, got int64"),
    "complex": (lambda g: g.to(torch.complex64), TypeError, "grads: expected dtype .*, got complex64"),
    "one dimension": (lambda g: g[0], ValueError, r"grads: expected shape \[\?, 12\], got \[12\]"),
    "three dimensions": (lambda g: g[None], ValueError, r"grads: expected shape .*, got \[1, 3, 12\]"),
    "a column too few": (lambda g: g[:, 1:], ValueError, r"grads: expected shape .*, got \[3, 11\]"),
    "a column too many": (lambda g: g.repeat(1, 2)[:, :13], ValueError, r"grads: expected shape .*, got \[3, 13\]"),
    "no rows": (lambda g: g[:0], ValueError, r"grads: expected at least one row, got shape \[0, 12\]"),
    "every other column": (lambda g: g.repeat(1, 2)[:, ::2], ValueError, "grads: expected contiguous rows .* stride 2"),
    "transposed": (lambda g: g.T.contiguous().T, ValueError, "grads: expected contiguous rows .* stride 3"),
    "sparse": (lambda g: g.to_sparse(), TypeError, "grads: expected a dense tensor, got layout torch.sparse_coo"),
}


def call_gram(grads, groups):
    return gvk.gram(grads, groups)


def call_cross_gram(grads, groups):
    return gvk.cross_gram(grads, grads[1:], groups)


def call_combine(grads, groups):
    rows = len(grads) if isinstance(grads, torch.Tensor) else T
    return gvk.combine(grads, torch.ones(K, rows), groups)


def call_vaccinate(grads, groups):
    return gvk.vaccinate(grads, groups, targets())


def call_oracle(grads, groups):
    return gvk.reference.vaccinate(grads, groups, targets())


EVERY_VERB = pytest.mark.parametrize("call", [call_gram, call_combine, call_vaccinate, call_oracle])


@EVERY_VERB
@pytest.mark.parametrize("case", BAD_GRADS)
def test_bad_grads(call, case):
    change, error, message = BAD_GRADS[case]
    with pytest.raises(error, match=message) as caught:
        call(change(random(T, P)), GROUPS)
    assert caught.type is error


@EVERY_VERB
@pytest.mark.parametrize("groups", [{"a": 12}, None, (0, 5, 12)])
def test_bad_groups(call, groups):
    with pytest.raises(TypeError, match=f"groups: expected ParameterGroups, got {type(groups).__name__}"):
        call(random(T, P), groups)


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("case", [case for case in BAD_GRADS if case != "no rows"])
def test_bad_rows_of_cross_gram(name, case):
    change, error, message = BAD_GRADS[case]
    good = {"a": random(T, P), "b": random(T + 1, P), "groups": GROUPS}
    message = message.replace("grads:", f"{name}:").replace("stride 3", f"stride {len(good[name])}")
    message = message.replace("[3, 1", f"[{len(good[name])}, 1").replace(r"\[1, 3, 12", rf"\[1, {len(good[name])}, 12")
    refused(gvk.cross_gram, good, {name: change(good[name])}, error, message)


BAD_PAIRS = {
    "another dtype": ({"b": random(T, P).double()}, TypeError, r"b: expected dtype float32 \(that of a\), got float64"),
    "another device": ({"b": random(T, P).to("meta")}, ValueError, r"b: expected device cpu \(that of a\), got meta"),
    "no groups": ({"groups": (0, 12)}, TypeError, "groups: expected ParameterGroups, got tuple"),
}


@pytest.mark.parametrize("case", BAD_PAIRS)
def test_bad_pairs(case):
    refused(gvk.cross_gram, {"a": random(T, P), "b": random(T, P), "groups": GROUPS}, *BAD_PAIRS[case])


BAD_OUT = {
    "out a list": (lambda a: [0.0] * P, TypeError, "out: expected a tensor, got list"),
    "out of integers": (lambda a: torch.zeros(P, dtype=torch.int64), TypeError, "out: expected dtype .*, got int64"),
    "out too long": (lambda a: torch.zeros(P + 1), ValueError, r"out: expected shape \[12\], got \[13\]"),
    "out too short": (lambda a: torch.zeros(P - 1), ValueError, r"out: expected shape \[12\], got \[11\]"),
    "out a row": (lambda a: torch.zeros(1, P), ValueError, r"out: expected shape \[12\], got \[1, 12\]"),
    "out strided": (lambda a: torch.zeros(2 * P)[::2], ValueError, "out: expected a contiguous tensor, got stride 2"),
    "out expanded": (lambda a: torch.zeros(1).expand(P), ValueError, "out: expected a contiguous tensor, got stride 0"),
    "out sparse": (lambda a: torch.zeros(P).to_sparse(), TypeError, "out: expected a dense tensor"),
    "out a row of grads": (lambda a: a["grads"][1], ValueError, "out: expected memory of its own, .* overlaps grads"),
    "out across rows": (lambda a: a["grads"].view(-1)[7 : 7 + P], ValueError, "out: .* overlaps grads"),
    "out elsewhere": (lambda a: torch.zeros(P, device="meta"), ValueError, "out: expected device cpu .*, got meta"),
}
ORDER = gvk.task_order(K, T, seed=0, step=0)
# changes to good arguments: a value, or a function of them
BAD_VACCINATE = {
    **{name: ({"out": make}, error, message) for name, (make, error, message) in BAD_OUT.items()},
    "neither ema nor target": ({"ema": None}, ValueError, "ema: expected exactly one of ema and target, got neither"),
    "ema and target": ({"target": 0.5}, ValueError, "ema: expected exactly one of ema and target, got both"),
    "ema a list": ({"ema": [[0.0]]}, TypeError, "ema: expected a tensor, got list"),
    "ema float32": ({"ema": targets().float()}, TypeError, "ema: expected dtype float64, got float32"),
    "ema of other groups": ({"ema": targets()[:1]}, ValueError, r"ema: expected shape \[2, .*, got \[1, 3, 3\]"),
    "ema of one group": ({"ema": targets()[0]}, ValueError, r"ema: expected shape .*, got \[3, 3\]"),
    "ema not square": ({"ema": targets(4)[:, :3].clone()}, ValueError, r"ema: expected shape .*, got \[2, 3, 4\]"),
    "ema not square, by id": (
        {"ema": targets(4)[:, :3].clone(), "task_ids": [0, 1, 2]},
        ValueError,
        r"ema: expected shape \[2, N, N\] .*, got \[2, 3, 4\]",
    ),
    "ema of more tasks": ({"ema": targets(4)}, ValueError, r"ema: expected shape \[2, 3, 3\], .* \(task_ids says"),
    "ema of fewer tasks": ({"ema": targets(2)}, ValueError, r"ema: expected shape .*, got \[2, 2, 2\]"),
    "ema of fewer tasks than ids": (
        {"ema": targets(2), "task_ids": [0, 1, 2]},
        ValueError,
        r"ema: expected shape \[2, N, N\] with N of at least 3, got \[2, 2, 2\]",
    ),
    "ema transposed": ({"ema": targets().transpose(1, 2)}, ValueError, "ema: expected a contiguous tensor"),
    "ema expanded": ({"ema": targets()[:1].expand(2, -1, -1)}, ValueError, "ema: expected a contiguous tensor"),
    "ema sparse": ({"ema": targets().to_sparse()}, TypeError, "ema: expected a dense tensor"),
    "ema elsewhere": ({"ema": targets().to("meta")}, ValueError, "ema: expected device cpu .*, got meta"),
    "task_ids repeated": (
        {"task_ids": [0, 1, 1]},
        ValueError,
        r"task_ids: expected every task at most once, got \[0, 1",
    ),
    "task_ids past N": ({"task_ids": [0, 1, 3]}, ValueError, r"task_ids: expected ids in 0\.\.2, got \[0, 1, 3\]"),
    "task_ids past N in ema": ({"ema": targets(4), "task_ids": [0, 1, 4]}, ValueError, r"task_ids: .* 0\.\.3"),
    "task_ids negative": ({"task_ids": [0, 1, -1]}, ValueError, r"task_ids: expected ids in 0\.\.2"),
    "task_ids negative, constant target": (
        {"ema": None, "target": 0.0, "task_ids": [0, 1, -1]},
        ValueError,
        r"task_ids: expected ids in 0\.\.",
    ),
    "task_ids repeated, constant target": (
        {"ema": None, "target": 0.0, "task_ids": [2, 1, 2]},
        ValueError,
        "task_ids: expected every task at most once",
    ),
    "task_ids huge": ({"task_ids": [0, 1, 2**63]}, ValueError, "task_ids: expected"),
    "task_ids too few": ({"task_ids": [0, 1]}, ValueError, r"task_ids: expected shape \[3\], got \[2\]"),
    "task_ids too many": ({"task_ids": [0, 1, 2, 3]}, ValueError, r"task_ids: expected shape \[3\], got \[4\]"),
    "task_ids floats": ({"task_ids": [0.0, 1.0, 2.0]}, TypeError, "task_ids: expected ints"),
    "task_ids bools": ({"task_ids": [True, False, True]}, TypeError, "task_ids: expected ints"),
    "task_ids a number": ({"task_ids": 1}, TypeError, "task_ids: expected a tensor or a sequence of ints, got 1"),
    "task_ids float tensor": (
        {"task_ids": torch.arange(3.0)},
        TypeError,
        "task_ids: expected dtype int64, got float32",
    ),
    "task_ids int32": ({"task_ids": torch.arange(3).int()}, TypeError, "task_ids: expected dtype int64, got int32"),
    "task_ids a matrix": (
        {"task_ids": torch.arange(3)[None]},
        ValueError,
        r"task_ids: expected shape \[3\], got \[1, 3",
    ),
    "task_ids elsewhere": ({"task_ids": torch.arange(3, device="meta")}, ValueError, "task_ids: expected device cpu"),
    "vaccinated past N": ({"vaccinated": (3,)}, ValueError, r"vaccinated: expected ids in 0\.\.2, got \[3\]"),
    "vaccinated past T": (
        {"ema": None, "target": 0.0, "vaccinated": (0, 3)},
        ValueError,
        r"vaccinated: expected ids in 0\.\.2, got \[0, 3\]",
    ),
    "vaccinated negative": ({"vaccinated": (-1,)}, ValueError, r"vaccinated: expected ids in 0\.\.2, got \[-1\]"),
    "vaccinated huge": ({"vaccinated": [-(2**63) - 1]}, ValueError, "vaccinated: expected"),
    "vaccinated floats": ({"vaccinated": (0.5,)}, TypeError, "vaccinated: expected ints"),
    "vaccinated names": ({"vaccinated": "de"}, TypeError, "vaccinated: expected ints, got 'de'"),
    "vaccinated a number": ({"vaccinated": 1}, TypeError, "vaccinated: expected a tensor or a sequence of ints, got 1"),
    "vaccinated bool tensor": (
        {"vaccinated": torch.ones(3, dtype=torch.bool)},
        TypeError,
        "vaccinated: expected dtype",
    ),
    "vaccinated a matrix": ({"vaccinated": torch.zeros(1, 1).long()}, ValueError, r"vaccinated: expected shape \[\?\]"),
    "order a list": ({"order": ORDER.tolist()}, TypeError, "order: expected a tensor, got list"),
    "order int32": ({"order": ORDER.int()}, TypeError, "order: expected dtype int64, got int32"),
    "order of other groups": ({"order": ORDER[:1]}, ValueError, r"order: expected shape \[2, 3, 2\], got \[1, 3, 2\]"),
    "order with one's own": ({"order": torch.arange(3).expand(K, T, T)}, ValueError, r"order: .*, got \[2, 3, 3\]"),
    "order repeated": ({"order": ORDER[..., :1].repeat(1, 1, 2)}, ValueError, "order: expected, .* a permutation"),
    "order of the wrong rows": ({"order": ORDER.flip(1)}, ValueError, "order: expected, .* a permutation"),
    "order past T": ({"order": torch.where(ORDER == 2, 3, ORDER)}, ValueError, "order: expected, .* a permutation"),
    "order negative": ({"order": torch.where(ORDER == 2, -1, ORDER)}, ValueError, "order: expected, .* a permutation"),
    "order elsewhere": ({"order": ORDER.to("meta")}, ValueError, "order: expected device cpu"),
    **{
        f"beta {value}": ({"beta": value}, ValueError, r"beta: expected a number in \[0, 1\]")
        for value in (-0.1, 1.1, float("nan"), float("inf"), 2)
    },
    **{
        f"beta {value!r}": ({"beta": value}, TypeError, "beta: expected a float")
        for value in ("0.1", None, True, 1j, torch.tensor(0.1))
    },
    **{
        f"target {value}": ({"ema": None, "target": value}, ValueError, r"target: expected a cosine in \[-1, 1\]")
        for value in (-1.01, 1.5, float("nan"), float("-inf"), 2)
    },
    **{
        f"target {value!r}": ({"ema": None, "target": value}, TypeError, "target: expected a float")
        for value in ("0", False, torch.tensor(0.1))
    },
    **{
        f"{name} {value!r}": ({name: value}, TypeError, f"{name}: expected an int, got")
        for name in ("seed", "step")
        for value in (0.0, "1", None, True)
    },
    "seed on a device": ({"seed": torch.tensor(1)}, TypeError, "seed: expected an int, got"),
    "step float": ({"step": torch.tensor(1.0)}, TypeError, "step: expected dtype int64, got float32"),
    "two steps": ({"step": torch.tensor([1, 2])}, ValueError, r"step: expected one element, got shape \[2\]"),
    "step elsewhere": ({"step": torch.tensor(1, device="meta")}, ValueError, "step: expected device cpu"),
    **{
        f"{name} {value}": ({name: value}, ValueError, f"{name}: expected an int of 64 bits")
        for name in ("seed", "step")
        for value in (2**63, -(2**63) - 1)
    },
}


def refused(function, good, changes, error, message):
    """The call raises exactly this, and changes neither its good arguments nor the bad one."""
    arguments = dict(good)
    for name, change in changes.items():
        arguments[name] = change(arguments) if callable(change) else change
    tensors = [
        a
        for a in (*good.values(), *arguments.values())
        if isinstance(a, torch.Tensor) and a.layout == torch.strided and a.device.type == "cpu"
    ]
    before = [tensor.clone() for tensor in tensors]
    with pytest.raises(error, match=message) as caught:
        function(**arguments)
    assert caught.type is error
    assert all(same(tensor, copy) for tensor, copy in zip(tensors, before))


def good_vaccinate():
    return {"grads": random(T, P), "groups": GROUPS, "ema": targets(), "out": torch.full((P,), 123.0)}


@pytest.mark.parametrize("function", [gvk.vaccinate, gvk.reference.vaccinate], ids=["vaccinate", "oracle"])
@pytest.mark.parametrize("case", BAD_VACCINATE)
def test_bad_vaccinate(function, case):
    refused(function, good_vaccinate(), *BAD_VACCINATE[case])


BAD_COMBINE = {
    **{name: ({"out": make}, error, message) for name, (make, error, message) in BAD_OUT.items()},
    "weights a list": ({"weights": [[1.0] * T] * K}, TypeError, "weights: expected a tensor, got list"),
    "weights of integers": (
        {"weights": torch.ones(K, T).long()},
        TypeError,
        "weights: .* float64 or float32, got int64",
    ),
    "weights float16": ({"weights": torch.ones(K, T).half()}, TypeError, "weights: expected dtype .*, got float16"),
    "weights transposed": (
        {"weights": torch.ones(T, K)},
        ValueError,
        r"weights: expected shape \[2, 3\], got \[3, 2\]",
    ),
    "weights of one group": ({"weights": torch.ones(T)}, ValueError, r"weights: expected shape \[2, 3\], got \[3\]"),
    "weights of more rows": (
        {"weights": torch.ones(K, T + 1)},
        ValueError,
        r"weights: expected shape .*, got \[2, 4\]",
    ),
    "weights sparse": ({"weights": torch.ones(K, T).to_sparse()}, TypeError, "weights: expected a dense tensor"),
    "weights elsewhere": ({"weights": torch.ones(K, T, device="meta")}, ValueError, "weights: expected device cpu"),
}


@pytest.mark.parametrize("case", BAD_COMBINE)
def test_bad_combine(case):
    good = {"grads": random(T, P), "groups": GROUPS, "weights": random(K, T), "out": torch.full((P,), 123.0)}
    refused(gvk.combine, good, *BAD_COMBINE[case])


VERBS = {
    "gram": (gvk.gram, {"grads": random(T, P)}),
    "cross_gram": (gvk.cross_gram, {"a": random(T, P), "b": random(T + 1, P)}),
    "combine": (gvk.combine, {"grads": random(T, P), "weights": random(K, T), "out": torch.full((P,), 123.0)}),
    "vaccinate": (gvk.vaccinate, {"grads": random(T, P), "ema": targets(), "out": torch.full((P,), 123.0)}),
}
EVERY_DISPATCHED_VERB = pytest.mark.parametrize("verb", VERBS)


def run(verb, backend=None):
    function, tensors = VERBS[verb]
    return function(groups=GROUPS, backend=backend, **{name: tensor.clone() for name, tensor in tensors.items()})


def refused_by(verb, changes, error, message):
    function, tensors = VERBS[verb]
    refused(function, {"groups": GROUPS, **tensors}, changes, error, message)


@EVERY_DISPATCHED_VERB
def test_bad_backend(verb):
    refused_by(verb, {"backend": "nonsense"}, ValueError, r"backend: expected one of \('reference'.*, got 'nonsense'")
    refused_by(verb, {"backend": 3}, TypeError, "backend")


@EVERY_DISPATCHED_VERB
def test_a_missing_backend_is_said_and_passed_over(verb, monkeypatch):
    want = run(verb, "reference")
    monkeypatch.setattr(cpu, "_missing", "the native module is not built")
    monkeypatch.setattr(triton, "_missing", "no Triton")
    monkeypatch.setattr(cuda, "_missing", "no nvcc")
    refused_by(
        verb, {"backend": "cpu"}, ValueError, "backend: 'cpu' cannot be used here: the native module is not built"
    )
    assert gvk.available_backends() == ("reference",)
    assert same(run(verb), want)


def test_the_oracle_has_no_backend():
    for name in gvk.available_backends():
        refused(gvk.reference.vaccinate, good_vaccinate(), {"backend": name}, ValueError, "backend: .* expected None")


# ------------------------------------------------------------------------------------------------ operators directly


def call_op(op, bounds, backend=None):
    grads, out, ema = random(T, P), torch.zeros(P), targets()
    if op == "gram":
        return OPS.gram(grads, bounds, backend)
    if op == "cross_gram":
        return OPS.cross_gram(grads, random(T + 1, P, seed=1), bounds, backend)
    if op == "combine":
        OPS.combine(grads, random(len(bounds), T, dtype=torch.float64), bounds, out, backend)
        return out
    found = OPS.vaccinate(grads, bounds, out, ema, 0.1, None, None, None, None, 0, 0, None, 0, backend)
    return (*found, out, ema)


EVERY_OP = pytest.mark.parametrize("op", ["gram", "cross_gram", "combine", "vaccinate"])


@EVERY_OP
@pytest.mark.parametrize(
    ("bounds", "error"),
    [
        ([[5, 3], [5, 12]], ValueError),
        ([[0, 6], [5, 12]], ValueError),
        ([[5, 12], [0, 5]], ValueError),
        ([[-1, 5], [5, 12]], ValueError),
        ([[0, 5], [5, 13]], ValueError),
        ([[0, 5], [2**62, 2**62 + 1]], ValueError),
        ([0, 5], ValueError),
        ([[0, 5, 12], [12, 12, 12]], ValueError),
        ([[0.0, 5.0], [5.0, 12.0]], TypeError),
    ],
    ids=["descending", "overlapping", "unordered", "negative", "past P", "far past P", "flat", "wide", "float"],
)
@pytest.mark.parametrize("backend", gvk.available_backends())
def test_bad_bounds(op, bounds, error, backend):
    with pytest.raises(error, match="bounds: expected"):
        call_op(op, torch.tensor(bounds), backend)


@EVERY_OP
def test_bad_bounds_of_another_type_or_device(op):
    with pytest.raises(TypeError, match="bounds: expected dtype int64, got int32"):
        call_op(op, GROUPS.bounds.int())
    with pytest.raises(ValueError, match="bounds: expected device cpu"):
        call_op(op, GROUPS.bounds.to("meta"))


@EVERY_OP
@pytest.mark.parametrize("backend", gvk.available_backends())
def test_strided_bounds_are_read_right_or_refused(op, backend):
    strided = torch.tensor([[0, 1, 5, 2], [5, 3, 12, 4]])[:, ::2]
    assert torch.equal(strided, GROUPS.bounds)
    try:
        found = call_op(op, strided, backend)
    except ValueError as error:
        assert "bounds" in str(error)  # noqa: PT017  either is right
    else:
        assert same(found, call_op(op, GROUPS.bounds, backend))


@pytest.mark.parametrize("backend", gvk.available_backends())
def test_strided_ids_order_and_weights(backend):
    ids, order = torch.tensor([4, 9, 0, 9, 2])[::2], ORDER.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    vaccinated = torch.tensor([0, 9, 4])[::2]
    emas = [targets(5), targets(5)]
    found = gvk.vaccinate(
        random(T, P), GROUPS, emas[0], task_ids=ids, vaccinated=vaccinated, order=order, backend=backend
    )
    want = gvk.vaccinate(
        random(T, P), GROUPS, emas[1], task_ids=[4, 0, 2], vaccinated=[0, 4], order=ORDER, backend=backend
    )
    assert same(found, want)
    assert same(*emas)
    weights = random(T, K, dtype=torch.float64)
    found = gvk.combine(random(T, P), weights.T, GROUPS, backend=backend)
    assert same(found, gvk.combine(random(T, P), weights.T.contiguous(), GROUPS, backend=backend))


# ------------------------------------------------------------------------------------------- autograd and the padding


@pytest.mark.parametrize("call", [call_gram, call_cross_gram, call_combine, call_vaccinate, call_oracle])
def test_grads_that_require_grad(call):
    """Nothing is recorded: the result of a backward is not differentiated again."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = call(random(T, P).requires_grad_(), GROUPS)
    want = call(random(T, P), GROUPS)
    for one, other in zip(found if isinstance(found, tuple) else [found], want if isinstance(want, tuple) else [want]):
        assert not one.requires_grad
        assert same(one, other)


def test_weights_that_require_grad():
    weights = random(K, T, dtype=torch.float64).requires_grad_()
    found = gvk.combine(random(T, P), weights, GROUPS)
    assert not found.requires_grad
    assert same(found, gvk.combine(random(T, P), weights.detach(), GROUPS))


def test_inference_mode():
    ema, want_ema = targets(), targets()
    want = gvk.vaccinate(random(T, P), GROUPS, want_ema)
    with torch.inference_mode():
        found = gvk.vaccinate(random(T, P), GROUPS, ema)
    assert same(found, want)
    assert same(ema, want_ema)


@pytest.mark.parametrize("oracle", [False, True], ids=["backend", "oracle"])
def test_padding_is_neither_read_nor_written(backend, oracle):
    groups = LAYOUTS["aligned"]
    grads = task_gradients(T, groups)  # NaN in the padding
    owned = torch.zeros(groups.numel, dtype=torch.bool)
    for begin, end in groups.bounds.tolist():
        owned[begin:end] = True
    assert bool(grads[:, ~owned].isnan().all())
    call = gvk.reference.vaccinate if oracle else functools.partial(gvk.vaccinate, backend=backend)
    ema = targets(groups=groups)
    fresh = call(grads, groups, ema)
    assert bool((fresh.gradient[~owned] == 0).all())
    assert bool(fresh.gradient.isfinite().all())
    assert bool(fresh.weights.isfinite().all())
    assert bool(ema.isfinite().all())
    assert not torch.equal(ema[0], targets()[0])
    out = torch.full((groups.numel,), 123.0)
    given = call(grads, groups, targets(groups=groups), out=out)
    assert given.gradient is out
    assert bool((out[~owned] == 123.0).all())
    assert torch.equal(inside(groups, out), inside(groups, fresh.gradient))


@pytest.mark.parametrize("name", gvk.available_backends())
def test_autograd_sees_the_writes(name):
    """A tensor saved for backward and then overwritten is an error, not a wrong gradient."""
    groups = gvk.ParameterGroups.from_sizes({"a": 4})
    out, factor = torch.ones(4), torch.ones(4, requires_grad=True)
    product = (factor * out).sum()
    gvk.combine(torch.ones(2, 4), torch.ones(1, 2, dtype=torch.float64), groups, out=out, backend=name)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize("which", ["out", "ema"])
@pytest.mark.parametrize("function", [gvk.vaccinate, gvk.reference.vaccinate])
def test_tensors_to_write_to_may_not_require_grad(function, which):
    groups = gvk.ParameterGroups.from_sizes({"a": 4})
    tensors = {"ema": torch.zeros(1, 2, 2, dtype=torch.float64), "out": torch.zeros(4)}
    tensors[which].requires_grad_()
    with pytest.raises(ValueError, match=f"{which}: expected a tensor to write to"):
        function(torch.ones(2, 4), groups, tensors["ema"], out=tensors["out"])
    assert bool((tensors["ema"] == 0).all())


def test_another_default_device():
    torch.set_default_device("meta")
    try:
        groups = gvk.ParameterGroups.from_sizes({"a": 4})
        grads = torch.arange(8.0, device="cpu").reshape(2, 4)
        ema = torch.zeros(1, 2, 2, dtype=torch.float64, device="cpu")
        found = gvk.vaccinate(grads, groups, ema)
        want = gvk.reference.vaccinate(grads, groups, torch.zeros_like(ema))
        combined = gvk.combine(grads, found.weights, groups)
        assert gvk.gram(grads, groups).device.type == "cpu"
    finally:
        torch.set_default_device(None)
    assert torch.allclose(found.gradient, want.gradient)
    assert torch.equal(combined, found.gradient)
