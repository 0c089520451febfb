"""The line that a run prints for each case as soon as it is measured."""

from __future__ import annotations

from collections.abc import Mapping

from bench.reporting.ratios import measured
from bench.reporting.record import Point


def in_short(found: Mapping[str, Point]) -> str:
    """Our best and the best peer of one case."""
    timed = measured(found.values())
    sides = [point for point in timed if point.ours and point.n != "0"], [point for point in timed if not point.ours]
    best = [min(side, key=lambda point: point.median) for side in sides if side]
    wrong = [f"{name} is wrong" for name, point in found.items() if point.status == "wrong"]
    return ", ".join([*(f"{point.contender} {_time(point.median)}{_rate(point)}" for point in best), *wrong])


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"


def _rate(point: Point) -> str:
    return f" ({point.flops / point.median / 1e12:.3g} TFLOP/s)" if point.flops else ""
