"""The automatic order against the measurements that it was made from."""

from __future__ import annotations

import functools
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from attn_n import AttentionCall
from attn_n.dispatch import order
from bench.reporting import ratios
from bench.reporting.record import Point, load
from bench.workloads import Workload, streams
from tests.test_registry import gpu_call

RESULTS = Path(__file__).parent.parent / "bench" / "results"
GRID, DECODE = "h100-2026-11-26-grid.json", "h100-2026-11-26-decode.json"
LENGTHS = "h100-2026-11-28-lengths.json"
# The choice is compared with backends that it may choose, so without cuDNN, which is slow for every new shape.
OURS_AND_TORCHS = {"triton:hopper", "triton:portable", "sdpa:flash", "sdpa:efficient"}
FAMILIES = {"triton": "triton:hopper", "sdpa": "sdpa:flash"}  # the members that serve the grid
LIBRARIES = {"flash_attn:2", "flash_attn:3", "flash_attn:4", "xformers:flash", "xformers:cutlass"}


# For each workload, by pass and by backend.
Medians = dict[Workload, dict[tuple[str, "str | None"], float]]


def measured(run: str, n: str) -> Medians:
    found: Medians = defaultdict(dict)
    for point in ratios.measured(points(run)):
        if point.ours and point.n == n:
            found[ratios.workload_of(point)][point.measure, point.backend] = point.median
    return found


@functools.cache
def points(run: str) -> list[Point]:
    return load(RESULTS / run).points


@pytest.mark.parametrize(
    "libraries",
    [
        pytest.param(set(), id="no library"),
        pytest.param({"flash_attn:2"}, id="FlashAttention 2"),
        pytest.param({"flash_attn:3"}, id="FlashAttention 3"),
        pytest.param({"flash_attn:4"}, id="FlashAttention 4"),
        pytest.param(LIBRARIES, id="all"),
    ],
)
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("n", ["0", "1", "per head"])
def test_the_choice_is_the_fastest_or_near_it(n: str, training: bool, libraries: set[str]) -> None:
    found = measured(GRID, n)
    assert len(found) == 24
    installed = (OURS_AND_TORCHS | libraries) - ({"flash_attn:3"} if training else set())  # it has no backward
    assert slow_choices(found, n, training, installed) == []


@pytest.mark.parametrize(
    "libraries",
    [
        pytest.param(set(), id="no library"),
        pytest.param({"flash_attn:3"}, id="FlashAttention 3"),
        pytest.param({"flash_attn:4"}, id="FlashAttention 4"),
        pytest.param(LIBRARIES, id="all"),
    ],
)
@pytest.mark.parametrize("n", ["0", "1", "per head"])
def test_the_choice_for_a_few_queries(n: str, libraries: set[str]) -> None:
    found = measured(DECODE, n)
    assert sorted(workload.length for workload in found) == [1, 4, 16]
    assert slow_choices(found, n, False, OURS_AND_TORCHS | libraries) == []


def test_the_choice_counts_what_a_new_length_costs() -> None:
    found = points(LENGTHS)
    assert {point.suite for point in found} == {f"{streams.SUITE}{stream.name}" for stream in streams.streams("cuda")}
    assert slow_streams(found) == []


def slow_streams(found: list[Point], most: float = 1.2) -> list[tuple[str, str, float]]:
    """Return the streams for which the automatic choice, then or now, takes over `most` times the fastest's time."""
    slow = []
    for suite in dict.fromkeys(point.suite for point in found):
        there = [point for point in ratios.measured(found) if point.suite == suite and point.measure == "wall"]
        walls = {point.contender.split()[1].partition("n=")[0]: point.median for point in there if point.ours}
        by_name = {name: wall for name, wall in walls.items() if name}
        assert by_name, f"nothing of ours was measured by name in {suite}"
        stream = next(each for each in streams.streams("cuda") if suite.endswith(each.name))
        measured_choice, *_ = [point for point in there if point.contender.startswith(f"attn_n n={stream.n}")]
        now = {chosen_now(workload, stream, set(by_name)) for workload in stream.workloads}
        # An order that has changed since is judged by the worst of its choices.
        changed = now - set((measured_choice.backend or "").split(", "))
        for name, wall in (("automatic", walls[""]), *((name, by_name[name]) for name in sorted(changed))):
            ratio = wall / min(by_name.values())
            if ratio > most:
                slow.append((suite, name, round(ratio, 2)))
    return slow


