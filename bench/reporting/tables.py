"""A run as tables."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pandas as pd

from bench.reporting.decoding import tables as decode_tables
from bench.reporting.frame import best_pairs, by_pass, contenders, frame, measured
from bench.reporting.ratios import ratio, workload_of
from bench.reporting.record import Run
from bench.workloads import PASSES
from bench.workloads.calls import PASSES_OF_CALLS, SUITE


class Unit(NamedTuple):
    """What the cells of a table hold."""

    name: str
    scale: float
    best: Callable[[pd.Series], float] = pd.Series.min


MILLISECONDS = Unit("ms", 1e3)
MICROSECONDS = Unit("µs", 1e6)
TERAFLOPS = Unit("TFLOP/s", 1e-12, pd.Series.max)
_COSTS = {
    "memory": ("Peak memory", Unit("MB", 1e-6)),
    "host": ("Host time a call", MICROSECONDS),
    "first call": ("First call in a new process", Unit("s", 1.0)),
}


class Section(NamedTuple):
    """A heading in Markdown, and what stands below it."""

    heading: str
    table: pd.DataFrame | None = None
    notes: str = ""

    def __str__(self) -> str:
        return "\n\n".join(
            filter(None, [self.heading, "" if self.table is None else _markdown(self.table), self.notes])
        )


def markdown(run: Run) -> str:
    """All tables of a run, below a heading that says what it ran on."""
    points = frame(run.points)
    sections = (*speed(points, run.machine["kind"]), *decoding(run), *costs(points))
    return "\n\n".join([_heading(run), *map(str, sections)])


def _heading(run: Run) -> str:
    machine = run.machine
    facts = [
        f"{name} {machine[name]}" for name in ("torch", "cuda", "driver", "threads", "python") if machine.get(name)
    ]
    facts += [f"{name} {version}" for name, version in (machine.get("packages") or {}).items() if name != "torch"]
    return f"## {machine['device']}\n\n{', '.join(facts)}; commit {run.commit}, {run.date}: `{run.command}`"


def speed(points: pd.DataFrame, kind: str) -> Iterator[Section]:
    """Of each suite a table for each pass and dtype, and in the grid for each E."""
    for suite, there in points[points.measure.isin(PASSES)].groupby("suite", sort=False):
        yield Section(f"### {suite}")
        labels = ["S", "mask", "BxH"] if suite == "grid" else ["workload", "BxH"]
        timed = by_pass(measured(there))
        for measure, of_pass in timed.groupby("measure", sort=False):
            for (dtype, *width), group in of_pass.groupby(["dtype", *(["E"] if suite == "grid" else [])]):
                unit = _unit(str(suite), group, kind)
                title = ", ".join([str(measure), *(f"E = {each}" for each in width), dtype, unit.name])
                yield Section(f"**{title}**", _by_contender(group, labels, unit))
        yield from _left_out(there)


def decoding(run: Run) -> Iterator[Section]:
    """Returns two tables: the bandwidth that each call reaches, and the time of a call in a decode step."""
    copy_bytes = (run.machine.get("ceilings") or {}).get("copy_bytes")
    for title, table in decode_tables(run.points, copy_bytes):
        yield Section(f"### {title}", table)


def costs(points: pd.DataFrame) -> Iterator[Section]:
    """What pytest-benchmark does not show: what else than the time of the device was measured, and the ratios."""
    of_calls = points.suite.str.startswith(SUITE)
    yield from _calls(points[of_calls])
    for measure, (title, unit) in _COSTS.items():
        there = points[(points.measure == measure) & ~of_calls]
        if len(there):
            yield Section(f"### {title}, {unit.name}")
            for (suite, *_, dtype), group in measured(there).groupby(["suite", "E", "causal", "dtype"]):
                group = group.assign(**{"": group.workload + " " + group.BxH})
                yield Section(f"**{suite}, {dtype}**", _turned(_by_contender(group, [""], unit)))
            yield from _left_out(there)
    yield from _lengths(points)
    yield from _best_peers(points)


def _unit(suite: str, points: pd.DataFrame, kind: str) -> Unit:
    if suite == "decode":  # bound by memory and latency: operations a second say nothing
        return MICROSECONDS
    return TERAFLOPS if kind == "cuda" and points.flops.notna().all() else MILLISECONDS


def _by_contender(points: pd.DataFrame, labels: list[str], unit: Unit) -> pd.DataFrame:
    """A row for each workload, a column for each contender, and the best of each row in bold."""
    amount = points.flops / points.value if unit is TERAFLOPS else points.value
    ordered = points.assign(amount=amount * unit.scale).sort_values(["E", "S", "L", "causal", "batch"], kind="stable")
    rows = ordered.set_index(labels).index.unique()
    wide = ordered.set_index([*labels, "contender"]).amount.unstack().reindex(rows)[contenders(points)]

    def cells(row: pd.Series) -> pd.Series:
        shown, best = row.map(_digits), _digits(unit.best(row))
        return shown.where(shown != best, f"**{best}**")

    return wide.apply(cells, axis=1).reset_index()


def _turned(table: pd.DataFrame) -> pd.DataFrame:
    return table.set_index("").T.rename_axis("").reset_index()


def _calls(points: pd.DataFrame) -> Iterator[Section]:
    """Of each pass a row for each kind of call, with its median, its best and its ratio to PyTorch's SDPA."""
    kinds = points.suite.str.removeprefix(SUITE).str.rsplit(", ", n=1)
    timed = points.assign(call=kinds.str[0], calls=kinds.str[1])
    for name in PASSES_OF_CALLS:
        there = measured(timed[timed.calls == name])
        cells: dict[str, dict[str, str]] = {}
        for call, group in there.groupby("call", sort=False):
            torchs = group[group.line.isin(["torch sdpa", "torch sdpa mask"])].point
            for point, line in zip(group.point, group.line, strict=True):
                times = f" {ratio(point, torchs.iloc[0]):.2f}x" if len(torchs) else ""
                best = _digits(min(point.values) * 1e6)
                cells.setdefault(line, {})[str(call)] = f"{_digits(point.median * 1e6)} ({best}){times}"
        if cells:
            table = pd.DataFrame(cells)[contenders(there, "line")].fillna("-").rename_axis("call").reset_index()
            yield Section(f"### Host time, {name}, µs: median (best), times PyTorch's SDPA", table)
    yield from _left_out(points)


