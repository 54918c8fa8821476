"""Where the samples of a batch lie in a tensor, followed from operation to operation.

A tensor of activations holds its samples along one dimension: the first of ``[B, L, D]``, the second of ``[L, B, D]``,
the only one of ``[B * L]`` tokens. Parameter gradients can be kept apart by task only where that dimension is known, so
it is followed, not guessed: an operation whose effect on it is not known, or that mixes samples, loses it, and it is an
error to use a parameter after that. Only what comes from outside, such as the model's inputs, is placed by its size,
where the caller says that samples lie.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from .operations import (
    ALONG,
    COLLATING,
    FIRST,
    INDEXING,
    PACKING,
    RECURRENT,
    REDUCTIONS,
    RESHAPES,
    VIEWS,
    WITHIN,
    WRITING,
    is_in_place,
    is_pointwise,
    tensors_in,
)


class Pattern:
    """The tasks along a dimension of samples, and what can be said of their order.

    Args:
        rows: the task of each index.
        of: what an index took them from.
    """

    def __init__(self, rows: torch.Tensor, of: Pattern | None = None) -> None:
        self.rows = rows
        self.size = int(rows.shape[0])
        self.of = of

    @functools.cached_property
    def uniform(self) -> bool:
        """All of one task."""
        return bool((self.rows == self.rows[:1]).all())

    @functools.cached_property
    def run(self) -> int:
        """The largest number such that every ``run`` consecutive indices, from 0 on, are of one task."""
        changes = (self.rows[1:] != self.rows[:-1]).nonzero().flatten() + 1
        return math.gcd(self.size, *changes.tolist())

    @functools.cached_property
    def period(self) -> int:
        """The smallest divisor of the size after which the tasks repeat."""
        n = self.size
        divisors = sorted({d for i in range(1, math.isqrt(n) + 1) if n % i == 0 for d in (i, n // i)})
        return next((d for d in divisors if torch.equal(self.rows[d:], self.rows[: n - d])), n)


class Samples:
    """The samples lie along dimension ``dim``; ``rows[i]`` is the task (a row of the slab) of what index i holds."""

    def __init__(self, dim: int, pattern: Pattern | torch.Tensor) -> None:
        self.dim = dim
        self.pattern = pattern if isinstance(pattern, Pattern) else Pattern(pattern)

    @property
    def rows(self) -> torch.Tensor:
        """``[size of dim]`` int64, on the CPU."""
        return self.pattern.rows

    @property
    def size(self) -> int:
        """Of ``dim``."""
        return self.pattern.size

    def same(self, other: Samples) -> bool:
        if self.dim == other.dim and self.pattern is other.pattern:
            return True
        if self.dim == other.dim and self.size == other.size:
            return torch.equal(self.rows, other.rows)
        if not self.size or not other.size:
            return False
        return self.pattern.uniform and other.pattern.uniform and bool(self.rows[0] == other.rows[0])


class Guessed(Samples):
    """Of a constant that the model made in a way that is not followed: not enough to meet a parameter alone."""

    def __init__(self, dim: int, pattern: Pattern, reason: str) -> None:
        super().__init__(dim, pattern)
        self.reason = reason


class Lost:
    """The tensor depends on samples, but which part of it on which is not known; ``reason`` says since when."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


Place = Samples | Lost | None  # None: the tensor does not depend on samples

_ELLIPSIS = "".join(map(chr, range(0x391, 0x3A1)))  # Greek: einsum takes Latin letters only
_NOTE = "gradvac_kernels.place"


