"""GradNorm: loss weights that keep the tasks' gradients in step."""

from __future__ import annotations

import torch

from .. import checks
from .weighting import Measured, State, Weighting, mean


class GradNorm(Weighting):
    """GradNorm (Chen et al., "GradNorm: Gradient Normalization for Adaptive Loss Balancing", ICML 2018), by group.

    Each task's loss weight w_i follows the gradient of ``sum_i |w_i n_i - mean(w n) r_i^alpha|``, the second term held
    constant, where n_i is the norm of its gradient and r_i its relative inverse training rate: ``L_i / L_i(first)``
    over the mean of that. The weights of a step are those learned in the steps before, and their sum stays N. Norms
    are taken relative to their mean, so that the scale of the losses does not matter; the paper leaves that to Adam. A
    weight does not fall below 0.

    One weight a task, as in the paper, is the granularity ``"whole_model"``. Losses are positive.

    Args:
        alpha: strength of the pull to equal training rates (1.5 in the paper).
        lr: step size of the weights (0.025 in the paper, with Adam).
        num_tasks: N. Needed where batches hold some of the tasks only; else it is the rows of the first call.

    Raises:
        TypeError, ValueError: an argument is not a number, or negative.
    """

    needs_losses = True

    def __init__(self, alpha: float = 1.5, lr: float = 0.025, num_tasks: int | None = None) -> None:
        super().__init__(num_tasks)
        self.alpha = checks.check_real("alpha", alpha, 0.0)
        self.lr = checks.check_real("lr", lr, 0.0)

    def initial(self, K: int, N: int) -> State:
        return {
            "weights": torch.ones(K, N, dtype=torch.float64),
            "first_losses": torch.full((N,), torch.nan, dtype=torch.float64),
        }

    def weights(self, measured: Measured, state: State) -> torch.Tensor:
        return state["weights"][measured.rows][:, measured.task_ids]

    def learn(self, measured: Measured, losses: torch.Tensor | None, state: State) -> None:
        assert losses is not None
        ids, learned = measured.task_ids, state["weights"][measured.rows]  # a view
        first = state["first_losses"][ids]  # [T]
        first = torch.where(first.isnan() & losses.isfinite() & (losses > 0), losses, first)
        state["first_losses"][ids] = first
        rate = losses / first  # [T]
        usable = measured.usable & (rate.isfinite() & (rate >= 0))  # [K, T]
        w = learned[:, ids]
        n = relative(measured.G.diagonal(dim1=1, dim2=2).sqrt(), usable)
        goal = mean(w * n, usable) * relative(rate.expand_as(n), usable) ** self.alpha
        moved = (w - self.lr * torch.sign(w * n - goal) * n).clamp(min=0.0)
        before, after = (torch.where(usable, x, 0.0).sum(1, keepdim=True) for x in (w, moved))
        learned[:, ids] = torch.where(usable & (after > 0), moved * (before / after), w)


def relative(values: torch.Tensor, usable: torch.Tensor) -> torch.Tensor:
    """``[K, T]``, the usable ones over their mean; the others 0."""
    scale = mean(values, usable)
    return torch.where(usable & (scale > 0), values / scale, 0.0)
