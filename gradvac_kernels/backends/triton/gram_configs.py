"""How the rows are multiplied, by their number and type: a table of what was fastest and fits the registers."""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import device


class Config(NamedTuple):
    """How the pieces are gone through: ``kernel`` outer, dot or double; ``columns`` at a time, blocks of ``rows``.

    ``chain``, of dot: over how many times ``columns`` products are added up in float32.
    """

    kernel: str
    rows: int
    columns: int
    num_warps: int
    num_stages: int = 1
    chain: int = 1
    registers: int | None = None  # a thread, where the compiler is not to decide
    unit: int = 16  # of dot: columns that a matrix unit adds up; where it is 32, ``columns`` are 32 or 64

    def options(self) -> dict[str, int]:
        """Of the launch."""
        limit = {"maxnreg": self.registers} if self.registers and not torch.version.hip else {}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **limit, **device.FUSED}


def width(dtype: torch.dtype) -> int:
    """Elements of a load of 16 bytes."""
    return 16 // dtype.itemsize


def parts(dtype: torch.dtype) -> int:
    """Of a number, for matrix units: products of 16 bits are exact, and three times 8 are those of float32."""
    return 1 if dtype.itemsize == 2 else 3


def choose_config(num_rows: int, dtype: torch.dtype, hopper: bool = False) -> Config:
    """The configuration for T rows: what fits the registers, and reads memory as fast as it comes."""
    T, size = num_rows, dtype.itemsize
    if size == 8 or (6 if size == 2 else 13) < T:
        blocks = choose_blocks(T, dtype, hopper)
        # fewer conversions to float64, where float32 sums are nearly exact: of float16 they are not
        return blocks._replace(chain=2) if hopper and dtype == torch.bfloat16 and 32 < T <= 64 else blocks
    lanes = 128 if T <= 2 else 64 if T <= 4 else 32  # few rows: more loads of each under way
    if size == 2:
        stages, registers = (1, 168) if T <= 3 else (2, None)
    elif T <= 4 or T == 8:
        stages, registers = 1, 128
    else:
        stages, registers = 2, None if T < 8 else 168 if T <= 10 else 255  # fewer would spill
    return Config("outer", T, lanes * width(dtype), num_warps=1, num_stages=stages, registers=registers)


def choose_blocks(num_rows: int, dtype: torch.dtype, hopper: bool = False) -> Config:
    """That by blocks of pairs, for any number of rows."""
    T, size = num_rows, dtype.itemsize
    if size == 8:
        return Config("double", 4 if T <= 32 else 8, 128, num_warps=4)
    if size == 2 and T > 32:
        if hopper:
            return Config("dot", 64, 64, num_warps=4, num_stages=5, unit=32)
        return Config("dot", 64, 32, num_warps=4, num_stages=4, chain=2, unit=32)
    rows = 16 if T <= 16 else 32  # and 128 bytes of each at a time
    return Config("dot", rows, 8 * width(dtype), num_warps=rows // 16, num_stages=3, chain=1 if T > 32 else 2)


def choose_sums(num_rows: int) -> tuple[int, int]:
    """What is added up at a time, in float64: rows and columns of blocks of pairs, and lanes of each pair."""
    return (4, 256) if num_rows <= 32 else (8, 128)
