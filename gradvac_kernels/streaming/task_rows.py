"""Sums and products over the samples of each task, written where the kernels read them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .places import Samples
from .slab import Target

_SCRATCH = 5 << 18  # bytes


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

    def add_products(self, left: torch.Tensor, right: torch.Tensor, into: Target) -> None:
        """``into[t] += left_t' right_t``, for matrices of arranged rows ``[n * L, I]`` and ``[n * L, J]``.

        Args:
            into: ``[T, I, J]``, of any strides.
        """
        memory, beta = into.overwritten()
        if memory.stride(2) != 1 and memory.stride(1) == 1:
            left, right, memory = right, left, memory.transpose(1, 2)
        short = _short_type(left, right, memory)
        left, right = left.to(short or memory.dtype), right.to(short or memory.dtype)
        if self.equal and short is None:
            tall = (len(self.counts), -1)
            _add_batched(left.unflatten(0, tall).transpose(1, 2), right.unflatten(0, tall), memory, beta)
            return
        length = len(left) // max(1, len(self.rows))
        counts = [count * length for count in self.counts]
        for row, a, b in zip(memory, left.split(counts), right.split(counts)):
            if short is None:
                row.addmm_(a.T, b, beta=beta)
            else:
                _add(torch.mm(a.T, b, out_dtype=row.dtype), row, beta)

    def add_sums(self, values: torch.Tensor, into: Target, size: Sequence[int] | None = None) -> None:
        """``into[t] += sum of values_t``, over the samples and over what broadcasting added.

        Args:
            values: arranged, ``[n, ...]``, where the other dimensions are what ``into[t]`` was broadcast to.
            into: ``[T, ...]``.
            size: of ``into[t]``, with other dimensions of size 1 than it has.
        """
        memory, beta = into.overwritten()
        memory = memory if size is None else memory.view(len(memory), *size)
        inner = values.shape[values.dim() - (memory.dim() - 1) :]
        if self.equal and values.is_contiguous() and inner == memory.shape[1:]:
            _add(values.view(len(memory), -1, *inner).sum(1, dtype=memory.dtype), memory, beta)
            return
        values = _sum_broadcast(values, memory)  # [n, ...] first, what is small for each task then
        if self.equal:
            _add(values.unflatten(0, (len(self.counts), -1)).sum(1), memory, beta)
            return
        for row, part in zip(memory, self.split(values)):
            _add(part.sum(0), row, beta)


def _add(values: torch.Tensor, into: torch.Tensor, beta: int) -> None:
    """``into = beta * into + values``, for 0, where what it holds does not count, or 1."""
    if beta:
        into += values
    else:
        into.copy_(values)


def _add_batched(left: torch.Tensor, right: torch.Tensor, into: torch.Tensor, beta: int) -> None:
    """``into = beta * into + left @ right``, where ``into`` lies in a slab, its matrices far apart."""
    at_once = _SCRATCH // (into[0].numel() * into.element_size())
    if into.device.type != "cpu" or at_once < 2:
        into.baddbmm_(left, right, beta=beta)
        return
    # There that is one product after another, each of which wakes all threads: some tasks together, and a copy.
    tasks = -(-len(into) // -(-len(into) // at_once))
    for part, a, b in zip(into.split(tasks), left.split(tasks), right.split(tasks)):
        _add(torch.bmm(a, b), part, beta)


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
