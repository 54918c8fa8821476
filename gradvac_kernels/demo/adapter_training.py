"""Train a translator with language-specific adapters: all jointly, or the adapters by a meta-step."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm

from gradvac_kernels import TaskSampler, meta

from . import data
from .model import Translator
from .train import LEARNING_RATE, mean_loss, rate
from .vocabulary import Vocabulary

WIDTH, HIDDEN = 64, 192  # half of the demo's: a meta-step takes several passes
BOTTLENECK = 4  # the model's width over that inside an adapter, as in the paper

Names = dict[str, list[data.Pair]]  # by language


class Adapter(nn.Module):
    """A residual bottleneck (Houlsby et al., 2019); at first it changes nothing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inward, self.outward = nn.Linear(width, width // BOTTLENECK), nn.Linear(width // BOTTLENECK, width)
        nn.init.zeros_(self.outward.weight)
        nn.init.zeros_(self.outward.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.outward(self.inward(hidden).relu())


class AdaptedTranslator(Translator):
    """A translator with an adapter for each language behind every layer.

    Attributes:
        language: whose adapters are in use.
        shared: the parameters of all languages, theta.
        adapters: those of each language, phi.
    """

    def __init__(self, vocabulary_size: int, languages: Sequence[str]) -> None:
        super().__init__(vocabulary_size, WIDTH, hidden=HIDDEN)
        self.language = languages[0]
        self.shared = list(self.parameters())
        layers = [*self.encoder.layers, *self.decoder.layers]
        self.adapters = nn.ModuleDict({name: nn.ModuleList(Adapter(WIDTH) for _ in layers) for name in languages})
        for index, layer in enumerate(layers):
            layer.register_forward_hook(self._adapt(index))

    def _adapt(self, index: int) -> Callable[..., torch.Tensor]:
        def adapt(layer: nn.Module, inputs: object, hidden: torch.Tensor) -> torch.Tensor:
            return self.adapters[self.language][index](hidden)  # type: ignore[index]

        return adapt


@dataclass
class Setting:
    """What both arms share. ``validation`` holds the names that only adapters may learn from in a meta-step."""

    train: Names
    validation: Names
    held_out: Names
    vocabulary: Vocabulary
    steps: int
    batch_size: int
    inner_lr: float
    temperature: float

    @property
    def languages(self) -> list[str]:
        return list(self.train)


def make_setting(
    languages: Sequence[str],
    *,
    steps: int,
    batch_size: int,
    held_out: int,
    validation: float,
    inner_lr: float,
    temperature: float,
) -> Setting:
    """The data, split for all seeds alike; ``validation`` is the share of the training names to set aside.

    Raises:
        ValueError: a language is left without names for one of the parts.
    """
    split = data.split(languages, held_out)
    vocabulary = Vocabulary(languages, (pair for pairs in split.train.values() for pair in pairs))
    train, aside = {}, {}
    for language, pairs in split.train.items():
        shuffled = random.Random(language).sample(pairs, len(pairs))
        count = round(validation * len(pairs))
        train[language], aside[language] = shuffled[count:], shuffled[:count]
        if not train[language] or not aside[language]:
            raise ValueError(
                f"{language}: no names left for training or validation, with {count} of {len(pairs)} aside"
            )
    return Setting(train, aside, split.held_out, vocabulary, steps, batch_size, inner_lr, temperature)


class Joint:
    """Shared parameters and adapters go down the languages' mean loss together, on all names."""

    def __init__(self, setting: Setting, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = AdaptedTranslator(len(setting.vocabulary), setting.languages)
        self._setting = setting
        self._train = _batches(self._names(), setting.batch_size, seed)
        self._optimizer, self._schedule = _optimizer(self._trained(), setting.steps)

    def step(self) -> None:
        """One step of the shared parameters."""
        self._descend(next(self._train))

    def held_out_losses(self) -> dict[str, float]:
        """By language, with its own adapters: nats a character."""
        with torch.no_grad():
            return {name: float(self._loss(name, pairs)) for name, pairs in self._setting.held_out.items()}

    def _names(self) -> Names:
        return {name: pairs + self._setting.validation[name] for name, pairs in self._setting.train.items()}

    def _trained(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def _descend(self, batch: Names) -> None:
        self._optimizer.zero_grad()
        self._mean_loss(batch).backward()
        self._optimizer.step()
        self._schedule.step()

    def _loss(self, language: str, pairs: list[data.Pair]) -> torch.Tensor:
        self.model.language = language
        return mean_loss(self.model, self._setting.vocabulary.batch([(language, pair) for pair in pairs]))

    def _mean_loss(self, batch: Names) -> torch.Tensor:
        return torch.stack([self._loss(language, pairs) for language, pairs in batch.items()]).mean()


class MetaLearned(Joint):
    """The same for the shared parameters; before each of their steps, one language's adapters take a meta-step.

    Algorithm 1 of Wang, Lipton, Tsvetkov (EMNLP 2020), with Adam for both.
    """

    def __init__(self, setting: Setting, seed: int) -> None:
        super().__init__(setting, seed)
        self._validation = _batches(setting.validation, setting.batch_size, seed)
        sizes = {language: len(pairs) for language, pairs in setting.train.items()}
        self._next = iter(TaskSampler(sizes, setting.temperature, seed))
        self._adapters, self._adapters_schedule = _optimizer(self.model.adapters.parameters(), setting.steps)

    def step(self) -> None:
        """One step of one language's adapters, then one of the shared parameters."""
        train, validation, language = next(self._train), next(self._validation), next(self._next)
        phi = list(self.model.adapters[language].parameters())
        found = meta.adapter_gradients(
            lambda: self._loss(language, train[language]),
            lambda: self._mean_loss(validation),
            self.model.shared,
            phi,
            inner_lr=self._setting.inner_lr,
        )
        self._adapters.zero_grad()  # what has no gradient is not moved: the other languages'
        for parameter, gradient in zip(phi, found.gradients):
            parameter.grad = gradient
        self._adapters.step()
        self._adapters_schedule.step()
        self._descend(train)

    def _names(self) -> Names:
        return self._setting.train

    def _trained(self) -> list[nn.Parameter]:
        return self.model.shared


@dataclass
class Record:
    """What became of one arm."""

    held_out: dict[str, float]  # by language, in nats a character
    step_ms: float  # median


def train(setting: Setting, seed: int) -> dict[str, Record]:
    """Train both arms from the same weights, in turns: a busy machine slows both alike."""
    arms = {"joint": Joint(setting, seed), "meta": MetaLearned(setting, seed)}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in tqdm(range(setting.steps), desc=f"seed {seed}", unit="step"):
        for name, arm in arms.items():
            begin = time.perf_counter()
            arm.step()
            seconds[name].append(time.perf_counter() - begin)
    return {
        name: Record(arm.held_out_losses(), 1e3 * sorted(seconds[name])[setting.steps // 2])
        for name, arm in arms.items()
    }


def _batches(names: Names, size: int, seed: int) -> Iterator[Names]:
    return (dict(zip(names, batch)) for batch in data.batches(names, size, seed))


def _optimizer(
    parameters: Sequence[nn.Parameter] | Iterator[nn.Parameter], steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE, betas=(0.9, 0.98))
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps))
