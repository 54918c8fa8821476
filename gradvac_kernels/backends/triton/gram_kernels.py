"""Gram: dot products of all pairs of rows.

Two launches. The first one goes over the pieces of the groups of more than RUN columns: products are added up in
float32 over at most RUN columns and in float64 across, into sums of each piece's own [T, T]. The second one adds those
up, in order; for the shorter groups, whose few columns make gradients nearly parallel, so that every bit counts, it
computes the products itself, in float64.

The order of all additions is written out, or depends on nothing but the configuration: not on how the rows are aligned,
which only decides how wide a load is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..pieces import RUN
from . import device
from .gram_configs import Config, choose_config, choose_sums, parts, width
from .plan import Plan

# ---------------------------------------------------------------------------- few rows: outer products in registers


@triton.jit
def _split(x, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """[LANES, WIDTH] -> its WIDTH columns, the even ones first, and so on within."""
    if WIDTH == 1:
        return (tl.reshape(x, [LANES]),)
    else:
        even, odd = tl.split(tl.reshape(x, [LANES, WIDTH // 2, 2]))
        return _split(even, LANES, WIDTH // 2) + _split(odd, LANES, WIDTH // 2)


@triton.jit
def _lanes(p_row, start, end, LANES: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr):
    """WIDTH vectors [LANES] of a row; together, lane l of them holds columns start + WIDTH l .. + WIDTH - 1.

    WHOLE: all of them are there, and they may be loaded in one go.
    """
    if WHOLE:
        o_columns = start + tl.arange(0, LANES * WIDTH)
        b_x = tl.load(p_row + tl.max_contiguous(tl.multiple_of(o_columns, WIDTH), WIDTH)).to(tl.float32)
        return _split(tl.reshape(b_x, [LANES, WIDTH]), LANES, WIDTH)
    else:
        o_columns = start + tl.arange(0, LANES) * WIDTH
        return _strided(p_row, o_columns, end, WIDTH, 1)


@triton.jit
def _strided(p_row, o_columns, end, WIDTH: tl.constexpr, STEP: tl.constexpr):
    """What _split gives, from WIDTH loads."""
    if WIDTH == 1:
        return (tl.load(p_row + o_columns, mask=o_columns < end, other=0).to(tl.float32),)
    else:
        even = _strided(p_row, o_columns, end, WIDTH // 2, 2 * STEP)
        return even + _strided(p_row, o_columns + STEP, end, WIDTH // 2, 2 * STEP)


@triton.jit
def _add_outer(
    sums,
    p_grads,
    row_stride,
    start,
    end,
    T: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """sums[i (i + 1) / 2 + j] += rows i and j, j <= i: a chain of WIDTH products a lane, then one addition."""
    rows = ()
    for i in tl.static_range(T):
        rows = rows + (_lanes(p_grads, i * row_stride + start, i * row_stride + end, LANES, WIDTH, WHOLE),)
    added = ()
    for i in tl.static_range(T):
        for j in tl.static_range(i + 1):
            product = rows[i][0] * rows[j][0]
            for w in tl.static_range(1, WIDTH):
                product = tl.fma(rows[i][w], rows[j][w], product)
            added = added + (sums[i * (i + 1) // 2 + j] + product,)
    return added


@triton.jit(do_not_specialize=["row_stride"])
def outer(
    p_grads,
    row_stride: tl.int64,
    p_pieces,
    p_sums,
    T: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    ALIGNED: tl.constexpr,
    RUN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A piece a program of one warp: every lane keeps its own sums of all pairs."""
    piece = tl.program_id(0).to(tl.int64)
    begin = tl.load(p_pieces + 2 * piece)
    end = tl.load(p_pieces + 2 * piece + 1)
    p_sums += piece * T * T
    for run in range(begin, end, RUN):
        stop = tl.minimum(run + RUN, end)
        sums = ()
        for _ in tl.static_range(T * (T + 1) // 2):
            sums = sums + (tl.zeros([LANES], tl.float32),)
        whole = run
        if ALIGNED and begin % WIDTH == 0:
            whole = run + (stop - run) // (LANES * WIDTH) * (LANES * WIDTH)
            for start in tl.range(run, whole, LANES * WIDTH, num_stages=STAGES):
                sums = _add_outer(sums, p_grads, row_stride, start, whole, T, LANES, WIDTH, True)
        for start in range(whole, stop, LANES * WIDTH):  # what is left of an aligned run, or all of another
            sums = _add_outer(sums, p_grads, row_stride, start, stop, T, LANES, WIDTH, False)
        for i in tl.static_range(T):
            for j in tl.static_range(i + 1):
                total = tl.sum(sums[i * (i + 1) // 2 + j].to(tl.float64), 0)
                if run > begin:
                    total += tl.load(p_sums + i * T + j)
                tl.store(p_sums + i * T + j, total)
        tl.debug_barrier()  # the next run reads what one thread has written


# ------------------------------------------------------------------------------------------- many rows: matrix units


@triton.jit
def _block_pair(pair):
    """Row and column of a block in the lower triangle of blocks, counted row by row."""
    row = 0
    while (row + 1) * (row + 2) // 2 <= pair:
        row += 1
    return row, pair - row * (row + 1) // 2


@triton.jit
def _tile(p_grads, row_stride, o_rows, start, end, T, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr):
    """[ROWS, COLUMNS], zero past the last row and column."""
    o_columns = start + tl.arange(0, COLUMNS)
    o_tile = o_rows[:, None] * row_stride + o_columns[None, :]
    m_rows = (o_rows < T)[:, None]
    if WHOLE:
        o_tile = tl.max_contiguous(tl.multiple_of(o_tile, (1, WIDTH)), (1, WIDTH))
        return tl.load(p_grads + o_tile, mask=m_rows, other=0)
    else:
        return tl.load(p_grads + o_tile, mask=m_rows & (o_columns < end)[None, :], other=0)


@triton.jit
def _split_rows(b_x, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """[ROWS, 16, WIDTH] -> WIDTH times [ROWS, 16]."""
    if WIDTH == 1:
        return (tl.reshape(b_x, [ROWS, 16]),)
    else:
        even, odd = tl.split(tl.reshape(b_x, [ROWS, 16, WIDTH // 2, 2]))
        return _split_rows(even, ROWS, WIDTH // 2) + _split_rows(odd, ROWS, WIDTH // 2)


@triton.jit
def _units(b_x, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr):
    """[ROWS, COLUMNS] -> COLUMNS / UNIT times [ROWS, UNIT], each what a matrix unit adds up.

    Of 16 columns a lane feeds 2 and 2: here those are next to each other, and WIDTH / 4 times that is one load. So a
    tile gets from memory to the matrix units of a warp without being rearranged. For four warps: ``_halves``.
    """
    if UNIT > 16:
        return _halves(b_x, COLUMNS, UNIT)
    else:
        b_x = tl.reshape(b_x, [ROWS, COLUMNS // (4 * WIDTH), 4, WIDTH // 4, 2, 2])  # loads, lanes, units, halves, pairs
        return _split_rows(tl.permute(b_x, (0, 4, 2, 5, 3, 1)), ROWS, COLUMNS // 16)


@triton.jit
def _halves(b_x, COLUMNS: tl.constexpr, UNIT: tl.constexpr):
    """A tile of one unit as it is; one of two twice, as wide as it was, with zeros in place of the other unit.

    Matrix units of four warps read the second factor from shared memory, all columns that were loaded. In the first
    one, which comes from registers, zeros leave out those of the other unit, exactly: twice the products, but loads of
    two units, 128 bytes of a row, are what memory is fast at. (Where the second factor is not finite, nor is the sum.)
    """
    if COLUMNS == UNIT:
        return (b_x,)
    else:
        tl.static_assert(COLUMNS == 2 * UNIT)
        # from constants: from tl.arange, the compiler would not apply it to registers that go straight to a product
        first = tl.trans(tl.join(tl.full([UNIT], -1, tl.int16), tl.zeros([UNIT], tl.int16)))
        first = tl.reshape(first, [COLUMNS])[None, :]
        b_bits = b_x.to(tl.int16, bitcast=True)
        return (b_bits & first).to(b_x.dtype, bitcast=True), (b_bits & ~first).to(b_x.dtype, bitcast=True)


@triton.jit
def _upper(b_x):
    """float32, rounded to the 8 bits of bfloat16; as integers, for conversions one by one are slow."""
    return ((b_x.to(tl.int32, bitcast=True) + 0x8000) & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def _parts(b_x, PARTS: tl.constexpr, WIDEN: tl.constexpr):
    """What adds up to b_x, exactly: itself, or three of bfloat16."""
    if PARTS == 1:
        return (b_x.to(tl.float32) if WIDEN else b_x,)
    else:
        b_high = _upper(b_x)
        b_rest = b_x - b_high
        b_middle = _upper(b_rest)
        b_low = b_rest - b_middle
        if WIDEN:
            return b_high, b_middle, b_low
        else:
            return b_high.to(tl.bfloat16), b_middle.to(tl.bfloat16), b_low.to(tl.bfloat16)


@triton.jit
def _multiply(x, y, PARTS: tl.constexpr, ONE_BLOCK: tl.constexpr):
    """[ROWS, ROWS] sums of 16 (or 32) products, those of the smallest parts left out and the largest added last.

    ONE_BLOCK, of three parts: what is right is half the sum of this and its transpose.
    """
    if PARTS == 1:
        return tl.dot(x[0], tl.trans(y[0]), input_precision="ieee")
    else:
        b_products = tl.dot(x[1], tl.trans(y[1]), input_precision="ieee")
        if ONE_BLOCK:
            b_products = tl.dot(x[2] + x[2], tl.trans(y[0]), b_products, input_precision="ieee")
            b_products = tl.dot(x[1] + x[1], tl.trans(y[0]), b_products, input_precision="ieee")
        else:
            b_products = tl.dot(x[0], tl.trans(y[2]), b_products, input_precision="ieee")
            b_products = tl.dot(x[2], tl.trans(y[0]), b_products, input_precision="ieee")
            b_products = tl.dot(x[0], tl.trans(y[1]), b_products, input_precision="ieee")
            b_products = tl.dot(x[1], tl.trans(y[0]), b_products, input_precision="ieee")
        return tl.dot(x[0], tl.trans(y[0]), b_products, input_precision="ieee")


@triton.jit
def _chain(
    p_x,
    x_stride,
    T,
    o_rows,
    p_y,
    y_stride,
    U,
    o_others,
    start,
    end,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHAIN: tl.constexpr,
    UNIT: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    WHOLE: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """[ROWS, ROWS] sums of products, of rows of x [T, P] and of y [U, P], over CHAIN x COLUMNS columns."""
    for c in tl.static_range(CHAIN):
        b_x = _tile(p_x, x_stride, o_rows, start + c * COLUMNS, end, T, COLUMNS, WIDTH, WHOLE)
        units = _units(b_x, ROWS, COLUMNS, WIDTH, UNIT)
        if ONE_BLOCK:
            b_y = b_x
        else:
            b_y = _tile(p_y, y_stride, o_others, start + c * COLUMNS, end, U, COLUMNS, WIDTH, WHOLE)
        if UNIT > 16:
            others = (b_y,) * (COLUMNS // UNIT)
        elif not ONE_BLOCK:
            others = _units(b_y, ROWS, COLUMNS, WIDTH, UNIT)
        for u in tl.static_range(COLUMNS // UNIT):
            x = _parts(units[u], PARTS, WIDEN)
            y = x if ONE_BLOCK and UNIT == 16 else _parts(others[u], PARTS, WIDEN)
            b_products = _multiply(x, y, PARTS, ONE_BLOCK)
            if c + u == 0:
                b_chain = b_products
            else:
                b_chain = tl.fma(b_products, 1.0, b_chain)  # a plain + would be merged into the product
    return b_chain.to(tl.float64)


@triton.jit(do_not_specialize=["row_stride", "T"])
def dot(
    p_grads,
    row_stride: tl.int64,
    p_pieces,
    p_sums,
    T,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHAIN: tl.constexpr,
    UNIT: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """A piece and a pair of blocks of rows a program.

    Matrix units cut off what they add up instead of rounding it, so they add up no more than UNIT columns. Those sums
    are added in float32, over CHAIN x COLUMNS columns, and then in float64.
    """
    blocks = tl.cdiv(T, ROWS)
    pairs = blocks * (blocks + 1) // 2  # of one piece: programs that read the same columns run together
    piece = (tl.program_id(0) // pairs).to(tl.int64)
    block, other = _block_pair(tl.program_id(0) % pairs)
    begin = tl.load(p_pieces + 2 * piece)
    end = tl.load(p_pieces + 2 * piece + 1)
    o_rows = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    o_others = (other * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    b_sums = tl.zeros([ROWS, ROWS], tl.float64)
    whole = begin + (end - begin) // (CHAIN * COLUMNS) * (CHAIN * COLUMNS)
    for start in range(begin, whole, CHAIN * COLUMNS):
        b_sums += _chain(
            p_grads, row_stride, T, o_rows, p_grads, row_stride, T, o_others, start, whole, ROWS, COLUMNS, CHAIN, UNIT,
            WIDTH, PARTS, ALIGNED, ONE_BLOCK, WIDEN,
        )  # fmt: skip
    for start in tl.range(whole, end, 4 * WIDTH, num_stages=1):
        b_sums += _chain(
            p_grads, row_stride, T, o_rows, p_grads, row_stride, T, o_others, start, end, ROWS, 4 * WIDTH, 1, UNIT,
            WIDTH, PARTS, False, ONE_BLOCK, WIDEN,
        )  # fmt: skip
    if ONE_BLOCK and PARTS > 1:
        b_sums = 0.5 * (b_sums + tl.trans(b_sums))
    p_out = p_sums + piece * T * T + o_rows[:, None] * T + o_others[None, :]
    tl.store(p_out, b_sums, mask=(o_rows[:, None] >= o_others[None, :]) & (o_rows < T)[:, None])


# ------------------------------------------------------------------------------ float64: short groups, and adding up


@triton.jit
def _double_products(
    p_x, x_stride, T, o_rows, p_y, y_stride, U, o_others, begin, end, ROWS: tl.constexpr, LANES: tl.constexpr
):
    """[ROWS, ROWS] sums of products, of rows of x [T, P] and of y [U, P], over columns, in float64."""
    b_sums = tl.zeros([ROWS, ROWS, LANES], tl.float64)
    for start in range(begin, end, LANES):
        o_columns = start + tl.arange(0, LANES)
        m_columns = (o_columns < end)[None, :]
        p_rows = p_x + o_rows[:, None] * x_stride + o_columns[None, :]
        p_others = p_y + o_others[:, None] * y_stride + o_columns[None, :]
        b_x = tl.load(p_rows, mask=m_columns & (o_rows < T)[:, None], other=0).to(tl.float64)
        b_y = tl.load(p_others, mask=m_columns & (o_others < U)[:, None], other=0).to(tl.float64)
        b_sums += b_x[:, None, :] * b_y[None, :, :]
    return tl.sum(b_sums, 2)


@triton.jit(do_not_specialize=["row_stride", "T"])
def double(
    p_grads,
    row_stride: tl.int64,
    p_pieces,
    p_sums,
    T,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """A piece and a pair of blocks of rows a program, all in float64."""
    piece = tl.program_id(0).to(tl.int64)
    block, other = _block_pair(tl.program_id(1))
    begin = tl.load(p_pieces + 2 * piece)
    end = tl.load(p_pieces + 2 * piece + 1)
    o_rows = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    o_others = (other * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    b_sums = _double_products(p_grads, row_stride, T, o_rows, p_grads, row_stride, T, o_others, begin, end, ROWS, LANES)
    p_out = p_sums + piece * T * T + o_rows[:, None] * T + o_others[None, :]
    tl.store(p_out, b_sums, mask=(o_rows[:, None] >= o_others[None, :]) & (o_rows < T)[:, None])


@triton.jit
def _sum_of_pieces(p_sums, first, last, size, o_entries, m_entries, ROWS: tl.constexpr, LANES: tl.constexpr):
    """[ROWS, ROWS] entries of the pieces' sums, each ``size`` numbers, added up."""
    b_sums = tl.zeros([ROWS, ROWS, LANES], tl.float64)
    for start in range(first, last, LANES):
        o_pieces = start + tl.arange(0, LANES)
        p_in = p_sums + o_pieces[None, None, :] * size + o_entries[:, :, None]
        b_sums += tl.load(p_in, mask=m_entries[:, :, None] & (o_pieces < last)[None, None, :], other=0)
    return tl.sum(b_sums, 2)


@triton.jit(do_not_specialize=["row_stride", "T"])
def add_up(
    p_grads,
    row_stride: tl.int64,
    p_bounds,
    p_first_piece,
    p_sums,
    p_G,
    p_arrived,
    T,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """A group and a pair of blocks of rows a program: G, from the sums of the pieces or, without any, from the rows."""
    group = tl.program_id(0).to(tl.int64)
    block, other = _block_pair(tl.program_id(1))
    o_rows = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    o_others = (other * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    first = tl.load(p_first_piece + group)
    last = tl.load(p_first_piece + group + 1)
    o_entries = o_rows[:, None] * T + o_others[None, :]
    m_entries = (o_rows[:, None] >= o_others[None, :]) & (o_rows < T)[:, None]
    if first < last:
        b_G = _sum_of_pieces(p_sums, first, last, T * T, o_entries, m_entries, ROWS, LANES)
    else:
        begin = tl.load(p_bounds + 2 * group)
        end = tl.load(p_bounds + 2 * group + 1)
        b_G = _double_products(
            p_grads, row_stride, T, o_rows, p_grads, row_stride, T, o_others, begin, end, ROWS, LANES
        )
    p_out = p_G + group * T * T
    tl.store(p_out + o_entries, b_G, mask=m_entries)
    tl.store(p_out + o_others[None, :] * T + o_rows[:, None], b_G, mask=m_entries)
    tl.store(p_arrived + group, 0)  # the next launch counts here


# ---------------------------------------------------------------------------------------------------------- launcher

MOST_ROWS = 2880  # the pairs of blocks of 8 are the second dimension of a grid, which ends at 65535


def block_pairs(num_rows: int, rows: int) -> int:
    """Blocks of the lower triangle."""
    blocks = -(-num_rows // rows)
    return blocks * (blocks + 1) // 2


def measure(grads: torch.Tensor, plan: Plan, config: Config | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """G [K, T, T] float64, and [K] zeros for who counts next."""
    T, dtype = grads.shape[0], grads.dtype
    if T > MOST_ROWS:
        raise ValueError(f"grads: expected at most {MOST_ROWS} rows on a GPU, got {T}")
    config = config or choose_config(T, dtype, device.is_hopper(grads.device))
    K, pieces, row_stride = len(plan.bounds), len(plan.pieces), grads.stride(0)
    sums = grads.new_empty(pieces, T, T, dtype=torch.float64)
    G = grads.new_empty(K, T, T, dtype=torch.float64)
    arrived = grads.new_empty(K, dtype=torch.int32)
    if pieces:
        arguments = (grads, row_stride, plan.pieces, sums)
        options = config.options()
        pairs = block_pairs(T, config.rows)
        grid = (pieces, pairs)
        if config.kernel == "outer":
            lanes = config.columns // width(dtype)
            outer[grid](*arguments, T, lanes, width(dtype), device.aligned(grads), RUN, config.num_stages, **options)
        elif config.kernel == "dot":
            dot[(pieces * pairs,)](
                *arguments,
                T,
                config.rows,
                config.columns,
                config.chain,
                config.unit,
                width(dtype),
                parts(dtype),
                device.aligned(grads) and plan.alignment % width(dtype) == 0,
                pairs == 1,
                device.INTERPRETED,
                **options,
            )
        else:
            double[grid](*arguments, T, config.rows, config.columns, **options)
    rows, lanes = choose_sums(T)
    add_up[(K, block_pairs(T, rows))](
        grads,
        row_stride,
        plan.bounds,
        plan.first_piece,
        sums,
        G,
        arrived,
        T,
        rows,
        lanes,
        num_warps=rows,
        **device.FUSED,
    )
    return G, arrived
