"""The operators ``torch.ops.gradvac.*``: schemas, fakes, argument checks and choice of backend.

The only door to the backends. Shapes and types are checked here and under tracing; what lies on the host is checked by
value when the operator runs; what lies on a device is never read back.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from . import backends, order
from .groups import ParameterGroups
from .numerics import DTYPES
from .result import Vaccination

_library = torch.library.Library("gradvac", "DEF")
_library.define("gram(Tensor grads, Tensor bounds, str? backend=None) -> Tensor")
_library.define("combine(Tensor grads, Tensor weights, Tensor bounds, Tensor(a!) out, str? backend=None) -> ()")
_library.define(
    "vaccinate(Tensor grads, Tensor bounds, Tensor(a!)? ema, Tensor(b!) out, float beta, float? target, "
    "Tensor? task_ids, Tensor? vaccinated, Tensor? order, SymInt seed, SymInt step, Tensor? counter, "
    "SymInt first_group, str? backend=None) "
    "-> (Tensor, Tensor, Tensor)"
)
_library.define(
    "task_order(SymInt num_groups, SymInt num_tasks, SymInt seed, SymInt step, SymInt first_group, "
    "Device device) -> Tensor"
)


# ----------------------------------------------------------------------------------------------------- public calls


def gram(grads: torch.Tensor, groups: ParameterGroups, *, backend: str | None = None) -> torch.Tensor:
    """Dot products of all pairs of task gradients, group by group.

    Args:
        grads: ``[T, P]`` float32, bfloat16, float16 or float64; rows contiguous, any distance apart.
        groups: K groups of the P columns.
        backend: one of :func:`available_backends`; None takes the fastest one for the tensor's device.

    Returns:
        ``[K, T, T]`` float64, ``G[k, i, j] = <g_ik, g_jk>``, with ``|G - exact| <= 1e-7 |g_i| |g_j|`` (1e-6 on rows
        made for it, such as equal entries, where products are summed in float32: above 4096 columns with more than 16
        tasks or on a GPU, and for bfloat16; 2e-7 on heavy tails, by a GPU's matrix units). Entries beyond about 1e18,
        or below 1e-17, have squares that leave float32's range or lose digits there (float64 gradients excepted).

    Raises:
        TypeError: ``grads`` or ``groups`` is of another type, or of a dtype that no backend takes.
        ValueError: a shape does not fit, or the backend is unknown, missing or not for this device.
    """
    check_face(grads, groups)
    _check_backend(backend)
    return torch.ops.gradvac.gram.default(grads.detach(), groups.bounds, backend)


def combine(
    grads: torch.Tensor,
    weights: torch.Tensor,
    groups: ParameterGroups,
    *,
    out: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Weighted sum of the task gradients, with weights by group: ``out[p] = sum_j weights[k(p), j] grads[j, p]``.

    Args:
        grads: ``[T, P]`` float32, bfloat16, float16 or float64; rows contiguous, any distance apart.
        weights: ``[K, T]`` float64 or float32. Sums are taken in float64.
        groups: K groups of the P columns.
        out: ``[P]``, contiguous, of any of these types; it may not overlap ``grads``. Columns outside every group are
            not written. None makes a new one of the type of ``grads``, zero outside the groups.
        backend: one of :func:`available_backends`; None takes the fastest one for the tensor's device.

    Returns:
        ``out``.

    Raises:
        TypeError: an argument is of a wrong type or dtype.
        ValueError: a shape or device does not fit, ``out`` overlaps ``grads``, or the backend cannot be used.
    """
    check_face(grads, groups)
    _check_backend(backend)
    check_tensor("weights", weights, (torch.float64, torch.float32), (len(groups), grads.shape[0]), grads.device)
    _check_is_tensor("out", out)
    out = _result(grads, groups) if out is None else out
    torch.ops.gradvac.combine.default(
        grads.detach(), weights.detach().to(torch.float64).contiguous(), groups.bounds, out, backend
    )
    return out


def vaccinate(
    grads: torch.Tensor,
    groups: ParameterGroups,
    ema: torch.Tensor | None,
    *,
    beta: float = 1e-2,
    target: float | None = None,
    task_ids: torch.Tensor | Sequence[int] | None = None,
    vaccinated: torch.Tensor | Sequence[int] | None = None,
    order: torch.Tensor | None = None,
    seed: int = 0,
    step: int | torch.Tensor = 0,
    out: torch.Tensor | None = None,
    backend: str | None = None,
) -> Vaccination:
    """One step of Gradient Vaccine: Algorithm 1 of Wang et al., ICLR 2021 (arXiv:2010.05874).

    A row that is zero in a group, or has a non-finite entry there, is neither measured nor turned nor turned towards
    in that group, and its entries of ``ema`` stay as they were; a non-finite value still reaches the output. Entries
    beyond about 1e18 count as non-finite and gradients below 1e-19 as zero (float64: norms beyond 1e75, below 1e-75).

    Args:
        grads: ``[T, P]`` float32, bfloat16, float16 or float64, one row a task; rows contiguous, any distance apart.
        groups: K groups of the P columns.
        ema: ``[K, N, N]`` float64, contiguous: the similarity targets of Eq. 3, updated in place. None with ``target``.
        beta: weight of a new similarity in the moving average, in [0, 1].
        target: a constant in [-1, 1] instead of the moving average (0 is PCGrad). Targets, moving or constant, are
            capped at ``numerics.MAX_TARGET`` = 1 - 2^-20 where they are used.
        task_ids: ``[T]``, which of the N tasks each row is, all different; None means rows 0..N-1.
        vaccinated: the tasks whose gradients may be turned (the set G of Algorithm 1), ids in 0..N-1; None means all.
        order: ``[K, T, T-1]`` int64, for each group and row the other rows in the order of the inner loop; None means
            ``task_order(K, T, seed=seed, step=step, first_group=groups.first)``.
        seed: chooses the sequence of random orders.
        step: counts the training steps: a new order each. An int, or an int64 tensor of one element on the device of
            ``grads``, which is read there: a captured CUDA graph draws a new order whenever it has changed.
        out: ``[P]``, as for :func:`combine`.
        backend: one of :func:`available_backends`; None takes the fastest one for the tensor's device.

    Returns:
        A :class:`Vaccination`.

    Raises:
        TypeError: an argument is of a wrong type or dtype.
        ValueError: a shape, range or device does not fit, ``task_ids`` repeats a task, ``order`` is no permutation of
            the other rows, or the backend cannot be used. Then nothing was changed.
    """
    call = prepare(grads, groups, ema, beta, target, task_ids, vaccinated, order, seed, step, out)
    _check_backend(backend)
    found = torch.ops.gradvac.vaccinate.default(*call, backend)
    return Vaccination(call.out, *found)


def task_order(
    num_groups: int,
    num_tasks: int,
    *,
    seed: int,
    step: int,
    first_group: int = 0,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """The random order of the inner loop, from a counter: equal arguments give equal orders, everywhere.

    Args:
        num_groups: K. ``first_group`` is the identity of the first one: ``task_order(2, T, first_group=3)`` equals
            ``task_order(5, T)[3:]``.
        num_tasks: T, the rows of the batch.
        seed: chooses the sequence.
        step: counts the training steps.
        device: where to put the result.

    Returns:
        ``[K, T, T-1]`` int64: for each group and row, a permutation of the other rows.

    Raises:
        TypeError: an argument is not an int.
        ValueError: ``num_groups`` or ``first_group`` is negative, or ``num_tasks`` is below 1.
    """
    for name, value, least in (
        ("num_groups", num_groups, 0),
        ("num_tasks", num_tasks, 1),
        ("first_group", first_group, 0),
        ("seed", seed, None),
        ("step", step, None),
    ):
        check_int(name, value, least)
    return torch.ops.gradvac.task_order.default(
        num_groups, num_tasks, seed, step, first_group, torch.device("cpu" if device is None else device)
    )


# ---------------------------------------------------------------------------------------------------------- checks


class Call(NamedTuple):
    """The arguments of ``torch.ops.gradvac.vaccinate`` but the backend, in its order."""

    grads: torch.Tensor
    bounds: torch.Tensor
    ema: torch.Tensor | None
    out: torch.Tensor
    beta: float
    target: float | None
    task_ids: torch.Tensor | None
    vaccinated: torch.Tensor | None
    order: torch.Tensor | None
    seed: int
    step: int
    counter: torch.Tensor | None
    first_group: int

    def check(self) -> None:
        """Everything, by value where it lies on the host."""
        _check_vaccinate(*self)
        _check_vaccinate_values(*self)


def prepare(
    grads: torch.Tensor,
    groups: ParameterGroups,
    ema: torch.Tensor | None,
    beta: float,
    target: float | None,
    task_ids: torch.Tensor | Sequence[int] | None,
    vaccinated: torch.Tensor | Sequence[int] | None,
    order: torch.Tensor | None,
    seed: int,
    step: int | torch.Tensor,
    out: torch.Tensor | None,
) -> Call:
    """What a user passes to :func:`vaccinate`, as the operator takes it."""
    check_face(grads, groups)
    check_settings(beta, target, seed)
    counter = step if isinstance(step, torch.Tensor) else None
    step = 0 if isinstance(step, torch.Tensor) else step
    check_int("step", step)
    for name, tensor in (("ema", ema), ("order", order), ("out", out)):
        _check_is_tensor(name, tensor)
    return Call(
        grads.detach(),
        groups.bounds,
        ema,
        _result(grads, groups) if out is None else out,
        float(beta),
        None if target is None else float(target),
        _ids("task_ids", task_ids, grads.device),
        _ids("vaccinated", vaccinated, grads.device),
        order,
        seed,
        step,
        counter,
        groups.first,
    )


def check_settings(beta: float, target: float | None, seed: int) -> None:
    """The numbers that stay the same from step to step."""
    for name, value in (("beta", beta), ("target", 0.0 if target is None else target)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}: expected a float, got {value!r}")
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta: expected a number in [0, 1], got {beta}")
    if target is not None and not -1.0 <= target <= 1.0:
        raise ValueError(f"target: expected a cosine in [-1, 1], got {target}")
    check_int("seed", seed)


def check_int(name: str, value: Any, least: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an int, got {value!r}")
    if least is not None and value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}: expected an int of 64 bits, got {value}")


def check_tensor(
    name: str,
    tensor: Any,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int | None, ...],
    device: torch.device | None = None,
) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: expected dtype {wanted}, got {str(tensor.dtype).removeprefix('torch.')}")
    if tensor.dim() != len(shape) or any(want is not None and size != want for size, want in zip(tensor.shape, shape)):
        wanted = ", ".join("?" if want is None else str(want) for want in shape)
        raise ValueError(f"{name}: expected shape [{wanted}], got {list(tensor.shape)}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {tensor.layout}")
    if name in ("ema", "out") and tensor.requires_grad:
        raise ValueError(f"{name}: expected a tensor to write to, got one that requires grad")
    if device is not None and tensor.device != device:
        raise ValueError(
            f"{name}: expected device {device}{'' if name == 'bounds' else ' (that of grads)'}, got {tensor.device}"
        )


def _check_is_tensor(name: str, tensor: Any) -> None:
    if tensor is not None and not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")


def _check_backend(backend: Any) -> None:
    if backend is not None and not isinstance(backend, str):
        raise TypeError(f"backend: expected a name or None, got {backend!r}")


def check_face(grads: Any, groups: Any) -> None:
    if not isinstance(groups, ParameterGroups):
        raise TypeError(f"groups: expected ParameterGroups, got {type(groups).__name__}")
    check_tensor("grads", grads, DTYPES, (None, groups.numel))


def _check_grads(grads: torch.Tensor, bounds: torch.Tensor) -> None:
    check_tensor("grads", grads, DTYPES, (None, None))
    if grads.shape[0] < 1:
        raise ValueError(f"grads: expected at least one row, got shape {list(grads.shape)}")
    if grads.shape[1] > 1 and grads.stride(1) != 1:
        raise ValueError(f"grads: expected contiguous rows (stride 1 along P), got stride {grads.stride(1)}")
    check_tensor("bounds", bounds, (torch.int64,), (None, 2), torch.device("cpu"))
    if not bounds.is_contiguous():
        raise ValueError("bounds: expected a contiguous tensor")


def _check_out(grads: torch.Tensor, out: torch.Tensor) -> None:
    check_tensor("out", out, DTYPES, (grads.shape[1],), grads.device)
    if out.shape[0] > 1 and out.stride(0) != 1:
        raise ValueError(f"out: expected a contiguous tensor, got stride {out.stride(0)}")


def _check_combine(grads: torch.Tensor, weights: torch.Tensor, bounds: torch.Tensor, out: torch.Tensor) -> None:
    _check_grads(grads, bounds)
    check_tensor("weights", weights, (torch.float64,), (bounds.shape[0], grads.shape[0]), grads.device)
    if not weights.is_contiguous():
        raise ValueError("weights: expected a contiguous tensor")
    _check_out(grads, out)


def _check_vaccinate(
    grads: torch.Tensor,
    bounds: torch.Tensor,
    ema: torch.Tensor | None,
    out: torch.Tensor,
    beta: float,
    target: float | None,
    task_ids: torch.Tensor | None,
    vaccinated: torch.Tensor | None,
    order: torch.Tensor | None,
    seed: int,
    step: int,
    counter: torch.Tensor | None,
    first_group: int,
) -> None:
    _check_grads(grads, bounds)
    _check_out(grads, out)
    K, T = bounds.shape[0], grads.shape[0]
    check_settings(beta, target, seed)
    if (ema is None) == (target is None):
        raise ValueError(f"ema: expected exactly one of ema and target, got {'neither' if ema is None else 'both'}")
    if ema is not None:
        check_tensor("ema", ema, (torch.float64,), (K, None, None), grads.device)
        N = ema.shape[1]
        if ema.shape[2] != N or N < T or (task_ids is None and N != T):
            wanted = f"[{K}, {T}, {T}]" if task_ids is None else f"[{K}, N, N] with N of at least {T}"
            raise ValueError(
                f"ema: expected shape {wanted}, got {list(ema.shape)}"
                + (" (task_ids says which of the N tasks each row is)" if task_ids is None else "")
            )
        if not ema.is_contiguous():
            raise ValueError("ema: expected a contiguous tensor")
    if task_ids is not None:
        check_tensor("task_ids", task_ids, (torch.int64,), (T,), grads.device)
    if vaccinated is not None:
        check_tensor("vaccinated", vaccinated, (torch.int64,), (None,), grads.device)
    if order is not None:
        check_tensor("order", order, (torch.int64,), (K, T, T - 1), grads.device)
    if counter is not None:
        if isinstance(counter, torch.Tensor) and counter.numel() != 1:
            raise ValueError(f"step: expected one element, got shape {list(counter.shape)}")
        check_tensor("step", counter, (torch.int64,), (None,) * counter.dim(), grads.device)


def _check_layout(grads: torch.Tensor, bounds: torch.Tensor) -> None:
    """The values of ``bounds``: ascending, apart, inside the buffer."""
    edges = bounds.flatten().tolist()
    if edges != sorted(edges) or (edges and (edges[0] < 0 or edges[-1] > grads.shape[1])):
        raise ValueError(f"bounds: expected ascending ranges of the {grads.shape[1]} columns, got {bounds.tolist()}")


def _check_apart(**tensors: torch.Tensor | None) -> None:
    """No two of these tensors, of which at most one is only read, lie in the same memory."""

    def span(t: torch.Tensor) -> tuple[int, int]:
        extent = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride())) + 1
        return t.data_ptr(), t.data_ptr() + extent * t.element_size()

    spans = [(name, *span(tensor)) for name, tensor in tensors.items() if tensor is not None and tensor.numel()]
    for (name, begin, end), (other, first, last) in itertools.combinations(spans, 2):
        if begin < last and first < end:
            raise ValueError(f"{name}: expected memory of its own, got a tensor that overlaps {other}")