class Tracker:
    """Knows the place of every tensor that was seen since it was made.

    Args:
        rows: ``[B]`` int64 on the CPU, the row of the slab of each sample.
        batch_dim: where the samples lie in tensors that come from outside.
        own: the model's parameters and buffers, which do not depend on samples.
    """

    def __init__(self, rows: torch.Tensor, batch_dim: int, own: Sequence[torch.Tensor]) -> None:
        self.rows = rows
        self.batch_dim = batch_dim
        self._own = {id(tensor) for tensor in own}
        self._outside = Pattern(rows)
        self._noted: list[weakref.ref[torch.Tensor]] = []
        self._seen: dict[tuple[Any, ...], tuple[Samples, list[Place]]] = {}

    def of(self, tensor: torch.Tensor) -> Place:
        """Where the samples lie in ``tensor``."""
        noted = getattr(tensor, "_gradvac_place", None)
        if noted is not None and noted[0] is self:
            base = tensor._base if noted[1] is None or isinstance(noted[1], Guessed) else None
            written = base is not None and tensor.requires_grad and self.has_noted(base) and self.of(base) is not None
            return Lost("its memory was written to by other views of it") if written else noted[1]
        if id(tensor) in self._own:
            return None
        if isinstance(tensor, torch.nn.Parameter):
            return None  # of another model
        if tensor.grad_fn is not None:
            metadata: Any = tensor.grad_fn.metadata
            made = metadata.get(_NOTE)  # a tensor that autograd saved comes back as another one
            if made is not None and made[0] is self and made[1:3] == (tensor.output_nr, tensor.shape):
                return made[3]
            reason = f"an operation that cannot be followed made it ({tensor.grad_fn.name()})"
            return self._by_size(tensor, alone=True) or Lost(reason)
        return self._by_size(tensor)

    def note(self, tensor: torch.Tensor, place: Place) -> None:
        """Remember where the samples lie in ``tensor``."""
        if not self.has_noted(tensor):
            self._noted.append(weakref.ref(tensor))
        tensor._gradvac_place = (self, place)  # type: ignore[attr-defined]
        if tensor.grad_fn is not None:
            metadata: Any = tensor.grad_fn.metadata
            metadata[_NOTE] = (self, tensor.output_nr, tensor.shape, place)

    def forget(self) -> None:
        """Leave nothing on the tensors, which may live on."""
        for reference in self._noted:
            tensor = reference()
            if tensor is not None and self.has_noted(tensor):
                del tensor._gradvac_place  # type: ignore[attr-defined]
        self._noted.clear()
        self._seen.clear()

    def has_noted(self, tensor: torch.Tensor) -> bool:
        """The place of ``tensor`` is not a guess from outside."""
        noted = getattr(tensor, "_gradvac_place", None)
        return noted is not None and noted[0] is self

    def follow(
        self,
        name: str,
        function: Callable[..., Any],
        args: Any,
        kwargs: Any,
        out: Any,
        known: Sequence[tuple[torch.Tensor, Place]],
    ) -> None:
        """Note the places of what ``function(*args, **kwargs)`` gave.

        Args:
            known: the tensors among the arguments, with their places from before the call.
        """
        if isinstance(out, torch.Tensor):
            results = [out]
        else:
            results = [args[0]] if name == "setitem" else list(tensors_in((out,)))
        places = self._places(name, function, args, kwargs, out, results, known)
        if is_in_place(function) and known and results and known[0][0] is results[0]:
            self._check_in_place(name, results[0], known[0][1], places[0])
        for result, place in zip(results, places):
            self.note(result, place)

    def _check_in_place(self, name: str, tensor: torch.Tensor, before: Place, after: Place) -> None:
        """Views of what is written to, and what it is a view of, are not to be placed wrongly from now on."""
        kept = isinstance(before, Samples) and isinstance(after, Samples) and before.same(after)
        if kept or not tensor.requires_grad:
            return
        if before is not None:
            raise ValueError(
                f"batch: expected {name} to leave samples where they are, got it in place; write it out of place"
            )
        base = tensor._base
        if after is not None and base is not None:
            in_none = isinstance(after, Samples) and self.of(base) is None
            lost = Lost(f"{name} wrote samples into a part of it")
            self.note(base, self._of_base(base, tensor, after) if in_none else lost)  # type: ignore[arg-type]

    def _places(self, name, function, args, kwargs, out, results, known) -> Sequence[Place]:  # type: ignore[no-untyped-def]
        if name in COLLATING and not any(self.has_noted(tensor) for tensor, place in known if place is not None):
            return self._collated(name, function, args, kwargs, out, results, known)
        dependent = [pair for pair in known if pair[1] is not None]
        # A number that is constant, such as the mean of a sample, has no place for the others to agree with.
        dependent = [pair for pair in dependent if pair[0].dim() or pair[0].requires_grad] or dependent
        if name in WRITING:  # where the index comes from is no matter
            to_and_from = (args[0], kwargs.get("source", args[-1]))
            dependent = [pair for pair in dependent if any(pair[0] is one for one in to_and_from)] or dependent
        if not results or not dependent or name.startswith("new_") or name.endswith("_like"):
            return [None] * len(results)
        # What is constant has no gradient to mix: where something else is not, that alone decides.
        deciding = [pair for pair in dependent if pair[0].requires_grad] or dependent
        if not self._outside.uniform and all(isinstance(p, Samples) and p.pattern.uniform for _, p in deciding):
            # A few samples may have been put beside others, which are not all of their task.
            deciding = deciding + [
                (tensor, place)
                for tensor, place in dependent
                if type(place) is Samples and all(tensor is not other for other, _ in deciding)
            ]
        if name in INDEXING and isinstance(known[0][1], Samples):
            deciding = known[:1]
        lost = next((place for _, place in deciding if isinstance(place, Lost)), None)
        try:
            if lost is None:
                self._check_broadcast(name, dependent, deciding, results[0])
            place = lost or self._followed(name, function, args, kwargs, out, results, deciding)
        except Loses as loses:
            place = Lost(f"{name} {loses}")
        places = list(place) if isinstance(place, (list, tuple)) else [place] * len(results)
        alone = len(deciding) == len(dependent)
        return [self._settled(name, result, where, deciding, alone) for result, where in zip(results, places)]

    def _followed(self, name, function, args, kwargs, out, results, deciding) -> Any:  # type: ignore[no-untyped-def]
        try:
            place = self._rule(name, function, args, kwargs, out, results, deciding)
        except Loses as loses:
            place = Lost(f"{name} {loses}")
        except (TypeError, IndexError, AttributeError, KeyError, ValueError, RuntimeError):
            place = Lost(f"{name} is called in a way that is not followed")
        if not isinstance(place, Lost):
            return place
        # Of one task, whatever became of it: but not with anything beside it that may be of another.
        pattern = deciding[0][1].pattern
        alone = name in WITHIN and pattern.uniform and len(list(tensors_in((*args, kwargs)))) == 1
        return Samples(0, pattern.rows[:1]) if self._outside.uniform or alone else place

    def _settled(
        self,
        name: str,
        result: torch.Tensor,
        place: Place,
        deciding: Sequence[tuple[torch.Tensor, Place]],
        alone: bool,
    ) -> Place:
        """``alone``: nothing but what decides depends on samples."""
        if isinstance(place, Samples) and place.dim >= result.dim():
            place = Lost(f"{name} left a single element")
        if isinstance(place, Samples) and place.size != result.shape[place.dim]:
            one = place.size == 1 and alone  # it was broadcast
            size = result.shape[place.dim]
            place = (
                Samples(place.dim, place.rows.expand(size)) if one else Lost(f"{name} changes the number of samples")
            )
        if isinstance(place, Samples):
            guess = deciding[0][1]  # the others are guessed too, or it was not alone
            guessed = isinstance(guess, Guessed) and all(isinstance(where, Guessed) for _, where in deciding)
            return Guessed(place.dim, place.pattern, guess.reason) if guessed else place  # type: ignore[union-attr]
        # A constant that no rule places is as one that comes from outside.
        guess = self._by_size(result, alone=True) if isinstance(place, Lost) and not result.requires_grad else None
        return Guessed(guess.dim, guess.pattern, place.reason) if guess and isinstance(place, Lost) else place

    def _check_broadcast(self, name, dependent, deciding, out) -> None:  # type: ignore[no-untyped-def]
        """A constant of more dimensions than what has a gradient knows better where the samples are."""
        if len(dependent) == len(deciding) or not is_pointwise(name):
            return
        most = max(tensor.dim() for tensor, _ in deciding)
        larger = [pair for pair in dependent if pair[0].dim() > most and isinstance(pair[1], Samples)]
        if larger:
            aligned([*deciding, *larger], out.shape)

    def _collated(self, name, function, args, kwargs, out, results, known) -> Sequence[Place]:  # type: ignore[no-untyped-def]
        """What comes from outside: batches, or single samples that are as long as there are samples."""
        dependent = [pair for pair in known if pair[1] is not None]
        if not dependent:
            return [None]
        try:
            parts = self._rule(name, function, args, kwargs, out, results, dependent)
        except Loses as loses:
            return [Lost(f"{name} {loses}")]
        whole = self._by_size(results[0])
        if whole is not None and not whole.same(parts):
            return [Lost(f"{name} may have joined samples or batches, by their sizes; do it outside")]
        return [parts]

    def _by_size(self, tensor: torch.Tensor, alone: bool = False) -> Samples | None:
        """As the caller says of what comes from outside; ``alone``: if no other dimension could be meant."""
        if tensor.dim() <= self.batch_dim or tensor.shape[self.batch_dim] != self._outside.size:
            return None
        if alone and sum(size == self._outside.size for size in tensor.shape) > 1:
            return None
        return Samples(self.batch_dim, self._outside)

    # ------------------------------------------------------------------------------------------------------- rules

    def _rule(self, name, function, args, kwargs, out, results, deciding) -> Any:  # type: ignore[no-untyped-def]
        first = results[0]
        if name in RESHAPES or (name == "view" and first.dtype == deciding[0][0].dtype):
            ((tensor, samples),) = deciding[:1]
            return self.reshaped(samples, tensor.shape, first.shape)
        if name in VIEWS:
            return self._viewed(function, args, kwargs, *deciding[0])
        if name in INDEXING:
            return self._indexed(name, args, kwargs, first)
        if name in REDUCTIONS and not (name in ("max", "min") and len(list(tensors_in(args))) > 1):
            return _reduced(args, kwargs, deciding, first, REDUCTIONS[name])
        if is_pointwise(name):
            return aligned(deciding, first.shape)
        if name in ("flip", "roll"):
            tensor, samples = deciding[0]
            listed = args[1:] if name == "flip" else args[2:]
            moved = kwargs.get("dims", listed[0] if len(listed) == 1 else listed)
            moved = [moved] if isinstance(moved, int) else list(moved)
            if not moved or samples.dim in [dim % tensor.dim() for dim in moved]:
                raise Loses("works across the samples")
            return samples
        if name in ("sort", "argsort", "topk") and deciding[0][0].dim() == 1:
            return Samples(0, deciding[0][1].rows[results[-1].cpu()])  # the last result says what came from where
        if name in ALONG:
            tensor, samples = deciding[0]
            dim = _argument(args, kwargs, ALONG[name], "dim", -1)
            if dim is None or not isinstance(dim, int) or dim % tensor.dim() == samples.dim:
                raise Loses("works across the samples")
            return aligned(deciding, first.shape)
        if name in ("bucketize", "isin", "searchsorted"):
            _only(deciding, args[int(name == "searchsorted")])
            return aligned(deciding, first.shape)
        if name in ("scatter", "scatter_add", "scatter_reduce"):
            dim, place = _argument(args, kwargs, 1, "dim", None), unified(samples for _, samples in deciding)
            if dim % first.dim() == place.dim:
                raise Loses("works across the samples")
            return _kept([(first, place)], first, place.dim)
        if name in ("layer_norm", "rms_norm"):
            tensor, samples = deciding[0]
            if samples.dim >= tensor.dim() - len(_argument(args, kwargs, 1, "normalized_shape", ())):
                raise Loses("works across the samples")
            return samples
        if name in FIRST:
            _only(deciding, args[0])
            return _kept(deciding, first, 0)
        if name in ("matmul", "bmm", "mm", "mv"):
            other = args[1] if len(args) > 1 else next(iter(tensors_in(kwargs)))
            return _product(args[0], other, first, deciding)
        if name in ("addmm", "baddbmm", "addmv"):
            _, left, right = tensors_in((*args[:3], kwargs))
            return _product(left, right, first, deciding)
        if name == "linear":
            tensor, samples = deciding[0]
            _only(deciding, args[0])
            if samples.dim == tensor.dim() - 1:
                raise Loses("works across the samples")
            return samples
        if name == "scaled_dot_product_attention":
            if any(samples.dim >= tensor.dim() - 2 for tensor, samples in deciding):
                raise Loses("works across the samples")
            return aligned(deciding, first.shape)
        if name == "einsum":
            return _einsum(args, deciding)
        if name in ("embedding", "one_hot", "prelu"):
            _only(deciding, args[int(function is torch.embedding)])
            return deciding[0][1]
        if name == "bilinear":
            return unified(_kept([pair], first, pair[1].dim) for pair in deciding if pair[1].dim < first.dim() - 1)
        if name == "pad":
            tensor, samples = deciding[0]
            amounts, behind = _argument(args, kwargs, 1, "pad", ()), tensor.dim() - 1 - samples.dim
            if any(amounts[2 * behind : 2 * behind + 2]):
                raise Loses("works across the samples")
            return _kept(deciding, first, samples.dim)
        if name == "cat":
            return self._joined(args, kwargs, first, deciding)
        if name == "stack":
            dim = _argument(args, kwargs, 1, "dim", 0) % first.dim()
            parts = [self.of(part) for part in _argument(args, kwargs, 0, "tensors", ())]
            if all(isinstance(part, Samples) and part.size and part.pattern.uniform for part in parts):
                return Samples(dim, torch.cat([part.rows[:1] for part in parts]))  # type: ignore[union-attr]
            if len(deciding) < len(parts) and any(samples.pattern.uniform for _, samples in deciding):
                raise Loses("puts samples beside what is not one")
            return unified(Samples(samples.dim + (samples.dim >= dim), samples.pattern) for _, samples in deciding)
        if name in ("repeat", "tile", "expand", "expand_as", "broadcast_to"):
            tensor, samples = deciding[0]
            dim = samples.dim + first.dim() - tensor.dim()
            times = first.shape[dim] // max(1, samples.size)
            return Samples(dim, samples.pattern if times == 1 else samples.rows.repeat(times))
        if name == "repeat_interleave":
            return _interleaved(args, kwargs, deciding, first)
        if name == "setitem":
            return self._written(args)
        if name in RECURRENT:
            return self._recurrent(name, args, kwargs, results)
        if name in PACKING:
            return _packed(name, args, results, *deciding[0])
        if name in ("index_add", "index_copy"):
            return self._added(args, kwargs)
        if name == "_grouped_mm" and args[0].dim() == 2 and args[1].dim() == 3:
            _only(deciding, args[0])
            return _kept(deciding, first, 0)
        raise Loses("is not known to keep samples apart")

    def reshaped(self, samples: Samples, before: torch.Size, after: torch.Size) -> Place:
        """The same elements in the same order, in another shape."""
        key = (id(samples.pattern), samples.dim, before, after)
        if key not in self._seen:
            self._seen[key] = (samples, [_reshaped(samples, before, after)])
        return self._seen[key][1][0]

    def _viewed(
        self, function: Callable[..., Any], args: Any, kwargs: Any, tensor: torch.Tensor, samples: Samples
    ) -> Sequence[Place]:
        """What the operation does to a shadow: layers do the same again and again."""
        if is_in_place(function):
            raise Loses("changes the shape in place")
        key = (function, id(samples.pattern), samples.dim, tensor.shape, repr(args[1:]), repr(kwargs))
        if key not in self._seen:
            views = tensors_in((function(_shadow(tensor, samples), *args[1:], **kwargs),))
            self._seen[key] = (samples, [_of_view(view, samples) for view in views])  # keeps the pattern of the key
        return self._seen[key][1]

    def _indexed(self, name: str, args: Any, kwargs: Any, out: torch.Tensor) -> Place:
        tensor, samples = args[0], self.of(args[0])
        if name == "getitem":
            return self._part(tensor, samples, args[1], out)
        dim = _argument(args, kwargs, 1, "dim", None)
        of_index = self.of(_argument(args, kwargs, 2, "index", tensor))
        if name == "gather" and samples is None and isinstance(of_index, Samples):
            return of_index  # every element is looked up for itself
        if not isinstance(samples, Samples) or not isinstance(dim, int):
            raise Loses("chooses samples in a way that is not followed")
        if dim % tensor.dim() != samples.dim:
            return Samples(samples.dim, samples.rows[: out.shape[samples.dim]])
        if name != "index_select":
            raise Loses("works across the samples")
        rows = samples.rows[_argument(args, kwargs, 2, "index", None).cpu()]
        return Samples(samples.dim, Pattern(rows, samples.pattern))

    def place_of_part(self, tensor: torch.Tensor, index: Any, part: torch.Tensor) -> Place:
        """Of ``part = tensor[index]``."""
        try:
            return self._part(tensor, self.of(tensor), index, part)
        except Loses as loses:
            return Lost(f"an index {loses}")

    def _part(self, tensor: torch.Tensor, samples: Place, index: Any, part: torch.Tensor) -> Place:
        listed = index if isinstance(index, tuple) else (index,)
        if not isinstance(samples, Samples):
            return self._looked_up(listed)
        if not any(isinstance(one, (torch.Tensor, list)) for one in listed):
            return _of_view(_shadow(tensor, samples)[index], samples)
        # The last dimensions that no index touches are left out: there is one value for all of them.
        touched = sum(one.dim() if _is_mask(one) else one is not None for one in listed)
        if any(one is Ellipsis for one in listed) or touched <= samples.dim:
            touched = tensor.dim()
        listed = tuple(one.cpu() if isinstance(one, torch.Tensor) else one for one in listed)
        shape = (*tensor.shape[:touched], *[1] * (tensor.dim() - touched))
        return _of_values(_shadow(tensor, samples, shape)[listed], part.shape, samples.pattern)

    def _looked_up(self, index: tuple[Any, ...]) -> Place:
        """What belongs to no sample, at indices that do: their dimensions stand where the first of them did."""
        if any(isinstance(part, (list, tuple)) for part in index):
            raise Loses("chooses by a list, which is not followed")
        tensors = [part for part in index if isinstance(part, torch.Tensor) and not _is_mask(part)]
        before = index[: next((i for i, part in enumerate(index) if isinstance(part, torch.Tensor)), 0)]
        between = index[len(before) : len(before) + len(tensors)]
        places = [(tensor, place) for tensor in tensors if isinstance(place := self.of(tensor), Samples)]
        if len(between) != len(tensors) or any(part is not slice(None) and part != slice(None) for part in before):
            raise Loses("chooses in a way that is not followed")
        if any(not isinstance(part, torch.Tensor) for part in between) or not places:
            raise Loses("chooses in a way that is not followed")
        found = aligned(places, torch.broadcast_shapes(*(tensor.shape for tensor in tensors)))
        return Samples(len(before) + found.dim, found.pattern)

    def _joined(self, args: Any, kwargs: Any, out: torch.Tensor, deciding: Any) -> Place:
        given = _argument(args, kwargs, 0, "tensors", ())
        parts = [part for part in given if part.numel()] or given
        dim = _argument(args, kwargs, 1, "dim", 0) % out.dim()
        places = [self.of(part) for part in parts]
        if all(isinstance(place, Samples) and place.dim == dim for place in places):
            return Samples(dim, torch.cat([place.rows for place in places]))  # type: ignore[union-attr]
        deciding = [pair for pair in deciding if pair[0].numel()] or deciding
        if any(samples.dim == dim for _, samples in deciding):
            raise Loses("puts samples beside what is not one")
        return unified(samples for _, samples in deciding)

    def _written(self, args: Any) -> Place:
        """``tensor[index] = value``."""
        tensor, index, value = args
        part, its = tensor[index], self.of(value) if isinstance(value, torch.Tensor) else None
        if isinstance(its, Samples) and self.of(tensor) is None and part._is_view():
            return self._of_base(tensor, part, aligned([(value, its)], part.shape))
        if its is None and self.of(tensor) is None and _is_mask(index) and isinstance(place := self.of(index), Samples):
            return place  # every element is chosen for itself
        return self._put(tensor, value, part.shape, lambda place: self._part(tensor, place, index, part))

    def _of_base(self, base: torch.Tensor, view: torch.Tensor, samples: Samples) -> Place:
        """Where samples that were written to a view of it lie in ``base``, in which there were none: all, or lost."""
        if self._outside.uniform:
            return (
                Samples(0, self.rows[:1].expand(base.shape[0])) if base.dim() else Lost("a single element was written")
            )
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

    def _added(self, args: Any, kwargs: Any) -> Place:
        """``tensor.index_add(dim, index, source)``, such as what an expert made of its tokens."""
        tensor, dim = args[0], _argument(args, kwargs, 1, "dim", 0)
        index, source = (_argument(args, kwargs, 2 + i, name, None) for i, name in enumerate(("index", "source")))

        def part_of(place: Samples) -> Place:
            return Samples(place.dim, place.rows[index.cpu()]) if dim % tensor.dim() == place.dim else place

        return self._put(tensor, source, source.shape, part_of)

    def _recurrent(self, name: str, args: Any, kwargs: Any, results: Sequence[torch.Tensor]) -> Sequence[Place]:
        """A sequence ``[L, B, D]``, ``[B, L, D]`` or packed, and states ``[., B, D]``; or one step and ``[B, D]``."""
        x, second = args[:2]
        one_step, packed = name.endswith("_cell"), isinstance(second, torch.Tensor) and not second.is_floating_point()
        if kwargs or (x.dim() != 2 if one_step or packed else x.dim() != 3):
            raise Loses("is followed with a batch, and by position, only")
        in_x, in_state = 0 if one_step or packed or args[-1] else 1, 0 if one_step else 1  # args[-1]: batch_first
        samples, state = self.of(x), None
        if isinstance(samples, Samples):
            _kept([(x, samples)], x, in_x)
            state = Samples(in_state, _of_first_step(samples, second) if packed else samples.pattern)
        for tensor in tensors_in((args[2] if packed else second,)):
            place = self.of(tensor)
            if isinstance(place, Samples):  # what is lost is constant, or it would not have come here
                state = state or place
                if not state.same(_kept([(tensor, place)], tensor, in_state)):
                    raise Loses("meets samples in different dimensions or orders")
        if state is None or (packed and not isinstance(samples, Samples)):
            raise Loses("has no samples that are followed")
        out = samples if isinstance(samples, Samples) else Samples(in_x, state.pattern)
        return [out, *[state] * (len(results) - 1)]

    def _put(self, tensor: Any, value: Any, shape: torch.Size, part_of: Callable[[Samples], Place]) -> Place:
        """Where the samples lie in a tensor after a part of it was written."""
        place, its = self.of(tensor), self.of(value) if isinstance(value, torch.Tensor) else None
        written = aligned([(value, its)], shape) if isinstance(its, Samples) else None
        if place is None and written is not None:
            place = _taken_from(written, tensor.shape)  # what is not written yet is of no sample, so of any
        if not isinstance(place, Samples):
            raise Loses("writes samples among what is not one")
        # A constant among what has a gradient is no matter.
        if its is not None and (value.requires_grad or not tensor.requires_grad):
            part = part_of(place)
            if written is None or not isinstance(part, Samples) or not part.same(written):
                raise Loses("writes samples over others")
        return place