def _lengths(points: pd.DataFrame) -> Iterator[Section]:
    """For each stream of changing lengths a row for each contender, the fastest first."""
    for suite, wall in points[points.measure == "wall"].groupby("suite", sort=False):
        steps = measured(points[(points.suite == suite) & (points.measure == "step")])
        of_host = {point.contender: point.values for point in steps.point}
        rows = [
            [point.contender, *map(_digits, (1e3 * point.median, 1e3 * statistics.median(of_host[point.contender]),
             1e3 * max(of_host[point.contender]))), point.backend or ""]
            for point in measured(wall).sort_values("value", kind="stable").point
        ]  # fmt: skip
        table = pd.DataFrame(rows, columns=["", "wall, mean", "host, median", "host, worst", "served by"])
        yield Section(f"### {suite}, ms a call, up to {wall.workload.iloc[0]}", table)
        yield from _left_out(wall)


def _best_peers(points: pd.DataFrame) -> Iterator[Section]:
    pairs = best_pairs(points).sort_values("suite", kind="stable") if points.measure.isin(PASSES).any() else points[:0]
    if len(pairs):
        table = pd.DataFrame({
            "suite": pairs.suite, "measure": pairs.measure, "workload": pairs.workload + " " + pairs.BxH,
            "dtype": pairs.dtype, "our fastest": pairs.contender, "ms": (pairs.value * 1e3).map(_digits),
            "best peer": [peer.contender for peer in pairs.point_of_peer],
            "peer's ms": [_digits(peer.median * 1e3) for peer in pairs.point_of_peer],
            "times faster": pairs.times_faster.map("{:.2f}".format),
        })  # fmt: skip
        yield Section("### Ours (n not 0) over the best peer (any n)", table)


def _left_out(points: pd.DataFrame) -> Iterator[Section]:
    """Who is absent or wrong and why, each once."""
    notes = [
        f"- wrong at {workload_of(point)}: {point.contender} ({_reason(point.reason)})"
        for point in points[points.status == "wrong"].point
    ]
    absent = points[points.status == "absent"]
    absent = absent.assign(reason=[_reason(point.reason) for point in absent.point])
    workloads = points.point.map(lambda point: str(point.problem)).nunique()
    for (name, reason), group in absent.groupby(["contender", "reason"], sort=False):
        where = group.point.map(lambda point: str(point.problem)).nunique()
        part = "" if where == workloads else f" from {where} of {workloads} workloads"
        notes.append(f"- absent{part}: {name} ({reason})")
    if notes:
        yield Section("", notes="\n".join(dict.fromkeys(notes)))


def _reason(reason: str | None) -> str:
    return textwrap.shorten(reason or "no reason given", 200)


def _digits(value: float) -> str:
    """Three significant digits, without an exponent; a dash for what was not measured."""
    if math.isnan(value):
        return "-"
    places = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:.{max(0, places)}f}"


def _markdown(table: pd.DataFrame) -> str:
    rows = [list(table.columns), ["---"] * len(table.columns), *table.values.tolist()]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)
