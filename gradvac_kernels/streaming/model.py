"""What a model must be like to be streamed, and which of its groups are too large for a slab."""

from __future__ import annotations

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from ..groups import ParameterGroups


def check_modules(model: torch.nn.Module) -> None:
    """Refuse what mixes samples or cannot be followed.

    Raises:
        ValueError: a module in training that normalises over the batch, one that is compiled or replicated, or a hook
            on a parameter's gradient.
    """
    for name, parameter in model.named_parameters():
        if parameter._backward_hooks:
            raise ValueError(
                f"model: expected parameters without hooks, got one on {name!r}: there is no gradient to see"
            )
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise ValueError(
                f"model: expected modules that keep samples apart, got {kind} {name!r}, which normalises over "
                "the batch; put it in eval(), or use LayerNorm or GroupNorm"
            )
        if kind in ("OptimizedModule", "DataParallel"):
            raise ValueError(f"model: expected a plain module, got {kind} {name!r}, which cannot be followed")


def coarse_groups(model: torch.nn.Module, groups: ParameterGroups) -> frozenset[int]:
    """The groups that span several layers: their gradients are never there all at once."""
    layers = ParameterGroups.from_model(model, "all_layer")
    layer_of = {slot.name: slot.group for slot in layers.parameters}
    spanned: dict[int, set[int]] = {}
    for slot in groups.parameters:
        spanned.setdefault(slot.group, set()).add(layer_of[slot.name])
    return frozenset(group for group, found in spanned.items() if len(found) > 1)
