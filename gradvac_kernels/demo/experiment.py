"""Run the experiment: both arms from the same weights on the same batches, for each seed."""

from __future__ import annotations

import argparse
from functools import partial

import gradvac_kernels as gvk

from . import data
from .evaluate import translations
from .results import Results, Runs, gather
from .train import MakeArm, PlainSum, Setting, Vaccinated, train
from .vocabulary import Vocabulary


def run(options: argparse.Namespace, setting: Setting) -> Results:
    """Train and evaluate both arms as the command line says; all figures."""
    low = data.low_resource(setting.split.train)
    vaccinated = chosen_to_vaccinate(options, low)
    runs = Runs([], [])
    for seed in options.seeds:
        method = make_method(options, vaccinated, seed)
        arms: dict[str, MakeArm] = {
            "plain": partial(PlainSum, setting=setting),
            "method": partial(
                Vaccinated, setting=setting, granularity=options.granularity, method=method, capture=options.capture
            ),
        }
        records = train(arms, setting, seed)
        for name, record in records.items():
            record.names = translations(record.model, setting.vocabulary, setting.split.held_out)
            runs.arms()[name].append(record)
    return gather(setting, runs, low, vaccinated)


def make_setting(options: argparse.Namespace) -> Setting:
    """The data and sizes that both arms share. The split is the same for all seeds.

    Raises:
        ValueError: a language is left without names to train on, or to hold out.
    """
    split = data.split(options.languages, options.held_out)
    vocabulary = Vocabulary(options.languages, (pair for pairs in split.train.values() for pair in pairs))
    return Setting(split, vocabulary, options.steps, options.batch_size, options.measure_every)


def chosen_to_vaccinate(options: argparse.Namespace, low: tuple[str, ...]) -> tuple[str, ...]:
    """The languages whose gradients may be turned: those asked for, or the low-resource ones, or, without any, all."""
    if options.method == "sum":
        return ()
    return tuple(options.vaccinated or low or options.languages)


def make_method(options: argparse.Namespace, vaccinated: tuple[str, ...], seed: int) -> gvk.GradVac:
    """The method of the second arm. PCGrad is the constant target 0, the plain sum an empty set to vaccinate."""
    target = {"pcgrad": 0.0, "fixed": options.target}.get(options.method)
    ids = [options.languages.index(language) for language in vaccinated]
    return gvk.GradVac(beta=options.beta, vaccinated=ids, target=target, seed=seed)
