"""Draw what was measured."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from gradvac_kernels import plots
from gradvac_kernels.groups import encoder_or_decoder

from .results import Results

SMOOTHING = 20  # steps


def draw(results: Results, folder: Path) -> list[str]:
    """All pictures, as PNG files in ``folder``; their names."""
    pictures = {
        "similarity.png": similarity,
        "control.png": control,
        "similarity_by_layer.png": similarity_by_layer,
        "encoder_decoder.png": encoder_decoder,
        "activity.png": activity,
        "weights.png": weights,
        "loss.png": loss,
    }
    if not results["activity"]["measured_pairs"]:
        del pictures["activity.png"]  # the method turns none
    if not {"encoder", "decoder"} <= {encoder_or_decoder(layer) for layer in results["cosine"]["parallel"]["layers"]}:
        del pictures["encoder_decoder.png"]  # the whole model is one group
    for name, picture in pictures.items():
        picture(results).savefig(folder / name, dpi=150)
    return list(pictures)


def similarity(results: Results) -> Figure:
    """The cosines of all pairs of languages, neighbours in the clustering side by side."""
    cosine, languages = results["cosine"]["parallel"], results["languages"].values()
    return plots.heatmap(
        cosine["matrix"],
        [f"{one['name']}{'*' * one['low_resource']}" for one in languages],
        families=[one["family"] for one in languages],
        label="cosine of the gradients, whole model",
        title="Languages clustered by the similarity of their gradients\n"
        f"mean cosine {_said(cosine['within'])} within families, {_said(cosine['across'])} across; "
        f"same held-out things, from step {cosine['averaged_from_step']} on; * low-resource",
    )


def control(results: Results) -> Figure:
    """Two batches that share no draw: a language against itself on the diagonal, against the others beside it."""
    found, languages = results["control"], results["languages"].values()
    matrix = np.array(found["matrix"], dtype=float)
    return plots.heatmap(
        matrix,
        [f"{one['name']}{'*' * one['low_resource']}" for one in languages],
        families=[one["family"] for one in languages],
        control=matrix.diagonal(),
        label="cosine of the gradients of two batches, whole model",
        title="Two independent batches of every language\n"
        f"mean cosine {_said(found['within_language'])} of a language with itself, "
        f"{_said(found['across_languages'])} with others; from step {found['averaged_from_step']} on; * low-resource",
    )


def weights(results: Results) -> Figure:
    """What each language's gradient weighs in the update, in the mean over the groups."""
    found = results["weights"]
    return plots.weights(range(1, len(found) + 1), found, list(results["languages"]), smooth=SMOOTHING)


def similarity_by_layer(results: Results) -> Figure:
    """Mean cosines within and across families over the steps, one panel a layer."""
    layers = list(results["cosine"]["parallel"]["layers"])
    columns = min(4, len(layers))
    rows = -(-len(layers) // columns)
    figure = Figure((3.1 * columns, 2.8 * rows + 0.7), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for kind, style, data in (("parallel", "-", "same held-out things"), ("batch", ":", "training batches")):
        cosine = results["cosine"][kind]
        for axis, layer in zip(axes.flat, layers):
            by_step = cosine["layers"][layer]["by_step"]
            lines = {f"{which} families, {data}": [one[which] for one in by_step] for which in ("within", "across")}
            plots.over_steps(cosine["steps"], lines, ylabel="", style=style, ax=axis)
            axis.set(title=layer, xlabel="")
    for axis in axes.flat[len(layers) :]:
        axis.set_axis_off()
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside upper center", ncols=columns, frameon=False)
    figure.supxlabel("step", fontsize="medium")
    figure.supylabel("mean cosine of two languages", fontsize="medium")
    return figure


def encoder_decoder(results: Results) -> Figure:
    """Each pair of languages by its cosines in the encoder and in the decoder."""
    cosine, languages = results["cosine"]["parallel"], results["languages"]
    figure = plots.encoder_against_decoder(
        [found["matrix"] for found in cosine["layers"].values()],
        list(cosine["layers"]),
        list(languages),
        families=[one["family"] for one in languages.values()],
    )
    figure.suptitle(
        f"Pairs of languages, same held-out things, from step {cosine['averaged_from_step']} on", fontsize="medium"
    )
    return figure


def activity(results: Results) -> Figure:
    """How often a pair was turned, against how often PCGrad would have acted."""
    found = results["activity"]
    turned, conflicting = found["turned_by_step"], found["conflicting_by_step"]
    steps = range(1, len(turned) + 1)
    return plots.rates(steps, turned, conflicting, smooth=SMOOTHING, method=results["arguments"]["method"])


def loss(results: Results) -> Figure:
    """Training and held-out loss of both arms, low-resource and other languages apart."""
    low = np.array([one["low_resource"] for one in results["languages"].values()])
    arms = {"plain": "plain sum", "method": results["arguments"]["method"]}
    figure = Figure((10, 4.2), layout="constrained")
    train, held_out = figure.subplots(1, 2, sharey=True)
    for which, style, name in ((~low, "-", "others"), (low, "--", "low-resource")):
        if not which.any():
            continue
        trained, tested = {}, {}
        for arm, curves in results["curves"].items():
            line = f"{arms.get(arm, arm)}, {name}"
            trained[line] = np.array(curves["train_loss"])[:, which].mean(1)
            tested[line] = np.array(list(curves["held_out_loss"].values()))[:, which].mean(1)
        draw = partial(plots.over_steps, ylabel="loss, nats a character", log=True, style=style)
        draw(range(1, len(curves["train_loss"]) + 1), trained, smooth=SMOOTHING, ax=train)
        draw(list(curves["held_out_loss"]), tested, ax=held_out)
    train.set_title("training batch")
    held_out.set(title="held-out names", ylabel="")
    held_out.legend(frameon=False)
    return figure


def _said(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
