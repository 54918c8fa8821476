"""Parameter groups: named ranges of columns of a task x parameter buffer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch

Granularity = str | Callable[[str], str]
_WRAPPERS = ("_orig_mod", "module")  # what torch.compile and DistributedDataParallel put in front of a name


@dataclass(frozen=True)
class ParameterSlot:
    """Where one parameter lies: ``numel`` columns from ``offset`` on, in group ``group``, in its own memory order."""

    name: str
    group: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class ParameterGroups:
    """K named groups of columns of a gradient buffer ``[T, P]``.

    Make one with :meth:`from_model` or :meth:`from_sizes`. ``groups[a:b]`` is a run of groups whose offsets start at
    0 again; it describes a slab ``[T, P_ab]`` of just those columns and keeps each group's identity (``first``), so
    that a slab gives, bit for bit, what the whole buffer gives for these groups.

    Attributes:
        names: the K group names.
        offsets: K + 1 ints; group k starts at column ``offsets[k]``, and ``offsets[K]`` is P.
        sizes: K ints; columns ``offsets[k] + sizes[k] .. offsets[k + 1]`` are padding, never read and never written.
        first: index, in the whole model, of the first group here.
        parameters: where each parameter lies (empty unless made from a model).
        bounds: ``[K, 2]`` int64 on the CPU, the first column of each group and the one past its last.
    """

    names: tuple[str, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    first: int = 0
    parameters: tuple[ParameterSlot, ...] = ()
    bounds: torch.Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        pairs = [(begin, begin + size) for begin, size in zip(self.offsets, self.sizes)]
        object.__setattr__(self, "bounds", torch.tensor(pairs, dtype=torch.int64, device="cpu").reshape(len(pairs), 2))

    @property
    def numel(self) -> int:
        """P: the columns of a buffer for these groups, padding included."""
        return self.offsets[-1]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, run: slice) -> ParameterGroups:
        if not isinstance(run, slice) or run.step not in (None, 1):
            raise TypeError(f"groups: expected a slice a:b of consecutive groups, got {run!r}")
        start, stop, _ = run.indices(len(self))
        if start >= stop:
            raise ValueError(f"groups: expected a slice of at least one of the {len(self)} groups, got {run!r}")
        origin = self.offsets[start]
        return ParameterGroups(
            names=self.names[start:stop],
            offsets=tuple(offset - origin for offset in self.offsets[start : stop + 1]),
            sizes=self.sizes[start:stop],
            first=self.first + start,
            parameters=tuple(
                replace(slot, group=slot.group - start, offset=slot.offset - origin)
                for slot in self.parameters
                if start <= slot.group < stop
            ),
        )

    @classmethod
    def from_sizes(cls, sizes: Mapping[str, int], align: int = 1) -> ParameterGroups:
        """Groups laid out one behind the other.

        Args:
            sizes: columns of each group, by name, in order; 0 is allowed.
            align: every group starts at a multiple of this many columns. With 32, whole vectors of any type can be read
                from its beginning on, which is fastest.

        Raises:
            TypeError: a size or ``align`` is not an int.
            ValueError: no groups, a negative size, or ``align`` below 1.
        """
        if not isinstance(sizes, Mapping) or not sizes:
            raise ValueError(f"sizes: expected a mapping of at least one group name to its size, got {sizes!r}")
        if isinstance(align, bool) or not isinstance(align, int):
            raise TypeError(f"align: expected an int, got {align!r}")
        if align < 1:
            raise ValueError(f"align: expected at least 1, got {align}")
        for name, size in sizes.items():
            if not isinstance(name, str):
                raise TypeError(f"sizes: expected group names of type str, got {name!r}")
            if isinstance(size, bool) or not isinstance(size, int):
                raise TypeError(f"sizes[{name!r}]: expected an int, got {size!r}")
            if size < 0:
                raise ValueError(f"sizes[{name!r}]: expected 0 or more columns, got {size}")
        padded = [-(-size // align) * align for size in sizes.values()]
        if sum(padded) >= 2**63:
            raise ValueError(f"sizes: expected a number of columns of 64 bits, got {sum(padded)}")
        return cls(tuple(sizes), (0, *itertools.accumulate(padded)), tuple(sizes.values()))

    @classmethod
    def from_model(
        cls, model: torch.nn.Module, granularity: Granularity = "all_layer", align: int = 1
    ) -> ParameterGroups:
        """Groups of a model's trainable parameters, in order of first appearance.

        A tied parameter counts once, under its first name; parameters with ``requires_grad=False`` have no columns.

        Args:
            model: the module whose ``named_parameters()`` are grouped.
            granularity: ``"whole_model"``; ``"enc_dec"`` (a path component ``encoder`` or ``decoder``, and the rest);
                ``"all_layer"`` (one group a repeated block, such as ``encoder.layers.3``, and one for each top-level
                module outside blocks); ``"all_matrix"`` (one a parameter); or a callable, parameter name -> group name.
                The names are those of Wang et al., "Gradient Vaccine", ICLR 2021, section 4.
            align: every group starts at a multiple of this many columns.

        Raises:
            TypeError: ``model`` is not a module, or the callable gave something else than a str.
            ValueError: an unknown granularity, no trainable parameter, or ``"enc_dec"`` on a model without either.
        """
        if not isinstance(model, torch.nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        group_of = _group_names(granularity)
        members: dict[str, list[ParameterSlot]] = {}
        for name, parameter in trainable(model):
            group = group_of(name)
            if not isinstance(group, str):
                raise TypeError(f"granularity: expected a group name of type str for {name!r}, got {group!r}")
            index = list(members).index(group) if group in members else len(members)
            slot = ParameterSlot(name, index, 0, tuple(parameter.shape), gradient_stride(parameter))
            members.setdefault(group, []).append(slot)
        if not members:
            raise ValueError("model: expected at least one parameter with requires_grad=True, got none")
        if granularity == "enc_dec" and not members.keys() & {"encoder", "decoder"}:
            raise ValueError("granularity: 'enc_dec' expects parameter names with a component encoder or decoder")
        sizes = {group: sum(slot.numel for slot in slots) for group, slots in members.items()}
        plain = cls.from_sizes(sizes, align)
        parameters = []
        for index, slots in enumerate(members.values()):
            offset = plain.offsets[index]
            for slot in slots:
                parameters.append(replace(slot, offset=offset))
                offset += slot.numel
        return cls(plain.names, plain.offsets, plain.sizes, parameters=tuple(parameters))


def trainable(model: torch.nn.Module) -> Iterable[tuple[str, torch.nn.Parameter]]:
    """The named parameters that have gradients, each once."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def gradient_stride(parameter: torch.Tensor) -> tuple[int, ...]:
    """The strides that autograd gives to a parameter's gradient: its own where it is dense."""
    return parameter.stride() if parameter.is_contiguous() else torch.empty_like(parameter, device="meta").stride()


def _group_names(granularity: Granularity) -> Callable[[str], str]:
    if callable(granularity):
        return granularity
    rules = {
        "whole_model": lambda name: "whole_model",
        "enc_dec": encoder_or_decoder,
        "all_layer": _layer,
        "all_matrix": lambda name: name,
    }
    if not isinstance(granularity, str) or granularity not in rules:
        raise ValueError(f"granularity: expected one of {sorted(rules)} or a callable, got {granularity!r}")
    return rules[granularity]


def _components(name: str) -> list[str]:
    components = name.split(".")
    while len(components) > 1 and components[0] in _WRAPPERS:
        components = components[1:]
    return components


def encoder_or_decoder(name: str) -> str:
    """``"encoder"`` or ``"decoder"``, whichever is the first such component of the name, else ``"rest"``."""
    return next((part for part in _components(name) if part in ("encoder", "decoder")), "rest")


def _layer(name: str) -> str:
    components = _components(name)
    # The last component is the parameter itself: ParameterList entries ("scales.0") are no blocks.
    for depth, part in enumerate(components[:-1], start=1):
        if part.isdigit():
            return ".".join(components[:depth])
    return components[0]
