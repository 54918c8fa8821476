"""Which task comes next: temperature sampling, with a state that a checkpoint can hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from . import checks
from .order import fold, shift


class TaskSampler:
    """Draws tasks with ``P(i)`` proportional to ``q_i^(1 / temperature)``, ``q_i`` the task's share of all examples.

    1 follows the sizes, infinity is uniform (as in Wang, Lipton, Tsvetkov, "On Negative Interference in Multilingual
    Models", EMNLP 2020, section 3, and in multilingual training in general).

    Draw number n depends on the seed and n alone: equal samplers draw the same tasks on every rank and device. Ranks
    that should draw different ones need different seeds.

    Args:
        sizes: the number of examples of each task, at least 1, by name; or a sequence of them.
        temperature: above 0; ``float("inf")`` draws all tasks alike.
        seed: chooses the sequence of draws.

    Attributes:
        names: the N tasks: the keys of ``sizes``, or the indices 0..N-1.
        probabilities: ``[N]`` float64.
        position: the number of draws so far.

    Raises:
        TypeError, ValueError: an argument is not of the type or range above.
    """

    def __init__(self, sizes: Mapping[str, int] | Sequence[int], temperature: float = 1.0, seed: int = 0) -> None:
        if not isinstance(sizes, (Mapping, Sequence)) or isinstance(sizes, str):
            raise TypeError(f"sizes: expected a mapping of names to sizes or a sequence, got {type(sizes).__name__}")
        by_task: Mapping[Any, int] = sizes if isinstance(sizes, Mapping) else dict(enumerate(sizes))
        self.names, self.sizes = tuple(by_task), tuple(by_task.values())
        if not self.sizes:
            raise ValueError("sizes: expected at least one task, got none")
        for name, size in zip(self.names, self.sizes):
            checks.check_int(f"sizes[{name!r}]", size, 1)
        temperature = checks.as_float("temperature", temperature)
        if not temperature > 0:
            raise ValueError(f"temperature: expected a number above 0, got {temperature}")
        checks.check_int("seed", seed)
        self.temperature = temperature
        self.seed = seed
        self.position = 0
        largest = max(self.sizes)  # of which the share is 1: nothing overflows, and not all are lost
        weights = torch.tensor([(size / largest) ** (1 / temperature) for size in self.sizes], dtype=torch.float64)
        self.probabilities = weights / weights.sum()
        self._edges = weights.cumsum(0) / weights.sum()

    def sample(self, n: int) -> torch.Tensor:
        """The next n draws.

        Args:
            n: at least 0.

        Returns:
            ``[n]`` int64 on the CPU, indices of ``names``: what :meth:`TaskGradients.batch` takes as ``task_of_sample``
            if its tasks are in the same order.

        Raises:
            TypeError, ValueError: ``n`` is no such number. Then nothing was drawn.
        """
        checks.check_int("n", n, 0)
        count = torch.arange(self.position, self.position + n)
        key = fold(fold(torch.zeros_like(count), torch.tensor(self.seed)), count)
        uniform = shift(key, 11).double() * 2.0**-53  # [n] in [0, 1), exact
        self.position += n
        return torch.bucketize(uniform, self._edges[:-1], right=True)

    def sample_names(self, n: int) -> list[Any]:
        """The next n draws, as :meth:`sample`, by name."""
        return [self.names[index] for index in self.sample(n).tolist()]

    def __iter__(self) -> Iterator[Any]:
        """Endless draws of one task each, by name; they share the position with :meth:`sample`."""
        while True:
            yield self.sample_names(1)[0]

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs, for ``torch.save``."""
        return {
            "position": self.position,
            "seed": self.seed,
            "sizes": list(self.sizes),
            "temperature": self.temperature,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue, draw for draw, where ``state_dict()`` was taken.

        Raises:
            TypeError: a value is of a wrong type.
            ValueError: keys are missing or unknown, or sizes or temperature differ. Then nothing was changed.
        """
        expected = self.state_dict()
        checks.check_keys(state, expected)
        checks.check_int("state['position']", state["position"], 0)
        checks.check_int("state['seed']", state["seed"])
        for key in ("sizes", "temperature"):
            if state[key] != expected[key]:
                raise ValueError(f"state[{key!r}]: expected {expected[key]}, got {state[key]}")
        self.position, self.seed = state["position"], state["seed"]
