"""Results as a file and as tables: ``python -m benchmarks.report`` puts those under ``results/`` into the README.

``--check`` writes nothing, and exits with 1 where the README shows something else.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from gradvac_kernels import env

from .cases import short
from .contest import backends

_ROOT = Path(__file__).parent.parent
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
    head = (
        f"{machine}; {results['threads']} threads; {versions}; commit {results['commit']}. Ceilings, measured in the "
        f"same run: streaming read {read:.3g} GB/s, {multiply_adds:.3g} G {kind} multiply-adds/s. Medians; `x` is the "
        "time of an implementation divided by ours; the floor is the least time that these ceilings allow (above "
        "100 % where a group is still in the cache when it is combined)."
    )
    measured = {row["op"] for row in results["rows"]}
    ops = [op for op in ("gram", "combine", "vaccinate") if op in measured]
    tables = [f"**{op}**\n\n{_table(results, op)}" for op in ops]
    if "step" in measured:
        tables.append(f"**A whole training step** of the demo's model\n\n{_step_table(results)}")
    return "\n\n".join([head, *tables])


def _table(results: dict[str, Any], op: str) -> str:
    cases: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in results["rows"]:
        if row["op"] == op:
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
    header += ["`batch` / passes", "memory: `batch`", "T x largest group", "T x P"]
    lines = [header, ["---:", "---:", ":---", ":---", *["---:"] * 7]]
    for (T, samples, granularity, wait), found in cases.items():
        plain, stream, buffer = (found[way] for way in ("plain", "stream", "buffer"))
        more = stream["peak_memory_bytes"] - plain["peak_memory_bytes"]
        times = [found[way]["median_s"] / plain["median_s"] for way in ("stream", "buffer")]
        lines.append(
            [str(T), samples, granularity, {"passive": "sleep", "active": "spin"}[wait]]
            + [f"{_digits(plain['median_s'] * 1e3)} ms", *(f"{time:.2f}x" for time in times)]
            + [f"{stream['median_s'] / buffer['median_s']:.2f}"]
            + [f"{bytes / 2**20:.1f} MiB" for bytes in (more, plain["slab_bytes"], 4 * T * plain["P"])]
        )
    return _aligned(lines)


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
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def benchmarks() -> str:
    """The tables of every committed run."""
    files = sorted((_ROOT / "benchmarks" / "results").glob("*.json"))
    return "\n\n".join(markdown(json.loads(path.read_text())) for path in files)


def demo() -> str:
    """The committed run of the demo: its picture and its report."""
    folder = Path("benchmarks") / "results" / "demo"
    if not (_ROOT / folder / "report.txt").exists():
        return ""
    report = (_ROOT / folder / "report.txt").read_text().rstrip()
    table, *notes = report.split("\n\n")
    picture = f"![Languages clustered by the similarity of their gradients]({folder / 'similarity.png'})"
    return "\n\n".join([picture, f"```text\n{table}\n```", *notes])


_SECTIONS = {"benchmarks": benchmarks, "demo": demo}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether the README is up to date")
    check = parser.parse_args().check
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
