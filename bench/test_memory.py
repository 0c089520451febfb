"""The peak memory of one forward and backward, and that ours is linear in the length."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench.contenders import contenders
from bench.contenders.base import Contender
from bench.memory import peak
from bench.record import Point
from bench.suites import DEVICE, memory_problem

LENGTHS = (2048, 4096, 8192) if DEVICE == "cpu" else (2048, 8192, 32768)
OURS = "attn_n n=1"


@pytest.fixture(scope="session")
def peaks() -> dict[tuple[str, int], int]:
    return {}


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("contender", contenders(DEVICE), ids=str)
def test_peak(
    contender: Contender,
    length: int,
    pytestconfig: pytest.Config,
    peaks: dict[tuple[str, int], int],
    keep: Callable[..., None],
) -> None:
    if pytestconfig.getoption("quick") and length > LENGTHS[0]:
        pytest.skip(f"--quick stops at length {LENGTHS[0]}")
    problem = memory_problem(length)
    reason = contender.why_absent(problem, "both")
    if reason is not None:
        pytest.skip(f"{contender.name}: {reason}")
    bytes_ = peaks[contender.name, length] = peak(contender, problem)
    keep(
        Point(
            "memory", problem.fields(), "memory", contender.name, contender.n, contender.ours, "measured",
            values=(float(bytes_),),
        )
    )  # fmt: skip
    shorter = LENGTHS[LENGTHS.index(length) - 1]
    if contender.name == OURS and shorter < length and (OURS, shorter) in peaks:
        assert 0.9 <= bytes_ / peaks[OURS, shorter] / (length / shorter) <= 1.1
