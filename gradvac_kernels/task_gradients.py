"""From losses to ``.grad``: captures one gradient a task where the kernels read it, and puts the update where the
optimizer reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from . import ops
from .buffer import GradientBuffer
from .groups import Granularity, ParameterGroups, gradient_stride, trainable
from .methods import GradVac
from .result import Vaccination

Method = Callable[..., Vaccination]


class TaskGradients:
    """Multi-task gradients of a model, vaccinated into its ``.grad``.

    The short way, one backward a task::

        tasks = TaskGradients(model, tasks=["de", "fr", "hi"])
        optimizer.zero_grad()
        tasks.backward({"de": loss_de, "hi": loss_hi})
        optimizer.step()

    The long way, for mixed precision and accumulation over micro-batches::

        with tasks.task("de"):
            scaler.scale(loss_de).backward()
        ...
        tasks.apply()

    Autograd accumulates straight into the buffer's row of the task, and ``.grad`` becomes a view of its result: the
    buffer is the only copy. A parameter that one task does not use counts as zero in that task's gradient; one that no
    task used keeps ``.grad = None``, so that the optimizer passes over it. ``apply`` replaces what ``.grad`` held.

    Args:
        model: its trainable parameters must have one dtype and one device.
        tasks: the names of the N tasks; a step need not have all of them.
        granularity: see :meth:`ParameterGroups.from_model`.
        method: called as ``method(grads, groups, task_ids=, out=)``; None means ``GradVac()``.
        reduction: ``"sum"`` (Algorithm 1) or ``"mean"`` (divided by the number of tasks in the step).

    Attributes:
        tasks: the names.
        groups: the parameter groups.
        method: the method, with its state.
        last_task_ids: which task each row of ``last`` is, as indices of ``tasks``.
        last: the last :class:`Vaccination`, or None. Its gradient is the buffer's result: the next step overwrites it.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tasks: Sequence[str],
        granularity: Granularity = "all_layer",
        method: Method | None = None,
        reduction: str = "sum",
    ) -> None:
        if (
            not isinstance(tasks, Sequence)
            or isinstance(tasks, str)
            or not tasks
            or any(not isinstance(name, str) for name in tasks)
        ):
            raise TypeError(f"tasks: expected a sequence of at least one name of type str, got {tasks!r}")
        if len(set(tasks)) != len(tasks):
            raise ValueError(f"tasks: expected different names, got {list(tasks)}")
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction: expected 'sum' or 'mean', got {reduction!r}")
        self.tasks = tuple(tasks)
        self.reduction = reduction
        self.groups = ParameterGroups.from_model(model, granularity)
        named = dict(trainable(model))
        kinds = {(parameter.dtype, parameter.device): name for name, parameter in named.items()}
        if len(kinds) > 1:
            found = ", ".join(f"{name}: {dtype} on {device}" for (dtype, device), name in kinds.items())
            raise ValueError(f"model: expected trainable parameters of one dtype on one device, got {found}")
        ((dtype, device),) = kinds
        if device.type != "cpu":
            self.groups = ParameterGroups.from_model(model, granularity, align=16 // dtype.itemsize)  # one wide load
        if method is not None and (not callable(method) or isinstance(method, type)):
            raise TypeError(f"method: expected a callable, such as GradVac(), got {method!r}")
        self.method: Method = GradVac() if method is None else method
        self._buffer = GradientBuffer(self.groups, len(self.tasks), dtype=dtype, device=device)
        if isinstance(self.method, GradVac):
            if self.method.num_tasks not in (None, len(self.tasks)):
                raise ValueError(f"method: expected num_tasks {len(self.tasks)}, got {self.method.num_tasks}")
            if self.method.vaccinated is not None:
                ops.check_range("method.vaccinated", self.method.vaccinated, len(self.tasks))
            self.method.num_tasks = len(self.tasks)
        self.last: Vaccination | None = None
        self.last_task_ids: tuple[int, ...] = ()
        self._model = model
        self._parameters = [named[slot.name] for slot in self.groups.parameters]
        self._rows: list[int] = []  # ids of the tasks captured in this step: row r of the buffer is task _rows[r]
        self._used = [False] * len(self._parameters)
        self._capturing = False

    @property
    def task_ids(self) -> tuple[int, ...]:
        """Which task each row of :attr:`grads` is: the tasks captured since the last ``apply``, in their order."""
        return tuple(self._rows)

    @property
    def grads(self) -> torch.Tensor:
        """``[len(task_ids), P]``: the gradients captured since the last ``apply``, a view of the buffer."""
        return self._buffer.grads[: len(self._rows)]

    @contextmanager
    def task(self, name: str) -> Iterator[None]:
        """Every backward in this context accumulates into the gradient of task ``name``, and not into ``.grad``.

        Entered again before ``apply``, it adds to what is there (micro-batches). After an exception the gradients
        captured since the last ``apply`` are dropped.

        Raises:
            ValueError: ``name`` is no task, or the model's parameters are no longer those the buffer was made for.
            RuntimeError: inside another ``task``.
        """
        if name not in self.tasks:
            raise ValueError(f"name: expected one of the tasks {list(self.tasks)}, got {name!r}")
        if self._capturing:
            raise RuntimeError("task: expected one task at a time, got a task inside another")
        self._check_parameters()
        before = [parameter.grad for parameter in self._parameters]
        hooks = [
            parameter.register_post_accumulate_grad_hook(self._note_use(index))
            for index, parameter in enumerate(self._parameters)
            if parameter.requires_grad and not self._used[index]
        ]
        self._capturing = True
        try:
            views = self._buffer.parameter_views(self._row(name))
            for parameter, view in zip(self._parameters, views):
                parameter.grad = view
            yield
            for parameter, view in zip(self._parameters, views):
                if parameter.grad is None:  # zero_grad()
                    view.zero_()
                elif parameter.grad is not view:  # zero_grad() and then backward, or create_graph=True
                    other = parameter.grad.detach()
                    view.copy_(other.to_dense() if other.is_sparse else other)
        except BaseException:
            self.discard()
            raise
        finally:
            self._capturing = False
            for parameter, grad in zip(self._parameters, before):
                parameter.grad = grad
            for hook in hooks:
                hook.remove()

    def backward(self, losses: Mapping[str, torch.Tensor]) -> Vaccination:
        """One backward a task, then :meth:`apply`.

        Args:
            losses: a scalar for each task of this step, by name; they may share parts of their graphs.

        Returns:
            The :class:`Vaccination`.

        Raises:
            TypeError, ValueError: no losses, an unknown task, or a loss that is no scalar with a graph.
        """
        if not isinstance(losses, Mapping) or not losses:
            raise ValueError(f"losses: expected a mapping of at least one task to its loss, got {losses!r}")
        for name, loss in losses.items():
            if name not in self.tasks:
                raise ValueError(f"losses: expected tasks among {list(self.tasks)}, got {name!r}")
            if not isinstance(loss, torch.Tensor):
                raise TypeError(f"losses[{name!r}]: expected a tensor, got {type(loss).__name__}")
            if loss.numel() != 1 or not loss.requires_grad or loss.is_complex():
                raise ValueError(
                    f"losses[{name!r}]: expected a real scalar that requires grad, got shape {list(loss.shape)}, "
                    f"{loss.dtype}, requires_grad={loss.requires_grad}"
                )
        *_, last = losses
        for name, loss in losses.items():
            with self.task(name):
                loss.backward(retain_graph=name != last)
        return self.apply()

    def apply(self) -> Vaccination:
        """Vaccinate what was captured and set the model's ``.grad``.

        Returns:
            The :class:`Vaccination`.

        Raises:
            RuntimeError: inside :meth:`task`, or nothing was captured since the last ``apply``.
        """
        if self._capturing or not self._rows:
            raise RuntimeError(
                "apply: expected captured gradients, got a call "
                + ("inside a task" if self._capturing else "without any")
            )
        result = self._buffer.result
        try:
            self.last = self.method(self.grads, self.groups, task_ids=self._rows, out=result)
        except BaseException:
            self.discard()
            raise
        if self.reduction == "mean":
            result /= len(self._rows)
        for parameter, view, used in zip(self._parameters, self._buffer.parameter_views(result), self._used):
            parameter.grad = view if used else None
        self.last_task_ids = self.task_ids
        self.discard()
        return self.last

    def discard(self) -> None:
        """Forget the gradients captured since the last ``apply``."""
        self._rows = []
        self._used = [False] * len(self._parameters)

    def _row(self, name: str) -> torch.Tensor:
        task = self.tasks.index(name)
        if task not in self._rows:
            self._buffer.grads[len(self._rows)].zero_()
            self._rows.append(task)
        return self._buffer.grads[self._rows.index(task)]

    def _note_use(self, index: int) -> Callable[[torch.Tensor], None]:
        def note(_: torch.Tensor) -> None:
            self._used[index] = True

        return note

    def _check_parameters(self) -> None:
        known = {id(parameter) for parameter in self._parameters}
        for name, parameter in trainable(self._model):
            if id(parameter) not in known:
                raise ValueError(f"model: expected the trainable parameters of before, got a new one, {name!r}")
        grads = self._buffer.grads
        for slot, parameter in zip(self.groups.parameters, self._parameters):
            found = parameter.dtype, parameter.device, tuple(parameter.shape), gradient_stride(parameter)
            if found != (grads.dtype, grads.device, slot.shape, slot.stride):
                raise ValueError(
                    f"model: expected {slot.name!r} as before, {grads.dtype} on {grads.device} of shape "
                    f"{list(slot.shape)}, got {parameter.dtype} on {parameter.device} of shape {list(parameter.shape)}"
                )
