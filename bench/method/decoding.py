"""Measures decoding: checks each contender, then times its calls on the device, in a step, and in a CUDA graph."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from bench.contenders.base import Contender, Passes, sinks_of
from bench.contenders.library import one_line
from bench.method import interleaved
from bench.method.clocks import Clock, Run, StepClock
from bench.method.prepared import Prepared, prepare
from bench.reporting.record import Point
from bench.workloads import Inputs, make_inputs
from bench.workloads.decoding import Decoding
from tests.compare import error, tolerance
from tests.oracle import attention_n

LAYERS = 32  # of a step
# A step has fewer where it would take longer, but at least some.
LONGEST_STEP, FEWEST_LAYERS = 0.01, 4


def measure(case: Decoding, contenders: Sequence[Contender], clock: Clock) -> list[Point]:
    """Returns a point for each contender and each of MEASURES; `clock` is that of the device."""
    inputs = make_inputs(case.workload)
    exact = Exact(inputs)

    def wrong(contender: Contender, passes: Passes) -> str | None:
        return exact.what_is_wrong(passes.forward(), contender.n)

    with torch.no_grad():
        present = [prepare(contender, inputs, False, wrong) for contender in contenders]
        calls = {each.contender.name: each.passes.forward for each in present if each.passes is not None}
        times = {"forward": interleaved.measure(calls, clock)}
        layers = {name: _layers(statistics.median(values)) for name, values in times["forward"].items()}
        eager = {name: _repeated(call, layers[name]) for name, call in calls.items()}
        times["eager"] = _time_steps(eager, layers)
        graphs, reasons = _capture_all(present, layers, exact)
        times["graph"] = _time_steps(graphs, layers)
    return [
        *(each.point(case, tuple(times["forward"].get(each.contender.name, ()))) for each in present),
        *(_of_step(each, case, "eager", times["eager"]) for each in present),
        *(_of_step(each, case, "graph", times["graph"], reasons.get(each.contender.name)) for each in present),
    ]


class Exact:
    """The outputs in float64 of some query heads of the first and the last sequence, and how far off others may be."""

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs
        self._by_n: dict[str, tuple[Tensor, float]] = {}
        heads, batch = inputs.workload.heads, inputs.workload.batch
        self._checked = [(b, h) for b in sorted({0, batch - 1}) for h in sorted({0, 1, heads // 2, heads - 1})]

    def what_is_wrong(self, out: Tensor, n: str) -> str | None:
        """Says how far `out` is from float64 if that is more than FlashAttention's rule allows; None if it is right."""
        if out.shape != self._inputs.q.shape:
            return f"out has shape {tuple(out.shape)}"
        if n not in self._by_n:
            self._by_n[n] = self._reference(n)
        exact, allowed = self._by_n[n]
        distance = error(torch.stack([out[place] for place in self._checked]), exact)
        return None if distance <= allowed else f"out by {distance:.1e}, allowed {allowed:.1e}"

    def _reference(self, n: str) -> tuple[Tensor, float]:
        dtype = self._inputs.workload.dtype
        exact, plain = (
            torch.stack([self._attend(*place, n, computed) for place in self._checked])
            for computed in (torch.float64, dtype)
        )
        return exact, tolerance("out", exact, plain, dtype)

    def _attend(self, b: int, head: int, n: str, dtype: torch.dtype) -> Tensor:
        inputs, workload = self._inputs, self._inputs.workload
        head_kv = head // (workload.heads // workload.num_heads_kv)
        q = inputs.q[b : b + 1, head : head + 1].to(dtype)
        k, v = (self._keys(x, b, head_kv)[None, None].to(dtype) for x in (inputs.k, inputs.v))
        sinks = None
        if n != "0":
            sinks = sinks_of(workload, n).detach()[head : head + 1].to(torch.promote_types(dtype, torch.float32))
        return attention_n(q, k, v, sinks=sinks, causal=workload.causal)[0][0, 0]

    def _keys(self, x: Tensor, b: int, head: int) -> Tensor:
        table = self._inputs.table
        return x[b, head] if table is None else x[table[b].long(), head].flatten(0, 1)


def _layers(seconds: float) -> int:
    return max(FEWEST_LAYERS, min(LAYERS, math.floor(LONGEST_STEP / seconds)))


def _repeated(call: Run, times: int) -> Run:
    def step() -> None:
        for _ in range(times):
            call()

    return step


def _time_steps(steps: Mapping[str, Run], layers: Mapping[str, int]) -> dict[str, list[float]]:
    for step in steps.values():
        step()
    return interleaved.measure(steps, StepClock({step: layers[name] for name, step in steps.items()}))


def _capture_all(
    present: Sequence[Prepared], layers: Mapping[str, int], exact: Exact
) -> tuple[dict[str, Run], dict[str, str]]:
    """Returns by name the replays of the steps, and the reasons why there are none."""
    replays: dict[str, Run] = {}
    reasons: dict[str, str] = {}
    for each in present:
        name = each.contender.name
        if each.passes is None:
            continue
        if not torch.cuda.is_available():
            reasons[name] = "CUDA graphs are for a GPU"
            continue
        try:
            replay, out = _captured(each.passes.forward, layers[name])
            out.fill_(math.nan)
            replay()
            wrong = exact.what_is_wrong(out, each.contender.n)
        except Exception as failure:  # of one contender
            wrong = f"fails: {one_line(failure)}"
        if wrong is None:
            replays[name] = replay
        else:
            reasons[name] = f"in a CUDA graph: {wrong}"
    return replays, reasons


def _captured(call: Callable[[], Tensor], times: int) -> tuple[Run, Tensor]:
    """Captures so many calls; returns the replay, and the output of the last one.

    `torch.cuda.graph` would collect garbage and empty the cache of memory, which takes longer than all that is timed.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
        torch.cuda.synchronize()
        graph.capture_begin()
        try:
            for _ in range(times):
                out = call()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph.replay, out


def _of_step(
    each: Prepared, case: Decoding, measure: str, times: Mapping[str, Sequence[float]], reason: str | None = None
) -> Point:
    if reason is not None:
        each = Prepared(each.contender, "absent", reason)
    return each.point(dataclasses.replace(case, measure=measure), tuple(times.get(each.contender.name, ())))
