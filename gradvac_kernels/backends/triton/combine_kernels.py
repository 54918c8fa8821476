"""Combine: the weighted sum of the rows, with weights by group.

One launch that goes over the buffer from its end to its start: what Gram read last may still be in the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import device
from .plan import COMBINED, Plan


@triton.jit
def _sum_rows(
    p_grads,
    row_stride,
    p_weights,
    o_columns,
    m_columns,
    T,
    AT_ONCE: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    WHOLE: tl.constexpr,
):
    b_sum = tl.zeros([COLUMNS], tl.float64)
    for first in range(0, T, AT_ONCE):
        for u in tl.static_range(AT_ONCE):  # loads of several rows are under way together
            j = first + u
            weight = tl.load(p_weights + j, mask=j < T, other=0)
            o_row = j.to(tl.int64) * row_stride + o_columns
            if WHOLE:
                o_row = tl.max_contiguous(tl.multiple_of(o_row, WIDTH), WIDTH)
                b_row = tl.load(p_grads + o_row, mask=j < T, other=0)
            else:
                b_row = tl.load(p_grads + o_row, mask=m_columns & (j < T), other=0)
            b_sum += weight * b_row.to(tl.float64)
    return b_sum


@triton.jit
def _narrow(b_sum, TYPE: tl.constexpr):
    if TYPE == tl.bfloat16:  # the interpreter has no way from float64
        return b_sum.to(tl.float32).to(TYPE)
    else:
        return b_sum.to(TYPE)


@triton.jit(do_not_specialize=["row_stride", "T"])
def add_weighted(
    p_grads,
    row_stride: tl.int64,
    p_weights,
    p_blocks,
    p_out,
    T,
    AT_ONCE: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """A block of columns of one group a program."""
    block = tl.program_id(0).to(tl.int64)
    group = tl.load(p_blocks + 3 * block)
    begin = tl.load(p_blocks + 3 * block + 1)
    end = tl.load(p_blocks + 3 * block + 2)
    p_weights += group * T
    o_columns = begin + tl.arange(0, COLUMNS)
    m_columns = o_columns < end
    if ALIGNED and (begin + COLUMNS <= end and begin % max(WIDTH, OUT_WIDTH) == 0):
        b_sum = _sum_rows(p_grads, row_stride, p_weights, o_columns, m_columns, T, AT_ONCE, COLUMNS, WIDTH, True)
        o_columns = tl.max_contiguous(tl.multiple_of(o_columns, OUT_WIDTH), OUT_WIDTH)
        tl.store(p_out + o_columns, _narrow(b_sum, p_out.dtype.element_ty))
    else:
        FEWER: tl.constexpr = COLUMNS // 2  # loaded one by one: in as few registers
        for start in tl.range(begin, end, FEWER, num_stages=1):
            o_fewer = start + tl.arange(0, FEWER)
            m_fewer = o_fewer < end
            b_fewer = _sum_rows(p_grads, row_stride, p_weights, o_fewer, m_fewer, T, AT_ONCE, FEWER, WIDTH, False)
            tl.store(p_out + o_fewer, _narrow(b_fewer, p_out.dtype.element_ty), mask=m_fewer)


# ---------------------------------------------------------------------------------------- few rows, of 16-bit numbers


@triton.jit
def _load_rows(
    p_grads, row_stride, start, end, T: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr
):
    """T vectors [COLUMNS], zero past the end. WHOLE: all of the columns are before it, or none."""
    rows = ()
    for j in tl.static_range(T):
        o_row = (j * row_stride + start) + tl.arange(0, COLUMNS)
        if WHOLE:
            o_row = tl.max_contiguous(tl.multiple_of(o_row, WIDTH), WIDTH)
            rows = rows + (tl.load(p_grads + o_row, mask=start < end, other=0),)
        else:
            rows = rows + (tl.load(p_grads + o_row, mask=start + tl.arange(0, COLUMNS) < end, other=0),)
    return rows


@triton.jit
def _weigh(rows, weights, T: tl.constexpr, COLUMNS: tl.constexpr, TYPE: tl.constexpr):
    b_sum = tl.zeros([COLUMNS], tl.float64)
    for j in tl.static_range(T):
        b_sum += weights[j] * rows[j].to(tl.float64)
    return _narrow(b_sum, TYPE)


@triton.jit(do_not_specialize=["row_stride"])
def add_weighted_few(
    p_grads,
    row_stride: tl.int64,
    p_weights,
    p_blocks,
    p_out,
    T: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """A longer block of one group a program, which loads the next columns before it adds those at hand."""
    TYPE: tl.constexpr = p_out.dtype.element_ty
    block = tl.program_id(0).to(tl.int64)
    group = tl.load(p_blocks + 3 * block)
    begin = tl.load(p_blocks + 3 * block + 1)
    end = tl.load(p_blocks + 3 * block + 2)
    weights = ()
    for j in tl.static_range(T):
        weights = weights + (tl.load(p_weights + group * T + j),)
    whole = begin
    if ALIGNED and begin % max(WIDTH, OUT_WIDTH) == 0:
        whole = begin + (end - begin) // COLUMNS * COLUMNS
        rows = _load_rows(p_grads, row_stride, begin, whole, T, COLUMNS, WIDTH, True)
        for start in tl.range(begin, whole, COLUMNS, num_stages=1):
            following = _load_rows(p_grads, row_stride, start + COLUMNS, whole, T, COLUMNS, WIDTH, True)
            o_columns = start + tl.arange(0, COLUMNS)
            o_columns = tl.max_contiguous(tl.multiple_of(o_columns, OUT_WIDTH), OUT_WIDTH)
            tl.store(p_out + o_columns, _weigh(rows, weights, T, COLUMNS, TYPE))
            rows = following
    FEWER: tl.constexpr = COLUMNS // 2  # loaded one by one: in as few registers
    for start in tl.range(whole, end, FEWER, num_stages=1):
        rows = _load_rows(p_grads, row_stride, start, end, T, FEWER, WIDTH, False)
        o_columns = start + tl.arange(0, FEWER)
        tl.store(p_out + o_columns, _weigh(rows, weights, T, FEWER, TYPE), mask=o_columns < end)


# --------------------------------------------------------------------------------------------------------- launchers


def few(grads: torch.Tensor) -> bool:
    """Rows that add_weighted_few adds: one block of them is read in less time than a program takes to begin."""
    return grads.shape[0] <= 8 and grads.dtype.itemsize == 2


def block_columns(grads: torch.Tensor) -> int:
    """What a program makes: up to eight times COMBINED, where there is enough for all."""
    return COMBINED * min(8, max(1, grads.shape[1] // (8192 * COMBINED))) if few(grads) else COMBINED


def combine(grads: torch.Tensor, weights: torch.Tensor, plan: Plan, out: torch.Tensor) -> None:
    """``out[p] = sum_j weights[k(p), j] * grads[j, p]``."""
    T = grads.shape[0]
    if not len(plan.blocks):
        return
    grid, arguments = (len(plan.blocks),), (grads, grads.stride(0), weights, plan.blocks, out, T)
    settings = {
        "COLUMNS": COMBINED,
        "WIDTH": 16 // grads.dtype.itemsize,
        "OUT_WIDTH": 16 // out.dtype.itemsize,
        "ALIGNED": device.aligned(grads) and device.aligned(out),
        "num_warps": 2,
        **device.FUSED,
    }
    if few(grads):
        add_weighted_few[grid](*arguments, **settings)
    else:
        add_weighted[grid](*arguments, AT_ONCE=min(4, triton.next_power_of_2(T)), **settings)
