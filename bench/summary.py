"""What a run shows of itself: a line for each workload, and the ratios at its end."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence

from bench.reporting.ratios import by_place, fastest, measured, rounds_of_ratio, workload_of
from bench.reporting.record import Point

# The automatic choice at n = 1 over PyTorch's own SDPA at n = 0, and eager softmax_n over it.
_OURS, _TORCH, _EAGER = "attn_n n=1", "torch sdpa", "eager softmax_n n=1"


def in_short(found: Mapping[str, Point]) -> str:
    """Our best and the best peer at one workload."""
    timed = measured(found.values())
    sides = [point for point in timed if point.ours and point.n != "0"], [point for point in timed if not point.ours]
    best = [fastest(side) for side in sides if side]
    wrong = [f"{name} is wrong" for name, point in found.items() if point.status == "wrong"]
    return ", ".join([*(f"{point.contender} {_time(point.median)}{_rate(point)}" for point in best), *wrong])


def table(points: Iterable[Point]) -> list[str]:
    """The ratio of n = 1 to PyTorch's SDPA at n = 0, paired by rounds, and of eager softmax_n to n = 1."""
    rows = [["", _OURS, "best torch sdpa n=0", "ratio", "eager / ours"]]
    for there in by_place(point for point in points if point.measure != "memory").values():
        found = {point.contender: point for point in there}
        ours, peers = found.get(_OURS), [p for name, p in found.items() if name.startswith(_TORCH)]
        if ours is None or not peers:
            continue
        peer = fastest(peers)
        eager = f"{found[_EAGER].median / ours.median:.1f}" if _EAGER in found else "-"
        name = f"{ours.suite} {ours.measure} {workload_of(ours)}"
        rows.append(
            [
                name,
                _time(ours.median),
                _time(peer.median),
                f"{statistics.median(rounds_of_ratio(ours, peer)):.3f}",
                eager,
            ]
        )
    return _aligned(rows) if len(rows) > 1 else []


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"


def _rate(point: Point) -> str:
    return f" ({point.flops / point.median / 1e12:.3g} TFLOP/s)" if point.flops else ""


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
