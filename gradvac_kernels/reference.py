"""The oracle: Algorithm 1 of Wang et al., "Gradient Vaccine" (ICLR 2021), read literally on explicit vectors.

Every backend is held to it. It is slow on purpose: float64 vectors, Python loops, one line a line of the paper.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import ops
from .groups import ParameterGroups
from .numerics import MAX_TARGET, precision
from .result import Vaccination


def vaccinate(
    grads: torch.Tensor,
    groups: ParameterGroups,
    ema: torch.Tensor | None,
    *,
    beta: float = 1e-2,
    target: float | None = None,
    task_ids: torch.Tensor | Sequence[int] | None = None,
    vaccinated: Sequence[int] | None = None,
    order: torch.Tensor | None = None,
    seed: int = 0,
    step: int | torch.Tensor = 0,
    out: torch.Tensor | None = None,
    backend: str | None = None,
) -> Vaccination:
    """The same arguments, results and errors as :func:`gradvac_kernels.vaccinate`; ``backend`` must be None."""
    if backend is not None:
        raise ValueError(f"backend: the oracle has none, expected None, got {backend!r}")
    call = ops.prepare(grads, groups, ema, beta, target, task_ids, vaccinated, order, seed, step, out)
    call.check()
    T = grads.shape[0]
    ids = list(range(T)) if call.rule.task_ids is None else call.rule.task_ids.tolist()
    in_vaccinated = [call.rule.vaccinated is None or i in call.rule.vaccinated.tolist() for i in ids]
    if order is None:
        order = ops.task_order(len(groups), T, seed=seed, step=int(step), first_group=groups.first)
    loop = order.tolist()
    limits = precision(grads.dtype)

    weights = torch.ones(len(groups), T, dtype=torch.float64, device="cpu")
    similarity = torch.full((len(groups), T, T), torch.nan, dtype=torch.float64, device="cpu")
    corrected = torch.zeros(len(groups), T, T, dtype=torch.bool, device="cpu")
    gram = torch.empty_like(similarity)
    for k, (begin, end) in enumerate(groups.bounds.tolist()):
        g = call.grads[:, begin:end].to("cpu", torch.float64)  # [T, P_k]
        gram[k] = torch.stack([(g * row).sum(1) for row in g])  # pairwise sums: matmul's depend on the processor
        square = [float(row @ row) for row in g]
        usable = [limits.smallest <= s <= limits.largest for s in square]  # neither zero nor non-finite
        update = torch.zeros(end - begin, dtype=torch.float64, device="cpu")
        combination = torch.eye(T, dtype=torch.float64, device="cpu")
        for i in range(T):
            turned = g[i].clone()  # g'_i
            added = square[i] ** 0.5  # the norms of all that was added up to make g'_i
            for j in loop[k][i] if in_vaccinated[i] and usable[i] else ():
                n2 = float(turned @ turned)
                if not usable[j] or n2 <= limits.noise * added * added:
                    continue
                length, norm = n2**0.5, square[j] ** 0.5
                phi = min(max(float(turned @ g[j]) / (n2 * square[j]) ** 0.5, -1.0), 1.0)
                hat = float(ema[k, ids[i], ids[j]]) if target is None else target  # type: ignore[index]
                goal = min(hat, MAX_TARGET)
                similarity[k, i, j] = phi
                if phi < goal:
                    sin_phi, sin_goal = ((1 - phi) * (1 + phi)) ** 0.5, ((1 - goal) * (1 + goal)) ** 0.5
                    a = length * (goal * sin_phi - phi * sin_goal) / (norm * sin_goal)
                    turned += a * g[j]
                    added += abs(a) * norm
                    combination[i, j] += a
                    corrected[k, i, j] = True
                if target is None:  # always, outside the if, with the phi before the correction
                    ema[k, ids[i], ids[j]] = (1 - beta) * hat + beta * phi  # type: ignore[index]
            update += turned
        weights[k] = combination.sum(0)
        call.out[begin:end] = update.to(call.out)
    return Vaccination(call.out, *(found.to(grads.device) for found in (weights, similarity, corrected, gram)))
