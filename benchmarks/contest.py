"""Implementations of one operator on one case: first held against the truth, then timed in turns."""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

import gradvac_kernels as gvk

from .cases import Case, work
from .ceilings import MULTIPLY_ADDS, STREAMING_READ, Probe, last_level_cache
from .memory import peak_memory
from .stopwatch import Stopwatch, stopwatch

SECONDS = {"cpu": 0.3, "cuda": 0.05}  # timed for each implementation of a case; calls on a GPU differ less
PROBE_SECONDS = {"cpu": 0.1, "cuda": 0.02}  # and for each probe of a ceiling
MAX_ROUNDS = 200
MAX_BYTES = {"cpu": 3 << 30, "cuda": 30 << 30}  # of all input buffers of a case


class NotRun(Exception):
    """Why an implementation is left out of a case."""


@dataclass(frozen=True)
class Contestant:
    """One implementation, prepared for a case, with whatever state it keeps between steps."""

    run: Callable[[torch.Tensor], torch.Tensor]
    """What is timed: grads [T, P] -> result."""
    tolerance: float
    """Largest accepted |result - truth| / |truth|."""
    truth: Callable[[torch.Tensor], torch.Tensor] | None = None
    """Where it computes something else than the operator."""
    check: Callable[[torch.Tensor], torch.Tensor] | None = None
    """``run`` in the truth's order of the inner loop, where it draws one of its own."""
    waits: bool = False
    """The host reads results of the device on the way: a CUDA graph cannot hold it."""


Builder = Callable[[Case], Contestant]
Record = Callable[["Contest", str], dict[str, Any]]
"""What the fixture ``record`` gives to a test: it takes a contest and the name of an implementation."""


@dataclass(frozen=True)
class Operator:
    """What a test module measures."""

    name: str
    truth: Callable[[Case, torch.Tensor], torch.Tensor]
    ours: Callable[[str], Builder]
    peers: Mapping[str, Builder]
    grid: tuple[Case, ...]
    full_grid: tuple[Case, ...]
    gpu_grid: tuple[Case, ...]
    suite: str = "operators"
    takes_matrices: bool = False
    """It is given Gram matrices [K, T, T] instead of gradients."""
    seconds: float = 1.0
    """Timed for each implementation of a case, as a multiple of SECONDS."""
    reference: bool = True
    """On the host, the backend ``reference`` is timed too."""

    def cases(self, device: str, full: bool) -> tuple[Case, ...]:
        """What is measured there."""
        return self.gpu_grid if device != "cpu" else self.full_grid if full else self.grid

    def implementations(self, device: str) -> dict[str, Builder]:
        """Our backends that serve the device, and the peers."""
        reference = self.reference and device == "cpu"  # on a GPU it is the truth
        ours = [name for name in backends(device) if reference or name != "reference"]
        return {**{backend: self.ours(backend) for backend in ours}, **self.peers}


@dataclass
class _Turns:
    watch: Stopwatch
    budget: float
    calls: int = 1  # that a turn of the watch takes
    seconds: list[float] = field(default_factory=list)
    spent: float = 0.0

    @property
    def due(self) -> bool:
        rounds = len(self.seconds)
        if rounds < 5:  # 3 have to do where they are slow, 2 where that is seconds
            return rounds < 2 or self.spent < (1.5 if rounds > 2 else 5) * self.budget
        return rounds < MAX_ROUNDS and self.spent < self.budget


