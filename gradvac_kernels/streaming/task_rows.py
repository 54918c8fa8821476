"""Sums and products over the samples of each task, written where the kernels read them."""

from __future__ import annotations

import torch

from .samples import Samples

_SCRATCH = 1 << 20  # bytes


class TaskRows:
    """The samples of a tensor, in the order of their tasks.

    Args:
        samples: where they lie.
        num_tasks: T, the rows of the slab.
        device: of the tensors to be summed.

    Attributes:
        counts: T ints, how many indices of the dimension belong to each task.
    """

    def __init__(self, samples: Samples, num_tasks: int, device: torch.device) -> None:
        rows = samples.rows
        self.counts: list[int] = torch.bincount(rows, minlength=num_tasks).tolist()
        self.equal = len(set(self.counts)) == 1
        in_order = bool((rows[1:] >= rows[:-1]).all())
        self._order = None if in_order else rows.argsort(stable=True).to(device)
        self.rows = rows

    def arranged(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """``tensor`` with the samples in its first dimension, task by task; a copy only where it is not so already."""
        tensor = tensor.movedim(dim, 0)
        return tensor if self._order is None else tensor.index_select(0, self._order)

    def split(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What :meth:`arranged` gave, task by task."""
        return tensor.split(self.counts)

    def add_products(self, left: torch.Tensor, right: torch.Tensor, into: torch.Tensor) -> None:
        """``into[t] += left_t' right_t``, for matrices of arranged rows ``[n * L, I]`` and ``[n * L, J]``.

        Args:
            into: ``[T, I, J]``, of any strides.
        """
        if into.stride(2) != 1 and into.stride(1) == 1:
            return self.add_products(right, left, into.transpose(1, 2))
        short = _short_type(left, right, into)
        left, right = left.to(short or into.dtype), right.to(short or into.dtype)
        if self.equal and short is None:
            tall = (len(self.counts), -1)
            _add_batched(left.unflatten(0, tall).transpose(1, 2), right.unflatten(0, tall), into)
            return None
        length = len(left) // max(1, len(self.rows))
        counts = [count * length for count in self.counts]
        for row, a, b in zip(into, left.split(counts), right.split(counts)):
            if len(a) and short is None:
                row.addmm_(a.T, b)
            elif len(a):
                row += torch.mm(a.T, b, out_dtype=row.dtype)
        return None

    def add_sums(self, values: torch.Tensor, into: torch.Tensor) -> None:
        """``into[t] += sum of values_t``, over the samples and over what broadcasting added.

        Args:
            values: arranged, ``[n, ...]``, where the other dimensions are what ``into[t]`` was broadcast to.
            into: ``[T, ...]``.
        """
        inner = values.shape[values.dim() - (into.dim() - 1) :]
        if self.equal and values.is_contiguous() and inner == into.shape[1:]:
            into += values.view(len(into), -1, *inner).sum(1, dtype=into.dtype)
            return
        values = _sum_broadcast(values, into)  # [n, ...] first, what is small for each task then
        if self.equal:
            into += values.unflatten(0, (len(self.counts), -1)).sum(1)
            return
        for row, part in zip(into, self.split(values)):
            if len(part):
                row += part.sum(0)


def _add_batched(left: torch.Tensor, right: torch.Tensor, into: torch.Tensor) -> None:
    """``into += left @ right``, where ``into`` lies in a slab, its matrices far apart."""
    if into.device.type != "cpu":
        into.baddbmm_(left, right)
        return
    # There that is one product after another, each of which wakes all threads: a few rows of all matrices, and a copy.
    rows = max(1, _SCRATCH // (len(into) * into.shape[2] * into.element_size()))
    for part, its in zip(into.split(rows, 1), left.split(rows, 1)):
        part += torch.bmm(its, right)


def _short_type(left: torch.Tensor, right: torch.Tensor, into: torch.Tensor) -> torch.dtype | None:
    """16 bits, where a GPU multiplies in these and sums in float32: under autocast."""
    if not into.is_cuda or into.dtype != torch.float32 or "dtype" not in torch.ops.aten.mm.overloads():
        return None
    return next((t.dtype for t in (left, right) if t.dtype in (torch.bfloat16, torch.float16)), None)


def _sum_broadcast(values: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
    """``values`` ``[n, ...]`` summed over what broadcasting from ``into`` ``[T, ...]`` added, in the type of that."""
    added = values.dim() - into.dim()
    dims = [d for d in range(1, values.dim()) if d <= added or into.shape[d - added] == 1 != values.shape[d]]
    if dims:
        values = values.sum(dims, dtype=into.dtype)
    return values.reshape(len(values), *into.shape[1:]).to(into.dtype)
