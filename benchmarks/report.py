"""Results as a file, as tables and as pictures: ``python -m benchmarks.report`` makes those of all runs under
``results/``, the tables in the README.

``--check`` writes nothing, and exits with 1 where the README shows something else. ``--compare OLD NEW [AGAIN]`` prints
how the time of every row changed; AGAIN, a second run of NEW, says how much two runs differ by themselves.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from gradvac_kernels import env

from . import plots
from .cases import short
from .contest import backends

_ROOT = Path(__file__).parent.parent
_NOTES = {"cross_gram": " of one half of the T rows with the other"}
_CEILINGS = ("streaming_read_bytes_per_s", "multiply_adds_per_s")


def collect(rows: list[dict[str, Any]], device: str) -> dict[str, Any]:
    """The rows of a run with all that is needed to read them: machine, versions, commit and ceilings."""
    facts = env.report()
    return {
        "machine": {
            name: facts[name] for name in (("cpu", "instruction set") if device == "cpu" else ("gpu",)) if name in facts
        },
        "threads": torch.get_num_threads(),
        "versions": {
            **{name: facts[name] for name in ("gradvac_kernels", "python", "torch", "triton")},
            "torchjd": _version("torchjd"),
        },
        "commit": _commit(),
        "ours": backends(device),
        "ceilings": {name: _median([row[name] for row in rows if name in row]) for name in _CEILINGS},
        "rows": rows,
    }


def dump(results: dict[str, Any]) -> str:
    """JSON with one row a line."""
    head = json.dumps({**results, "rows": []}, indent=2)
    rows = ",\n".join(f"    {json.dumps(row)}" for row in results["rows"])
    return head.replace('"rows": []', f'"rows": [\n{rows}\n  ]') + "\n"


def markdown(results: dict[str, Any]) -> str:
    """Machine and ceilings in a paragraph, then one table an operator."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    read, multiply_adds = ((results["ceilings"][name] or 0) / 1e9 for name in _CEILINGS)
    kind = "bfloat16" if "gpu" in results["machine"] else "float32"
    machine = ", ".join(value.split(" (")[0] for value in results["machine"].values())
    ceilings = f"streaming read {read:.3g} GB/s"
    if multiply_adds:
        ceilings += f", {multiply_adds:.3g} G {kind} multiply-adds/s"
    head = (
        f"{machine}; {results['threads']} threads; {versions}; commit {results['commit']}. Ceilings, measured in the "
        f"same run: {ceilings}. Medians; `x` is the time of an implementation divided by ours; the floor is the least "
        "time that these ceilings allow (above 100 % where a group is still in the cache when it is combined)."
    )
    if "note" in results:
        head += f" {results['note']}"
    measured = {row["op"] for row in results["rows"] if row["suite"] != "scaling"}
    ops = [op for op in ("gram", "cross_gram", "coefficients", "combine", "vaccinate") if op in measured]
    tables = [f"**{op}**{_NOTES.get(op, '')}\n\n{_table(results, op)}" for op in ops]
    if "step" in measured:
        tables.append(f"**A whole training step** of the demo's model\n\n{_step_table(results)}")
    if any(row["suite"] == "scaling" for row in results["rows"]):
        tables.append(
            f"**How it grows**: `vaccinate` with other numbers of tasks, parameters and groups\n\n{_growth(results)}"
        )
    return "\n\n".join([head, *tables])


def _table(results: dict[str, Any], op: str) -> str:
    cases: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in results["rows"]:
        if row["op"] == op and row["suite"] == "operators":
            cases.setdefault((row["T"], row["P"], row["K"], row["dtype"]), {})[row["implementation"]] = row
    names = list(dict.fromkeys(name for found in cases.values() for name in found))
    ours = next((name for name in results["ours"] if name in names), names[0])
    others = [name for name in names if name != ours]
    has_memory = any("peak_memory_bytes" in row for found in cases.values() for row in found.values())
    lines = [["T", "P", "K", "dtype", f"`{ours}`", "of floor", *["memory"] * has_memory, *others]]
    lines.append(["---:", "---:", "---:", ":---", *["---:"] * (len(lines[0]) - 4)])
    for (T, P, K, dtype), found in cases.items():
        mine = found.get(ours, {})
        memory = mine.get("peak_memory_bytes")
        lines.append(
            [str(T), short(P), str(K), dtype]
            + ([f"{_digits(mine['median_s'] * 1e3)} ms", f"{mine['fraction_of_floor']:.0%}"] if mine else ["-", "-"])
            + ["-" if memory is None else f"{memory / 2**20:.1f} MiB"] * has_memory
            + [
                f"{_digits(found[name]['median_s'] / mine['median_s'])}x" if mine and name in found else "-"
                for name in others
            ]
        )
    return _aligned(lines)


