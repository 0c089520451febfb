"""The automatic order against the measurements that it was made from."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

from attn_n import order
from tests.test_registry import gpu_call

RESULTS = Path(__file__).parent.parent / "bench" / "results"
FAMILIES = {"triton": "triton:hopper", "sdpa": "sdpa:cudnn"}  # the members that serve the grid
FOLD = 44e-6  # seconds for n behind another library's kernel: of 16,384 tokens of 2,048, see h100-2026-11-25-fold.json


def measured(files: str) -> dict[tuple[object, ...], float]:
    """Medians by pass, width, causal, length and contender."""
    found = {}
    for path in RESULTS.glob(files):
        for point in json.loads(path.read_text())["points"]:
            if point["status"] == "measured":
                problem = point["problem"]
                key = (point["measure"], problem["width"], problem.get("causal", False), problem["length"])
                found[(*key, point["contender"])] = statistics.median(point["values"])
    return found


H100 = measured("h100-2026-11-25-peers.json")


def times(training: bool, n: str, at: tuple[int, bool, int], libraries: tuple[str, ...]) -> Iterator[tuple[str, float]]:
    """The seconds of each backend, of both passes in training."""
    for backend in ("triton:hopper", "sdpa:cudnn", *libraries):
        if backend == "flash_attn:3":  # which has no backward, and was measured with a sink of its own
            if not training:
                yield backend, H100[("forward", *at, "flash-attn 3 sink n=1")] + (FOLD if n == "1" else 0.0)
            continue
        contender = f"attn_n {backend} n={n}"
        backward = H100[("backward", *at, contender)] if training else 0.0
        yield backend, H100[("forward", *at, contender)] + backward


@pytest.mark.parametrize(
    "libraries",
    [
        pytest.param((), id="no library"),
        pytest.param(("flash_attn:2",), id="FlashAttention 2"),
        pytest.param(("flash_attn:3",), id="FlashAttention 3"),
        pytest.param(("flash_attn:4",), id="FlashAttention 4"),
        pytest.param(("flash_attn:2", "flash_attn:3", "flash_attn:4"), id="all"),
    ],
)
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("n", ["0", "1"])
def test_the_choice_is_the_fastest_or_near_it(libraries: tuple[str, ...], training: bool, n: str) -> None:
    points = {key[1:4] for key in H100}
    assert len(points) == 24
    for width, causal, length in points:
        found = dict(times(training, n, (width, causal, length), libraries))
        shape = (16384 // length, 2048 // width, length, width)
        call = gpu_call(
            q_shape=shape,
            k_shape=shape,
            v_shape=shape,
            window_right=0 if causal else None,
            needs_grad=training,
            n_kind="none" if n == "0" else "float",
        )
        names = (FAMILIES.get(name, name) for name in order.automatic(call))
        chosen = next(name for name in names if name in found)
        speed = min(found.values()) / found[chosen]
        assert speed >= 0.97, (width, causal, length, chosen, speed, found)
