"""Score a model on the names that were held out."""

from __future__ import annotations

import torch
from sacrebleu.metrics import CHRF

from .data import Pair
from .model import Translator
from .vocabulary import PAD, Vocabulary

CHUNK = 300

Pairs = dict[str, list[Pair]]


@torch.no_grad()
def held_out_losses(model: Translator, vocabulary: Vocabulary, pairs: Pairs) -> list[float]:
    """Each language's mean negative log-likelihood of a character, in nats."""
    losses = []
    for language, found in pairs.items():
        batch = vocabulary.batch([(language, pair) for pair in found])
        losses.append(float(model.losses(batch).sum() / (batch.target != PAD).sum()))
    return losses


def translations(model: Translator, vocabulary: Vocabulary, pairs: Pairs) -> dict[str, list[str]]:
    """The model's own names, for each language in the order of its pairs."""
    samples = [(language, pair) for language, found in pairs.items() for pair in found]
    order = sorted(range(len(samples)), key=lambda index: len(samples[index][1].english))  # little padding in a chunk
    names = [""] * len(samples)
    for begin in range(0, len(order), CHUNK):
        chunk = order[begin : begin + CHUNK]
        batch = vocabulary.batch([samples[index] for index in chunk])
        for index, ids in zip(chunk, model.translate(batch.source)):
            names[index] = vocabulary.decode(ids)
    rest = iter(names)
    return {language: [next(rest) for _ in found] for language, found in pairs.items()}


def chrf(names: dict[str, list[str]], pairs: Pairs) -> list[float]:
    """Each language's chrF, from 0 to 100."""
    metric = CHRF()
    return [
        float(metric.corpus_score(names[language], [[pair.name for pair in found]]).score)
        for language, found in pairs.items()
    ]
