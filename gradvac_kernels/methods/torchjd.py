"""Any weighting of TorchJD, by parameter group."""

from __future__ import annotations

import copy
from typing import Any

import torch

from ..groups import ParameterGroups
from .weighting import Measured, State, Weighting, WeightingStep


class FromTorchJD(Weighting):
    """Runs what TorchJD (Valérian Rey and Pierre Quinton, "Jacobian Descent for Multi-Objective Optimization") knows on
    each group's Gram matrix: UPGrad, CAGrad, Aligned-MTL, IMTL-G, Nash-MTL, ConFIG and others, with any granularity.

    A ``Weighting`` is given the Gram matrix. An ``Aggregator`` is given a matrix F with F F' = G, and what it makes of
    that is taken as weights of F's rows: right for those that depend on nothing but inner products (ConFIG, NashMTL),
    and not for others (GradDrop, TrimmedMean). Every group has a copy of its own, so that what it keeps between calls
    is kept by group. TorchJD reads tensors back, so the host waits for a GPU in each group.

    Rows that are zero or non-finite in a group are left out of its Gram matrix.

    Args:
        weighting: a ``torchjd.aggregation.Weighting`` of Gram matrices, or an ``Aggregator``.
        relative: hand over gradients of mean squared norm 1 in every group, since TorchJD adds absolute epsilons, which
            small gradients fall below. False hands them over as they are, for what depends on their size (NashMTL's
            ``max_norm``).
        num_tasks: N. Needed where batches hold some of the tasks only; else it is the rows of the first call.

    Raises:
        TypeError: ``weighting`` is neither.
    """

    def __init__(self, weighting: Any, relative: bool = True, num_tasks: int | None = None) -> None:
        super().__init__(num_tasks)
        if not isinstance(relative, bool):
            raise TypeError(f"relative: expected a bool, got {relative!r}")
        self.relative = relative
        from torchjd import aggregation

        if not isinstance(weighting, (aggregation.Weighting, aggregation.Aggregator)):
            raise TypeError(f"weighting: expected a Weighting or an Aggregator of TorchJD, got {weighting!r}")
        if isinstance(weighting, aggregation.GramianWeightedAggregator):
            weighting = weighting.gramian_weighting
        self.weighting = weighting
        self._takes_rows = isinstance(weighting, aggregation.Aggregator)
        self._copies: dict[int, Any] = {}  # by group
        self._trial: dict[int, Any] = {}  # the same in a step that is not over

    def state_dict(self) -> dict[str, Any]:
        """The step; what a weighting keeps itself is not in it.

        Raises:
            NotImplementedError: it keeps something: TorchJD (0.18) has no way to save that.
        """
        if self._is_stateful():
            raise NotImplementedError(
                f"state_dict: {type(self.weighting).__name__} keeps a state that TorchJD cannot save or load"
            )
        return super().state_dict()

    def _is_stateful(self) -> bool:
        from torchjd import Stateful

        return isinstance(self.weighting, Stateful)

    def _begin(self, groups: ParameterGroups, num_rows: int, device: torch.device) -> WeightingStep:
        self._trial = copy.deepcopy(self._copies) if self._is_stateful() else self._copies
        return super()._begin(groups, num_rows, device)

    def _commit(self, step: WeightingStep) -> None:
        super()._commit(step)
        self._copies = self._trial

    def weights(self, measured: Measured, state: State) -> torch.Tensor:
        weights = torch.zeros_like(measured.usable, dtype=torch.float64)
        for k, (G, usable) in enumerate(zip(measured.G, measured.usable)):
            rows = usable.nonzero()[:, 0]
            if len(rows):
                weighting = self._trial.setdefault(measured.rows.start + k, copy.deepcopy(self.weighting))
                its = G[rows][:, rows]
                if self.relative:
                    its = its / its.diagonal().mean()
                weights[k, rows] = self._ask(weighting, its, measured.noise)
        return weights

    def _ask(self, weighting: Any, G: torch.Tensor, noise: float) -> torch.Tensor:
        if not self._takes_rows:
            return weighting(G).to(torch.float64)
        values, vectors = torch.linalg.eigh(G)
        real = values > values[-1] * noise * len(G)  # the others are rounding, and may be magnified
        F = vectors[:, real] * values[real].sqrt()  # [T, rank]
        return torch.linalg.pinv(F.T) @ weighting(F).to(torch.float64)