class Loses(Exception):
    """An operation, named in front of this message, does not keep samples apart."""


def aligned(known: Sequence[tuple[torch.Tensor, Samples]], shape: torch.Size) -> Samples:
    """Broadcast together: dimensions count from the last."""
    places = []
    for tensor, samples in known:
        dim = samples.dim + len(shape) - tensor.dim()
        if dim < 0 or samples.size not in (1, shape[dim]):
            raise Loses("changes the number of samples")
        places.append(Samples(dim, samples.pattern if samples.size == shape[dim] else samples.rows.expand(shape[dim])))
    return unified(places)


def unified(places: Iterator[Samples] | Sequence[Samples]) -> Samples:
    """The one place that all agree on."""
    found = list(places)
    if not found:
        raise Loses("works across the samples")
    first, *others = found
    if not all(first.same(other) for other in others):
        raise Loses("meets samples in different dimensions or orders")
    return first


def _argument(args: Any, kwargs: Any, position: int, name: str, default: Any) -> Any:
    if len(args) > position:
        return args[position]
    return kwargs.get(name, kwargs.get("axis", default) if name == "dim" else default)


def _only(deciding: Any, operand: torch.Tensor) -> None:
    if any(tensor is not operand for tensor, _ in deciding):
        raise Loses("is followed with samples in its first argument only")


