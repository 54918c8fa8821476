"""Flat vectors ``[P]`` in the layout of parameter groups: products, norms and sums by group, to and from parameters.

What iterations on gradients need (power iteration, conjugate gradients, line searches): :func:`dot`, :func:`norm`,
:func:`axpy`. Columns outside every group are neither read nor written, and nothing waits for a device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from . import checks, ops
from .groups import ParameterGroups, gradient_stride, trainable
from .numerics import DTYPES


def dot(x: torch.Tensor, y: torch.Tensor, groups: ParameterGroups) -> torch.Tensor:
    """Dot products of two flat vectors, group by group.

    Args:
        x: ``[P]``, contiguous, float32, bfloat16, float16 or float64.
        y: ``[P]``, of the dtype and device of ``x``.
        groups: K groups of the P columns.

    Returns:
        ``[K]`` float64, with the accuracy and range of :func:`gradvac_kernels.cross_gram`; its sum is the dot product
        of the whole vectors.

    Raises:
        TypeError: an argument is of a wrong type or dtype.
        ValueError: a shape, a stride or the device of ``y`` does not fit.
    """
    x, y = _check_flat("x", x, groups), _check_flat("y", y, groups)
    _check_same("y", "device", y.device, x.device)
    if y.dtype != x.dtype:
        raise TypeError(f"y: expected dtype {x.dtype} (that of x), got {y.dtype}")
    return ops.cross_gram(x[None], y[None], groups).flatten()


def norm(x: torch.Tensor, groups: ParameterGroups) -> torch.Tensor:
    """Euclidean norms of a flat vector, group by group.

    Args:
        x: ``[P]``, contiguous, float32, bfloat16, float16 or float64.
        groups: K groups of the P columns.

    Returns:
        ``[K]`` float64: the root of what :func:`gradvac_kernels.gram` gives for one row, with its accuracy and range.

    Raises:
        TypeError, ValueError: as :func:`dot`.
    """
    return ops.gram(_check_flat("x", x, groups)[None], groups).flatten().sqrt()


def axpy(alpha: float | torch.Tensor, x: torch.Tensor, y: torch.Tensor, groups: ParameterGroups) -> torch.Tensor:
    """``y += alpha x`` in place, computed in float64 and rounded once to the type of ``y``.

    Args:
        alpha: a number, or a factor for each group, ``[K]`` float64 or float32 on the device of ``y``.
        x: ``[P]``, contiguous, float32, bfloat16, float16 or float64.
        y: ``[P]``, contiguous, of any of these types, on the device of ``x``; it may not overlap ``x``.
        groups: K groups of the P columns.

    Returns:
        ``y``.

    Raises:
        TypeError: an argument is of a wrong type or dtype.
        ValueError: a shape, stride or device does not fit, ``y`` overlaps ``x`` or requires grad. Then nothing was
            changed.
    """
    x = _check_flat("x", x, groups)
    _check_flat("y", y, groups)
    _check_same("y", "device", y.device, x.device)
    if y.requires_grad:
        raise ValueError("y: expected a tensor to write to, got one that requires grad")
    checks.check_apart(y=y, x=x)
    if isinstance(alpha, torch.Tensor):
        checks.check_tensor("alpha", alpha, (torch.float64, torch.float32), (len(groups),))
        _check_same("alpha", "device", alpha.device, y.device)
        factors: Sequence[Any] = alpha.detach().to(torch.float64, copy=True).unbind()  # it may lie in y
    elif isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise TypeError(f"alpha: expected a number or a tensor [K], got {alpha!r}")
    else:
        factors = [checks.as_float("alpha", alpha)] * len(groups)
    for k, block in _blocks(x, groups):
        y[block] = y[block].double() + factors[k] * x[block].double()
    return y


# ------------------------------------------------------------------------------------------- to and from parameters


def parameters(model: torch.nn.Module | Sequence[torch.Tensor], groups: ParameterGroups) -> list[torch.Tensor]:
    """The tensors whose gradients ``groups`` lays out, in the order of ``groups.parameters``.

    Args:
        model: the module that ``groups`` was made from, or its trainable parameters in that order.
        groups: made by :meth:`ParameterGroups.from_model`.

    Raises:
        TypeError: ``model`` is neither a module nor a sequence of tensors.
        ValueError: ``groups`` knows no parameters, or one is missing or of another shape.
    """
    slots = _check_slots(groups)
    if isinstance(model, torch.nn.Module):
        named = dict(trainable(model))
        missing = [slot.name for slot in slots if slot.name not in named]
        if missing:
            raise ValueError(f"model: expected a trainable parameter {missing[0]!r}, as in groups, got none")
        found: list[torch.Tensor] = [named[slot.name] for slot in slots]
    else:
        found = _check_tensors("model", model, groups)  # type: ignore[assignment]
    for slot, tensor in zip(slots, found):
        if tensor is None or tuple(tensor.shape) != slot.shape or gradient_stride(tensor) != slot.stride:
            got = None if tensor is None else f"shape {list(tensor.shape)}, strides {gradient_stride(tensor)}"
            raise ValueError(
                f"model: expected {slot.name!r} of shape {list(slot.shape)} and strides {slot.stride}, got {got}"
            )
    return found


def views(columns: torch.Tensor, groups: ParameterGroups) -> list[torch.Tensor]:
    """A flat vector as one view a parameter, in its shape and with its strides; nothing is copied.

    Args:
        columns: ``[P]``, contiguous.
        groups: made by :meth:`ParameterGroups.from_model`.

    Returns:
        Views in the order of ``groups.parameters``; autograd goes through them.

    Raises:
        TypeError, ValueError: ``columns`` or ``groups`` is not as above.
    """
    slots = _check_slots(groups)
    _check_flat("columns", columns, groups)
    return [columns[slot.offset : slot.offset + slot.numel].as_strided(slot.shape, slot.stride) for slot in slots]


def flatten(
    tensors: Sequence[torch.Tensor | None],
    groups: ParameterGroups,
    *,
    out: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Tensors, one a parameter, as a flat vector.

    Args:
        tensors: in the order and the shapes of ``groups.parameters``; None is zero (autograd's word for unused).
        groups: made by :meth:`ParameterGroups.from_model`.
        out: ``[P]``, contiguous, where to write; columns outside every group are left alone. None makes a new one,
            zero there.
        dtype: of a new one; None is that of the first tensor.

    Returns:
        ``[P]``: ``out``.

    Raises:
        TypeError: an argument is of a wrong type or dtype.
        ValueError: the number of tensors, a shape or a device does not fit. Then nothing was changed.
    """
    slots = _check_slots(groups)
    listed = _check_tensors("tensors", tensors, groups)
    for index, (slot, tensor) in enumerate(zip(slots, listed)):
        if tensor is not None and tuple(tensor.shape) != slot.shape:
            raise ValueError(f"tensors[{index}]: expected shape {list(slot.shape)}, got {list(tensor.shape)}")
    first = next((tensor for tensor in listed if tensor is not None), out)
    if first is None:
        raise ValueError("tensors: expected at least one tensor, or out, got only None")
    if out is None:
        checks.check_dtype(first.dtype if dtype is None else dtype)
        out = first.new_zeros(groups.numel, dtype=dtype)
    _check_flat("out", out, groups)
    for index, tensor in enumerate(listed):
        if tensor is not None:
            _check_same(f"tensors[{index}]", "device", tensor.device, out.device)
            _check_same(f"tensors[{index}]", "layout", tensor.layout, torch.strided)
            if tensor.is_complex():
                raise TypeError(f"tensors[{index}]: expected real numbers, got {tensor.dtype}")
    with torch.no_grad():
        for view, tensor in zip(views(out, groups), listed):
            if tensor is None:
                view.zero_()
            else:
                view.copy_(tensor)
    return out


