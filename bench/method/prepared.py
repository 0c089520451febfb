"""The contenders of one workload, made ready and checked."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench.contenders.base import Contender, Passes
from bench.contenders.library import one_line
from bench.method.check import what_is_wrong
from bench.reporting.record import Point
from bench.workloads import Inputs, Workload, make_inputs
from bench.workloads.suites import Suite


@dataclass(frozen=True)
class Prepared:
    """A contender at one workload: what it runs, or why it does not."""

    contender: Contender
    status: str
    reason: str | None = None
    passes: Passes | None = None
    backend: str | None = None

    def run(self, measure: str, training: bool) -> Callable[[], object] | None:
        """What is timed; None if it does not take part."""
        if self.passes is None or measure not in self.contender.measures:
            return None
        forward, backward = self.passes
        if measure == "forward":
            return forward if training else torch.no_grad()(forward)
        return functools.partial(backward, forward()) if measure == "backward" else lambda: backward(forward())

    def point(self, suite: Suite, workload: Workload, measure: str, values: tuple[float, ...]) -> Point:
        contender, status, reason = self.contender, self.status, self.reason
        if status == "measured" and measure not in contender.measures:
            status, reason = "absent", f"has no {measure} pass"
        return Point(
            suite.name, workload.fields(), measure, contender.name, contender.n, contender.ours, status, reason,
            self.backend, values, workload.flops(measure),
        )  # fmt: skip


@functools.lru_cache(maxsize=1)  # all passes of a workload are measured before the next one
def prepare_all(suite: Suite, workload: Workload, contenders: tuple[Contender, ...]) -> tuple[Prepared, ...]:
    inputs = make_inputs(workload)
    return tuple(_entrant(contender, inputs, suite.training) for contender in contenders)


def _entrant(contender: Contender, inputs: Inputs, training: bool) -> Prepared:
    reason = contender.why_not(inputs.workload)
    if reason is not None:
        return Prepared(contender, "absent", reason)
    try:
        passes = contender.prepare(inputs)
        reason = what_is_wrong(passes, contender.n, inputs, training and "backward" in contender.measures)
    except Exception as failure:  # of one contender; the others are timed all the same
        reason = f"fails: {one_line(failure)}"
    if reason is not None:
        return Prepared(contender, "wrong", reason)
    return Prepared(contender, "measured", None, passes, contender.backend(inputs.workload, training))
