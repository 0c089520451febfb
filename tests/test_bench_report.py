from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import report
from bench.reporting import figures
from bench.reporting.frame import frame
from bench.reporting.record import Point, Run

WORKLOAD = {"causal": True, "batch": 2, "heads": 8, "width": 64, "dtype": "bfloat16"}


def point(name: str, seconds: float, *, suite: str = "grid", measure: str = "forward", **workload: Any) -> Point:
    n = name.partition(" n=")[2]
    ours = name.startswith("attn_n")
    fields = {"length": 1024, **WORKLOAD, **workload}
    return Point(suite, fields, measure, name, n, ours, "measured", values=(seconds,) * 3, flops=1e12)


def a_run(*points: Point, **machine: Any) -> Run:
    head = {"device": "Chip 1", "kind": "cuda", "torch": "2.9.0", "driver": "570", "packages": {"triton": "3.5.0"}}
    return Run({**head, **machine}, "abcdef0123", "2026-11-22", "bench grid", list(points))


SPEED = (point("attn_n n=1", 0.002), point("attn_n n=0", 0.0016), point("peer n=0", 0.0025))


def rows(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("|")]


def test_the_heading_says_what_it_ran_on():
    heading = report.markdown(a_run(*SPEED)).partition("###")[0]
    for fact in ("Chip 1", "torch 2.9.0", "driver 570", "triton 3.5.0", "abcdef0123", "2026-11-22", "`bench grid`"):
        assert fact in heading


def test_speed_on_a_gpu_peers_first_and_the_best_bold():
    text = report.markdown(a_run(*SPEED))
    assert "**forward, E = 64, bfloat16, TFLOP/s**" in text
    assert rows(text)[:3] == [
        "| S | mask | BxH | peer n=0 | attn_n n=1 | attn_n n=0 |",
        "| --- | --- | --- | --- | --- | --- |",
        "| 1024 | causal | 2x8 | 400 | 500 | **625** |",
    ]


def test_milliseconds_on_a_cpu():
    text = report.markdown(a_run(*SPEED, kind="cpu"))
    assert "| 1024 | causal | 2x8 | 2.50 | 2.00 | **1.60** |" in text


def test_microseconds_in_decode():
    text = report.markdown(a_run(point("attn_n n=1", 3e-5, suite="decode", length=1, keys=4096)))
    assert "| E64-L1-S4096-causal | 2x8 | **30.0** |" in text


def test_a_table_for_each_measure_width_and_dtype():
    others = [{"measure": "backward"}, {"width": 128}, {"dtype": "float32"}]
    text = report.markdown(a_run(*SPEED, *(point("peer n=0", 1e-3, **other) for other in others)))
    grid = text.partition("### Ours")[0]
    assert grid.count("| S | mask |") == 4
    assert grid.count("| 1024 | causal |") == 4


def test_who_is_absent_or_wrong_is_listed_once():
    def without(status: str, reason: str, **workload: Any) -> list[Point]:
        each = [point("other n=0", 1.0, measure=measure, **workload) for measure in ("forward", "backward")]
        return [replace(point, status=status, reason=reason, values=()) for point in each]

    text = report.markdown(
        a_run(*SPEED, *without("absent", "not\ninstalled"), *without("wrong", "dq by 1", length=512))
    )
    notes = [line for line in text.splitlines() if line.startswith("- ")]
    assert notes == [
        "- wrong at E64-L512-causal: other n=0 (dq by 1)",
        "- absent from 1 of 2 workloads: other n=0 (not installed)",
    ]
    assert "other n=0" not in "".join(rows(text))


def test_memory_host_and_first_call_have_a_row_for_each_contender():
    measures = {"memory": 3e6, "host": 2e-5, "first call": 1.5}
    points = [point(name, value, measure=m) for m, value in measures.items() for name in ("attn_n n=1", "peer n=0")]
    text = report.markdown(a_run(*points))
    for shown in ("Peak memory, MB", "Host time a call, µs", "First call in a new process, s"):
        assert f"### {shown}" in text
    assert [row for row in rows(text) if "attn_n" in row] == [
        f"| attn_n n=1 | **{value}** |" for value in ("3.00", "20.0", "1.50")
    ]


def test_ours_over_the_best_peer_leaves_n_0_of_ours_out():
    text = report.markdown(a_run(*SPEED, point("slow n=0", 0.1)))
    assert rows(text)[-1].endswith("| attn_n n=1 | 2.00 | peer n=0 | 2.50 | 1.25 |")


@pytest.mark.parametrize("machine", [{"device": "Chip 2"}, {"torch": "2.8.0"}, {"packages": {"triton": "3.4.0"}}])
def test_other_machines_are_never_mixed(machine):
    runs = report.merged([a_run(SPEED[0]), a_run(SPEED[2], **machine)])
    assert [len(run.points) for run in runs] == [1, 1]
    assert len(set(report._stems(runs))) == 2


@pytest.mark.parametrize("commit", ["other", "abcdef0123+"])
def test_other_commits_are_never_mixed(commit):
    runs = report.merged([a_run(SPEED[0]), replace(a_run(SPEED[2]), commit=commit)])
    assert len(runs) == 2
    assert not any(stem.endswith("-2") for stem in report._stems(runs))


