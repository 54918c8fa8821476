"""Gives pytest-benchmark times that were measured elsewhere.

It times one test after the other, so that a drift of the machine looks like a difference between implementations.
Here a contest times all implementations of a case in turns, and then each test replays its own times on this clock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture


class _Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


clock = _Clock()


def replay(benchmark: BenchmarkFixture, seconds: list[float]) -> None:
    """Let ``benchmark``, whose timer is ``clock``, see one round for each of ``seconds``."""
    rounds = iter(seconds)

    def target() -> None:
        clock.now += next(rounds)

    benchmark.pedantic(target, rounds=len(seconds))
