"""The operators ``torch.ops.gradvac.*``: schemas, fakes, argument checks and choice of backend.

The only door to the backends. Shapes and types are checked here and under tracing; what lies on the host is checked by
value when the operator runs; what lies on a device is never read back.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from . import backends, checks, order
from .groups import ParameterGroups
from .numerics import precision
from .result import Coefficients, Vaccination

_library = torch.library.Library("gradvac", "DEF")
_library.define("gram(Tensor grads, Tensor bounds, str? backend=None) -> Tensor")
_library.define("cross_gram(Tensor a, Tensor b, Tensor bounds, str? backend=None) -> Tensor")
_library.define("combine(Tensor grads, Tensor weights, Tensor bounds, Tensor(a!) out, str? backend=None) -> ()")
_RULE = (
    "Tensor(b!)? ema, float beta, float? target, Tensor? task_ids, Tensor? vaccinated, Tensor? order, SymInt seed, "
    "SymInt step, Tensor? counter, SymInt first_group, str? backend=None"
)
_library.define(f"coefficients(Tensor G, ScalarType dtype, {_RULE}) -> (Tensor, Tensor, Tensor)")
_library.define(f"vaccinate(Tensor grads, Tensor bounds, Tensor(a!) out, {_RULE}) -> (Tensor, Tensor, Tensor, Tensor)")
_library.define(
    "task_order(SymInt num_groups, SymInt num_tasks, SymInt seed, SymInt step, SymInt first_group, "
    "Device device) -> Tensor"
)


# ----------------------------------------------------------------------------------------------------- public calls


def gram(grads: torch.Tensor, groups: ParameterGroups, *, backend: str | None = None) -> torch.Tensor:
    """Dot products of all pairs of task gradients, group by group.

    Args:
        grads: ``[T, P]`` float32, bfloat16, float16 or float64; rows contiguous, any distance apart.
        groups: K groups of the P columns.
        backend: one of :func:`available_backends`; None takes the fastest one for the tensor's device.

    Returns:
        ``[K, T, T]`` float64, ``G[k, i, j] = <g_ik, g_jk>``, with ``|G - exact| <= 1e-7 |g_i| |g_j|``; where
        products are summed in float32 (above 4096 columns with more than 8 tasks, of 16 bits or on a GPU), 4e-7 where
        few columns outweigh the others, and 1e-6 on rows made for it, such as equal entries. Entries beyond about
        1e18, or below 1e-17, have squares that leave float32's range or lose digits there (float64 excepted).

    Raises:
        TypeError: ``grads`` or ``groups`` is of another type, or of a dtype that no backend takes.
        ValueError: a shape does not fit, or the backend is unknown, missing or not for this device.
    """
    checks.check_face(grads, groups)
    checks.check_backend(backend)
    return torch.ops.gradvac.gram.default(grads.detach(), groups.bounds, backend)


def cross_gram(
    a: torch.Tensor, b: torch.Tensor, groups: ParameterGroups, *, backend: str | None = None
) -> torch.Tensor:
    """Dot products of the task gradients in one buffer with those in another, group by group.

    Of two independent batches of the same tasks, ``C[k, i, i]`` is an unbiased estimate of the squared norm of task i's
    mean gradient, which its squared norm in one batch overestimates by the noise; over both norms it is the similarity
    of a task with itself, the control that similarities between tasks are to be held against (Wang, Lipton and
    Tsvetkov, "On Negative Interference in Multilingual Models", EMNLP 2020).

    Args:
        a: ``[T, P]`` float32, bfloat16, float16 or float64; rows contiguous, any distance apart. T may be 0.
        b: ``[T', P]`` of the same dtype and device, of any T'. It may be ``a``, or overlap it.
        groups: K groups of the P columns.
        backend: one of :func:`available_backends`; None takes the fastest one for the tensors' device.

    Returns:
        ``[K, T, T']`` float64, ``C[k, i, j] = <a_ik, b_jk>``, with ``|C - exact| <= 1e-7 |a_i| |b_j|`` as for
        :func:`gram`, for max(T, T') tasks (on a GPU groups of more than 4096 columns go to matrix units whatever T).

    Raises:
        TypeError: an argument is of another type, of a dtype that no backend takes, or ``b`` of another than ``a``.
        ValueError: a shape or device does not fit, or the backend is unknown, missing or not for this device.
    """
    checks.check_face(a, groups, "a")
    checks.check_face(b, groups, "b")
    checks.check_backend(backend)
    return torch.ops.gradvac.cross_gram.default(a.detach(), b.detach(), groups.bounds, backend)


def coefficients(
    G: torch.Tensor,
    groups: ParameterGroups,
    ema: torch.Tensor | None,
    *,
    dtype: torch.dtype = torch.float32,
    beta: float = 1e-2,
    target: float | None = None,
    task_ids: torch.Tensor | Sequence[int] | None = None,
    vaccinated: torch.Tensor | Sequence[int] | None = None,
    order: torch.Tensor | None = None,
    seed: int = 0,
    step: int | torch.Tensor = 0,
    backend: str | None = None,
) -> Coefficients:
    """The inner loop of Gradient Vaccine on Gram matrices: what :func:`vaccinate` does between its two passes.

    For gradients of which a single buffer never exists: Gram matrices of shards, or of some of the parameters, add up.

    Args:
        G: ``[K, T, T]`` float64, contiguous, as :func:`gram` gives it.
        groups: the K groups; only their number and ``groups.first`` matter.
        ema: ``[K, N, N]`` float64, updated in place, as for :func:`vaccinate`; so are the other arguments.
        dtype: of the gradients that ``G`` was measured on, which decides when a norm is lost in rounding.

    Returns:
        :class:`Coefficients`; its weights are for :func:`combine`.

    Raises:
        TypeError, ValueError: as :func:`vaccinate`. Then nothing was changed.
    """
    checks.check_groups(groups)
    checks.check_tensor("G", G, (torch.float64,), (len(groups), None, None))
    checks.check_dtype(dtype)
    checks.check_backend(backend)
    rule = _rule(groups, ema, beta, target, task_ids, vaccinated, order, seed, step, G.device)
    return Coefficients(*torch.ops.gradvac.coefficients.default(G.detach(), dtype, *rule, backend))


def combine(
    grads: torch.Tensor,
    weights: torch.Tensor,
    groups: ParameterGroups,
    *,
    out: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Weighted sum of the task gradients, with weights by group: ``out[p] = sum_j weights[k(p), j] grads[j, p]``.

    Args:
        grads: ``[T, P]`` float32, bfloat16, float16 or float64; rows contiguous, any distance apart.
        weights: ``[K, T]`` float64 or float32. Sums are taken in float64.
        groups: K groups of the P columns.
        out: ``[P]``, contiguous, of any of these types; it may overlap neither ``grads`` nor ``weights``. Columns
            outside every group are not written. None makes a new one of the type of ``grads``, zero outside the groups.
        backend: one of :func:`available_backends`; None takes the fastest one for the tensor's device.

    Returns:
        ``out``.

    Raises:
        TypeError: an argument is of a wrong type or dtype.
        ValueError: a shape or device does not fit, ``out`` overlaps another one, or the backend cannot be used.
    """
    checks.check_face(grads, groups)
    checks.check_backend(backend)
    checks.check_tensor("weights", weights, (torch.float64, torch.float32), (len(groups), grads.shape[0]), grads.device)
    checks.check_is_tensor("out", out)
    out = _result(grads, groups) if out is None else out
    torch.ops.gradvac.combine.default(
        grads.detach(), weights.detach().to(torch.float64).contiguous(), groups.bounds, out, backend
    )
    return out


def vaccinate(
    grads: torch.Tensor,
    groups: ParameterGroups,
    ema: torch.Tensor | None,
    *,
    beta: float = 1e-2,
    target: float | None = None,
    task_ids: torch.Tensor | Sequence[int] | None = None,
    vaccinated: torch.Tensor | Sequence[int] | None = None,
    order: torch.Tensor | None = None,
    seed: int = 0,
    step: int | torch.Tensor = 0,
    out: torch.Tensor | None = None,
    backend: str | None = None,
) -> Vaccination:
    """One step of Gradient Vaccine: Algorithm 1 of Wang et al., ICLR 2021 (arXiv:2010.05874).

    A row that is zero in a group, or has a non-finite entry there, is neither measured nor turned nor turned towards
    in that group, and its entries of ``ema`` stay as they were; a non-finite value still reaches the output. Entries
    beyond about 1e18 count as non-finite and gradients below 1e-19 as zero (float64: norms beyond 1e75, below 1e-75).

    Args:
        grads: ``[T, P]`` float32, bfloat16, float16 or float64, one row a task; rows contiguous, any distance apart.
        groups: K groups of the P columns.
        ema: ``[K, N, N]`` float64, contiguous: the similarity targets of Eq. 3, updated in place. None with ``target``.
        beta: weight of a new similarity in the moving average, in [0, 1].
        target: a constant in [-1, 1] instead of the moving average (0 is PCGrad). Targets, moving or constant, are
            capped at ``numerics.MAX_TARGET`` = 1 - 2^-20 where they are used.
        task_ids: ``[T]``, which of the N tasks each row is, all different; None means rows 0..N-1.
        vaccinated: the tasks whose gradients may be turned (the set G of Algorithm 1), ids in 0..N-1; None means all.
        order: ``[K, T, T-1]`` int64, for each group and row the other rows in the order of the inner loop; None means
            ``task_order(K, T, seed=seed, step=step, first_group=groups.first)``.
        seed: chooses the sequence of random orders.
        step: counts the training steps: a new order each. An int, or an int64 tensor of one element on the device of
            ``grads``, which is read there: a captured CUDA graph draws a new order whenever it has changed.
        out: ``[P]``, as for :func:`combine`.
        backend: one of :func:`available_backends`; None takes the fastest one for the tensor's device.

    Returns:
        A :class:`Vaccination`.

    Raises:
        TypeError: an argument is of a wrong type or dtype.
        ValueError: a shape, range or device does not fit, ``task_ids`` repeats a task, ``order`` is no permutation of
            the other rows, or the backend cannot be used. Then nothing was changed.
    """
    call = prepare(grads, groups, ema, beta, target, task_ids, vaccinated, order, seed, step, out)
    checks.check_backend(backend)
    found = torch.ops.gradvac.vaccinate.default(call.grads, call.bounds, call.out, *call.rule, backend)
    return Vaccination(call.out, *found)


def task_order(
    num_groups: int,
    num_tasks: int,
    *,
    seed: int,
    step: int,
    first_group: int = 0,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """The random order of the inner loop, from a counter: equal arguments give equal orders, everywhere.

    Args:
        num_groups: K. ``first_group`` is the identity of the first one: ``task_order(2, T, first_group=3)`` equals
            ``task_order(5, T)[3:]``.
        num_tasks: T, the rows of the batch.
        seed: chooses the sequence.
        step: counts the training steps.
        device: where to put the result.

    Returns:
        ``[K, T, T-1]`` int64: for each group and row, a permutation of the other rows.

    Raises:
        TypeError: an argument is not an int.
        ValueError: ``num_groups`` or ``first_group`` is negative, or ``num_tasks`` is below 1.
    """
    for name, value, least in (
        ("num_groups", num_groups, 0),
        ("num_tasks", num_tasks, 1),
        ("first_group", first_group, 0),
        ("seed", seed, None),
        ("step", step, None),
    ):
        checks.check_int(name, value, least)
    return torch.ops.gradvac.task_order.default(
        num_groups, num_tasks, seed, step, first_group, torch.device("cpu" if device is None else device)
    )


# ---------------------------------------------------------------------------------------------------------- checks


class Rule(NamedTuple):
    """How Gram matrices become weights: these arguments of the operators, in their order."""

    ema: torch.Tensor | None
    beta: float
    target: float | None
    task_ids: torch.Tensor | None
    vaccinated: torch.Tensor | None
    order: torch.Tensor | None
    seed: int
    step: int
    counter: torch.Tensor | None
    first_group: int

    def check_values(self, num_rows: int) -> None:
        """What lies on the host, by value."""
        checks.check_rule_values(num_rows, self.ema, self.task_ids, self.vaccinated, self.order)

    def for_backend(self) -> dict[str, Any]:
        """As the backends take them."""
        values = self._asdict()
        counter = values.pop("counter")
        return values if counter is None else values | {"step": counter}


class Call(NamedTuple):
    """The arguments of ``torch.ops.gradvac.vaccinate`` but the backend."""

    grads: torch.Tensor
    bounds: torch.Tensor
    out: torch.Tensor
    rule: Rule

    def check_shapes(self) -> None:
        """What is known under tracing too."""
        checks.check_grads(self.grads, self.bounds)
        checks.check_out(self.grads, self.out)
        checks.check_rule(self.bounds.shape[0], self.grads.shape[0], self.grads.device, *self.rule)

    def check(self) -> None:
        """Everything, by value where it lies on the host."""
        self.check_shapes()
        checks.check_layout(self.grads, self.bounds)
        checks.check_apart(out=self.out, ema=self.rule.ema, grads=self.grads)
        self.rule.check_values(self.grads.shape[0])


def prepare(
    grads: torch.Tensor,
    groups: ParameterGroups,
    ema: torch.Tensor | None,
    beta: float,
    target: float | None,
    task_ids: torch.Tensor | Sequence[int] | None,
    vaccinated: torch.Tensor | Sequence[int] | None,
    order: torch.Tensor | None,
    seed: int,
    step: int | torch.Tensor,
    out: torch.Tensor | None,
) -> Call:
    """What a user passes to :func:`vaccinate`, as the operator takes it."""
    checks.check_face(grads, groups)
    rule = _rule(groups, ema, beta, target, task_ids, vaccinated, order, seed, step, grads.device)
    checks.check_is_tensor("out", out)
    return Call(grads.detach(), groups.bounds, _result(grads, groups) if out is None else out, rule)


def _rule(
    groups: ParameterGroups,
    ema: torch.Tensor | None,
    beta: float,
    target: float | None,
    task_ids: torch.Tensor | Sequence[int] | None,
    vaccinated: torch.Tensor | Sequence[int] | None,
    order: torch.Tensor | None,
    seed: int,
    step: int | torch.Tensor,
    device: torch.device,
) -> Rule:
    checks.check_settings(beta, target, seed)
    counter = step if isinstance(step, torch.Tensor) else None
    step = 0 if isinstance(step, torch.Tensor) else step
    checks.check_int("step", step)
    for name, tensor in (("ema", ema), ("order", order)):
        checks.check_is_tensor(name, tensor)
    return Rule(
        ema,
        float(beta),
        None if target is None else float(target),
        as_ids("task_ids", task_ids, device),
        as_ids("vaccinated", vaccinated, device),
        order,
        seed,
        step,
        counter,
        groups.first,
    )


def as_ids(name: str, ids: torch.Tensor | Sequence[int] | None, device: torch.device) -> torch.Tensor | None:
    """Ids as a tensor on a device, without waiting for it."""
    if ids is None or isinstance(ids, torch.Tensor):
        return ids
    listed = checks.check_ids(name, ids)
    waiting = device.type in ("cuda", "xpu")  # a plain copy to them waits
    if not waiting or torch.compiler.is_compiling() or type(torch.empty(0)) is not torch.Tensor:
        return torch.tensor(listed, dtype=torch.int64, device=device)  # a fake one may not outlive its mode
    if name == "vaccinated" or listed == tuple(range(len(listed))):
        return _ids_on_device(listed, device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise ValueError(f"{name}: expected a tensor while a CUDA graph is captured, got {ids!r}")
    return torch.tensor(listed, dtype=torch.int64, pin_memory=True).to(device, non_blocking=True)


@functools.cache  # for good: a captured CUDA graph may read them at any time, and a copy would wait for the device
def _ids_on_device(ids: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(ids, dtype=torch.int64, device=device)


def _result(grads: torch.Tensor, groups: ParameterGroups) -> torch.Tensor:
    make = grads.new_empty if sum(groups.sizes) == groups.numel else grads.new_zeros  # padding is not written
    return make(groups.numel)


# -------------------------------------------------------------------------------------------------- implementations


def _gram(grads: torch.Tensor, bounds: torch.Tensor, backend: str | None = None) -> torch.Tensor:
    checks.check_grads(grads, bounds)
    checks.check_layout(grads, bounds)
    return backends.choose(grads.device, backend).gram(grads, bounds)


def _gram_fake(grads: torch.Tensor, bounds: torch.Tensor, backend: str | None = None) -> torch.Tensor:
    checks.check_grads(grads, bounds)
    T = grads.shape[0]
    return grads.new_empty(bounds.shape[0], T, T, dtype=torch.float64)


def _cross_gram(a: torch.Tensor, b: torch.Tensor, bounds: torch.Tensor, backend: str | None = None) -> torch.Tensor:
    checks.check_cross(a, b, bounds)
    checks.check_layout(a, bounds)
    return backends.choose(a.device, backend).cross_gram(a, b, bounds)


def _cross_gram_fake(
    a: torch.Tensor, b: torch.Tensor, bounds: torch.Tensor, backend: str | None = None
) -> torch.Tensor:
    checks.check_cross(a, b, bounds)
    return a.new_empty(bounds.shape[0], a.shape[0], b.shape[0], dtype=torch.float64)


def _combine(
    grads: torch.Tensor, weights: torch.Tensor, bounds: torch.Tensor, out: torch.Tensor, backend: str | None = None
) -> None:
    checks.check_combine(grads, weights, bounds, out)
    checks.check_layout(grads, bounds)
    checks.check_apart(out=out, weights=weights)
    checks.check_apart(out=out, grads=grads)
    backends.choose(grads.device, backend).combine(grads, weights, bounds, out)
    _note_write(out)


def _combine_fake(
    grads: torch.Tensor, weights: torch.Tensor, bounds: torch.Tensor, out: torch.Tensor, backend: str | None = None
) -> None:
    checks.check_combine(grads, weights, bounds, out)


def _coefficients(
    G: torch.Tensor, dtype: torch.dtype, *arguments: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rule, backend = Rule(*arguments[: len(Rule._fields)]), arguments[len(Rule._fields) :]
    _check_coefficients(G, dtype, rule)
    checks.check_apart(ema=rule.ema, G=G)
    rule.check_values(G.shape[1])
    found = backends.choose(G.device, *backend).coefficients(G, limits=precision(dtype), **rule.for_backend())
    _note_write(rule.ema)
    return found


def _check_coefficients(G: torch.Tensor, dtype: torch.dtype, rule: Rule) -> None:
    checks.check_gram(G, dtype)
    checks.check_rule(G.shape[0], G.shape[1], G.device, *rule, of="G")


def _coefficients_fake(
    G: torch.Tensor, dtype: torch.dtype, *arguments: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check_coefficients(G, dtype, Rule(*arguments[: len(Rule._fields)]))
    return G.new_empty(G.shape[:2]), torch.empty_like(G), torch.empty_like(G, dtype=torch.bool)


def _vaccinate(
    grads: torch.Tensor, bounds: torch.Tensor, out: torch.Tensor, *arguments: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    rule, backend = Rule(*arguments[: len(Rule._fields)]), arguments[len(Rule._fields) :]
    Call(grads, bounds, out, rule).check()
    found = backends.choose(grads.device, *backend).vaccinate(grads, bounds, out=out, **rule.for_backend())
    _note_write(out, rule.ema)
    return found


def _note_write(*tensors: torch.Tensor | None) -> None:
    """Native kernels write past autograd: without this it would not see that a saved tensor has changed."""
    for tensor in tensors:
        if tensor is not None and not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)


def _vaccinate_fake(
    grads: torch.Tensor, bounds: torch.Tensor, out: torch.Tensor, *arguments: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    Call(grads, bounds, out, Rule(*arguments[: len(Rule._fields)])).check_shapes()
    K, T = bounds.shape[0], grads.shape[0]
    return (
        grads.new_empty(K, T, dtype=torch.float64),
        grads.new_empty(K, T, T, dtype=torch.float64),
        grads.new_empty(K, T, T, dtype=torch.bool),
        grads.new_empty(K, T, T, dtype=torch.float64),
    )


def _task_order_fake(
    num_groups: int, num_tasks: int, seed: int, step: int, first_group: int, device: torch.device
) -> torch.Tensor:
    return torch.empty(num_groups, num_tasks, num_tasks - 1, dtype=torch.int64, device=device)


for _name, _implementation, _fake in (
    ("gram", _gram, _gram_fake),
    ("cross_gram", _cross_gram, _cross_gram_fake),
    ("coefficients", _coefficients, _coefficients_fake),
    ("combine", _combine, _combine_fake),
    ("vaccinate", _vaccinate, _vaccinate_fake),
    ("task_order", order.task_order, _task_order_fake),
):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")  # nothing here is differentiated
    torch.library.register_fake(f"gradvac::{_name}", _fake, lib=_library)