def test_runs_that_agree_are_merged_and_the_later_point_counts():
    later = replace(a_run(point("attn_n n=1", 0.5), ceilings={"copy_bytes": 2.0}), date="2026-11-23", command="again")
    (run,) = report.merged([later, a_run(*SPEED, ceilings={"copy_bytes": 1.0})])
    assert [each.median for each in run.points] == [0.5, 0.0016, 0.0025]
    assert run.machine["ceilings"] == {"copy_bytes": 2.0}
    assert (run.date, run.command) == ("2026-11-22 and 2026-11-23", "bench grid; again")


def pictures(folder: Path) -> set[str]:
    return {path.name.removeprefix("chip-1-2026-11-22-abcdef0123-bfloat16-") for path in folder.iterdir()}


def both(*names: str) -> set[str]:
    return {f"{name}.{kind}" for name in names for kind in ("svg", "png")}


def test_pictures_are_made_of_what_there_is(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    speed, decode = tmp_path / "speed.json", tmp_path / "decode.json"
    a_run(*SPEED, ceilings={"matmul_flops": 7e14}).save(speed)
    memory = point("attn_n n=1", 3e6, measure="memory")
    a_run(point("flex n=0", 3e-5, suite="decode", length=1, keys=4096), memory).save(decode)
    report.main([str(speed), "--out", str(tmp_path / "one")])
    assert pictures(tmp_path / "one") == both("speed", "best-peer", "cost-of-n")
    report.main([str(speed), str(decode), "--out", str(tmp_path / "all")])
    assert pictures(tmp_path / "all") == both("speed", "best-peer", "cost-of-n", "decode", "memory")
    assert capsys.readouterr().out.count("## Chip 1") == 2


def test_the_speed_picture_shows_six_lines_and_of_each_library_the_fastest():
    names = [
        "attn_n n=0", "attn_n n=1", "attn_n triton:hopper n=1", "torch sdpa flash n=0", "torch sdpa cudnn n=0",
        "torch sdpa efficient n=0", "flex n=0", "flex by lse n=1", "flash-attn 2 n=0", "flash-attn 3 sink n=1",
        "flash-attn 4 n=0", "flash-attn 4 sink n=1", "xformers n=0", "eager softmax_n n=1",
    ]  # fmt: skip
    lines = figures._lines(frame(point(name, 1.0 + seconds) for seconds, name in enumerate(names)))
    assert dict(zip(lines.label, lines.contender, strict=True)) == {
        "attn_n, n = 1": "attn_n n=1", "cuDNN": "torch sdpa cudnn n=0", "FlexAttention": "flex n=0",
        "FlashAttention 2": "flash-attn 2 n=0", "FlashAttention 3": "flash-attn 3 sink n=1",
        "FlashAttention 4": "flash-attn 4 n=0",
    }  # fmt: skip
    without = figures._lines(frame(point(name, 1.0) for name in names if "flash-attn" not in name))
    assert "PyTorch's FlashAttention 2" in set(without.label)


def test_host_calls_have_a_table_for_each_pass_with_the_ratio_to_sdpa():
    def call(name: str, seconds: float, suite: str) -> Point:
        return replace(point(name, seconds, suite=f"host: {suite}", measure="host"), values=(seconds, 0.9 * seconds))

    text = report.markdown(a_run(
        call("attn_n n=1", 4e-5, "n=1, both passes"), call("torch sdpa n=0", 2e-5, "n=1, both passes"),
        call("attn_n n=per head", 6e-5, "sinks, both passes"), call("torch sdpa mask n=0", 2e-5, "sinks, both passes"),
        call("attn_n n=1", 3e-5, "varlen, forward"),
    ))  # fmt: skip
    assert [line for line in text.splitlines() if line.startswith("###")] == [
        f"### Host time, {name}, µs: median (best), times PyTorch's SDPA" for name in ("forward", "both passes")
    ]
    assert [row for row in rows(text) if "---" not in row] == [
        "| call | attn_n |",
        "| varlen | 28.5 (27.0) |",
        "| call | torch sdpa | torch sdpa mask | attn_n |",
        "| n=1 | 19.0 (18.0) 1.00x | - | 38.0 (36.0) 2.00x |",
        "| sinks | - | 19.0 (18.0) 1.00x | 57.0 (54.0) 3.00x |",
    ]


def test_without_matplotlib_the_tables_come_and_the_error_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    a_run(*SPEED).save(tmp_path / "speed.json")
    with pytest.raises(SystemExit, match=r"pip install 'attn-n\[bench\]'"):
        report.main([str(tmp_path / "speed.json")])
    assert "| 1024 | causal |" in capsys.readouterr().out


def test_a_file_that_is_no_results_file(tmp_path, capsys):
    path = tmp_path / "other.json"
    path.write_text("[]")
    with pytest.raises(SystemExit):
        report.main([str(path)])
    assert f"{path}: expected a results file" in capsys.readouterr().err
