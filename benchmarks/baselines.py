"""The peers: each as its users run it, and at its best, on one buffer [T, P] whose groups are ranges of columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from unittest import mock

import torch

import gradvac_kernels as gvk
from gradvac_kernels.backends import reference
from gradvac_kernels.numerics import precision

from .cases import Case
from .contest import Contestant, NotRun

if TYPE_CHECKING:
    import numpy as np

BETA = 1e-2
_BLOCK = 1 << 14  # columns of T = 8 float32 gradients that fit in a core's second-level cache
_TORCHJD_ERROR = 1e-3  # its Gram and its recurrence are in the type of the gradients
_STEPS = {"cpu": 20_000, "cuda": 10_000}  # of the inner loop in Python: about a second a call


def tolerance(dtype: torch.dtype, least: float = 1e-4) -> float:
    """What a few roundings to ``dtype`` amount to, and at least ``least`` (float32 sums over all of a group)."""
    return max(least, 4 * torch.finfo(dtype).eps)


# --------------------------------------------------------------------------------------------- plain sum, no method


def plain_sum(case: Case) -> Contestant:
    """``grads.sum(0)``: what training without any method does. It makes a new tensor at every step."""
    return Contestant(lambda grads: grads.sum(0), tolerance(case.dtype), truth=_sum)


def plain_sum_out(case: Case) -> Contestant:
    """The same into a tensor that is kept."""
    out = case.empty(case.P)
    return Contestant(lambda grads: torch.sum(grads, 0, out=out), tolerance(case.dtype), truth=_sum)


def _for_the_host(case: Case) -> None:
    if case.device != "cpu":
        raise NotRun("made for the caches of a CPU")


def _sum(grads: torch.Tensor) -> torch.Tensor:
    return grads.sum(0, dtype=torch.float64)


# -------------------------------------------------------------------------------------------- torch's matmul a group


def gram_matmul(case: Case) -> Contestant:
    """``g @ g.T`` a group, in the type of the gradients."""
    return Contestant(
        lambda grads: torch.stack([grads[:, a:b] @ grads[:, a:b].T for a, b in case.ranges]), tolerance(case.dtype)
    )


def gram_matmul_blocks(case: Case) -> Contestant:
    """``g @ g.T`` a block of columns, which stays in the cache; half precision in float32, as overflow demands."""
    _for_the_host(case)
    return Contestant(lambda grads: _gram(grads, case), tolerance(case.dtype))


def cross_gram_matmul(case: Case) -> Contestant:
    """``a @ b.T`` a group, of the first half of the rows and the second, in the type of the gradients."""
    half = case.T // 2
    return Contestant(
        lambda grads: torch.stack([grads[:half, a:b] @ grads[half:, a:b].T for a, b in case.ranges]),
        tolerance(case.dtype),
    )


def combine_matmul(case: Case) -> Contestant:
    """``w @ g`` a group, put together with ``torch.cat``."""
    weights = case.weights().to(case.dtype)
    return Contestant(
        lambda grads: torch.cat([w @ grads[:, a:b] for w, (a, b) in zip(weights, case.ranges)]), tolerance(case.dtype)
    )


def combine_matmul_out(case: Case) -> Contestant:
    """``w @ g`` a group, each into its range of a tensor that is kept."""
    weights = case.weights().to(case.dtype)
    out = case.empty(case.P)
    return Contestant(lambda grads: _combine(grads, weights, case, out), tolerance(case.dtype))


def _gram(grads: torch.Tensor, case: Case) -> torch.Tensor:
    wide = torch.promote_types(case.dtype, torch.float32)
    G = torch.zeros(case.K, case.T, case.T, dtype=wide, device=case.device)
    for k, (a, b) in enumerate(case.ranges):
        for block in grads[:, a:b].split(_BLOCK, dim=1):
            block = block.to(wide)
            G[k].addmm_(block, block.T)
    return G


def _combine(grads: torch.Tensor, weights: torch.Tensor, case: Case, out: torch.Tensor) -> torch.Tensor:
    for k, (a, b) in enumerate(case.ranges):
        torch.mm(weights[k, None], grads[:, a:b], out=out[None, a:b])
    return out


# ------------------------------------------------------------------------------------------------ two passes in torch


def two_pass(case: Case) -> Contestant:
    """The two passes with torch's matmul at its best, and between them Algorithm 1 on the Gram matrices in numpy."""
    import numpy as np

    _for_the_host(case)
    ema = np.zeros((case.K, case.T, case.T))
    out = case.empty(case.P)
    rng = np.random.default_rng(0)

    def run(grads: torch.Tensor, order: np.ndarray | None = None) -> torch.Tensor:
        order = _random_order(case, rng) if order is None else order
        weights = _coefficients(_gram(grads, case).double().numpy(), ema, order)
        return _combine(grads, torch.from_numpy(weights).to(case.dtype), case, out)

    order = gvk.task_order(case.K, case.T, seed=0, step=0).numpy()
    return Contestant(run, tolerance(case.dtype), check=lambda grads: run(grads, order), waits=True)


