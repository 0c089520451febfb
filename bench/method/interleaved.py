"""Times of several functions, measured in turns so that the drift of the machine hits all of them alike."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import TypeVar

from pytest_benchmark.fixture import BenchmarkFixture

from bench.method.clocks import Clock, Run

Key = TypeVar("Key")


def measure(runs: Mapping[Key, Run], clock: Clock) -> dict[Key, list[float]]:
    """The seconds of each run; a round has a turn of each."""
    if not runs:
        return {}
    times: dict[Key, list[float]] = {name: [] for name in runs}
    order, shuffle = list(runs), random.Random(0).shuffle
    for _ in range(clock.rounds(list(runs.values()))):
        # A mere rotation would put each run always behind the same other one and what that leaves in the caches.
        shuffle(order)
        for name in order:
            times[name] += clock.turn(runs[name])
    return times


class _Replay:
    """A clock that advances by times measured before.

    pytest-benchmark times one function on end and has no public way to take times from elsewhere. On this clock its
    own rounds take exactly the interleaved ones, so that its table, JSON and comparisons hold them.
    """

    def __init__(self) -> None:
        self._now = 0.0

    def clock(self) -> float:
        return self._now

    def play(self, benchmark: BenchmarkFixture, times: Sequence[float]) -> None:
        following = iter(times)

        def advance() -> None:
            self._now += next(following)

        benchmark.pedantic(advance, rounds=len(times))


REPLAY = _Replay()
