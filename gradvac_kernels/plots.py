"""Pictures of how tasks pull at a model: the similarity of their gradients by pair, by layer and over training steps,
how often a method acts, with which weights, and the curvature.

Every function takes tensors or anything that numpy makes an array of, and returns a new ``matplotlib.figure.Figure``:
``plots.heatmap(cosine, tasks).savefig("similarity.png")``. What is NaN (or infinite) was not measured and is left out.
Figures do not pass through pyplot: nothing has to be closed, and no backend is chosen. The drawings with one pair of
axes also go into axes of yours (``ax``); the legend is yours to place then.
"""

from __future__ import annotations

import itertools
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import LogFormatter, PercentFormatter
    from scipy.cluster import hierarchy
    from scipy.spatial.distance import squareform
except ImportError as error:
    raise ImportError("gradvac_kernels.plots needs matplotlib and scipy: pip install gradvac_kernels[plots]") from error

from .checks import check_int
from .groups import ParameterGroups, encoder_or_decoder

__all__ = [
    "by_layer",
    "clusters",
    "eigenvalue",
    "encoder_against_decoder",
    "heatmap",
    "over_steps",
    "rates",
    "weights",
]

# Okabe and Ito's colours, which colour-blind readers tell apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999999")
STYLES = ("-", "--", ":", "-.")

_WRITTEN = 16  # tasks, up to which a heatmap has its values in it
_MARKED = 12  # points, up to which a line has them marked
_NAMED = 8  # pairs of tasks, at most, that a scatter names
_LEGEND_INSIDE = 6  # lines, up to which the legend is among them
_LABELS = 40  # groups, up to which each has its name under the axis


def heatmap(
    cosine: Any,
    tasks: Sequence[str],
    *,
    families: Mapping[str, str] | Sequence[str] | None = None,
    control: Any = None,
    label: str = "cosine",
    title: str | None = None,
) -> Figure:
    """The similarity of every pair of tasks, neighbours in the clustering (drawn on top) side by side.

    Args:
        cosine: ``[N, N]``. Its diagonal is not drawn: all ones would take up the colours.
        tasks: the N names.
        families: the family of each task, by name or in the order of ``tasks``: names are coloured by it (eight
            colours, then the first again).
        control: ``[N]``, the cosine of two independent batches of the same task, for the diagonal: how similar is
            as similar as it gets (Wang, Lipton and Tsvetkov, EMNLP 2020).
        label: what the colours mean.
        title: over the picture.

    Raises:
        TypeError: ``tasks`` or ``families`` are not names, or what should be numbers is not.
        ValueError: fewer than two tasks, a wrong shape, or a task without a family.
    """
    tasks = _names("tasks", tasks)
    N = len(tasks)
    if N < 2:
        raise ValueError(f"tasks: expected at least two, got {tasks}")
    cosine = _numbers("cosine", cosine, (N, N))
    family = None if families is None else _family_of(families, tasks)
    np.fill_diagonal(cosine, np.nan if control is None else _numbers("control", control, (N,)))

    size = max(5, 2 + 0.55 * min(N, 12), 2 + 0.2 * N)  # inches
    figure = Figure((size, size + 0.6), layout="constrained")
    tree, heat = figure.subplots(2, 1, height_ratios=[1, 5.5])
    look = {"no_labels": True, "color_threshold": 0, "above_threshold_color": "#555555"}
    leaves = hierarchy.dendrogram(clusters(cosine), ax=tree, **look)["leaves"]
    tree.set_axis_off()
    shown = cosine[np.ix_(leaves, leaves)]
    image = heat.imshow(shown, cmap="viridis", aspect="auto")
    if N <= _WRITTEN:
        for (row, column), value in np.ndenumerate(shown):
            if not np.isnan(value):
                colour = "white" if image.norm(value) < 0.5 else "black"
                written = f"{round(value, 2) + 0:.2f}"  # + 0: no -0.00
                heat.text(column, row, written, ha="center", va="center", fontsize=8, color=colour)
    names = [tasks[leaf] for leaf in leaves]
    slope = 45 if N <= _WRITTEN else 90
    heat.set_xticks(range(N), names, rotation=slope, ha="right", va="center", rotation_mode="anchor")
    heat.set_yticks(range(N), names)
    if control is not None:
        heat.set_xlabel("diagonal: two batches of the same task")
    if family is not None:
        colours = dict(zip(dict.fromkeys(family), itertools.cycle(COLOURS)))
        for labels in (heat.get_xticklabels(), heat.get_yticklabels()):
            for leaf, text in zip(leaves, labels):
                text.set(color=colours[family[leaf]], fontweight="bold")
        handles = [Patch(color=colour, label=name) for name, colour in colours.items()]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)), frameon=False)
    figure.colorbar(image, ax=heat, label=label, shrink=0.8)
    if title is not None:
        figure.suptitle(title, fontsize="medium", wrap=True)
    return figure