class Contest:
    """The implementations called ``names`` on one case.

    Attributes:
        wrong: why an implementation takes no part, by name.
        seconds: all times of an implementation, by name.
        memory: peak memory in bytes of a call beyond its arguments and what it keeps, by name.
        ceilings: the ceilings while this case ran: what was reached, and by which probe.
    """

    def __init__(self, op: Operator, case: Case, names: Iterable[str]) -> None:
        self.op, self.case = op, case
        self.wrong: dict[str, str] = {}
        self.seconds: dict[str, list[float]] = {}
        self.memory: dict[str, int | None] = {}
        self.ceilings: dict[str, tuple[float, str]] = {}
        # Together more than three times the last-level cache: what is read has left the cache since it was read last.
        count = max(2, math.ceil(3 * last_level_cache(case.device) / case.nbytes))
        most = MAX_BYTES[torch.device(case.device).type] // case.nbytes
        buffers = _filled(case, 2 if op.takes_matrices else max(1, min(count, most)))
        self._buffers = [gvk.gram(grads, case.groups) if op.takes_matrices else grads for grads in buffers]
        self._contestants: dict[str, Contestant] = {}
        truth = op.truth(case, self._buffers[0])
        implementations = op.implementations(case.device)
        for name in names:
            try:
                self._contestants[name] = self._checked(implementations[name](case), truth)
            except Exception as error:
                self.wrong[name] = str(error) if isinstance(error, NotRun) else f"{type(error).__name__}: {error}"

    def _checked(self, contestant: Contestant, truth: torch.Tensor) -> Contestant:
        grads = self._buffers[0]
        found = (contestant.check or contestant.run)(grads).double()
        truth = truth if contestant.truth is None else contestant.truth(grads)
        error = float((found - truth).norm() / truth.norm())
        if not error <= contestant.tolerance:
            raise NotRun(f"wrong result: relative error {error:.1e}, expected at most {contestant.tolerance:.1e}")
        return contestant

    def measure(self, probes: list[Probe]) -> None:
        """Time the implementations and both ceilings in turns: all of them see the machine in the same state."""
        device, buffers = self.case.device, self._buffers
        kind = torch.device(device).type
        turns = {}
        for name, contestant in self._contestants.items():
            try:
                self.memory[name] = peak_memory(contestant.run, buffers[0])  # and warmed up
                watch, calls = stopwatch(device, contestant.run, buffers, contestant.waits)
                turns[name] = _Turns(watch, self.op.seconds * SECONDS[kind], calls)
            except Exception as error:  # a peer that cannot be captured does not take the others with it
                self.wrong[name] = f"{type(error).__name__}: {error}"
        for probe in probes:
            probe.run_on(buffers[0])
        bounds = [
            _Turns(stopwatch(device, probe.run_on, buffers[:1], False)[0], PROBE_SECONDS[kind]) for probe in probes
        ]
        _take_turns([*turns.values(), *bounds])
        self.seconds = {name: entry.seconds for name, entry in turns.items()}
        for ceiling in (STREAMING_READ, MULTIPLY_ADDS):
            self.ceilings[ceiling] = max(
                (probe.amount / statistics.median(entry.seconds), probe.name)
                for probe, entry in zip(probes, bounds)
                if probe.ceiling == ceiling
            )

    def row(self, name: str) -> dict[str, Any]:
        """The result of one implementation, as it goes into the file of results."""
        case, seconds = self.case, self.seconds[name]
        needed = work(self.op.name, case)
        (read, read_by), (multiply_adds, multiply_adds_by) = self.ceilings[STREAMING_READ], self.ceilings[MULTIPLY_ADDS]
        floor = max(needed.bytes / read, needed.multiply_adds / multiply_adds)
        p20, *_, p80 = statistics.quantiles(seconds, n=5, method="inclusive")
        median = statistics.median(seconds)
        return {
            "suite": self.op.suite,
            "op": self.op.name,
            "implementation": name,
            "T": case.T,
            "P": case.P,
            "K": case.K,
            "dtype": case.dtype_name,
            "share": case.share,
            "device": case.device,
            "median_s": median,
            "p20_s": p20,
            "p80_s": p80,
            "rounds": len(seconds),
            "peak_memory_bytes": self.memory[name],
            "bytes": needed.bytes,
            "operations": needed.multiply_adds,
            "floor_s": floor,
            "fraction_of_floor": floor / median,
            "streaming_read_bytes_per_s": read,
            "streaming_read_by": read_by,
            "multiply_adds_per_s": multiply_adds,
            "multiply_adds_by": multiply_adds_by,
        }


_memory: dict[str, torch.Tensor] = {}
_holds: dict[str, tuple[object, ...]] = {}


def _filled(case: Case, count: int) -> torch.Tensor:
    """[count, T, P], in memory that the cases share: fresh pages would take longer than to fill them."""
    size, holds = count * case.nbytes, (count, case.T, case.P, case.dtype)
    if case.device not in _memory or _memory[case.device].nbytes < size:
        _memory.pop(case.device, None)
        _holds.pop(case.device, None)
        _memory[case.device] = case.empty(size, dtype=torch.uint8)
    buffers = _memory[case.device][:size].view(case.dtype).view(count, case.T, case.P)
    if _holds.get(case.device) != holds:
        case.fill(buffers)
        _holds[case.device] = holds
    return buffers


def _take_turns(entries: list[_Turns]) -> None:
    collecting = gc.isenabled()
    gc.disable()
    try:
        while due := [entry for entry in entries if entry.due]:
            entry = min(due, key=lambda entry: entry.spent / entry.budget)
            entry.seconds.append(entry.watch())
            entry.spent += entry.seconds[-1] * entry.calls
    finally:
        if collecting:
            gc.enable()


def backends(device: str = "cpu") -> tuple[str, ...]:
    """Our backends that serve tensors on the device, the fastest one first."""

    def serves(name: str) -> bool:
        try:
            gvk.gram(torch.ones(1, 1, device=device), gvk.ParameterGroups.from_sizes({"one": 1}), backend=name)
        except ValueError:
            return False
        return True

    return tuple(name for name in reversed(gvk.available_backends()) if serves(name))
