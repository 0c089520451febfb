"""Host time a call, and the time of the first call."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch

from bench.contenders.base import Contender, Passes
from bench.method import host
from bench.reporting.record import Point
from bench.workloads import make_inputs
from bench.workloads.suites import tiny_workload

Keep = Callable[..., None]


@pytest.mark.parametrize("suite", ["host", "host without gradients", "host backward"])
def test_host(contender: Contender, suite: str, keep: Keep) -> None:
    _skip_absent(contender, "backward" if suite == "host backward" else "forward")
    forward, backward = _prepared(contender)
    if suite == "host backward":
        out = forward()
        values = host.seconds_a_call(lambda: backward(out))
    else:
        with torch.set_grad_enabled(suite == "host"):
            values = host.seconds_a_call(forward)
    keep(_point(contender, suite, "host", values))


def test_first_call(contender: Contender, pytestconfig: pytest.Config, keep: Keep) -> None:
    if pytestconfig.getoption("quick"):
        pytest.skip("--quick leaves out new processes")
    _skip_absent(contender, "both")
    keep(_point(contender, "first call", "first call", [host.first_call(contender)]))


@functools.lru_cache(maxsize=1)  # some compile for it
def _prepared(contender: Contender) -> Passes:
    return contender.prepare(make_inputs(tiny_workload()))


def _skip_absent(contender: Contender, measure: str) -> None:
    reason = contender.why_absent(tiny_workload(), measure)
    if reason is not None:
        pytest.skip(f"{contender.name}: {reason}")


def _point(contender: Contender, suite: str, measure: str, values: list[float]) -> Point:
    return Point(
        suite, tiny_workload().fields(), measure, contender.name, contender.n, contender.ours, "measured",
        values=tuple(values),
    )  # fmt: skip
