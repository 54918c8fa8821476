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
        b_sum = _sum_rows(p_grads, row_stride, p_weights, o_columns, m_columns, T, AT_ONCE, COLUMNS, WIDTH, False)
        tl.store(p_out + o_columns, _narrow(b_sum, p_out.dtype.element_ty), mask=m_columns)


def combine(grads: torch.Tensor, weights: torch.Tensor, plan: Plan, out: torch.Tensor) -> None:
    """``out[p] = sum_j weights[k(p), j] * grads[j, p]``."""
    T = grads.shape[0]
    if not len(plan.blocks):
        return
    add_weighted[(len(plan.blocks),)](
        grads,
        grads.stride(0),
        weights,
        plan.blocks,
        out,
        T,
        AT_ONCE=min(4, triton.next_power_of_2(T)),
        COLUMNS=COMBINED,
        WIDTH=16 // grads.dtype.itemsize,
        OUT_WIDTH=16 // out.dtype.itemsize,
        ALIGNED=device.aligned(grads) and device.aligned(out),
        num_warps=2,
        **device.FUSED,
    )
