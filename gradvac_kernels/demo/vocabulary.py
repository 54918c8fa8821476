"""Turn names into padded tensors of character ids, and back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from .data import Pair

PAD, BEGIN, END, UNKNOWN = range(4)


class Batch(NamedTuple):
    """Padded ids: what the encoder reads, what the decoder reads, and what it should say."""

    source: torch.Tensor  # [B, S]
    prefix: torch.Tensor  # [B, L]
    target: torch.Tensor  # [B, L]


class Vocabulary:
    """The characters of some pairs, and one token for each language.

    Args:
        languages: one token each; it opens the encoder's input and says what to translate into.
        pairs: the training pairs; a character that they lack is read as unknown.
    """

    def __init__(self, languages: Sequence[str], pairs: Iterable[Pair]) -> None:
        characters = sorted({character for pair in pairs for text in pair for character in text})
        self._tokens = ["", "", "", "�", *(f"<2{language}>" for language in languages), *characters]
        self._ids = {token: index for index, token in enumerate(self._tokens) if index >= UNKNOWN}

    def __len__(self) -> int:
        return len(self._tokens)

    def batch(self, samples: Sequence[tuple[str, Pair]]) -> Batch:
        """The ids of B pairs, each with the language of its name."""
        names = [self._encode(pair.name) for _, pair in samples]
        return Batch(
            _padded([[self._ids[f"<2{language}>"], *self._encode(pair.english)] for language, pair in samples]),
            _padded([[BEGIN, *name] for name in names]),
            _padded([[*name, END] for name in names]),
        )

    def decode(self, ids: Sequence[int]) -> str:
        """The text up to the end token."""
        ids = ids[: ids.index(END)] if END in ids else ids
        return "".join(self._tokens[index] for index in ids)

    def _encode(self, text: str) -> list[int]:
        return [self._ids.get(character, UNKNOWN) for character in text]


def _padded(rows: list[list[int]]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=PAD)
