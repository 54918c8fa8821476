"""Which rows of a batch may be turned."""

from __future__ import annotations

import torch


def turnable_rows(
    num_rows: int, task_ids: torch.Tensor | None, vaccinated: torch.Tensor | None, device: torch.device
) -> torch.Tensor | None:
    """``[T]`` bool: the rows of vaccinated tasks (the set G of Algorithm 1); None for all."""
    if vaccinated is None:
        return None
    ids = torch.arange(num_rows, device=device) if task_ids is None else task_ids
    return (ids[:, None] == vaccinated).any(1)
