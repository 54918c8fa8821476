"""From losses to ``.grad``: captures one gradient a task where the kernels read it, and puts the update where the
optimizer reads it."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from . import checks, streaming
from .buffer import GradientBuffer
from .groups import Granularity, ParameterGroups, gradient_stride, trainable
from .methods import GradVac, Method
from .numerics import DTYPES
from .processes import Processes, check_whole
from .result import Vaccination


class TaskGradients:
    """Multi-task gradients of a model, vaccinated into its ``.grad``.

    One mixed batch of all tasks, one forward, one backward (see :meth:`batch`)::

        tasks = TaskGradients(model, tasks=["de", "fr", "hi"])
        optimizer.zero_grad()
        with tasks.batch(task_of_sample):
            task_mean_loss(losses_of_samples(model(x), y), task_of_sample).backward()
        optimizer.step()

    One backward a task, into a buffer of T x P numbers::

        tasks.backward({"de": loss_de, "hi": loss_hi})

    The long way, for any loop around the buffer::

        with tasks.task("de"):
            scaler.scale(loss_de).backward()
        ...
        tasks.apply()

    Gradients are accumulated where the kernels read them, and ``.grad`` becomes a view of the result: no copies. A
    parameter that one task does not use counts as zero in that task's gradient; one that no task used keeps
    ``.grad = None``, so that the optimizer passes over it. What ``.grad`` held is replaced.

    Args:
        model: its trainable parameters must have one dtype and one device, and no wrapper may average their gradients.
        tasks: the names of the N tasks; a step need not have all of them.
        granularity: see :meth:`ParameterGroups.from_model`.
        method: one of :mod:`gradvac_kernels.methods`, or anything that is called as ``method(grads, groups, task_ids=,
            out=)``, and for :meth:`batch` has ``in_parts`` (see :meth:`methods.Method.in_parts`); None means
            ``GradVac()``. Methods that need losses get them from :meth:`backward` or :meth:`report_losses`.
        reduction: ``"sum"`` (Algorithm 1) or ``"mean"`` (divided by the number of tasks in the step).
        process_group: of ``torch.distributed``, for a data-parallel job, in which every process has all of the model
            with the same parameters, a method made alike, and a part of the batch. Gradients, and the losses reported,
            are put together before the method sees them: ``.grad``, ``last`` and the method's state are then the same
            in all processes. Each of them must take part in making this and in every step (in :meth:`batch`, with one
            sample at least, and without collectives of other kinds in the context), but need not have every task. A job
            does not outlive an exception that is not raised in all processes alike. None, which ``WORLD`` is before
            ``init_process_group``, means no job.
        process_reduction: ``"mean"`` over the processes that have the task, for losses that are means of a process's
            own samples; ``"sum"``, for losses divided by the number of the task's samples in all processes. The first
            is what one process with the whole batch would find where all have equally many samples of the task; the
            second always is.

    Attributes:
        tasks: the names.
        groups: the parameter groups, each of which begins at a multiple of 32 columns: whole cache lines of any type.
        method: the method, with its state.
        last_task_ids: which task each row of ``last`` is, as indices of ``tasks``.
        last: the last :class:`Vaccination`, or None. Its gradient is the buffer's result: the next step overwrites it.

    Raises:
        TypeError, ValueError: an argument is not as above, or the tasks, trainable parameters or reductions are not the
            same in all processes.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tasks: Sequence[str],
        granularity: Granularity = "all_layer",
        method: Callable[..., Vaccination] | None = None,
        reduction: str = "sum",
        process_group: dist.ProcessGroup | None = None,
        process_reduction: str = "mean",
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
        if process_reduction not in ("mean", "sum"):
            raise ValueError(f"process_reduction: expected 'mean' or 'sum', got {process_reduction!r}")
        if process_group is not None and not isinstance(process_group, dist.ProcessGroup):
            raise TypeError(f"process_group: expected a ProcessGroup, got {process_group!r}")
        self.tasks = tuple(tasks)
        self.reduction = reduction
        self.groups = ParameterGroups.from_model(model, granularity, align=32)
        check_whole(model)
        named = dict(trainable(model))
        kinds = {(parameter.dtype, parameter.device): name for name, parameter in named.items()}
        if len(kinds) > 1:
            found = ", ".join(f"{name}: {dtype} on {device}" for (dtype, device), name in kinds.items())
            raise ValueError(f"model: expected trainable parameters of one dtype on one device, got {found}")
        ((dtype, device),) = kinds
        if method is not None and (not callable(method) or isinstance(method, type)):
            raise TypeError(f"method: expected a callable, such as GradVac(), got {method!r}")
        self.method: Callable[..., Vaccination] = GradVac() if method is None else method
        self._buffer = GradientBuffer(self.groups, len(self.tasks), dtype=dtype, device=device)
        if isinstance(self.method, Method):
            self.method.bind(len(self.tasks))
        self.last: Vaccination | None = None
        self.last_task_ids: tuple[int, ...] = ()
        self._model = model
        self._parameters = [named[slot.name] for slot in self.groups.parameters]
        self._rows: list[int] = []  # ids of the tasks captured in this step: row r of the buffer is task _rows[r]
        self._losses: dict[str, torch.Tensor] = {}  # of this step
        self._used = [False] * len(self._parameters)
        self._capturing = False
        self._slabs = [self.groups[k : k + 1] for k in range(len(self.groups))]
        self._coarse = streaming.coarse_groups(model, self.groups)
        self._arena: streaming.Arena | None = None
        self._processes: Processes | None = None
        self._order = list(reversed(range(len(self.groups))))  # in which a backward is expected to complete the groups
        if process_group is not None:
            self._processes = Processes(process_group, process_reduction, device)
            if not self._processes.are_equal((self.tasks, self.groups, reduction, process_reduction), self._parameters):
                raise ValueError(
                    "process_group: expected the same tasks, in the same order, the same parameters and reductions in "
                    "all processes, got others here than in another"
                )

    @property
    def task_ids(self) -> tuple[int, ...]:
        """Which task each row of :attr:`grads` is: the tasks captured since the last ``apply``, in their order."""
        return tuple(self._rows)

    @property
    def grads(self) -> torch.Tensor:
        """``[len(task_ids), P]``: what this process captured since the last ``apply``, a view of the buffer.

        Columns of no parameter, which pad a group, are zero.
        """
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

    @contextmanager
    def batch(
        self, task_of_sample: torch.Tensor | Sequence[int | str], *, batch_dim: int = 0, keep: bool = False
    ) -> Iterator[None]:
        """One mixed batch of all tasks, one forward, one backward: the gradients of each task without T passes.

        In this context the model runs forward, and the loss backward, once::

            with tasks.batch(task_of_sample):
                losses = loss_of_each_sample(model(x), y)  # [B]
                gvk.task_mean_loss(losses, task_of_sample).backward()

        gives the ``.grad`` of one backward a task on the same samples. A layer's weight gradient is a product over the
        samples; here each task's samples are multiplied by themselves, into a slab ``[T, P_group]``, and a group is
        vaccinated as soon as its layers have been through: there is no buffer of all tasks' gradients. Groups of more
        than one layer ("whole_model") have no slab at all: their layers' inputs and the gradients of their outputs are
        kept until the weights are known, and multiplied a second time with those.

        The loss may be any scalar in which every sample's terms depend on that sample alone. What mixes samples before
        a parameter is used (batch normalisation in training), or cannot be followed, is an error that says so; after
        the last parameter, as in a contrastive loss, by detached statistics, or in a hook on activations, it is not
        noticed. Parameters that are used by other operations
        than those with a rule (see :func:`register_rule`) cost one small backward a task. ``torch.autograd.grad`` of
        activations gives first derivatives; ``create_graph`` is refused.

        Args:
            task_of_sample: ``[B]``, the task of each sample: indices of ``tasks``, or names. In any order and number;
                the rows of ``last`` are the tasks present, in the order of ``tasks``.
            batch_dim: the dimension of the samples in tensors that come from outside, such as the model's inputs: one
                that has B entries there is taken to hold the samples. What the model holds as parameters and buffers,
                or makes itself (in torch: NumPy is not seen), does not; so put the batch together before this context.
            keep: collect the gradients in the buffer ``[T, P]`` instead, as :meth:`task` does; further batches add to
                them, and :meth:`apply` turns them (accumulation over micro-batches, or to look at them first). An
                exception drops what was kept, as in :meth:`task`.

        Raises:
            TypeError: ``task_of_sample`` is of another type, or the method cannot vaccinate in parts.
            ValueError: an unknown task, no samples, a module that mixes samples or cannot be followed; in the passes:
                an operation after which samples cannot be told apart. The method's state and ``.grad`` are then as they
                were, but what ``.grad`` shows of the step before may be partly overwritten.
            RuntimeError: inside another context, after gradients were captured that ``apply`` has not used, without a
                backward, with several, or one that did not finish.
        """
        present, rows = self._tasks_of(task_of_sample)
        if isinstance(batch_dim, bool) or not isinstance(batch_dim, int) or batch_dim < 0:
            raise ValueError(f"batch_dim: expected an int of at least 0, got {batch_dim!r}")
        if self._capturing or streaming.is_active():
            raise RuntimeError("batch: expected one task or batch at a time, got a batch inside another")
        if self._rows and not keep:
            raise RuntimeError("batch: expected apply() or discard() after gradients were captured, got a new step")
        if not keep and not hasattr(self.method, "in_parts"):
            raise TypeError(f"method: expected one that vaccinates in parts, such as GradVac, got {self.method!r}")
        self._check_parameters()
        streaming.check_modules(self._model)
        self._capturing = True
        try:
            if keep:
                for task in present:
                    self._row(self.tasks[task])
                row_of = torch.tensor([self._rows.index(task) for task in present])
                sink = streaming.BufferSink(self.groups, self.grads)
                with self._capture(row_of[rows], len(self._rows), batch_dim, sink):
                    yield
                self._used = [used or index in sink.fired for index, used in enumerate(self._used)]
            else:
                mine, shares = present, None
                if self._processes is not None:
                    present, shares = self._processes.agree(mine, len(self.tasks))
                    rows = torch.tensor([present.index(task) for task in mine])[rows]
                with self.method.in_parts(self.groups, len(present), self._buffer.result.device) as step:  # type: ignore[attr-defined]
                    stream = self._stream_sink(step, present, shares)
                    with self._capture(rows, len(present), batch_dim, stream):
                        yield
                    self._used = [index in stream.fired for index in range(len(self._parameters))]
                    found = stream.close()
                    if self._processes is not None:
                        self._agree_on_use(self._processes, mine)
                        self._agree_on_order(self._processes, stream.completed)
                    step.losses = self._losses_of(present)
                self._set_grads(found, tuple(present))
        except BaseException:
            self.discard()
            if self._processes is not None:
                self._arena = None  # slabs that are under way still change
            raise
        finally:
            self._capturing = False
            if self._arena is not None:
                self._arena.settle()

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
            checks.check_scalar(f"losses[{name!r}]", loss)
        *_, last = losses
        self.report_losses(losses)
        for name, loss in losses.items():
            with self.task(name):
                loss.backward(retain_graph=name != last)
        return self.apply()

    def report_losses(self, losses: Mapping[str, torch.Tensor | float] | torch.Tensor) -> None:
        """Tell the method the tasks' losses of this step, where it needs them (GradNorm, CATS).

        Inside :meth:`batch` or :meth:`task`, or before :meth:`apply`; for a task reported twice the last one counts.
        :meth:`backward` does it by itself.

        Args:
            losses: a scalar for each task of this step, by name, or ``[N]``, one for each of ``tasks`` (what stands
                there for absent tasks does not matter).

        Raises:
            TypeError, ValueError: an unknown task, or not one real number for each.
        """
        if isinstance(losses, torch.Tensor):
            checks.check_tensor("losses", losses, DTYPES, (len(self.tasks),))
            losses = dict(zip(self.tasks, losses.detach()))
        elif not isinstance(losses, Mapping):
            raise TypeError(f"losses: expected a mapping or a tensor, got {type(losses).__name__}")
        found = {}
        for name, loss in losses.items():
            if name not in self.tasks:
                raise ValueError(f"losses: expected tasks among {list(self.tasks)}, got {name!r}")
            if not isinstance(loss, torch.Tensor):
                if isinstance(loss, bool) or not isinstance(loss, numbers.Real):
                    raise TypeError(f"losses[{name!r}]: expected a real scalar, got {loss!r}")
                try:
                    loss = torch.tensor(float(loss), dtype=torch.float64)
                except OverflowError:
                    raise ValueError(f"losses[{name!r}]: expected a number that a float holds, got more") from None
            loss = loss.detach()
            if loss.numel() != 1 or loss.is_complex() or loss.layout != torch.strided:
                got = f"shape {list(loss.shape)}, {loss.dtype}, {loss.layout}"
                raise ValueError(f"losses[{name!r}]: expected a real scalar, got {got}")
            found[name] = loss.reshape(()).clone()
        self._losses |= found

    def apply(self) -> Vaccination:
        """Vaccinate what was captured and set the model's ``.grad``.

        Returns:
            The :class:`Vaccination`.

        Raises:
            RuntimeError: inside :meth:`task`, or nothing was captured, in no process, since the last ``apply``.
        """
        if self._capturing or not (self._rows or self._processes):
            raise RuntimeError(
                "apply: expected captured gradients, got a call "
                + ("inside a task" if self._capturing else "without any")
            )
        result = self._buffer.result
        try:
            if self._processes is not None:
                self._put_together(self._processes)
            more = {"losses": self._losses_of(self._rows)} if isinstance(self.method, Method) else {}
            found = self.method(self.grads, self.groups, task_ids=self._rows, out=result, **more)
        except BaseException:
            self.discard()
            raise
        return self._set_grads(found, self.task_ids)

    def discard(self) -> None:
        """Forget the gradients captured, and the losses reported, since the last ``apply``."""
        self._rows = []
        self._losses = {}
        self._used = [False] * len(self._parameters)

    def _set_grads(self, found: Vaccination, task_ids: tuple[int, ...]) -> Vaccination:
        result = self._buffer.result
        if self.reduction == "mean":
            result /= len(task_ids)
        for parameter, view, used in zip(self._parameters, self._buffer.parameter_views(result), self._used):
            parameter.grad = view if used else None
        self.last, self.last_task_ids = found, task_ids
        self.discard()
        return found

    def _losses_of(self, rows: Sequence[int]) -> torch.Tensor | None:
        """``[T]`` float64, of the rows' tasks; None if the method can do without."""
        if not getattr(self.method, "needs_losses", False):
            return None
        names = [self.tasks[row] for row in rows]
        missing = [name for name in names if name not in self._losses]
        if missing:
            raise ValueError(
                f"losses: expected report_losses() for every task of the step, as {type(self.method).__name__} needs "
                f"them, got none of {missing}"
            )
        device = self._buffer.result.device
        return torch.stack([self._losses[name].to(device, torch.float64) for name in names])

    def _tasks_of(self, task_of_sample: torch.Tensor | Sequence[int | str]) -> tuple[list[int], torch.Tensor]:
        """The ids of the tasks present, ascending, and which of them each sample is, ``[B]`` on the CPU."""
        if isinstance(task_of_sample, torch.Tensor):
            checks.check_tensor("task_of_sample", task_of_sample, (torch.int64, torch.int32), (None,))
            ids = task_of_sample.cpu().long()
        elif isinstance(task_of_sample, Sequence) and not isinstance(task_of_sample, str):
            for name in task_of_sample:
                if isinstance(name, str) and name not in self.tasks:
                    raise ValueError(f"task_of_sample: expected tasks among {list(self.tasks)}, got {name!r}")
            index = {name: i for i, name in enumerate(self.tasks)}
            listed = [index[name] if isinstance(name, str) else name for name in task_of_sample]
            ids = torch.tensor(checks.check_ids("task_of_sample", listed), dtype=torch.int64)
        else:
            raise TypeError(f"task_of_sample: expected a tensor or a sequence, got {type(task_of_sample).__name__}")
        if not len(ids):
            raise ValueError("task_of_sample: expected at least one sample, got none")
        present, rows = ids.unique(return_inverse=True)
        checks.check_range("task_of_sample", present.tolist(), len(self.tasks))
        return present.tolist(), rows

    @contextmanager
    def _capture(self, rows: torch.Tensor, num_tasks: int, batch_dim: int, sink: streaming.Sink) -> Iterator[None]:
        named = {slot.name: parameter for slot, parameter in zip(self.groups.parameters, self._parameters)}
        mine = set(map(id, self._parameters))
        others = [tensor for tensor in (*self._model.parameters(), *self._model.buffers()) if id(tensor) not in mine]
        capture = streaming.Capture(named, others, rows, num_tasks, batch_dim, sink)
        with capture.watch(), capture:
            yield
        if not sink.fired:
            raise RuntimeError("batch: expected a backward of the batch's loss in the context, got none")

    def _stream_sink(self, step: Any, present: list[int], shares: torch.Tensor | None) -> streaming.StreamSink:
        result = self._buffer.result
        if self._arena is None:
            self._arena = streaming.Arena(result.dtype, result.device)
        return streaming.StreamSink(
            self.groups, self._slabs, self._coarse, len(present), step, tuple(present), result, self._arena,
            self._processes, shares, self._order,
        )  # fmt: skip

    def _row(self, name: str) -> torch.Tensor:
        task = self.tasks.index(name)
        if task not in self._rows:
            self._buffer.grads[len(self._rows)].zero_()
            self._rows.append(task)
        return self._buffer.grads[self._rows.index(task)]

    def _put_together(self, processes: Processes) -> None:
        """The rows of all processes, in the order of the tasks."""
        mine = self._rows.copy()
        present, shares = processes.agree(mine, len(self.tasks))
        if not present:
            raise RuntimeError("apply: expected captured gradients, got a call without any in any process")
        for task in present:
            self._row(self.tasks[task])
        if self._rows != present:
            order = [self._rows.index(task) for task in present]
            for columns in self.grads.split(1 << 16, dim=1):  # not all at once: there is no room for a second buffer
                columns.copy_(columns[order])
            self._rows = present
        processes.start(self.grads, shares).wait()
        self._agree_on_use(processes, mine)

    def _agree_on_use(self, processes: Processes, mine: Sequence[int]) -> None:
        """What all processes know of parameters, and of the losses of tasks; this one captured ``mine``."""
        self._used = processes.add(torch.tensor(self._used, dtype=torch.float64)).bool().tolist()
        if getattr(self.method, "needs_losses", False):
            known = {task: self._losses[self.tasks[task]] for task in mine if self.tasks[task] in self._losses}
            losses = processes.average(known, len(self.tasks))
            self._losses = {self.tasks[task]: loss for task, loss in losses.items()}

    def _agree_on_order(self, processes: Processes, completed: Iterable[int]) -> None:
        """Of the groups in the next step: that in which the first process completed them in this one."""
        order = processes.of_the_first(torch.tensor(list(completed))).tolist()
        if order != self._order:
            self._order, self._arena = order, None  # fewer slabs will wait

    def _note_use(self, index: int) -> Callable[[torch.Tensor], None]:
        def note(_: torch.Tensor) -> None:
            self._used[index] = True

        return note

    def _check_parameters(self) -> None:
        known = {id(parameter) for parameter in self._parameters}
        for name, parameter in trainable(self._model):
            if id(parameter) not in known:
                raise ValueError(f"model: expected the trainable parameters of before, got a new one, {name!r}")
        grads = self._buffer.result
        for slot, parameter in zip(self.groups.parameters, self._parameters):
            found = parameter.dtype, parameter.device, tuple(parameter.shape), gradient_stride(parameter)
            if found != (grads.dtype, grads.device, slot.shape, slot.stride):
                raise ValueError(
                    f"model: expected {slot.name!r} as before, {grads.dtype} on {grads.device} of shape "
                    f"{list(slot.shape)}, got {parameter.dtype} on {parameter.device} of shape {list(parameter.shape)}"
                )
