"""The points of a run as a data frame, which tables and pictures are made of."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

from bench.reporting.ratios import ratio, workload_of
from bench.reporting.record import Point
from bench.workloads import PASSES

ORDER = ["causal", "E", "S", "L", "batch", "heads_kv"]  # of workloads


def frame(points: Iterable[Point]) -> pd.DataFrame:
    """A row for each point. Its `value` is the median; `line` is the contender without its n."""
    return pd.DataFrame(map(_row, points))


def _row(point: Point) -> dict[str, object]:
    workload = workload_of(point)
    return {
        "point": point, "place": point.place, "suite": point.suite, "measure": point.measure, "n": point.n,
        "ours": point.ours, "status": point.status, "contender": point.contender,
        "line": point.contender.removesuffix(f" n={point.n}"), "value": point.median if point.values else None,
        "flops": point.flops, "workload": str(workload), "dtype": point.problem["dtype"], "causal": workload.causal,
        "mask": "causal" if workload.causal else "full", "E": workload.width, "S": workload.len_k,
        "L": workload.length, "batch": workload.batch, "heads_kv": workload.num_heads_kv,
        "BxH": f"{workload.batch}x{workload.heads}", "block": workload.block,
    }  # fmt: skip


def measured(points: pd.DataFrame) -> pd.DataFrame:
    return points[points.status == "measured"]


def contenders(points: pd.DataFrame, column: str = "contender") -> list[str]:
    """Their names, peers first, otherwise as they come."""
    return list(points.sort_values("ours", kind="stable")[column].unique())


def by_pass(points: pd.DataFrame, passes: Iterable[str] = PASSES) -> pd.DataFrame:
    """The points of these passes, one pass after the other."""
    return pd.concat([points[points.measure == each] for each in passes])


def fastest(points: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    return points.loc[points.groupby(by, sort=False).value.idxmin()]


def best_pairs(points: pd.DataFrame) -> pd.DataFrame:
    """At each place the fastest of ours that computes an n other than 0, with the fastest peer, whatever its n."""
    timed = by_pass(measured(points))
    ours, peers = timed[timed.ours & (timed.n != "0")], timed[~timed.ours]
    best = (fastest(side, ["place"]) for side in (ours, peers))
    pairs = next(best).merge(next(best)[["place", "point"]], on="place", suffixes=("", "_of_peer"))
    return pairs.assign(times_faster=list(map(ratio, pairs.point_of_peer, pairs.point)))
