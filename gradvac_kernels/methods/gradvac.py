"""Gradient Vaccine with its state: the similarity targets and the step counter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .. import checks, ops
from ..groups import ParameterGroups
from ..result import Coefficients, Vaccination
from .method import Method, check_state, check_task_ids, place_in_step


class GradVac(Method):
    """Gradient Vaccine (Wang et al., ICLR 2021, Algorithm 1) and the moving averages it keeps between steps.

    Args:
        beta: weight of a new similarity in the moving average, in [0, 1] (1e-2 in the paper).
        vaccinated: ids of the tasks whose gradients may be turned; None means all, an empty sequence is the plain sum.
        target: a constant similarity target instead of the moving average (0 is PCGrad).
        num_tasks: N. Needed where batches hold some of the tasks only; else it is the rows of the first call.
        seed: chooses the random orders of the inner loop.
        capturable: keep the step in a tensor beside the gradients, so that every replay of a captured CUDA graph draws
            a new order. Call once, and load any state, before capture.

    Attributes:
        ema: ``[K, N, N]`` float64, the targets by group and ordered pair of tasks; None before the first call and with
            a constant target.
        step: the number of calls so far (with ``capturable``, reading it waits for the device).

    Raises:
        TypeError, ValueError: an argument is not of the type or range above.
    """

    def __init__(
        self,
        beta: float = 1e-2,
        vaccinated: Sequence[int] | None = None,
        target: float | None = None,
        num_tasks: int | None = None,
        seed: int = 0,
        capturable: bool = False,
    ) -> None:
        checks.check_settings(beta, target, seed)
        if not isinstance(capturable, bool):
            raise TypeError(f"capturable: expected a bool, got {capturable!r}")
        if num_tasks is not None:
            checks.check_int("num_tasks", num_tasks, 1)
        if vaccinated is not None:
            vaccinated = checks.check_ids("vaccinated", vaccinated)
            checks.check_range("vaccinated", vaccinated, num_tasks)
        self.beta = beta
        self.vaccinated = vaccinated
        self.target = target
        self.num_tasks = num_tasks
        self.seed = seed
        self.capturable = capturable
        self._step: int | torch.Tensor = 0
        self.ema: torch.Tensor | None = None

    @property
    def step(self) -> int:
        return int(self._step)

    def bind(self, num_tasks: int) -> None:
        if self.vaccinated is not None:
            checks.check_range("method.vaccinated", self.vaccinated, num_tasks)
        super().bind(num_tasks)

    def _begin(self, groups: ParameterGroups, num_rows: int, device: torch.device) -> VaccineStep:
        num_tasks, ema = self.num_tasks, self.ema
        if num_tasks is None:
            num_tasks = num_rows
        if self.target is None:
            if ema is None:
                ema = torch.zeros(len(groups), num_tasks, num_tasks, dtype=torch.float64, device=device)
            elif len(ema) != len(groups):
                raise ValueError(f"groups: expected the {len(ema)} groups of the calls before, got {len(groups)}")
            ema = ema.to(device)  # a checkpoint may have been loaded elsewhere
        step = self._step
        if self.capturable:
            with torch.inference_mode(False):  # it is counted up in place, also when that mode is over
                step = torch.as_tensor(step, device=device)
        return VaccineStep(self, groups, num_tasks, ema, step)

    def _commit(self, step: VaccineStep) -> None:
        self.num_tasks, self.ema = step.num_tasks, step.ema
        self._step = step.number
        self._step += 1  # a tensor in place: a captured graph counts on

    def _remember(self, step: VaccineStep) -> None:
        step.before = None if step.ema is None else step.ema.clone()

    def _abandon(self, step: VaccineStep) -> None:
        if step.ema is not None and step.before is not None:
            step.ema.copy_(step.before)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs, for ``torch.save``: a copy of the targets, the step and the seed of the orders."""
        return {
            "ema": None if self.ema is None else self.ema.clone(),
            "num_tasks": self.num_tasks,
            "seed": self.seed,
            "step": self.step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        bound = check_state(state, self.state_dict(), self.num_tasks)
        ema, num_tasks = state["ema"], state["num_tasks"]
        checks.check_int("state['seed']", state["seed"])
        checks.check_int("state['step']", state["step"], 0)
        if ema is not None:
            if num_tasks is None:
                raise ValueError("state['num_tasks']: expected an int, the number of tasks of state['ema'], got None")
            if self.target is not None:
                raise ValueError("state['ema']: expected None for a method with a constant target")
            checks.check_tensor("state['ema']", ema, (torch.float64,), (None, num_tasks, num_tasks))
            if not bool(ema.isfinite().all()):
                raise ValueError("state['ema']: expected finite targets, got some that are not")
        if self.vaccinated is not None:
            checks.check_range("state['num_tasks']: vaccinated", self.vaccinated, num_tasks)
        self.ema = None if ema is None else ema.clone().contiguous()
        self.num_tasks = bound
        self.seed, self._step = state["seed"], state["step"]


class VaccineStep:
    """One step of a :class:`GradVac`: slabs of groups against the targets of before it.

    Attributes:
        num_tasks: N.
        ema: ``[K, N, N]`` of all groups, updated slab by slab; None with a constant target.
        number: of the step, for the orders.
        losses: not needed.
    """

    def __init__(
        self,
        method: GradVac,
        groups: ParameterGroups,
        num_tasks: int,
        ema: torch.Tensor | None,
        number: int | torch.Tensor,
    ) -> None:
        self.num_tasks = num_tasks
        self.ema = ema
        self.number = number
        self.losses: torch.Tensor | None = None
        self.before: torch.Tensor | None = None  # the targets, to go back to
        self._method = method
        self._groups = groups

    def vaccinate(
        self,
        grads: torch.Tensor,
        groups: ParameterGroups,
        task_ids: torch.Tensor | Sequence[int] | None,
        out: torch.Tensor | None,
    ) -> Vaccination:
        """Like the call of the method, for the groups of a slab ``grads``."""
        return ops.vaccinate(grads, groups, out=out, **self._rule(groups, len(grads), grads.device, task_ids))

    def weigh(
        self,
        G: torch.Tensor,
        groups: ParameterGroups,
        task_ids: torch.Tensor | Sequence[int] | None,
        dtype: torch.dtype,
    ) -> Coefficients:
        """The weights alone, from Gram matrices ``[K, T, T]`` of gradients of ``dtype``."""
        return ops.coefficients(G, groups, dtype=dtype, **self._rule(groups, G.shape[1], G.device, task_ids))

    def _rule(
        self,
        groups: ParameterGroups,
        num_rows: int,
        device: torch.device,
        task_ids: torch.Tensor | Sequence[int] | None,
    ) -> dict[str, Any]:
        task_ids = check_task_ids(task_ids, num_rows, self.num_tasks)
        first = place_in_step(groups, self._groups)
        return {
            "ema": None if self.ema is None else self.ema[first : first + len(groups)],
            "beta": self._method.beta,
            "target": self._method.target,
            "task_ids": task_ids,
            "vaccinated": self._method.vaccinated,
            "seed": self._method.seed,
            "step": self.number,
        }
