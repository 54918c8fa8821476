"""How similar the tasks' gradients are, by parameter group and pair of tasks, averaged over windows of steps."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from . import checks, ops
from .groups import ParameterGroups
from .methods.method import check_task_ids
from .result import Vaccination

WHOLE = "whole_model"
MEASURES = ("cosine", "norm_similarity", "conflicting", "below_zero", "turned")
_SUMS = ("pairs", "cosine", "norm_similarity", "conflicting", "met", "below_zero", "turned")
_COUNT_OF = dict(zip(MEASURES, ("pairs", "pairs", "pairs", "met", "met")))
_COLUMNS = ("first_step", "last_step", "group", "task", "other", "steps", "met", *MEASURES)


class SimilarityTracker:
    """Running means of what Gram matrices say about the tasks, kept where the gradients are, without waiting for them.

    After every step, or every few::

        tracker = SimilarityTracker(tasks.groups, tasks.tasks, window=100)
        ...
        tracker.update(tasks.last, tasks.last_task_ids)

    By group and ordered pair (i, j) of tasks, the means over the steps of a window of

    - ``cosine``: of the gradients of i and j, before any method changes them;
    - ``norm_similarity``: ``2 |g_i| |g_j| / (|g_i|^2 + |g_j|^2)``;
    - ``conflicting``: whether that cosine is below 0;
    - ``below_zero``: whether the cosine was below 0 when Algorithm 1 measured it, i being the current, turned one:
      where PCGrad would act;
    - ``turned``: whether i was turned towards j there. The last two are shares of the steps in which the method
      measured the pair (``met``); Gram matrices alone say nothing of them, and a method that turns nothing meets every
      pair as it is.

    The last group, ``"whole_model"``, is all groups together: dot products add up. A pair counts in a step if both
    gradients are finite and not zero in the group. (Wang et al., ICLR 2021, section 3; norm similarity from Li and
    Gong, NeurIPS 2021.)

    Args:
        groups: the K groups.
        tasks: names of the N tasks, or N.
        window: updates of a window; a new one begins when it is full, and the old one is kept.

    Raises:
        TypeError, ValueError: an argument is of another type, or there are no tasks.
    """

    def __init__(self, groups: ParameterGroups, tasks: Sequence[str] | int, *, window: int = 100) -> None:
        checks.check_groups(groups)
        if isinstance(tasks, int):
            checks.check_int("tasks", tasks, 1)
            tasks = [str(task) for task in range(tasks)]
        if isinstance(tasks, str) or not isinstance(tasks, Sequence) or not all(isinstance(t, str) for t in tasks):
            raise TypeError(f"tasks: expected names of type str, or their number, got {tasks!r}")
        if not tasks or len(set(tasks)) != len(tasks):
            raise ValueError(f"tasks: expected different names, at least one, got {list(tasks)}")
        checks.check_int("window", window, 1)
        self.tasks = tuple(tasks)
        self.groups = (*groups.names, WHOLE) if len(groups) > 1 else groups.names
        self.window = window
        self._num_groups = len(groups)
        self._windows: list[tuple[int, int, torch.Tensor]] = []  # first and last update, sums [7, K, N, N]

    @property
    def steps(self) -> int:
        """The number of updates so far."""
        return self._windows[-1][1] + 1 if self._windows else 0

    def update(self, found: Vaccination | torch.Tensor, task_ids: torch.Tensor | Sequence[int] | None = None) -> None:
        """Take up one step.

        Args:
            found: the result of a method or of :func:`gradvac_kernels.vaccinate`; or Gram matrices ``[K, T, T]`` of the
                gradients, where nothing is changed.
            task_ids: ``[T]``, which of the N tasks each row is; may be None when there are all of them in order.

        Raises:
            TypeError, ValueError: a shape or an id does not fit. Then nothing was changed.
        """
        G, met, corrected, below = self._read(found)
        T, N = G.shape[1], len(self.tasks)
        given = check_task_ids(task_ids, T, N)
        if isinstance(given, tuple) and given == tuple(range(N)):
            given = None
        measures = self._measure(G, met, corrected, below)  # [7, K, T, T]
        ids = ops.as_ids("task_ids", given, measures.device)
        if ids is not None:
            spread = measures.new_zeros(len(_SUMS), len(self.groups), N, N)
            spread[:, :, ids[:, None], ids] = measures
            measures = spread
        if self._windows and self._windows[-1][1] - self._windows[-1][0] + 1 < self.window:
            first, last, sums = self._windows[-1]
            self._windows[-1] = (first, last + 1, sums.to(measures.device) + measures)
        else:
            self._windows.append((self.steps, self.steps, measures))

    def mean(self, measure: str, windows: slice = slice(None)) -> torch.Tensor:
        """The mean of one of :data:`MEASURES` over windows; NaN where nothing was measured.

        Returns:
            ``[K + 1, N, N]`` float64, by group and for the whole model; ``[1, N, N]`` where one group is all of it.

        Raises:
            TypeError: ``windows`` is no slice.
            ValueError: no such measure, or nothing to average.
        """
        if not isinstance(windows, slice):
            raise TypeError(f"windows: expected a slice, got {windows!r}")
        if measure not in MEASURES:
            raise ValueError(f"measure: expected one of {MEASURES}, got {measure!r}")
        chosen = self._windows[windows]
        if not chosen:
            raise ValueError(f"windows: expected at least one of the {len(self._windows)} windows, got {windows}")
        total = torch.stack([sums.to(chosen[-1][2].device) for _, _, sums in chosen]).sum(0)
        return self._means(total)[measure]

    def window_steps(self) -> list[tuple[int, int]]:
        """First and last update of each window."""
        return [(first, last) for first, last, _ in self._windows]

    def rows(self) -> Iterator[dict[str, Any]]:
        """A tidy table: one row for each window, group and ordered pair of different tasks that was seen.

        The columns are ``first_step`` and ``last_step`` (updates counted from 0), ``group``, ``task``, ``other``,
        ``steps`` and ``met`` (how many steps the means are over), and the five measures; None where there is none.
        """
        for first, last, sums in self._windows:
            means = {name: values.tolist() for name, values in self._means(sums.cpu()).items()}
            counts = {name: sums[_SUMS.index(name)].to(torch.int64).tolist() for name in ("pairs", "met")}
            for k, group in enumerate(self.groups):
                for i, task in enumerate(self.tasks):
                    for j, other in enumerate(self.tasks):
                        if i == j or not counts["pairs"][k][i][j]:
                            continue
                        found = {name: _number(means[name][k][i][j]) for name in MEASURES}
                        steps, met = counts["pairs"][k][i][j], counts["met"][k][i][j]
                        yield dict(zip(_COLUMNS, (first, last, group, task, other, steps, met, *found.values())))

    def to_csv(self, path: str | Path) -> None:
        """Write :meth:`rows`."""
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, _COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows())

    def to_pandas(self) -> Any:
        """:meth:`rows` as a pandas DataFrame, which also writes Parquet."""
        import pandas

        return pandas.DataFrame(list(self.rows()), columns=list(_COLUMNS))

    def log(self, writer: Any, step: int | None = None, *, heatmaps: bool = False) -> None:
        """Write the last window to TensorBoard: by group, the means over all pairs.

        Args:
            writer: a ``torch.utils.tensorboard.SummaryWriter``, or what has its ``add_scalar`` and ``add_figure``.
            step: the global step; None is the number of updates.
            heatmaps: also draw each group's cosines (needs matplotlib).

        Raises:
            ValueError: there was no update.
        """
        step = self.steps if step is None else step
        for measure in MEASURES:
            for group, values in zip(self.groups, self.mean(measure, slice(-1, None))):
                others = values[~torch.eye(len(values), dtype=torch.bool, device=values.device)]
                if not bool(others.isnan().all()):
                    writer.add_scalar(f"{measure}/{group}", float(others.nanmean()), step)
        if heatmaps:
            from . import plots

            for group, cosine in zip(self.groups, self.mean("cosine", slice(-1, None))):
                writer.add_figure(f"cosine/{group}", plots.heatmap(cosine, self.tasks), step)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs, for ``torch.save``: a copy of all windows."""
        return {
            "groups": list(self.groups),
            "tasks": list(self.tasks),
            "window": self.window,
            "windows": [(first, last, sums.clone()) for first, last, sums in self._windows],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue, bit for bit, where ``state_dict()`` was taken.

        Raises:
            TypeError, ValueError: groups, tasks or window differ, or a value is not as expected. Then nothing was
                changed.
        """
        own = self.state_dict()
        checks.check_keys(state, own)
        for name in ("groups", "tasks", "window"):
            if state[name] != own[name]:
                raise ValueError(f"state[{name!r}]: expected {own[name]}, got {state[name]}")
        shape = (len(_SUMS), len(self.groups), len(self.tasks), len(self.tasks))
        windows: list[tuple[int, int, torch.Tensor]] = []
        if not isinstance(state["windows"], (list, tuple)):
            raise TypeError(f"state['windows']: expected a list, got {type(state['windows']).__name__}")
        for index, window in enumerate(state["windows"]):
            if not isinstance(window, (list, tuple)) or len(window) != 3:
                raise TypeError(f"state['windows']: expected first step, last step and sums, got {window!r}")
            first, last, sums = window
            checks.check_int("state['windows']", first)
            checks.check_int("state['windows']", last)
            checks.check_tensor("state['windows']", sums, (torch.float64,), shape)
            full = first + self.window - 1
            if (
                first != index * self.window
                or not first <= last <= full
                or (last < full and index + 1 < len(state["windows"]))
            ):
                raise ValueError(f"state['windows']: expected windows of {self.window} steps, got {first} to {last}")
            windows.append((first, last, sums.clone()))
        self._windows = windows

    def _read(
        self, found: Vaccination | torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Gram matrices; which pairs were met, which of these turned, which below 0."""
        G = found.gram if isinstance(found, Vaccination) else found
        if not isinstance(G, torch.Tensor):
            raise TypeError(f"found: expected a Vaccination or Gram matrices, got {type(found).__name__}")
        checks.check_tensor("found", G, (torch.float64,), (self._num_groups, None, None))
        if G.shape[1] != G.shape[2]:
            raise ValueError(f"found: expected Gram matrices [K, T, T], got {list(G.shape)}")
        if G.device.type == "meta":
            raise ValueError("found: expected numbers, got a tensor on the device meta")
        G = G.detach()
        if not isinstance(found, Vaccination):
            return G, None, None, None
        for name, pairs in (("similarity", found.similarity), ("corrected", found.corrected)):
            if pairs.shape != G.shape:
                raise ValueError(f"found: expected {name} of shape {list(G.shape)}, got {list(pairs.shape)}")
        return G, ~found.similarity.isnan(), found.corrected, found.similarity < 0

    def _measure(
        self,
        G: torch.Tensor,
        met: torch.Tensor | None,
        corrected: torch.Tensor | None,
        below: torch.Tensor | None,
    ) -> torch.Tensor:
        """``[7, K, T, T]`` float64, of one step, in the order of ``_SUMS``."""
        if len(self.groups) > self._num_groups:
            G = torch.cat([G, G.sum(0, keepdim=True)])
        square = G.diagonal(dim1=1, dim2=2)
        usable = square.isfinite() & (square > 0)
        pairs = usable[:, :, None] & usable[:, None, :]
        norm = torch.where(usable, square, 1.0).sqrt()
        ratio = norm[:, :, None] / norm[:, None, :]
        cosine = (G / norm[:, :, None] / norm[:, None, :]).clamp(-1.0, 1.0)
        counts = G.new_zeros(len(_SUMS), *G.shape)
        counts[0] = pairs
        counts[1] = torch.where(pairs, cosine, 0.0)
        counts[2] = torch.where(pairs, 2.0 / (ratio + 1.0 / ratio), 0.0)
        counts[3] = pairs & (cosine < 0)
        for index, values in enumerate((met, below, corrected), start=4):
            if values is not None:
                counts[index, : self._num_groups] = values
        return counts

    def _means(self, sums: torch.Tensor) -> dict[str, torch.Tensor]:
        """``[K, N, N]`` by measure, NaN where there is nothing to average."""
        named = dict(zip(_SUMS, sums))
        counts = {name: named[count].where(named[count] > 0, torch.nan) for name, count in _COUNT_OF.items()}
        return {name: named[name] / counts[name] for name in MEASURES}


def _number(value: float) -> float | None:
    return None if value != value else value
