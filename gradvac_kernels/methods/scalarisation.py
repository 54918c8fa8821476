"""Fixed weights: the plain sum of the tasks' gradients, and their mean."""

from __future__ import annotations

import torch

from .weighting import Measured, State, Weighting


class Sum(Weighting):
    """The sum of the gradients: ordinary training, with the Gram matrices measured on the way."""

    def weights(self, measured: Measured, state: State) -> torch.Tensor:
        return torch.ones_like(measured.usable, dtype=torch.float64)


class Mean(Weighting):
    """The sum divided by the number of tasks in the step, those without a gradient in a group included."""

    def weights(self, measured: Measured, state: State) -> torch.Tensor:
        return torch.full_like(measured.usable, 1.0 / measured.usable.shape[1], dtype=torch.float64)
