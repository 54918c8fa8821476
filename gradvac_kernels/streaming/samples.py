"""Where the samples of a batch lie in a tensor, followed from operation to operation.

A tensor of activations holds its samples along one dimension: the first of ``[B, L, D]``, the second of ``[L, B, D]``,
the only one of ``[B * L]`` tokens. Parameter gradients can be kept apart by task only where that dimension is known, so
it is followed, not guessed: an operation whose effect on it is not known, or that mixes samples, loses it, and it is an
error to use a parameter after that. Only what comes from outside, such as the model's inputs, is placed by its size,
where the caller says that samples lie.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from . import placement
from .operations import COLLATING, INDEXING, WITHIN, WRITING, is_in_place, is_pointwise, tensors_in
from .places import Contradicts, Guessed, Loses, Lost, Pattern, Place, Samples

_NOTE = "gradvac_kernels.place"
_PRODUCTS = {"matmul", "bmm", "baddbmm", "einsum"}
_BROADCASTING = {*_PRODUCTS, "cat", "stack"}  # beside the pointwise ones


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
        self._own = {id(tensor): tensor for tensor in own}  # kept: their ids are theirs then
        self.outside = Pattern(rows)
        self._noted: list[weakref.ref[torch.Tensor]] = []
        self._seen: dict[tuple[Any, ...], tuple[Samples, list[Place]]] = {}

    def of(self, tensor: torch.Tensor) -> Place:
        """Where the samples lie in ``tensor``."""
        noted = getattr(tensor, "_gradvac_place", None)
        if noted is not None and noted[0] is self and (noted[1] is not None or not _was_made_since(tensor)):
            return self._of_view(tensor, noted[1])
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

    def _of_view(self, tensor: torch.Tensor, place: Place) -> Place:
        """Of a tensor that was noted, if nothing was written to its memory by other views of it."""
        base = tensor._base
        if base is None or isinstance(place, Lost) or not self.has_noted(base):
            return place
        now = base._gradvac_place[1]  # type: ignore[attr-defined]
        if type(place) is Samples:
            written = isinstance(now, Lost)
        else:
            written = tensor.requires_grad and self.of(base) is not None
        return Lost("its memory was written to by other views of it") if written else place

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

    def once(self, key: tuple[Any, ...], samples: Samples, places: Callable[[], list[Place]]) -> list[Place]:
        """``places()``, or what it gave for this key before: layers do the same again and again.

        Args:
            key: of ``samples``, the id of its pattern and its dimension, and of all else that ``places`` depends on.
        """
        if key not in self._seen:
            self._seen[key] = (samples, places())  # keeps the pattern: its id is in the key
        return self._seen[key][1]

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
        places = self._places(name, function, args, kwargs, results, known)
        if is_in_place(function) and known and results and known[0][0] is results[0]:
            self._check_in_place(name, results[0], known[0][1], places[0])
        for result, place in zip(results, places):
            self.note(result, place)

    def _check_in_place(self, name: str, tensor: torch.Tensor, before: Place, after: Place) -> None:
        """Views of what is written to, and what it is a view of, are not to be placed wrongly from now on."""
        known = isinstance(before, Samples) and isinstance(after, Samples) and type(after) in (Samples, type(before))
        if known and before.same(after):  # type: ignore[union-attr, arg-type]
            return
        if before is not None and tensor.requires_grad:
            raise ValueError(
                f"batch: expected {name} to leave samples where they are, got it in place; write it out of place"
            )
        base = tensor._base
        if base is None:
            return
        if before is not None:
            self.note(base, Lost(f"{name} moved samples in a part of it"))
        elif after is not None:
            in_none = isinstance(after, Samples) and self.of(base) is None
            lost = Lost(f"{name} wrote samples into a part of it")
            self.note(base, placement.place_of_base(self, base, tensor, after) if in_none else lost)  # type: ignore[arg-type]

    def _places(self, name, function, args, kwargs, results, known) -> Sequence[Place]:  # type: ignore[no-untyped-def]
        if name in COLLATING and not any(self.has_noted(tensor) for tensor, place in known if place is not None):
            return self._collated(name, function, args, kwargs, results, known)
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
        if not self.outside.uniform and all(isinstance(p, Samples) and p.pattern.uniform for _, p in deciding):
            # A few samples may have been put beside others, which are not all of their task.
            deciding = deciding + [
                (tensor, place)
                for tensor, place in dependent
                if type(place) is Samples and all(tensor is not other for other, _ in deciding)
            ]
        if name in INDEXING and isinstance(known[0][1], Samples):
            deciding = known[:1]
        lost = next((place for _, place in deciding if isinstance(place, Lost)), None)
        place = lost or self._followed(placement.Call(self, name, function, args, kwargs, results, deciding), dependent)
        places = list(place) if isinstance(place, (list, tuple)) else [place] * len(results)
        alone = len(deciding) == len(dependent)
        return [self._settled(name, result, where, deciding, alone) for result, where in zip(results, places)]

    def _followed(self, call: placement.Call, dependent: Sequence[tuple[torch.Tensor, Place]]) -> Any:
        better = _who_know_better(call, dependent)
        try:
            if better:
                if call.name == "linear":
                    raise Contradicts
                placement.place(call._replace(deciding=[*call.deciding, *better]))
            place: Any = placement.place(call)
        except Contradicts as contradicts:
            if better or _are_several(tensor for tensor, _ in call.deciding if tensor.requires_grad):
                raise _contradiction(f"{call.name} {contradicts}") from None
            place = Lost(f"{call.name} {contradicts}")
        except Loses as loses:
            place = Lost(f"{call.name} {loses}")
        except (TypeError, IndexError, AttributeError, KeyError, ValueError, RuntimeError):
            place = Lost(f"{call.name} is called in a way that is not followed")
        if not isinstance(place, Lost):
            return place
        # Of one task, whatever became of it: but not with anything beside it that may be of another.
        pattern = call.deciding[0][1].pattern
        alone = call.name in WITHIN and pattern.uniform and len(list(tensors_in((*call.args, call.kwargs)))) == 1
        return Samples(0, pattern.rows[:1]) if self.outside.uniform or alone else place

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

    def _collated(self, name, function, args, kwargs, results, known) -> Sequence[Place]:  # type: ignore[no-untyped-def]
        """What comes from outside: batches, or single samples that are as long as there are samples."""
        dependent = [pair for pair in known if pair[1] is not None]
        if not dependent:
            return [None]
        try:
            parts: Any = placement.place(placement.Call(self, name, function, args, kwargs, results, dependent))
        except Loses as loses:
            return [Lost(f"{name} {loses}")]
        whole = self._by_size(results[0])
        if whole is not None and not whole.same(parts):
            return [Lost(f"{name} may have joined samples or batches, by their sizes; do it outside")]
        return [parts]

    def _by_size(self, tensor: torch.Tensor, alone: bool = False) -> Samples | None:
        """As the caller says of what comes from outside; ``alone``: if no other dimension could be meant."""
        if tensor.dim() <= self.batch_dim or tensor.shape[self.batch_dim] != self.outside.size:
            return None
        if alone and sum(size == self.outside.size for size in tensor.shape) > 1:
            return None
        return Samples(self.batch_dim, self.outside)


def _was_made_since(tensor: torch.Tensor) -> bool:
    """By a function of Python's, which was not seen, into a tensor that was, such as an empty one."""
    node: Any = tensor.grad_fn
    return isinstance(node, torch.autograd.function.BackwardCFunction) and _NOTE not in node.metadata


