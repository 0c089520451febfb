"""What tables, pictures and comparisons work out from the points of a run."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from bench.reporting.record import Point, Run, load
from bench.workloads import PASSES, Workload


class Duel(NamedTuple):
    """The fastest of ours that computes an n other than 0 against the fastest peer, whatever its n."""

    ours: Point
    peer: Point

    @property
    def times_faster(self) -> float:
        return statistics.median(rounds_of_ratio(self.peer, self.ours))


def read(path: Path) -> Run:
    try:
        return load(path)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: expected a results file as bench.reporting.record writes it, "
            f"got {type(error).__name__}: {error}; name another file or measure again"
        ) from error


def measured(points: Iterable[Point]) -> list[Point]:
    return [point for point in points if point.status == "measured"]


def contenders(points: Iterable[Point]) -> list[str]:
    """Their names, peers first, otherwise as they come."""
    return list(dict.fromkeys(point.contender for point in sorted(points, key=lambda point: point.ours)))


def base_name(point: Point) -> str:
    """The contender without its n."""
    return point.contender.removesuffix(f" n={point.n}")


def workload_of(point: Point) -> Workload:
    fields = {**point.problem, "sequences": tuple(point.problem.get("sequences", ()))}
    return Workload(**{**fields, "dtype": getattr(torch, fields["dtype"])})


def by_place(points: Iterable[Point]) -> dict[tuple[object, ...], list[Point]]:
    """What was measured, so that each list holds the points that may be compared."""
    places = defaultdict(list)
    for point in measured(points):
        places[point.place].append(point)
    return dict(places)


def duels(points: Iterable[Point]) -> list[Duel]:
    """One for each place where both sides were timed."""
    found = []
    for there in by_place(point for point in points if point.measure in PASSES).values():
        ours = [point for point in there if point.ours and point.n != "0"]
        peers = [point for point in there if not point.ours]
        if ours and peers:
            found.append(Duel(fastest(ours), fastest(peers)))
    return found


def rounds_of_ratio(over: Point, under: Point) -> list[float]:
    """How `over` compares to `under` in each round; one ratio, of the medians, where their rounds do not pair."""
    if len(over.values) != len(under.values):
        return [over.median / under.median]
    return [a / b for a, b in zip(over.values, under.values, strict=True)]


def fastest(points: Sequence[Point]) -> Point:
    return min(points, key=lambda point: point.median)
