"""A use of parameters by one operation, with all that its gradients need."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .places import Samples
from .rules import Grads, Into
from .slab import Part
from .task_rows import TaskRows


@dataclass(frozen=True)
class Use:
    """One operation's use of parameters: ``grad`` is the gradient of its result, ``saved`` its factor."""

    parts: tuple[Part | None, ...]
    grads: Grads
    rows: TaskRows
    saved: tuple[torch.Tensor, ...]
    grad: torch.Tensor
    samples: Samples

    def add(self, into: Into) -> None:
        """Add the gradient of task t to ``into[i][t]``, for each part i."""
        self.grads(self.rows, self.saved, self.grad, self.samples.dim, into)

    def add_weighted(self, weights: torch.Tensor, into: Into) -> None:
        """Add the sum over the tasks, with weights ``[T]``, to ``into[i][0]``: one gradient, of a weighted ``grad``."""
        samples = self.samples
        shape = [-1 if dim == samples.dim else 1 for dim in range(self.grad.dim())]
        weight = weights[samples.rows.to(weights.device)].to(self.grad).view(shape)
        together = TaskRows(Samples(samples.dim, torch.zeros_like(samples.rows)), 1, self.grad.device)
        self.grads(together, self.saved, self.grad * weight, samples.dim, into)
