"""Language-specific adapters, trained jointly or meta-learned: ``python -m gradvac_kernels.demo.adapters``.

Both arms start from the same weights. Jointly, shared parameters and adapters go down the languages' mean loss. Meta-
learned, adapters are trained for what a step of the shared parameters with them does to the loss of all languages, on
names that those are not trained on (:mod:`gradvac_kernels.meta`).
"""

from __future__ import annotations

import argparse
import math
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from statistics import mean, median, stdev
from typing import TYPE_CHECKING

from .cli import REQUIRED, _Formatter, _languages, _positive, _seeds
from .languages import choices

if TYPE_CHECKING:
    from .adapter_training import Record, Setting

LANGUAGES = ("da", "af", "es", "oc")
ARMS = ("joint", "meta")
WIDTH = 100  # characters


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, train, print."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if len(options.languages) < 2:
        parser.error("argument --languages: expected at least two")
    missing = [name for name in REQUIRED if find_spec(name) is None]
    if missing:
        sys.exit(f"The demo needs {', '.join(missing)}: pip install gradvac_kernels[demo]")

    from .adapter_training import make_setting, train  # these import what may have been missing

    settings = vars(options).copy()
    seeds = settings.pop("seeds")
    begin = time.perf_counter()
    try:
        setting = make_setting(**settings)
    except ValueError as error:
        parser.error(str(error))
    print("\n" + report(setting, {seed: train(setting, seed) for seed in seeds}, time.perf_counter() - begin))


def make_parser() -> argparse.ArgumentParser:
    """The arguments and their defaults."""
    parser = argparse.ArgumentParser(
        prog="python -m gradvac_kernels.demo.adapters",
        description="Train a small transformer, with an adapter for each language, to translate CLDR names from\n"
        "English: once all jointly, once with meta-learned adapters; and compare.",
        epilog=f"languages:\n{choices()}",
        formatter_class=_Formatter,
    )
    add = parser.add_argument
    add("--steps", type=_positive, default=200, help="steps of the shared parameters, in each arm")
    add("--seeds", type=_seeds, default=[0], help="how many, or which: 3 is 0,1,2")
    add("--languages", type=_languages, default=list(LANGUAGES), help=f"default: {','.join(LANGUAGES)}; see below")
    add("--batch-size", type=_positive, default=16, help="names of each language in a step")
    add("--held-out", type=_positive, default=100, help="things whose names are held out, in all languages at once")
    add("--validation", type=_share, default=0.2, help="share of the other names that meta-learned adapters learn from")
    add("--inner-lr", type=_finite, default=0.1, help="size of the step that adapters are judged by")
    add("--temperature", type=_above_zero, default=5.0, help="of drawing the language whose adapter is next")
    return parser


def report(setting: Setting, records: Mapping[int, Mapping[str, Record]], seconds: float) -> str:
    """A table of held-out losses, and what it is worth.

    Args:
        setting: of both arms.
        records: of both arms, by seed.
        seconds: what all of it took.
    """
    from babel import Locale

    losses = {  # [2, seeds] by language
        language: [[record[arm].held_out[language] for record in records.values()] for arm in ARMS]
        for language in setting.languages
    }
    average = [[mean(seed) for seed in zip(*arm)] for arm in zip(*losses.values())]
    header = f"{'':16}{'names':>6} |{'joint':>9}{'meta':>9}{'difference':>16}"
    rule = "-" * len(header)
    rows = [
        _row(
            f"{code:4}{Locale.parse(code).english_name}",
            str(len(setting.train[code] + setting.validation[code])),
            *loss,
        )
        for code, loss in losses.items()
    ]
    better = sum(round(mean(learned) - mean(joint), 3) < 0 for joint, learned in losses.values())
    joint_ms, meta_ms = (median(record[arm].step_ms for record in records.values()) for arm in ARMS)
    one, seeds = len(records) == 1, ", ".join(map(str, records))
    notes = [
        "Held-out loss in nats a character, less is better; difference: meta minus joint, "
        + (f"seed {seeds}." if one else f"mean and standard deviation over the seeds {seeds}."),
        f"Meta-learned adapters are better for {better} of {len(losses)} languages. "
        + (
            "This is one seed: another may change these differences, their signs included."
            if one
            else "Differences of about their standard deviation over so few seeds may be noise."
        ),
        "The arms differ in more than the method: a meta-learned adapter takes a step only when its language is drawn, "
        "and learns from the names set aside; the joint arm trains everything on all names in every step. A step took "
        f"{joint_ms:.0f} ms jointly and {meta_ms:.0f} ms with a meta-step (median); all of it {seconds:.0f} s.",
    ]
    table = [header, rule, *rows, rule, _row("mean", "", *average)]
    return "\n".join([*table, "", *(textwrap.fill(note, WIDTH) for note in notes)])


def _row(name: str, pairs: str, joint: Sequence[float], learned: Sequence[float]) -> str:
    differences = [after - before for before, after in zip(joint, learned)]
    spread = f" ± {stdev(differences):.3f}" if len(differences) > 1 else ""
    return f"{name:16}{pairs:>6} |{mean(joint):9.3f}{mean(learned):9.3f}{f'{mean(differences):+.3f}{spread}':>16}"


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a number between 0 and 1, got {text}")
    return value


def _above_zero(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


def _finite(text: str) -> float:
    value = _above_zero(text)
    if value == math.inf:
        raise argparse.ArgumentTypeError("expected a finite number, got inf")
    return value


if __name__ == "__main__":
    main()
