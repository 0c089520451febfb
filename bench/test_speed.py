"""The speed of every contender in every suite."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.contenders.base import Contender
from bench.method.replay import REPLAY, show
from bench.reporting.record import Point
from bench.workloads.suites import Case


@pytest.mark.benchmark(timer=REPLAY.clock)
def test_speed(case: Case, contender: Contender, points: dict[str, Point], benchmark: BenchmarkFixture) -> None:
    show(points[contender.name], case, benchmark)
