"""Methods: Gram matrices in, weights out, with the state that takes from step to step."""

from .cats import CATS
from .gradnorm import GradNorm
from .gradvac import GradVac
from .method import Method
from .mgda import MGDA
from .pcgrad import PCGrad
from .scalarisation import Mean, Sum
from .torchjd import FromTorchJD
from .weighting import Measured, Weighting

__all__ = [
    "CATS",
    "MGDA",
    "FromTorchJD",
    "GradNorm",
    "GradVac",
    "Mean",
    "Measured",
    "Method",
    "PCGrad",
    "Sum",
    "Weighting",
]
