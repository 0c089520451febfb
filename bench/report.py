"""python -m bench.report RESULTS...: results files as Markdown tables on stdout and as pictures in a folder."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from bench.reporting import figures
from bench.reporting.ratios import read
from bench.reporting.record import Run
from bench.reporting.tables import markdown


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


if __name__ == "__main__":
    main()
