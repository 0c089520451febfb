"""Decoding as tables: how near the kernels are to the bandwidth, and what a call takes in a decode step."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence

import pandas as pd

from bench.reporting.ratios import measured, ratio, workload_of
from bench.reporting.record import Point
from bench.workloads import Workload
from bench.workloads.decoding import SUITE

AUTOMATIC, KERNELS = "attn_n kvcache n=1", "attn_n kvcache triton:decode n=1"
# A peer with sinks, which a step of ours is held against.
_IN_STEPS = ("attn_n kvcache n=1", "attn_n kvcache triton:decode n=1", "flash-attn 3 sink n=1")

ByContender = Mapping[str, Point]


def tables(points: Sequence[Point], copy_bytes: float | None) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yields a title and a table of the device's time, and of the steps; `copy_bytes` is that of `Run.machine`."""
    timed = [point for point in measured(points) if point.suite == SUITE and "block" in point.problem]
    of_device, eager, graph = (_by_workload(timed, measure) for measure in ("forward", "eager", "graph"))
    if of_device:
        device = functools.partial(_device, of_device, copy_bytes)
        yield "Decoding, time of the device, µs", pd.DataFrame(map(device, of_device))
        yield (
            "Decoding, wall time of a call in a step, µs: launched one by one / as a CUDA graph",
            pd.DataFrame([_step(workload, eager.get(workload, {}), graph.get(workload, {})) for workload in of_device]),
        )


def _by_workload(points: Sequence[Point], measure: str) -> dict[Workload, dict[str, Point]]:
    found: dict[Workload, dict[str, Point]] = {}
    for point in points:
        if point.measure == measure:
            found.setdefault(workload_of(point), {})[point.contender] = point
    return found


def _device(
    everywhere: Mapping[Workload, ByContender], copy_bytes: float | None, workload: Workload
) -> dict[str, object]:
    there = everywhere[workload]
    kernels, automatic = there.get(KERNELS), there.get(AUTOMATIC)
    contiguous = everywhere.get(dataclasses.replace(workload, block=0), {}).get(KERNELS)
    ours = _fastest([point for point in there.values() if point.ours and point.n != "0"])
    peer = _fastest([point for point in there.values() if not point.ours])
    every = _fastest(list(there.values()))
    read = None if kernels is None else workload.bytes_of_kv / kernels.median
    return {
        **_size(workload),
        "triton:decode": _microseconds(kernels),
        "TB/s": "-" if read is None else f"{read / 1e12:.2f}",
        "of copy": "-" if read is None or copy_bytes is None else f"{read / copy_bytes:.2f}",
        "of contiguous": _times(contiguous, kernels),
        "automatic": _microseconds(automatic),
        "by": "" if automatic is None or automatic.backend is None else automatic.backend,
        "of the fastest": _times(every, automatic),
        "ours over peer": _times(peer, ours),
        "best peer": "-" if peer is None else peer.contender,
        "peer": _microseconds(peer),
    }


def _step(workload: Workload, eager: ByContender, graph: ByContender) -> dict[str, object]:
    def both(name: str | None) -> str:
        return f"{_microseconds(eager.get(str(name)))} / {_microseconds(graph.get(str(name)))}"

    peer = _fastest([point for point in eager.values() if not point.ours])
    return {
        **_size(workload),
        **{name: both(name) for name in _IN_STEPS},
        "best peer": "-" if peer is None else f"{peer.contender} {both(peer.contender)}",
    }


def _size(workload: Workload) -> dict[str, object]:
    return {
        "L": workload.length, "heads": f"{workload.heads}/{workload.num_heads_kv}", "B": workload.batch,
        "S": workload.len_k, "block": workload.block or "-", "GB": f"{workload.bytes_of_kv / 1e9:.3g}",
    }  # fmt: skip


def _fastest(points: Sequence[Point]) -> Point | None:
    return min(points, key=lambda point: point.median, default=None)


def _microseconds(point: Point | None) -> str:
    return "-" if point is None else f"{point.median * 1e6:.4g}"


def _times(over: Point | None, under: Point | None) -> str:
    return "-" if over is None or under is None else f"{ratio(over, under):.2f}"
