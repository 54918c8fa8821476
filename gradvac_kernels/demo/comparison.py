"""Many arms side by side: their figures over the seeds, and the table."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import ttest_1samp

from .results import Results

_DIGITS = {"loss": 3, "chrf": 1}
_BETTER = {"loss": -1, "chrf": 1}
_PARTS = {"low": "low-resource", "others": "others", "all": "all"}
WIDTH = 118  # characters


class Run(NamedTuple):
    """What one training gave; T languages."""

    loss: list[float]  # [T], held out, in nats a character
    chrf: list[float]  # [T]
    step_seconds: list[float]


def gather(
    languages: Sequence[str], runs: Mapping[str, Sequence[Run]], low: Sequence[str], vaccinated: Sequence[str]
) -> Results:
    """By arm, the held-out figures of each seed, as plain numbers: means over the low-resource languages, over the
    others and over all."""
    is_low = np.array([language in low for language in languages])
    parts = {"low": is_low, "others": ~is_low, "all": np.ones_like(is_low)}

    def means(values: Sequence[Sequence[float]]) -> dict[str, list[float]]:  # [seeds, T]
        return {part: np.asarray(values)[:, which].mean(1).tolist() for part, which in parts.items() if which.any()}

    return {
        "low_resource": list(low),
        "vaccinated": list(vaccinated),
        "arms": {
            arm: {
                "loss": means([run.loss for run in found]),
                "chrf": means([run.chrf for run in found]),
                "step_ms": 1e3 * float(np.median([second for run in found for second in run.step_seconds])),
            }
            for arm, found in runs.items()
        },
    }


def report(results: Results) -> str:
    """The table, and which differences from the first arm are larger than their spread over the seeds."""
    found, seeds = results["arms"], results["arguments"]["seeds"]
    first = next(iter(found))
    parts = [part for part in _PARTS if part in found[first]["loss"]]
    wide = 8 + 9 * (len(seeds) > 1)
    header = f"{'':24}" + "".join(f" |{name:^{len(parts) * wide}}" for name in ("held-out loss", "chrF"))
    below = f"{'arm':24}" + 2 * (" |" + "".join(f"{_PARTS[part]:>{wide}}" for part in parts)) + " | step"
    rows = []
    for arm, its in found.items():
        cells = ""
        for figure, digits in _DIGITS.items():
            cells += " |" + "".join(f"{_spread(its[figure][part], digits):>{wide}}" for part in parts)
        rows.append(f"{arm:24}{cells} |{its['step_ms'] / found[first]['step_ms']:4.2f}x")
    rule = "-" * max(map(len, (header, below, *rows)))
    note = (
        f"Means over languages{' +- standard deviation over' if len(seeds) > 1 else ','} seed"
        f"{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}. Loss: nats a character, less is better; chrF: 0 to "
        f"100, more is better. gradvac, fixed and pcgrad turn {', '.join(results['vaccinated'])} only (PCGrad as "
        f"published turns all); low-resource are {', '.join(results['low_resource']) or 'none'}. The learning rate was "
        f"chosen for the plain sum. Step: median time over that of {first}, with {results['arguments']['jobs']} "
        f"training{'s' * (results['arguments']['jobs'] > 1)} at a time."
    )
    paragraphs = (note, verdict(results))
    return "\n".join([header, below, rule, *rows, rule, *(textwrap.fill(text, WIDTH) for text in paragraphs)])


def verdict(results: Results) -> str:
    """Each arm's mean differences from the first one, seed by seed, where their 95 % confidence excludes zero."""
    found, seeds = results["arms"], results["arguments"]["seeds"]
    first = next(iter(found))
    if len(seeds) < 2:
        return "One seed: differences may be noise, their signs included."
    beyond = []
    for arm, its in list(found.items())[1:]:
        for figure, digits in _DIGITS.items():
            for part in its[figure]:
                difference = np.subtract(its[figure][part], found[first][figure][part])
                bounds = ttest_1samp(difference, 0).confidence_interval()
                if bounds.low > 0 or bounds.high < 0:
                    word = "better" if difference.mean() * _BETTER[figure] > 0 else "worse"
                    beyond.append(
                        f"{arm} {word} in {'chrF' if figure == 'chrf' else figure}, {_PARTS[part]} "
                        f"({difference.mean():+.{digits}f} [{bounds.low:+.{digits}f}, {bounds.high:+.{digits}f}])"
                    )
    comparisons = sum(len(its[figure]) for its in list(found.values())[1:] for figure in _DIGITS)
    return (
        f"Differences from {first}, seed by seed, whose 95 % confidence interval excludes zero: "
        f"{'; '.join(beyond) or 'none'}. All others are within the noise of {len(seeds)} seeds; of {comparisons} "
        f"differences looked at, chance alone puts {comparisons / 20:.1f} outside."
    )


def _spread(values: Sequence[float], digits: int) -> str:
    spread = f" +- {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"
