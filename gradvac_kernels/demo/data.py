"""Read the CLDR names and split them, so that nothing held out is ever trained on."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from babel import localedata

import gradvac_kernels as gvk

KINDS = ("territories", "languages", "scripts", "currency_names")
MAX_CHARACTERS = 24

Key = tuple[str, str]  # kind and CLDR code, such as ("territories", "NO")


class Pair(NamedTuple):
    """One thing's name in English and in another language."""

    english: str
    name: str


@dataclass(frozen=True)
class Split:
    """Pairs by language. The held-out ones share their keys: they are the same things in every language."""

    train: dict[str, list[Pair]]
    held_out: dict[str, list[Pair]]


def cldr_names(locale: str) -> dict[Key, str]:
    """The names that a locale itself has (none inherited from another), if short and in Latin script."""
    data = localedata.load(locale, merge_inherited=False)
    return {
        (kind, code): name
        for kind in KINDS
        for code, name in data.get(kind, {}).items()
        if isinstance(name, str) and len(name) <= MAX_CHARACTERS and _is_latin(name)
    }


def english_names() -> dict[Key, str]:
    """English names by key, each name once: a script called as its language would leak from training to held-out."""
    first: dict[str, tuple[Key, str]] = {}
    for key, name in cldr_names("en").items():
        first.setdefault(name.casefold(), (key, name))
    return dict(first.values())


def pairs_by_key(languages: Sequence[str]) -> dict[str, dict[Key, Pair]]:
    """For each language, the pairs whose name is not just the English one."""
    english = english_names()
    return {
        language: {
            key: Pair(english[key], name)
            for key, name in cldr_names(language).items()
            if key in english and name != english[key]
        }
        for language in languages
    }


def split(languages: Sequence[str], held_out: int, seed: int = 0) -> Split:
    """Hold out the keys that the most languages have.

    Args:
        languages: CLDR locales.
        held_out: the number of keys to hold out, from all languages at once.
        seed: chooses among the keys that equally many languages have.

    Returns:
        The pairs. A training pair is dropped if its name is a held-out one of the same language by another key.

    Raises:
        ValueError: a language is left without training or held-out pairs.
    """
    pairs = pairs_by_key(languages)
    keys = sorted({key for found in pairs.values() for key in found})
    random.Random(seed).shuffle(keys)
    keys.sort(key=lambda key: -sum(key in found for found in pairs.values()))  # stable: ties stay shuffled
    chosen = set(keys[:held_out])
    parts = Split({}, {})
    for language, found in pairs.items():
        parts.held_out[language] = [found[key] for key in keys[:held_out] if key in found]
        seen = {pair.name.casefold() for pair in parts.held_out[language]}
        parts.train[language] = [
            pair for key, pair in found.items() if key not in chosen and pair.name.casefold() not in seen
        ]
        if not parts.held_out[language] or not parts.train[language]:
            raise ValueError(f"{language}: no pairs left to train on or to hold out, with {held_out} held out")
    return parts


def low_resource(train: dict[str, list[Pair]]) -> tuple[str, ...]:
    """The languages with less than half the training pairs of the largest one."""
    largest = max(map(len, train.values()))
    return tuple(language for language, pairs in train.items() if 2 * len(pairs) < largest)


def batches(
    train: dict[str, list[Pair]], size: int, seed: int, temperature: float | None = None
) -> Iterator[list[list[Pair]]]:
    """Endless batches of pairs by language: ``size`` of each, so that a small language just comes round more often; or,
    with a temperature, as many in all, drawn by languages with ``P(i)`` proportional to ``pairs_i^(1 / temperature)``.
    """
    passes = [_Passes(pairs, f"{seed} {language}") for language, pairs in train.items()]
    if temperature is None:
        while True:
            yield [each.take(size) for each in passes]
    sampler = gvk.TaskSampler({language: len(pairs) for language, pairs in train.items()}, temperature, seed)
    while True:
        counts = torch.bincount(sampler.sample(size * len(train)), minlength=len(train)).tolist()
        yield [each.take(count) for each, count in zip(passes, counts)]


class _Passes:
    """Pairs in a new order every time all have been taken."""

    def __init__(self, pairs: list[Pair], seed: str) -> None:
        self._pairs, self._draw = pairs, random.Random(seed)
        self._queue: list[Pair] = []

    def take(self, count: int) -> list[Pair]:
        while len(self._queue) < count:
            self._queue += self._draw.sample(self._pairs, len(self._pairs))
        taken = self._queue[:count]
        del self._queue[:count]
        return taken


def _is_latin(name: str) -> bool:
    # No category "S" either: CLDR marks an inherited name with arrows.
    return all(
        "LATIN" in unicodedata.name(character, "") if character.isalpha() else unicodedata.category(character)[0] != "S"
        for character in name
    )
