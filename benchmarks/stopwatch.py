"""How long one call takes: on the host by the clock, on a GPU by events around the replay of a captured graph."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from time import perf_counter

import torch

Stopwatch = Callable[[], float]
"""Makes some calls and returns the seconds of one."""


def stopwatch(
    device: str, run: Callable[[torch.Tensor], object], buffers: list[torch.Tensor], waits: bool
) -> tuple[Stopwatch, int]:
    """For ``run``, which has run before, on the buffers in turn, and how many calls it makes at once.

    ``waits``: it reads results back on the way, so no graph can hold it.
    """
    if device == "cpu":
        return _on_the_host(run, buffers, lambda: None), 1
    if waits:
        return _on_the_host(run, buffers, torch.cuda.synchronize), 1
    return _replayed(run, buffers), len(buffers)


def _on_the_host(
    run: Callable[[torch.Tensor], object], buffers: list[torch.Tensor], finish: Callable[[], object]
) -> Stopwatch:
    turns = itertools.cycle(buffers)

    def watch() -> float:
        grads = next(turns)
        finish()
        start = perf_counter()
        result = run(grads)
        finish()
        seconds = perf_counter() - start
        del result  # giving memory back is not timed
        return seconds

    return watch


def _replayed(run: Callable[[torch.Tensor], object], buffers: list[torch.Tensor]) -> Stopwatch:
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        for _ in range(3):
            run(buffers[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for grads in buffers:
            run(grads)
    graph.replay()

    def watch() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / len(buffers)

    return watch
