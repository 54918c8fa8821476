"""Projecting Conflicting Gradients: Gradient Vaccine with the constant target 0."""

from __future__ import annotations

from collections.abc import Sequence

from .gradvac import GradVac


class PCGrad(GradVac):
    """PCGrad (Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020), by parameter group.

    A gradient that conflicts with another one loses its component along it. That is :class:`GradVac` with the target
    0, and computed as such: the same bits. The arguments, attributes and errors are those of :class:`GradVac`.
    """

    def __init__(
        self,
        vaccinated: Sequence[int] | None = None,
        num_tasks: int | None = None,
        seed: int = 0,
        capturable: bool = False,
    ) -> None:
        super().__init__(vaccinated=vaccinated, target=0.0, num_tasks=num_tasks, seed=seed, capturable=capturable)
