"""Where the samples lie in what an operation gave, by where they lie in what it took: a rule for each kind."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch

from .operations import (
    ALONG,
    FIRST,
    INDEXING,
    PACKING,
    RECURRENT,
    REDUCTIONS,
    RESHAPES,
    VIEWS,
    is_in_place,
    is_pointwise,
    tensors_in,
)
from .places import Contradicts, Loses, Lost, Pattern, Place, Samples, aligned, unified

if TYPE_CHECKING:
    from .samples import Tracker

_ELLIPSIS = "".join(map(chr, range(0x391, 0x3A1)))  # Greek: einsum takes Latin letters only


class Call(NamedTuple):
    """An operation that was called.

    Attributes:
        tracker: knows the places of tensors.
        deciding: those arguments, with their places, that decide where samples are in the results.
    """

    tracker: Tracker
    name: str
    function: Callable[..., Any]
    args: Any
    kwargs: Any
    results: Sequence[torch.Tensor]
    deciding: Sequence[tuple[torch.Tensor, Samples]]

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        if len(self.args) > position:
            return self.args[position]
        return self.kwargs.get(name, self.kwargs.get("axis", default) if name == "dim" else default)

    def check_alone(self, operand: torch.Tensor) -> None:
        """Nothing else decides."""
        if any(tensor is not operand for tensor, _ in self.deciding):
            raise Loses("is followed with samples in its first argument only")


Rule = Callable[[Call], Place | Sequence[Place]]
One = TypeVar("One", bound=Rule)

_RULES: dict[str, Rule] = {}


def place(call: Call) -> Place | Sequence[Place]:
    """Of all results, or of each.

    Raises:
        Loses: the operation does not keep samples apart, or not in a way that is followed.
    """
    return _rule_for(call.name)(call)


@functools.cache
def _rule_for(name: str) -> Rule:
    return _RULES.get(name) or (_pointwise if is_pointwise(name) else _unknown)


def _rule(names: Iterable[str]) -> Callable[[One], One]:
    """The rule of operations of these names."""

    def register(rule: One) -> One:
        _RULES.update(dict.fromkeys(names, rule))
        return rule

    return register


def _unknown(call: Call) -> Place:
    raise Loses("is not known to keep samples apart")


def _pointwise(call: Call) -> Place:
    return aligned(call.deciding, call.results[0].shape)


# ---------------------------------------------------------------------------------------------- shapes and views


@_rule(RESHAPES)
def _reshape(call: Call) -> Place:
    """The same elements in the same order, in another shape."""
    tensor, samples = call.deciding[0]
    before, after = tensor.shape, call.results[0].shape
    key = (id(samples.pattern), samples.dim, before, after)
    return call.tracker.once(key, samples, lambda: [_reshaped(samples, before, after)])[0]


@_rule(["view"])
def _view(call: Call) -> Place:
    """Of another shape, or of another type."""
    return _reshape(call) if call.results[0].dtype == call.deciding[0][0].dtype else _pointwise(call)


def _reshaped(samples: Samples, before: torch.Size, after: torch.Size) -> Place:
    if not after:
        return Lost("it was reshaped to a single element")
    size, inner = samples.size, math.prod(before[samples.dim + 1 :])
    for dim, length in enumerate(after):
        if (length, math.prod(after[dim + 1 :])) == (size, inner):
            return Samples(dim, samples.pattern)
    if 0 in after:
        return _of_nothing(after, samples.pattern)
    if samples.pattern.uniform:
        return Samples(0, Pattern(samples.rows[:1].expand(after[0]), samples.pattern.of))
    # The row of element e is rows[(e // inner) % size]: it stays for `block` elements and repeats after `period`.
    block, period = inner * samples.pattern.run, inner * samples.pattern.period
    for dim, length in enumerate(after):
        step = math.prod(after[dim + 1 :])
        if block % step == 0 and (step * length) % period == 0:
            elements = torch.arange(length) * step
            return Samples(dim, samples.rows[(elements // inner) % size])
    return Lost("a reshape spread the samples over two dimensions, or put them together with another one")


@_rule(VIEWS)
def _viewed(call: Call) -> Sequence[Place]:
    """What the operation does to a shadow."""
    if is_in_place(call.function):
        raise Loses("changes the shape in place")
    tensor, samples = call.deciding[0]
    rest, kwargs = call.args[1:], call.kwargs

    def places() -> list[Place]:
        views = tensors_in((call.function(_shadow(tensor, samples), *rest, **kwargs),))
        return [_of_view(view, samples) for view in views]

    key = (call.function, id(samples.pattern), samples.dim, tensor.shape, repr(rest), repr(kwargs))
    return call.tracker.once(key, samples, places)


def _shadow(tensor: torch.Tensor, samples: Samples, shape: Sequence[int] | None = None) -> torch.Tensor:
    """The row of every element, in the shape of ``tensor`` and the memory of ``samples.rows``."""
    shape = tensor.shape if shape is None else shape
    return samples.rows.view([-1 if d == samples.dim else 1 for d in range(len(shape))]).expand(shape)


def _of_view(shadow: torch.Tensor, samples: Samples) -> Place:
    """A view of a shadow has a stride along the one dimension where the row changes."""
    moving = [d for d in range(shadow.dim()) if shadow.stride(d) and shadow.shape[d] > 1]
    if len(moving) > 1:
        return Lost("a view spread the samples over two dimensions")
    if not shadow.dim():
        return Lost("a view left a single element")
    if not moving and not shadow.numel():
        return _of_nothing(shadow.shape, samples.pattern)
    dim = moving[0] if moving else 0
    line = shadow.as_strided(shadow.shape[dim : dim + 1], shadow.stride()[dim : dim + 1])  # also of an empty view
    rows = samples.rows
    same = len(line) == samples.size and line.data_ptr() == rows.data_ptr() and line.stride() == rows.stride()
    return Samples(dim, samples.pattern if same else line)


def _of_nothing(shape: torch.Size, pattern: Pattern) -> Samples:
    """No samples, as an expert has them that no token was sent to."""
    return Samples(shape.index(0), Pattern(pattern.rows[:0], pattern if pattern.size else pattern.of))


@_rule(["view_as_complex", "view_as_real"])
def _of_pairs(call: Call) -> Place:
    """The last dimension, of size 2, goes or comes."""
    samples = call.deciding[0][1]
    if samples.dim >= call.results[0].dim():
        raise Loses("works across the samples")
    return samples


@_rule(["repeat", "tile", "expand", "expand_as", "broadcast_to"])
def _repeated(call: Call) -> Place:
    (tensor, samples), out = call.deciding[0], call.results[0]
    dim = samples.dim + out.dim() - tensor.dim()
    times = out.shape[dim] // max(1, samples.size)
    return Samples(dim, samples.pattern if times == 1 else samples.rows.repeat(times))


@_rule(["repeat_interleave"])
def _interleaved(call: Call) -> Place:
    tensor, samples = call.deciding[0]
    repeats, dim = call.argument(1, "repeats"), call.argument(2, "dim")
    if dim is None:
        raise Loses("flattens what it repeats")
    if dim % tensor.dim() != samples.dim:
        return samples
    repeats = repeats.cpu() if isinstance(repeats, torch.Tensor) else repeats
    return Samples(samples.dim, samples.rows.repeat_interleave(repeats))


@_rule(["pad"])
def _padded(call: Call) -> Place:
    tensor, samples = call.deciding[0]
    amounts, behind = call.argument(1, "pad", ()), tensor.dim() - 1 - samples.dim
    if any(amounts[2 * behind : 2 * behind + 2]):
        raise Loses("works across the samples")
    return _kept(call, samples.dim)


# ------------------------------------------------------------------------------------------- choosing and writing


@_rule(INDEXING)
def _indexed(call: Call) -> Place:
    tracker, tensor, out = call.tracker, call.args[0], call.results[0]
    samples = tracker.of(tensor)
    if call.name == "getitem":
        return _part(tracker, tensor, samples, call.args[1], out)
    dim = call.argument(1, "dim")
    of_index = tracker.of(call.argument(2, "index", tensor))
    if call.name == "gather" and samples is None and isinstance(of_index, Samples):
        return of_index  # every element is looked up for itself
    if call.name == "index_select" and samples is None and isinstance(of_index, Samples):
        return Samples(dim % tensor.dim(), of_index.pattern)
    if not isinstance(samples, Samples) or not isinstance(dim, int):
        raise Loses("chooses samples in a way that is not followed")
    if dim % tensor.dim() != samples.dim:
        return Samples(samples.dim, samples.rows[: out.shape[samples.dim]])
    if call.name != "index_select":
        raise Loses("works across the samples")
    _check_table(tracker, tensor, samples, call.argument(2, "index"))
    rows = samples.rows[call.argument(2, "index").cpu()]
    return Samples(samples.dim, Pattern(rows, samples.pattern))


def place_of_part(tracker: Tracker, tensor: torch.Tensor, index: Any, part: torch.Tensor) -> Place:
    """Of ``part = tensor[index]``."""
    try:
        return _part(tracker, tensor, tracker.of(tensor), index, part)
    except Loses as loses:
        return Lost(f"an index {loses}")


def _part(tracker: Tracker, tensor: torch.Tensor, samples: Place, index: Any, part: torch.Tensor) -> Place:
    listed = index if isinstance(index, tuple) else (index,)
    if not isinstance(samples, Samples):
        return _looked_up(tracker, listed)
    listed = tuple(torch.as_tensor(one) if _is_sequence(one) else one for one in listed)
    if not any(isinstance(one, torch.Tensor) for one in listed):
        return _of_view(_shadow(tensor, samples)[index], samples)
    if isinstance(index, torch.Tensor) and not _is_mask(index) and samples.dim == 0:
        _check_table(tracker, tensor, samples, index)
    # The last dimensions that no index touches are left out: there is one value for all of them.
    touched = sum(one.dim() if _is_mask(one) else one is not None for one in listed)
    if any(one is Ellipsis for one in listed) or touched <= samples.dim:
        touched = tensor.dim()
    listed = tuple(one.cpu() if isinstance(one, torch.Tensor) else one for one in listed)
    shape = (*tensor.shape[:touched], *[1] * (tensor.dim() - touched))
    return _of_values(_shadow(tensor, samples, shape)[listed], part.shape, samples.pattern)


def _check_table(tracker: Tracker, tensor: torch.Tensor, samples: Samples, index: torch.Tensor) -> None:
    """A constant that is as long as there are samples, and in which each of them looks something up, holds none."""
    its = tracker.of(index)
    if type(its) is not Samples or index.dim() != 1 or tensor.requires_grad:
        return
    if not torch.equal(samples.rows[index.cpu()], its.rows):
        raise Loses("looks up what belongs to other samples, or to none")


def _looked_up(tracker: Tracker, index: tuple[Any, ...]) -> Place:
    """What belongs to no sample, at indices that do: their dimensions stand where the first of them did."""
    if any(isinstance(part, (list, tuple)) for part in index):
        raise Loses("chooses by a list, which is not followed")
    tensors = [part for part in index if isinstance(part, torch.Tensor) and not _is_mask(part)]
    before = index[: next((i for i, part in enumerate(index) if isinstance(part, torch.Tensor)), 0)]
    between = index[len(before) : len(before) + len(tensors)]
    places = [(tensor, its) for tensor in tensors if isinstance(its := tracker.of(tensor), Samples)]
    if len(between) != len(tensors) or any(part is not slice(None) and part != slice(None) for part in before):
        raise Loses("chooses in a way that is not followed")
    if any(not isinstance(part, torch.Tensor) for part in between) or not places:
        raise Loses("chooses in a way that is not followed")
    found = aligned(places, torch.broadcast_shapes(*(tensor.shape for tensor in tensors)))
    return Samples(len(before) + found.dim, found.pattern)


def _is_sequence(part: Any) -> bool:
    """Of a list, a range or of NumPy."""
    return isinstance(part, (list, tuple, range)) or (
        not isinstance(part, torch.Tensor) and getattr(part, "ndim", 0) > 0
    )


def _is_mask(part: Any) -> bool:
    return isinstance(part, torch.Tensor) and part.dtype in (torch.bool, torch.uint8)


def _of_values(shadow: torch.Tensor, shape: torch.Size, of: Pattern) -> Place:
    """The dimension along which a shadow changes, by its values."""
    if not shadow.dim():
        return Lost("a single element was left")
    if not shadow.numel():
        return _of_nothing(shape, of)
    for dim in range(shadow.dim()):
        line = shadow[tuple(slice(None) if d == dim else slice(0, 1) for d in range(shadow.dim()))]
        if bool((shadow == line).all()):
            rows = line.flatten()
            return Samples(dim, Pattern(rows.clone() if len(rows) == shape[dim] else rows.expand(shape[dim]), of))
    return Lost("an index spread the samples over several dimensions")


@_rule(["setitem"])
def _written(call: Call) -> Place:
    """``tensor[index] = value``."""
    tracker, (tensor, index, value) = call.tracker, call.args
    part, its = tensor[index], tracker.of(value) if isinstance(value, torch.Tensor) else None
    if isinstance(its, Samples) and tracker.of(tensor) is None and part._is_view():
        return place_of_base(tracker, tensor, part, aligned([(value, its)], part.shape))
    if its is None and tracker.of(tensor) is None and _is_mask(index) and isinstance(tracker.of(index), Samples):
        return tracker.of(index)  # every element is chosen for itself
    return _put(tracker, tensor, value, part.shape, lambda where: _part(tracker, tensor, where, index, part))


def place_of_base(tracker: Tracker, base: torch.Tensor, view: torch.Tensor, samples: Samples) -> Place:
    """Where samples that were written to a view of it lie in ``base``, in which there were none: all, or lost."""
    if tracker.outside.uniform and base.dim():
        return Samples(0, tracker.rows[:1].expand(base.shape[0]))
    size, stride = view.shape[samples.dim], view.stride(samples.dim)
    dims = [d for d in range(base.dim()) if (base.shape[d], base.stride(d)) == (size, stride)]
    if not size or len(dims) != 1 or samples.pattern.uniform or not base.is_contiguous():
        return Lost("samples were written into a part of it")
    if view.numel():
        sizes = [pair for d, pair in enumerate(zip(view.shape, view.stride())) if pair[0] > 1 and d != samples.dim]
        within = sum((n - 1) * step for n, step in sizes if step < stride)
        across = any(step >= stride and step % (size * stride) for _, step in sizes)
        begin = int(view.storage_offset()) - int(base.storage_offset())
        if across or begin % (size * stride) + within >= stride:
            return Lost("samples were written across others")
    return Samples(dims[0], samples.pattern)


@_rule(["index_add", "index_copy"])
def _added(call: Call) -> Place:
    """``tensor.index_add(dim, index, source)``, such as what an expert made of its tokens."""
    tensor, dim = call.args[0], call.argument(1, "dim", 0)
    index, source = call.argument(2, "index"), call.argument(3, "source")

    def part_of(where: Samples) -> Place:
        return Samples(where.dim, where.rows[index.cpu()]) if dim % tensor.dim() == where.dim else where

    return _put(call.tracker, tensor, source, source.shape, part_of)


def _put(
    tracker: Tracker, tensor: torch.Tensor, value: Any, shape: torch.Size, part_of: Callable[[Samples], Place]
) -> Place:
    """Where the samples lie in a tensor after a part of it was written."""
    where, its = tracker.of(tensor), tracker.of(value) if isinstance(value, torch.Tensor) else None
    written = aligned([(value, its)], shape) if isinstance(its, Samples) else None
    if where is None and written is not None:
        where = _taken_from(written, tensor.shape)  # what is not written yet is of no sample, so of any
    if not isinstance(where, Samples):
        raise Loses("writes samples among what is not one")
    # A constant among what has a gradient is no matter.
    if its is not None and (value.requires_grad or not tensor.requires_grad):
        part = part_of(where)
        if written is None or not isinstance(part, Samples) or not part.same(written):
            raise Loses("writes samples over others")
    return where


def _taken_from(part: Samples, shape: torch.Size) -> Samples | None:
    """Where they lie in a tensor of this shape, if an index took them from one with as many there."""
    of = part.pattern.of
    return Samples(part.dim, of) if of and part.dim < len(shape) and shape[part.dim] == of.size else None


@_rule(["scatter", "scatter_add", "scatter_reduce"])
def _scattered(call: Call) -> Place:
    out, where = call.results[0], unified(samples for _, samples in call.deciding)
    if call.argument(1, "dim") % out.dim() == where.dim:
        raise Loses("works across the samples")
    return _in(where, where.dim, out, out)


# --------------------------------------------------------------------------------------- within and across samples


@_rule(REDUCTIONS)
def _reduced(call: Call) -> Place:
    if call.name in ("max", "min") and len(list(tensors_in(call.args))) > 1:
        return _pointwise(call)
    (tensor, samples), out, position = call.deciding[0], call.results[0], REDUCTIONS[call.name]
    dim = call.argument(position, "dim")
    if isinstance(dim, int) and not isinstance(dim, bool):
        more = [d for d in call.args[position + 1 :] if isinstance(d, int) and not isinstance(d, bool)]
        dims = {d % tensor.dim() for d in (dim, *more)} if tensor.dim() else set()
    else:
        dims = {d % tensor.dim() for d in dim} if isinstance(dim, (tuple, list)) else set(range(tensor.dim()))
    if samples.dim in dims or not dims:
        raise Loses("works across the samples")
    kept = out.dim() == tensor.dim()
    return Samples(samples.dim - (0 if kept else sum(d < samples.dim for d in dims)), samples.pattern)


@_rule(ALONG)
def _along(call: Call) -> Place:
    tensor, samples = call.deciding[0]
    if call.name in ("sort", "argsort", "topk") and tensor.dim() == 1:
        return Samples(0, samples.rows[call.results[-1].cpu()])  # the last result says what came from where
    dim = call.argument(ALONG[call.name], "dim", -1)
    if dim is None or not isinstance(dim, int) or dim % tensor.dim() == samples.dim:
        raise Loses("works across the samples")
    return _pointwise(call)


@_rule(["flip", "roll"])
def _moved(call: Call) -> Place:
    tensor, samples = call.deciding[0]
    listed = call.args[1:] if call.name == "flip" else call.args[2:]
    dims = call.kwargs.get("dims", listed[0] if len(listed) == 1 else listed)
    dims = [dims] if isinstance(dims, int) else list(dims)
    if not dims or samples.dim in [dim % tensor.dim() for dim in dims]:
        raise Loses("works across the samples")
    return samples


@_rule(["layer_norm", "rms_norm"])
def _normalised(call: Call) -> Place:
    tensor, samples = call.deciding[0]
    if samples.dim >= tensor.dim() - len(call.argument(1, "normalized_shape", ())):
        raise Loses("works across the samples")
    return samples


@_rule(FIRST)
def _samples_first(call: Call) -> Place:
    call.check_alone(call.args[0])
    if call.name.startswith("conv") and call.args[0].dim() != call.args[1].dim():
        raise Loses("is followed with a batch only")
    return _kept(call, 0)


@_rule(["bucketize", "isin", "searchsorted"])
def _compared(call: Call) -> Place:
    call.check_alone(call.args[int(call.name == "searchsorted")])
    return _pointwise(call)


@_rule(["embedding", "one_hot", "prelu"])
def _each_for_itself(call: Call) -> Place:
    call.check_alone(call.args[int(call.function is torch.embedding)])
    return call.deciding[0][1]


def _kept(call: Call, dim: int) -> Samples:
    tensor, samples = call.deciding[0]
    return _in(samples, dim, tensor, call.results[0])


def _in(samples: Samples, dim: int, tensor: torch.Tensor, out: torch.Tensor) -> Samples:
    """``samples``, if they lie in ``dim`` of ``tensor`` and of ``out``."""
    if samples.dim != dim or out.dim() <= dim or out.shape[dim] != samples.size:
        raise Loses(f"expects the samples in dimension {dim} of {list(tensor.shape)}")
    return samples


# -------------------------------------------------------------------------------------------------------- products


@_rule(["linear"])
def _linear(call: Call) -> Place:
    tensor, samples = call.deciding[0]
    call.check_alone(call.args[0])
    if samples.dim == tensor.dim() - 1:
        raise Loses("works across the samples")
    return samples


@_rule(["matmul", "bmm", "mm", "mv"])
def _matmul(call: Call) -> Place:
    return _product(call, call.args[0], call.args[1] if len(call.args) > 1 else next(iter(tensors_in(call.kwargs))))


@_rule(["addmm", "baddbmm", "addmv"])
def _addmm(call: Call) -> Place:
    _, left, right = tensors_in((*call.args[:3], call.kwargs))
    return _product(call, left, right)


def _product(call: Call, a: torch.Tensor, b: torch.Tensor) -> Samples:
    out, columns, places = call.results[0], int(b.dim() > 1), []
    batch = out.dim() - columns - (a.dim() > 1)  # dimensions of out that stand before its rows and columns
    for tensor, samples in call.deciding:
        from_last = tensor.dim() - 1 - samples.dim
        if tensor is not a and tensor is not b:
            places.append(aligned([(tensor, samples)], out.shape))
        elif (tensor is a and from_last == 0) or (tensor is b and from_last == columns):
            raise Loses("works across the samples")
        elif tensor is a:
            places.append(Samples(out.dim() - columns - from_last, samples.pattern))
        else:
            places.append(Samples(out.dim() - 1 if from_last == 0 else batch + 1 - from_last, samples.pattern))
    return unified(places)


@_rule(["_grouped_mm"])
def _grouped(call: Call) -> Place:
    if call.args[0].dim() != 2 or call.args[1].dim() != 3:
        return _unknown(call)
    return _samples_first(call)


@_rule(["bilinear"])
def _bilinear(call: Call) -> Place:
    out = call.results[0]
    return unified(_in(s, s.dim, tensor, out) for tensor, s in call.deciding if s.dim < out.dim() - 1)


@_rule(["scaled_dot_product_attention"])
def _attention(call: Call) -> Place:
    if any(samples.dim >= tensor.dim() - 2 for tensor, samples in call.deciding):
        raise Loses("works across the samples")
    return _pointwise(call)


@_rule(["einsum"])
def _einsum(call: Call) -> Place:
    equation, *operands = call.args
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    if not isinstance(equation, str):
        raise Loses("is followed with letters only")
    inputs, output = _letters(equation.replace(" ", ""), [operand.dim() for operand in operands])
    places = []
    for letters, operand in zip(inputs, operands):
        samples = next((samples for tensor, samples in call.deciding if tensor is operand), None)
        if samples is not None:
            if letters[samples.dim] not in output:
                raise Loses("works across the samples")
            places.append(Samples(output.index(letters[samples.dim]), samples.pattern))
    return unified(places)


def _letters(equation: str, dims: Sequence[int]) -> tuple[list[str], str]:
    """Of each operand and of the result, where "..." are Greek, as many as it stands for, counted from the last."""
    inputs, arrow, output = equation.partition("->")
    terms = inputs.split(",")
    more = [dim - len(term.replace("...", "")) for term, dim in zip(terms, dims)]
    named = [term.replace("...", _ELLIPSIS[len(_ELLIPSIS) - n :]) for term, n in zip(terms, more)]
    most = max((n for term, n in zip(terms, more) if "..." in term), default=0)
    if not arrow:
        once = sorted(letter for letter in set("".join(terms)) - {"."} if "".join(terms).count(letter) == 1)
        output = "..." + "".join(once)
    return named, output.replace("...", _ELLIPSIS[len(_ELLIPSIS) - most :])


# ------------------------------------------------------------------------------------------------ joining, sequences


@_rule(["cat"])
def _joined(call: Call) -> Place:
    given = call.argument(0, "tensors", ())
    parts = [part for part in given if part.numel()] or given
    dim = call.argument(1, "dim", 0) % call.results[0].dim()
    places = [call.tracker.of(part) for part in parts]
    if all(isinstance(where, Samples) and where.dim == dim for where in places):
        return Samples(dim, torch.cat([where.rows for where in places]))  # type: ignore[union-attr]
    deciding = [pair for pair in call.deciding if pair[0].numel()] or call.deciding
    if any(samples.dim == dim for _, samples in deciding):
        raise Loses("puts samples beside what is not one")
    return unified(samples for _, samples in deciding)


@_rule(["stack"])
def _stacked(call: Call) -> Place:
    dim = call.argument(1, "dim", 0) % call.results[0].dim()
    parts = [call.tracker.of(part) for part in call.argument(0, "tensors", ())]
    if all(isinstance(part, Samples) and part.size and part.pattern.uniform for part in parts):
        return Samples(dim, torch.cat([part.rows[:1] for part in parts]))  # type: ignore[union-attr]
    if len(call.deciding) < len(parts) and any(samples.pattern.uniform for _, samples in call.deciding):
        raise Loses("puts samples beside what is not one")
    return unified(Samples(samples.dim + (samples.dim >= dim), samples.pattern) for _, samples in call.deciding)


@_rule(RECURRENT)
def _recurrent(call: Call) -> Sequence[Place]:
    """A sequence ``[L, B, D]``, ``[B, L, D]`` or packed, and states ``[., B, D]``; or one step and ``[B, D]``."""
    tracker, args = call.tracker, call.args
    x, second = args[:2]
    one_step, packed = call.name.endswith("_cell"), isinstance(second, torch.Tensor) and not second.is_floating_point()
    if call.kwargs or (x.dim() != 2 if one_step or packed else x.dim() != 3):
        raise Loses("is followed with a batch, and by position, only")
    in_x, in_state = 0 if one_step or packed or args[-1] else 1, 0 if one_step else 1  # args[-1]: batch_first
    samples, state = tracker.of(x), None
    if isinstance(samples, Samples):
        _in(samples, in_x, x, x)
        state = Samples(in_state, _of_first_step(samples, second) if packed else samples.pattern)
    for tensor in tensors_in((args[2] if packed else second,)):
        its = tracker.of(tensor)
        if isinstance(its, Samples):  # what is lost is constant, or it would not have come here
            state = state or its
            if not state.same(_in(its, in_state, tensor, tensor)):
                raise Contradicts
    if state is None or (packed and not isinstance(samples, Samples)):
        raise Loses("has no samples that are followed")
    out = samples if isinstance(samples, Samples) else Samples(in_x, state.pattern)
    return [out, *[state] * (len(call.results) - 1)]


def _of_first_step(samples: Samples, counts: torch.Tensor) -> Pattern:
    """Of packed sequences: ``counts`` says how many there are in each step, the first of those of the step before."""
    rows = samples.rows[: int(counts[0])]
    if not torch.equal(samples.rows, torch.cat([rows[:count] for count in counts.tolist()])):
        raise Loses("expects packed sequences")
    return Pattern(rows)


@_rule(PACKING)
def _packed(call: Call) -> Sequence[Place]:
    """Sequences of falling lengths: of each step, those that are so long; and back."""
    (tensor, samples), args = call.deciding[0], call.args
    if tensor is not args[0]:
        raise Loses("is followed with samples in its first argument only")
    dim = 0 if args[2] else 1  # batch_first
    if call.name == "_pack_padded_sequence":
        rows = _in(samples, dim, tensor, tensor).rows
        return [Samples(0, torch.cat([rows[:count] for count in call.results[1].tolist()])), None]
    pattern = _of_first_step(_in(samples, 0, tensor, tensor), args[1])
    return [Samples(dim, pattern), Samples(0, pattern)]
