"""Keep what each training of a comparison gave, so that a comparison that was stopped goes on where it was."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from gradvac_kernels.version import __version__

from .arms import Arm
from .comparison import Run

_DECIDE = ("languages", "vaccinated", "steps", "batch_size", "held_out", "beta", "target", "capture", "jobs")


class Finished:
    """The trainings that are done, in a file; those of other arguments or versions do not count."""

    def __init__(self, path: Path, options: argparse.Namespace) -> None:
        self._path = path
        self._about = {name: getattr(options, name) for name in _DECIDE}
        self._about |= {"gradvac_kernels": __version__, "torch": torch.__version__}
        kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self._runs: dict[str, list[list[float]]] = kept["runs"] if kept.get("about") == self._about else {}

    def __contains__(self, which: tuple[Arm, int]) -> bool:
        return self._key(*which) in self._runs

    def __getitem__(self, which: tuple[Arm, int]) -> Run:
        return Run(*self._runs[self._key(*which)])

    def __setitem__(self, which: tuple[Arm, int], run: Run) -> None:
        self._runs[self._key(*which)] = list(run)
        new = self._path.with_suffix(".new")
        new.write_text(json.dumps({"about": self._about, "runs": self._runs}), encoding="utf-8")
        new.replace(self._path)  # so the file is whole at any time

    def forget(self) -> None:
        """Let the next comparison begin anew."""
        self._path.unlink(missing_ok=True)

    @staticmethod
    def _key(arm: Arm, seed: int) -> str:
        return f"{arm.name}, seed {seed}"
