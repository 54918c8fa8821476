"""The buffer: one row of P columns a task, and one row for the result, laid out by the parameter groups."""

from __future__ import annotations

import functools

import torch

from . import checks, flat
from .groups import ParameterGroups


class GradientBuffer:
    """Memory for the gradients of up to T tasks, and for the update made from them.

    Attributes:
        groups: the layout of the P columns.
        grads: ``[T, P]``, zero at first; a row is meant to be accumulated into, in place. Made when it is first used.
        result: ``[P]``, zero at first.

    Raises:
        TypeError, ValueError: ``groups``, ``num_rows`` or ``dtype`` is not what it says.
    """

    def __init__(
        self,
        groups: ParameterGroups,
        num_rows: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        checks.check_groups(groups)
        checks.check_int("num_rows", num_rows, 1)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"dtype: expected a floating-point torch.dtype, got {dtype!r}")
        self.groups = groups
        self._num_rows = num_rows
        self.result = torch.zeros(groups.numel, dtype=dtype, device=device)

    @functools.cached_property
    def grads(self) -> torch.Tensor:
        return self.result.new_zeros(self._num_rows, self.groups.numel)

    def parameter_views(self, columns: torch.Tensor) -> list[torch.Tensor]:
        """A row of ``grads``, or ``result``, as one view a parameter of the model, in its shape.

        Args:
            columns: ``[P]``.

        Returns:
            Views in the order of ``groups.parameters``, with the strides of the parameters; nothing is copied.
        """
        return flat.views(columns, self.groups)
