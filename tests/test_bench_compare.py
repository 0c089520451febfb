from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from bench.compare import main
from bench.reporting.record import Point, Run

OURS = "attn_n n=1"
TIMES = {OURS: 1.0, "a": 1.1, "b": 0.9, "c": 2.0}
ROUNDS = (1.0, 1.02, 0.98, 1.01, 0.99)
WORKLOAD = {"length": 512, "causal": True, "batch": 2, "heads": 8, "width": 64, "dtype": "float32"}


def point(name: str, seconds: float, length: int = 512) -> Point:
    ours = name == OURS
    values = tuple(seconds * slow for slow in ROUNDS)
    return Point("grid", {**WORKLOAD, "length": length}, "forward", name, "1", ours, "measured", values=values)


def a_run(times: Mapping[str, float], **machine: str) -> Run:
    points = [point(name, seconds) for name, seconds in times.items()]
    return Run({"device": "chip", "kind": "cpu", "torch": "2.9.0", **machine}, "abc", "2026-11-22", "bench", points)


@pytest.fixture
def compare(tmp_path: Path):
    def run(old: Run, new: Run) -> int:
        paths = tmp_path / "old.json", tmp_path / "new.json"
        old.save(paths[0])
        new.save(paths[1])
        return main([str(path) for path in paths])

    return run


def test_a_drop_of_8_percent_is_flagged(compare, capsys):
    assert compare(a_run(TIMES), a_run({**TIMES, OURS: 1 / 0.92})) == 1
    out = capsys.readouterr().out
    assert "x0.920 against 3 peers: attn_n n=1, grid forward E64-L512-causal, 2x8 heads" in out
    assert "1 points compared, geometric mean change x0.920, 1 fell" in out


@pytest.mark.parametrize(
    "new",
    [
        {**TIMES, OURS: 1 / 0.97},
        {name: 2 * seconds for name, seconds in TIMES.items()},
        {**TIMES, "c": 1.0},
        {**TIMES, OURS: 0.5},
    ],
    ids=["3 % slower", "all take twice as long", "one of three peers got faster", "ours got faster"],
)
def test_these_are_not_flagged(compare, new):
    assert compare(a_run(TIMES), a_run(new)) == 0


def test_one_of_two_peers_that_got_faster_flags_nothing(compare):
    old = {OURS: 1.0, "a": 1.0, "b": 1.0}
    assert compare(a_run(old), a_run({**old, "a": 0.8})) == 0
    assert compare(a_run(old), a_run({**old, "a": 0.8, "b": 0.8})) == 1


def test_a_peer_that_got_slower_hides_no_drop(compare):
    assert compare(a_run(TIMES), a_run({**TIMES, OURS: 1 / 0.92, "c": 4.0})) == 1


def test_rounds_are_paired_and_a_few_slow_ones_flag_nothing(compare):
    old = a_run({OURS: 1.0, "a": 1.0})
    drifting = [replace(each, values=(1.0, 2.0, 3.0, 4.0, 5.0)) for each in old.points]
    assert compare(old, replace(old, points=drifting)) == 0
    slow = replace(old.points[0], values=(1.0, 1.0, 1.2, 1.2, 1.2))
    peer = replace(old.points[1], values=(1.0,) * 5)
    assert compare(old, replace(old, points=[slow, peer])) == 0


def test_runs_of_other_lengths_are_compared_by_their_medians(compare):
    old, new = a_run({OURS: 1.0, "a": 1.0}), a_run({OURS: 1.0, "a": 1.0})
    new.points[1] = replace(new.points[1], values=(0.9, 0.9, 0.9))
    assert compare(old, new) == 1


def test_the_first_call_is_not_judged(compare):
    old, new = a_run(TIMES), a_run({**TIMES, OURS: 2.0})
    for run in (old, new):
        run.points = [replace(each, measure="first call") for each in run.points]
    assert compare(old, new) == 2


def test_what_is_missing_is_listed(compare, capsys):
    old = a_run(TIMES)
    old.points += [point(OURS, 1.0, 1024), point("a", 1.0, 2048)]
    new = a_run(TIMES)
    new.points.append(replace(old.points[-2], status="wrong", reason="dq by 1", values=()))
    assert compare(old, new) == 0
    out = capsys.readouterr().out
    assert "missing in NEW: attn_n n=1, grid forward E64-L1024-causal, 2x8 heads (wrong: dq by 1)" in out
    assert "missing in NEW: a, grid forward E64-L2048-causal" in out


@pytest.mark.parametrize("new", [{}, {OURS: 1.0}, {"a": 1.0}], ids=["empty", "no peer", "nothing of ours"])
def test_nothing_in_common(compare, capsys, new):
    assert compare(a_run(TIMES), a_run(new)) == 2
    assert "nothing to compare" in capsys.readouterr().err


def test_another_device_is_refused_and_another_torch_is_not(compare, capsys):
    assert compare(a_run(TIMES), a_run(TIMES, device="other chip")) == 2
    assert "'chip' and 'other chip'" in capsys.readouterr().err
    assert compare(a_run(TIMES), a_run(TIMES, torch="2.10.0")) == 0
    assert "warning: torch differs: 2.9.0 then, 2.10.0 now" in capsys.readouterr().out


def test_a_file_that_is_no_results_file(tmp_path, capsys):
    path = tmp_path / "other.json"
    path.write_text('{"benchmarks": []}')
    assert main([str(path), str(path)]) == 2
    assert f"{path}: expected a results file" in capsys.readouterr().err
