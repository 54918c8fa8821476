"""Read Gram matrices as cosines: by layer, and within and across families."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch

WHOLE = "whole model"


def cosines(gram: torch.Tensor) -> torch.Tensor:
    """Cosines ``[..., T, T]`` of dot products ``[..., T, T]``; NaN where a gradient is zero."""
    norms = gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()  # [..., T]
    products = norms[..., :, None] * norms[..., None, :]
    return torch.where(products > 0, gram / products, torch.nan)


def by_layer(gram: torch.Tensor, names: Sequence[str]) -> tuple[tuple[str, ...], torch.Tensor]:
    """The cosines of each layer, and of the whole model.

    Args:
        gram: ``[K, T, T]``. Dot products add over columns, so those of matrices add up to their layer's.
        names: the K groups.

    Returns:
        The L names, the whole model last, and ``[L, T, T]``.
    """
    layers: dict[str, torch.Tensor] = {}
    for name, part in zip(names, gram):
        layer = _layer(name)
        layers[layer] = layers.get(layer, 0) + part
    layers[WHOLE] = gram.sum(0)
    return tuple(layers), cosines(torch.stack(list(layers.values())))


def within_and_across(cosine: torch.Tensor, families: Sequence[str]) -> tuple[float, float]:
    """The mean cosine of two languages of one family, and of two of different ones (NaN where there are none)."""
    family = np.array(families)
    pairs = ~np.eye(len(family), dtype=bool)
    same = torch.tensor((family[:, None] == family) & pairs)
    other = torch.tensor(family[:, None] != family)
    return float(cosine[same].nanmean()), float(cosine[other].nanmean())


def nearest_in_family(cosine: torch.Tensor, families: Sequence[str]) -> tuple[int, int]:
    """How many languages have their most similar one in their family, of how many that have one there at all."""
    others = cosine.nan_to_num(-1).clone().fill_diagonal_(-2)
    nearest = others.argmax(1).tolist()
    asked = [row for row, family in enumerate(families) if list(families).count(family) > 1]
    return sum(families[nearest[row]] == families[row] for row in asked), len(asked)


def _layer(name: str) -> str:
    found = re.match(r".*?\.\d+(?=\.|$)|[^.]+", name)
    return found[0] if found else name
