"""The speed of both directions on CPU, in float32."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.contenders import CPU, Contender
from bench.interleaved import REPLAY
from bench.problem import Inputs, Problem

PROBLEMS = [Problem(length, causal) for length in (512, 1024, 2048, 4096, 8192) for causal in (False, True)]


@pytest.fixture(scope="module", params=PROBLEMS, ids=str)
def problem(request: pytest.FixtureRequest, affordable: Callable[[int], None]) -> Problem:
    problem: Problem = request.param
    affordable(problem.length)
    return problem


@pytest.fixture(scope="module")
def contenders() -> tuple[Contender, ...]:
    return CPU


@pytest.mark.benchmark(timer=REPLAY.clock)
@pytest.mark.parametrize("contender", CPU, ids=str)
def test_speed(
    contender: Contender,
    problem: Problem,
    direction: str,
    inputs: Inputs,
    absent: dict[str, str],
    wrong: dict[str, str],
    times: dict[str, list[float]],
    benchmark: BenchmarkFixture,
) -> None:
    if contender.name in absent:
        pytest.skip(absent[contender.name])
    if contender.name in wrong:
        pytest.fail(wrong[contender.name], pytrace=False)
    benchmark.group = f"{direction} {problem}"
    benchmark.extra_info.update(contender.details(inputs, contender.n))
    REPLAY.play(benchmark, times[contender.name])
