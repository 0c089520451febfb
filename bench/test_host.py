"""The time of the host for each kind of call."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.contenders.base import Contender
from bench.method.replay import REPLAY, show
from bench.reporting.record import Point
from bench.workloads.calls import Call


@pytest.mark.benchmark(timer=REPLAY.clock)
def test_host(case: Call, contender: Contender, points: dict[str, Point], benchmark: BenchmarkFixture) -> None:
    show(points[contender.name], case, benchmark)
