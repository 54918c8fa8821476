"""Train the arms of the experiment: the plain sum of the languages' losses, and their gradients vaccinated."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from tqdm import tqdm

import gradvac_kernels as gvk

from . import data, similarity
from .evaluate import held_out_losses
from .model import Translator
from .vocabulary import PAD, Batch, Vocabulary

PROBE = 32  # held-out names of each language, to measure similarity on the same things in all of them
LEARNING_RATE = 3e-3  # chosen for the plain sum


@dataclass
class Setting:
    """What both arms share."""

    split: data.Split
    vocabulary: Vocabulary
    steps: int
    batch_size: int
    measure_every: int

    @property
    def languages(self) -> list[str]:
        return list(self.split.train)


@dataclass
class Record:
    """What one arm saw, step by step; T languages in the setting's order."""

    model: Translator
    losses: list[list[float]] = field(default_factory=list)  # [steps, T], of the training batch, in nats a character
    held_out: dict[int, list[float]] = field(default_factory=dict)  # steps done -> [T]
    step_seconds: list[float] = field(default_factory=list)
    apply_seconds: list[float] = field(default_factory=list)
    names: dict[str, list[str]] = field(default_factory=dict)  # by language, what the trained model wrote
    layers: tuple[str, ...] = ()
    batch_cosines: dict[int, torch.Tensor] = field(default_factory=dict)  # steps done -> [L, T, T] of the layers
    parallel_cosines: dict[int, torch.Tensor] = field(default_factory=dict)  # the same, on the same held-out things
    measured: list[list[int]] = field(default_factory=list)  # [steps, T], the pairs that a language was measured in
    turned: list[list[int]] = field(default_factory=list)  # [steps, T], of these, similarity below the target
    conflicting: list[list[int]] = field(default_factory=list)  # [steps, T], of these, similarity below zero


class Arm(Protocol):
    """One way from a step's batches to the model's ``.grad``."""

    def __call__(self, batches: list[list[data.Pair]], record: Record, measure: bool) -> tuple[torch.Tensor, float]:
        """Set ``.grad``; return each language's loss ``[T]`` and the seconds that were spent on measuring only."""


MakeArm = Callable[[Translator], Arm]


class PlainSum:
    """What one would write without this package: one mixed batch, one backward of the sum."""

    def __init__(self, model: Translator, setting: Setting) -> None:
        self._model, self._setting = model, setting

    def __call__(self, batches: list[list[data.Pair]], record: Record, measure: bool) -> tuple[torch.Tensor, float]:
        losses = mean_losses(self._model, mixed(self._setting, batches), len(batches))
        losses.sum().backward()
        return losses.detach(), 0.0


class Vaccinated:
    """Each language's gradients, and the update from them by a method of this package.

    Args:
        capture: how to get at the gradients: ``"stream"``, all from the backward of one mixed batch, or ``"buffer"``,
            one backward a language.
    """

    def __init__(
        self, model: Translator, setting: Setting, granularity: str, method: gvk.GradVac, capture: str = "stream"
    ) -> None:
        self._model, self._setting, self._capture = model, setting, capture
        self._tasks = gvk.TaskGradients(model, setting.languages, granularity=granularity, method=method)
        self._probe = [pairs[:PROBE] for pairs in setting.split.held_out.values()]

    def __call__(self, batches: list[list[data.Pair]], record: Record, measure: bool) -> tuple[torch.Tensor, float]:
        step = len(record.losses)
        measuring = 0.0
        if measure:  # on the same things in all languages: which names a batch happens to hold is most of its noise
            begin = time.perf_counter()
            self._backward(self._probe, keep=True)
            record.parallel_cosines[step] = self._cosines(record)
            self._tasks.discard()
            measuring += time.perf_counter() - begin
        losses = self._backward(batches, keep=measure)
        if measure:
            begin = time.perf_counter()
            record.batch_cosines[step] = self._cosines(record)
            measuring += time.perf_counter() - begin
        if self._tasks.task_ids:  # kept
            begin = time.perf_counter()
            self._tasks.apply()
            record.apply_seconds.append(time.perf_counter() - begin)
        found = self._tasks.last
        assert found is not None
        # Rows are the tasks in their order: every step has all of them.
        record.measured.append((~found.similarity.isnan()).sum((0, 2)).tolist())
        record.turned.append(found.corrected.sum((0, 2)).tolist())
        record.conflicting.append((found.similarity < 0).sum((0, 2)).tolist())
        return losses, measuring

    def _backward(self, batches: list[list[data.Pair]], keep: bool) -> torch.Tensor:
        if self._capture == "stream":
            batch, counts = mixed(self._setting, batches), torch.tensor([len(pairs) for pairs in batches])
            with self._tasks.batch(torch.arange(len(batches)).repeat_interleave(counts), keep=keep):
                losses = mean_losses(self._model, batch, len(batches))
                losses.sum().backward()
            return losses.detach()
        each = []
        for language, pairs in zip(self._setting.languages, batches):
            batch = self._setting.vocabulary.batch([(language, pair) for pair in pairs])
            with self._tasks.task(language):
                loss = mean_loss(self._model, batch)
                loss.backward()
            each.append(loss.detach())
        return torch.stack(each)

    def _cosines(self, record: Record) -> torch.Tensor:
        gram = gvk.gram(self._tasks.grads, self._tasks.groups)  # [K, T, T], of the gradients before they are turned
        record.layers, cosines = similarity.by_layer(gram, self._tasks.groups.names)
        return cosines


