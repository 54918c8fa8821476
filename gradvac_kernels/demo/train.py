"""Train one arm of the experiment: the plain sum of the languages' losses, or their gradients vaccinated."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from tqdm import tqdm

import gradvac_kernels as gvk

from . import data, similarity
from .evaluate import held_out_losses
from .model import Translator
from .vocabulary import Batch, Vocabulary

WARM_UP = 40
LEARNING_RATE = 2e-3


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
    """What one arm saw, step by step; T languages in the setting's order, K parameter groups."""

    model: Translator
    losses: list[list[float]] = field(default_factory=list)  # [steps, T], of the training batch, in nats a character
    held_out: dict[int, list[float]] = field(default_factory=dict)  # steps done -> [T]
    step_seconds: list[float] = field(default_factory=list)
    apply_seconds: list[float] = field(default_factory=list)
    groups: tuple[str, ...] = ()
    cosines: dict[int, torch.Tensor] = field(default_factory=dict)  # steps done -> [K + 1, T, T], the whole model last
    measured: list[list[int]] = field(default_factory=list)  # [steps, T], the pairs that a language was measured in
    turned: list[list[int]] = field(default_factory=list)  # [steps, T], of these, similarity below the target
    conflicting: list[list[int]] = field(default_factory=list)  # [steps, T], of these, similarity below zero


class Arm(Protocol):
    """One way from a step's batches to the model's ``.grad``."""

    def __call__(self, batches: list[list[data.Pair]], record: Record, measure: bool) -> tuple[torch.Tensor, float]:
        """Set ``.grad``; return each language's loss ``[T]`` and the seconds that were spent on measuring only."""


class PlainSum:
    """What one would write without this package: one mixed batch, one backward of the sum."""

    def __init__(self, model: Translator, setting: Setting) -> None:
        self._model, self._setting = model, setting

    def __call__(self, batches: list[list[data.Pair]], record: Record, measure: bool) -> tuple[torch.Tensor, float]:
        languages = self._setting.languages
        samples = [(language, pair) for language, pairs in zip(languages, batches) for pair in pairs]
        batch = self._setting.vocabulary.batch(samples)
        characters = (batch.target != 0).view(len(languages), -1).sum(1)  # [T]
        losses = self._model.losses(batch).view(len(languages), -1).sum(1) / characters  # [T]
        losses.sum().backward()
        return losses.detach(), 0.0


class Vaccinated:
    """One backward a language, and the update from their gradients by a method of this package."""

    def __init__(self, model: Translator, setting: Setting, granularity: str, method: gvk.GradVac) -> None:
        self._model, self._setting = model, setting
        self._tasks = gvk.TaskGradients(model, setting.languages, granularity=granularity, method=method)

    def __call__(self, batches: list[list[data.Pair]], record: Record, measure: bool) -> tuple[torch.Tensor, float]:
        losses = []
        for language, pairs in zip(self._setting.languages, batches):
            batch = self._setting.vocabulary.batch([(language, pair) for pair in pairs])
            with self._tasks.task(language):
                loss = mean_loss(self._model, batch)
                loss.backward()
            losses.append(loss.detach())
        before = time.perf_counter()
        if measure:
            gram = gvk.gram(self._tasks.grads, self._tasks.groups)  # [K, T, T], of the gradients before they are turned
            record.groups, record.cosines[len(record.losses)] = similarity.by_layer(gram, self._tasks.groups.names)
        begin = time.perf_counter()
        found = self._tasks.apply()
        record.apply_seconds.append(time.perf_counter() - begin)
        # Rows are the tasks in their order: every step has all of them.
        record.measured.append((~found.similarity.isnan()).sum((0, 2)).tolist())
        record.turned.append(found.corrected.sum((0, 2)).tolist())
        record.conflicting.append((found.similarity < 0).sum((0, 2)).tolist())
        return torch.stack(losses), begin - before


def mean_loss(model: Translator, batch: Batch) -> torch.Tensor:
    """The mean negative log-likelihood of a character, in nats."""
    return model.losses(batch).sum() / (batch.target != 0).sum()


def train(make_arm: Callable[[Translator], Arm], setting: Setting, seed: int, title: str) -> Record:
    """Train a model from its seed on: the same seed gives every arm the same weights and the same batches."""
    torch.manual_seed(seed)
    model = Translator(len(setting.vocabulary))
    arm, record = make_arm(model), Record(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, setting.steps))
    evaluated = {round(setting.steps * part / 6) for part in range(1, 7)}
    source = data.batches(setting.split.train, setting.batch_size, seed)
    with tqdm(total=setting.steps, desc=title, unit="step") as progress:
        for step in range(setting.steps):
            begin = time.perf_counter()
            optimizer.zero_grad()
            losses, measuring = arm(next(source), record, measure=step % setting.measure_every == 0)
            optimizer.step()
            schedule.step()
            record.step_seconds.append(time.perf_counter() - begin - measuring)
            record.losses.append(losses.tolist())
            progress.set_postfix(loss=f"{losses.mean():.3f}", refresh=False)
            progress.update()
            if step + 1 in evaluated:
                record.held_out[step + 1] = held_out_losses(model, setting.vocabulary, setting.split.held_out)
    return record


def _rate(step: int, steps: int) -> float:
    """Factor on the learning rate: up in a straight line, then down in one."""
    warm_up = min(WARM_UP, max(1, steps // 4))
    return min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))
