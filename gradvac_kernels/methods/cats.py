"""CATS, Gram form: task weights that lead where the combined gradient is short."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import checks
from ..groups import ParameterGroups
from .weighting import Measured, State, Weighting, mean


class CATS(Weighting):
    """Curvature-aware task scaling in Gram form, by group; after Li and Gong, "Robust Optimization for Multilingual
    Translation with Imbalanced Data", NeurIPS 2021.

    Task weights alpha go down, and a multiplier lambda goes up, the Lagrangian

        sum_n alpha_n L_n + lambda (alpha' G alpha - budget),    lambda >= 0,

    over the weights that are positive and of sum 1: alpha' G alpha, the squared length of the combined gradient,
    stands for the curvature (the empirical Fisher matrix) in its direction. This is our Gram form of the method: the
    paper's own constants and penalties are not in it. G is taken relative to the tasks' mean squared norm and L
    relative to the mean of its absolute values, so that scales do not matter, and the descent direction is divided by
    1 + lambda. Instead of penalties, alpha is projected onto the simplex after every step, no weight below
    ``floor / N``. Tasks that are not in a step keep their weights, and the others share theirs as if they were all.

    The weights of a step are those learned before it, 1/N at first.

    Args:
        budget: of alpha' G alpha; None is 1 over the number of tasks in the step, what equal weights give for
            orthogonal gradients of equal norm.
        lr: step size of alpha, in units of 1/N.
        dual_lr: step size of lambda.
        interval: learn in every so many steps from the training gradients; None learns from nothing but
            :meth:`observe`, which is for the gradients of validation batches.
        floor: the smallest weight, in units of 1/N, in [0, 1).
        num_tasks: N. Needed where batches hold some of the tasks only; else it is the rows of the first call.

    Raises:
        TypeError, ValueError: an argument is not of the type or range above.
    """

    def __init__(
        self,
        budget: float | None = None,
        lr: float = 0.02,
        dual_lr: float = 0.1,
        interval: int | None = 1,
        floor: float = 0.1,
        num_tasks: int | None = None,
    ) -> None:
        super().__init__(num_tasks)
        self.budget = None if budget is None else checks.check_real("budget", budget, 0.0)
        self.lr = checks.check_real("lr", lr, 0.0)
        self.dual_lr = checks.check_real("dual_lr", dual_lr, 0.0)
        self.floor = checks.check_real("floor", floor, 0.0)
        if self.floor >= 1.0:
            raise ValueError(f"floor: expected a number in [0, 1), got {floor}")
        if interval is not None:
            checks.check_int("interval", interval, 1)
        self.interval = interval
        self.needs_losses = interval is not None

    def observe(
        self,
        G: torch.Tensor,
        groups: ParameterGroups,
        losses: torch.Tensor,
        task_ids: torch.Tensor | Sequence[int] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Learn from the Gram matrices of other gradients than those of the training step.

        Args:
            G: ``[K, T, T]`` float64, as :func:`gradvac_kernels.gram` gives it.
            groups: the K groups.
            losses: ``[T]``.
            task_ids: ``[T]``, as for the call.
            dtype: of the gradients.

        Raises:
            TypeError, ValueError: as for the call; then nothing was changed.
        """
        checks.check_groups(groups)
        checks.check_tensor("G", G, (torch.float64,), (len(groups), None, None))
        checks.check_gram(G, dtype)
        step = self._begin(groups, G.shape[1], G.device)
        given = self._checked_losses(losses, G.shape[1], G.device)
        if given is None:
            raise ValueError("losses: expected the loss of each task, got None")
        step.weigh(G, groups, task_ids, dtype)
        state = {name: value.clone() for name, value in step.state.items()}
        for measured in step.measured:
            self._descend(measured, given, state)
        self.num_tasks, self.state = step.num_tasks, state

    def initial(self, K: int, N: int) -> State:
        return {
            "alpha": torch.full((K, N), 1.0 / max(1, N), dtype=torch.float64),
            "multiplier": torch.zeros(K, dtype=torch.float64),
        }

    def weights(self, measured: Measured, state: State) -> torch.Tensor:
        return state["alpha"][measured.rows][:, measured.task_ids]

    def learn(self, measured: Measured, losses: torch.Tensor | None, state: State) -> None:
        if self.interval is not None and losses is not None and (self.step + 1) % self.interval == 0:
            self._descend(measured, losses, state)

    def _descend(self, measured: Measured, losses: torch.Tensor, state: State) -> None:
        ids, learned, multiplier = measured.task_ids, state["alpha"][measured.rows], state["multiplier"][measured.rows]
        N = learned.shape[1]
        usable = measured.usable & losses.isfinite()
        count = usable.sum(1, keepdim=True, dtype=learned.dtype)  # [K, 1]
        alpha = torch.where(usable, learned[:, ids], 0.0)  # [K, T]
        share = alpha.sum(1, keepdim=True)  # what these tasks have of the 1: theirs is a simplex of that size
        part = torch.where(share > 0, alpha / share, 0.0)
        square = mean(measured.G.diagonal(dim1=1, dim2=2), usable)
        Ga = (measured.G * part[:, None, :]).sum(2) / torch.where(square > 0, square, 1.0)
        size = mean(losses.abs().expand_as(alpha), usable)
        dual = multiplier[:, None]
        slope = (torch.where(size > 0, losses / size, 0.0) + 2 * dual * Ga) / (1 + dual)
        step = self.lr * share / count.clamp(min=1.0)
        moved = project_to_simplex(alpha - step * slope, usable, share, self.floor / N)
        learned[:, ids] = torch.where(usable, moved, learned[:, ids])
        budget = 1.0 / count.clamp(min=1.0)[:, 0] if self.budget is None else self.budget
        multiplier += self.dual_lr * torch.where(usable.any(1), (part * Ga).sum(1) - budget, 0.0)
        multiplier.clamp_(min=0.0)


def project_to_simplex(x: torch.Tensor, usable: torch.Tensor, total: torch.Tensor, floor: float) -> torch.Tensor:
    """The nearest point with entries of at least ``floor`` and a given sum, by group.

    Args:
        x: ``[K, T]``.
        usable: ``[K, T]`` bool, the entries that count.
        total: ``[K, 1]``, at least ``floor`` times their number.
        floor: the least entry.

    Returns:
        ``[K, T]``; for entries that do not count, ``floor``.
    """
    above = torch.where(usable, x - floor, -torch.inf)
    room = total - floor * usable.sum(1, keepdim=True, dtype=x.dtype)  # [K, 1]
    ranked = above.sort(1, descending=True).values
    sums = torch.where(ranked.isfinite(), ranked, 0.0).cumsum(1)
    counts = torch.arange(1, x.shape[1] + 1, device=x.device)
    positive = (ranked - (sums - room) / counts > 0).sum(1, keepdim=True).clamp(min=1)
    threshold = (sums.gather(1, positive - 1) - room) / positive
    return (above - threshold).clamp(min=0.0) + floor
