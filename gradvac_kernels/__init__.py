"""Multi-task gradient alignment in one pass over a task x parameter buffer: Gradient Vaccine and its Gram matrices."""

from . import ops, reference
from .backends import available_backends
from .buffer import GradientBuffer
from .groups import ParameterGroups
from .methods import GradVac
from .ops import combine, gram, task_order, vaccinate
from .result import Vaccination
from .task_gradients import TaskGradients
from .version import __version__

__all__ = [
    "GradVac",
    "GradientBuffer",
    "ParameterGroups",
    "TaskGradients",
    "Vaccination",
    "__version__",
    "available_backends",
    "combine",
    "gram",
    "ops",
    "reference",
    "task_order",
    "vaccinate",
]