def _who_know_better(
    call: placement.Call, dependent: Sequence[tuple[torch.Tensor, Place]]
) -> list[tuple[torch.Tensor, Samples]]:
    """Constants that have samples where what has a gradient has one entry, or none."""
    if not any(tensor.requires_grad for tensor, _ in call.deciding):
        return []
    constants = [(tensor, its) for tensor, its in dependent if type(its) is Samples and not tensor.requires_grad]
    return [pair for pair in constants if _knows_better(call, *pair)]


def _knows_better(call: placement.Call, tensor: torch.Tensor, samples: Samples) -> bool:
    """A constant among what decides, of which it is known where its samples are."""
    name, deciding = call.name, call.deciding
    if name in ("matmul", "mm", "linear") and tensor is call.args[0] and tensor.dim() == 2:  # features, and a table
        return samples.dim == 0 and all(t is call.args[1] and its.dim == int(name != "linear") for t, its in deciding)
    if name not in _BROADCASTING and not is_pointwise(name):
        return False
    dim = samples.dim - tensor.dim()  # from the last
    if all(-dim > t.dim() or not _is_long(t, dim) for t, _ in deciding):
        return True
    if name in _PRODUCTS and tensor.dim() < 3:
        return False
    both = all(tensor.dim() >= t.dim() and _is_long(tensor, its.dim - t.dim()) for t, its in deciding)
    return both and _is_long(tensor, dim)


def _is_long(tensor: torch.Tensor, dim: int) -> bool:
    """It has different entries along the dimension."""
    return tensor.shape[dim] > 1 and tensor.stride(dim) != 0


def _are_several(tensors: Iterable[torch.Tensor]) -> bool:
    """A tensor beside itself is seen in losses that compare the samples of a task."""
    return len({tensor.untyped_storage().data_ptr() for tensor in tensors}) > 1


def _contradiction(reason: str) -> ValueError:
    """Of two tensors: one was placed wrongly, and may have met a parameter; or samples are compared with each other."""
    return ValueError(
        f"batch: expected samples in one dimension and order, got others: {reason}; what is as long as there are "
        "samples, but holds none, can be made a buffer of the model; samples are compared in one tensor (z @ z.T)"
    )
