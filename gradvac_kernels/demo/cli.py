"""The command line: what can be asked for, and where the answer goes."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gradvac_kernels import env

from . import arms
from .languages import DEFAULT, FAMILY_OF, choices

REQUIRED = ("babel", "matplotlib", "sacrebleu", "scipy", "tqdm")


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, run, write, print."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if len(options.languages) < 2:
        parser.error("argument --languages: expected at least two")
    strangers = [language for language in options.vaccinated or () if language not in options.languages]
    if strangers:
        parser.error(f"argument --vaccinated: {', '.join(strangers)} not among the --languages")
    if options.compare is not None:
        try:
            chosen = [arms.parse(text, options.granularity, options.temperature) for text in options.compare.split(",")]
        except ValueError as error:
            parser.error(f"argument --compare: {error}")
        if len({arm.name for arm in chosen}) != len(chosen):
            parser.error(f"argument --compare: expected different arms, got {options.compare!r}")
        options.compare = chosen
    missing = [name for name in REQUIRED if find_spec(name) is None]
    if missing:
        sys.exit(f"The demo needs {', '.join(missing)}: pip install gradvac_kernels[demo]")

    from . import comparison, experiment, plots, report  # these import what may have been missing

    try:
        setting = experiment.make_setting(options, options.temperature)
    except ValueError as error:
        parser.error(str(error))
    options.output.mkdir(parents=True, exist_ok=True)
    found = experiment.compare(options) if options.compare else experiment.run(options, setting)
    results = {"arguments": _plain(options), "versions": _versions(), **found}
    name = "comparison" if options.compare else "results"
    text = (comparison if options.compare else report).report(results)
    written = [f"{name.replace('results', 'report')}.txt", f"{name}.json"]
    (options.output / written[0]).write_text(text + "\n", encoding="utf-8")
    (options.output / written[1]).write_text(json.dumps(results, indent=1, allow_nan=False), encoding="utf-8")
    if not options.compare:
        written += ["similarity.csv", *plots.draw(results, options.output)]
    print(f"\n{text}\n\n{', '.join(written)}: in {options.output}")


def _plain(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments as JSON has them."""
    values = vars(options) | {"output": str(options.output)}
    if options.temperature is not None and math.isinf(options.temperature):
        values["temperature"] = "inf"  # JSON has none
    return values | {"compare": [arm.name for arm in options.compare or ()]}


def _versions() -> dict[str, Any]:
    return env.report() | {name: importlib.metadata.version(name) for name in REQUIRED}


def make_parser() -> argparse.ArgumentParser:
    """The arguments and their defaults."""
    parser = argparse.ArgumentParser(
        prog="python -m gradvac_kernels.demo",
        description="Train a small transformer to translate CLDR names from English, once with the plain sum of the\n"
        "languages' losses and once with their gradients vaccinated, and compare.",
        epilog=f"languages:\n{choices()}\n\nmethods:\n"
        + "\n".join(f"  {name}: {meaning}" for name, meaning in arms.METHODS.items())
        + f"\n\narms of a comparison: method[/granularity][@temperature], such as\n  {arms.COMPARISON}",
        formatter_class=_Formatter,
    )
    add = parser.add_argument
    add("--steps", type=_positive, default=300, help="training steps of each arm")
    add("--seeds", type=_seeds, default=[0], help="how many, or which: 3 is 0,1,2")
    add(
        "--languages",
        type=_languages,
        default=list(DEFAULT),
        help=f"such as {','.join(DEFAULT)}, the default; see below",
    )
    add(
        "--vaccinated", type=_languages, help="languages whose gradients may be turned (default: the low-resource ones)"
    )
    add("--method", choices=arms.METHODS, default="gradvac", help="of the second arm; see below")
    add(
        "--granularity",
        choices=arms.GRANULARITIES,
        default="all_layer",
        help="what is compared and turned as one",
    )
    add(
        "--capture",
        choices=("stream", "buffer"),
        default="stream",
        help="gradients by language from one mixed batch, or from a pass for each language",
    )
    add(
        "--temperature",
        type=_temperature,
        help="draw languages with P proportional to pairs^(1 / temperature); without it, equal parts of all",
    )
    add(
        "--compare",
        metavar="ARMS",
        help="instead of one method against the plain sum: these, separated by commas; see below. Stopped, the same "
        "command goes on where it was",
    )
    add("--jobs", type=_positive, default=1, help="trainings of a comparison that run at the same time")
    add("--target", type=_cosine, default=0.5, help="similarity target of --method fixed")
    add("--beta", type=_fraction, default=0.01, help="weight of a new similarity in the moving target")
    add("--batch-size", type=_positive, default=16, help="names of each language in a step")
    add("--held-out", type=_positive, default=100, help="things whose names are held out, in all languages at once")
    add("--measure-every", type=_positive, default=10, help="steps from one measurement of all cosines to the next")
    add("--output", type=Path, default=Path("demo-output"), help="folder for pictures and figures")
    return parser


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Adds short defaults to the help; those of lists and of None say it themselves."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.option_strings == ["-h", "--help"] or action.default is None or isinstance(action.default, list):
            return action.help
        return f"{action.help or ''} (default: %(default)s)".strip()


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text}")
    return value


def _temperature(text: str) -> float:
    try:
        return arms.positive(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _cosine(text: str) -> float:
    value = float(text)
    if not -1 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a cosine, got {text}")
    return value


def _seeds(text: str) -> list[int]:
    if "," not in text:
        return list(range(_positive(text)))
    seeds = [int(seed) for seed in text.split(",") if seed]
    if not seeds or len(set(seeds)) != len(seeds):
        raise argparse.ArgumentTypeError(f"expected different seeds, got {text!r}")
    return seeds


def _languages(text: str) -> list[str]:
    languages = text.split(",")
    unknown = [language for language in languages if language not in FAMILY_OF]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"unknown: {', '.join(map(repr, unknown))}; possible are {', '.join(sorted(FAMILY_OF))}"
        )
    if len(set(languages)) != len(languages):
        raise argparse.ArgumentTypeError(f"expected different languages, got {text!r}")
    return languages
