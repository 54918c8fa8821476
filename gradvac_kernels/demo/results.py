"""Gather what both arms recorded, over all seeds, into one dictionary of figures: what ``results.json`` holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from babel import Locale

from . import similarity
from .evaluate import chrf
from .languages import FAMILY_OF
from .train import Record, Setting, warm_up_steps

Results = dict[str, Any]


@dataclass
class Runs:
    """One record a seed for each arm, in the order of the seeds."""

    plain: list[Record]
    method: list[Record]

    def arms(self) -> dict[str, list[Record]]:
        """Both arms by name."""
        return {"plain": self.plain, "method": self.method}


def gather(setting: Setting, runs: Runs, low: Sequence[str], vaccinated: Sequence[str]) -> Results:
    """All figures of the experiment, as plain numbers, lists and dictionaries."""
    return {
        "languages": _languages(setting, runs, low, vaccinated),
        "activity": _activity(runs.method),
        "cosine": {
            "parallel": _cosine(setting, runs.method, "parallel_cosines"),
            "batch": _cosine(setting, runs.method, "batch_cosines"),
        },
        "control": _control(setting, runs.method),
        "weights": np.mean([record.weights for record in runs.method], axis=0).tolist(),  # [steps, T]
        "time": _time(runs),
        "curves": _curves(runs),
    }


def _languages(setting: Setting, runs: Runs, low: Sequence[str], vaccinated: Sequence[str]) -> Results:
    pairs = setting.split.held_out
    loss = {arm: [record.held_out[setting.steps] for record in records] for arm, records in runs.arms().items()}
    score = {arm: [chrf(record.names, pairs) for record in records] for arm, records in runs.arms().items()}
    turned, conflicting = _shares(runs.method, axes=(0, 1))
    return {
        language: {
            "name": Locale.parse(language).english_name,
            "family": FAMILY_OF[language],
            "low_resource": language in low,
            "vaccinated": language in vaccinated,
            "train_pairs": len(setting.split.train[language]),
            "held_out_pairs": len(pairs[language]),
            "loss": {arm: [seed[index] for seed in seeds] for arm, seeds in loss.items()},
            "chrf": {arm: [seed[index] for seed in seeds] for arm, seeds in score.items()},
            "turned": _number(turned[index]),
            "conflicting": _number(conflicting[index]),
            "examples": [
                {**pair._asdict(), **{arm: records[0].names[language][row] for arm, records in runs.arms().items()}}
                for row, pair in enumerate(pairs[language][:10])
            ],
        }
        for index, language in enumerate(setting.languages)
    }


def _activity(records: list[Record]) -> Results:
    turned, conflicting = _shares(records, axes=(0, 1, 2))
    by_step = _shares(records, axes=(0, 2))
    return {
        "measured_pairs": int(sum(np.sum(record.measured) for record in records)),
        "turned": _number(turned),
        "conflicting": _number(conflicting),
        "turned_by_step": [_number(value) for value in by_step[0]],
        "conflicting_by_step": [_number(value) for value in by_step[1]],
    }


def _cosine(setting: Setting, records: list[Record], kind: str) -> Results:
    families = [FAMILY_OF[language] for language in setting.languages]
    steps = list(getattr(records[0], kind))
    # [steps, L, T, T]: each the mean over the seeds
    by_step = torch.stack(
        [torch.stack([getattr(record, kind)[step] for record in records]).nanmean(0) for step in steps]
    )
    begin = min(warm_up_steps(setting.steps), steps[-1])
    mean = by_step[[step >= begin for step in steps]].nanmean(0)  # [L, T, T]
    whole = mean[-1]
    nearest, asked = similarity.nearest_in_family(whole, families)
    return {
        "languages": setting.languages,
        "steps": steps,
        "averaged_from_step": begin,
        "matrix": _matrix(whole),
        "nearest_in_family": nearest,
        "with_relatives": asked,
        **_families(whole, families),
        "layers": {
            layer: _families(mean[index], families)
            | {"matrix": _matrix(mean[index]), "by_step": [_families(cosine, families) for cosine in by_step[:, index]]}
            for index, layer in enumerate(records[0].layers)
        },
    }


def _matrix(cosine: torch.Tensor) -> list[list[float | None]]:
    return [[_number(value) for value in row] for row in cosine.tolist()]


def _control(setting: Setting, records: list[Record]) -> Results:
    """Two batches that share no draw: the cosine of a language with itself, and with every other one."""
    steps = list(records[0].control_cosines)
    begin = min(warm_up_steps(setting.steps), steps[-1])
    by_step = torch.stack(
        [record.control_cosines[step] for record in records for step in steps if step >= begin]
    )  # [seeds x steps, T, T]
    mean = by_step.nanmean(0)
    mean = (mean + mean.T) / 2
    own = torch.eye(len(mean), dtype=torch.bool)
    others, apart = mean[~own], mean.masked_fill(own, -2.0)
    return {
        "averaged_from_step": begin,
        "matrix": [[_number(value) for value in row] for row in mean.tolist()],
        "within_language": _number(float(mean.diagonal().nanmean())),
        "across_languages": _number(float(others.nanmean())),
        "largest_across": _number(float(others.max())),
        "smallest_within": _number(float(mean.diagonal().min())),
        "above_all_others": int((mean.diagonal() > apart.amax(1)).sum()),
    }


def _families(cosine: torch.Tensor, families: Sequence[str]) -> dict[str, float | None]:
    within, across = similarity.within_and_across(cosine, families)
    return {"within": _number(within), "across": _number(across)}


def _time(runs: Runs) -> dict[str, float]:
    plain = np.median([second for record in runs.plain for second in record.step_seconds])
    step = np.median([second for record in runs.method for second in record.step_seconds])
    tracker = np.median([second for record in runs.method for second in record.tracker_seconds])
    return {
        "tracker_ms": 1e3 * float(tracker),
        "plain_step_ms": 1e3 * float(plain),
        "method_step_ms": 1e3 * float(step),
        "step_ratio": float(step / plain),
        # streamed, the aggregation is part of the backward: this is that of the steps that were measured
        "aggregation_ms": 1e3 * float(np.median([second for record in runs.method for second in record.apply_seconds])),
    }


def _curves(runs: Runs) -> Results:
    return {
        arm: {
            # [steps, T]; with a temperature a language may be missing, and its last loss stands
            "train_loss": _filled(np.mean([record.losses for record in records], axis=0)).tolist(),
            "held_out_loss": {
                step: np.mean([record.held_out[step] for record in records], axis=0).tolist()
                for step in records[0].held_out
            },
        }
        for arm, records in runs.arms().items()
    }


def _filled(losses: np.ndarray) -> np.ndarray:
    """Without NaN: the value of the step before, or at the beginning the first one."""
    for column in losses.T:
        known = np.flatnonzero(~np.isnan(column))
        if len(known):
            last = np.maximum.accumulate(np.where(np.isnan(column), -1, np.arange(len(column))))
            column[:] = column[np.where(last < 0, known[0], last)]
    return losses


def _shares(records: list[Record], axes: tuple[int, ...]) -> tuple[Any, Any]:
    """Of the measured pairs, the share that was turned and the share below zero; ``axes`` of [seeds, steps, T] add."""
    measured = np.sum([record.measured for record in records], axis=axes)
    with np.errstate(invalid="ignore"):  # nothing measured: 0 / 0 is NaN
        return (
            np.sum([record.turned for record in records], axis=axes) / measured,
            np.sum([record.conflicting for record in records], axis=axes) / measured,
        )


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return None if np.isnan(value) else float(value)