def _step_table(results: dict[str, Any]) -> str:
    """Times as multiples of the plain sum's, memory as what is needed beyond its peak."""
    cases: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in results["rows"]:
        if row["op"] == "step":
            key = (row["T"], row["samples"], row["granularity"], row["wait"])
            cases.setdefault(key, {})[row["implementation"]] = row
    header = ["T", "samples a task", "granularity", "idle threads", "plain sum", "`batch`", "a pass a task"]
    header += ["`batch` / passes", "aggregation", "memory: `batch`", "T x largest group", "T x P"]
    lines = [header, ["---:", "---:", ":---", ":---", *["---:"] * 8]]
    for (T, samples, granularity, wait), found in cases.items():
        if len(found) < 3:  # not all of them were asked for
            continue
        plain, stream, buffer = (found[way] for way in ("plain", "stream", "buffer"))
        more = stream["peak_memory_bytes"] - plain["peak_memory_bytes"]
        times = [found[way]["median_s"] / plain["median_s"] for way in ("stream", "buffer")]
        lines.append(
            [str(T), samples, granularity, {"passive": "sleep", "active": "spin"}[wait]]
            + [f"{_digits(plain['median_s'] * 1e3)} ms", *(f"{time:.2f}x" for time in times)]
            + [f"{stream['median_s'] / buffer['median_s']:.2f}"]
            + [f"{buffer['aggregation_s'] / plain['median_s']:.1%}"]
            + [f"{bytes / 2**20:.1f} MiB" for bytes in (more, plain["slab_bytes"], 4 * T * plain["P"])]
        )
    return _aligned(lines)


def _growth(results: dict[str, Any]) -> str:
    """A line a case of the sweeps, in which one of T, P, K and the share of vaccinated tasks varies at a time."""
    cases: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in results["rows"]:
        if row["suite"] == "scaling":
            key = (row["T"], row["P"], row["K"], row["dtype"], row["share"])
            cases.setdefault(key, {})[row["implementation"]] = row
    ours = results["ours"][0]
    peers = list(dict.fromkeys(name for found in cases.values() for name in found if name != ours))
    lines = [["T", "P", "K", "dtype", "vaccinated", f"`{ours}`", "of floor", *peers]]
    lines.append(["---:", "---:", "---:", ":---", *["---:"] * (len(lines[0]) - 4)])
    for (T, P, K, dtype, share), found in cases.items():
        mine = found.get(ours)
        if mine is None:  # not asked for
            continue
        lines.append([str(T), short(P), str(K), dtype, f"{share:.0%}"])
        lines[-1] += [f"{_digits(mine['median_s'] * 1e3)} ms", f"{mine['fraction_of_floor']:.0%}"]
        lines[-1] += [f"{_digits(found[n]['median_s'] / mine['median_s'])}x" if n in found else "-" for n in peers]
    return _aligned(lines)