def chosen_now(workload: Workload, stream: streams.Stream, installed: set[str]) -> str:
    names = order.automatic(call_of(workload, stream.n, stream.training))
    return next(name for name in (FAMILIES.get(name, name) for name in names) if name in installed)


def a_stream(suite: str, n: str, **walls: float) -> list[Point]:
    """Make points of the names in `walls`, with _ for the colon; `automatic` stands for the choice."""
    workload = next(each for each in streams.streams("cuda") if suite.endswith(each.name)).longest
    names = {name: "" if name == "automatic" else f"{name.replace('_', ':')} " for name in walls}
    return [
        Point(suite, workload.fields(), "wall", f"attn_n {names[name]}n={n}", n, True, "measured", values=(wall,))
        for name, wall in walls.items()
    ]


def test_a_slow_choice_is_seen() -> None:
    suite, others = "lengths: growing cache", {"sdpa_flash": 0.5, "triton_portable": 0.6, "sdpa_cudnn": 49.0}
    assert slow_streams(a_stream(suite, "per head", automatic=0.22, triton_hopper=0.2, **others)) == []
    assert slow_streams(a_stream(suite, "per head", automatic=0.25, triton_hopper=0.2, **others)) == [
        (suite, "automatic", 1.25)
    ]
    # The order has changed since the measurement, for the worse.
    assert slow_streams(a_stream(suite, "per head", automatic=0.5, triton_hopper=0.7, **others)) == [
        (suite, "triton:hopper", 1.4)
    ]
    with pytest.raises(AssertionError, match="nothing of ours was measured by name"):
        slow_streams(a_stream(suite, "per head", automatic=0.5))


def slow_choices(found: Medians, n: str, training: bool, installed: set[str]) -> list[tuple[str, str, float]]:
    """Return the points at which the choice has less than 0.97 of the speed of the fastest."""
    slow = []
    for workload, medians in found.items():
        passes = ("forward", "backward") if training else ("forward",)
        times = {
            backend: sum(medians[each, backend] for each in passes)
            for backend in installed
            if all((each, backend) in medians for each in passes)
        }
        names = (FAMILIES.get(name, name) for name in order.automatic(call_of(workload, n, training)))
        chosen = next(name for name in names if name in installed)
        if chosen not in times:
            assert n == "per head", chosen
            continue
        speed = min(times.values()) / times[chosen]
        if speed < 0.97:
            slow.append((str(workload), chosen, round(speed, 3)))
    return slow


def call_of(workload: Workload, n: str, training: bool) -> AttentionCall:
    shape_k = (workload.batch, workload.num_heads_kv, workload.len_k, workload.width)
    return gpu_call(
        q_shape=(workload.batch, workload.heads, workload.length, workload.width),
        k_shape=shape_k,
        v_shape=shape_k,
        window_right=0 if workload.causal else None,
        needs_grad=training,
        n_kind={"0": "none", "1": "float", "per head": "per head"}[n],
    )


@pytest.mark.parametrize(
    ("capability", "first", "said"),
    [
        ((8, 0), ("sdpa", "flash_attn", "triton"), "automatic, not measured here: compute capability 8.0"),
        ((8, 9), ("sdpa", "flash_attn", "triton"), "automatic, not measured here: compute capability 8.9"),
        ((10, 0), ("flash_attn:4", "sdpa", "triton"), "automatic, not measured here: compute capability 10.0"),
        ((11, 0), ("flash_attn:4", "sdpa", "triton"), "automatic, not measured here: compute capability 11.0"),
        ((12, 0), ("sdpa", "triton", "flash_attn"), "automatic, not measured here: compute capability 12.0"),
    ],
    ids=str,
)
def test_gpus_that_are_not_measured(capability: tuple[int, int], first: tuple[str, ...], said: str) -> None:
    for call in (gpu_call(capability=capability), gpu_call(capability=capability, n_kind="float", needs_grad=False)):
        assert order.automatic(call)[:3] == first
        assert order.automatic(call)[-1] == "reference"
        assert order.reason(call) == said


