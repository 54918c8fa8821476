"""The gradients of all tasks in one group, as long as they are needed."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from ..groups import ParameterGroups, ParameterSlot
from .arena import Arena


class Part(NamedTuple):
    """A parameter of the model, or a view of it, as strides in the parameter's own memory."""

    parameter: int  # index among groups.parameters
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class Target:
    """Where the gradients ``[T, ...]`` of one use of a parameter are to be added.

    Args:
        memory: of any strides.
        begin: called before something is added, with whether all of ``memory`` will be written; says if it is to be
            overwritten. Without it, it is to be added to.
    """

    def __init__(self, memory: torch.Tensor, begin: Callable[[bool], bool] | None = None) -> None:
        self._memory = memory
        self._begin = begin

    @property
    def size(self) -> torch.Size:
        """Of one task's gradient."""
        return self._memory.shape[1:]

    @property
    def dtype(self) -> torch.dtype:
        """What is added up in."""
        return self._memory.dtype

    @property
    def gradients(self) -> torch.Tensor:
        """``[T, ...]``, to be added to in place."""
        if self._begin is not None:
            self._begin(False)
        return self._memory

    def overwritten(self) -> tuple[torch.Tensor, int]:
        """``[T, ...]``, and the factor of what it holds: with 0, all of it is to be written now."""
        return self._memory, int(self._begin is None or not self._begin(True))


class Table(NamedTuple):
    """The gradients of those rows of an embedding that were looked up."""

    gradients: torch.Tensor  # [T, U, D]
    rows: torch.Tensor  # [U], ascending


class Slab:
    """``[T, P_group]``, where an embedding has no columns but those of the rows that were looked up.

    Args:
        group: the one group, its columns from 0 on.
        members: the index among all parameters of each of ``group.parameters``.
        looked_up: by index, the rows ``[U]`` of the embeddings that are used in no other way.
        num_tasks: T.
        arena: where the memory comes from.
    """

    def __init__(
        self,
        group: ParameterGroups,
        members: Sequence[int],
        looked_up: Mapping[int, torch.Tensor],
        num_tasks: int,
        arena: Arena,
    ) -> None:
        self._slots: dict[int, ParameterSlot] = dict(zip(members, group.parameters))
        self._rows = {index: looked_up[index] for index in members if index in looked_up}
        self._columns: dict[int, tuple[int, int]] = {}
        end = 0
        for index, slot in self._slots.items():
            begin = end if self._rows else slot.offset
            end = begin + (len(self._rows[index]) * slot.shape[1] if index in self._rows else slot.numel)
            self._columns[index] = begin, end
        # Its identity in the model, which chooses the orders, stays.
        self.groups = ParameterGroups(group.names, (0, end), (end,), group.first) if self._rows else group
        self._arena = arena
        self._memory = arena.take(num_tasks * self.groups.numel)
        self._begun: set[int] = set()  # whose columns are not what was left there

    @property
    def grads(self) -> torch.Tensor:
        """``[T, P_group]``; columns that nothing was added to are zero."""
        for index in self._slots:
            self._begin(index)
        return self._whole()

    def target(self, part: Part) -> Target | Table:
        """``[T, *part.size]``."""
        column, end = self._columns[part.parameter]
        rows = self._rows.get(part.parameter)
        if rows is None:
            begin = functools.partial(self._begin, part.parameter, math.prod(part.size) == end - column)
            return Target(view_of(self._whole(), part, column), begin)
        self._begin(part.parameter)
        return Table(self._whole()[:, column:end].unflatten(1, (len(rows), -1)), rows)

    def result(self, out: torch.Tensor) -> torch.Tensor:
        """Where the update ``[P_group]`` of these columns goes: ``out`` itself, if all columns are there."""
        return self._arena.take(self.groups.numel) if self._rows else out

    def spread(self, update: torch.Tensor, out: torch.Tensor) -> None:
        """Put what is in :meth:`result` where it belongs in ``out``, all columns of the group."""
        if update is out:
            return
        for index, slot in self._slots.items():
            column, end = self._columns[index]
            its = out[slot.offset : slot.offset + slot.numel]
            if index in self._rows:
                its.zero_()
                its.view(slot.shape).index_copy_(0, self._rows[index], update[column:end].view(-1, slot.shape[1]))
            else:
                its.copy_(update[column:end])
        self._arena.give_back(update)

    def release(self) -> None:
        """Its memory is needed no more."""
        self._arena.give_back(self._memory)

    def _whole(self) -> torch.Tensor:
        return self._memory.view(-1, self.groups.numel)

    def _begin(self, index: int, complete: bool = False, to_be_written: bool = False) -> bool:
        """Columns that nothing was added to are zero from now on; unless they are all to be written: then True."""
        if index in self._begun:
            return False
        self._begun.add(index)
        if complete and to_be_written:
            return True
        column, end = self._columns[index]
        self._whole()[:, column:end].zero_()
        return False


def view_of(slab: torch.Tensor, part: Part, column: int) -> torch.Tensor:
    """``[T, *part.size]``: a part of a parameter that begins at a column of a slab ``[T, P]``."""
    offset = slab.storage_offset() + column + part.offset
    return slab.as_strided((len(slab), *part.size), (slab.stride(0), *part.stride), offset)
