"""Gradient Vaccine as an aggregator of TorchJD, on our kernels and by parameter group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torchjd import Stateful
from torchjd.aggregation import Aggregator

from .. import checks
from ..groups import ParameterGroups
from ..methods import GradVac
from ..numerics import DTYPES


class GradVacAggregator(Aggregator, Stateful):
    """:class:`gradvac_kernels.GradVac` in the form of TorchJD's aggregators.

    Jacobians ``[m, n]`` in, updates ``[n]`` out, for ``torchjd.autojac.jac_to_grad`` and the like: the rows are the
    tasks, and the columns, in the order of the tensors that are given there, those of ``groups``. The targets are kept
    between calls, and are in ``state_dict()``. Not differentiable: the update has no graph.

    Args:
        groups: the parameter groups of the n columns, one behind the other (``align=1``); None means one group of all.
        beta: weight of a new similarity in the moving average, in [0, 1].
        vaccinated: rows that may be turned; None means all.
        target: a constant similarity target instead of the moving average (0 is PCGrad).
        seed: chooses the random orders of the inner loop.

    Attributes:
        method: the :class:`GradVac` inside.

    Raises:
        TypeError, ValueError: as :class:`GradVac`; in a call, as :func:`gradvac_kernels.vaccinate`.
    """

    def __init__(
        self,
        groups: ParameterGroups | None = None,
        *,
        beta: float = 1e-2,
        vaccinated: Sequence[int] | None = None,
        target: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if groups is not None and not isinstance(groups, ParameterGroups):
            raise TypeError(f"groups: expected ParameterGroups or None, got {type(groups).__name__}")
        self.groups = groups
        self.method = GradVac(beta=beta, vaccinated=vaccinated, target=target, seed=seed)

    def forward(self, matrix: torch.Tensor, /) -> torch.Tensor:
        """``[m, n]`` -> ``[n]``."""
        checks.check_tensor("matrix", matrix, DTYPES, (None, None))
        groups = self.groups or ParameterGroups.from_sizes({"all": matrix.shape[1]})
        if groups.numel != matrix.shape[1] == sum(groups.sizes):
            padding = groups.numel - matrix.shape[1]
            raise ValueError(f"groups: expected groups without padding (align=1), got {padding} columns of it")
        return self.method(matrix.detach().contiguous(), groups).gradient

    def reset(self) -> None:
        """Back to targets of zero, and to the first step."""
        old = self.method
        self.method = GradVac(old.beta, old.vaccinated, old.target, seed=old.seed)

    def get_extra_state(self) -> dict[str, Any]:
        """What ``state_dict()`` keeps."""
        return self.method.state_dict()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Continue, bit for bit, where it was kept."""
        self.method.load_state_dict(state)

    def __repr__(self) -> str:
        found = self.method
        return (
            f"{type(self).__name__}(groups={self.groups and list(self.groups.names)!r}, beta={found.beta!r}, "
            f"vaccinated={found.vaccinated!r}, target={found.target!r}, seed={found.seed!r})"
        )