def _random_order(case: Case, rng: np.random.Generator) -> np.ndarray:
    import numpy as np

    others = rng.random((case.K, case.T, case.T - 1)).argsort(2)
    return others + (others >= np.arange(case.T)[:, None])


def _coefficients(G: np.ndarray, ema: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Algorithm 1 in Gram space, all groups and rows at once: [K, T, T] -> weights [K, T]; updates ``ema``."""
    import numpy as np

    K, T, _ = G.shape
    group, row = np.arange(K)[:, None], np.arange(T)
    n2 = G.diagonal(axis1=1, axis2=2).copy()
    norm = np.sqrt(n2)
    C = np.broadcast_to(np.eye(T), G.shape).copy()
    V = G.copy()  # V[k, i] = G c_i
    for j in np.moveaxis(order, 2, 0):  # [K, T]: one other row for each group and row
        v, norm_j, hat, length = V[group, row, j], norm[group, j], ema[group, row, j], np.sqrt(n2)
        phi = np.clip(v / (length * norm_j), -1.0, 1.0)
        sin_phi, sin_hat = np.sqrt(1 - phi**2), np.sqrt(1 - hat**2)
        a = np.where(phi < hat, length * (hat * sin_phi - phi * sin_hat) / (norm_j * sin_hat), 0.0)
        C[group, row, j] += a
        n2 += 2 * a * v + (a * norm_j) ** 2
        V += a[:, :, None] * G[group, j]
        ema[group, row, j] = (1 - BETA) * hat + BETA * phi
    return C.sum(1)


def two_pass_compiled(case: Case) -> Contestant:
    """The two passes as batched matmuls of torch, and between them Algorithm 1 on G in torch, all torch.compile'd."""
    if len(set(case.groups.sizes)) > 1:
        raise NotRun(f"groups of equal sizes only, not of {min(case.groups.sizes)} to {max(case.groups.sizes)} columns")
    if case.T > 16:
        raise NotRun(f"compiling the loop over {case.T} tasks takes minutes")
    _for_some_cases(case)
    ema = case.targets()
    order = gvk.task_order(case.K, case.T, seed=0, step=0, device=case.device)  # one for all steps: drawing costs more
    limits = precision(torch.float32)

    @torch.compile(dynamic=False)
    def step(grads: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        rows = grads.view(case.T, case.K, -1).transpose(0, 1)  # [K, T, P / K]
        G = (rows @ rows.mT).double()
        weights, _, _ = reference.coefficients(
            G,
            ema,
            beta=BETA,
            target=None,
            task_ids=None,
            vaccinated=None,
            order=order,
            seed=0,
            step=0,
            first_group=0,
            limits=limits,
        )
        return (weights.to(case.dtype)[:, None] @ rows).view(-1)

    return Contestant(lambda grads: step(grads, order), tolerance(case.dtype))


def coefficients_numpy(case: Case) -> Contestant:
    """The same Algorithm 1 on the Gram matrices in numpy, all groups and rows at once."""
    import numpy as np

    _for_the_host(case)
    ema = np.zeros((case.K, case.T, case.T))
    rng = np.random.default_rng(0)

    def run(G: torch.Tensor, order: np.ndarray | None = None) -> torch.Tensor:
        return torch.from_numpy(_coefficients(G.numpy(), ema, _random_order(case, rng) if order is None else order))

    order = gvk.task_order(case.K, case.T, seed=0, step=0).numpy()
    return Contestant(run, 1e-9, check=lambda G: run(G, order), waits=True)


def coefficients_torchjd(case: Case) -> Contestant:
    """TorchJD's ``GradVacWeighting``, one a group."""
    from torchjd.aggregation import GradVacWeighting

    _bearable(case, case.K)
    weightings = [GradVacWeighting(beta=BETA) for _ in case.ranges]

    def run(matrices: torch.Tensor) -> torch.Tensor:
        return torch.stack([weigh(G) for weigh, G in zip(weightings, matrices)])

    return Contestant(run, 1e-9, check=lambda matrices: _in_our_order(run, matrices, case.K), waits=True)


# ------------------------------------------------------------------------------------------------- explicit vectors


def explicit_vectors(case: Case) -> Contestant:
    """Algorithm 1 on the gradients themselves, a loop over pairs of tasks in each group: what LibMTL and others do."""
    import numpy as np

    _bearable(case, case.K)
    ema = torch.zeros(case.K, case.T, case.T)
    rng = np.random.default_rng(0)
    out = case.empty(case.P)

    def run(grads: torch.Tensor, order: np.ndarray | None = None) -> torch.Tensor:
        order = _random_order(case, rng) if order is None else order
        for k, (a, b) in enumerate(case.ranges):
            columns = grads[:, a:b]
            out[a:b] = sum(_turned(columns, i, order[k, i], ema[k, i]) for i in range(case.T))
        return out

    order = gvk.task_order(case.K, case.T, seed=0, step=0).numpy()
    error = tolerance(case.dtype, _TORCHJD_ERROR)
    return Contestant(run, error, check=lambda grads: run(grads, order), waits=True)


def _turned(grads: torch.Tensor, i: int, others: np.ndarray, hats: torch.Tensor) -> torch.Tensor:
    g = grads[i].clone()
    for j in others:
        norm, norm_j = g.norm(), grads[j].norm()
        phi, hat = float(torch.dot(g, grads[j]) / (norm * norm_j)), float(hats[j])
        if phi < hat:
            sin_phi, sin_hat = (1 - phi**2) ** 0.5, (1 - hat**2) ** 0.5
            g.add_(grads[j], alpha=float(norm * (hat * sin_phi - phi * sin_hat) / (norm_j * sin_hat)))
        hats[j] = (1 - BETA) * hat + BETA * phi
    return g


# ----------------------------------------------------------------------------------------------------------- TorchJD


def torchjd(case: Case) -> Contestant:
    """``torchjd.aggregation.GradVac``, one a group, on the columns of the group."""
    from torchjd.aggregation import GradVac

    _bearable(case, case.K)
    aggregators = [GradVac(beta=BETA) for _ in case.ranges]

    def run(grads: torch.Tensor) -> torch.Tensor:
        return torch.cat([aggregate(grads[:, a:b]) for aggregate, (a, b) in zip(aggregators, case.ranges)])

    return Contestant(
        run, tolerance(case.dtype, _TORCHJD_ERROR), check=lambda grads: _in_our_order(run, grads, case.K), waits=True
    )


def torchjd_weighting(case: Case) -> Contestant:
    """Its ``GradVacWeighting``, one a group, between torch's two passes at their best."""
    from torchjd.aggregation import GradVacWeighting

    _bearable(case, case.K)
    weightings = [GradVacWeighting(beta=BETA) for _ in case.ranges]
    out = case.empty(case.P)

    def run(grads: torch.Tensor) -> torch.Tensor:
        weights = [weigh(G) for weigh, G in zip(weightings, _gram(grads, case))]
        return _combine(grads, torch.stack(weights).to(case.dtype), case, out)

    return Contestant(
        run, tolerance(case.dtype, _TORCHJD_ERROR), check=lambda grads: _in_our_order(run, grads, case.K), waits=True
    )


def torchjd_whole(case: Case) -> Contestant:
    """Its GradVac on the whole matrix: one group instead of K, so less than what the others do."""
    from torchjd.aggregation import GradVac

    _bearable(case, 1)
    aggregate = GradVac(beta=BETA)
    whole = gvk.ParameterGroups.from_sizes({"whole": case.P})

    def truth(grads: torch.Tensor) -> torch.Tensor:
        return exact(grads, whole)

    return Contestant(
        aggregate,
        tolerance(case.dtype, _TORCHJD_ERROR),
        truth=truth,
        check=lambda grads: _in_our_order(aggregate, grads, 1),
        waits=True,
    )


def _for_some_cases(case: Case) -> None:
    if case.device != "cpu" and case.K != 100:
        raise NotRun("on a GPU for K = 100 only: it takes longer than all else")


def _bearable(case: Case, groups: int) -> None:
    _for_some_cases(case)
    steps = groups * case.T * (case.T - 1)
    limit = _STEPS[torch.device(case.device).type]
    if steps > limit:
        raise NotRun(f"takes too long: {steps} steps of its inner loop in Python, limit {limit}")


def _in_our_order(run: Callable[[torch.Tensor], torch.Tensor], grads: torch.Tensor, groups: int) -> torch.Tensor:
    with _order_of_torchjd(gvk.task_order(groups, grads.shape[-1 if grads.dim() == 3 else 0], seed=0, step=0)):
        return run(grads)


@contextmanager
def _order_of_torchjd(order: torch.Tensor) -> Iterator[None]:
    """Lets TorchJD, which shuffles the other rows with ``torch.randperm``, walk through them in ``order``."""
    rows = torch.arange(order.shape[1])[:, None]
    positions = order - (order > rows).long()  # among the other rows
    with mock.patch("torch.randperm", side_effect=iter(positions.flatten(0, 1))):
        yield


def exact(grads: torch.Tensor, groups: gvk.ParameterGroups, vaccinated: list[int] | None = None) -> torch.Tensor:
    """The vaccinated gradient of a first step, targets at zero, by the plain PyTorch backend: it sums in float64."""
    ema = torch.zeros(len(groups), len(grads), len(grads), dtype=torch.float64, device=grads.device)
    out = torch.empty(groups.numel, dtype=torch.float64, device=grads.device)
    return gvk.vaccinate(grads, groups, ema, beta=BETA, vaccinated=vaccinated, out=out, backend="reference").gradient
