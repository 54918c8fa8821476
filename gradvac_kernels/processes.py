"""A data-parallel job: gradients of the processes' samples, put together before they are turned."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist


class Processes:
    """Those of a job, each of which calls the same functions in the same order.

    Args:
        group: of torch.distributed.
        reduction: ``"mean"`` over the processes that have a task, or ``"sum"``.
        device: of the gradients; everything is exchanged there.

    Attributes:
        is_first: whether this process is the first one of the group.
    """

    def __init__(self, group: dist.ProcessGroup, reduction: str, device: torch.device) -> None:
        self._group = group
        self._mean = reduction == "mean"
        self._device = device
        self.is_first = dist.get_rank(group) == 0

    def are_equal(self, layout: object, parameters: Iterable[torch.Tensor]) -> bool:
        """Whether all processes have the same layout, by what it prints, and the same parameters."""
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}
        mine = [torch.tensor(zlib.crc32(repr(layout).encode()), device=self._device)]
        mine += [parameter.detach().view(bits[parameter.itemsize]).sum() for parameter in parameters]  # in any order
        ends = torch.stack([torch.stack(mine).sum(), -torch.stack(mine).sum()])
        dist.all_reduce(ends, dist.ReduceOp.MAX, group=self._group)
        most, least = ends.tolist()
        return bool(most == -least)

    def agree(self, tasks: Sequence[int], num_tasks: int) -> tuple[list[int], torch.Tensor]:
        """The tasks that any process has, ascending, and how many have each, ``[T]`` float64; for a sum, ones."""
        mine = torch.zeros(num_tasks, dtype=torch.float64)
        mine[list(tasks)] = 1
        counts = self.add(mine)
        present = counts.nonzero().flatten().tolist()
        shares = counts[present] if self._mean else torch.ones(len(present), dtype=torch.float64)
        return present, shares

    def add(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of all processes' few ``values`` on the CPU."""
        values = values.to(self._device, copy=True)
        dist.all_reduce(values, group=self._group)
        return values.cpu()

    def average(self, values: torch.Tensor, known: torch.Tensor) -> dict[int, torch.Tensor]:
        """By index, the mean or sum of ``values`` ``[N]`` float64 over the processes that know them."""
        total, counts = self.add(torch.stack([values, known]))
        return {i: total[i] / counts[i] if self._mean else total[i] for i in counts.nonzero().flatten().tolist()}

    def start(self, values: torch.Tensor, shares: torch.Tensor | None = None) -> dist.Work:
        """Add up the ``values`` ``[T, ...]`` of all processes, in place; they are there after ``wait()``.

        Args:
            shares: ``[T]``, what the rows are divided by.
        """
        if shares is not None:
            for row, share in zip(values, shares.tolist()):
                if share > 1:
                    row /= share  # first: a sum may not fit 16 bits
        work: dist.Work = dist.all_reduce(values, group=self._group, async_op=True)
        return work
