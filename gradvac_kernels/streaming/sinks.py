"""Where the gradients of the tasks go: into the buffer's rows, or through slabs, group by group, into the update."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.distributed as dist

from .. import ops
from ..groups import ParameterGroups
from ..processes import Processes
from ..result import Vaccination
from .arena import Arena
from .slab import Part, Slab, Table, Target, view_of
from .uses import Use


class Sink(Protocol):
    """Takes what the backward pass delivers."""

    fired: set[int]
    """Parameters whose gradients are complete."""

    def announce(self, parameter: int, looked_up: torch.Tensor | None) -> None:
        """In the forward pass: a use of the parameter, of these rows of it only, or of all."""

    def expect(self, parameters: Sequence[int]) -> None:
        """The parameters whose gradients a backward that begins now will complete."""

    def add(self, use: Use) -> None:
        """The gradients of one use."""

    def rows(self, parameter: int) -> torch.Tensor:
        """Its gradients ``[T, *shape]``, to be added to in place."""

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

    def announce(self, parameter: int, looked_up: torch.Tensor | None) -> None:
        """The buffer has all columns."""

    def expect(self, parameters: Sequence[int]) -> None:
        """Any number of times."""

    def add(self, use: Use) -> None:
        use.add([part and Target(self._view(part)) for part in use.parts])

    def rows(self, parameter: int) -> torch.Tensor:
        slot = self._groups.parameters[parameter]
        return self._view(Part(parameter, slot.shape, slot.stride, 0))

    def complete(self, parameter: int) -> None:
        self.fired.add(parameter)

    def _view(self, part: Part) -> torch.Tensor:
        return view_of(self._grads, part, self._groups.parameters[part.parameter].offset)


class StreamSink:
    """Vaccinates every group as soon as it is complete, and keeps its slab no longer.

    A group of ``coarse`` has no slab: its uses are kept, its Gram matrix is summed over the parameters, one small slab
    at a time, and its update is one more gradient, of the weighted results.

    In a data-parallel job slabs are put together first, in an order that is the same in all processes. One is under way
    while the next is filled; those that are complete before it is their turn wait.

    Args:
        groups: the K groups.
        slabs: ``groups[k : k + 1]`` for each k.
        coarse: the groups that are too large for a slab.
        num_tasks: T, the tasks of the batch.
        step: the method's, see :meth:`GradVac.in_parts`.
        task_ids: which task each row is.
        result: ``[P]``, where the update goes.
        arena: where slabs come from.
        processes: of a data-parallel job.
        shares: ``[T]``, what the rows of all processes are divided by.
        order: of the groups, in which they are put together.

    Attributes:
        completed: the groups, in the order in which they were complete.
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
        processes: Processes | None = None,
        shares: torch.Tensor | None = None,
        order: Sequence[int] = (),
    ) -> None:
        self.fired: set[int] = set()
        self.completed: dict[int, None] = {}
        self._found: dict[int, Vaccination] = {}  # by group
        self._expected = deque(order)  # groups
        self._under_way: deque[tuple[int, dist.Work]] = deque()  # groups
        self._processes = processes
        self._shares = torch.ones(num_tasks, dtype=torch.float64) if shares is None else shares
        self._groups = groups
        self._slabs = slabs
        self._coarse = coarse
        self._num_tasks = num_tasks
        self._step = step
        self._task_ids = task_ids
        self._result = result
        self._arena = arena
        self._open: dict[int, Slab] = {}  # by group
        self._announced: dict[int, list[torch.Tensor] | None] = {}  # by parameter: rows of an embedding; None: all
        self._looked_up: dict[int, torch.Tensor] = {}  # by parameter, once its slab was opened: these rows
        self._pending: dict[int, Counter[int]] = {}  # by group: how often backwards will still complete a parameter
        self._uses: dict[int, list[Use]] = {}  # by parameter of a coarse group
        self._dense: dict[int, torch.Tensor] = {}  # by parameter of a coarse group: [T, *shape]
        self._members: list[list[int]] = [[] for _ in range(len(groups))]
        for index, slot in enumerate(groups.parameters):
            self._members[slot.group].append(index)

    def announce(self, parameter: int, looked_up: torch.Tensor | None) -> None:
        if parameter in self._looked_up:  # again, by a checkpoint that recomputes
            if looked_up is None or not bool(torch.isin(looked_up, self._looked_up[parameter]).all()):
                raise self._late(parameter)
        elif looked_up is None:
            self._announced[parameter] = None
        else:
            rows = self._announced.setdefault(parameter, [])
            if rows is not None:
                rows.append(looked_up)

    def expect(self, parameters: Sequence[int]) -> None:
        for index in parameters:
            slot = self._groups.parameters[index]
            if slot.group in self.completed:
                raise self._late(index)
            self._pending.setdefault(slot.group, Counter())[index] += 1

    def add(self, use: Use) -> None:
        for part in use.parts:
            if part is not None and self._group_of(part) in self.completed:
                raise self._late(part.parameter)
        now = [part is not None and self._group_of(part) not in self._coarse for part in use.parts]
        if any(now):
            use.add([self._target(part) if wanted and part else None for part, wanted in zip(use.parts, now)])
        kept = {part.parameter for part, wanted in zip(use.parts, now) if part is not None and not wanted}
        for index in kept:
            self._uses.setdefault(index, []).append(use)

    def rows(self, parameter: int) -> torch.Tensor:
        slot = self._groups.parameters[parameter]
        whole = Part(parameter, slot.shape, slot.stride, 0)
        if slot.group not in self._coarse:
            return self._target(whole).gradients
        if parameter not in self._dense:
            self._dense[parameter] = self._result.new_zeros(self._num_tasks, slot.numel)
        return view_of(self._dense[parameter], whole, 0)

    def complete(self, parameter: int) -> None:
        self.fired.add(parameter)
        group = self._groups.parameters[parameter].group
        if group in self.completed:
            raise self._late(parameter)
        pending = self._pending[group]
        pending[parameter] -= 1
        if not +pending:
            self._finish(group)

    def close(self) -> Vaccination:
        """Vaccinate what no backward reached, rows of zeros, and put all together."""
        missing = [self._groups.parameters[i].name for pending in self._pending.values() for i in sorted(+pending)]
        if missing:
            raise RuntimeError(f"batch: expected a backward that finishes, got no gradient of {missing[0]!r}")
        for group in range(len(self._groups)):
            if group not in self.completed:
                self._finish(group)
        while self._under_way:
            self._arrive()
        parts = [self._found[group] for group in range(len(self._groups))]
        _, *measured = zip(*parts)
        return Vaccination(self._result, *map(torch.cat, measured))

    def _finish(self, group: int) -> None:
        self.completed[group] = None
        if self._processes is None:
            self._vaccinate(group)
            return
        while self._expected and self._expected[0] in self.completed:
            following = self._expected.popleft()
            if following in self._coarse:
                self._vaccinate(following)
                continue
            self._under_way.append((following, self._processes.start(self._slab(following).grads, self._shares)))
            if len(self._under_way) > 1:
                self._arrive()

    def _arrive(self) -> None:
        """Of the groups under way, the first one."""
        group, work = self._under_way.popleft()
        work.wait()
        self._vaccinate(group)

    def _vaccinate(self, group: int) -> None:
        begin, end = self._groups.offsets[group], self._groups.offsets[group + 1]
        out = self._result[begin:end]
        if group in self._coarse:
            self._found[group] = self._finish_coarse(group, out)
            return
        slab = self._slab(group)
        update = slab.result(out)
        found = self._step.vaccinate(slab.grads, slab.groups, self._task_ids, update)
        slab.spread(update, out)
        slab.release()
        del self._open[group]
        self._found[group] = found._replace(gradient=out)

    def _finish_coarse(self, group: int, out: torch.Tensor) -> Vaccination:
        G = torch.zeros(1, self._num_tasks, self._num_tasks, dtype=torch.float64, device=out.device)
        members = list(zip(self._members[group], self._slabs[group].parameters))
        for index, slot in members:
            uses = self._uses.get(index, ())
            if not uses and index not in self._dense and self._processes is None:
                continue
            alone = ParameterGroups((slot.name,), (0, slot.numel), (slot.numel,), 0, (replace(slot, offset=0),))
            slab = Slab(alone, [index], self._rows_of([index]), self._num_tasks, self._arena)
            if index in self._dense:
                slab.grads.copy_(self._dense[index])
            for use in uses:
                use.add([slab.target(part) if part and part.parameter == index else None for part in use.parts])
            if self._processes is not None:
                self._processes.start(slab.grads, self._shares).wait()
            G += ops.gram(slab.grads, slab.groups)
            slab.release()
        found = self._step.weigh(G, self._slabs[group], self._task_ids, out.dtype)
        weights = found.weights[0] / self._shares.to(out.device)
        out.zero_()
        for index, slot in members:
            row = out[slot.offset : slot.offset + slot.numel].unsqueeze(0)
            if index in self._dense:
                row += (weights @ self._dense.pop(index).to(weights.dtype)).to(row.dtype)
            for use in self._uses.pop(index, ()):
                use.add_weighted(
                    weights,
                    [Target(view_of(row, part, 0)) if part and part.parameter == index else None for part in use.parts],
                )
        if self._processes is not None:
            self._processes.start(out).wait()
        return Vaccination(out, found.weights, found.similarity, found.corrected, G)

    def _group_of(self, part: Part) -> int:
        return self._groups.parameters[part.parameter].group

    def _slab(self, group: int) -> Slab:
        if group not in self._open:
            members = self._members[group]
            rows = self._rows_of(members)
            self._open[group] = Slab(self._slabs[group], members, rows, self._num_tasks, self._arena)
        return self._open[group]

    def _target(self, part: Part) -> Target | Table:
        return self._slab(self._group_of(part)).target(part)

    def _rows_of(self, members: Sequence[int]) -> dict[int, torch.Tensor]:
        """Of the embeddings among these of which no more than half can have been looked up: those rows.

        Other processes have looked up others: none then.
        """
        if self._processes is not None:
            return {}
        for index in members:
            ids, slot = self._announced.get(index), self._groups.parameters[index]
            if ids and 2 * sum(some.numel() for some in ids) <= slot.shape[0] and slot.stride == (slot.shape[1], 1):
                self._looked_up[index] = torch.cat([some.flatten() for some in ids]).unique()
        return {index: self._looked_up[index] for index in members if index in self._looked_up}

    def _late(self, parameter: int) -> RuntimeError:
        return RuntimeError(
            f"batch: expected one backward, and each group's parameters in it once, got another gradient of "
            f"{self._groups.parameters[parameter].name!r} after its group was vaccinated; several backwards need "
            "batch(..., keep=True), activation checkpointing needs use_reentrant=False"
        )