def _check_vaccinate_values(
    grads: torch.Tensor,
    bounds: torch.Tensor,
    ema: torch.Tensor | None,
    out: torch.Tensor,
    beta: float,
    target: float | None,
    task_ids: torch.Tensor | None,
    vaccinated: torch.Tensor | None,
    order: torch.Tensor | None,
    *_: Any,
) -> None:
    _check_layout(grads, bounds)
    _check_apart(out=out, ema=ema, grads=grads)
    T = grads.shape[0]
    N = ema.shape[1] if ema is not None else T if task_ids is None else None
    for name, ids in (("task_ids", task_ids), ("vaccinated", vaccinated)):
        if ids is not None and ids.device.type == "cpu":
            found = ids.tolist()
            check_range(name, found, N)
            if name == "task_ids" and len(set(found)) != len(found):
                raise ValueError(f"task_ids: expected every task at most once, got {found}")
    if order is not None and order.device.type == "cpu":
        rows = torch.arange(T)
        others = rows[: T - 1] + (rows[: T - 1] >= rows[:, None])  # [T, T-1]
        if not torch.equal(order.sort(2).values, others.expand_as(order)):
            raise ValueError("order: expected, for each group and row, a permutation of the other rows")


def check_range(name: str, ids: Sequence[int], num_tasks: int | None) -> None:
    if any(i < 0 or (num_tasks is not None and i >= num_tasks) for i in ids):
        raise ValueError(f"{name}: expected ids in 0..{'' if num_tasks is None else num_tasks - 1}, got {list(ids)}")


