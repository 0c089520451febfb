"""What every reader of a results file needs: the file itself, its workloads, and ratios by rounds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path

import torch

from bench.reporting.record import Point, Run, load
from bench.workloads import Workload


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


def workload_of(point: Point) -> Workload:
    fields = {**point.problem, "sequences": tuple(point.problem.get("sequences", ()))}
    return Workload(**{**fields, "dtype": getattr(torch, fields["dtype"])})


def ratio(over: Point, under: Point) -> float:
    """The median over the rounds of how `over` compares to `under` in each."""
    return statistics.median(rounds_of_ratio(over, under))


def rounds_of_ratio(over: Point, under: Point) -> list[float]:
    """How `over` compares to `under` in each round; one ratio, of the medians, where their rounds do not pair."""
    if len(over.values) != len(under.values):
        return [over.median / under.median]
    return [a / b for a, b in zip(over.values, under.values, strict=True)]
