"""A small transformer that reads and writes characters."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .data import MAX_CHARACTERS
from .vocabulary import BEGIN, END, PAD, Batch

MAX_LENGTH = MAX_CHARACTERS + 1  # with the language token, or the end token


class Translator(nn.Module):
    """Encoder and decoder of two layers, with one embedding for both sides and the output.

    There is no dropout: it would be the one thing that two arms of an experiment do not share.
    """

    def __init__(
        self, vocabulary_size: int, width: int = 128, heads: int = 4, hidden: int = 384, layers: int = 2
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, width)
        self.positions = nn.Embedding(MAX_LENGTH, width)
        shape: dict[str, Any] = {"d_model": width, "nhead": heads, "dim_feedforward": hidden, "dropout": 0.0}
        shape |= {"batch_first": True, "norm_first": True}
        norm = nn.LayerNorm(width, elementwise_affine=False)  # no parameters: every parameter lies in a layer
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(**shape), layers, norm, False)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**shape), layers, norm)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        for embedding in (self.embedding, self.positions):
            nn.init.normal_(embedding.weight, std=0.3 * width**-0.5)

    def forward(self, source: torch.Tensor, prefix: torch.Tensor) -> torch.Tensor:
        """Logits of the next character ``[B, L, V]``, from the source ``[B, S]`` and the name so far ``[B, L]``."""
        return self.decode(self.encode(source), source, prefix)

    def encode(self, source: torch.Tensor) -> torch.Tensor:
        """The encoder's output ``[B, S, width]``."""
        return self.encoder(self._embed(source), src_key_padding_mask=source == PAD)

    def decode(self, memory: torch.Tensor, source: torch.Tensor, prefix: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, L, V]``, from what :meth:`encode` gave."""
        length = prefix.shape[1]
        later = torch.ones(length, length, dtype=torch.bool).triu(1)  # [L, L]
        # The causal mask alone keeps real characters from the padding, which comes after them.
        hidden = self.decoder(self._embed(prefix), memory, tgt_mask=later, memory_key_padding_mask=source == PAD)
        return hidden @ self.embedding.weight.T

    def losses(self, batch: Batch) -> torch.Tensor:
        """The negative log-likelihood of each character ``[B, L]`` in nats, zero at the padding."""
        logits = self(batch.source, batch.prefix)
        flat = nn.functional.cross_entropy(
            logits.flatten(0, 1), batch.target.flatten(), ignore_index=PAD, reduction="none"
        )
        return flat.view_as(batch.target)

    @torch.no_grad()
    def translate(self, source: torch.Tensor) -> list[list[int]]:
        """Greedy translations of ``[B, S]``, as lists of ids; an end token closes those that ended in time."""
        memory = self.encode(source)
        prefix = torch.full((len(source), 1), BEGIN)  # [B, 1], then one character longer every time
        ended = torch.zeros(len(source), dtype=torch.bool)
        while prefix.shape[1] <= MAX_LENGTH and not ended.all():
            logits = self.decode(memory, source, prefix)[:, -1]
            logits[:, [PAD, BEGIN]] = -torch.inf
            chosen = logits.argmax(-1)
            ended |= chosen == END
            prefix = torch.cat([prefix, chosen[:, None]], 1)
        return prefix[:, 1:].tolist()

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        scale = self.embedding.embedding_dim**0.5
        return self.embedding(ids) * scale + self.positions.weight[: ids.shape[1]] * scale
