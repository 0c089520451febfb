"""python -m bench.report RESULTS...: results files as Markdown tables on stdout and as pictures in a folder."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import statistics
import sys
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.reporting import figures
from bench.reporting.ratios import contenders, duels, measured, read, workload_of
from bench.reporting.record import Point, Run
from bench.workloads import PASSES, Workload


class Unit(NamedTuple):
    """What the cells of a table hold."""

    name: str
    of: Callable[[Point], float]
    best: Callable[[Iterable[float]], float] = min


MEGABYTES = Unit("MB", lambda point: point.median / 1e6)
SECONDS = Unit("s", lambda point: point.median)
MILLISECONDS = Unit("ms", lambda point: point.median * 1e3)
MICROSECONDS = Unit("µs", lambda point: point.median * 1e6)
TERAFLOPS = Unit("TFLOP/s", lambda point: (point.flops or math.nan) / point.median / 1e12, max)

_COSTS = {"memory": ("Peak memory", MEGABYTES), "host": ("Host time a call", MICROSECONDS)}
_COSTS["first call"] = ("First call in a new process", SECONDS)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description="Tables and pictures of results files.")
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULTS.json")
    parser.add_argument("--out", type=Path, help="where the pictures go (default: beside the first results file)")
    options = parser.parse_args(arguments)
    try:
        runs = merged([read(path) for path in options.results])
    except ValueError as error:
        parser.error(str(error))
    print("\n\n".join(markdown(run) for run in runs))
    try:
        for run, stem in zip(runs, _stems(runs), strict=True):
            for path in figures.draw(run, options.out or options.results[0].parent, stem):
                print(path, file=sys.stderr)
    except ImportError as error:
        sys.exit(str(error))


def merged(runs: Sequence[Run]) -> list[Run]:
    """One run for each machine and commit; what was measured again counts as it was last."""
    groups = defaultdict(list)
    for run in sorted(runs, key=lambda run: run.date):
        # The ceilings are measurements themselves, and differ from run to run.
        machine = {name: value for name, value in run.machine.items() if name != "ceilings"}
        groups[json.dumps([machine, run.commit], sort_keys=True)].append(run)
    return [_joined(group) for group in groups.values()]


def _joined(group: Sequence[Run]) -> Run:
    ceilings: dict[str, float] = {}
    for run in group:
        for name, value in (run.machine.get("ceilings") or {}).items():
            ceilings[name] = max(value, ceilings.get(name, value))
    points = {(point.place, point.contender): point for run in group for point in run.points}
    dates, commands = (dict.fromkeys(each) for each in zip(*((run.date, run.command) for run in group), strict=True))
    machine = {**group[-1].machine, "ceilings": ceilings}
    return Run(machine, group[0].commit, " and ".join(dates), "; ".join(commands), list(points.values()))


def _stems(runs: Sequence[Run]) -> list[str]:
    """How the names of each run's pictures start, no two alike."""
    taken: dict[str, int] = defaultdict(int)
    stems = []
    for run in runs:
        stem = re.sub(r"[^a-z0-9.+]+", "-", f"{run.machine['device']} {run.date[:10]} {run.commit[:12]}".lower()).strip(
            "-"
        )
        taken[stem] += 1
        stems.append(stem if taken[stem] == 1 else f"{stem}-{taken[stem]}")
    return stems


def markdown(run: Run) -> str:
    """All tables of a run, below a heading that says what it ran on."""
    sections = [_heading(run)]
    timed = [point for point in run.points if point.measure in PASSES]
    for suite in dict.fromkeys(point.suite for point in timed):
        points = [point for point in timed if point.suite == suite]
        sections += [f"### {suite}", *_speed_tables(suite, points, run.machine["kind"]), *_left_out(points)]
    for measure, (title, unit) in _COSTS.items():
        points = [point for point in run.points if point.measure == measure]
        if points:
            sections += [f"### {title}, {unit.name}", *_cost_tables(points, unit), *_left_out(points)]
    return "\n\n".join([*sections, *_lengths_tables(run.points), *_duel_table(run.points)])


def _heading(run: Run) -> str:
    machine = run.machine
    facts = [
        f"{name} {machine[name]}" for name in ("torch", "cuda", "driver", "threads", "python") if machine.get(name)
    ]
    facts += [f"{name} {version}" for name, version in (machine.get("packages") or {}).items() if name != "torch"]
    return f"## {machine['device']}\n\n{', '.join(facts)}; commit {run.commit}, {run.date}: `{run.command}`"


def _speed_tables(suite: str, points: Sequence[Point], kind: str) -> list[str]:
    """One for each measure and dtype, and in the grid for each width."""

    def order(point: Point) -> tuple[int, str, int]:
        return PASSES.index(point.measure), point.problem["dtype"], point.problem["width"] if suite == "grid" else 0

    tables = []
    for (_, dtype, width), group in itertools.groupby(sorted(measured(points), key=order), key=order):
        there = list(group)
        unit = _unit(suite, there, kind)
        parts = [there[0].measure, *([f"E = {width}"] if width else []), dtype, unit.name]
        table = _grid_table(there, unit) if suite == "grid" else _workload_table(there, unit)
        tables.append(f"**{', '.join(parts)}**\n\n{table}")
    return tables


def _unit(suite: str, points: Sequence[Point], kind: str) -> Unit:
    if suite == "decode":  # bound by memory and latency: operations a second say nothing
        return MICROSECONDS
    return TERAFLOPS if kind == "cuda" and all(point.flops for point in points) else MILLISECONDS


