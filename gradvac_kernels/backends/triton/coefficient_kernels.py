"""Coefficients: the inner loop of Algorithm 1 in Gram space, one row of one group a program.

The recurrence is that of ``backends/reference.py`` and ``csrc/include/gradvac/recurrence.h``, the order of the loop
that of ``order.py``.
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl

from ...numerics import MAX_TARGET, Precision


@triton.jit
def _fold(state, value):
    # splitmix64's finaliser (Steele, Lea and Flood, OOPSLA 2014)
    x = (state ^ value) + tl.full([], 0x9E3779B97F4A7C15, tl.uint64)
    x = (x ^ (x >> 30)) * tl.full([], 0xBF58476D1CE4E5B9, tl.uint64)
    x = (x ^ (x >> 27)) * tl.full([], 0x94D049BB133111EB, tl.uint64)
    return x ^ (x >> 31)


@triton.jit
def _order_keys(seed, step, group, row, o_others):
    """The other rows are visited in ascending order of these, ties by index."""
    state = _fold(tl.full([], 0, tl.uint64), seed.to(tl.uint64))
    state = _fold(state, step.to(tl.uint64))
    state = _fold(state, group.to(tl.uint64))
    state = _fold(state, row.to(tl.uint64))
    return (_fold(state, o_others.to(tl.uint64)) >> 1).to(tl.int64)


@triton.jit
def _double(bits):
    """Numbers come as the bits of a float64: Triton hands floats over as float32."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def _entry(b_row, o_columns, j):
    """b_row[j], 0 for j outside."""
    return tl.sum(tl.where(o_columns == j, b_row, 0), 0)


@triton.jit(
    do_not_specialize=["beta_bits", "target_bits", "seed", "step", "first_group", "T", "N", "num_vaccinated"],
)
def solve(
    p_G,
    p_ema,
    beta_bits: tl.int64,
    target_bits: tl.int64,
    p_task_ids,
    p_vaccinated,
    p_order,
    seed: tl.int64,
    step,
    first_group: tl.int64,
    p_coefficients,
    p_arrived,
    p_weights,
    p_similarity,
    p_corrected,
    T,
    N,
    num_vaccinated,
    SIZE: tl.constexpr,
    STEP_ON_DEVICE: tl.constexpr,
    MAX_TARGET: tl.constexpr,
    NOISE: tl.constexpr,
    SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """Pointers to ema, task_ids, vaccinated and order may be None."""
    group = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64)
    o_columns = tl.arange(0, SIZE).to(tl.int64)
    m_columns = o_columns < T
    p_G += group * T * T

    # which tasks: ids that do not exist are neither measured nor stored
    if p_task_ids is None:
        row_id = row
        b_ids = o_columns
        b_known = m_columns
    else:
        row_id = tl.load(p_task_ids + row)
        b_ids = tl.load(p_task_ids + o_columns, mask=m_columns, other=-1)
        b_known = m_columns & (b_ids >= 0)
        if p_ema is not None:
            b_known = b_known & (b_ids < N)
    b_square = tl.load(p_G + o_columns * (T + 1), mask=m_columns, other=0)
    smallest = tl.full([], SMALLEST, tl.float64)
    largest = tl.full([], LARGEST, tl.float64)
    b_usable = b_known & (b_square >= smallest) & (b_square <= largest)
    may_turn = _entry(b_usable.to(tl.int32), o_columns, row) > 0
    if p_vaccinated is not None:
        named = 0
        for v in range(num_vaccinated):
            named += (tl.load(p_vaccinated + v) == row_id).to(tl.int32)
        may_turn = may_turn & (named > 0)

    b_c = (o_columns == row).to(tl.float64)
    b_similarity = tl.full([SIZE], float("nan"), tl.float64)
    b_corrected = tl.zeros([SIZE], tl.int1)
    if may_turn:
        beta = _double(beta_bits)
        max_target = tl.full([], MAX_TARGET, tl.float64)
        noise = tl.full([], NOISE, tl.float64)
        if p_ema is None:
            b_hats = tl.zeros([SIZE], tl.float64) + _double(target_bits)
        else:
            p_hats = p_ema + (group * N + row_id) * N + b_ids
            b_hats = tl.load(p_hats, mask=b_known, other=0)
        if p_order is None:
            if STEP_ON_DEVICE:
                counter = tl.load(step)
            else:
                counter = step
            b_keys = _order_keys(seed, counter, first_group + group, row, o_columns)
            done = tl.full([], 0x7FFFFFFFFFFFFFFF, tl.int64)
            b_keys = tl.where(m_columns & (o_columns != row), b_keys, done)
        b_v = tl.load(p_G + row * T + o_columns, mask=b_usable, other=0)
        n2 = _entry(b_square, o_columns, row)
        added = tl.sqrt(n2)  # the norms of all that was added up to make this row
        for t in range(T - 1):
            if p_order is None:
                j = tl.min(tl.where(b_keys == tl.min(b_keys, 0), o_columns, SIZE), 0)
                b_keys = tl.where(o_columns == j, done, b_keys)
            else:
                j = tl.load(p_order + (group * T + row) * (T - 1) + t)
            b_here = (o_columns == j) & b_usable & (o_columns != row)
            there = tl.sum(b_here.to(tl.int32), 0) > 0
            b_G_j = tl.load(p_G + j * T + o_columns, mask=b_usable & there, other=0)
            square_j = tl.where(there, _entry(b_square, o_columns, j), 1.0)
            hat = _entry(tl.where(b_here, b_hats, 0), o_columns, j)
            v_j = _entry(b_v, o_columns, j)
            measured = there & (n2 > noise * added * added)
            left = tl.where(measured, n2, 1.0)
            length = tl.sqrt(left)
            norm_j = tl.sqrt(square_j)
            phi = v_j / tl.sqrt(left * square_j)
            phi = tl.minimum(tl.maximum(phi, -1.0), 1.0)
            goal = tl.where(hat > max_target, max_target, hat)
            turned = measured & (phi < goal)
            sin_phi = tl.sqrt((1 - phi) * (1 + phi))
            sin_goal = tl.sqrt((1 - goal) * (1 + goal))
            a = tl.where(turned, length * (goal * sin_phi - phi * sin_goal) / (norm_j * sin_goal), 0.0)
            n2 += 2 * a * v_j + (a * norm_j) * (a * norm_j)
            added += tl.abs(a) * norm_j
            b_v += a * b_G_j
            b_c = tl.where(b_here, b_c + a, b_c)
            b_met = b_here & measured
            b_similarity = tl.where(b_met, phi, b_similarity)
            b_corrected = b_corrected | (b_met & turned)
            b_hats = tl.where(b_met, (1 - beta) * hat + beta * phi, b_hats)  # Eq. 3, always, outside the if
        if p_ema is not None:
            tl.store(p_hats, b_hats, mask=b_similarity == b_similarity)

    o_row = (group * T + row) * T + o_columns
    tl.store(p_similarity + o_row, b_similarity, mask=m_columns)
    tl.store(p_corrected + o_row, b_corrected, mask=m_columns)
    tl.store(p_coefficients + o_row, b_c, mask=m_columns)
    tl.debug_barrier()
    if tl.atomic_add(p_arrived + group, 1, sem="acq_rel") == T - 1:  # the last row of the group adds them all up
        b_weights = tl.zeros([SIZE], tl.float64)
        for i in range(T):
            p_c = p_coefficients + (group * T + i) * T + o_columns
            b_weights += tl.load(p_c, mask=m_columns, other=0, cache_modifier=".cg")
        tl.store(p_weights + group * T + o_columns, b_weights, mask=m_columns)


