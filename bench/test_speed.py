"""The speed of every contender in every suite."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.contenders.base import Contender
from bench.method.interleaved import REPLAY
from bench.reporting.record import Point
from bench.workloads.suites import Case


@pytest.mark.benchmark(timer=REPLAY.clock)
def test_speed(contender: Contender, case: Case, points: dict[str, Point], benchmark: BenchmarkFixture) -> None:
    point = points[contender.name]
    if point.status == "absent":
        pytest.skip(f"{contender.name}: {point.reason}")
    if point.status == "wrong":
        pytest.fail(f"{contender.name}: {point.reason}", pytrace=False)
    benchmark.group = str(case)
    benchmark.extra_info["backend"] = point.backend
    REPLAY.play(benchmark, point.values)