def sized(
    queries: int, keys: int, width: int = 64, width_v: int | None = None, heads: int = 16, batch: int = 32,
    **changes: object,
) -> AttentionCall:  # fmt: skip
    """Make a call for an H100 that no forward is too short for, unless it says so."""
    width_v = width if width_v is None else width_v
    shapes = {
        name: (batch, heads, length, size)
        for name, length, size in (("q", queries, width), ("k", keys, width), ("v", keys, width_v))
    }
    return gpu_call(**{f"{name}_shape": shape for name, shape in shapes.items()}, **changes)


def packed(tokens: int, width: int = 64, width_v: int | None = None, **changes: object) -> AttentionCall:
    """Make a call of ten sequences of `tokens` in all."""
    sizes = {"q": width, "k": width, "v": width if width_v is None else width_v}
    return gpu_call(**{f"{name}_shape": (tokens, 8, size) for name, size in sizes.items()}, sequences=10, **changes)


INFERENCE, CAUSAL, WITH_N = {"needs_grad": False}, {"window_right": 0}, {"n_kind": "float"}
DEFAULT = ("sdpa", "triton", "flash_attn", "xformers", "reference")
FA_4, FA_3, PYTORCHS = ("flash_attn:4", "triton"), ("flash_attn:3", "flash_attn:4", "triton"), ("sdpa:flash", "triton")
HOPPER_FA_3, OURS = ("triton:hopper", *FA_3[:2]), ("triton", "sdpa")
PORTABLE, BOTH, FA_3_HOPPER = ("triton:portable", "sdpa"), ("triton:hopper", *FA_4), ("flash_attn:3", "triton:hopper")
ONE_QUERY = ("sdpa:flash", *FA_3)
MANY_ROWS = ("flash_attn:3", "triton:decode", "triton")


