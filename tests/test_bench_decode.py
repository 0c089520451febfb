"""The suite of decoding: who is right over a cache, what is refused, and what the points and the tables hold."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor

from bench.contenders import cached, named
from bench.contenders.base import Contender, Passes
from bench.contenders.cached.base import token_first
from bench.method import clocks, decoding
from bench.method.decoding import Exact
from bench.reporting import figures, tables
from bench.reporting.record import Point, Run
from bench.workloads import Workload, make_inputs
from bench.workloads.decoding import MEASURES, Decoding
from bench.workloads.decoding import decoding as cases
from tests.oracle import attention_n

CASES = cases("cpu", quick=False)
ON_GPU = cases("cuda", quick=False)


@pytest.fixture(autouse=True)
def short_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "LAYERS", 2)
    monkeypatch.setattr(decoding, "FEWEST_LAYERS", 2)


class OneTurn:
    """A clock that makes each call once."""

    def rounds(self, runs: object) -> int:
        return 1

    def turn(self, run: clocks.Run) -> list[float]:
        run()
        return [1e-3]


def measured(case: Decoding, *contenders: Contender) -> dict[tuple[str, str], Point]:
    points = decoding.measure(case, contenders or cached.contenders("cpu"), OneTurn())
    return {(point.contender, point.measure): point for point in points}


def case_of(length: int, batch: int, block: int) -> Decoding:
    sizes = [(case.workload.length, case.workload.batch, case.workload.block) for case in CASES]
    return CASES[sizes.index((length, batch, block))]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_everyone_is_right_or_says_why_not(case: Decoding) -> None:
    found = measured(case)
    assert {measure for _, measure in found} == set(MEASURES)
    assert [point.reason for point in found.values() if point.status == "wrong"] == []
    timed = {name for (name, measure), point in found.items() if measure == "eager" and point.values}
    assert timed >= {f"attn_n kvcache n={n}" for n in ("0", "1", "per head")}
    assert ("eager n=per head" in timed) == (case.workload.block == 0)
    absent = {point.reason for point in found.values() if point.measure == "graph"}
    assert absent <= {
        "CUDA graphs are for a GPU",
        "contiguous caches alone",
        "lines up the first query with the first key",
    }


@pytest.mark.parametrize("block", [0, 16])
def test_a_point_names_the_backend_that_ran(block: int, ran: list[str]) -> None:
    case, contender = case_of(1, 3, block), named("attn_n kvcache n=1", "cpu")
    found = measured(case, contender)[contender.name, "forward"]
    assert set(ran) == {f"forward {found.backend}"}


@pytest.mark.parametrize("block", [0, 16])
def test_n_ignored_is_wrong(block: int) -> None:
    plain = named("attn_n kvcache n=0", "cpu")
    found = measured(case_of(4, 3, block), dataclasses.replace(plain, n="1"))
    assert "out by" in str(found[plain.name, "forward"].reason)
    assert found[plain.name, "eager"].status == "wrong"


def test_blocks_in_another_order_are_wrong() -> None:
    right = named("attn_n kvcache n=0", "cpu")

    def prepare(inputs: Any) -> Passes:
        return right.prepare(inputs._replace(table=inputs.table.sort().values))

    found = measured(case_of(4, 3, 16), dataclasses.replace(right, prepare=prepare))
    assert found[right.name, "forward"].status == "wrong"


@pytest.mark.parametrize("head", [0, 1, 2, 3])
def test_every_checked_head_counts(head: int) -> None:
    inputs = make_inputs(case_of(1, 3, 16).workload)
    exact = Exact(inputs)
    with torch.no_grad():
        out = named("attn_n kvcache n=0", "cpu").prepare(inputs).forward()
    assert exact.what_is_wrong(out, "0") is None
    out[2, head] = 0.0
    assert "out by" in str(exact.what_is_wrong(out, "0"))


def test_the_sizes_of_a_gpu() -> None:
    sizes = {(w.length, w.num_heads_kv, w.batch, w.len_k, w.block) for w in (case.workload for case in ON_GPU)}
    keys = (1024, 4096, 16384, 65536, 131072)
    assert sizes == set(itertools.product((1, 4), (8, 1), (1, 4, 32), keys, (0, 16, 128)))
    assert max(case.workload.bytes_of_kv for case in ON_GPU) == 2 * 32 * 131072 * 8 * 128 * 2
    assert {str(case) for case in cases("cuda", quick=True)} < {str(case) for case in ON_GPU}
    assert len({str(case) for case in ON_GPU}) == len(ON_GPU)


def test_other_processes_know_the_contenders() -> None:
    for device in ("cpu", "cuda"):
        for contender in cached.contenders(device):
            assert named(contender.name, device).name == contender.name


def attend(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, causal: bool, sinks: Tensor | None) -> Tensor:
    """The attention of libraries whose tensors are `(B, L, H, E)` and whose caches are `(blocks, block, H, E)`."""
    if table is not None:
        k, v = (x[table.long()].flatten(1, 2) for x in (k, v))
    return token_first(attention_n(*map(token_first, (q, k, v)), sinks=sinks, causal=causal)[0])


class Wrapper:
    """A wrapper of FlashInfer, as its documentation has it."""

    def __init__(self, workspace: Tensor, **options: object) -> None:
        assert not workspace.any()

    def plan(
        self, indptr: Tensor, indices: Tensor, last: Tensor, heads: int, heads_kv: int, width: int, block: int,
        q_data_type: torch.dtype, q_len_per_req: int,
    ) -> None:  # fmt: skip
        assert {x.dtype for x in (indptr, indices, last)} == {torch.int32}
        assert last.tolist() == [block] * (len(indptr) - 1)
        assert len(indices) == indptr[-1]
        self._length, self._table = q_len_per_req, indices.view(len(last), -1)
        self._shape = block, heads_kv, width

    def run(self, q: Tensor, pools: tuple[Tensor, Tensor], sinks: Tensor | None = None, scale: float = 0.25) -> Tensor:
        assert scale == q.shape[-1] ** -0.5
        assert {x.shape[1:] for x in pools} == {self._shape}
        assert all(x.is_contiguous() for x in pools)
        q = q.unflatten(0, (-1, self._length))
        return attend(q, *pools, self._table, self._length > 1, sinks).flatten(0, 1)


def with_kvcache(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None, **options: Any) -> Tensor:
    assert options["cache_seqlens"].dtype == torch.int32
    table = options["page_table"] if "page_table" in options else options["block_table"]
    return attend(q, k, v, table, options["causal"], sinks)


def varlen(
    q: Tensor, k: Tensor, v: Tensor, learnable_sink: Tensor | None = None, **options: Any
) -> tuple[Tensor, None]:
    assert options["max_seqlen_k"] == options["seqused_k"].max()
    return attend(q, k, v, options["page_table"], options["causal"], learnable_sink), None


LIBRARIES = {
    "flash_attn.flash_attn_interface": SimpleNamespace(flash_attn_with_kvcache=with_kvcache),
    "flash_attn_interface": SimpleNamespace(flash_attn_with_kvcache=with_kvcache),
    "flash_attn.cute": SimpleNamespace(flash_attn_varlen_func=varlen),
    "flashinfer": SimpleNamespace(
        BatchDecodeWithPagedKVCacheWrapper=Wrapper, BatchDecodeWithAttentionSinkWrapper=Wrapper
    ),
}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_libraries_are_called_as_they_are_documented(case: Decoding, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, library in LIBRARIES.items():
        monkeypatch.setitem(sys.modules, name, library)
    monkeypatch.setattr("bench.contenders.cached.flashinfer._BLOCK", 32)
    monkeypatch.setattr("bench.contenders.cached.flashinfer._WORKSPACE", 64)
    sought = ("flash-attn", "flashinfer")
    peers = [each for each in cached.contenders("cuda") if each.name.startswith(sought)]
    assert len(peers) == 8
    found = measured(case, *(dataclasses.replace(each, why_not=lambda workload: None) for each in peers))
    assert {each.name: found[each.name, "forward"].reason for each in peers} == {each.name: None for each in peers}


def test_a_library_that_reads_no_such_blocks_says_so() -> None:
    (of_2,) = (each for each in cached.contenders("cuda") if each.name.startswith("flash-attn 2"))
    reasons = {case.workload.block: of_2.why_not(case.workload) for case in ON_GPU}
    assert reasons[16] == reasons[128] == "blocks of a multiple of 256 keys"
    assert reasons[0] != reasons[16]
    (cores,) = (each for each in cached.contenders("cuda") if each.name == "flashinfer n=0")
    assert cores.why_not(ON_GPU[-1].workload) == "several queries on tensor cores alone"
    (wide,) = (
        w
        for w in (case.workload for case in ON_GPU[:48])
        if (w.batch, w.num_heads_kv, w.len_k, w.block) == (1, 1, 1024, 0)
    )
    assert cores.why_not(wide) == "up to 16 query heads to a KV head on CUDA cores"


def test_a_step_is_timed_by_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[None] = []
    step = decoding._repeated(functools.partial(calls.append, None), 5)
    ticks = iter([10.0, 11.0])
    monkeypatch.setattr(clocks.time, "perf_counter", lambda: next(ticks))
    assert clocks.StepClock({step: 5}).turn(step) == [0.2]
    assert len(calls) == 5


@pytest.mark.parametrize(("seconds", "layers"), [(1e-6, 32), (1e-3, 10), (1.0, 4)])
def test_long_calls_make_short_steps(seconds: float, layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert decoding._layers(seconds) == layers


def point(name: str, seconds: float, block: int, measure: str = "forward", backend: str | None = None) -> Point:
    workload = Workload(1, False, 4, 32, 128, keys=65536, heads_kv=8, block=block, dtype=torch.bfloat16)
    n = name.partition(" n=")[2]
    ours = name.startswith("attn_n")
    return Point("decode", workload.fields(), measure, name, n, ours, "measured", None, backend, (seconds,) * 2)


def test_the_table_of_the_device() -> None:
    run = Run({"device": "Chip 1", "torch": "2.11", "kind": "cuda", "ceilings": {"copy_bytes": 3e12}}, "abc", "", "")
    kernels, automatic = "attn_n kvcache triton:decode n=1", "attn_n kvcache n=1"
    run.points += [
        point(kernels, 400e-6, 0), point(automatic, 420e-6, 0, backend="triton:decode"), point(kernels, 500e-6, 16),
        point("flash-attn 3 n=0", 380e-6, 0), point(kernels, 410e-6, 0, "eager"), point(kernels, 390e-6, 0, "graph"),
    ]  # fmt: skip
    device, steps = (section.table for section in tables.decoding(run))
    assert device is not None
    assert steps is not None
    contiguous, paged = device.to_dict("records")
    assert contiguous["GB"] == "1.07"
    assert contiguous["TB/s"] == "2.68"
    assert contiguous["of copy"] == "0.89"
    assert (contiguous["automatic"], contiguous["by"], contiguous["of the fastest"]) == ("420", "triton:decode", "0.90")
    assert (contiguous["ours over peer"], contiguous["best peer"], contiguous["peer"]) == (
        "0.95",
        "flash-attn 3 n=0",
        "380",
    )
    assert (paged["of contiguous"], paged["best peer"]) == ("0.80", "-")
    assert [row[kernels] for row in steps.to_dict("records")] == ["410 / 390", "- / -"]
    assert "Decoding, time of the device" in tables.markdown(run)


def test_the_picture_has_the_contiguous_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []

    def record(points: Any, *_: object, over: str) -> Any:
        shown.append((points, over))
        return Figure(), ()

    monkeypatch.setattr(figures, "_small_multiples", record)
    monkeypatch.setattr(figures, "_save", lambda figure, path: [path])
    run = Run({"device": "Chip 1", "kind": "cuda"}, "abc", "", "")
    for block in (0, 16):
        run.points += [point("attn_n kvcache n=1", 4e-4, block), point("flashinfer tensor cores n=0", 2e-4, block)]
    run.points.append(point("attn_n n=1", 3e-4, 0))
    assert figures.draw(run, tmp_path, "one")[0].name == "one-bfloat16-decode"
    ((points, over),) = shown
    assert over == "L"
    assert set(points.label) == {"attn_n, n = 1", "FlashInfer"}
    assert set(points.value) == {4e-4, 2e-4}
    assert points.y.max() == pytest.approx(2**30 / 2e-4 / 1e12)


@pytest.mark.gpu
@pytest.mark.parametrize("block", [0, 16])
def test_a_graph_on_a_gpu(block: int) -> None:
    workload = Workload(4, True, 2, 8, 64, keys=2048, heads_kv=2, block=block, dtype=torch.bfloat16, device="cuda")
    ours = [each for each in cached.contenders("cuda") if each.name.startswith("attn_n kvcache")]
    found = measured(Decoding("decode", workload, "forward", training=False), *ours)
    assert {key: point.reason for key, point in found.items()} == dict.fromkeys(found)
    assert all(0 < value < math.inf for point in found.values() for value in point.values)
