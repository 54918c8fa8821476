"""Methods: Gram matrices in, weights out, with the state that takes from step to step."""

from .gradvac import GradVac

__all__ = ["GradVac"]
