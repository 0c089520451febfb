"""The automatic order against the measurements that it was made from."""

from __future__ import annotations

import functools
from collections import defaultdict
from pathlib import Path

import pytest

from attn_n import order
from bench import derived
from bench.problem import Problem
from bench.record import Point, load
from tests.test_registry import gpu_call

RESULTS = Path(__file__).parent.parent / "bench" / "results"
RUN = "h100-2026-11-26-grid.json"
OURS_AND_TORCHS = {"triton:hopper", "triton:portable", "sdpa:cudnn", "sdpa:flash", "sdpa:efficient"}
FAMILIES = {"triton": "triton:hopper", "sdpa": "sdpa:cudnn"}  # the members that serve the grid
LIBRARIES = {"flash_attn:2", "flash_attn:3", "flash_attn:4", "xformers:flash", "xformers:cutlass"}


def measured(n: str) -> dict[Problem, dict[tuple[str, str | None], float]]:
    """Medians by pass and the backend that served, of each problem of the grid."""
    found: dict[Problem, dict[tuple[str, str | None], float]] = defaultdict(dict)
    for point in derived.measured(points()):
        if point.ours and point.n == n:
            found[derived.problem_of(point)][point.measure, point.backend] = point.median
    return found


@functools.cache
def points() -> list[Point]:
    return load(RESULTS / RUN).points


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
    found = measured(n)
    assert len(found) == 24
    installed = (OURS_AND_TORCHS | libraries) - ({"flash_attn:3"} if training else set())  # it has no backward
    slow = []
    for problem, medians in found.items():
        passes = ("forward", "backward") if training else ("forward",)
        times = {
            backend: sum(medians[each, backend] for each in passes)
            for backend in installed
            if all((each, backend) in medians for each in passes)
        }
        shape = (problem.batch, problem.heads, problem.length, problem.width)
        call = gpu_call(
            q_shape=shape,
            k_shape=shape,
            v_shape=shape,
            window_right=0 if problem.causal else None,
            needs_grad=training,
            n_kind={"0": "none", "1": "float", "per head": "per head"}[n],
        )
        names = (FAMILIES.get(name, name) for name in order.automatic(call))
        chosen = next(name for name in names if name in installed)
        if chosen not in times:
            assert n == "per head", chosen
            continue
        speed = min(times.values()) / times[chosen]
        if speed < 0.97:
            slow.append((str(problem), chosen, round(speed, 3)))
    assert slow == []