def compare(old: dict[str, Any], new: dict[str, Any], again: dict[str, Any] | None = None) -> str:
    """New time / old time of every row that both have; with a second run of ``new``, a mark where that is more than
    the two runs differ: by the row itself, or by nine of ten rows."""

    def times(results: dict[str, Any]) -> dict[tuple[Any, ...], float]:
        named = ("suite", "op", "implementation", "T", "P", "K", "dtype", "share", "samples", "granularity", "wait")
        return {tuple(row.get(name) for name in named): row["median_s"] for row in results["rows"]}

    before, after = times(old), times(new)
    repeated = times(again) if again else {}
    drift = {key: abs(math.log(repeated[key] / after[key])) for key in after if key in repeated}
    usual = statistics.quantiles(drift.values(), n=10)[-1] if len(drift) > 1 else 0.0
    lines = []
    for key in [key for key in before if key in after]:
        ratio = after[key] / before[key]
        changed = drift and abs(math.log(ratio)) > max(usual, drift.get(key, 0.0))
        mark = "" if not changed else " faster" if ratio < 1 else " SLOWER"
        lines.append(f"{ratio:6.2f}x  {' '.join(str(part) for part in key if part is not None)}{mark}")
    if drift:
        lines.append(f"nine of ten rows differ by less than {math.expm1(usual):.1%} between two runs")
    return "\n".join(lines)


def _aligned(lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("| " + " | ".join(cell.rjust(width) for cell, width in zip(line, widths)) + " |" for line in lines)


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """The commit that was measured, and whether its sources were changed."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=_ROOT, check=True, capture_output=True, text=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "gradvac_kernels", "csrc", "benchmarks/*.py")
        return git("rev-parse", "--short=12", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):  # a copy of the files: who made it may say what it is of
        return os.environ.get("COMMIT", "unknown")


def benchmarks() -> str:
    """The tables of every committed run."""
    files = sorted((_ROOT / "benchmarks" / "results").glob("*.json"))
    return "\n\n".join(markdown(json.loads(path.read_text())) + _pictures(path) for path in files)


def _pictures(path: Path) -> str:
    titles = {
        "scaling": "Time of a step against tasks, parameters and groups",
        "roofline": "Multiply-adds a second against multiply-adds a byte",
        "peers": "Time of each peer as a multiple of ours",
    }
    found = [(path.with_name(f"{path.stem}-{name}.svg"), title) for name, title in titles.items()]
    return "".join(f"\n\n![{title}]({svg.relative_to(_ROOT)})" for svg, title in found if svg.exists())


def demo() -> str:
    """The committed run of the demo, its pictures and its report; and the comparison of methods."""
    folder = Path("benchmarks") / "results" / "demo"
    if not (_ROOT / folder / "report.txt").exists():
        return ""
    report = (_ROOT / folder / "report.txt").read_text().rstrip()
    table, *notes = report.split("\n\n")
    titles = {
        "similarity": "Languages clustered by the similarity of their gradients",
        "control": "Two independent batches of every language: itself on the diagonal, the others beside it",
    }
    found = {folder / f"{name}.png": title for name, title in titles.items()}
    pictures = [f"![{title}]({path})" for path, title in found.items() if (_ROOT / path).exists()]
    parts = [*pictures, f"```text\n{table}\n```", *notes]
    if (_ROOT / folder / "comparison.txt").exists():
        compared = (_ROOT / folder / "comparison.txt").read_text().rstrip()
        parts += ["**All methods**, each trained alike:", f"```text\n{compared}\n```"]
    return "\n\n".join(parts)


_SECTIONS = {"benchmarks": benchmarks, "demo": demo}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether the README is up to date")
    parser.add_argument("--compare", type=Path, nargs="+", metavar="JSON", help="two runs, and the second one again")
    arguments = parser.parse_args()
    check = arguments.check
    if arguments.compare:
        if not 2 <= len(arguments.compare) <= 3:
            parser.error("--compare: expected OLD NEW, or OLD NEW AGAIN")
        print(compare(*(json.loads(path.read_text()) for path in arguments.compare)))
        return 0
    if not check:
        for path in sorted((_ROOT / "benchmarks" / "results").glob("*.json")):
            plots.draw(json.loads(path.read_text()), path.with_suffix(""))
    readme = _ROOT / "README.md"
    before = after = readme.read_text()
    for name, text in _SECTIONS.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        if begin not in after or end not in after:
            print(f"{readme.name}: expected the markers {begin} and {end}", file=sys.stderr)
            return 1
        start, stop = after.index(begin) + len(begin), after.index(end)
        after = f"{after[:start]}\n{text()}\n{after[stop:]}"
    if after == before:
        return 0
    if check:
        print(f"{readme.name}: not up to date, run python -m benchmarks.report", file=sys.stderr)
        return 1
    readme.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
