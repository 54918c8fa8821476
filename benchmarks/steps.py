"""Whole training steps of the demo's translator, each case in a process of its own.

Three ways to a step: ``plain``, one mixed batch and the sum of the languages' losses, with no method at all;
``stream``, the same batch in ``tasks.batch``; ``buffer``, one backward a language into the buffer ``[T, P]``, on the
same samples. ``python -m benchmarks.steps CASE`` prints, in JSON, the seconds of all ways, taken in turns, and the peak
memory of each.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

WAYS = ("plain", "stream", "buffer")
REQUIRED = ("babel",)
_ROOT = Path(__file__).parent.parent
_SECONDS = 7.0  # for the turns of a case
_LEAST_ROUNDS, _MOST_ROUNDS = 2, 40
_MEMORY_STEPS = 2  # the slabs' memory is sized in the first one


@dataclass(frozen=True)
class StepCase:
    """T languages with 16 samples each, or, unequal, 1 to 64; ``wait`` is what OpenMP's idle threads do."""

    T: int
    samples: str = "16"
    granularity: str = "all_layer"
    wait: str = "passive"

    def __str__(self) -> str:
        return f"T{self.T}-{self.samples}-{self.granularity}-{self.wait}"

    @classmethod
    def parse(cls, text: str) -> StepCase:
        """The inverse of ``str``."""
        T, samples, granularity, wait = text.replace("1-64", "1:64").split("-")
        return cls(int(T[1:]), samples.replace(":", "-"), granularity, wait)

    def counts(self) -> list[int]:
        """Samples of each language."""
        if self.samples == "1-64":
            return torch.randint(1, 65, (self.T,), generator=torch.Generator().manual_seed(0)).tolist()
        return [int(self.samples)] * self.T


GRID = (
    StepCase(12),
    StepCase(12, wait="active"),
    StepCase(12, granularity="all_matrix"),
    StepCase(12, granularity="whole_model"),
    StepCase(4),
    StepCase(50, "1-64"),
)
FULL_GRID = (
    *GRID,
    StepCase(12, "4"),
    StepCase(12, "64"),
    StepCase(4, granularity="all_matrix"),
    StepCase(50, "1-64", "all_matrix"),
)


def measure(case: StepCase) -> dict[str, dict[str, Any]]:
    """By way: the seconds of each round, and the peak memory in bytes."""
    command = [sys.executable, "-m", "benchmarks.steps", str(case)]
    environment = {**os.environ, "OMP_WAIT_POLICY": case.wait}
    found = subprocess.run(command, cwd=_ROOT, env=environment, check=True, stdout=subprocess.PIPE).stdout
    return json.loads(found)


def row(case: StepCase, way: str, found: dict[str, Any]) -> dict[str, Any]:
    """The result of one way, as it goes into the file of results."""
    p20, *_, p80 = statistics.quantiles(found["seconds"], n=5, method="inclusive")
    aggregation = {"aggregation_s": statistics.median(found["aggregation"])} if "aggregation" in found else {}
    return {
        "suite": "steps",
        "op": "step",
        "implementation": way,
        **asdict(case),
        "dtype": "float32",
        "device": "cpu",
        "P": found["P"],
        "batch": sum(case.counts()),
        "median_s": statistics.median(found["seconds"]),
        "p20_s": p20,
        "p80_s": p80,
        "rounds": len(found["seconds"]),
        "peak_memory_bytes": found["peak_memory_bytes"],
        "slab_bytes": found["slab_bytes"],
        **aggregation,
    }


class _Steps:
    """The model, the data and the ways of a case."""

    def __init__(self, case: StepCase) -> None:
        import gradvac_kernels as gvk
        from gradvac_kernels.demo import data
        from gradvac_kernels.demo.languages import DEFAULT, FAMILY_OF
        from gradvac_kernels.demo.model import Translator
        from gradvac_kernels.demo.vocabulary import PAD, Vocabulary

        languages = list(dict.fromkeys((*DEFAULT, *FAMILY_OF)))[: case.T]
        split = data.split(languages, held_out=10)
        vocabulary = Vocabulary(languages, (pair for pairs in split.train.values() for pair in pairs))
        samples = [
            (language, split.train[language][i % len(split.train[language])])
            for language, count in zip(languages, case.counts())
            for i in range(count)
        ]
        torch.manual_seed(0)
        self._model = Translator(len(vocabulary))
        self.tasks = gvk.TaskGradients(self._model, languages, granularity=case.granularity)
        self._mixed = vocabulary.batch(samples)
        self._apart = [vocabulary.batch([one for one in samples if one[0] == language]) for language in languages]
        self._task_of_sample = torch.tensor([languages.index(language) for language, _ in samples])
        self._optimizer = torch.optim.Adam(self._model.parameters(), lr=1e-4)
        self._task_mean_loss, self._pad = gvk.task_mean_loss, PAD
        self.aggregating = 0.0  # seconds so far

    def step(self, way: str) -> None:
        """One training step."""
        self._optimizer.zero_grad()
        if way == "plain":
            self._mixed_loss().backward()
        elif way == "stream":
            with self.tasks.batch(self._task_of_sample):
                self._mixed_loss().backward()
        else:
            for language, batch in zip(self.tasks.tasks, self._apart):
                with self.tasks.task(language):
                    (self._model.losses(batch).sum() / (batch.target != self._pad).sum()).backward()
            start = time.perf_counter()
            self.tasks.apply()
            self.aggregating += time.perf_counter() - start
        self._optimizer.step()

    def _mixed_loss(self) -> torch.Tensor:
        characters = (self._mixed.target != self._pad).float()
        return self._task_mean_loss(self._model.losses(self._mixed), self._task_of_sample, characters)


def _seconds(case: StepCase) -> dict[str, list[float]]:
    """By way; ``aggregation`` is what the method's kernels take of each step of ``buffer``."""
    steps = _Steps(case)
    found: dict[str, list[float]] = {way: [] for way in (*WAYS, "aggregation")}
    for way in WAYS:
        steps.step(way)
    begin = time.perf_counter()
    for done in range(_MOST_ROUNDS):
        if done >= _LEAST_ROUNDS and time.perf_counter() - begin > _SECONDS:
            break
        for way in WAYS:
            start, before = time.perf_counter(), steps.aggregating
            steps.step(way)
            found[way].append(time.perf_counter() - start)
            if way == "buffer":
                found["aggregation"].append(steps.aggregating - before)
    return found


def _memory(case: StepCase, way: str) -> dict[str, int]:
    """Bytes of all tensors at their peak, from the model on, as torch's allocator reports them."""
    from torch.profiler import ProfilerActivity, profile

    gc.collect()  # what is freed from now on was made from now on
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        steps = _Steps(case)
        for _ in range(_MEMORY_STEPS):
            steps.step(way)
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    groups = steps.tasks.groups
    return {"peak_memory_bytes": peak, "slab_bytes": 4 * case.T * max(groups.sizes), "P": groups.numel}


def main(case: StepCase) -> None:
    seconds = _seconds(case)
    found = {way: {"seconds": seconds[way], **_memory(case, way)} for way in WAYS}
    found["buffer"]["aggregation"] = seconds["aggregation"]
    print(json.dumps(found))


if __name__ == "__main__":
    main(StepCase.parse(sys.argv[1]))