def _bits(number: float) -> int:
    return struct.unpack("<q", struct.pack("<d", number))[0]


def coefficients(
    G: torch.Tensor,
    arrived: torch.Tensor,
    ema: torch.Tensor | None,
    *,
    beta: float,
    target: float | None,
    task_ids: torch.Tensor | None,
    vaccinated: torch.Tensor | None,
    order: torch.Tensor | None,
    seed: int,
    step: int | torch.Tensor,
    first_group: int,
    limits: Precision,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """weights [K, T], similarity [K, T, T] and corrected [K, T, T]; updates ``ema``. ``arrived`` [K] are zeros."""
    K, T, _ = G.shape
    C, similarity = torch.empty_like(G), torch.empty_like(G)
    corrected = torch.empty_like(G, dtype=torch.bool)
    weights = G.new_empty(K, T)
    solve[(K, T)](
        G,
        ema,
        _bits(beta),
        _bits(0.0 if target is None else target),
        task_ids,
        vaccinated,
        order,
        seed,
        step,
        first_group,
        C,
        arrived,
        weights,
        similarity,
        corrected,
        T,
        0 if ema is None else ema.shape[1],
        0 if vaccinated is None else len(vaccinated),
        SIZE=triton.next_power_of_2(T),
        STEP_ON_DEVICE=isinstance(step, torch.Tensor),
        MAX_TARGET=MAX_TARGET,
        NOISE=limits.noise,
        SMALLEST=limits.smallest,
        LARGEST=limits.largest,
        num_warps=1 if T <= 128 else 4,
        enable_fp_fusion=False,  # every operation rounded, as PyTorch does
    )
    return weights, similarity, corrected
