"""Where the gradients of the tasks go: into the buffer's rows, or through slabs, group by group, into the update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from .. import ops
from ..groups import ParameterGroups
from ..result import Vaccination
from .arena import Arena
from .uses import Part, Use


class Sink(Protocol):
    """Takes what the backward pass delivers."""

    fired: set[int]
    """Parameters whose gradients are complete."""

    def expect(self, parameters: Sequence[int]) -> None:
        """The parameters whose gradients a backward that begins now will complete."""

    def add(self, use: Use) -> None:
        """The gradients of one use."""

    def add_row(self, parameter: int, row: int, grad: torch.Tensor) -> None:
        """A gradient of one task."""

    def complete(self, parameter: int) -> None:
        """All gradients of the parameter are there."""


class BufferSink:
    """Adds everything to the rows of a buffer.

    Args:
        grads: ``[T, P]``, a slab of all groups, the rows in the order of the batch's tasks.
    """

    def __init__(self, groups: ParameterGroups, grads: torch.Tensor) -> None:
        self.fired: set[int] = set()
        self._groups = groups
        self._grads = grads

    def expect(self, parameters: Sequence[int]) -> None:
        """Any number of times."""

    def add(self, use: Use) -> None:
        use.add([part and self._view(part) for part in use.parts])

    def add_row(self, parameter: int, row: int, grad: torch.Tensor) -> None:
        slot = self._groups.parameters[parameter]
        self._view(Part(parameter, slot.shape, slot.stride, 0))[row] += grad

    def complete(self, parameter: int) -> None:
        self.fired.add(parameter)

    def _view(self, part: Part) -> torch.Tensor:
        return view_of(self._grads, part, self._groups.parameters[part.parameter].offset)


def view_of(slab: torch.Tensor, part: Part, column: int) -> torch.Tensor:
    """``[T, *part.size]``: a part of a parameter that begins at a column of a slab ``[T, P]``."""
    offset = slab.storage_offset() + column + part.offset
    return slab.as_strided((len(slab), *part.size), (slab.stride(0), *part.stride), offset)


class StreamSink:
    """Vaccinates every group as soon as it is complete, and keeps its slab no longer.

    A group of ``coarse`` has no slab: its uses are kept, its Gram matrix is summed over the parameters, one small slab
    at a time, and its update is one more gradient, of the weighted results.

    Args:
        groups: the K groups.
        slabs: ``groups[k : k + 1]`` for each k.
        coarse: the groups that are too large for a slab.
        num_tasks: T, the tasks of the batch.
        step: the method's, see :meth:`GradVac.in_parts`.
        task_ids: which task each row is.
        result: ``[P]``, where the update goes.
        arena: where slabs come from.
    """

    def __init__(
        self,
        groups: ParameterGroups,
        slabs: Sequence[ParameterGroups],
        coarse: frozenset[int],
        num_tasks: int,
        step: Any,
        task_ids: tuple[int, ...],
        result: torch.Tensor,
        arena: Arena,
    ) -> None:
        self.fired: set[int] = set()
        self._found: dict[int, Vaccination] = {}  # by group
        self._groups = groups
        self._slabs = slabs
        self._coarse = coarse
        self._num_tasks = num_tasks
        self._step = step
        self._task_ids = task_ids
        self._result = result
        self._arena = arena
        self._open: dict[int, torch.Tensor] = {}  # by group: its slab
        self._begun: set[int] = set()  # parameters whose columns of the slab are not what was left there
        self._pending: dict[int, set[int]] = {}  # by group: parameters that this backward will complete
        self._uses: dict[int, list[Use]] = {}  # by parameter of a coarse group
        self._dense: dict[int, torch.Tensor] = {}  # by parameter of a coarse group: [T, *shape]
        self._members: list[list[int]] = [[] for _ in range(len(groups))]
        for index, slot in enumerate(groups.parameters):
            self._members[slot.group].append(index)

    def expect(self, parameters: Sequence[int]) -> None:
        for index in parameters:
            slot = self._groups.parameters[index]
            if slot.group in self._found:
                raise RuntimeError(
                    f"batch: expected one backward, and each group's parameters in it once, got another gradient of "
                    f"{slot.name!r} after its group was vaccinated; several backwards need batch(..., keep=True), "
                    "activation checkpointing needs use_reentrant=False"
                )
            self._pending.setdefault(slot.group, set()).add(index)

    def add(self, use: Use) -> None:
        now = [part is not None and self._group_of(part) not in self._coarse for part in use.parts]
        if any(now):
            use.add([self._view(part) if wanted and part else None for part, wanted in zip(use.parts, now)])
        for part, wanted in zip(use.parts, now):
            if part is not None and not wanted:
                self._uses.setdefault(part.parameter, []).append(use)

    def add_row(self, parameter: int, row: int, grad: torch.Tensor) -> None:
        slot = self._groups.parameters[parameter]
        whole = Part(parameter, slot.shape, slot.stride, 0)
        if slot.group not in self._coarse:
            self._view(whole)[row] += grad
            return
        if parameter not in self._dense:
            self._dense[parameter] = self._result.new_zeros(self._num_tasks, slot.numel)
        view_of(self._dense[parameter], whole, 0)[row] += grad

    def complete(self, parameter: int) -> None:
        self.fired.add(parameter)
        group = self._groups.parameters[parameter].group
        pending = self._pending[group]
        pending.discard(parameter)
        if not pending:
            self._finish(group)

    def close(self) -> Vaccination:
        """Vaccinate what no backward reached, rows of zeros, and put all together."""
        missing = [self._groups.parameters[i].name for pending in self._pending.values() for i in sorted(pending)]
        if missing:
            raise RuntimeError(f"batch: expected a backward that finishes, got no gradient of {missing[0]!r}")
        for group in range(len(self._groups)):
            if group not in self._found:
                self._finish(group)
        parts = [self._found[group] for group in range(len(self._groups))]
        _, weights, similarity, corrected = map(list, zip(*parts))
        return Vaccination(self._result, torch.cat(weights), torch.cat(similarity), torch.cat(corrected))

    def _finish(self, group: int) -> None:
        begin, end = self._groups.offsets[group], self._groups.offsets[group + 1]
        out = self._result[begin:end]
        if group in self._coarse:
            self._found[group] = self._finish_coarse(group, out)
            return
        slab = self._slab(group)
        for index in self._members[group]:
            if index not in self._begun:
                slot = self._groups.parameters[index]
                self._view(Part(index, slot.shape, slot.stride, 0))  # no task used it
        self._found[group] = self._step.vaccinate(slab, self._slabs[group], self._task_ids, out)
        self._arena.give_back(self._open.pop(group).flatten())

    def _finish_coarse(self, group: int, out: torch.Tensor) -> Vaccination:
        G = torch.zeros(1, self._num_tasks, self._num_tasks, dtype=torch.float64, device=out.device)
        for index in self._members[group]:
            slot = self._groups.parameters[index]
            uses = self._uses.get(index, ())
            if not uses and index not in self._dense:
                continue
            memory = self._arena.take(self._num_tasks * slot.numel)
            slab = memory.view(self._num_tasks, slot.numel)
            if index in self._dense:
                slab.copy_(self._dense[index])
            else:
                slab.zero_()
            for use in uses:
                use.add([view_of(slab, part, 0) if part and part.parameter == index else None for part in use.parts])
            G += ops.gram(slab, ParameterGroups.from_sizes({slot.name: slot.numel}))
            self._arena.give_back(memory)
        found = self._step.weigh(G, self._slabs[group], self._task_ids, out.dtype)
        weights = found.weights[0]
        out.zero_()
        for index in self._members[group]:
            slot = self._groups.parameters[index]
            row = self._result[slot.offset : slot.offset + slot.numel].unsqueeze(0)
            if index in self._dense:
                row += (weights @ self._dense.pop(index).to(weights.dtype)).to(row.dtype)
            for use in self._uses.pop(index, ()):
                use.add_weighted(
                    weights, [view_of(row, part, 0) if part and part.parameter == index else None for part in use.parts]
                )
        return Vaccination(out, *found)

    def _group_of(self, part: Part) -> int:
        return self._groups.parameters[part.parameter].group

    def _slab(self, group: int) -> torch.Tensor:
        if group not in self._open:
            columns = self._slabs[group].numel
            self._open[group] = self._arena.take(self._num_tasks * columns).view(self._num_tasks, columns)
        return self._open[group]

    def _view(self, part: Part) -> torch.Tensor:
        slot = self._groups.parameters[part.parameter]
        slab = self._slab(slot.group)
        column = slot.offset - self._groups.offsets[slot.group]
        if part.parameter not in self._begun:  # not the whole slab at once: these columns are in the cache then
            self._begun.add(part.parameter)
            slab[:, column : column + slot.numel].zero_()
        return view_of(slab, part, column)
