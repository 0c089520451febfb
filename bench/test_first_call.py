"""The time of the first call in a new process."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench.contenders.base import Contender
from bench.method.first_call import first_call
from bench.reporting.record import Point
from bench.workloads.suites import tiny_workload


def test_first_call(contender: Contender, pytestconfig: pytest.Config, keep: Callable[..., None]) -> None:
    if pytestconfig.getoption("quick"):
        pytest.skip("--quick leaves out new processes")
    workload = tiny_workload()
    reason = contender.why_absent(workload, "both")
    if reason is not None:
        pytest.skip(f"{contender.name}: {reason}")
    keep(
        Point(
            "first call", workload.fields(), "first call", contender.name, contender.n, contender.ours, "measured",
            values=(first_call(contender),),
        )
    )  # fmt: skip
