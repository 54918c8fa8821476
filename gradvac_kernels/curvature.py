"""Curvature: the largest eigenvalue of a loss's Hessian, of its block for each group, and of the task Fisher matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from . import checks, flat
from .groups import ParameterGroups


class Eigenpair(NamedTuple):
    """The largest eigenvalue of a Hessian, or of each group's block ``[K]``, and how well it is known."""

    eigenvalue: torch.Tensor
    """``[]`` or ``[K]`` float64, in units of the loss over those of the parameters squared."""
    vector: torch.Tensor
    """``[P]`` float32 (float64 for float64 parameters), of norm 1 as a whole, or in each group; zero in the padding."""
    iterations: torch.Tensor
    """``[]`` or ``[K]`` int64: Hessian-vector products taken, of both iterations together."""
    residual: torch.Tensor
    """``[]`` or ``[K]`` float64, ``|H v - eigenvalue v|``: some eigenvalue is within this of the one given."""
    converged: torch.Tensor
    """``[]`` or ``[K]`` bool: whether the residual is within the tolerance. If not, the eigenvalue is a lower bound."""


def top_eigenvalue(
    loss: Callable[[], torch.Tensor],
    model: torch.nn.Module | Sequence[torch.Tensor],
    groups: ParameterGroups,
    *,
    per_group: bool = False,
    tolerance: float = 1e-3,
    max_iterations: int = 100,
    seed: int = 0,
) -> Eigenpair:
    """The largest (algebraic) eigenvalue of the Hessian of a loss, by power iteration on Hessian-vector products.

    The iteration finds the eigenvalue of largest magnitude. If that is negative, or does not settle (two ends of like
    size, as at a saddle), a second one, from another start, on ``H + r`` with ``r`` the largest ``|H v|`` so far, for
    which the two agree, finds the largest. A small eigenvalue beside large negative ones is known to within
    ``tolerance * r``. Whether an even larger one was missed depends on the random start, as in any power iteration.

    The loss is evaluated once, and its gradient differentiated in every iteration; three numbers are read back to the
    host in each. The parameters and their ``.grad`` are left as they are. Fused attention is not differentiable twice:
    evaluate such a loss under ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)``.

    Args:
        loss: called without arguments, gives a real scalar that is differentiable twice in the parameters.
        model: the module that ``groups`` was made from, or its trainable parameters in the order of
            ``groups.parameters``. In 16 bits products are too rough for tolerances below about 1e-2.
        groups: made by :meth:`ParameterGroups.from_model`.
        per_group: the largest eigenvalue of each group's diagonal block, at one product of that block a group and
            iteration, instead of the whole Hessian's.
        tolerance: converged is a residual of at most this times the largest ``|H v|`` seen, above 0.
        max_iterations: of each of the two iterations, at least 1.
        seed: of the random starts.

    Returns:
        An :class:`Eigenpair`. A non-finite loss or Hessian gives a NaN that has not converged.

    Raises:
        TypeError: an argument, or what ``loss`` gives, is of a wrong type.
        ValueError: a number is out of range, ``model`` does not fit ``groups``, or the loss is no scalar with a graph.
        RuntimeError: autograd's, of an operation that is not differentiable twice.
    """
    parameters = flat.parameters(model, groups)
    if not callable(loss):
        raise TypeError(f"loss: expected a callable, got {type(loss).__name__}")
    tolerance = checks.check_real("tolerance", tolerance, above=0)
    checks.check_int("max_iterations", max_iterations, 1)
    checks.check_int("seed", seed)
    with torch.enable_grad():
        value = loss()
        checks.check_scalar("loss", value)
        gradients = torch.autograd.grad(value, parameters, create_graph=True, allow_unused=True)
    dtype = torch.float64 if any(parameter.dtype == torch.float64 for parameter in parameters) else torch.float32
    vector = torch.zeros(groups.numel, dtype=dtype, device=parameters[0].device)
    found = []
    for first, last in ((k, k + 1) for k in range(len(groups))) if per_group else ((0, len(groups)),):
        run = groups[first:last]
        inside = [first <= slot.group < last for slot in groups.parameters]
        block = _Block(
            run,
            [parameter for parameter, use in zip(parameters, inside) if use],
            [gradient for gradient, use in zip(gradients, inside) if use],
            vector[groups.offsets[first] : groups.offsets[last]],
        )
        found.append(_largest(block, tolerance, max_iterations, seed))
    kinds = (torch.float64, torch.int64, torch.float64, torch.bool)
    eigenvalue, iterations, residual, converged = (
        torch.tensor(column if per_group else column[0], dtype=kind, device=vector.device)
        for column, kind in zip(zip(*found), kinds)
    )
    return Eigenpair(eigenvalue, vector, iterations, residual, converged)


