"""The multiple-gradient descent algorithm: the shortest convex combination of the gradients."""

from __future__ import annotations

import torch

from .weighting import Measured, State, Weighting

_ITERATIONS = 40  # at most: an interior-point method gains a digit or more in each
_ENOUGH = 1e-17  # of x z, in the mean: the minimum, which is at most 1, is found to that
_SLACK = 1e-10  # of the other conditions of a minimum
_LINE = 8  # doubles of a cache line: LAPACK may round a matrix that begins elsewhere otherwise, and so a slab


class MGDA(Weighting):
    """MGDA (Désidéri, 2012; Sener and Koltun, "Multi-Task Learning as Multi-Objective Optimization", NeurIPS 2018).

    In each parameter group the weights are the point of the simplex where ``w' G w`` is least: the update is the
    shortest vector of the gradients' convex hull, which no task objects to. The sum of the weights is 1, so the update
    is far shorter than the plain sum. A gradient that is zero in a group would make the update zero; it is left out.
    On a GPU a call is some thousand small operations, whatever the number of groups.
    """

    def weights(self, measured: Measured, state: State) -> torch.Tensor:
        return min_norm_weights(measured.G, measured.usable)


def min_norm_weights(G: torch.Tensor, usable: torch.Tensor) -> torch.Tensor:
    """The point of the simplex where ``w' G w`` is least, for all groups at once, without reading anything back.

    With x = w |g| / min |g| and Q the cosines it is: least x' Q x with a' x = 1, x >= 0, where a = min |g| / |g|; what
    is small in one task's scale is small here. A primal-dual interior-point method (Mehrotra's predictor and corrector)
    finds which weights are positive; those are then taken from their linear equations, if that is no worse.

    Args:
        G: ``[K, T, T]`` float64, with 1 on the diagonal and 0 beside it for rows that are not usable.
        usable: ``[K, T]`` bool.

    Returns:
        ``[K, T]`` float64, 0 for unusable rows, with sum 1 where any row is usable.
    """
    T = G.shape[1]
    pad = -T % _LINE  # more rows that are not usable
    G, usable = torch.nn.functional.pad(G, (0, pad, 0, pad)), torch.nn.functional.pad(usable, (0, pad))
    G.diagonal(dim1=1, dim2=2)[:, T:] = 1.0
    norm = G.diagonal(dim1=1, dim2=2).sqrt()
    Q = G / norm[:, :, None] / norm[:, None, :]
    a = torch.where(usable, norm.where(usable, torch.inf).amin(1, keepdim=True) / norm, 0.0)  # [K, T]
    a = torch.where(usable.any(1, keepdim=True), a, 1.0)
    c = torch.where(usable, 0.0, 1.0)  # keeps the others' x at 0
    x = _interior_point(Q, a, c)
    weights = torch.where(usable, _polished(Q, a, *x) * a, 0.0)
    weights = weights / weights.sum(1, keepdim=True).clamp(min=torch.finfo(G.dtype).tiny)
    return weights[:, :T].contiguous()


def _interior_point(Q: torch.Tensor, a: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Least ``x' Q x / 2 + c' x`` with a' x = 1, x >= 0, and the multipliers of x >= 0: both [K, T]."""
    x, z = torch.ones_like(a), torch.ones_like(a)
    y = torch.ones_like(a[:, :1])
    for _ in range(_ITERATIONS):
        dual = _times(Q, x) + c - y * a - z  # [K, T]
        primal = (a * x).sum(1, keepdim=True) - 1.0  # [K, 1]
        gap = x * z
        mean = gap.mean(1, keepdim=True)
        factor, failed = torch.linalg.cholesky_ex(Q + torch.diag_embed(z / x))
        open_ = (mean > _ENOUGH) & (failed == 0)[:, None]  # [K, 1]; nothing is left to gain where it is too singular
        if open_.device.type == "cpu" and not open_.any():
            break  # elsewhere one would have to wait for the answer
        Ma = _solve(factor, a)

        def newton(
            gap: torch.Tensor,
            x: torch.Tensor = x,
            z: torch.Tensor = z,
            dual: torch.Tensor = dual,
            primal: torch.Tensor = primal,
            factor: torch.Tensor = factor,
            Ma: torch.Tensor = Ma,
        ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            Mr = _solve(factor, -dual - gap / x)
            dy = (-primal - (a * Mr).sum(1, keepdim=True)) / (a * Ma).sum(1, keepdim=True)
            dx = Mr + dy * Ma
            return dx, dy, -(gap + z * dx) / x

        dx, dy, dz = newton(gap)
        step = _longest(x, dx, z, dz)
        centre = ((x + step * dx) * (z + step * dz)).mean(1, keepdim=True) / mean
        dx, dy, dz = newton(gap + dx * dz - centre**3 * mean)
        step = 0.995 * _longest(x, dx, z, dz)
        open_ &= step > 0  # False for NaN
        x, y, z = (torch.where(open_, v + step * d, v) for v, d in ((x, dx), (y, dy), (z, dz)))
    return x, z


def _polished(Q: torch.Tensor, a: torch.Tensor, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """x, from the linear equations of its positive entries, where that meets the conditions of a minimum."""
    K, T = a.shape
    positive = x > z
    both = positive[:, :, None] & positive[:, None, :]
    system = torch.eye(T + _LINE, dtype=Q.dtype, device=Q.device).repeat(K, 1, 1)
    system[:, :T, :T] = torch.where(both, Q, torch.eye(T, dtype=Q.dtype, device=Q.device))
    system[:, :T, T] = system[:, T, :T] = torch.where(positive, a, 0.0)
    system[:, T, T] = 0.0
    goal = Q.new_zeros(K, T + _LINE)
    goal[:, T] = 1.0
    found = torch.linalg.solve_ex(system, goal)[0]
    exact, y = found[:, :T], -found[:, T : T + 1]
    slope = _times(Q, exact) - y * a  # 0 where x is positive, else not below it
    right = (exact >= 0) & torch.where(positive, slope.abs() <= _SLACK, slope >= -_SLACK)
    return torch.where(right.all(1, keepdim=True), exact, x)


def _longest(x: torch.Tensor, dx: torch.Tensor, z: torch.Tensor, dz: torch.Tensor) -> torch.Tensor:
    """``[K, 1]``: the share of a step, up to 1, that leaves x and z positive."""
    limits = torch.cat([torch.where(d < 0, -v / d, 1.0) for v, d in ((x, dx), (z, dz))], 1)
    return limits.amin(1, keepdim=True).clamp(max=1.0)


def _solve(factor: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.cholesky_solve(b.unsqueeze(2), factor).squeeze(2)


def _times(Q: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return (Q * x[:, None, :]).sum(2)  # a product of matrices may round a slab otherwise than all groups together
