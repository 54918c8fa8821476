"""Where the samples of a batch lie in a tensor: along one dimension, each with its task."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence

import torch


class Pattern:
    """The tasks along a dimension of samples, and what can be said of their order.

    Args:
        rows: the task of each index.
        of: what an index took them from.
    """

    def __init__(self, rows: torch.Tensor, of: Pattern | None = None) -> None:
        self.rows = rows
        self.size = int(rows.shape[0])
        self.of = of

    @functools.cached_property
    def uniform(self) -> bool:
        """All of one task."""
        return bool((self.rows == self.rows[:1]).all())

    @functools.cached_property
    def run(self) -> int:
        """The largest number such that every ``run`` consecutive indices, from 0 on, are of one task."""
        changes = (self.rows[1:] != self.rows[:-1]).nonzero().flatten() + 1
        return math.gcd(self.size, *changes.tolist())

    @functools.cached_property
    def period(self) -> int:
        """The smallest divisor of the size after which the tasks repeat."""
        n = self.size
        divisors = sorted({d for i in range(1, math.isqrt(n) + 1) if n % i == 0 for d in (i, n // i)})
        return next((d for d in divisors if torch.equal(self.rows[d:], self.rows[: n - d])), n)


class Samples:
    """The samples lie along dimension ``dim``; ``rows[i]`` is the task (a row of the slab) of what index i holds."""

    def __init__(self, dim: int, pattern: Pattern | torch.Tensor) -> None:
        self.dim = dim
        self.pattern = pattern if isinstance(pattern, Pattern) else Pattern(pattern)

    @property
    def rows(self) -> torch.Tensor:
        """``[size of dim]`` int64, on the CPU."""
        return self.pattern.rows

    @property
    def size(self) -> int:
        """Of ``dim``."""
        return self.pattern.size

    def same(self, other: Samples) -> bool:
        if self.dim == other.dim and self.pattern is other.pattern:
            return True
        if self.dim == other.dim and self.size == other.size:
            return torch.equal(self.rows, other.rows)
        if not self.size or not other.size:
            return False
        return self.pattern.uniform and other.pattern.uniform and bool(self.rows[0] == other.rows[0])


class Guessed(Samples):
    """Of a constant that the model made in a way that is not followed: not enough to meet a parameter alone."""

    def __init__(self, dim: int, pattern: Pattern, reason: str) -> None:
        super().__init__(dim, pattern)
        self.reason = reason


class Lost:
    """The tensor depends on samples, but which part of it on which is not known; ``reason`` says since when."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


Place = Samples | Lost | None  # None: the tensor does not depend on samples


class Loses(Exception):
    """An operation, named in front of this message, does not keep samples apart."""


class Contradicts(Loses):
    """It is given samples in different dimensions or orders."""

    def __init__(self) -> None:
        super().__init__("meets samples in different dimensions or orders")


def aligned(known: Sequence[tuple[torch.Tensor, Samples]], shape: torch.Size) -> Samples:
    """Broadcast together: dimensions count from the last."""
    places = []
    for tensor, samples in known:
        dim = samples.dim + len(shape) - tensor.dim()
        if dim < 0 or samples.size not in (1, shape[dim]):
            raise Loses("changes the number of samples")
        places.append(Samples(dim, samples.pattern if samples.size == shape[dim] else samples.rows.expand(shape[dim])))
    return unified(places)


def unified(places: Iterable[Samples]) -> Samples:
    """The one place that all agree on."""
    found = list(places)
    if not found:
        raise Loses("works across the samples")
    first, *others = found
    if not all(first.same(other) for other in others):
        raise Contradicts
    return first