@pytest.mark.parametrize(
    ("before", "first_before", "after", "first_after"),
    [
        # by the number of keys
        (sized(1, 4095, **WITH_N), OURS, sized(1, 4096, **WITH_N), ONE_QUERY),
        (
            sized(1, 4095, **INFERENCE), ("sdpa:flash", "triton:decode"),
            sized(1, 4096, **INFERENCE), ("triton:decode", "sdpa:flash"),
        ),
        (sized(4, 1024, **INFERENCE, **WITH_N), OURS, sized(4, 1025, **INFERENCE, **WITH_N), order.FEW_ROWS),
        (sized(500, 5999, 128, **WITH_N), OURS, sized(500, 6000, 128, **WITH_N), FA_4),
        (sized(500, 1499, **WITH_N, **CAUSAL), OURS, sized(500, 1500, **WITH_N, **CAUSAL), BOTH),
        (sized(500, 1499, **WITH_N), OURS, sized(500, 1500, **WITH_N), FA_4),
        (sized(500, 1499, 128), OURS, sized(500, 1500, 128), FA_4),
        (
            sized(500, 1499, 128, **INFERENCE, **CAUSAL), HOPPER_FA_3,
            sized(500, 1500, 128, **INFERENCE, **CAUSAL), FA_3_HOPPER,
        ),
        (
            sized(500, 1024, **INFERENCE, **WITH_N), OURS,
            sized(500, 1025, **INFERENCE, **WITH_N), HOPPER_FA_3,
        ),
        (sized(500, 699, **CAUSAL), PORTABLE, sized(500, 700, **CAUSAL), OURS),
        (packed(1279), PORTABLE, packed(1280), OURS),
        # by the number of queries
        (sized(1, 3000), ONE_QUERY, sized(2, 3000), OURS),
        (sized(127, 3000), OURS, sized(128, 3000), FA_4),
        (sized(127, 3000, **INFERENCE), MANY_ROWS, sized(128, 3000, **INFERENCE), HOPPER_FA_3),
        # by the queries of all query heads of a KV head
        (sized(64, 3000, **INFERENCE), order.FEW_ROWS, sized(65, 3000, **INFERENCE), MANY_ROWS),
        (sized(100, 6103, batch=4, **INFERENCE), order.FEW_ROWS, sized(100, 6104, batch=4, **INFERENCE), MANY_ROWS),
        # by the operations of a forward
        (
            sized(3125, 3125, heads=4, batch=1, **INFERENCE), PYTORCHS,
            sized(3125, 3126, heads=4, batch=1, **INFERENCE), HOPPER_FA_3,
        ),
        # by the causal mask
        (sized(500, 500, **CAUSAL), PORTABLE, sized(500, 500), OURS),
        (sized(500, 1500, 128, **INFERENCE, **CAUSAL), FA_3_HOPPER, sized(500, 1500, 128, **INFERENCE), HOPPER_FA_3),
        # by the head size
        (sized(1, 5000, 256), ONE_QUERY, sized(1, 5000, 257), DEFAULT),
        (sized(1, 300, 256), ONE_QUERY, sized(1, 300, 256, 257), DEFAULT),
        (sized(1, 300, 256, **WITH_N), OURS, sized(1, 300, 257, **WITH_N), DEFAULT),
        (sized(4, 3000, 256, **INFERENCE), order.FEW_ROWS, sized(4, 3000, 257, **INFERENCE), DEFAULT),
        (sized(4, 3000, 256), OURS, sized(4, 3000, 257), DEFAULT),
        (sized(8, 8, 256, **INFERENCE), PYTORCHS, sized(8, 8, 257, **INFERENCE), DEFAULT),
        (sized(500, 6000, 128, **WITH_N), FA_4, sized(500, 6000, 129, **WITH_N), OURS),
        (sized(500, 1500, **WITH_N, **CAUSAL), BOTH, sized(500, 1500, 65, **WITH_N, **CAUSAL), OURS),
        (sized(500, 1500, **WITH_N), FA_4, sized(500, 1500, 65, **WITH_N), OURS),
        (sized(500, 1500, 128), FA_4, sized(500, 1500, 128, 129), OURS),
        (
            sized(500, 1500, 128, **INFERENCE, **CAUSAL), FA_3_HOPPER,
            sized(500, 1500, 129, **INFERENCE, **CAUSAL), HOPPER_FA_3,
        ),
        (sized(500, 1500, 256, **INFERENCE), HOPPER_FA_3, sized(500, 1500, 257, **INFERENCE), DEFAULT),
        (sized(500, 500, **CAUSAL), PORTABLE, sized(500, 500, 65, **CAUSAL), OURS),
        (sized(500, 500, 256), OURS, sized(500, 500, 257), DEFAULT),
        (packed(1000, 128), PORTABLE, packed(1000, 129), OURS),
        (packed(5000, 256), OURS, packed(5000, 257), DEFAULT),
    ],
)  # fmt: skip
def test_where_the_order_changes(
    before: AttentionCall, first_before: tuple[str, ...], after: AttentionCall, first_after: tuple[str, ...]
) -> None:
    """Both sides of each boundary, on an H100."""
    for call, first in ((before, first_before), (after, first_after)):
        found = order.automatic(call)
        assert found[: len(first)] == first
        assert sorted(name for name in found if ":" not in name) == sorted(DEFAULT)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (sized(1, 4096), "one query, heads up to 256, from 4096 keys on"),
        (
            sized(4, 2000, **INFERENCE),
            "inference, few queries, at most 1e10 operations, heads up to 256, from 1025 keys on",
        ),
        (
            sized(65, 6000, **INFERENCE),
            "inference, few queries, from 65 queries of a KV head on, heads up to 256, from 1025 keys on",
        ),
        (sized(8, 8, **INFERENCE), "inference, n = 0, at most 1e10 operations, heads up to 256, from 0 keys on"),
        (sized(500, 1500, **WITH_N, **CAUSAL), "training, with n, causal, heads up to 64, from 1500 keys on"),
        (packed(1280), "training, varlen, heads up to 128, from 128 keys on"),
    ],
)
def test_what_is_said_of_a_measured_order(call: AttentionCall, said: str) -> None:
    assert order.reason(call) == f"automatic, by speed on an H100: {said}"


