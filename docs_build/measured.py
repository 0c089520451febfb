"""The newest results files of each kind, and how their numbers are written."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from bench.reporting.frame import frame, measured
from bench.reporting.ratios import ratio, read
from bench.reporting.record import Run
from docs_build.blocks import ROOT, table
from docs_build.names import NAMES

RESULTS = ROOT / "bench" / "results"
PASSES = ("forward", "backward")


def newest(kind: str, machine: str = "h100") -> Path:
    """Return the newest file of a kind, such as "grid", measured on an H100, or on another machine by its pattern."""
    return sorted(RESULTS.glob(f"{machine}-????-??-??-{kind}.json"))[-1]


def newest_of_cpu() -> Path:
    return sorted(RESULTS.glob("cpu-*.json"))[-1]


@functools.cache
def run(path: Path) -> Run:
    return read(path)


@functools.cache
def points(path: Path) -> pd.DataFrame:
    """Return what was measured, with `speed` in TFLOP/s."""
    timed = measured(frame(run(path).points))
    return timed.assign(speed=timed.flops / timed.value / 1e12)


def of_suite(path: Path, suite: str) -> pd.DataFrame:
    there = points(path)
    return there[there.suite == suite]


def value(group: pd.DataFrame, contender: str, measure: str, column: str = "value") -> float:
    """Return what a contender took in a pass, NaN if it was not measured."""
    found = group[(group.contender == contender) & (group.measure == measure)][column]
    return float(found.iloc[0]) if len(found) else math.nan


def costs_of_n(path: Path, contender: str) -> pd.DataFrame:
    """Return, for each point of the grid, the time of a contender over that of the same with n = 0."""
    there = points(path)
    there = there[there.suite == "grid"]
    plain = there[there.contender == contender.rpartition(" n=")[0] + " n=0"][["place", "point"]]
    pairs = there[there.contender == contender].merge(plain, on="place", suffixes=("", "_plain"))
    return pairs.assign(cost=list(map(ratio, pairs.point, pairs.point_plain)))


def source(*paths: Path) -> str:
    """Say in which files it stands, and when and of which commit it was measured."""
    return f"Measured: {'; '.join(map(_linked, paths))}."


def _linked(path: Path) -> str:
    stored = json.loads(path.read_text())
    name = path.name.removesuffix(".json")
    return f"[{name}](../{path.relative_to(ROOT)}), commit {stored['commit']}"


def headed(corner: str, contenders: Sequence[str], rows: list[list[str]], *paths: Path) -> str:
    """Return a table with a column for each contender, and where its numbers are."""
    found = table([corner, *(NAMES[contender] for contender in contenders)], rows)
    return f"{found}\n\n{source(*paths)}" if paths else found


def span(values: Iterable[float]) -> str:
    lowest, highest = min(values := list(values)), max(values)
    return f"{lowest:.2f}" if f"{lowest:.2f}" == f"{highest:.2f}" else f"{lowest:.2f} to {highest:.2f}"


def whole(number: float) -> str:
    return "-" if math.isnan(number) else f"{number:.0f}"


def three(number: float) -> str:
    """Return three significant digits, or from 100 on whole numbers; a dash for what was not measured."""
    if math.isnan(number):
        return "-"
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def percent(times: float) -> str:
    """Return how much more `times` as long is."""
    return f"{100 * times - 100:.1f} %".replace("-0.0", "0.0")