def mixed(setting: Setting, batches: list[list[data.Pair]]) -> Batch:
    """One batch of all languages, one after the other."""
    return setting.vocabulary.batch(
        [(language, pair) for language, pairs in zip(setting.languages, batches) for pair in pairs]
    )


def mean_losses(model: Translator, batch: Batch, languages: int) -> torch.Tensor:
    """Each language's mean negative log-likelihood of a character ``[T]``, in nats, of a mixed batch of equal parts."""
    characters = (batch.target != PAD).view(languages, -1).sum(1)  # [T]
    return model.losses(batch).view(languages, -1).sum(1) / characters


def mean_loss(model: Translator, batch: Batch) -> torch.Tensor:
    """The mean negative log-likelihood of a character, in nats."""
    return model.losses(batch).sum() / (batch.target != PAD).sum()


class Trainee:
    """A model in training: its arm, its optimizer, its record. The same seed gives the same model."""

    def __init__(self, make_arm: MakeArm, setting: Setting, seed: int) -> None:
        torch.manual_seed(seed)
        model = Translator(len(setting.vocabulary))
        self.record = Record(model)
        self._setting, self._arm = setting, make_arm(model)
        self._optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98))
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, lambda step: _rate(step, setting.steps))

    def step(self, batches: list[list[data.Pair]]) -> float:
        """Train on a batch of each language; their mean loss."""
        record, begin = self.record, time.perf_counter()
        self._optimizer.zero_grad()
        losses, measuring = self._arm(batches, record, measure=len(record.losses) % self._setting.measure_every == 0)
        self._optimizer.step()
        self._schedule.step()
        record.step_seconds.append(time.perf_counter() - begin - measuring)
        record.losses.append(losses.tolist())
        return float(losses.mean())

    def evaluate(self) -> None:
        """Note the held-out losses of now."""
        vocabulary, pairs = self._setting.vocabulary, self._setting.split.held_out
        self.record.held_out[len(self.record.losses)] = held_out_losses(self.record.model, vocabulary, pairs)


def train(arms: Mapping[str, MakeArm], setting: Setting, seed: int) -> dict[str, Record]:
    """Train all arms from the same weights on the same batches, in turns: a busy machine slows all of them alike."""
    trainees = {name: Trainee(make_arm, setting, seed) for name, make_arm in arms.items()}
    evaluated = {round(setting.steps * part / 6) for part in range(1, 7)}
    batches = data.batches(setting.split.train, setting.batch_size, seed)
    progress = tqdm(range(1, setting.steps + 1), desc=f"seed {seed}", unit="step")
    for step, batch in zip(progress, batches):
        losses = {name: trainee.step(batch) for name, trainee in trainees.items()}
        progress.set_postfix({name: f"{loss:.3f}" for name, loss in losses.items()}, refresh=False)
        if step in evaluated:
            for trainee in trainees.values():
                trainee.evaluate()
    return {name: trainee.record for name, trainee in trainees.items()}


def warm_up_steps(steps: int) -> int:
    """How long the learning rate rises."""
    return min(40, max(1, steps // 4))


def _rate(step: int, steps: int) -> float:
    """Factor on the learning rate: up in a straight line, then down in one."""
    warm_up = warm_up_steps(steps)
    return min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))
