"""Methods that find weights from Gram matrices and combine: no gradient is turned by itself."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .. import checks, ops
from ..groups import ParameterGroups
from ..numerics import precision
from ..result import Coefficients, Vaccination
from .method import Method, check_state, check_task_ids, place_in_step


class Measured(NamedTuple):
    """Gram matrices of some groups, cleared of the rows that cannot be measured there."""

    G: torch.Tensor
    """``[K, T, T]`` float64; rows and columns that are zero or non-finite are 0, with 1 on the diagonal."""
    usable: torch.Tensor
    """``[K, T]`` bool: the others."""
    task_ids: torch.Tensor
    """``[T]`` int64, which task each row is."""
    rows: slice
    """Which of all K groups these are."""
    noise: float
    """Of the squares' size, what may be rounding."""


State = dict[str, torch.Tensor]


class Weighting(Method):
    """A method that maps Gram matrices ``[K, T, T]`` to weights ``[K, T]``.

    A row that is zero or non-finite in a group is left out there: it has weight 0 where it is zero and 1 where it is
    not finite, so that a non-finite value reaches the update. In the result, ``similarity`` holds the cosines of the
    gradients themselves and ``corrected`` is False: none is turned.

    Args:
        num_tasks: N. Needed where batches hold some of the tasks only; else it is the rows of the first call.

    Attributes:
        step: the number of calls so far.
        state: what the method has learned, float64 tensors by name; empty before the first call.
    """

    def __init__(self, num_tasks: int | None = None) -> None:
        if num_tasks is not None:
            checks.check_int("num_tasks", num_tasks, 1)
        self.num_tasks = num_tasks
        self.step = 0
        self.state: State = {}

    @abstractmethod
    def weights(self, measured: Measured, state: State) -> torch.Tensor:
        """``[K, T]`` float64, from the state of before the step; what it holds for unusable rows does not matter."""

    def learn(self, measured: Measured, losses: torch.Tensor | None, state: State) -> None:
        """The step is over: advance the state of these groups, in place."""

    def initial(self, K: int, N: int) -> State:
        """The state before the first step; the first value is ``[K, N]``."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs, for ``torch.save``: a copy of the state, and the step."""
        learned = {name: self.state[name].clone() if self.state else None for name in self.initial(0, 0)}
        return {"num_tasks": self.num_tasks, "step": self.step, **learned}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        num_tasks = check_state(state, self.state_dict(), self.num_tasks)
        checks.check_int("state['step']", state["step"], 0)
        names = list(self.initial(0, 0))
        learned = {name: state[name] for name in names if state[name] is not None}
        if learned:
            if state["num_tasks"] is None:
                raise ValueError("state['num_tasks']: expected an int, the number of tasks of its tensors, got None")
            checks.check_tensor(f"state[{names[0]!r}]", state[names[0]], (torch.float64,), (None, num_tasks))
            for name, wanted in self.initial(len(state[names[0]]), num_tasks or 0).items():
                checks.check_tensor(f"state[{name!r}]", state[name], (torch.float64,), tuple(wanted.shape))
                if not bool((wanted.isnan() & state[name].isnan() | state[name].isfinite() & (state[name] >= 0)).all()):
                    raise ValueError(f"state[{name!r}]: expected finite numbers of at least 0, got others")
        self.num_tasks, self.step = num_tasks, state["step"]
        self.state = {name: value.clone().contiguous() for name, value in learned.items()}

    def _begin(self, groups: ParameterGroups, num_rows: int, device: torch.device) -> WeightingStep:
        num_tasks = num_rows if self.num_tasks is None else self.num_tasks
        state = self.state or self.initial(len(groups), num_tasks)
        for name in list(state)[:1]:
            if len(state[name]) != len(groups):
                known = len(state[name])
                raise ValueError(f"groups: expected the {known} groups of the calls before, got {len(groups)}")
        return WeightingStep(self, groups, num_tasks, {name: value.to(device) for name, value in state.items()})

    def _commit(self, step: WeightingStep) -> None:
        state = {name: value.clone() for name, value in step.state.items()}
        for measured in step.measured:
            self.learn(measured, step.losses, state)
        self.num_tasks, self.state = step.num_tasks, state
        self.step += 1


class WeightingStep:
    """One step of a :class:`Weighting`; the state advances when all slabs have been through."""

    def __init__(self, method: Weighting, groups: ParameterGroups, num_tasks: int, state: State) -> None:
        self.num_tasks = num_tasks
        self.state = state
        self.losses: torch.Tensor | None = None
        self.measured: list[Measured] = []
        self._method = method
        self._groups = groups

    def vaccinate(
        self,
        grads: torch.Tensor,
        groups: ParameterGroups,
        task_ids: torch.Tensor | Sequence[int] | None,
        out: torch.Tensor | None,
    ) -> Vaccination:
        """Gram, weights, combine."""
        G = ops.gram(grads, groups)
        found = self.weigh(G, groups, task_ids, grads.dtype)
        return Vaccination(ops.combine(grads, found.weights, groups, out=out), *found, G)

    def weigh(
        self,
        G: torch.Tensor,
        groups: ParameterGroups,
        task_ids: torch.Tensor | Sequence[int] | None,
        dtype: torch.dtype,
    ) -> Coefficients:
        """The weights alone, from Gram matrices ``[K, T, T]`` of gradients of ``dtype``."""
        num_rows, first = G.shape[1], place_in_step(groups, self._groups)
        ids = check_task_ids(task_ids, num_rows, self.num_tasks)
        limits, square = precision(dtype), G.diagonal(dim1=1, dim2=2)  # [K, T]
        usable = (square >= limits.smallest) & (square <= limits.largest)  # False for NaN
        both = usable[:, :, None] & usable[:, None, :]
        eye = torch.eye(num_rows, dtype=torch.bool, device=G.device)
        clean = torch.where(both, G, eye.to(G.dtype))
        given = ops.as_ids("task_ids", ids, G.device)
        task_ids = torch.arange(num_rows, device=G.device) if given is None else given
        measured = Measured(clean, usable, task_ids, slice(first, first + len(groups)), limits.noise)
        weights = self._method.weights(measured, self.state)
        self.measured.append(measured)
        left_out = torch.where(square.abs() < limits.smallest, 0.0, 1.0)  # NaN is not below
        norm = clean.diagonal(dim1=1, dim2=2).sqrt()
        cosine = (clean / norm[:, :, None] / norm[:, None, :]).clamp(-1.0, 1.0)
        return Coefficients(
            torch.where(usable, weights, left_out),
            torch.where(both & ~eye, cosine, torch.nan),
            torch.zeros_like(both),
        )


def mean(values: torch.Tensor, usable: torch.Tensor) -> torch.Tensor:
    """``[K, 1]``: the mean of the usable ones of ``[K, T]``."""
    return torch.where(usable, values, 0.0).sum(1, keepdim=True) / usable.sum(1, keepdim=True).clamp(min=1)
