"""The loss of a mixed batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .. import checks


def task_mean_loss(
    losses: torch.Tensor,
    task_of_sample: torch.Tensor | Sequence[Any],
    weights: torch.Tensor | None = None,
    batch_dim: int = 0,
) -> torch.Tensor:
    """The sum over the tasks of each task's mean loss: its gradient by task is that of one mean loss a task.

    Args:
        losses: ``[B, ...]``, of each sample, or of each token of each sample.
        task_of_sample: ``[B]``, the task of each sample: any numbers or names.
        weights: of the shape of ``losses``, such as 1 for a token and 0 for padding; None means 1. A task's mean is
            the sum of weight times loss over the sum of weights; a task whose weights are all zero counts as zero.
        batch_dim: the dimension of the samples in ``losses``.

    Returns:
        A scalar, of the type of ``losses``; of 16 bits, in float32. Sums are taken in float64.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    if not isinstance(losses, torch.Tensor) or not losses.is_floating_point():
        raise TypeError(f"losses: expected a floating-point tensor, got {getattr(losses, 'dtype', losses)!r}")
    if weights is not None and (not isinstance(weights, torch.Tensor) or weights.shape != losses.shape):
        raise ValueError(f"weights: expected the shape of losses, {list(losses.shape)}, got {_shape(weights)}")
    checks.check_int("batch_dim", batch_dim, 0)
    if losses.dim() <= batch_dim:
        raise ValueError(f"losses: expected a dimension {batch_dim} of samples, got shape {list(losses.shape)}")
    if not isinstance(task_of_sample, (torch.Tensor, Sequence)) or isinstance(task_of_sample, str):
        raise TypeError(f"task_of_sample: expected a tensor or a sequence, got {task_of_sample!r}")
    given = list(task_of_sample.shape) if isinstance(task_of_sample, torch.Tensor) else [len(task_of_sample)]
    if given != [losses.shape[batch_dim]]:
        raise ValueError(
            f"task_of_sample: expected one task for each of {losses.shape[batch_dim]} samples, got shape {given}"
        )
    if not isinstance(task_of_sample, torch.Tensor):
        number: dict[Any, int] = {}
        task_of_sample = torch.tensor([number.setdefault(task, len(number)) for task in task_of_sample])
    tasks, rows = task_of_sample.to(losses.device).unique(return_inverse=True)
    wide = losses.to(torch.promote_types(losses.dtype, torch.float32))
    weights = torch.ones_like(wide) if weights is None else weights.to(wide.dtype)

    def by_task(values: torch.Tensor) -> torch.Tensor:
        of_sample = values.movedim(batch_dim, 0)[:, None].flatten(1).sum(1, dtype=torch.float64)  # [B]
        return of_sample.new_zeros(len(tasks)).index_add(0, rows, of_sample)

    share = by_task(weights)
    return (by_task(wide * weights) / share.where(share != 0, 1.0)).sum().to(wide.dtype)


def _shape(value: Any) -> Any:
    return list(value.shape) if isinstance(value, torch.Tensor) else value
