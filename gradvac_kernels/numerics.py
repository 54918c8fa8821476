"""The numerical rules every backend shares: which norms can be measured, and how far a target may reach."""

from __future__ import annotations

from typing import NamedTuple

import torch

MAX_TARGET = 1.0 - 2.0**-20
"""Cap of a similarity target: the turning grows as ``1 / sqrt(1 - target^2)``, which has no value at 1.

The cap acts where a target is used; the stored moving average is not capped.
"""

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Gradient types that every backend takes."""


class Precision(NamedTuple):
    """What a squared norm must satisfy to be measured, by the type of the gradients."""

    noise: float
    """A combination whose squared norm is at most this share of ``(sum |c_j| |g_j|)^2`` is lost in rounding."""
    smallest: float
    """A gradient with a smaller squared norm counts as zero."""
    largest: float
    """A gradient with a larger squared norm counts as non-finite."""


# float32 kernels are within 1e-7 |g_i||g_j| on ordinary gradients, and within 5e-7 (2^-21 is just below) on those whose
# roundings are all alike, as equal entries. They square in float32's range, with room for the upper part of a split.
_SINGLE = Precision(noise=2.0**-21, smallest=2.0**-126, largest=float(torch.finfo(torch.float32).max) * (1 - 2.0**-7))
# float64 sums are within a few 2^-53 times the length of their chains; products of squared norms stay in range.
_DOUBLE = Precision(noise=2.0**-46, smallest=2.0**-500, largest=2.0**500)


def precision(dtype: torch.dtype) -> Precision:
    """The limits for gradients of ``dtype``."""
    return _DOUBLE if dtype == torch.float64 else _SINGLE
