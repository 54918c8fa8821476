"""Memory for slabs: one piece that is sized once, and taken from and given back in any order."""

from __future__ import annotations

import torch

_ALIGN = 64  # elements


class Arena:
    """Hands out 1-D tensors of one dtype and device.

    What is asked for beyond the piece's size is allocated by itself; :meth:`settle` then makes the piece as large as
    the most that was out at once.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._memory = torch.empty(0, dtype=dtype, device=device)
        self._out: dict[int, tuple[int, int]] = {}  # by address: what part of the memory is out
        self._extra: dict[int, int] = {}  # by address: the size of what was allocated by itself
        self._most = 0

    def take(self, numel: int) -> torch.Tensor:
        """``[numel]``, uninitialised."""
        begin = 0
        for first, last in sorted(self._out.values()):
            if begin + numel <= first:
                break
            begin = max(begin, last)
        if begin + numel <= len(self._memory):
            piece = self._memory[begin : begin + numel]
            self._out[piece.data_ptr()] = (begin, begin + -(-numel // _ALIGN) * _ALIGN)
        else:
            piece = self._memory.new_empty(numel)
            self._extra[piece.data_ptr()] = numel
        reach = max((last for _, last in self._out.values()), default=0)
        self._most = max(self._most, reach + sum(-(-size // _ALIGN) * _ALIGN for size in self._extra.values()))
        return piece

    def give_back(self, piece: torch.Tensor) -> None:
        """What :meth:`take` gave; do not use it any more."""
        if self._out.pop(piece.data_ptr(), None) is None:
            del self._extra[piece.data_ptr()]

    def settle(self) -> None:
        """Nothing is out any more: size the memory for the next time."""
        self._out.clear()
        self._extra.clear()
        if self._most > len(self._memory):
            self._memory = self._memory.new_empty(0)  # freed before the larger one is made
            self._memory = self._memory.new_empty(self._most)
