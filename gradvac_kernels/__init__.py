"""Multi-task gradient alignment in one pass over a task x parameter buffer: Gradient Vaccine and its Gram matrices."""

from . import curvature, flat, meta, methods, ops, reference
from .backends import available_backends
from .buffer import GradientBuffer
from .groups import ParameterGroups
from .methods import GradVac
from .ops import coefficients, combine, cross_gram, gram, task_order, vaccinate
from .result import Coefficients, Vaccination
from .sampling import TaskSampler
from .streaming import register_rule, task_mean_loss
from .task_gradients import TaskGradients
from .tracker import SimilarityTracker
from .version import __version__

__all__ = [
    "Coefficients",
    "GradVac",
    "GradientBuffer",
    "ParameterGroups",
    "SimilarityTracker",
    "TaskGradients",
    "TaskSampler",
    "Vaccination",
    "__version__",
    "available_backends",
    "coefficients",
    "combine",
    "cross_gram",
    "curvature",
    "flat",
    "gram",
    "meta",
    "methods",
    "ops",
    "reference",
    "register_rule",
    "task_mean_loss",
    "task_order",
    "vaccinate",
]