def _grid_table(points: Sequence[Point], unit: Unit) -> str:
    def labels(workload: Workload) -> list[str]:
        return [str(workload.len_k), "causal" if workload.causal else "full", f"{workload.batch}x{workload.heads}"]

    return _table(["S", "mask", "BxH"], labels, points, unit)


def _workload_table(points: Sequence[Point], unit: Unit) -> str:
    return _table(
        ["workload", "BxH"], lambda workload: [str(workload), f"{workload.batch}x{workload.heads}"], points, unit
    )


def _table(titles: Sequence[str], labels: Callable[[Workload], list[str]], points: Sequence[Point], unit: Unit) -> str:
    """A row for each workload, a column for each contender."""
    names = contenders(points)
    rows: dict[Workload, dict[str, float]] = defaultdict(dict)
    for point in points:
        rows[workload_of(point)][point.contender] = unit.of(point)
    ordered = sorted(
        rows, key=lambda workload: (workload.width, workload.len_k, workload.length, workload.causal, workload.batch)
    )
    return _lines([*titles, *names], [[*labels(each), *_cells(rows[each], names, unit)] for each in ordered])


def _cost_tables(points: Sequence[Point], unit: Unit) -> list[str]:
    """One for each suite, width, mask and dtype, with a row for each contender: there are few workloads."""

    def order(point: Point) -> tuple[str, int, bool, str]:
        workload = workload_of(point)
        return point.suite, workload.width, workload.causal, point.problem["dtype"]

    tables = []
    for (suite, *_, dtype), group in itertools.groupby(sorted(measured(points), key=order), key=order):
        there = list(group)
        workloads = sorted(
            {workload_of(point) for point in there}, key=lambda workload: (workload.len_k, workload.batch)
        )
        names = contenders(there)
        values = {(workload_of(point), point.contender): unit.of(point) for point in there}
        columns = [
            _cells({name: values[each, name] for name in names if (each, name) in values}, names, unit)
            for each in workloads
        ]
        rows = [[name, *cells] for name, *cells in zip(names, *columns, strict=True)]
        titles = [f"{workload} {workload.batch}x{workload.heads}" for workload in workloads]
        tables.append(f"**{suite}, {dtype}**\n\n{_lines(['', *titles], rows)}")
    return tables


def _lengths_tables(points: Sequence[Point]) -> list[str]:
    """One for each stream of changing lengths, with a row for each contender, the fastest first."""
    sections = []
    for suite in dict.fromkeys(point.suite for point in points if point.measure == "wall"):
        there = [point for point in points if point.suite == suite]
        steps = {point.contender: point.values for point in measured(there) if point.measure == "step"}
        wall = [point for point in there if point.measure == "wall"]
        rows = [
            [point.contender, *(_digits(1e3 * value) for value in (
                point.median, statistics.median(steps[point.contender]), max(steps[point.contender])
            )), point.backend or ""]
            for point in sorted(measured(wall), key=lambda point: point.median)
        ]  # fmt: skip
        titles = ["", "wall, mean", "host, median", "host, worst", "served by"]
        sections += [f"### {suite}, ms a call, up to {workload_of(wall[0])}", _lines(titles, rows), *_left_out(wall)]
    return sections


def _duel_table(points: Sequence[Point]) -> list[str]:
    rows = []
    for duel in sorted(duels(points), key=lambda duel: (duel.ours.suite, PASSES.index(duel.ours.measure))):
        workload = workload_of(duel.ours)
        place = [duel.ours.suite, duel.ours.measure, f"{workload} {workload.batch}x{workload.heads}"]
        sides = [cell for side in duel for cell in (side.contender, _digits(side.median * 1e3))]
        rows.append([*place, duel.ours.problem["dtype"], *sides, f"{duel.times_faster:.2f}"])
    titles = ["suite", "measure", "workload", "dtype", "our fastest", "ms", "best peer", "ms", "times faster"]
    return ["### Ours (n not 0) over the best peer (any n)", _lines(titles, rows)] if rows else []


def _left_out(points: Sequence[Point]) -> list[str]:
    """Who is absent or wrong and why, each once."""
    workloads = {str(point.problem) for point in points}
    absent: dict[tuple[str, str], set[str]] = defaultdict(set)
    notes: dict[str, None] = {}
    for point in points:
        reason = textwrap.shorten(point.reason or "no reason given", 200)
        if point.status == "absent":
            absent[point.contender, reason].add(str(point.problem))
        elif point.status == "wrong":
            notes[f"- wrong at {workload_of(point)}: {point.contender} ({reason})"] = None
    for (name, reason), where in absent.items():
        part = "" if where == workloads else f" from {len(where)} of {len(workloads)} workloads"
        notes[f"- absent{part}: {name} ({reason})"] = None
    return ["\n".join(notes)] if notes else []


def _cells(values: Mapping[str, float], names: Sequence[str], unit: Unit) -> list[str]:
    shown = {name: _digits(value) for name, value in values.items()}
    best = _digits(unit.best(values.values())) if values else ""
    return [f"**{best}**" if shown.get(name) == best else shown.get(name, "-") for name in names]


def _digits(value: float) -> str:
    """Three significant digits, without an exponent."""
    places = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:.{max(0, places)}f}"


def _lines(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rule = ["---"] * len(titles)
    return "\n".join(f"| {' | '.join(row)} |" for row in (titles, rule, *rows))


if __name__ == "__main__":
    main()
