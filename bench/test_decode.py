"""Decoding from a KV cache."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.contenders.base import Contender
from bench.method.replay import REPLAY, show
from bench.reporting.record import Point
from bench.workloads.decoding import Decoding


@pytest.mark.benchmark(timer=REPLAY.clock)
def test_decode(case: Decoding, contender: Contender, points: dict[str, Point], benchmark: BenchmarkFixture) -> None:
    show(points[contender.name], case, benchmark)
