"""Plain PyTorch in Gram space, on any device: what the native kernels compute, in a form to read beside the paper."""

from __future__ import annotations

from typing import Any

import torch

from ..numerics import MAX_TARGET, Precision, precision
from ..order import task_order
from ..rows import turnable_rows


def _columns_at_once(grads: torch.Tensor) -> int:
    """Columns taken to float64 together: little memory; on a GPU more, where every call is a launch."""
    return 1 << 12 if grads.device.type == "cpu" else max(1 << 12, (1 << 22) // max(1, len(grads)))


def why_unavailable() -> str | None:
    """Always there."""
    return None


def serves(device: torch.device) -> bool:
    """Any device that has float64."""
    return device.type != "mps"


def gram(grads: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """``G[k, i, j] = <g_ik, g_jk>``, [K, T, T] float64."""
    G = grads.new_zeros(len(bounds), len(grads), len(grads), dtype=torch.float64)
    columns = _columns_at_once(grads)
    for k, (begin, end) in enumerate(bounds.tolist()):
        for column in range(begin, end, columns):
            block = grads[:, column : min(column + columns, end)].double()
            G[k] += block @ block.T
    return G.tril() + G.tril(-1).mT  # BLAS may round the two halves differently


def cross_gram(a: torch.Tensor, b: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """``C[k, i, j] = <a_ik, b_jk>``, [K, T, T'] float64."""
    C = a.new_zeros(len(bounds), len(a), len(b), dtype=torch.float64)
    columns = _columns_at_once(a if len(a) > len(b) else b)
    for k, (begin, end) in enumerate(bounds.tolist()):
        for column in range(begin, end, columns):
            stop = min(column + columns, end)
            C[k] += a[:, column:stop].double() @ b[:, column:stop].double().T
    return C


def combine(grads: torch.Tensor, weights: torch.Tensor, bounds: torch.Tensor, out: torch.Tensor) -> None:
    """``out[p] = sum_j weights[k(p), j] * grads[j, p]``."""
    columns = _columns_at_once(grads)
    for k, (begin, end) in enumerate(bounds.tolist()):
        for column in range(begin, end, columns):
            stop = min(column + columns, end)
            out[column:stop] = weights[k] @ grads[:, column:stop].double()


def coefficients(
    G: torch.Tensor,
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
    """Algorithm 1 in Gram space, all groups and rows at once; updates ``ema``.

    Row i of ``C`` holds the coefficients of g'_i = sum_j c_ij g_j. With v = G c_i and n2 = c_i' G c_i the measured
    cosine is v_j / sqrt(n2 G_jj), and adding a g_j is: c_ij += a, n2 += 2 a v_j + a^2 G_jj, v += a G[:, j].
    """
    K, T, _ = G.shape
    if order is None:
        order = task_order(K, T, seed, step, first_group, G.device)
    turnable = turnable_rows(T, task_ids, vaccinated, G.device)
    ids = torch.arange(T, device=G.device) if task_ids is None else task_ids
    square = G.diagonal(dim1=1, dim2=2)  # [K, T]
    usable = (square >= limits.smallest) & (square <= limits.largest)  # False for NaN
    square = torch.where(usable, square, 1.0)
    G = torch.where(usable[:, :, None] & usable[:, None, :], G, 0.0)
    may_turn = usable if turnable is None else usable & turnable

    C = torch.eye(T, dtype=G.dtype, device=G.device).repeat(K, 1, 1)  # [K, T, T]
    V = G.clone()  # V[k, i] = G c_i
    n2 = square.clone()  # [K, T]
    added = square.sqrt()  # [K, T], sum_j |c_ij| |g_j|
    similarity = torch.full_like(G, torch.nan)
    corrected = torch.zeros_like(G, dtype=torch.bool)
    group = torch.arange(K, device=G.device)[:, None]
    row = torch.arange(T, device=G.device)
    for j in order.unbind(2):  # [K, T]: one other row for each group and row
        v_j, square_j = V[group, row, j], square[group, j]
        norm_j = square_j.sqrt()
        measured = may_turn & usable[group, j] & (n2 > limits.noise * added**2)
        left = torch.where(measured, n2, 1.0)
        length = left.sqrt()
        phi = (v_j / (left * square_j).sqrt()).clamp(-1.0, 1.0)
        hat = torch.full_like(phi, target) if ema is None else ema[group, ids, ids[j]]  # type: ignore[arg-type]
        goal = hat.clamp(max=MAX_TARGET)
        turn = measured & (phi < goal)
        sin_phi, sin_goal = ((1 - phi) * (1 + phi)).sqrt(), ((1 - goal) * (1 + goal)).sqrt()
        a = torch.where(turn, length * (goal * sin_phi - phi * sin_goal) / (norm_j * sin_goal), 0.0)
        C[group, row, j] += a
        n2 += 2 * a * v_j + (a * norm_j) ** 2
        V += a[:, :, None] * G[group, j]
        added += a.abs() * norm_j
        similarity[group, row, j] = torch.where(measured, phi, torch.nan)
        corrected[group, row, j] = turn
        if ema is not None:  # always, outside the if, with the phi before the correction
            ema[group, ids, ids[j]] = torch.where(measured, (1 - beta) * hat + beta * phi, hat)
    return C.sum(1), similarity, corrected


def vaccinate(
    grads: torch.Tensor, bounds: torch.Tensor, ema: torch.Tensor | None, *, out: torch.Tensor, **rule: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gram, coefficients, combine; ``rule`` as :func:`coefficients` takes it."""
    G = gram(grads, bounds)
    found = coefficients(G, ema, limits=precision(grads.dtype), **rule)
    combine(grads, found[0], bounds, out)
    return *found, G