def check_ids(name: str, ids: Sequence[int]) -> tuple[int, ...]:
    """Ids as a tuple of ints."""
    try:
        listed = tuple(ids)
    except TypeError:
        raise TypeError(f"{name}: expected a tensor or a sequence of ints, got {ids!r}") from None
    if any(isinstance(i, bool) or not isinstance(i, int) for i in listed):
        raise TypeError(f"{name}: expected ints, got {ids!r}")
    if any(not -(2**63) <= i < 2**63 for i in listed):
        raise ValueError(f"{name}: expected ints of 64 bits, got {ids!r}")
    return listed


def _ids(name: str, ids: torch.Tensor | Sequence[int] | None, device: torch.device) -> torch.Tensor | None:
    if ids is None or isinstance(ids, torch.Tensor):
        return ids
    listed = check_ids(name, ids)
    waiting = device.type in ("cuda", "xpu")  # a plain copy to them waits
    if not waiting or torch.compiler.is_compiling() or type(torch.empty(0)) is not torch.Tensor:
        return torch.tensor(listed, dtype=torch.int64, device=device)  # a fake one may not outlive its mode
    if name == "vaccinated" or listed == tuple(range(len(listed))):
        return _ids_on_device(listed, device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise ValueError(f"{name}: expected a tensor while a CUDA graph is captured, got {ids!r}")
    return torch.tensor(listed, dtype=torch.int64, pin_memory=True).to(device, non_blocking=True)


@functools.cache  # for good: a captured CUDA graph may read them at any time, and a copy would wait for the device
def _ids_on_device(ids: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(ids, dtype=torch.int64, device=device)


def _result(grads: torch.Tensor, groups: ParameterGroups) -> torch.Tensor:
    make = grads.new_empty if sum(groups.sizes) == groups.numel else grads.new_zeros  # padding is not written
    return make(groups.numel)


# -------------------------------------------------------------------------------------------------- implementations


def _gram(grads: torch.Tensor, bounds: torch.Tensor, backend: str | None = None) -> torch.Tensor:
    _check_grads(grads, bounds)
    _check_layout(grads, bounds)
    return backends.choose(grads.device, backend).gram(grads, bounds)


def _gram_fake(grads: torch.Tensor, bounds: torch.Tensor, backend: str | None = None) -> torch.Tensor:
    _check_grads(grads, bounds)
    T = grads.shape[0]
    return grads.new_empty(bounds.shape[0], T, T, dtype=torch.float64)


def _combine(
    grads: torch.Tensor, weights: torch.Tensor, bounds: torch.Tensor, out: torch.Tensor, backend: str | None = None
) -> None:
    _check_combine(grads, weights, bounds, out)
    _check_layout(grads, bounds)
    _check_apart(out=out, weights=weights)
    _check_apart(out=out, grads=grads)
    backends.choose(grads.device, backend).combine(grads, weights, bounds, out)
    _note_write(out)


def _combine_fake(
    grads: torch.Tensor, weights: torch.Tensor, bounds: torch.Tensor, out: torch.Tensor, backend: str | None = None
) -> None:
    _check_combine(grads, weights, bounds, out)


def _vaccinate(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    call = Call(*arguments[: len(Call._fields)])
    call.check()
    chosen = backends.choose(call.grads.device, *arguments[len(Call._fields) :])
    found = chosen.vaccinate(
        call.grads,
        call.bounds,
        call.ema,
        beta=call.beta,
        target=call.target,
        task_ids=call.task_ids,
        vaccinated=call.vaccinated,
        order=call.order,
        seed=call.seed,
        step=call.step if call.counter is None else call.counter,
        first_group=call.first_group,
        out=call.out,
    )
    _note_write(call.out, call.ema)
    return found


def _note_write(*tensors: torch.Tensor | None) -> None:
    """Native kernels write past autograd: without this it would not see that a saved tensor has changed."""
    for tensor in tensors:
        if tensor is not None and not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)


def _vaccinate_fake(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    call = Call(*arguments[: len(Call._fields)])
    _check_vaccinate(*call)
    K, T = call.bounds.shape[0], call.grads.shape[0]
    return (
        call.grads.new_empty(K, T, dtype=torch.float64),
        call.grads.new_empty(K, T, T, dtype=torch.float64),
        call.grads.new_empty(K, T, T, dtype=torch.bool),
    )


def _task_order_fake(
    num_groups: int, num_tasks: int, seed: int, step: int, first_group: int, device: torch.device
) -> torch.Tensor:
    return torch.empty(num_groups, num_tasks, num_tasks - 1, dtype=torch.int64, device=device)


for _name, _implementation, _fake in (
    ("gram", _gram, _gram_fake),
    ("combine", _combine, _combine_fake),
    ("vaccinate", _vaccinate, _vaccinate_fake),
    ("task_order", order.task_order, _task_order_fake),
):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")  # nothing here is differentiated
    torch.library.register_fake(f"gradvac::{_name}", _fake, lib=_library)
