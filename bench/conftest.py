"""The options of the suite, the measurement that its tests share, and the summary at its end."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from bench import interleaved, summary
from bench.contenders import Contender
from bench.gate import what_is_wrong
from bench.problem import Inputs, Problem, make_inputs

_QUICK_LENGTH = 2048

_times = pytest.StashKey[dict[tuple[str, Problem], dict[str, list[float]]]]()
_peaks = pytest.StashKey[dict[tuple[str, int], int]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    text = f"lengths up to {_QUICK_LENGTH} and fewer rounds: under a minute"
    parser.addoption("--quick", action="store_true", help=text)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_times], config.stash[_peaks] = {}, {}
    config.option.benchmark_columns = config.option.benchmark_columns or ["median", "iqr", "min", "rounds"]


@pytest.fixture(scope="session")
def affordable(pytestconfig: pytest.Config) -> Callable[[int], None]:
    """Skips the test if its length is one that --quick leaves out."""

    def check(length: int) -> None:
        if pytestconfig.getoption("quick") and length > _QUICK_LENGTH:
            pytest.skip(f"--quick stops at length {_QUICK_LENGTH}")

    return check


@pytest.fixture(scope="session")
def peaks(pytestconfig: pytest.Config) -> dict[tuple[str, int], int]:
    """Bytes by contender and length, for the summary."""
    return pytestconfig.stash[_peaks]


# What follows needs the fixtures `problem` and `contenders` of a test module, which thus compares its own.


@pytest.fixture(scope="module", params=["forward", "backward"])
def direction(request: pytest.FixtureRequest) -> str:
    direction: str = request.param
    return direction


@pytest.fixture(scope="module")
def inputs(problem: Problem) -> Inputs:
    return make_inputs(problem)


@pytest.fixture(scope="module")
def absent(problem: Problem, contenders: Sequence[Contender]) -> dict[str, str]:
    """The contenders that do not take part, and why."""
    return {contender.name: reason for contender in contenders if (reason := contender.why_not(problem))}


@pytest.fixture(scope="module")
def wrong(problem: Problem, inputs: Inputs, contenders: Sequence[Contender], absent: dict[str, str]) -> dict[str, str]:
    """The contenders that do not compute what they should; they are not timed."""
    present = [contender for contender in contenders if contender.name not in absent]
    return {each.name: reason for each in present if (reason := what_is_wrong(each, inputs, problem))}


@pytest.fixture(scope="module")
def times(
    pytestconfig: pytest.Config,
    problem: Problem,
    direction: str,
    inputs: Inputs,
    contenders: Sequence[Contender],
    absent: dict[str, str],
    wrong: dict[str, str],
) -> dict[str, list[float]]:
    """The seconds of all contenders for one problem and direction: a ratio needs them measured together."""
    together: dict[str, Callable[[], object]] = {}
    apart: dict[str, Callable[[], object]] = {}
    for contender in contenders:
        if contender.name not in absent and contender.name not in wrong:
            forward, backward = contender.prepare(inputs, contender.n)
            run = forward if direction == "forward" else functools.partial(backward, forward())
            (apart if contender.apart else together)[contender.name] = run
    seconds, least_rounds = (0.3, 5) if pytestconfig.getoption("quick") else (2.0, 7)
    measured = interleaved.measure(together, seconds, least_rounds)
    measured |= interleaved.measure(apart, seconds, least_rounds)
    pytestconfig.stash[_times][direction, problem] = measured
    return measured


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["torch"] = torch.__version__
    machine_info["torch_threads"] = torch.get_num_threads()
    machine_info["torch_cpu_capability"] = torch.backends.cpu.get_cpu_capability()


@pytest.hookimpl(trylast=True)  # below the tables of pytest-benchmark
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    times, peaks = config.stash[_times], config.stash[_peaks]
    if times or peaks:
        terminalreporter.section("attn-n and its peers")
        terminalreporter.write_line(_where(config))
    if times:
        terminalreporter.write_line("\n" + "\n".join(summary.speed(times)))
    if peaks:
        terminalreporter.write_line("\n" + "\n".join(summary.memory(peaks)))


def _where(config: pytest.Config) -> str:
    machine = config.hook.pytest_benchmark_generate_machine_info(config=config)
    config.hook.pytest_benchmark_update_machine_info(config=config, machine_info=machine)
    commit = config.hook.pytest_benchmark_generate_commit_info(config=config)
    return (
        f"{machine['cpu'].get('brand_raw', machine['machine'])}, {machine['torch_cpu_capability']},"
        f" {machine['torch_threads']} threads; torch {machine['torch']};"
        f" commit {commit['id'][:12]}{' and uncommitted changes' if commit['dirty'] else ''}"
    )
