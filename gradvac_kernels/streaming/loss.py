"""The loss of a mixed batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


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
        A scalar.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    if not isinstance(losses, torch.Tensor) or not losses.is_floating_point():
        raise TypeError(f"losses: expected a floating-point tensor, got {getattr(losses, 'dtype', losses)!r}")
    if weights is not None and (not isinstance(weights, torch.Tensor) or weights.shape != losses.shape):
        raise ValueError(f"weights: expected the shape of losses, {list(losses.shape)}, got {_shape(weights)}")
    size = losses.shape[batch_dim] if losses.dim() > batch_dim else None
    if len(task_of_sample) != size:
        raise ValueError(f"task_of_sample: expected one task for each of {size} samples, got {len(task_of_sample)}")
    if not isinstance(task_of_sample, torch.Tensor):
        number: dict[Any, int] = {}
        task_of_sample = torch.tensor([number.setdefault(task, len(number)) for task in task_of_sample])
    tasks, rows = task_of_sample.to(losses.device).unique(return_inverse=True)
    weights = torch.ones_like(losses) if weights is None else weights.to(losses.dtype)
    total = (losses * weights).movedim(batch_dim, 0).reshape(size, -1).sum(1)  # [B]
    share = weights.movedim(batch_dim, 0).reshape(size, -1).sum(1)
    zeros = total.new_zeros(len(tasks))
    share = zeros.index_add(0, rows, share)
    return (zeros.index_add(0, rows, total) / share.where(share != 0, 1.0)).sum()


def _shape(value: Any) -> Any:
    return list(value.shape) if isinstance(value, torch.Tensor) else value