def _is_mask(part: Any) -> bool:
    return isinstance(part, torch.Tensor) and part.dtype in (torch.bool, torch.uint8)


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


def _taken_from(part: Samples, shape: torch.Size) -> Samples | None:
    """Where they lie in a tensor of this shape, if an index took them from one with as many there."""
    of = part.pattern.of
    return Samples(part.dim, of) if of and part.dim < len(shape) and shape[part.dim] == of.size else None


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


def _of_nothing(shape: torch.Size, pattern: Pattern) -> Samples:
    """No samples, as an expert has them that no token was sent to."""
    return Samples(shape.index(0), Pattern(pattern.rows[:0], pattern if pattern.size else pattern.of))


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


def _reduced(args: Any, kwargs: Any, deciding: Any, out: torch.Tensor, position: int) -> Samples:
    tensor, samples = deciding[0]
    dim = _argument(args, kwargs, position, "dim", None)
    if isinstance(dim, int) and not isinstance(dim, bool):
        more = [d for d in args[position + 1 :] if isinstance(d, int) and not isinstance(d, bool)]
        dims = {d % tensor.dim() for d in (dim, *more)} if tensor.dim() else set()
    else:
        dims = {d % tensor.dim() for d in dim} if isinstance(dim, (tuple, list)) else set(range(tensor.dim()))
    if samples.dim in dims or not dims:
        raise Loses("works across the samples")
    kept = out.dim() == tensor.dim()
    return Samples(samples.dim - (0 if kept else sum(d < samples.dim for d in dims)), samples.pattern)


