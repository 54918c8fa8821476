"""Meta-learned adapters: language-specific parameters trained for what they do to the shared ones.

Wang, Lipton, Tsvetkov, "On Negative Interference in Multilingual Models", EMNLP 2020: section 4 and Appendix B. Shared
parameters theta would take a step on task i, ``theta' = theta - inner_lr grad_theta L_train_i(theta, phi_i)``; the
adapter phi_i goes down the mean validation loss of all tasks at theta' (Eq. 3). Since theta' depends on phi_i, that
gradient has a second-order term (Eq. 4), which :func:`finite_difference` takes from two first-order ones (Eq. 8).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch

from . import checks

Loss = Callable[[], torch.Tensor]


class AdapterGradients(NamedTuple):
    """What the meta-step of one task found."""

    gradients: list[torch.Tensor]
    """One a tensor of ``phi``, in its shape; float32 for 16-bit ones."""
    train_loss: torch.Tensor
    """``[]``, of the task, at theta."""
    validation_loss: torch.Tensor
    """``[]``, the mean over the tasks, at theta'."""


def adapter_gradients(
    train_loss: Loss,
    validation_loss: Loss,
    theta: Iterable[torch.Tensor],
    phi: Iterable[torch.Tensor],
    *,
    inner_lr: float,
    radius: float = 1e-2,
    model: torch.nn.Module | None = None,
) -> AdapterGradients:
    """The gradient of an adapter for the validation loss after a step of the shared parameters (Eq. 3 and 4)::

        found = meta.adapter_gradients(
            lambda: loss(model, train["hi"], "hi"),
            lambda: sum(loss(model, validation[name], name) for name in tasks) / len(tasks),
            shared, adapters["hi"], inner_lr=0.1,
        )
        for parameter, gradient in zip(adapters["hi"], found.gradients):
            parameter.grad = gradient.to(parameter.dtype)
        adapter_optimizer.step()  # then an ordinary step of the shared parameters, with the new adapters (Eq. 5)

    It takes four gradients: of the training loss at theta and on both sides of it, and of the validation loss. Memory
    is that of one of them and two copies of the shared parameters.

    Args:
        train_loss: called without arguments, gives the scalar training loss of the task at the parameters' values of
            that time; called three times, so it must be the same function each time (one batch, no fresh dropout).
        validation_loss: the same for the mean validation loss over all tasks; called once.
        theta: the shared parameters: leaves that require grad.
        phi: the parameters of the task's adapter: others that do.
        inner_lr: the step size of the shared parameters, at least 0 (beta in Eq. 3).
        radius: as for :func:`finite_difference`.
        model: as there; a 16-bit one brings the other tasks' adapters, buffers and frozen weights.

    Returns:
        An :class:`AdapterGradients`. Parameters and ``.grad`` are as they were.

    Raises:
        TypeError, ValueError: as :func:`finite_difference`.
    """
    theta, phi = _check_parameters(theta, phi)
    inner_lr = checks.check_real("inner_lr", inner_lr, 0)
    radius = checks.check_real("radius", radius, above=0)
    with torch.enable_grad(), _in_float32(theta, phi, model):
        train = _evaluate("train_loss", train_loss)
        inner = torch.autograd.grad(train, theta, allow_unused=True, materialize_grads=True)
        stepped = [tensor.detach() - inner_lr * gradient for tensor, gradient in zip(theta, inner)]
        with _swapped(theta, stepped):
            validation = _evaluate("validation_loss", validation_loss)
            found = torch.autograd.grad(validation, [*phi, *theta], allow_unused=True, materialize_grads=True)
        direct, direction = found[: len(phi)], found[len(phi) :]
        mixed = finite_difference(train_loss, theta, phi, direction, radius=radius)
    gradients = [first - inner_lr * second for first, second in zip(direct, mixed)]
    return AdapterGradients(gradients, train.detach(), validation.detach())


