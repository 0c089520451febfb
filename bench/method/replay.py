"""Hands times that were measured in turns to pytest-benchmark."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.reporting.record import Point
from bench.workloads.suites import Case


class _Replay:
    """A clock that advances by times that were measured before.

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


def show(point: Point, case: Case, benchmark: BenchmarkFixture) -> None:
    """Makes the result of one contender the result of the running test."""
    if point.status == "absent":
        pytest.skip(f"{point.contender}: {point.reason}")
    if point.status == "wrong":
        pytest.fail(f"{point.contender}: {point.reason}", pytrace=False)
    benchmark.group = str(case)
    benchmark.extra_info["backend"] = point.backend
    REPLAY.play(benchmark, point.values)