# ----------------------------------------------------------------------------------------------------------- helpers


def _blocks(x: torch.Tensor, groups: ParameterGroups) -> Iterator[tuple[int, slice]]:
    """The columns of each group, as many at once as make little memory in float64; more where a call is a launch."""
    columns = 1 << 16 if x.device.type == "cpu" else 1 << 22
    for k, (begin, end) in enumerate(groups.bounds.tolist()):
        for column in range(begin, end, columns):
            yield k, slice(column, min(column + columns, end))


def _check_flat(name: str, x: Any, groups: Any) -> torch.Tensor:
    checks.check_groups(groups)
    checks.check_tensor(name, x, DTYPES, (groups.numel,))
    if x.numel() > 1 and x.stride(0) != 1:
        raise ValueError(f"{name}: expected a contiguous tensor, got stride {x.stride(0)}")
    return x.detach()


def _check_same(name: str, what: str, found: Any, wanted: Any) -> None:
    if found != wanted:
        raise ValueError(f"{name}: expected {what} {wanted}, got {found}")


def _check_slots(groups: Any) -> Any:
    checks.check_groups(groups)
    if not groups.parameters:
        raise ValueError("groups: expected groups of a model's parameters (from_model), got groups without any")
    return groups.parameters


def _check_tensors(name: str, tensors: Any, groups: ParameterGroups) -> list[torch.Tensor | None]:
    if not isinstance(tensors, Sequence):
        raise TypeError(f"{name}: expected a sequence of tensors, got {type(tensors).__name__}")
    for index, tensor in enumerate(tensors):
        checks.check_is_tensor(f"{name}[{index}]", tensor)
    if len(tensors) != len(groups.parameters):
        raise ValueError(f"{name}: expected {len(groups.parameters)} tensors, got {len(tensors)}")
    return list(tensors)
