"""Train the arms of the experiment: the plain sum of the losses, and gradients by language made one by a method."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from tqdm import tqdm

import gradvac_kernels as gvk
from gradvac_kernels import methods

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
    temperature: float | None = None  # of sampling; None: equal parts

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
    weights: list[list[float]] = field(default_factory=list)  # [steps, T], the mean over the groups
    tracker: gvk.SimilarityTracker | None = None
    tracker_seconds: list[float] = field(default_factory=list)
    layers: tuple[str, ...] = ()
    batch_cosines: dict[int, torch.Tensor] = field(default_factory=dict)  # steps done -> [L, T, T] of the layers
    parallel_cosines: dict[int, torch.Tensor] = field(default_factory=dict)  # the same, on the same held-out things
    control_cosines: dict[int, torch.Tensor] = field(default_factory=dict)  # steps done -> [T, T], two batches
    measured: list[list[float]] = field(default_factory=list)  # [steps, T], the pairs that a language was measured in
    turned: list[list[float]] = field(default_factory=list)  # [steps, T], of these, similarity below the target
    conflicting: list[list[float]] = field(default_factory=list)  # [steps, T], of these, similarity below zero


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
        losses, means = split_losses(self._setting, self._model, *mixed(self._setting, batches))
        losses.sum().backward()
        return means, 0.0


class Aligned:
    """Each language's gradients, and the update from them by a method of this package.

    Args:
        capture: how to get at the gradients: ``"stream"``, all from the backward of one mixed batch, or ``"buffer"``,
            one backward a language.
        control: besides the batches, measure two others of names of the same languages.
    """

    def __init__(
        self,
        model: Translator,
        setting: Setting,
        granularity: str,
        method: methods.Method,
        capture: str = "stream",
        control: Iterator[list[list[data.Pair]]] | None = None,
    ) -> None:
        self._model, self._setting, self._capture, self._control = model, setting, capture, control
        self._tasks = gvk.TaskGradients(model, setting.languages, granularity=granularity, method=method)
        self._probe = [pairs[:PROBE] for pairs in setting.split.held_out.values()]
        self._tracker = gvk.SimilarityTracker(self._tasks.groups, self._tasks.tasks, window=setting.measure_every)

    def __call__(self, batches: list[list[data.Pair]], record: Record, measure: bool) -> tuple[torch.Tensor, float]:
        step = len(record.losses)
        measuring = 0.0
        if measure:  # on the same things in all languages: which names a batch happens to hold is most of its noise
            begin = time.perf_counter()
            record.parallel_cosines[step] = self._cosines(record, self._collect(self._probe))
            if self._control is not None:
                record.control_cosines[step] = self._control_cosines()
            measuring += time.perf_counter() - begin
        losses = self._backward(batches, keep=measure)
        if measure:
            begin = time.perf_counter()
            if len(self._tasks.task_ids) == len(batches):
                record.batch_cosines[step] = self._cosines(record, self._tasks.grads)
            measuring += time.perf_counter() - begin
        if self._tasks.task_ids:  # kept
            begin = time.perf_counter()
            self._tasks.apply()
            record.apply_seconds.append(time.perf_counter() - begin)
        found, ids = self._tasks.last, self._tasks.last_task_ids
        assert found is not None
        begin = time.perf_counter()
        self._tracker.update(found, ids)
        record.tracker = self._tracker
        record.tracker_seconds.append(time.perf_counter() - begin)
        for counts, shown in (
            (record.measured, ~found.similarity.isnan()),
            (record.turned, found.corrected),
            (record.conflicting, found.similarity < 0),
        ):
            if isinstance(self._tasks.method, gvk.GradVac):
                counts.append(_by_task(shown.sum((0, 2)), ids, len(batches)))
            else:  # no pair is met
                counts.append([0] * len(batches))
        record.weights.append(_by_task(found.weights.mean(0), ids, len(batches)))
        return losses, measuring

    def _backward(self, batches: list[list[data.Pair]], keep: bool = False) -> torch.Tensor:
        """Capture the gradients; each language's loss ``[T]`` in nats a character, NaN where there are no names."""
        if self._capture == "stream":
            batch, language = mixed(self._setting, batches)
            with self._tasks.batch(language, keep=keep):
                losses, means = split_losses(self._setting, self._model, batch, language)
                self._tasks.report_losses(means)
                losses.sum().backward()
            return means
        every = _characters(batches)
        each = []
        for name, pairs in zip(self._setting.languages, batches):
            if not pairs:
                each.append(torch.tensor(torch.nan))
                continue
            batch = self._setting.vocabulary.batch([(name, pair) for pair in pairs])
            with self._tasks.task(name):
                mean = mean_loss(self._model, batch)
                share = 1.0 if self._setting.temperature is None else len(batches) * _characters([pairs]) / every
                (share * mean).backward()
            each.append(mean.detach())
        self._tasks.report_losses(torch.stack(each))
        return torch.stack(each)

    def _collect(self, batches: list[list[data.Pair]]) -> torch.Tensor:
        """``[T, P]``: gradients of the mean loss of each language, in memory of their own, and nothing else is done."""
        batch, language = mixed(self._setting, batches)
        with self._tasks.batch(language, keep=True):
            mean_losses(self._model, batch, language, len(batches)).sum().backward()
        grads = self._tasks.grads.clone()
        self._tasks.discard()
        return grads

    def _cosines(self, record: Record, grads: torch.Tensor) -> torch.Tensor:
        gram = gvk.gram(grads, self._tasks.groups)  # [K, T, T], of the gradients before they are turned
        record.layers, cosines = similarity.by_layer(gram, self._tasks.groups.names)
        return cosines

    def _control_cosines(self) -> torch.Tensor:
        """``[T, T]``, whole model: cosines between the gradients of two batches that share no draw; on the diagonal,
        those of one language with itself."""
        assert self._control is not None
        a, b = (self._collect(next(self._control)) for _ in range(2))
        products = gvk.cross_gram(a, b, self._tasks.groups).sum(0)
        norms = [gvk.gram(each, self._tasks.groups).sum(0).diagonal().sqrt() for each in (a, b)]
        return products / (norms[0][:, None] * norms[1])


