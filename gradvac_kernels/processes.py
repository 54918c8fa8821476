"""A data-parallel job: gradients of the processes' samples, put together before they are turned."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist

from .groups import trainable


class Processes:
    """Those of a job, each of which calls the same functions in the same order.

    Args:
        group: of torch.distributed.
        reduction: ``"mean"`` over the processes that have a task, or ``"sum"``.
        device: of the gradients; everything is exchanged there.
    """

    def __init__(self, group: dist.ProcessGroup, reduction: str, device: torch.device) -> None:
        self._group = group
        self._mean = reduction == "mean"
        self._device = device
        self._is_first = dist.get_rank(group) == 0

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

    def of_the_first(self, values: torch.Tensor) -> torch.Tensor:
        """What the first process has as ``values``, of which all have as many."""
        return self.add(values * self._is_first)

    def average(self, values: Mapping[int, torch.Tensor], num_tasks: int) -> dict[int, torch.Tensor]:
        """By task, the mean or sum of the scalars of the processes that have one, float64."""
        mine = torch.zeros(2, num_tasks, dtype=torch.float64)
        for task, value in values.items():
            mine[0, task], mine[1, task] = value, 1
        total, counts = self.add(mine)
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


def check_whole(model: torch.nn.Module) -> None:
    """Refuse what averages or shards gradients by itself.

    Raises:
        ValueError: trainable parameters in DistributedDataParallel, or sharded ones (FSDP).
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.parallel.DistributedDataParallel) and any(trainable(module)):
            raise ValueError(
                f"model: expected a module without DistributedDataParallel, got it as {name!r}: it averages the "
                "gradients of a backward whatever task that is for; run what it holds, and give a process_group"
            )
    for name, parameter in trainable(model):
        kind = type(parameter).__name__
        if kind in ("DTensor", "FlatParameter") or hasattr(parameter, "_fsdp_flattened"):
            raise ValueError(f"model: expected whole parameters, got {name!r}, which is sharded")
