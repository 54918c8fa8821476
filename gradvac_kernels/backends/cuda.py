"""CUDA C++ kernels for NVIDIA GPUs (``csrc/cuda``): nothing is read back, and nothing waits.

With up to 8 tasks a step is one launch or two, with more it is four.
A layout of groups copies its tables to the device when it is first used: before a CUDA graph is captured if the call
was made once before.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from ..numerics import MAX_TARGET, Precision, precision
from .pieces import cut, piece_columns

try:
    from .. import _cuda

    _missing = None
except ImportError as error:  # said on first use and by python -m gradvac_kernels.env, not on import
    _missing = f"the native module gradvac_kernels._cuda is not built ({error})"

_DEVICE = "cuda"  # of the tensors it serves
_DTYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}  # gradvac::Dtype
_CAPABILITY = (8, 0)
_LARGE = 1 << 22  # columns
MOST_ROWS = 2304
"""A row's numbers fill a block's shared memory, 99 KiB on the smaller GPUs."""


def why_unavailable() -> str | None:
    """None where the native module is there, and a GPU that it is compiled for."""
    if _missing is not None or _DEVICE != "cuda":
        return _missing
    if not torch.cuda.is_available() or torch.version.hip:
        return "no NVIDIA GPU"
    return _why_unavailable_on(torch.cuda.current_device())


@functools.cache
def _why_unavailable_on(device: int) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if capability < _CAPABILITY:
        return f"it needs compute capability 8.0 or newer, found {capability}"
    with torch.cuda.device(device):
        return _cuda.why_unavailable(device) or None


def serves(device: torch.device) -> bool:
    """NVIDIA GPUs."""
    return device.type == _DEVICE


def gram(grads: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """``G[k, i, j] = <g_ik, g_jk>``, [K, T, T] float64."""
    with _current(grads.device):
        plan = _plan(grads, bounds)
        G, scratch = plan.new_matrices(), _Scratch(plan)
        _cuda.gram(_buffer(grads), plan.arguments, scratch.arguments, G.data_ptr(), _stream(grads.device))
    return G


def cross_gram(a: torch.Tensor, b: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """``C[k, i, j] = <a_ik, b_jk>``, [K, T, T'] float64."""
    C = a.new_empty(len(bounds), len(a), len(b), dtype=torch.float64)
    if C.numel() == 0:
        return C
    with _current(a.device):
        plan = _make_plan(_edges(bounds), max(len(a), len(b)), a.device)
        sums = C.new_empty(len(plan.pieces), len(a), len(b))
        _cuda.cross_gram(_buffer(a), _buffer(b), plan.arguments, sums.data_ptr(), C.data_ptr(), _stream(a.device))
    return C


def combine(grads: torch.Tensor, weights: torch.Tensor, bounds: torch.Tensor, out: torch.Tensor) -> None:
    """``out[p] = sum_j weights[k(p), j] * grads[j, p]``."""
    with _current(grads.device):
        plan = _plan(grads, bounds)
        _cuda.combine(_buffer(grads), weights.data_ptr(), plan.arguments, _result(out), _stream(grads.device))


def coefficients(
    G: torch.Tensor, ema: torch.Tensor | None, *, limits: Precision, **rule: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The inner loop of Algorithm 1 for ``G`` [K, T, T]; ``rule`` as ``reference.coefficients`` takes it."""
    K, T, _ = G.shape
    _check_rows("G", T)
    with _current(G.device):
        native, scratch = _Vaccine(G, ema, limits, **rule), _Scratch(_Plan.of_matrices(G))
        _cuda.coefficients(G.data_ptr(), K, T, native.arguments, scratch.arguments, _stream(G.device))
    return native.results


def vaccinate(
    grads: torch.Tensor,
    bounds: torch.Tensor,
    ema: torch.Tensor | None,
    *,
    out: torch.Tensor,
    one_launch: bool | None = None,
    **rule: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gram, coefficients, combine. ``one_launch``: whether they are one, of up to 8 rows; None decides."""
    with _current(grads.device):
        plan = _plan(grads, bounds)
        if one_launch is None:
            one_launch = _takes_one_launch(grads)
        G, scratch = plan.new_matrices(), _Scratch(plan)
        native = _Vaccine(G, ema, precision(grads.dtype), **rule)
        arguments = plan.arguments, native.arguments, scratch.arguments, G.data_ptr(), _result(out), one_launch
        _cuda.vaccinate(_buffer(grads), *arguments, _stream(grads.device))
    return *native.results, G


class _Plan(NamedTuple):
    """Tables of int64 on the device for K groups and T rows; see ``csrc/include/gradvac/cuda.h``."""

    K: int
    T: int
    pieces: torch.Tensor  # [pieces, 5]
    first_piece: torch.Tensor  # [K + 1]
    tiles: torch.Tensor  # [tiles, 3]

    @property
    def arguments(self) -> tuple[int, ...]:
        pieces, tiles = self.pieces, self.tiles
        return self.K, pieces.data_ptr(), self.first_piece.data_ptr(), len(pieces), tiles.data_ptr(), len(tiles)

    def new_matrices(self) -> torch.Tensor:
        return self.pieces.new_empty(self.K, self.T, self.T, dtype=torch.float64)

    @staticmethod
    def of_matrices(G: torch.Tensor) -> _Plan:
        nothing = G.new_empty(0, 3, dtype=torch.int64)
        return _Plan(len(G), G.shape[1], nothing, nothing, nothing)


def _plan(grads: torch.Tensor, bounds: torch.Tensor) -> _Plan:
    _check_rows("grads", len(grads))
    return _make_plan(_edges(bounds), len(grads), grads.device)


def _edges(bounds: torch.Tensor) -> tuple[int, ...]:
    return tuple(bounds.flatten().tolist())


def _check_rows(name: str, num_rows: int) -> None:
    if num_rows > MOST_ROWS:
        raise ValueError(f"{name}: expected at most {MOST_ROWS} rows, got {num_rows}")


@functools.cache  # for good: a captured CUDA graph may read a table at any time
def _make_plan(edges: tuple[int, ...], num_rows: int, device: torch.device) -> _Plan:
    """Copies its tables to the device and waits for them, once a layout."""
    bounds = list(zip(edges[::2], edges[1::2]))
    pieces = [cut(begin, end, piece_columns(end - begin, num_rows)) or [(begin, end)] for begin, end in bounds]
    first_piece = list(itertools.accumulate(map(len, pieces), initial=0))
    listed = [
        (k, *piece, first, last)
        for k, (its, first, last) in enumerate(zip(pieces, first_piece, first_piece[1:]))
        for piece in its
    ]
    columns = sum(end - begin for begin, end in bounds)
    tile = _cuda.TILE if columns > _LARGE else _cuda.TILE // 4  # or many multiprocessors have none
    tiles = [(k, *its) for k, (begin, end) in enumerate(bounds) for its in cut(begin, end, tile)]

    def table(rows: Sequence[tuple[int, ...]], width: int) -> torch.Tensor:
        return torch.tensor(rows, dtype=torch.int64).reshape(-1, width).to(device)

    return _Plan(
        K=len(bounds),
        T=num_rows,
        pieces=table(listed, 5),
        first_piece=torch.tensor(first_piece, dtype=torch.int64).to(device),
        tiles=table(tiles[::-1], 3),
    )


class _Scratch:
    """Device memory for one call."""

    def __init__(self, plan: _Plan) -> None:
        K, T, new = plan.K, plan.T, plan.pieces.new_empty
        self._sums = new(len(plan.pieces), T * (T + 1) // 2, dtype=torch.float64)
        self._rows = new(K, T, T, dtype=torch.float64)
        self._shown = new(K * T + (K + 2) // 2, dtype=torch.float64)  # [K, T], and behind it [K + 1] int32 counters
        shown = self._shown.data_ptr()
        self.arguments = self._sums.data_ptr(), self._rows.data_ptr(), shown, shown + K * T * 8


class _Vaccine:
    """What is between Gram matrices and weights, in the order of ``gradvac::cuda::Vaccine``."""

    def __init__(
        self,
        G: torch.Tensor,
        ema: torch.Tensor | None,
        limits: Precision,
        *,
        beta: float,
        target: float | None,
        task_ids: torch.Tensor | None,
        vaccinated: torch.Tensor | None,
        order: torch.Tensor | None,
        seed: int,
        step: int | torch.Tensor,
        first_group: int,
    ) -> None:
        K, T, _ = G.shape
        weights, similarity = G.new_empty(K, T), torch.empty_like(G)
        corrected = torch.empty_like(G, dtype=torch.bool)
        self.results = weights, similarity, corrected
        given = [None if x is None else x.contiguous() for x in (task_ids, vaccinated, order)]
        self._kept = given, ema, step  # the arguments are only addresses of these
        task_ids, vaccinated, order = given
        self.arguments = (
            _pointer(ema),
            0 if ema is None else ema.shape[1],
            0.0 if target is None else target,
            beta,
            MAX_TARGET,
            *limits,
            _pointer(task_ids),
            _pointer(vaccinated),
            -1 if vaccinated is None else len(vaccinated),
            _pointer(order),
            seed,
            0 if isinstance(step, torch.Tensor) else step,
            step.data_ptr() if isinstance(step, torch.Tensor) else 0,
            first_group,
            weights.data_ptr(),
            similarity.data_ptr(),
            corrected.data_ptr(),
        )


def _takes_one_launch(grads: torch.Tensor) -> bool:
    """Where all gradients fit the second-level cache, and for more than 4 rows: on an H200, only fewer, of 16 bits, are
    faster in two launches where they do not fit."""
    return len(grads) > 4 or grads.numel() * grads.itemsize <= _cache(grads.device)


@functools.cache
def _cache(device: torch.device) -> int:
    """Bytes of the second-level cache."""
    return torch.cuda.get_device_properties(device).L2_cache_size


def _buffer(grads: torch.Tensor) -> tuple[int, int, int, int, bool]:
    aligned = grads.data_ptr() % 16 == 0 and grads.stride(0) * grads.element_size() % 16 == 0
    return grads.data_ptr(), _DTYPE[grads.dtype], len(grads), grads.stride(0), aligned


def _result(out: torch.Tensor) -> tuple[int, int, bool]:
    return out.data_ptr(), _DTYPE[out.dtype], out.data_ptr() % 16 == 0


def _pointer(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@contextmanager
def _current(device: torch.device) -> Iterator[None]:
    """Launches go to the current device, of torch and of the runtime in the module: make it that of the tensors."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        _cuda.use_device(torch.cuda.current_device())
        yield


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
