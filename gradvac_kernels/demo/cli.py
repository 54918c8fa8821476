"""The command line: what can be asked for, and where the answer goes."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from gradvac_kernels import env

from .languages import DEFAULT, FAMILY_OF, choices

REQUIRED = ("babel", "matplotlib", "sacrebleu", "scipy", "tqdm")
METHODS = {
    "gradvac": "moving targets",
    "pcgrad": "constant target 0",
    "fixed": "constant target --target",
    "sum": "nothing is turned: what differs from the plain sum is rounding",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, run, write, print."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if len(options.languages) < 2:
        parser.error("argument --languages: expected at least two")
    strangers = [language for language in options.vaccinated or () if language not in options.languages]
    if strangers:
        parser.error(f"argument --vaccinated: {', '.join(strangers)} not among the --languages")
    missing = [name for name in REQUIRED if find_spec(name) is None]
    if missing:
        sys.exit(f"The demo needs {', '.join(missing)}: pip install gradvac_kernels[demo]")

    from . import experiment, plots, report  # these import what may have been missing

    try:
        setting = experiment.make_setting(options)
    except ValueError as error:
        parser.error(str(error))
    options.output.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    results = {
        "arguments": {name: str(value) if name == "output" else value for name, value in vars(options).items()},
        "versions": env.report() | {name: importlib.metadata.version(name) for name in REQUIRED},
        **experiment.run(options, setting),
    }
    results["time"]["experiment_s"] = time.perf_counter() - begin
    text = report.report(results)
    (options.output / "report.txt").write_text(text + "\n", encoding="utf-8")
    (options.output / "results.json").write_text(json.dumps(results, indent=1, allow_nan=False), encoding="utf-8")
    pictures = plots.draw(results, options.output)
    print(f"\n{text}\n\n{', '.join(['report.txt', 'results.json', *pictures])}: in {options.output}")


def make_parser() -> argparse.ArgumentParser:
    """The arguments and their defaults."""
    parser = argparse.ArgumentParser(
        prog="python -m gradvac_kernels.demo",
        description="Train a small transformer to translate CLDR names from English, once with the plain sum of the\n"
        "languages' losses and once with their gradients vaccinated, and compare.",
        epilog=f"languages:\n{choices()}\n\nmethods:\n"
        + "\n".join(f"  {name}: {meaning}" for name, meaning in METHODS.items()),
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
    add("--method", choices=METHODS, default="gradvac", help="of the second arm; see below")
    add(
        "--granularity",
        choices=("whole_model", "enc_dec", "all_layer", "all_matrix"),
        default="all_layer",
        help="what is compared and turned as one",
    )
    add(
        "--capture",
        choices=("stream", "buffer"),
        default="stream",
        help="gradients by language from one mixed batch, or from a pass for each language",
    )
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


def _cosine(text: str) -> float:
    value = float(text)
    if not -1 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a cosine, got {text}")
    return value


def _seeds(text: str) -> list[int]:
    if "," not in text:
        return list(range(_positive(text)))
    return [int(seed) for seed in text.split(",") if seed]


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