def _by_task(values: torch.Tensor, ids: Sequence[int], count: int) -> list[float]:
    """Of all languages, 0 for those that were not there."""
    found = values.new_zeros(count)
    found[list(ids)] = values
    return found.tolist()


def mixed(setting: Setting, batches: list[list[data.Pair]]) -> tuple[Batch, torch.Tensor]:
    """One batch of all languages, one after the other, and the language of each sample ``[B]``."""
    counts = torch.tensor([len(pairs) for pairs in batches])
    batch = setting.vocabulary.batch(
        [(language, pair) for language, pairs in zip(setting.languages, batches) for pair in pairs]
    )
    return batch, torch.arange(len(batches)).repeat_interleave(counts)


def mean_losses(model: Translator, batch: Batch, language: torch.Tensor, languages: int) -> torch.Tensor:
    """Each language's mean negative log-likelihood of a character ``[T]``, in nats; NaN without names."""
    characters = _sum_by(language, (batch.target != PAD).sum(1), languages)
    return _sum_by(language, model.losses(batch).sum(1), languages) / characters


def split_losses(
    setting: Setting, model: Translator, batch: Batch, language: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What each language adds to the loss to be minimised ``[T]``, and its mean in nats a character (detached).

    Batches of equal parts: the mean of each language. With a temperature a language's part is as large as its share of
    the characters, or drawing it more often would do nothing.
    """
    characters = _sum_by(language, (batch.target != PAD).sum(1), len(setting.languages))
    sums = _sum_by(language, model.losses(batch).sum(1), len(setting.languages))
    means = (sums / characters).detach()
    if setting.temperature is None:
        return sums / characters, means
    return sums * (len(characters) / characters.sum()), means


def mean_loss(model: Translator, batch: Batch) -> torch.Tensor:
    """The mean negative log-likelihood of a character, in nats."""
    return model.losses(batch).sum() / (batch.target != PAD).sum()


def _sum_by(language: torch.Tensor, values: torch.Tensor, languages: int) -> torch.Tensor:
    return values.new_zeros(languages).index_add(0, language, values)


def _characters(batches: list[list[data.Pair]]) -> int:
    """With the end of each name."""
    return sum(len(pair.name) + 1 for pairs in batches for pair in pairs)


class Trainee:
    """A model in training: its arm, its optimizer, its record. The same seed gives the same model."""

    def __init__(self, make_arm: MakeArm, setting: Setting, seed: int) -> None:
        torch.manual_seed(seed)
        model = Translator(len(setting.vocabulary))
        self.record = Record(model)
        self._setting, self._arm = setting, make_arm(model)
        self._optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98))
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, lambda step: rate(step, setting.steps))

    def step(self, batches: list[list[data.Pair]]) -> float:
        """Train on a batch of each language; their mean loss."""
        record, begin = self.record, time.perf_counter()
        self._optimizer.zero_grad()
        losses, measuring = self._arm(batches, record, measure=len(record.losses) % self._setting.measure_every == 0)
        self._optimizer.step()
        self._schedule.step()
        record.step_seconds.append(time.perf_counter() - begin - measuring)
        record.losses.append(losses.tolist())
        return float(losses.nanmean())

    def evaluate(self) -> None:
        """Note the held-out losses of now."""
        vocabulary, pairs = self._setting.vocabulary, self._setting.split.held_out
        self.record.held_out[len(self.record.losses)] = held_out_losses(self.record.model, vocabulary, pairs)


def train(arms: Mapping[str, MakeArm], setting: Setting, seed: int, quiet: bool = False) -> dict[str, Record]:
    """Train all arms from the same weights on the same batches, in turns: a busy machine slows all of them alike."""
    trainees = {name: Trainee(make_arm, setting, seed) for name, make_arm in arms.items()}
    evaluated = {round(setting.steps * part / 6) for part in range(1, 7)}
    batches = data.batches(setting.split.train, setting.batch_size, seed, setting.temperature)
    progress = tqdm(range(1, setting.steps + 1), desc=f"seed {seed}", unit="step", disable=quiet)
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


def rate(step: int, steps: int) -> float:
    """Factor on the learning rate: up in a straight line, then down in one."""
    warm_up = warm_up_steps(steps)
    return min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))
