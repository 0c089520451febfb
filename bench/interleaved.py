"""Times of several functions, measured in turns so that the drift of the machine hits all of them alike."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

from pytest_benchmark.fixture import BenchmarkFixture


def measure(runs: Mapping[str, Callable[[], object]], seconds: float, least_rounds: int) -> dict[str, list[float]]:
    """The seconds of each run in each round; a round has one of each, and there are about `seconds` for each run."""
    if not runs:
        return {}
    once = sum(_seconds(run) for run in runs.values())
    rounds = max(least_rounds, int(seconds * len(runs) / once))
    times: dict[str, list[float]] = {name: [] for name in runs}
    order, shuffle = list(runs), random.Random(0).shuffle
    for _ in range(rounds):
        # A mere rotation would put each run always behind the same other one and what that leaves in the caches.
        shuffle(order)
        for name in order:
            times[name].append(_seconds(runs[name]))
    return times


def paired_ratio(times: Mapping[str, Sequence[float]], name: str, other: str) -> float:
    """The median over the rounds of one time over the other: a slow spell of the machine slows both of a round."""
    return statistics.median(a / b for a, b in zip(times[name], times[other], strict=True))


def ratio_of_medians(times: Mapping[str, Sequence[float]], name: str, other: str) -> float:
    return statistics.median(times[name]) / statistics.median(times[other])


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


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
