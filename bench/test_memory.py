"""The peak memory of one forward and backward, and that ours is linear in the length."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench.contenders.base import Contender
from bench.method.memory import peak
from bench.reporting.record import Point
from bench.workloads.suites import memory_workload

OURS = "attn_n n=1"


@pytest.fixture(scope="session")
def peaks() -> dict[int, int]:
    """Holds the peaks of ours by length."""
    return {}


def test_peak(contender: Contender, length: int, peaks: dict[int, int], keep: Callable[..., None]) -> None:
    workload = memory_workload(length)
    reason = contender.why_absent(workload, "both")
    if reason is not None:
        pytest.skip(f"{contender.name}: {reason}")
    bytes_ = peak(contender, workload)
    keep(
        Point(
            "memory", workload.fields(), "memory", contender.name, contender.n, contender.ours, "measured",
            values=(float(bytes_),),
        )
    )  # fmt: skip
    if contender.name == OURS:
        shorter = max((each for each in peaks if each < length), default=None)
        peaks[length] = bytes_
        assert shorter is None or 0.9 <= bytes_ / peaks[shorter] / (length / shorter) <= 1.1
