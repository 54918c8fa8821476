"""Run the experiment: all arms from the same weights and, if they draw alike, on the same batches, for each seed."""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import starmap
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import arms, comparison, data
from .evaluate import chrf, translations
from .finished import Finished
from .results import Results, Runs, gather
from .train import Aligned, MakeArm, PlainSum, Setting, train
from .vocabulary import Vocabulary

CONTROL_SIZE = 32  # names of each language in each of the two batches that are compared
CONTROL_SEED = 1 << 20  # apart from the seeds of training


def run(options: argparse.Namespace, setting: Setting) -> Results:
    """Train and evaluate the plain sum and one method as the command line says; all figures."""
    low = data.low_resource(setting.split.train)
    vaccinated = chosen_to_vaccinate(options, low)
    chosen = arms.Arm(options.method, options.granularity, options.temperature)
    runs = Runs([], [])
    for seed in options.seeds:
        control = data.batches(setting.split.train, CONTROL_SIZE, CONTROL_SEED + seed)
        records = train(
            {
                "plain": partial(PlainSum, setting=setting),
                "method": _make_arm(chosen, options, setting, vaccinated, seed, control=control),
            },
            setting,
            seed,
        )
        for name, record in records.items():
            record.names = translations(record.model, setting.vocabulary, setting.split.held_out)
            runs.arms()[name].append(record)
        if seed == options.seeds[0]:
            tracker = records["method"].tracker
            assert tracker is not None  # this arm keeps one
            tracker.to_csv(Path(options.output) / "similarity.csv")
    return gather(setting, runs, low, vaccinated)


def compare(options: argparse.Namespace) -> Results:
    """Train and evaluate all arms of ``--compare``, with ``--jobs`` at a time; figures by arm. Trainings that are done
    are kept in ``runs.json`` until all are, and not done again."""
    finished = Finished(options.output / "runs.json", options)
    runs = [(arm, seed) for seed in options.seeds for arm in options.compare]
    left = [run for run in runs if run not in finished]
    for run, found in zip(left, _train_all(options, left)):
        finished[run] = found
    by_arm = {arm.name: [finished[arm, seed] for seed in options.seeds] for arm in options.compare}
    finished.forget()
    low = data.low_resource(make_setting(options).split.train)
    return comparison.gather(options.languages, by_arm, low, options.vaccinated or low or options.languages)


def _train_all(options: argparse.Namespace, runs: Sequence[tuple[arms.Arm, int]]) -> Iterator[comparison.Run]:
    train_one = partial(_train_one, options)
    if options.jobs == 1:
        yield from starmap(train_one, runs)
        return
    threads = max(1, torch.get_num_threads() // options.jobs)
    context = multiprocessing.get_context("spawn")  # a fork would inherit threads that wait for ever
    with ProcessPoolExecutor(options.jobs, context, torch.set_num_threads, (threads,)) as pool:
        yield from tqdm(pool.map(train_one, *zip(*runs)), total=len(runs), unit="run")


def _train_one(options: argparse.Namespace, arm: arms.Arm, seed: int) -> comparison.Run:
    """Train and evaluate one arm: the same seed gives the same weights and, if they draw alike, the same batches."""
    setting = make_setting(options, arm.temperature)
    setting.measure_every = options.steps + 1  # nothing is measured but the first step
    vaccinated = options.vaccinated or data.low_resource(setting.split.train) or options.languages
    make: MakeArm = partial(PlainSum, setting=setting)
    if arm.method != "sum":
        make = _make_arm(arm, options, setting, vaccinated, seed)
    (record,) = train({arm.name: make}, setting, seed, quiet=options.jobs > 1).values()
    names = translations(record.model, setting.vocabulary, setting.split.held_out)
    held_out = setting.split.held_out
    return comparison.Run(record.held_out[setting.steps], chrf(names, held_out), record.step_seconds)


def _make_arm(
    arm: arms.Arm, options: argparse.Namespace, setting: Setting, vaccinated: Sequence[str], seed: int, **more: Any
) -> MakeArm:
    method = arms.make_method(arm, options, vaccinated, seed)
    return partial(
        Aligned, setting=setting, granularity=arm.granularity, method=method, capture=options.capture, **more
    )


def make_setting(options: argparse.Namespace, temperature: float | None = None) -> Setting:
    """The data and sizes that all arms share. The split is the same for all seeds.

    Raises:
        ValueError: a language is left without names to train on, or to hold out.
    """
    split = data.split(options.languages, options.held_out)
    vocabulary = Vocabulary(options.languages, (pair for pairs in split.train.values() for pair in pairs))
    return Setting(split, vocabulary, options.steps, options.batch_size, options.measure_every, temperature)


def chosen_to_vaccinate(options: argparse.Namespace, low: tuple[str, ...]) -> tuple[str, ...]:
    """The languages whose gradients may be turned: those asked for, or the low-resource ones, or, without any, all;
    none where the method turns nothing."""
    if options.method not in arms.TURNING:
        return ()
    return tuple(options.vaccinated or low or options.languages)
