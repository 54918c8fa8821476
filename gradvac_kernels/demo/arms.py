"""What an arm of the experiment is: how the batches are drawn, and a method that makes one update of the gradients."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import gradvac_kernels as gvk
from gradvac_kernels import methods

METHODS = {
    "gradvac": "Gradient Vaccine, moving targets",
    "pcgrad": "Gradient Vaccine with the constant target 0",
    "fixed": "Gradient Vaccine with the constant target --target",
    "mgda": "the shortest convex combination of the gradients",
    "gradnorm": "loss weights learned from norms and training rates",
    "cats": "curvature-aware task scaling, Gram form",
    "sum": "the plain sum",
}
GRANULARITIES = ("whole_model", "enc_dec", "all_layer", "all_matrix")
TURNING = ("gradvac", "pcgrad", "fixed")  # only these have languages to vaccinate
COMPARISON = "sum,sum@5,pcgrad,gradvac/whole_model,gradvac,fixed,mgda,gradnorm/whole_model,cats/whole_model"


class Arm(NamedTuple):
    """One way to train, written as ``method[/granularity][@temperature]``."""

    method: str
    granularity: str
    temperature: float | None

    @property
    def name(self) -> str:
        """As it is written, with the granularity where it matters."""
        granularity = "" if self.method == "sum" else f"/{self.granularity}"
        return f"{self.method}{granularity}" + ("" if self.temperature is None else f"@{self.temperature:g}")


def parse(text: str, granularity: str, temperature: float | None) -> Arm:
    """Read one arm; what it does not say is as given.

    Raises:
        ValueError: it is none.
    """
    rest, _, drawn = text.partition("@")
    method, _, asked = rest.partition("/")
    if method not in METHODS or (asked and asked not in GRANULARITIES):
        raise ValueError(f"expected method[/granularity][@temperature], got {text!r}")
    return Arm(method, asked or granularity, positive(drawn) if drawn else temperature)


def positive(text: str) -> float:
    """A temperature.

    Raises:
        ValueError: it is not above 0.
    """
    value = float(text)
    if not value > 0:
        raise ValueError(f"expected a temperature above 0, got {text}")
    return value


def make_method(arm: Arm, options: argparse.Namespace, vaccinated: Sequence[str], seed: int) -> methods.Method:
    """The arm's method; the languages that may be turned are those of ``vaccinated``."""
    if arm.method in TURNING:
        target = {"pcgrad": 0.0, "fixed": options.target}.get(arm.method)
        ids = [options.languages.index(language) for language in vaccinated]
        return gvk.GradVac(beta=options.beta, vaccinated=ids, target=target, seed=seed)
    others = {"mgda": methods.MGDA, "gradnorm": methods.GradNorm, "cats": methods.CATS, "sum": methods.Sum}
    return others[arm.method]()
