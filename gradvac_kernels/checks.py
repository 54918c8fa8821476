"""What arguments must be: shapes and types, known under tracing too, and values, where they lie on the host."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .groups import ParameterGroups
from .numerics import DTYPES


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


def as_float(name: str, value: Any) -> float:
    """A number, infinite where it is an int that no float can hold."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a float, got {value!r}")
    try:
        return float(value)
    except OverflowError:
        return math.copysign(math.inf, value > 0 or -1)


def check_real(name: str, value: Any, least: float | None = None, above: float | None = None) -> float:
    """A finite number, as a float."""
    number = as_float(name, value)
    bound = "" if least is None else f" of at least {least:g}"
    bound += "" if above is None else f" above {above:g}"
    fits = (least is None or number >= least) and (above is None or number > above)
    if not math.isfinite(number) or not fits:
        raise ValueError(f"{name}: expected a finite number{bound}, got {number}")
    return number


def check_tensor(
    name: str,
    tensor: Any,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int | None, ...],
    device: torch.device | None = None,
    of: str = "grads",
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
            f"{name}: expected device {device}{'' if name == 'bounds' else f' (that of {of})'}, got {tensor.device}"
        )


def check_is_tensor(name: str, tensor: Any) -> None:
    if tensor is not None and not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")


def check_scalar(name: str, value: Any) -> None:
    """A loss to differentiate."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.numel() != 1 or not value.requires_grad or value.is_complex():
        raise ValueError(
            f"{name}: expected a real scalar that requires grad, got shape {list(value.shape)}, "
            f"{value.dtype}, requires_grad={value.requires_grad}"
        )


def check_keys(state: Any, expected: Mapping[str, Any]) -> None:
    """A saved state holds what it should."""
    if not isinstance(state, dict) or state.keys() != expected.keys():
        got = sorted(map(str, state)) if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"state: expected a dict with exactly the keys {sorted(expected)}, got {got}")


def check_backend(backend: Any) -> None:
    if backend is not None and not isinstance(backend, str):
        raise TypeError(f"backend: expected a name or None, got {backend!r}")


def check_groups(groups: Any) -> None:
    if not isinstance(groups, ParameterGroups):
        raise TypeError(f"groups: expected ParameterGroups, got {type(groups).__name__}")


def check_dtype(dtype: Any) -> None:
    if dtype not in DTYPES:
        raise TypeError(f"dtype: expected one of {', '.join(map(str, DTYPES))}, got {dtype!r}")


def check_gram(G: torch.Tensor, dtype: torch.dtype) -> None:
    check_tensor("G", G, (torch.float64,), (None, None, None))
    if G.shape[1] < 1 or G.shape[1] != G.shape[2]:
        raise ValueError(f"G: expected shape [K, T, T] with T of at least 1, got {list(G.shape)}")
    if not G.is_contiguous():
        raise ValueError("G: expected a contiguous tensor")
    check_dtype(dtype)


def check_face(grads: Any, groups: Any, name: str = "grads") -> None:
    check_groups(groups)
    check_tensor(name, grads, DTYPES, (None, groups.numel))


def check_grads(grads: torch.Tensor, bounds: torch.Tensor) -> None:
    check_rows("grads", grads)
    if grads.shape[0] < 1:
        raise ValueError(f"grads: expected at least one row, got shape {list(grads.shape)}")
    check_bounds(bounds)


def check_rows(name: str, rows: torch.Tensor) -> None:
    check_tensor(name, rows, DTYPES, (None, None))
    if rows.shape[1] > 1 and rows.stride(1) != 1:
        raise ValueError(f"{name}: expected contiguous rows (stride 1 along P), got stride {rows.stride(1)}")


def check_cross(a: torch.Tensor, b: torch.Tensor, bounds: torch.Tensor) -> None:
    check_rows("a", a)
    check_rows("b", b)
    if b.dtype != a.dtype:
        wanted, got = (str(x.dtype).removeprefix("torch.") for x in (a, b))
        raise TypeError(f"b: expected dtype {wanted} (that of a), got {got}")
    check_tensor("b", b, DTYPES, (None, a.shape[1]), a.device, of="a")
    check_bounds(bounds)


def check_bounds(bounds: torch.Tensor) -> None:
    check_tensor("bounds", bounds, (torch.int64,), (None, 2), torch.device("cpu"))
    if not bounds.is_contiguous():
        raise ValueError("bounds: expected a contiguous tensor")


def check_out(grads: torch.Tensor, out: torch.Tensor) -> None:
    check_tensor("out", out, DTYPES, (grads.shape[1],), grads.device)
    if out.shape[0] > 1 and out.stride(0) != 1:
        raise ValueError(f"out: expected a contiguous tensor, got stride {out.stride(0)}")


def check_combine(grads: torch.Tensor, weights: torch.Tensor, bounds: torch.Tensor, out: torch.Tensor) -> None:
    check_grads(grads, bounds)
    check_tensor("weights", weights, (torch.float64,), (bounds.shape[0], grads.shape[0]), grads.device)
    if not weights.is_contiguous():
        raise ValueError("weights: expected a contiguous tensor")
    check_out(grads, out)


def check_rule(
    K: int,
    T: int,
    device: torch.device,
    ema: torch.Tensor | None,
    beta: float,
    target: float | None,
    task_ids: torch.Tensor | None,
    vaccinated: torch.Tensor | None,
    order: torch.Tensor | None,
    seed: int,
    step: int,
    counter: torch.Tensor | None,
    first_group: int,
    of: str = "grads",
) -> None:
    """What turns the Gram matrices of K groups and T rows into weights."""
    check_settings(beta, target, seed)
    if (ema is None) == (target is None):
        raise ValueError(f"ema: expected exactly one of ema and target, got {'neither' if ema is None else 'both'}")
    if ema is not None:
        check_tensor("ema", ema, (torch.float64,), (K, None, None), device, of)
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
        check_tensor("task_ids", task_ids, (torch.int64,), (T,), device, of)
    if vaccinated is not None:
        check_tensor("vaccinated", vaccinated, (torch.int64,), (None,), device, of)
    if order is not None:
        check_tensor("order", order, (torch.int64,), (K, T, T - 1), device, of)
    if counter is not None:
        if isinstance(counter, torch.Tensor) and counter.numel() != 1:
            raise ValueError(f"step: expected one element, got shape {list(counter.shape)}")
        check_tensor("step", counter, (torch.int64,), (None,) * counter.dim(), device, of)


def check_layout(grads: torch.Tensor, bounds: torch.Tensor) -> None:
    """The values of ``bounds``: ascending, apart, inside the buffer."""
    edges = bounds.flatten().tolist()
    if edges != sorted(edges) or (edges and (edges[0] < 0 or edges[-1] > grads.shape[1])):
        raise ValueError(f"bounds: expected ascending ranges of the {grads.shape[1]} columns, got {bounds.tolist()}")


def check_apart(**tensors: torch.Tensor | None) -> None:
    """No two of these tensors, of which at most one is only read, lie in the same memory."""

    def span(t: torch.Tensor) -> tuple[int, int]:
        extent = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride())) + 1
        return t.data_ptr(), t.data_ptr() + extent * t.element_size()

    spans = [(name, *span(tensor)) for name, tensor in tensors.items() if tensor is not None and tensor.numel()]
    for (name, begin, end), (other, first, last) in itertools.combinations(spans, 2):
        if begin < last and first < end:
            raise ValueError(f"{name}: expected memory of its own, got a tensor that overlaps {other}")


def check_rule_values(
    T: int,
    ema: torch.Tensor | None,
    task_ids: torch.Tensor | None,
    vaccinated: torch.Tensor | None,
    order: torch.Tensor | None,
) -> None:
    """Ids and orders, by value where they lie on the host."""
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
