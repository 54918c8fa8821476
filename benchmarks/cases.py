"""The grid of cases, and the least that each operator has to read, write and multiply on one of them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

import torch

import gradvac_kernels as gvk


@dataclass(frozen=True)
class Case:
    """T task gradients of P columns, in K groups of about equal size, each of which begins with a cache line.

    ``share`` of the tasks, the first ones, are vaccinated.
    """

    T: int
    P: int
    K: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    share: float = 1.0

    def __str__(self) -> str:
        share = "" if self.share == 1 else f"-{self.share:.0%}"
        return f"T{self.T}-P{short(self.P)}-K{self.K}-{self.dtype_name}{share}"

    @property
    def vaccinated(self) -> list[int] | None:
        """The tasks whose gradients may be turned, None for all."""
        return None if self.share == 1 else list(range(round(self.share * self.T)))

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def nbytes(self) -> int:
        """Bytes of one buffer [T, P]."""
        return self.T * self.P * self.dtype.itemsize

    @cached_property
    def groups(self) -> gvk.ParameterGroups:
        line = 64 // self.dtype.itemsize
        edges = [k * self.P // self.K // line * line for k in range(self.K)] + [self.P]
        return gvk.ParameterGroups.from_sizes(
            {f"group.{k}": b - a for k, (a, b) in enumerate(itertools.pairwise(edges))}
        )

    @cached_property
    def ranges(self) -> list[tuple[int, int]]:
        """First column and the one past the last, by group."""
        return list(itertools.pairwise(self.groups.offsets))

    def fill(self, buffers: torch.Tensor, seed: int = 0) -> None:
        """Gradients [T, P] of noise and a direction that half of the tasks follow and half oppose: cosines +-1/2.

        Targets start at zero and then follow the cosines, so at every step about half of the pairs get turned. Of
        several buffers [N, T, P], each has the rows of the one before it moved on by one.
        """
        generator = torch.Generator(self.device).manual_seed(seed)
        grads = buffers[0].normal_(generator=generator)
        direction = self.empty(self.P).normal_(generator=generator)
        for i, row in enumerate(grads):
            row.add_(direction, alpha=(-1) ** i)
        for last, grads in itertools.pairwise(buffers):
            grads[1:] = last[:-1]
            grads[0] = last[-1]

    def empty(self, *sizes: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Memory on the case's device, of the type of its gradients unless said otherwise."""
        return torch.empty(*sizes, dtype=dtype or self.dtype, device=self.device)

    def weights(self) -> torch.Tensor:
        """Some weights [K, T] to combine with."""
        generator = torch.Generator().manual_seed(0)
        return torch.rand(self.K, self.T, dtype=torch.float64, generator=generator).to(self.device)

    def targets(self) -> torch.Tensor:
        """Similarity targets [K, T, T] to start with."""
        return torch.zeros(self.K, self.T, self.T, dtype=torch.float64, device=self.device)


GRID = (
    Case(8, 10_000_000, 12),
    Case(8, 10_000_000, 12, torch.bfloat16),
    Case(8, 1_000_000, 100),
    Case(8, 1_000_000, 125, torch.float16),  # groups of equal sizes, as one of the peers needs
    Case(8, 120_000, 12),
    Case(16, 1_000_000, 100),
    Case(100, 1_000_000, 20),
)
"""What every operator is measured on by default."""

SCALING = {
    "T": tuple(Case(T, 1_000_000, 12) for T in (2, 4, 8, 16, 32, 64, 128)),
    "P": tuple(Case(8, P, 12) for P in (100_000, 300_000, 1_000_000, 3_000_000, 10_000_000)),
    "K": tuple(Case(8, 10_000_000, K) for K in (1, 4, 12, 40, 120, 400)),
    "share": tuple(Case(16, 1_000_000, 100, share=share) for share in (0.0, 0.25, 0.5)),
}
"""What ``vaccinate`` is measured on to see its cost grow, by what grows."""

FULL_SCALING = {
    "T": tuple(Case(T, 1_000_000, 12, dtype) for T in (2, 4, 8, 16, 32, 64, 128) for dtype in gvk.numerics.DTYPES),
    "P": tuple(Case(8, P, 12, dtype) for P in (30_000_000, 100_000_000) for dtype in (torch.float32, torch.bfloat16)),
    "K": tuple(Case(T, 1_000_000, K) for T in (4, 16, 64) for K in (1, 4, 12, 40, 120, 400)),
    "share": (),
}

FULL_GRID = tuple(
    dict.fromkeys(
        GRID
        + tuple(
            Case(*sizes)
            for sizes in itertools.product((2, 4, 8, 16, 32, 100), (120_000, 1_000_000), (12, 125), gvk.numerics.DTYPES)
        )
        + tuple(Case(T, 10_000_000, 12, dtype) for T in (2, 4, 8, 16, 32) for dtype in (torch.float32, torch.bfloat16))
    )
)
"""With ``--full``."""

GPU_GRID = (
    *(Case(T, 100_000_000, 12, dtype, "cuda") for dtype in (torch.float32, torch.bfloat16) for T in (2, 4, 8, 16)),
    Case(64, 20_000_000, 12, torch.bfloat16, "cuda"),
    Case(8, 100_000_000, 100, torch.float32, "cuda"),
    *(Case(T, 1_000_000, 100, dtype, "cuda") for dtype in (torch.float32, torch.bfloat16) for T in (4, 8)),
    Case(8, 3_000_000, 100, torch.bfloat16, "cuda"),
    Case(32, 10_000_000, 12, torch.float32, "cuda"),
)
"""With ``--device cuda``."""

GPU_GROUPS = tuple(Case(8, 200_000_000, K, torch.bfloat16, "cuda") for K in (50, 200, 625))
"""Groups of 4M, 1M and 320k columns, which would fit on the chip."""


@dataclass(frozen=True)
class Work:
    """What an operator cannot do without: bytes to and from memory, and multiply-adds."""

    bytes: int
    multiply_adds: int

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.multiply_adds + other.multiply_adds)


def work(op: str, case: Case) -> Work:
    """The work of one call.

    ``cross_gram`` is that of the first half of the rows with the second.
    ``coefficients`` reads the Gram matrices, writes weights and similarities, and adds rows of G up in the worst case.
    ``vaccinate`` counts both passes over the buffer in full. Where a group stays in the cache between its two passes
    the second read is free, so there a fraction of the floor above 1 is possible.
    """
    T, P = case.T, case.P
    gram = Work(case.nbytes, P * T * (T + 1) // 2)  # G is symmetric
    cross_gram = Work(case.nbytes, P * (T // 2) * (T - T // 2))
    combine = Work(case.nbytes + P * case.dtype.itemsize, P * T)
    entries = case.K * T * T
    solve = Work(8 * 4 * entries, entries * T)  # G, similarities, and the targets in and out
    every = {"gram": gram, "cross_gram": cross_gram, "combine": combine, "coefficients": solve}
    return {**every, "vaccinate": gram + combine}[op]


def short(columns: int) -> str:
    """10_000_000 as 10M, 120_000 as 120k."""
    for unit, suffix in ((10**6, "M"), (10**3, "k")):
        if columns >= unit and columns % unit == 0:
            return f"{columns // unit}{suffix}"
    return str(columns)