def task_fisher_top_eigenvalue(G: torch.Tensor) -> torch.Tensor:
    """The largest eigenvalue of the task Fisher matrix ``F = (1/T) sum_i g_i g_i'`` of each group, ``[P_k, P_k]``.

    It has the eigenvalues of ``G / T``, zeros aside: nothing of size P is needed. (CUDA waits for eigenvalues.)

    Args:
        G: ``[K, T, T]`` float64, as :func:`gradvac_kernels.gram` gives it.

    Returns:
        ``[K]`` float64, NaN where ``G`` is not finite.

    Raises:
        TypeError: ``G`` is no float64 tensor.
        ValueError: it is not of that shape, with T of at least 1.
    """
    checks.check_tensor("G", G, (torch.float64,), (None, None, None))
    T = G.shape[1]
    if T < 1 or G.shape[2] != T:
        raise ValueError(f"G: expected shape [K, T, T] with T of at least 1, got {list(G.shape)}")
    finite = G.isfinite().all(2).all(1)
    values = torch.linalg.eigvalsh(torch.where(finite[:, None, None], G, 0.0))  # [K, T], ascending
    return torch.where(finite, values[:, -1].clamp(min=0) / T, torch.nan)


class _Block(NamedTuple):
    """A diagonal block of the Hessian: some parameters and the graphs of their gradients."""

    groups: ParameterGroups
    parameters: list[torch.Tensor]
    gradients: list[torch.Tensor | None]
    vector: torch.Tensor  # [P], where the eigenvector goes

    def start(self, generator: torch.Generator) -> torch.Tensor:
        """A random vector of norm 1, drawn on the host: the same on every device."""
        drawn = [torch.randn(slot.shape, generator=generator) for slot in self.groups.parameters]
        v = flat.flatten(drawn, self.groups, out=torch.zeros_like(self.vector))
        return v / self.norm(v)

    def times(self, v: torch.Tensor) -> torch.Tensor:
        """``H v``: the derivative of ``<gradient, v>``."""
        used = [
            (gradient, view.to(gradient.dtype))
            for gradient, view in zip(self.gradients, flat.views(v, self.groups))
            if gradient is not None and gradient.requires_grad  # not where the loss is linear
        ]
        products: Sequence[torch.Tensor | None] = [None] * len(self.parameters)
        if used:
            outputs, directions = zip(*used)
            products = torch.autograd.grad(outputs, self.parameters, directions, retain_graph=True, allow_unused=True)
        return flat.flatten(products, self.groups, out=torch.zeros_like(v))

    def dot(self, x: torch.Tensor, y: torch.Tensor) -> float:
        return float(flat.dot(x, y, self.groups).sum())

    def norm(self, x: torch.Tensor) -> float:
        return float(torch.linalg.vector_norm(flat.norm(x, self.groups)))


def _largest(block: _Block, tolerance: float, max_iterations: int, seed: int) -> tuple[float, int, float, bool]:
    """Eigenvalue, iterations, residual and whether it converged; the vector goes to ``block.vector``."""
    generator = torch.Generator().manual_seed(seed)
    eigenvalue, residual, converged, radius, total = -math.inf, math.inf, False, 0.0, 0
    for shifted in (False, True):
        v, shift = block.start(generator), radius if shifted else 0.0
        for left in reversed(range(max_iterations)):
            product, total = block.times(v), total + 1
            quotient = block.dot(v, product)
            radius = max(radius, block.norm(product))
            error = block.norm(flat.axpy(-quotient, v, product.clone(), block.groups))
            settled = error <= tolerance * radius
            if settled or not left or not math.isfinite(error):
                break
            ahead = flat.axpy(shift, v, product, block.groups)
            v = ahead / block.norm(ahead)
        if not math.isfinite(error):
            block.vector.copy_(v)
            return math.nan, total, math.nan, False
        # Any Rayleigh quotient is at most the largest eigenvalue; of H + shift, that one must not be below zero.
        converged = settled and quotient + tolerance * radius >= max(-shift, eigenvalue)
        if converged or quotient > eigenvalue:
            eigenvalue, residual = quotient, error
            block.vector.copy_(v)
        if converged:
            break
    return eigenvalue, total, residual, converged
