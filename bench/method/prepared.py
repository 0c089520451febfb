"""Prepares and checks all contenders of one workload."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from bench.contenders.base import Contender, Passes
from bench.contenders.library import one_line
from bench.method.check import what_is_wrong
from bench.reporting.record import Point
from bench.workloads import PASSES, Inputs, Workload, make_inputs
from bench.workloads.calls import Call
from bench.workloads.suites import Case


@dataclass(frozen=True)
class Prepared:
    """A contender at one workload: the passes that it runs, or the reason why it has none."""

    contender: Contender
    status: str
    reason: str | None = None
    passes: Passes | None = None
    backend: str | None = None

    def run(self, measure: str) -> Callable[[], object] | None:
        """The function that is timed; None if the contender does not take part."""
        if self.passes is None or measure not in self.contender.measures:
            return None
        forward, backward = self.passes
        if measure == "forward":
            return forward
        return functools.partial(backward, forward()) if measure == "backward" else lambda: backward(forward())

    def point(self, case: Case, values: tuple[float, ...]) -> Point:
        contender, status, reason = self.contender, self.status, self.reason
        if status == "measured" and case.measure not in contender.measures:
            status, reason = "absent", f"has no {case.measure} pass"
        of_host = isinstance(case, Call)
        return Point(
            case.suite, case.workload.fields(), "host" if of_host else case.measure, contender.name, contender.n,
            contender.ours, status, reason, self.backend, values,
            None if of_host or case.measure not in PASSES else case.workload.flops(case.measure),
        )  # fmt: skip


@functools.lru_cache(maxsize=1)  # all passes of a workload are measured before the next one
def prepare_all(workload: Workload, training: bool, contenders: tuple[Contender, ...]) -> tuple[Prepared, ...]:
    inputs = make_inputs(workload)

    def wrong(contender: Contender, passes: Passes) -> str | None:
        return what_is_wrong(passes, contender.n, inputs, training and "backward" in contender.measures)

    return tuple(prepare(contender, inputs, training, wrong) for contender in contenders)


def prepare(
    contender: Contender, inputs: Inputs, training: bool, wrong: Callable[[Contender, Passes], str | None]
) -> Prepared:
    """Prepares a contender; `wrong` returns what is wrong with its results, or None."""
    reason = contender.why_not(inputs.workload)
    if reason is not None:
        return Prepared(contender, "absent", reason)
    try:
        passes = contender.prepare(inputs)
        reason = wrong(contender, passes)
    except Exception as failure:  # of one contender; the others are timed all the same
        reason = f"fails: {one_line(failure)}"
    if reason is not None:
        return Prepared(contender, "wrong", reason)
    return Prepared(contender, "measured", None, passes, contender.backend(inputs.workload, training))
