"""Cross Gram: dot products of the rows of two buffers, x [T, P] and y [U, P].

As the Gram of many rows, in two launches and over the same pieces, but over all pairs of blocks of rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import device
from .gram_configs import Config, choose_blocks, choose_sums, parts, width
from .gram_kernels import _chain, _double_products, _sum_of_pieces
from .plan import Plan


@triton.jit
def _rows(U, ROWS: tl.constexpr):
    """Rows of x and of y that this program multiplies."""
    pair, blocks = tl.program_id(1), tl.cdiv(U, ROWS)
    o_block = tl.arange(0, ROWS)
    return (pair // blocks * ROWS + o_block).to(tl.int64), (pair % blocks * ROWS + o_block).to(tl.int64)


@triton.jit(do_not_specialize=["x_stride", "T", "y_stride", "U"])
def cross_dot(
    p_x,
    x_stride: tl.int64,
    T,
    p_y,
    y_stride: tl.int64,
    U,
    p_pieces,
    p_sums,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHAIN: tl.constexpr,
    UNIT: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """A piece and a pair of blocks of rows a program, by matrix units: see ``gram_kernels.dot``."""
    piece = tl.program_id(0).to(tl.int64)
    o_rows, o_others = _rows(U, ROWS)
    begin = tl.load(p_pieces + 2 * piece)
    end = tl.load(p_pieces + 2 * piece + 1)
    b_sums = tl.zeros([ROWS, ROWS], tl.float64)
    whole = begin + (end - begin) // (CHAIN * COLUMNS) * (CHAIN * COLUMNS)
    for start in range(begin, whole, CHAIN * COLUMNS):
        b_sums += _chain(
            p_x, x_stride, T, o_rows, p_y, y_stride, U, o_others, start, whole, ROWS, COLUMNS, CHAIN, UNIT, WIDTH,
            PARTS, ALIGNED, False, WIDEN,
        )  # fmt: skip
    for start in tl.range(whole, end, 4 * WIDTH, num_stages=1):
        b_sums += _chain(
            p_x, x_stride, T, o_rows, p_y, y_stride, U, o_others, start, end, ROWS, 4 * WIDTH, 1, UNIT, WIDTH,
            PARTS, False, False, WIDEN,
        )  # fmt: skip
    p_out = p_sums + piece * T * U + o_rows[:, None] * U + o_others[None, :]
    tl.store(p_out, b_sums, mask=(o_rows < T)[:, None] & (o_others < U)[None, :])


@triton.jit(do_not_specialize=["x_stride", "T", "y_stride", "U"])
def cross_double(
    p_x,
    x_stride: tl.int64,
    T,
    p_y,
    y_stride: tl.int64,
    U,
    p_pieces,
    p_sums,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """A piece and a pair of blocks of rows a program, all in float64."""
    piece = tl.program_id(0).to(tl.int64)
    o_rows, o_others = _rows(U, ROWS)
    begin = tl.load(p_pieces + 2 * piece)
    end = tl.load(p_pieces + 2 * piece + 1)
    b_sums = _double_products(p_x, x_stride, T, o_rows, p_y, y_stride, U, o_others, begin, end, ROWS, LANES)
    p_out = p_sums + piece * T * U + o_rows[:, None] * U + o_others[None, :]
    tl.store(p_out, b_sums, mask=(o_rows < T)[:, None] & (o_others < U)[None, :])


@triton.jit(do_not_specialize=["x_stride", "T", "y_stride", "U"])
def cross_add_up(
    p_x,
    x_stride: tl.int64,
    T,
    p_y,
    y_stride: tl.int64,
    U,
    p_bounds,
    p_first_piece,
    p_sums,
    p_C,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """A group and a pair of blocks of rows a program: C, from the sums of the pieces or, without any, from the rows."""
    group = tl.program_id(0).to(tl.int64)
    o_rows, o_others = _rows(U, ROWS)
    first = tl.load(p_first_piece + group)
    last = tl.load(p_first_piece + group + 1)
    o_entries = o_rows[:, None] * U + o_others[None, :]
    m_entries = (o_rows < T)[:, None] & (o_others < U)[None, :]
    if first < last:
        b_C = _sum_of_pieces(p_sums, first, last, T * U, o_entries, m_entries, ROWS, LANES)
    else:
        begin = tl.load(p_bounds + 2 * group)
        end = tl.load(p_bounds + 2 * group + 1)
        b_C = _double_products(p_x, x_stride, T, o_rows, p_y, y_stride, U, o_others, begin, end, ROWS, LANES)
    tl.store(p_C + group * T * U + o_entries, b_C, mask=m_entries)


MOST_PAIRS = 65535  # of blocks: the second dimension of a grid


def cross_measure(x: torch.Tensor, y: torch.Tensor, plan: Plan, config: Config | None = None) -> torch.Tensor:
    """C [K, T, U] float64."""
    T, U, dtype = len(x), len(y), x.dtype
    config = config or choose_blocks(max(T, U), dtype, device.is_hopper(x.device))
    rows, lanes = choose_sums(max(T, U))
    if block_pairs(T, U, min(rows, config.rows)) > MOST_PAIRS:
        raise ValueError(f"a: expected at most {MOST_PAIRS} pairs of 8 of its rows and 8 of b's, got {T} x {U} rows")
    K, pieces = len(plan.bounds), len(plan.pieces)
    sums, C = (x.new_empty(size, T, U, dtype=torch.float64) for size in (pieces, K))
    buffers = x, x.stride(0), T, y, y.stride(0), U
    if pieces:
        grid, arguments = (pieces, block_pairs(T, U, config.rows)), (*buffers, plan.pieces, sums)
        if config.kernel == "double":
            cross_double[grid](*arguments, config.rows, config.columns, **config.options())
        else:
            cross_dot[grid](
                *arguments,
                config.rows,
                config.columns,
                config.chain,
                config.unit,
                width(dtype),
                parts(dtype),
                device.aligned(x) and device.aligned(y) and plan.alignment % width(dtype) == 0,
                device.INTERPRETED,
                **config.options(),
            )
    cross_add_up[(K, block_pairs(T, U, rows))](
        *buffers, plan.bounds, plan.first_piece, sums, C, rows, lanes, num_warps=rows, **device.FUSED
    )
    return C


def block_pairs(T: int, U: int, rows: int) -> int:
    """Blocks of ``rows`` x ``rows`` pairs."""
    return -(-T // rows) * -(-U // rows)
