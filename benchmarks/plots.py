"""Pictures of a run: how the cost grows, how near the ceilings it is, and how far ahead of each peer."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .cases import SCALING, Case

_PEER = "torch-sum-out"
_COLOURS = {"ours": "#0072b2", "peer": "#999999", "floor": "#d55e00"}
_MARKERS = {"gram": "o", "combine": "s", "vaccinate": "D"}


def draw(results: dict[str, Any], stem: Path) -> list[Path]:
    """Writes ``stem``-scaling.svg and so on, and returns the paths; what was not measured is not drawn."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "gradvac_kernels", "font.size": 9, "axes.spines.top": False})
    matplotlib.rcParams.update({"axes.spines.right": False, "legend.frameon": False})
    from matplotlib import pyplot as plt

    ours = results["ours"][0]
    made = []
    pictures: dict[str, Callable[[Any, list[dict[str, Any]], str], bool]] = {
        "scaling": _scaling,
        "roofline": _roofline,
        "peers": _peers,
    }
    for name, picture in pictures.items():
        figure = plt.figure(layout="constrained")
        if picture(figure, results["rows"], ours):
            path = stem.with_name(f"{stem.name}-{name}.svg")
            figure.savefig(path, metadata={"Date": None})
            made.append(path)
        plt.close(figure)
    return made


def _key(row: dict[str, Any]) -> Case:
    import torch

    return Case(row["T"], row["P"], row["K"], getattr(torch, row["dtype"]), row["device"], row["share"])


def _scaling(figure: Any, rows: list[dict[str, Any]], ours: str) -> bool:
    """Time against T, P and K, on log axes."""
    found: dict[Case, dict[str, dict[str, Any]]] = {}
    for row in rows:
        if row.get("suite") == "scaling":
            found.setdefault(_key(row), {})[row["implementation"]] = row
    if not found:
        return False
    figure.set_size_inches(10, 3.4)
    axes = figure.subplots(1, 3)
    for axis, name in zip(axes, "TPK"):
        cases = [case for case in SCALING[name] if ours in found.get(case, {})]
        values = [getattr(case, name) for case in cases]
        mine = [found[case][ours] for case in cases]
        axis.plot(values, _milliseconds(mine), "o-", color=_COLOURS["ours"], label=f"vaccinate, {ours}")
        peers = [case for case in cases if _PEER in found[case]]
        times = _milliseconds(found[case][_PEER] for case in peers)
        axis.plot(
            [getattr(case, name) for case in peers], times, "s-", color=_COLOURS["peer"], label="torch's plain sum"
        )
        floors = [1e3 * row["floor_s"] for row in mine]
        axis.plot(values, floors, "--", color=_COLOURS["floor"], label="floor of two passes")
        axis.set_xscale("log", base=10 if name == "P" else 2)
        axis.set_yscale("log")
        low, high = axis.get_ylim()
        axis.set_ylim(low / 2, 2 * high)  # noise is not to look like growth
        fixed = ", ".join(f"{other} = {getattr(cases[0], other):,}" for other in "TPK" if other != name)
        axis.set_title(fixed, fontsize=9)
        axis.set_xlabel({"T": "tasks T", "P": "parameters P", "K": "groups K"}[name])
        if name != "P":
            axis.set_xticks(values, [str(value) for value in values])
            axis.minorticks_off()
    axes[0].set_ylabel("milliseconds a step")
    axes[0].legend()
    return True


def _milliseconds(rows: Iterable[dict[str, Any]]) -> list[float]:
    return [1e3 * row["median_s"] for row in rows]


def _roofline(figure: Any, rows: list[dict[str, Any]], ours: str) -> bool:
    """Multiply-adds a second against multiply-adds a byte, each as a share of what its ceilings allow."""
    mine = [row for row in rows if row["op"] in _MARKERS and row["implementation"] == ours]
    mine = [row for row in mine if "multiply_adds_per_s" in row]
    if not mine:
        return False
    read, peak = (
        statistics.median(row[name] for row in mine) for name in ("streaming_read_bytes_per_s", "multiply_adds_per_s")
    )
    figure.set_size_inches(6, 4)
    axis = figure.subplots()
    intensities = sorted({row["operations"] / row["bytes"] for row in mine} | {peak / read})
    roof = [min(peak, read * intensity) / 1e9 for intensity in intensities]
    axis.plot(intensities, roof, "-", color=_COLOURS["floor"], label="ceilings (medians of the run)")
    for op, marker in _MARKERS.items():
        for colour, large in (("#0072b2", True), ("#56b4e9", False)):
            some = [row for row in mine if row["op"] == op and (row["P"] >= 1_000_000) == large]
            axis.plot(
                [row["operations"] / row["bytes"] for row in some],
                [row["operations"] / row["median_s"] / 1e9 for row in some],
                marker,
                color=colour,
                markersize=4,
                label=f"{op}, P {'≥' if large else '<'} 1M" if some else None,
            )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel("multiply-adds a byte")
    axis.set_ylabel("10⁹ multiply-adds a second")
    axis.legend()
    return True


def _peers(figure: Any, rows: list[dict[str, Any]], ours: str) -> bool:
    """How many times the time of ours each peer takes, a dot a case."""
    times: dict[Any, dict[str, float]] = {}
    for row in rows:
        if row["op"] == "vaccinate" and row.get("suite") == "operators":
            times.setdefault(_key(row), {})[row["implementation"]] = row["median_s"]
    ratios: dict[str, list[float]] = {}
    for found in times.values():
        for name, seconds in found.items():
            if name != ours and ours in found:
                ratios.setdefault(name, []).append(seconds / found[ours])
    if not ratios:
        return False
    names = sorted(ratios, key=lambda name: statistics.median(ratios[name]))
    figure.set_size_inches(7, 0.35 * len(names) + 1)
    axis = figure.subplots()
    for place, name in enumerate(names):
        axis.plot(ratios[name], [place] * len(ratios[name]), "o", color=_COLOURS["ours"], alpha=0.6, markersize=5)
        axis.plot([statistics.median(ratios[name])], [place], "|", color=_COLOURS["floor"], markersize=16)
    axis.axvline(1, color=_COLOURS["peer"], linewidth=0.8)
    axis.set_yticks(range(len(names)), names)
    axis.set_xscale("log")
    axis.set_xlabel(f"time of vaccinate / time of {ours} (a dot a case, a bar for the median)")
    return True
