"""The suite of changing lengths, at the sizes of a CPU and in this process."""

from __future__ import annotations

import dataclasses
import statistics
import subprocess
from pathlib import Path

import pytest
import torch

from bench import report
from bench.contenders.base import Contender
from bench.method import lengths
from bench.method.lengths import InTurns, Library, Timed
from bench.reporting.record import Run, load
from bench.workloads import Inputs
from bench.workloads.streams import streams

STREAMS = {stream.name: stream for stream in streams("cpu")}
LIBRARIES = {library.name: library for library in lengths.libraries("cpu")}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_lengths_are_new(device: str) -> None:
    for stream in streams(device):
        before = {(workload.length, workload.len_k) for workload in stream.before}
        timed = [(workload.length, workload.len_k) for workload in stream.workloads]
        assert before.isdisjoint(timed), stream.name
        assert len(set(timed)) > 0.7 * len(timed), stream.name
        if device == "cuda":  # kernels in Triton differ for multiples of 16: both come before the clock runs
            assert {workload.len_k % 16 == 0 for workload in stream.before} == {True, False}
    prompts = next(each for each in streams("cuda") if each.name == "prompts n=0").workloads
    assert len(prompts) == 200
    assert 400 < statistics.median(workload.length for workload in prompts) < 650
    assert max(workload.length for workload in prompts) > 2500


@pytest.mark.parametrize("name", STREAMS)
def test_each_library_is_checked_and_timed(name: str, ran: list[str]) -> None:
    stream = STREAMS[name]
    for library in LIBRARIES.values():
        if library.name == "zero-padded sdpa":
            continue
        assert lengths.why_absent(library, stream) is None
        assert lengths.prepare(library, stream) is None
        ran.clear()
        in_turns = InTurns(library, stream)
        turns = [in_turns.time(turn) for turn in range(lengths.turns_of(stream))]
        assert sum(len(turn.steps) for turn in turns) == len(stream.workloads)
        assert all(0 < sum(turn.steps) <= turn.wall * len(turn.steps) for turn in turns)
        calls = len(stream.before) * (1 + len(turns)) + len(stream.workloads)  # each turn begins with untimed calls
        served = lengths.backend_of(library, stream)
        if library.name == "attn_n":
            passes = ["forward sdpa:cpu", *(["backward sdpa:cpu"] if stream.training else [])]
            assert ran == passes * calls
            assert served == "sdpa:cpu"
        elif library.name == "attn_n reference":
            assert ran == ["attend reference"] * calls
        elif not library.name.startswith("attn_n"):
            assert ran == []
            assert served is None


def test_the_cache_grows_within_one_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Inputs] = []
    library = LIBRARIES["attn_n"]

    def prepare(inputs: Inputs) -> object:
        seen.append(inputs)
        return contender.prepare(inputs)

    contender = library.of(STREAMS["growing cache"])
    watched: Contender = dataclasses.replace(contender, prepare=prepare)  # type: ignore[arg-type]
    InTurns(Library("attn_n", {"per head": watched}), STREAMS["growing cache"])
    timed = seen[len(STREAMS["growing cache"].before) :]
    assert len({inputs.k.data_ptr() for inputs in timed}) == 1
    assert len({inputs.k.stride() for inputs in timed}) == 1
    assert [inputs.k.shape[2] for inputs in timed] == list(range(40, 48))
    assert not timed[0].q.requires_grad


def test_what_is_wrong_is_not_timed() -> None:
    contender = LIBRARIES["attn_n"].by_n["0"]
    forgets = Library("forgets n", {"0": contender, "per head": dataclasses.replace(contender, n="per head")})
    assert lengths.prepare(forgets, STREAMS["prompts n=0"]) is None
    for name in ("growing cache", "prompts n=per head", "training"):
        assert "out by" in str(lengths.prepare(forgets, STREAMS[name]))

    def broken(inputs: Inputs) -> object:
        raise RuntimeError("no such kernel")

    failing: Contender = dataclasses.replace(contender, prepare=broken)  # type: ignore[arg-type]
    assert (
        lengths.prepare(Library("broken", {"0": failing}), STREAMS["prompts n=0"])
        == "fails: RuntimeError: no such kernel"
    )


@pytest.mark.slow
def test_a_process_of_its_own(tmp_path: Path) -> None:
    """Both tasks, and what the results and the tables make of them."""
    names = ["growing cache", "training"]
    assert lengths.prepare_all({"attn_n": names}) == {"attn_n": dict.fromkeys(names)}
    of_all = lengths.time_all({"attn_n": names, "eager": names[:1]})
    assert list(of_all["eager"]) == names[:1]
    timed = of_all["attn_n"]
    assert {name: (len(found.wall), len(found.steps)) for name, found in timed.items()} == {
        name: (lengths.turns_of(STREAMS[name]), len(STREAMS[name].workloads)) for name in names
    }
    run = Run({"device": "Chip", "kind": "cpu"}, "abc", "2026-11-27", "pytest bench")
    for name, found in timed.items():
        run.points += lengths.points(LIBRARIES["attn_n"], STREAMS[name], found)
        run.points += lengths.points(LIBRARIES["eager"], STREAMS[name], Timed("wrong", "out by 1"))
    run.save(tmp_path / "run.json")
    assert [point.measure for point in load(tmp_path / "run.json").points] == ["wall", "step"] * 4
    text = report.markdown(load(tmp_path / "run.json"))
    for name in names:
        assert f"### lengths: {name}, ms a call, up to E16-" in text
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| attn_n n=per head")]
    assert len(rows) == 2
    assert all(row[-1] == "sdpa:cpu |" and float(row[1]) > 0 and float(row[3]) >= float(row[2]) for row in rows)
    assert "eager n=per head (out by 1)" in text


def test_a_process_that_ends_is_an_error() -> None:
    with pytest.raises(subprocess.CalledProcessError):
        lengths.time_all({"no such library": ["training"]})


@pytest.mark.gpu
def test_libraries_on_a_gpu() -> None:
    names = {library.name for library in lengths.libraries("cuda")}
    assert names >= {
        "attn_n", "attn_n triton", "attn_n triton:hopper", "attn_n triton:portable", "attn_n sdpa:flash",
        "attn_n sdpa:cudnn", "attn_n sdpa:efficient", "attn_n reference", "torch sdpa", "eager", "flash-attn 3",
    }  # fmt: skip
    assert torch.cuda.is_available()
