"""The options of the suite, the measurement that its tests share, what it keeps, and what it shows."""

from __future__ import annotations

import datetime
import shlex
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bench import clocks, interleaved, summary
from bench.contenders.base import Contender
from bench.machine import commit, machine
from bench.problem import FORWARD
from bench.record import Point, Run
from bench.stage import entrants
from bench.suites import DEVICE, Case

_run = pytest.StashKey[Run]()
_started = pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("attn-n")
    group.addoption("--quick", action="store_true", help="fewer problems, contenders and rounds")
    group.addoption("--results", type=Path, help="write what was measured to this file, after each problem")


def pytest_configure(config: pytest.Config) -> None:
    config.option.benchmark_columns = config.option.benchmark_columns or ["median", "iqr", "min", "rounds"]
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    config.stash[_run] = Run({}, commit(), date, shlex.join(["pytest", *sys.argv[1:]]))
    config.stash[_started] = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # cut short, pytest still shows what there is


@pytest.fixture(scope="session")
def keep(pytestconfig: pytest.Config) -> Callable[[Point], None]:
    """Adds points to the results, and to the file that --results names."""
    run = pytestconfig.stash[_run]

    def add(*points: Point) -> None:
        if not run.machine:
            run.machine.update(machine(DEVICE))
        run.points.extend(points)
        path = pytestconfig.getoption("results")
        if path is not None:
            run.save(path)

    return add


@pytest.fixture(scope="module")
def points(
    pytestconfig: pytest.Config, request: pytest.FixtureRequest, case: Case, keep: Callable[..., None]
) -> dict[str, Point]:
    """Every contender's point of this case: a ratio needs them measured together."""
    suite, problem, measure = case
    asked_for = _contenders_of(request.session)[case]
    present = entrants(suite, problem, tuple(asked_for))
    quick = pytestconfig.getoption("quick")
    clock = clocks.CudaClock(quick) if DEVICE == "cuda" else clocks.CpuClock(quick)
    times: dict[str, list[float]] = {}
    for apart in (False, True):
        runs = {each.contender.name: each.run(measure, suite.measures != FORWARD) for each in present
                if each.contender.apart == apart}  # fmt: skip
        times |= interleaved.measure({name: run for name, run in runs.items() if run is not None}, clock)
    found = {
        each.contender.name: each.point(suite, problem, measure, tuple(times.get(each.contender.name, ())))
        for each in present
    }
    keep(*found.values())
    _show_progress(pytestconfig, request.session, case, found)
    return found


def _contenders_of(session: pytest.Session) -> dict[Case, list[Contender]]:
    """What is asked for, after -k and the like."""
    asked: dict[Case, list[Contender]] = {}
    for item in session.items:
        parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        if "case" in parameters and "contender" in parameters:
            asked.setdefault(parameters["case"], []).append(parameters["contender"])
    return asked


def _show_progress(config: pytest.Config, session: pytest.Session, case: Case, found: dict[str, Point]) -> None:
    cases = list(_contenders_of(session))
    done = cases.index(case) + 1
    left = (time.monotonic() - config.stash[_started]) / done * (len(cases) - done) / 60
    reporter = config.pluginmanager.getplugin("terminalreporter")
    capture = config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        reporter.ensure_newline()
        reporter.write_line(f"[{done}/{len(cases)}] {case}: {summary.in_short(found)}; about {left:.0f} min left")


@pytest.hookimpl(trylast=True)  # below the tables of pytest-benchmark
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    run = config.stash[_run]
    if not run.points:
        return
    terminalreporter.section("attn-n and its peers")
    terminalreporter.write_line(f"{run.machine['device']}; torch {run.machine['torch']}; commit {run.commit}")
    terminalreporter.write_line("\n".join(summary.table(run.points)))