def finite_difference(
    loss: Loss,
    theta: Iterable[torch.Tensor],
    phi: Iterable[torch.Tensor],
    direction: Sequence[torch.Tensor | None],
    *,
    radius: float = 1e-2,
    model: torch.nn.Module | None = None,
) -> list[torch.Tensor]:
    """The mixed second derivative of a loss along a direction, ``grad_phi <grad_theta L, v>``, by Eq. 8 of the paper::

        [grad_phi L(theta + eps v) - grad_phi L(theta - eps v)] / (2 eps),    eps = radius / |v|

    The error is about ``radius^2 / 6`` of the next-but-one derivative and, from rounding, ``2^-24 |grad_phi L|
    |v| / radius`` in float32. 16-bit parameters, in which such a step would be lost, are float32 copies while the loss
    runs, and so is the rest of ``model``; inputs that meet them must be float32 then. Nothing waits for a device.

    Args:
        loss: called twice without arguments, gives a real scalar at the parameters' values of that time; it must be
            the same function both times (one batch, no fresh dropout).
        theta: the parameters that are moved: leaves that require grad. Their memory is exchanged meanwhile, not
            written: it comes back bit for bit, after an exception too.
        phi: those whose gradient is differentiated: others that do.
        direction: v, one tensor a tensor of ``theta`` in its shape, or None for zero. All zero gives zero.
        radius: how far theta is moved, in its Euclidean norm; above 0.
        model: a module whose other 16-bit parameters and buffers take part in the loss.

    Returns:
        One tensor for each of ``phi``, in its shape; float32 for 16-bit ones. Non-finite where v is. ``.grad`` is as it
        was.

    Raises:
        TypeError: an argument, or what ``loss`` gives, is of a wrong type.
        ValueError: parameters that repeat or do not require grad, a shape that does not fit, or a loss that is no
            scalar with a graph.
    """
    theta, phi = _check_parameters(theta, phi)
    direction = _check_direction(direction, theta)
    radius = checks.check_real("radius", radius, above=0)
    with torch.enable_grad(), _in_float32(theta, phi, model):
        lengths = [torch.linalg.vector_norm(v, dtype=torch.float64) for v in direction if v is not None]
        length = (
            torch.linalg.vector_norm(torch.stack(lengths)) if lengths else theta[0].new_zeros((), dtype=torch.float64)
        )
        step = torch.where(length > 0, radius / length, 0.0)
        sides = []
        for sign in (1, -1):
            moved = [
                tensor.detach() if v is None else tensor.detach() + sign * step * v.detach().to(tensor.dtype)
                for tensor, v in zip(theta, direction)
            ]
            with _swapped(theta, moved):
                value = _evaluate("loss", loss)
                sides.append(torch.autograd.grad(value, phi, allow_unused=True, materialize_grads=True))
    return [(ahead - behind) * (length / (2 * radius)) for ahead, behind in zip(*sides)]


@contextmanager
def _swapped(tensors: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> Iterator[None]:
    """The tensors hold these values: their own memory is put aside, unwritten, and comes back whatever happens."""
    kept = [tensor.data for tensor in tensors]
    try:
        for tensor, value in zip(tensors, values):
            tensor.data = value
        yield
    finally:
        for tensor, own in zip(tensors, kept):
            tensor.data = own


def _in_float32(
    theta: Sequence[torch.Tensor], phi: Sequence[torch.Tensor], model: torch.nn.Module | None
) -> AbstractContextManager[None]:
    """16-bit tensors hold float32 copies."""
    if model is not None and not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    rest = () if model is None else (*model.parameters(), *model.buffers())
    tensors = {id(tensor): tensor for tensor in (*theta, *phi, *rest)}.values()
    half = [tensor for tensor in tensors if tensor.dtype in (torch.bfloat16, torch.float16)]
    return _swapped(half, [tensor.detach().float() for tensor in half])


def _evaluate(name: str, loss: Loss) -> torch.Tensor:
    if not callable(loss):
        raise TypeError(f"{name}: expected a callable, got {type(loss).__name__}")
    value = loss()
    checks.check_scalar(name, value)
    return value


def _check_parameters(
    theta: Iterable[torch.Tensor], phi: Iterable[torch.Tensor]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    listed: dict[str, list[torch.Tensor]] = {}
    seen: set[int] = set()
    for name, tensors in (("theta", theta), ("phi", phi)):
        if isinstance(tensors, torch.Tensor) or not isinstance(tensors, Iterable):
            raise TypeError(f"{name}: expected tensors, got {type(tensors).__name__}")
        listed[name] = list(tensors)
        if not listed[name]:
            raise ValueError(f"{name}: expected at least one tensor, got none")
        for index, tensor in enumerate(listed[name]):
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(f"{name}[{index}]: expected a tensor, got {type(tensor).__name__}")
            if not (tensor.is_leaf and tensor.requires_grad):
                raise ValueError(f"{name}[{index}]: expected a leaf that requires grad, got one that is not")
            if id(tensor) in seen:
                raise ValueError(f"{name}[{index}]: expected every tensor once, in theta or in phi, got one again")
            seen.add(id(tensor))
    return listed["theta"], listed["phi"]


def _check_direction(direction: Any, theta: Sequence[torch.Tensor]) -> Sequence[torch.Tensor | None]:
    if not isinstance(direction, Sequence):
        raise TypeError(f"direction: expected a sequence of tensors, got {type(direction).__name__}")
    if len(direction) != len(theta):
        raise ValueError(f"direction: expected {len(theta)} tensors, as in theta, got {len(direction)}")
    for index, (v, tensor) in enumerate(zip(direction, theta)):
        checks.check_is_tensor(f"direction[{index}]", v)
        if v is not None and v.shape != tensor.shape:
            raise ValueError(f"direction[{index}]: expected shape {list(tensor.shape)}, got {list(v.shape)}")
    return direction
