"""Sees every operation of a forward pass, and delivers the parameters' gradients task by task in the backward pass."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from ..groups import gradient_stride
from . import operations, rules
from .operations import name_of, tensors_in
from .places import Guessed, Loses, Lost, Place, Samples
from .samples import Tracker
from .sinks import Sink
from .slab import Part, Target
from .task_rows import TaskRows
from .uses import Use


class Capture(TorchFunctionMode):
    """Active in ``with``; it holds no state of the model but hooks on its parameters, which :meth:`watch` removes.

    Args:
        parameters: the model's trainable parameters by name, in the order of ``groups.parameters``.
        buffers: the model's other tensors.
        rows: ``[B]`` int64 on the CPU, the row of the slab of each sample.
        num_tasks: T.
        batch_dim: where the samples lie in tensors that come from outside.
        sink: where gradients go.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.Tensor],
        buffers: Sequence[torch.Tensor],
        rows: torch.Tensor,
        num_tasks: int,
        batch_dim: int,
        sink: Sink,
    ) -> None:
        super().__init__()
        self.tracker = Tracker(rows, batch_dim, [*parameters.values(), *buffers])
        self._names = list(parameters)
        self._parameters = list(parameters.values())
        self._index = {id(parameter): i for i, parameter in enumerate(self._parameters)}
        self._num_tasks = num_tasks
        self._sink = sink
        self._rows: dict[tuple[int, torch.device], tuple[Samples, TaskRows]] = {}
        self._within: list[Callable[..., Any]] = []
        self._reached: dict[int, frozenset[int]] = {}  # by graph task
        self._closed = False
        self._accumulators: dict[int, Any] = {}  # of the parameters that are not frozen now

    # ----------------------------------------------------------------------------------------------------- forward

    def __torch_function__(
        self, function: Callable[..., Any], types_: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name, kind = _kind_of(function)
        if kind == "query":
            return function(*args, **kwargs)
        if kind == "backward":
            return self._inside(function, args, kwargs)
        if not args and "input" in kwargs and name not in ("where", "searchsorted"):  # there it is not the first
            kwargs = dict(kwargs)
            args = (kwargs.pop("input"),)
        if name in ("getitem", "setitem"):
            args = (args[0], _numbers(args[1]), *args[2:])
        given = args[:1] if name in operations.OF_THE_FIRST else (*args, kwargs) if kwargs else args
        known = [(operand, self.tracker.of(operand)) for operand in tensors_in(given)]
        if operations.is_in_place(function):
            known = _where_it_matters(known)
        meeting = (
            torch.is_grad_enabled()
            and any(place is None and self.shared(operand) for operand, place in known)
            and any(place is not None for _, place in known)
        )
        if kind == "composed" and function not in self._within and not (meeting and rules.has_rule(function)):
            return self._inside(function, args, kwargs)
        if name == "batch_norm" and (args[5:6] == (True,) or kwargs.get("training")):
            raise ValueError("batch: expected operations that keep samples apart, got a batch_norm in training")
        if meeting:
            out = self._meet(name, function, args, kwargs, [operand for operand, _ in known])
            if all(self.tracker.has_noted(result) for result in tensors_in((out,))):
                return out
        else:
            out = function(*args, **kwargs)
        self.tracker.follow(name, function, args, kwargs, out, known)
        return out

    def _inside(self, function: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """Run a function that is written in Python operation by operation."""
        self._within.append(function)
        try:
            with self:
                return _unasked(function)(*args, **kwargs)
        finally:
            self._within.pop()

    def _meet(
        self, name: str, function: Callable[..., Any], args: Any, kwargs: Any, operands: list[torch.Tensor]
    ) -> Any:
        if torch.nn.parallel.DistributedDataParallel._active_ddp_module is not None:
            raise ValueError(
                "batch: expected the model itself to run, got DistributedDataParallel around it, which averages what "
                "autograd gives; TaskGradients(..., process_group=...) does it for each task"
            )
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise ValueError(f"batch: expected parameters outside of torch.func and torch.vmap, got {name} inside")
        try:
            self.deciding(operands)
            out = rules.rule_for(function)(self, function, args, kwargs)
            if out is NotImplemented:
                composed = isinstance(function, types.FunctionType) and function not in self._within
                out = (self._inside if composed else self._generally)(function, args, kwargs)
        except Loses as loses:
            raise self._error(operands, f"{name} {loses}") from None
        return out

    def _generally(self, function: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        return rules.general(self, function, args, kwargs)

    # -------------------------------------------------------------------------------------------------- for the rules

    def of(self, tensor: torch.Tensor) -> Place:
        """Where the samples lie in a tensor: :class:`Samples`, or None if it does not depend on them."""
        return self.tracker.of(tensor) if isinstance(tensor, torch.Tensor) else None

    def shared(self, tensor: Any) -> bool:
        """Made from parameters, and from no samples."""
        if not isinstance(tensor, torch.Tensor) or not tensor.requires_grad:
            return False
        return id(tensor) in self._index if tensor.is_leaf else self.tracker.of(tensor) is None

    def plain(self, tensor: Any) -> Any:
        """Detached if it is shared."""
        return tensor.detach() if self.shared(tensor) else tensor

    def deciding(self, operands: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, Samples]]:
        """The operands that depend on samples; those with a gradient, if there are any."""
        known = [(operand, place) for operand in operands if (place := self.tracker.of(operand)) is not None]
        deciding = [pair for pair in known if pair[0].requires_grad] or known
        unknown = [place for _, place in deciding if isinstance(place, (Lost, Guessed))]
        if any(isinstance(place, Lost) for place in unknown) or len(unknown) == len(deciding) > 0:
            guessed = f"{unknown[0].reason}; what the model makes of its inputs can be made before the batch"
            reason = next((place.reason for place in unknown if isinstance(place, Lost)), guessed)
            raise self._error(operands, reason)
        return deciding  # type: ignore[return-value]

    def place_for_parameters(self, out: torch.Tensor, name: str) -> Samples:
        """Where the samples lie in the result of an operation with parameters."""
        place = self.tracker.of(out)
        if isinstance(place, Samples):
            return place
        raise ValueError(
            f"batch: expected to know where the samples are in the result of {name}, got "
            f"{place.reason if place else 'no samples'}; teach it by register_rule"
        )

    def tap(
        self,
        out: torch.Tensor,
        place: Samples,
        parameters: Sequence[torch.Tensor | None],
        saved: Sequence[torch.Tensor],
        grads: rules.Grads,
        looked_up: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``out``, which was computed with ``parameters`` detached, so that their gradients are delivered by ``grads``.

        Args:
            out: the result of an operation.
            place: where its samples lie.
            parameters: what :meth:`shared` is true of gets gradients; the others are passed over.
            saved: what ``grads`` needs of the operands.
            grads: see ``gradvac_kernels.streaming.rules.Grads``.
            looked_up: the rows of an embedding that have a gradient, for rules that take a ``Table``.
        """
        wanted = [parameter if self.shared(parameter) else None for parameter in parameters]
        if not torch.is_grad_enabled() or not any(parameter is not None for parameter in wanted):
            return out
        parts = [None if parameter is None else self._part(parameter) for parameter in wanted]
        for parameter, part in zip(wanted, parts):
            if parameter is not None:
                self._announce(parameter, part, looked_up)
        expanded = any(size > 1 and stride == 0 for size, stride in zip(out.shape, out.stride()))
        if out._is_view() and not expanded:
            out = torch.ops.aten._unsafe_view(out, out.shape)  # a view cannot be marked, and this one is nobody's
        delivery = functools.partial(self.deliver, place, grads, wanted, parts)
        present = [parameter for parameter in wanted if parameter is not None]
        out = _Tap.apply(out, delivery, [tensor.detach() for tensor in saved], not expanded, *present)
        self.tracker.note(out, place)
        return out

    def _announce(self, value: torch.Tensor, part: Part | None, looked_up: torch.Tensor | None) -> None:
        """What of its parameters a use will need."""
        if part is None:
            for index in self._made_of(value):
                self._sink.announce(index, None)
        else:
            self._sink.announce(part.parameter, looked_up if value.is_leaf else None)

    # ---------------------------------------------------------------------------------------------------- backward

    def deliver(
        self,
        place: Samples,
        grads: rules.Grads,
        wanted: Sequence[torch.Tensor | None],
        parts: Sequence[Part | None],
        saved: tuple[torch.Tensor, ...],
        grad: torch.Tensor,
    ) -> None:
        """The gradient of a tapped tensor has arrived."""
        reached = self._enter_backward()
        rows = self._task_rows(place, grad.device)
        # autograd.grad, and backward(inputs=...), are not for parameters, or not for all
        now = tuple(part if part and part.parameter in reached else None for part in parts)
        if any(part is not None for part in now):
            self._sink.add(Use(now, grads, rows, saved, grad, place))
        made = [
            value if value is not None and not part and reached.intersection(self._made_of(value)) else None
            for value, part in zip(wanted, parts)
        ]
        if any(value is not None for value in made):
            T = self._num_tasks
            into = [None if value is None else Target(value.new_zeros(T, *value.shape)) for value in made]
            grads(rows, saved, grad, place.dim, into)
            for value, target in zip(made, into):
                if value is not None and target is not None:
                    self._deliver_through(value, target.gradients, reached)

    def _deliver_through(self, value: torch.Tensor, grad: torch.Tensor, reached: frozenset[int]) -> None:
        """From the gradients ``[T, ...]`` of something made of parameters to those of the parameters."""
        indices = [index for index in self._made_of(value) if index in reached]
        parameters = tuple(self._parameters[i] for i in indices)
        into = [self._sink.rows(index) for index in indices]
        run = torch.autograd.Variable._execution_engine.run_backward  # type: ignore[attr-defined]
        for row, its in enumerate(grad):
            with torch._C._EnableTorchFunction():  # what a checkpoint recomputes is to be seen
                # torch.autograd.grad, but for what a function mode makes it cost
                found = run((value,), (its,), True, False, parameters, allow_unreachable=True, accumulate_grad=False)
            for rows, part in zip(into, found):
                if part is not None:
                    rows[row] += part.to_dense() if part.is_sparse else part

    def _part(self, value: torch.Tensor) -> Part | None:
        """None where it is not a parameter or a view of one."""
        parameter = value if value.is_leaf else value._base
        index = self._index.get(id(parameter))
        if index is None or parameter is None or value.dtype != parameter.dtype:
            return None
        if gradient_stride(parameter) != parameter.stride() or not _is_apart(value):
            return None
        offset = int(value.storage_offset()) - int(parameter.storage_offset())
        return Part(index, tuple(value.shape), value.stride(), offset)

    def _made_of(self, value: torch.Tensor) -> list[int]:
        found, seen, stack = set(), set(), [value.grad_fn]
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            variable = getattr(node, "variable", None)
            if variable is not None:
                if id(variable) not in self._index:
                    raise ValueError(
                        f"batch: expected parameters of the model only in a tensor of shape {list(value.shape)}, got "
                        f"one of shape {list(variable.shape)} that is not among its trainable parameters"
                    )
                found.add(self._index[id(variable)])
            stack.extend(parent for parent, _ in node.next_functions)
        return sorted(found)

    def _task_rows(self, place: Samples, device: torch.device) -> TaskRows:
        key = (id(place.pattern), device)
        if key not in self._rows:
            self._rows[key] = (place, TaskRows(place, self._num_tasks, device))  # keeps the pattern: its id is the key
        return self._rows[key][1]

    def _enter_backward(self) -> frozenset[int]:
        """The parameters whose gradients the backward that runs now is to complete."""
        if self._closed:
            raise RuntimeError("batch: expected the backward in the context of the forward, got it after that")
        task = torch._C._current_graph_task_id()
        if task not in self._reached:
            will_run = torch._C._will_engine_execute_node
            try:
                reached = frozenset(index for index, node in self._accumulators.items() if will_run(node))
            except RuntimeError:
                raise ValueError(
                    "batch: expected gradients of parameters by a backward, got torch.autograd.grad of a parameter"
                ) from None
            self._reached[task] = reached
            self._sink.expect(sorted(reached))
        return self._reached[task]

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Notice when the last use of a parameter was delivered."""
        hooks = []
        try:
            for index, parameter in enumerate(self._parameters):
                if not parameter.requires_grad:
                    continue
                node = torch.autograd.graph.get_gradient_edge(parameter).node
                self._accumulators[index] = node
                hooks.append(node.register_prehook(functools.partial(self._complete, index)))
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._accumulators.clear()
            self._closed = True
            self.tracker.forget()

    def _complete(self, index: int, grads: tuple[torch.Tensor | None, ...]) -> None:
        if any(grad is not None for grad in grads):
            raise ValueError(
                f"batch: expected every use of {self._names[index]!r} to belong to a sample, got a gradient that could "
                "not be kept apart by task: from a term of the loss without samples, such as a penalty on weights, or "
                "an operation that cannot be followed, such as a torch.autograd.Function with parameters"
            )
        with torch._C.DisableTorchFunction():
            self._enter_backward()
            self._sink.complete(index)

    def _error(self, operands: Sequence[torch.Tensor], reason: str) -> ValueError:
        names = [self._names[self._index[id(o)]] for o in operands if id(o) in self._index]
        of = f"parameter {names[0]!r}" if names else "what is made of parameters"
        return ValueError(
            f"batch: expected every value that meets {of} to belong to one sample, along one dimension, got "
            f"one of which that is not known: {reason}"
        )


class _Tap(torch.autograd.Function):
    """The identity, but the gradient that passes is delivered; the parameters get none from autograd."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        out: torch.Tensor,
        delivery: Callable[[tuple[torch.Tensor, ...], torch.Tensor], None],
        saved: list[torch.Tensor],
        in_place: bool,
        *present: torch.Tensor,
    ) -> torch.Tensor:
        ctx.delivery, ctx.present = delivery, len(present)
        ctx.save_for_backward(*saved)
        if in_place:
            ctx.mark_dirty(out)
            return out
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        if torch.is_grad_enabled():
            raise ValueError("batch: expected first derivatives only, got create_graph=True")
        saved = ctx.saved_tensors  # here, where a checkpoint that recomputes them is seen by the mode
        with torch._C.DisableTorchFunction(), _without_autocast(grad.device.type):
            ctx.delivery(saved, grad)
        return grad, *[None] * (3 + ctx.present)


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _is_apart(view: torch.Tensor) -> bool:
    """No two elements lie in one place."""
    reach = 0
    for stride, size in sorted(zip(view.stride(), view.shape)):
        if size > 1:
            if stride <= reach:
                return False
            reach += stride * (size - 1)
    return True


def _numbers(index: Any) -> Any:
    """An index, where tensors of one number are ints, as torch takes them: such as that of an expert's parameters."""
    if isinstance(index, tuple):
        return tuple(map(_numbers, index))
    one = isinstance(index, torch.Tensor) and not index.dim() and index.dtype in (torch.int64, torch.int32)
    return int(index) if one else index


def _where_it_matters(known: list[tuple[torch.Tensor, Place]]) -> list[tuple[torch.Tensor, Place]]:
    """Of an operation in place: where samples are in a constant that gets a gradient now does not matter."""
    if not known or not isinstance(known[0][1], (Lost, Guessed)) or known[0][0].requires_grad:
        return known
    return [(known[0][0], None), *known[1:]] if any(operand.requires_grad for operand, _ in known) else known


def is_active() -> bool:
    """Inside a batch, on this thread."""
    return any(isinstance(mode, Capture) for mode in _get_current_function_mode_stack())


@functools.cache
def _kind_of(function: Callable[..., Any]) -> tuple[str, str]:
    """Its name, and how to see it: as a whole, by what it is composed of, or not at all."""
    name = name_of(function)
    if name in _QUERIES or (name.startswith("get ") and name not in operations.KNOWN):
        return name, "query"
    if name in ("backward", "grad"):
        return name, "backward"  # what a checkpoint recomputes in it is to be seen
    known = name in operations.KNOWN or operations.is_pointwise(name)
    return name, "composed" if isinstance(function, types.FunctionType) and not known else "whole"


@functools.cache
def _unasked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, but it does not ask whether its arguments override it: what it calls is asked instead."""
    asked = {name: _no for name in function.__globals__ if name.startswith("has_torch_function")}
    copy = types.FunctionType(
        function.__code__,
        {**function.__globals__, **asked},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _no(*_: Any) -> bool:
    return False


_QUERIES = {"size", "dim", "numel", "stride", "is_floating_point", "is_complex", "element_size", "data_ptr"}
_QUERIES |= {"is_contiguous", "item", "tolist", "storage_offset", "get_device", "nelement", "ndimension"}
_QUERIES |= {"is_tensor", "is_same_size", "is_inference", "_is_view"}
