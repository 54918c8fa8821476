"""What every method shares: one step as a call, or slab by slab, and a state that advances when the step is over."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from .. import checks
from ..groups import ParameterGroups
from ..numerics import DTYPES
from ..result import Coefficients, Vaccination


class Step(Protocol):
    """One step of a method: slabs of groups, against the state of before it."""

    losses: torch.Tensor | None
    """``[T]``, the loss of each row's task; set before the step is over."""

    def vaccinate(
        self,
        grads: torch.Tensor,
        groups: ParameterGroups,
        task_ids: torch.Tensor | Sequence[int] | None,
        out: torch.Tensor | None,
    ) -> Vaccination:
        """Like the call of the method, for the groups of a slab ``grads``."""

    def weigh(
        self,
        G: torch.Tensor,
        groups: ParameterGroups,
        task_ids: torch.Tensor | Sequence[int] | None,
        dtype: torch.dtype,
    ) -> Coefficients:
        """The weights alone, from Gram matrices ``[K, T, T]`` of gradients of ``dtype``."""


class Method(ABC):
    """From the gradients of the tasks to one update, by weights for each parameter group.

    Attributes:
        num_tasks: N, or None until it is known.
        needs_losses: whether a step has to be given the tasks' losses.
    """

    num_tasks: int | None = None
    needs_losses: bool = False

    def __call__(
        self,
        grads: torch.Tensor,
        groups: ParameterGroups,
        task_ids: torch.Tensor | Sequence[int] | None = None,
        out: torch.Tensor | None = None,
        losses: torch.Tensor | None = None,
    ) -> Vaccination:
        """Make one step's update and advance the state.

        Args:
            grads: ``[T, P]``, one row a task of this batch.
            groups: the K groups of the P columns, the same in every call.
            task_ids: ``[T]``, which of the N tasks each row is; may be None when the batch holds all of them in order.
            out: ``[P]``, where the update goes; None makes a new tensor.
            losses: ``[T]``, the loss of each row's task, for the methods that need it.

        Returns:
            A :class:`Vaccination`.

        Raises:
            TypeError, ValueError: as :func:`gradvac_kernels.vaccinate`; then the state is as it was.
        """
        checks.check_face(grads, groups)
        step = self._begin(groups, len(grads), grads.device)
        step.losses = self._checked_losses(losses, len(grads), grads.device)
        found = step.vaccinate(grads, groups, task_ids, out)
        self._commit(step)
        return found

    @contextmanager
    def in_parts(self, groups: ParameterGroups, num_rows: int, device: torch.device) -> Iterator[Step]:
        """One step, some groups at a time: the bits of one call, for gradients that are never there all at once.

        When the context ends, the state has advanced by one step; after an exception it is as it was.

        Args:
            groups: all K groups.
            num_rows: T, the rows of every slab in this step.
            device: of the gradients.

        Returns:
            What vaccinates a slab ``groups[a:b]``; each group once. Its ``losses`` are set in the context by whoever
            knows them, where the method needs any.

        Raises:
            ValueError: the number of groups does not fit the calls before; in the context, what does not fit there.
        """
        checks.check_groups(groups)
        checks.check_int("num_rows", num_rows, 1)
        step = self._begin(groups, num_rows, device)
        self._remember(step)
        try:
            yield step
            step.losses = self._checked_losses(step.losses, num_rows, device)
        except BaseException:
            self._abandon(step)
            raise
        self._commit(step)

    def bind(self, num_tasks: int) -> None:
        """Say how many tasks there are, N.

        Raises:
            ValueError: the method was made for another number.
        """
        checks.check_int("num_tasks", num_tasks, 1)
        if self.num_tasks not in (None, num_tasks):
            raise ValueError(f"method: expected num_tasks {num_tasks}, got {self.num_tasks}")
        self.num_tasks = num_tasks

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs, for ``torch.save``: a copy."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue, bit for bit, where ``state_dict()`` was taken.

        Raises:
            TypeError: a value is of a wrong type.
            ValueError: keys are missing or unknown, or the numbers of tasks differ. Then nothing was changed.
        """

    @abstractmethod
    def _begin(self, groups: ParameterGroups, num_rows: int, device: torch.device) -> Any:
        """The step that begins now."""

    @abstractmethod
    def _commit(self, step: Any) -> None:
        """It is over."""

    def _remember(self, step: Any) -> None:  # noqa: B027
        """It may fail in the middle: keep what it will change before it is over."""

    def _abandon(self, step: Any) -> None:  # noqa: B027
        """It failed: undo what it has changed."""

    def _checked_losses(self, losses: torch.Tensor | None, num_rows: int, device: torch.device) -> torch.Tensor | None:
        if losses is None:
            if self.needs_losses:
                raise ValueError(f"losses: expected the loss of each task, for {type(self).__name__}, got None")
            return None
        checks.check_tensor("losses", losses, DTYPES, (num_rows,))
        return losses.detach().to(device, torch.float64)


def check_state(state: Mapping[str, Any], expected: Mapping[str, Any], num_tasks: int | None) -> int | None:
    """The keys of a state, and its number of tasks, which is given back.

    Raises:
        TypeError, ValueError: they are not as expected.
    """
    checks.check_keys(state, expected)
    found = state["num_tasks"]
    if found is not None:
        checks.check_int("state['num_tasks']", found, 1)
    if None not in (num_tasks, found) and found != num_tasks:
        raise ValueError(f"state['num_tasks']: expected {num_tasks}, got {found}")
    return num_tasks if found is None else found


def place_in_step(groups: ParameterGroups, of_step: ParameterGroups) -> int:
    """Where a slab's groups begin among those of the step.

    Raises:
        ValueError: they are not among them.
    """
    first = groups.first - of_step.first
    if not 0 <= first <= len(of_step) - len(groups):
        raise ValueError(
            f"groups: expected some of the step's, {of_step.first} to {of_step.first + len(of_step) - 1}, "
            f"got {groups.first} to {groups.first + len(groups) - 1}"
        )
    return first


def check_task_ids(
    task_ids: torch.Tensor | Sequence[int] | None, num_rows: int, num_tasks: int
) -> torch.Tensor | tuple[int, ...] | None:
    """Ids of N tasks for the rows of a step, by value where they lie on the host.

    Raises:
        TypeError, ValueError: they are none of N, or not given where the rows are not all tasks.
    """
    if task_ids is None:
        if num_rows != num_tasks:
            raise ValueError(f"task_ids: expected ids for the {num_rows} of {num_tasks} tasks in grads, got None")
        return None
    if isinstance(task_ids, torch.Tensor):
        checks.check_tensor("task_ids", task_ids, (torch.int64,), (num_rows,))
        if task_ids.device.type != "cpu":
            return task_ids
    else:
        task_ids = checks.check_ids("task_ids", task_ids)
    listed = task_ids.tolist() if isinstance(task_ids, torch.Tensor) else list(task_ids)
    checks.check_range("task_ids", listed, num_tasks)
    if len(listed) != num_rows:
        raise ValueError(f"task_ids: expected shape [{num_rows}], got [{len(listed)}]")
    if len(set(listed)) != num_rows:
        raise ValueError(f"task_ids: expected every task at most once, got {listed}")
    return task_ids
