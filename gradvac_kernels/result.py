"""What a vaccination returns."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Vaccination(NamedTuple):
    """The vaccinated gradient and what was measured on the way."""

    gradient: torch.Tensor
    """``[P]``: the update, sum over the tasks of the turned gradients."""
    weights: torch.Tensor
    """``[K, T]`` float64: weight of each task's gradient in each group."""
    similarity: torch.Tensor
    """``[K, T, T]`` float64: cosine of the current row i and row j as Algorithm 1 measured it; NaN where it did not."""
    corrected: torch.Tensor
    """``[K, T, T]`` bool: row i was turned towards row j."""
    gram: torch.Tensor
    """``[K, T, T]`` float64: dot products of the original rows, as :func:`gradvac_kernels.gram` gives them."""


class Coefficients(NamedTuple):
    """What Gram matrices give, as in :class:`Vaccination`."""

    weights: torch.Tensor
    """``[K, T]`` float64."""
    similarity: torch.Tensor
    """``[K, T, T]`` float64."""
    corrected: torch.Tensor
    """``[K, T, T]`` bool."""
