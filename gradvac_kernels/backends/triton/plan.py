"""How the columns of the groups are dealt out to programs: tables, made once for a layout and kept on the device."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..pieces import RUN, cut, piece_columns

COMBINED = 512  # columns of the result that a program of combine makes, or makes at a time


class Plan(NamedTuple):
    """Tables of int64 on the device, for K groups."""

    bounds: torch.Tensor
    """[K, 2], first column of each group and the one past its last."""
    pieces: torch.Tensor
    """[pieces, 2], the same of each piece of a group of more than RUN columns, in order."""
    first_piece: torch.Tensor
    """[K + 1], where the pieces of each group begin in ``pieces``; a shorter group has none."""
    blocks: torch.Tensor
    """[blocks, 3], group and columns of what each program of combine makes, from the end of the buffer to its start."""
    alignment: int
    """Every group that has pieces begins at a multiple of this many columns; 0 if none has."""


@functools.cache  # for good: a captured CUDA graph may read a table at any time
def make_plan(edges: tuple[int, ...], num_rows: int, device: torch.device, combined: int = COMBINED) -> Plan:
    """The plan for groups with these bounds. Copies its tables to the device and waits for them, once a layout."""
    bounds = list(zip(edges[::2], edges[1::2]))
    pieces = [cut(begin, end, piece_columns(end - begin, num_rows)) for begin, end in bounds]
    blocks = [(k, *block) for k, (begin, end) in enumerate(bounds) for block in cut(begin, end, combined)]

    def table(rows: Sequence[tuple[int, ...]], width: int) -> torch.Tensor:
        return torch.tensor(rows, dtype=torch.int64).reshape(-1, width).to(device)

    return Plan(
        bounds=table(bounds, 2),
        pieces=table(list(itertools.chain(*pieces)), 2),
        first_piece=table([(first,) for first in itertools.accumulate(map(len, pieces), initial=0)], 1),
        blocks=table(blocks[::-1], 3),
        alignment=math.gcd(*(begin for begin, end in bounds if end - begin > RUN)),
    )