MASKED = {"mask_shape": (1, 1, 256, 256), "mask_dtype": torch.bfloat16, "capability": (8, 0)}
TRITON_FIRST = "automatic, triton first: the gradients beside a floating mask are more accurate there"
PADDED_FIRST = ("triton", *[name for name in DEFAULT if name != "triton"])
PADDED = "automatic, triton first: its kernels read the lengths in use, and others need a packed copy"
BY_SPEED = f"{PADDED}; by speed on an H100:"
ELSEWHERE = "automatic, not measured here: compute capability 8.0"
FIRST_IN_PLACE = "automatic, first who reads keys where they lie"
IN_PLACE = (*order.IN_PLACE, "sdpa", "flash_attn", "xformers", "reference")
MANY_IN_PLACE = ("flash_attn:3", *[name for name in IN_PLACE if name != "flash_attn:3"])
FOUR_QUERIES = INFERENCE | {"q_shape": (32, 32, 4, 128), **{f"{x}_shape": (40000, 1, 16, 128) for x in "kv"}}


@pytest.mark.parametrize(
    ("changes", "expected", "said"),
    [
        (MASKED, ("triton", "sdpa", "flash_attn", "xformers", "reference"), TRITON_FIRST),
        (MASKED | INFERENCE, order.UNMEASURED[8], ELSEWHERE),
        (MASKED | {"mask_dtype": torch.bool}, order.UNMEASURED[8], ELSEWHERE),
        (MASKED | {"dtype": torch.float32}, order.UNMEASURED[8], ELSEWHERE),
        (MASKED | {"mask_shape": None, "mask_dtype": None}, order.UNMEASURED[8], ELSEWHERE),
        (MASKED | {"device": "cpu", "capability": None}, ("sdpa", "reference"), "automatic"),
        ({"device": "mps", "capability": None}, ("reference",), "automatic"),
        ({"dtype": torch.float32}, DEFAULT, "automatic"),
        ({"dropout_p": 0.5}, DEFAULT, "automatic"),
        ({"seqused": True, "dtype": torch.float32}, PADDED_FIRST, PADDED),
        (
            {"seqused": True, **WITH_N, **CAUSAL, **{f"{x}_shape": (8, 16, 2048, 64) for x in "qkv"}},
            ("triton:hopper", *PADDED_FIRST),
            f"{BY_SPEED} training, with n, causal, heads up to 64, from 1500 keys on",
        ),
        ({"leftpad": True, "capability": (8, 0)}, ("triton", "sdpa", "flash_attn", "xformers", "reference"), PADDED),
        (INFERENCE | {"seqused": True}, IN_PLACE, FIRST_IN_PLACE),
        (INFERENCE | {"block_table": 4, "capability": (8, 0)}, IN_PLACE, FIRST_IN_PLACE),
        (INFERENCE | {"cache": True, "capability": (10, 0)}, IN_PLACE, FIRST_IN_PLACE),
        (FOUR_QUERIES | {"block_table": 128}, IN_PLACE, FIRST_IN_PLACE),
        (FOUR_QUERIES | {"block_table": 1024}, MANY_IN_PLACE, FIRST_IN_PLACE),
        (
            INFERENCE | {"seqused": True, "seqused_q": True},
            PADDED_FIRST,
            f"{BY_SPEED} inference, n = 0, at most 1e10 operations, heads up to 256, from 0 keys on",
        ),
        ({"seqused": True, "device": "cpu", "capability": None}, ("sdpa", "reference"), "automatic"),
    ],
    ids=str,
)
def test_the_order_beside_what_was_measured(changes: dict[str, object], expected: tuple[str, ...], said: str) -> None:
    call = gpu_call(**changes)
    assert order.automatic(call) == expected
    assert order.reason(call) == said


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_rocm_takes_the_default_order(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its devices have compute capabilities of their own."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert order.automatic(gpu_call(capability=capability)) == DEFAULT
