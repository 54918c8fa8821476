"""Say what was measured: the table, and the paragraphs under it. Every figure and verdict is computed."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from scipy.stats import ttest_1samp

from .results import Results

WIDTH = 118  # characters
_NAMES = {"loss": "loss", "chrf": "chrF"}
_DIGITS = {"loss": 3, "chrf": 1}


def report(results: Results) -> str:
    """The whole text."""
    paragraphs = (similarity(results), activity(results), cost(results), *verdict(results))
    return "\n\n".join((table(results), *(textwrap.fill(paragraph, WIDTH) for paragraph in paragraphs)))


def table(results: Results) -> str:
    """Loss and chrF of both arms by language."""
    method, seeds = results["arguments"]["method"], results["arguments"]["seeds"]
    found = results["languages"]
    wide = 11 if len(seeds) == 1 else 16
    columns = f" |{'plain':>9}{method:>9}{'difference':>{wide}}"
    header = (
        f"{'':38} |{'held-out loss':^{18 + wide}} |{'chrF':^{18 + wide}} |{'share of pairs':^16}\n"
        f"{'language':22}{'family':10}{'pairs':>6}" + 2 * columns + f" |{'turned':>8}{'cos < 0':>8}"
    )
    rule = "-" * len(header.splitlines()[-1])
    parts = {
        "mean of the low-resource languages": [one for one in found.values() if one["low_resource"]],
        "mean of the other languages": [one for one in found.values() if not one["low_resource"]],
        "mean of all languages": list(found.values()),
    }
    rows = [_row(code, one) for code, one in found.items()]
    means = [f"{name:38}{_figures(part)}" for name, part in parts.items() if part]
    note = (
        f"* low-resource (less than half the pairs of the largest), v vaccinated. Loss: nats a character, less is "
        f"better; chrF: 0 to 100, more is better. Difference: {method} minus plain sum, {_seeds(seeds)}."
    )
    return "\n".join([header, rule, *rows, rule, *means, textwrap.fill(note, WIDTH)])


def similarity(results: Results) -> str:
    """Whether languages of a family pull the model the same way."""
    parallel, batch = results["cosine"]["parallel"], results["cosine"]["batch"]
    control = results["control"]
    count = len(results["languages"])
    return (
        f"Cosine of two languages' gradients (whole model, mean from step {parallel['averaged_from_step']} on): "
        f"{_plain(parallel['within'])} within a family and {_plain(parallel['across'])} across families on the same "
        f"held-out things, {_plain(batch['within'])} and {_plain(batch['across'])} in the training batches, each of "
        f"other things. The most similar language (same things) is of the same family for "
        f"{parallel['nearest_in_family']} of {parallel['with_relatives']} languages. Between two batches that share no "
        f"draw: {_plain(control['within_language'])} of a language with itself (at least "
        f"{_plain(control['smallest_within'])}), {_plain(control['across_languages'])} with another one (at most "
        f"{_plain(control['largest_across'])}); {control['above_all_others']} of {count} languages are more similar to "
        f"themselves than to any other."
    )


def activity(results: Results) -> str:
    """How often the method acted."""
    found, method = results["activity"], results["arguments"]["method"]
    if not found["measured_pairs"]:
        return f"{method}: no pair was measured and none was turned."
    return (
        f"{method} turned {_percent(found['turned'])} of {found['measured_pairs']} measured pairs (similarity below "
        f"target); PCGrad's condition, similarity below 0, held for {_percent(found['conflicting'])} of them."
    )


def cost(results: Results) -> str:
    """What a step costs, and where."""
    time = results["time"]
    ways = {
        "stream": "each language's gradients come from one backward of one mixed batch",
        "buffer": "there is a backward for each language",
    }
    return (
        f"A step took {time['method_step_ms']:.0f} ms (median), {time['step_ratio']:.2f} times the "
        f"{time['plain_step_ms']:.0f} ms of a plain-sum step: {ways[results['arguments']['capture']]}. Comparing and "
        f"turning the gradients takes {time['aggregation_ms']:.1f} ms of it, following their similarity "
        f"{time['tracker_ms']:.2f} ms ({100 * time['tracker_ms'] / time['method_step_ms']:.2f} %)."
    )


def verdict(results: Results) -> tuple[str, ...]:
    """Who did better, where, and how much that is worth: a paragraph each on loss, chrF and noise."""
    return _compare(results, "loss"), _compare(results, "chrf"), _noise(results)


def _compare(results: Results, figure: str) -> str:
    sign = -1 if figure == "loss" else 1  # of a difference for the better
    method, digits, languages = results["arguments"]["method"], _DIGITS[figure], results["languages"]
    differences = {code: _difference(found, figure).mean() for code, found in languages.items()}
    shown = {code: sign * round(value, digits) for code, value in differences.items()}

    def part(name: str, low: tuple[bool, ...]) -> str | None:
        codes = [code for code, found in languages.items() if found["low_resource"] in low]
        if not codes:
            return None
        mean = np.mean([differences[code] for code in codes])
        return f"{sum(shown[code] > 0 for code in codes)} of {len(codes)} {name} (mean difference {mean:+.{digits}f})"

    parts = filter(None, (part("low-resource ones", (True,)), part("others", (False,))))
    worse = [code for code in shown if shown[code] < 0]
    equal = [code for code in shown if shown[code] == 0]
    return (
        f"Held-out {_NAMES[figure]}: {method} is better for {part('languages', (True, False))}: {', '.join(parts)}. "
        f"The plain sum is better for {', '.join(worse) or 'none'}"
        + (f", and no different in the digits shown for {', '.join(equal)}." if equal else ".")
    )


def _noise(results: Results) -> str:
    seeds = results["arguments"]["seeds"]
    if len(seeds) == 1:
        return (
            "This is one seed, and another may change these differences, their signs included: take them as noise "
            "until several seeds (--seeds 5) agree."
        )
    lines = []
    for figure, digits in _DIGITS.items():
        by_seed = np.mean([_difference(found, figure) for found in results["languages"].values()], axis=0)  # [seeds]
        low, high = ttest_1samp(by_seed, 0).confidence_interval()
        lines.append(
            f"Over {len(seeds)} seeds the mean difference in {_NAMES[figure]} is {by_seed.mean():+.{digits}f}, its "
            f"95 % confidence interval [{low:+.{digits}f}, {high:+.{digits}f}] "
            f"{'excludes' if low > 0 or high < 0 else 'does not exclude'} zero "
            f"(by seed {', '.join(f'{value:+.{digits}f}' for value in by_seed)})."
        )
    return " ".join(lines)


def _row(code: str, found: Results) -> str:
    name = f"{code:4}{found['name']} {'*' * found['low_resource']}{'v' * found['vaccinated']}"
    shares = f" |{_percent(found['turned']):>8}{_percent(found['conflicting']):>8}"
    return f"{name:22}{found['family']:10}{found['train_pairs']:6d}{_figures([found])}{shares}"


def _figures(found: Sequence[Results]) -> str:
    """Means over these languages: loss and chrF of both arms, and the differences with their spread over the seeds."""
    cells = ""
    for figure, digits in _DIGITS.items():
        plain, method = (np.mean([one[figure][arm] for one in found]) for arm in ("plain", "method"))
        differences = np.mean([_difference(one, figure) for one in found], axis=0)  # [seeds]
        spread = f" ± {differences.std(ddof=1):.{digits}f}" if len(differences) > 1 else ""
        difference = f"{differences.mean():+.{digits}f}{spread}"
        cells += f" |{plain:9.{digits}f}{method:9.{digits}f}{difference:>{16 if spread else 11}}"
    return cells


def _difference(found: Results, figure: str) -> np.ndarray:
    """By seed, the method's figure minus the plain sum's."""
    return np.subtract(found[figure]["method"], found[figure]["plain"])


def _seeds(seeds: Sequence[int]) -> str:
    if len(seeds) == 1:
        return f"seed {seeds[0]}"
    return f"mean and standard deviation over the seeds {', '.join(map(str, seeds))}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"


def _plain(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
