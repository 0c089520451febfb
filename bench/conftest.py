"""The options of pytest bench, the measurement that its tests share, the results file, and the final tables."""

from __future__ import annotations

import datetime
import itertools
import shlex
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.contenders import cached, contenders, for_call
from bench.contenders.base import Contender
from bench.method import clocks, decoding, interleaved, precompile
from bench.method.machine import commit, machine
from bench.method.prepared import prepare_all
from bench.reporting import tables
from bench.reporting.frame import frame
from bench.reporting.progress import in_short
from bench.reporting.record import Point, Run
from bench.workloads.calls import Call, calls
from bench.workloads.decoding import Decoding
from bench.workloads.decoding import decoding as decoding_cases
from bench.workloads.suites import DEVICE, Case, cases, memory_lengths

_run = pytest.StashKey[Run]()
_started = pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("attn-n")
    group.addoption("--quick", action="store_true", help="fewer workloads, contenders and rounds")
    group.addoption("--results", type=Path, help="write what was measured to this file, after each workload")


def pytest_configure(config: pytest.Config) -> None:
    config.option.benchmark_columns = config.option.benchmark_columns or ["median", "iqr", "min", "rounds"]
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    config.stash[_run] = Run({}, commit(), date, shlex.join(["pytest", *sys.argv[1:]]))
    config.stash[_started] = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # cut short, pytest still shows what there is


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    quick = metafunc.config.getoption("quick")
    if metafunc.function.__name__ == "test_host":
        pairs = [(call, contender) for call in calls(DEVICE) for contender in for_call(call)]
    elif metafunc.function.__name__ == "test_decode":
        pairs = list(itertools.product(decoding_cases(DEVICE, quick), cached.contenders(DEVICE)))
    elif "case" in metafunc.fixturenames:
        pairs = list(itertools.product(cases(quick), contenders(DEVICE, quick)))
    else:
        pairs = []
    if pairs:
        metafunc.parametrize(("case", "contender"), pairs, ids=[f"{case}-{contender}" for case, contender in pairs])
    elif "contender" in metafunc.fixturenames:
        metafunc.parametrize("contender", contenders(DEVICE, quick), ids=str)
    if "length" in metafunc.fixturenames:
        metafunc.parametrize("length", memory_lengths(quick))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Compiles before the first test: on a GPU, compiling one by one would take longer than all measurements."""
    if DEVICE == "cpu" or session.config.option.collectonly:
        return
    jobs = precompile.jobs(_parameters(item) for item in session.items)
    if not jobs:
        return
    processes = precompile.at_a_time()
    _tell(session.config, f"compiling for {len(jobs)} pairs of contender and workload, {processes} at a time")
    for failure in precompile.compile_all(jobs, processes):
        _tell(session.config, failure)
    _tell(session.config, f"compiled in {time.monotonic() - session.config.stash[_started]:.0f} s")
    session.config.stash[_started] = time.monotonic()


def _parameters(item: pytest.Item) -> dict[str, Any]:
    return item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}


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


@pytest.fixture(scope="session")
def _points_of() -> dict[Case, dict[str, Point]]:
    return {}


@pytest.fixture
def points(
    pytestconfig: pytest.Config,
    request: pytest.FixtureRequest,
    case: Case,
    keep: Callable[..., None],
    _points_of: dict[Case, dict[str, Point]],
) -> dict[str, Point]:
    """Returns every contender's point of this case; the first test of a case measures all of them together."""
    if case not in _points_of:
        measured = _measure(case, _contenders_of(request.session)[case], _clock(pytestconfig, case))
        keep(*measured)
        found = _points_of[case] = {point.contender: point for point in measured if point.measure == case.measure}
        _show_progress(pytestconfig, request.session, case, found)
    return _points_of[case]


def _clock(config: pytest.Config, case: Case) -> clocks.Clock:
    if isinstance(case, Call):
        return clocks.HostClock()
    if isinstance(case, Decoding) and DEVICE == "cuda":
        return clocks.CleanCudaClock(quick=False)
    quick = config.getoption("quick")
    return clocks.CudaClock(quick) if DEVICE == "cuda" else clocks.CpuClock(quick)


def _measure(case: Case, contenders: list[Contender], clock: clocks.Clock) -> list[Point]:
    if isinstance(case, Decoding):
        return decoding.measure(case, contenders, clock)
    present = prepare_all(case.workload, case.training, tuple(contenders))
    times: dict[str, list[float]] = {}
    for apart in (False, True):
        runs = {each.contender.name: each.run(case.measure) for each in present if each.contender.apart == apart}
        with torch.set_grad_enabled(case.training):
            times |= interleaved.measure({name: run for name, run in runs.items() if run is not None}, clock)
    return [each.point(case, tuple(times.get(each.contender.name, ()))) for each in present]


def _contenders_of(session: pytest.Session) -> dict[Case, list[Contender]]:
    """Returns what is left to run after -k and the like."""
    asked: dict[Case, list[Contender]] = {}
    for item in session.items:
        parameters = _parameters(item)
        if "case" in parameters and "contender" in parameters:
            asked.setdefault(parameters["case"], []).append(parameters["contender"])
    return asked


def _show_progress(config: pytest.Config, session: pytest.Session, case: Case, found: dict[str, Point]) -> None:
    all_cases = list(_contenders_of(session))
    done = all_cases.index(case) + 1
    left = (time.monotonic() - config.stash[_started]) / done * (len(all_cases) - done) / 60
    _tell(config, f"[{done}/{len(all_cases)}] {case}: {in_short(found)}; about {left:.0f} min left")


def _tell(config: pytest.Config, line: str) -> None:
    reporter = config.pluginmanager.getplugin("terminalreporter")
    capture = config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        reporter.ensure_newline()
        reporter.write_line(line)


@pytest.hookimpl(trylast=True)  # below the tables of pytest-benchmark
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    run = config.stash[_run]
    if not run.points:
        return
    terminalreporter.section("attn-n and its peers")
    terminalreporter.write_line(f"{run.machine['device']}; torch {run.machine['torch']}; commit {run.commit}")
    for heading, table, notes in (*tables.costs(frame(run.points)), *tables.decoding(run)):
        parts = heading.strip("#* "), "" if table is None else table.to_string(index=False), notes
        terminalreporter.write_line("\n".join(["", *filter(None, parts)]))