def clusters(cosine: Any) -> np.ndarray:
    """Average-linkage clusters by the distance ``1 - cosine``, as scipy's linkage matrix ``[N - 1, 4]``.

    Args:
        cosine: ``[N, N]``; the diagonal is not looked at. The two directions of a pair are averaged, and a pair
            that was measured in neither counts as 0.

    Raises:
        TypeError: not numbers.
        ValueError: not square, or fewer than two tasks.
    """
    cosine = _numbers("cosine", cosine, ("N", "N"))
    if len(cosine) < 2:
        raise ValueError(f"cosine: expected at least two tasks, got shape {list(cosine.shape)}")
    cosine = np.where(np.isnan(cosine), cosine.T, cosine)
    cosine = np.nan_to_num(cosine + cosine.T) / 2
    np.fill_diagonal(cosine, 1)
    distance = cosine.max() - cosine  # from 1 for cosines; other measures may be larger
    return hierarchy.linkage(squareform(distance, checks=False), "average", optimal_ordering=True)


def by_layer(
    values: Mapping[str, Any],
    groups: ParameterGroups | Sequence[str],
    *,
    ylabel: str = "mean cosine of two tasks",
    ax: Axes | None = None,
) -> Figure:
    """Similarity by layer, as one line or several.

    With ``same`` ``[N, N]``, true for pairs of one family, ``{"within families": np.where(same, cosine, np.nan),
    "across families": np.where(same, np.nan, cosine)}`` compares these.

    Args:
        values: for each line, ``[K]``, or ``[K, N, N]``, of which the mean over the pairs that were measured is drawn.
        groups: the K groups, or their names.
        ylabel: what was measured.
        ax: axes to draw into; otherwise there is a new figure.

    Raises:
        TypeError: ``values`` is not a mapping to numbers, or ``groups`` are not names.
        ValueError: no line, or a wrong shape.
    """
    groups = _group_names(groups)
    K = len(groups)
    lines = _lines(values, (K,), (K, "N", "N"))
    figure, axis = _canvas(ax, width=max(7.0, 1 + 0.3 * min(K, _LABELS)))
    for (line, found), look in zip(lines.items(), _looks()):
        if found.ndim == 3:
            found = _mean(found[:, ~np.eye(found.shape[1], dtype=bool)], 1)
        axis.plot(range(K), found, marker="o", markersize=4, label=line, **look)
    labelled = range(0, K, -(-K // _LABELS))
    axis.set_xticks(labelled, [groups[k] for k in labelled], rotation=45, ha="right", rotation_mode="anchor")
    axis.set_ylabel(ylabel)
    _finish(axis, legend=ax is None)
    return figure


def over_steps(
    steps: Any,
    values: Mapping[str, Any],
    *,
    ylabel: str,
    smooth: int = 1,
    log: bool = False,
    style: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Anything over the training steps: similarity, rates, losses. Lines join what was measured; few points are marked.

    Args:
        steps: ``[S]``.
        values: for each line, ``[S]``.
        ylabel: what was measured.
        smooth: show means of each value and those before it, so many in all (at the begin, of those that there are).
        log: a logarithmic axis, if all values are positive.
        style: matplotlib's line style for all lines. The n-th line always has the n-th colour: a second call on the
            same ``ax`` with another style pairs its lines with the first one's.
        ax: axes to draw into; otherwise there is a new figure.

    Raises:
        TypeError: ``steps`` are not numbers, ``values`` not a mapping to numbers, or ``smooth`` is not an int.
        ValueError: no line, no step, a wrong shape, or ``smooth`` below 1.
    """
    check_int("smooth", smooth, least=1)
    steps = _numbers("steps", steps, ("S",))
    lines = _lines(values, (len(steps),))
    figure, axis = _canvas(ax)
    for (line, found), look in zip(lines.items(), _looks(style)):
        measured = ~np.isnan(found)
        marker = "o" if measured.sum() <= _MARKED else None
        axis.plot(
            steps[measured], _running_mean(found[measured], smooth), marker=marker, markersize=4, label=line, **look
        )
    if log and all((found[~np.isnan(found)] > 0).all() for found in lines.values()):
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(LogFormatter())
        axis.yaxis.set_minor_formatter(LogFormatter())
    axis.set(xlabel="step" if smooth == 1 else f"step (running mean of {smooth})", ylabel=ylabel)
    _finish(axis, legend=ax is None)
    return figure


def rates(
    steps: Any, turned: Any, below_zero: Any, *, smooth: int = 1, method: str = "GradVac", ax: Axes | None = None
) -> Figure:
    """How often a pair was turned, against how often PCGrad would have acted.

    Args:
        steps: ``[S]``.
        turned: ``[S]``, share of the measured pairs that were turned: phi below the target.
        below_zero: ``[S]``, share of them with phi below 0.
        smooth: as in :func:`over_steps`.
        method: what turned them.
        ax: axes to draw into; otherwise there is a new figure.

    Raises:
        TypeError: not numbers, or ``smooth`` is not an int.
        ValueError: no step, a wrong shape, or ``smooth`` below 1.
    """
    S = len(_numbers("steps", steps, ("S",)))
    shares = {
        f"turned by {method}: similarity below the target": _numbers("turned", turned, (S,)),
        "PCGrad would act: similarity below 0": _numbers("below_zero", below_zero, (S,)),
    }
    figure, axis = _canvas(ax)
    over_steps(steps, shares, ylabel="share of the measured pairs", smooth=smooth, ax=axis)
    axis.set_ylim(bottom=0)
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _finish(axis, legend=ax is None)
    return figure


def weights(steps: Any, weights: Any, tasks: Sequence[str], *, smooth: int = 1, ax: Axes | None = None) -> Figure:
    """The weight of each task (alpha) over the training steps.

    Args:
        steps: ``[S]``.
        weights: ``[S, N]``; NaN where a batch was without the task.
        tasks: the N names.
        smooth: as in :func:`over_steps`.
        ax: axes to draw into; otherwise there is a new figure.

    Raises:
        TypeError: ``tasks`` are not names, or what should be numbers is not.
        ValueError: no step, a wrong shape, or ``smooth`` below 1.
    """
    tasks = _names("tasks", tasks)
    found = _numbers("weights", weights, (len(_numbers("steps", steps, ("S",))), len(tasks)))
    return over_steps(steps, dict(zip(tasks, found.T)), ylabel="weight of the task", smooth=smooth, ax=ax)


def eigenvalue(steps: Any, values: Mapping[str, Any], *, ax: Axes | None = None) -> Figure:
    """The largest eigenvalue over the training steps; the axis is logarithmic if all are positive.

    Args:
        steps: ``[S]``.
        values: for each line (a task, a group, a training run), ``[S]``.
        ax: axes to draw into; otherwise there is a new figure.

    Raises:
        TypeError: ``steps`` are not numbers, or ``values`` not a mapping to numbers.
        ValueError: no line, no step, or a wrong shape.
    """
    return over_steps(steps, values, ylabel="largest eigenvalue", log=True, ax=ax)


def encoder_against_decoder(
    cosine: Any,
    groups: ParameterGroups | Sequence[str],
    tasks: Sequence[str],
    *,
    families: Mapping[str, str] | Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Each pair of tasks as a point: its mean cosine over the encoder's groups against that over the decoder's.

    The pairs farthest from the diagonal, those on which the two halves differ most, are named where there is room.

    Args:
        cosine: ``[K, N, N]``; the two directions of a pair are averaged.
        groups: the K groups, or their names; a path component ``encoder`` or ``decoder`` says where they belong.
        tasks: the N names.
        families: the family of each task, by name or in the order of ``tasks``: pairs within one are coloured.
        ax: axes to draw into; otherwise there is a new figure.

    Raises:
        TypeError: ``tasks``, ``groups`` or ``families`` are not names, or ``cosine`` is not numbers.
        ValueError: a wrong shape, no group of the encoder or none of the decoder, or a task without a family.
    """
    groups, tasks = _group_names(groups), _names("tasks", tasks)
    N = len(tasks)
    cosine = _numbers("cosine", cosine, (len(groups), N, N))
    family = None if families is None else np.array(_family_of(families, tasks))
    first, second = np.triu_indices(N, 1)
    means = []  # of the encoder and of the decoder, [pairs]
    for half in ("encoder", "decoder"):
        found = cosine[[encoder_or_decoder(group) == half for group in groups]]
        if not len(found):
            raise ValueError(f"groups: expected names with a component {half}, got {reprlib.repr(groups)}")
        means.append(_mean(np.concatenate([found[:, first, second], found[:, second, first]]), 0))
    measured = ~np.isnan(means).any(0)
    first, second, (x, y) = first[measured], second[measured], np.array(means)[:, measured]

    figure, axis = _canvas(ax, width=6.0, height=6.0)
    if family is None:
        axis.plot(x, y, "o", color=COLOURS[0], alpha=0.7)
    else:
        within = family[first] == family[second]
        for kind, colour, which in (("across", COLOURS[7], ~within), ("within", COLOURS[1], within)):
            axis.plot(x[which], y[which], "o", color=colour, alpha=0.7, label=f"{kind} families")
    low, high = (min(*x, *y), max(*x, *y)) if len(x) else (0.0, 1.0)
    size = max(high - low, 0.1)
    ends = [low - 0.05 * size, high + 0.05 * size]
    axis.plot(ends, ends, color="#555555", linewidth=0.8, zorder=0)
    named: list[int] = []
    for pair in np.argsort(-abs(x - y)):
        room = all(abs(x[pair] - x[one]) > 0.2 * size or abs(y[pair] - y[one]) > 0.025 * size for one in named)
        if room and len(named) < _NAMED:
            named.append(pair)
            side = 1 if x[pair] > y[pair] else -1  # away from the diagonal, where most points are
            axis.annotate(
                f"{tasks[first[pair]]}, {tasks[second[pair]]}",
                (x[pair], y[pair]),
                (5 * side, -3 * side),
                textcoords="offset points",
                ha="left" if side > 0 else "right",
                va="center",
                fontsize=8,
            )
    axis.set(xlabel="mean cosine, encoder", ylabel="mean cosine, decoder", aspect="equal")
    _finish(axis, legend=ax is None)
    return figure


def _canvas(ax: Axes | None, width: float = 7.0, height: float = 4.0) -> tuple[Any, Axes]:
    if ax is not None:
        return ax.get_figure(), ax
    figure = Figure((width, height), layout="constrained")
    return figure, figure.subplots()


def _finish(axis: Axes, legend: bool) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
    lines = len(axis.get_legend_handles_labels()[0]) if legend else 0
    if lines > _LEGEND_INSIDE:
        axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    elif lines:
        axis.legend(frameon=False)


def _looks(style: str | None = None) -> Iterator[dict[str, Any]]:
    """Colours, then the same in the next style; in this one only, if given."""
    styles = STYLES if style is None else (style,)
    return itertools.cycle([{"color": colour, "linestyle": style} for style in styles for colour in COLOURS])


def _mean(values: np.ndarray, axis: int) -> np.ndarray:
    """Of what was measured; NaN where nothing was."""
    return np.ma.masked_invalid(values).mean(axis).filled(np.nan)


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    if not len(values):
        return values
    return np.convolve(values, np.ones(width))[: len(values)] / np.minimum(np.arange(1, len(values) + 1), width)


# ------------------------------------------------------------------------------------------------------- arguments


def _numbers(name: str, values: Any, *shapes: tuple[int | str, ...]) -> np.ndarray:
    """A copy as float64, NaN for what is not finite; in ``shapes``, a letter stands for one size, at least 1."""
    if isinstance(values, torch.Tensor):
        values = values.detach().to("cpu", torch.float64).numpy()
    try:
        array = np.array(values, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError):
        got = reprlib.repr(values)
        raise TypeError(f"{name}: expected a tensor or an array of numbers, got {got}") from None
    if not any(_fits(array.shape, shape) for shape in shapes):
        wanted = " or ".join(f"[{', '.join(map(str, shape))}]" for shape in shapes)
        raise ValueError(f"{name}: expected shape {wanted}, got {list(array.shape)}")
    array[~np.isfinite(array)] = np.nan
    return array


def _fits(sizes: tuple[int, ...], shape: tuple[int | str, ...]) -> bool:
    letters: dict[str, int] = {}
    return len(sizes) == len(shape) and all(
        size == (letters.setdefault(want, max(1, size)) if isinstance(want, str) else want)
        for size, want in zip(sizes, shape)
    )


def _lines(values: Any, *shapes: tuple[int | str, ...]) -> dict[str, np.ndarray]:
    if not isinstance(values, Mapping):
        raise TypeError(f"values: expected a mapping of lines to numbers, got {reprlib.repr(values)}")
    if not values:
        raise ValueError("values: expected at least one line, got none")
    return {line: _numbers(f"values[{line!r}]", found, *shapes) for line, found in values.items()}


def _names(name: str, values: Any) -> list[str]:
    if isinstance(values, str) or not isinstance(values, Sequence) or not all(isinstance(one, str) for one in values):
        raise TypeError(f"{name}: expected a sequence of names, got {reprlib.repr(values)}")
    if not values:
        raise ValueError(f"{name}: expected at least one, got none")
    return list(values)


def _group_names(groups: Any) -> list[str]:
    return _names("groups", groups.names if isinstance(groups, ParameterGroups) else groups)


def _family_of(families: Any, tasks: Sequence[str]) -> list[str]:
    if isinstance(families, Mapping):
        without = [task for task in tasks if task not in families]
        if without:
            raise ValueError(f"families: expected one for every task, got none for {', '.join(without)}")
        families = [families[task] for task in tasks]
    found = _names("families", families)
    if len(found) != len(tasks):
        raise ValueError(f"families: expected one for each of the {len(tasks)} tasks, got {len(found)}")
    return found