def _kept(deciding: Any, out: torch.Tensor, dim: int) -> Samples:
    (tensor, samples), *_ = deciding
    if samples.dim != dim or out.dim() <= dim or out.shape[dim] != samples.size:
        raise Loses(f"expects the samples in dimension {dim} of {list(tensor.shape)}")
    return samples


def _product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, deciding: Any) -> Samples:
    columns, places = int(b.dim() > 1), []
    batch = out.dim() - columns - (a.dim() > 1)  # dimensions of out that stand before its rows and columns
    for tensor, samples in deciding:
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


def _of_first_step(samples: Samples, counts: torch.Tensor) -> Pattern:
    """Of packed sequences: ``counts`` says how many there are in each step, the first of those of the step before."""
    rows = samples.rows[: int(counts[0])]
    if not torch.equal(samples.rows, torch.cat([rows[:count] for count in counts.tolist()])):
        raise Loses("expects packed sequences")
    return Pattern(rows)


def _packed(
    name: str, args: Any, results: Sequence[torch.Tensor], tensor: torch.Tensor, samples: Samples
) -> Sequence[Place]:
    """Sequences of falling lengths: of each step, those that are so long; and back."""
    _only([(tensor, samples)], args[0])
    dim = 0 if args[2] else 1  # batch_first
    if name == "_pack_padded_sequence":
        rows = _kept([(tensor, samples)], tensor, dim).rows
        return [Samples(0, torch.cat([rows[:count] for count in results[1].tolist()])), None]
    pattern = _of_first_step(_kept([(tensor, samples)], tensor, 0), args[1])
    return [Samples(dim, pattern), Samples(0, pattern)]


def _einsum(args: Any, deciding: Any) -> Samples:
    equation, *operands = args
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    if not isinstance(equation, str):
        raise Loses("is followed with letters only")
    inputs, output = _letters(equation.replace(" ", ""), [operand.dim() for operand in operands])
    places = []
    for letters, operand in zip(inputs, operands):
        place = next((samples for tensor, samples in deciding if tensor is operand), None)
        if place is not None:
            if letters[place.dim] not in output:
                raise Loses("works across the samples")
            places.append(Samples(output.index(letters[place.dim]), place.pattern))
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


def _interleaved(args: Any, kwargs: Any, deciding: Any, out: torch.Tensor) -> Samples:
    tensor, samples = deciding[0]
    repeats, dim = _argument(args, kwargs, 1, "repeats", None), _argument(args, kwargs, 2, "dim", None)
    if dim is None:
        raise Loses("flattens what it repeats")
    if dim % tensor.dim() != samples.dim:
        return samples
    return Samples(
        samples.dim, samples.rows.repeat_interleave(repeats.cpu() if isinstance(repeats, torch.Tensor) else repeats)
    )
