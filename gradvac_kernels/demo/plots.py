"""Draw what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only, no window

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter, ScalarFormatter
from scipy.cluster import hierarchy

from .results import Results
from .similarity import clusters

# Okabe and Ito's colours, which colour-blind readers tell apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999999")
PLAIN, METHOD = COLOURS[7], COLOURS[1]
SMOOTHING = 20  # steps


def draw(results: Results, folder: Path) -> list[str]:
    """All pictures, as PNG files in ``folder``; their names."""
    pictures = {
        "similarity.png": similarity,
        "similarity_by_layer.png": similarity_by_layer,
        "activity.png": activity,
        "loss.png": loss,
    }
    for name, picture in pictures.items():
        figure = picture(results)
        figure.savefig(folder / name, dpi=150)
        plt.close(figure)
    return list(pictures)


def similarity(results: Results) -> plt.Figure:
    """The cosines of all pairs of languages, neighbours in the clustering side by side."""
    cosine, languages = results["cosine"]["parallel"], results["languages"]
    matrix = np.array(cosine["matrix"], dtype=float)
    size = max(8.6, 0.36 * len(matrix))
    figure, (tree, heat) = plt.subplots(
        2, 1, figsize=(size, size + 0.6), height_ratios=[1, 5.5], layout="constrained", sharex=False
    )
    linkage = clusters(torch.tensor(matrix))
    order = hierarchy.dendrogram(linkage, ax=tree, no_labels=True, color_threshold=0, above_threshold_color="#555555")
    tree.set_axis_off()
    leaves = order["leaves"]
    codes = [cosine["languages"][leaf] for leaf in leaves]
    shown = matrix[np.ix_(leaves, leaves)]
    np.fill_diagonal(shown, np.nan)  # all ones: nothing to see, and it would take up the colours
    image = heat.imshow(shown, cmap="viridis", aspect="auto")
    if len(codes) <= 16:
        _write_values(heat, shown)
    colours = _family_colours([one["family"] for one in languages.values()])
    labels = [f"{languages[code]['name']}{'*' * languages[code]['low_resource']}" for code in codes]
    heat.set_xticks(range(len(codes)), labels, rotation=45, ha="right", rotation_mode="anchor")
    heat.set_yticks(range(len(codes)), labels)
    for axis in (heat.get_xticklabels(), heat.get_yticklabels()):
        for code, label in zip(codes, axis):
            label.set(color=colours[languages[code]["family"]], fontweight="bold")
    figure.colorbar(image, ax=heat, label="cosine of the gradients, whole model", shrink=0.8)
    figure.legend(
        handles=[Patch(color=colour, label=family) for family, colour in colours.items()],
        loc="outside lower center",
        ncols=len(colours),
        frameon=False,
    )
    figure.suptitle(
        f"Languages clustered by the similarity of their gradients\n"
        f"mean cosine {_said(cosine['within'])} within families, {_said(cosine['across'])} across; "
        f"same held-out things, from step {cosine['averaged_from_step']} on; * low-resource",
        fontsize="medium",
    )
    return figure


def similarity_by_layer(results: Results) -> plt.Figure:
    """Mean cosines within and across families over the steps, one panel a layer."""
    layers = list(results["cosine"]["parallel"]["layers"])
    columns = min(4, len(layers))
    rows = -(-len(layers) // columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(3.1 * columns, 2.8 * rows),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for kind, style, data in (("parallel", "-", "same held-out things"), ("batch", ":", "training batches")):
        cosine = results["cosine"][kind]
        for label, colour in (("within", COLOURS[0]), ("across", COLOURS[1])):
            for axis, layer in zip(axes.flat, layers):
                values = np.array([point[label] for point in cosine["layers"][layer]["by_step"]], dtype=float)
                axis.plot(cosine["steps"], values, style, color=colour, label=f"{label} families, {data}")
    for axis, layer in zip(axes.flat, layers):
        axis.set_title(layer)
        _plain_axes(axis)
    for axis in axes.flat[len(layers) :]:
        axis.set_axis_off()
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    figure.supxlabel("step")
    figure.supylabel("mean cosine of two languages")
    return figure


def activity(results: Results) -> plt.Figure:
    """How often a pair was turned, against how often PCGrad would have acted."""
    found, method = results["activity"], results["arguments"]["method"]
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    for label, key, colour in (
        (f"turned by {method}: similarity below the target", "turned_by_step", METHOD),
        ("PCGrad would act: similarity below 0", "conflicting_by_step", COLOURS[0]),
    ):
        axis.plot(*_smoothed(np.array(found[key], dtype=float)), color=colour, label=label)
    axis.set(xlabel="step", ylabel="share of the measured pairs", title=f"running mean of {SMOOTHING} steps")
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False)
    _plain_axes(axis)
    return figure


def loss(results: Results) -> plt.Figure:
    """Training and held-out loss of both arms, low-resource and other languages apart."""
    low = np.array([one["low_resource"] for one in results["languages"].values()])
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    for arm, colour in (("plain", PLAIN), ("method", METHOD)):
        label = "plain sum" if arm == "plain" else results["arguments"]["method"]
        curves = results["curves"][arm]
        for which, style, name in ((low, "--", "low-resource"), (~low, "-", "others")):
            if not which.any():
                continue
            look = {"color": colour, "linestyle": style, "label": f"{label}, {name}"}
            axes[0].plot(*_smoothed(np.array(curves["train_loss"])[:, which].mean(1)), **look)
            held_out = np.array(list(curves["held_out_loss"].values()))[:, which].mean(1)
            axes[1].plot(list(curves["held_out_loss"]), held_out, marker="o", markersize=4, **look)
    axes[0].set(title=f"training batch, running mean of {SMOOTHING} steps", ylabel="loss, nats a character")
    axes[1].set(title="held-out names")
    axes[1].legend(frameon=False)
    for axis in axes:
        axis.set_xlabel("step")
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.yaxis.set_minor_formatter(ScalarFormatter())
        _plain_axes(axis)
    return figure


def _family_colours(families: Sequence[str]) -> dict[str, str]:
    return dict(zip(dict.fromkeys(families), COLOURS))


def _write_values(axis: Axes, matrix: np.ndarray) -> None:
    middle = (np.nanmin(matrix) + np.nanmax(matrix)) / 2
    for (row, column), value in np.ndenumerate(matrix):
        if row != column:
            colour = "white" if value < middle else "black"
            axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)


def _smoothed(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Steps and running means; the first ones are means of what there is."""
    width = min(SMOOTHING, len(values))
    means = np.array([values[max(0, end - width) : end].mean() for end in range(1, len(values) + 1)])
    return np.arange(1, len(values) + 1), means


def _plain_axes(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)


def _said(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
