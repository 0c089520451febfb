"""The automatic order against the measurements that it was made from."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

from attn_n import order
from tests.test_registry import gpu_call

RESULTS = Path(__file__).parent.parent / "bench" / "results"
FAMILIES = {"triton": "triton:hopper", "sdpa": "sdpa:cudnn"}  # the members that serve the grid
FOLD = 36e-6  # seconds for n behind another library's kernel: of 16,384 tokens of 2,048, see h200-2026-11-24-fold.json
LENGTHS = (512, 2048, 8192, 16384)


def measured() -> dict[tuple[object, ...], float]:
    """Medians by pass, width, causal, length and contender."""
    found = {}
    for width in (64, 128, 256):
        for point in json.loads((RESULTS / f"h200-2026-11-24-grid-E{width}.json").read_text())["points"]:
            if point["status"] == "measured":
                problem = point["problem"]
                key = (point["measure"], width, problem.get("causal", False), problem["length"], point["contender"])
                found[key] = statistics.median(point["values"])
    return found


TIMES = measured()


def times(
    training: bool, n: str, width: int, causal: bool, length: int, libraries: tuple[str, ...]
) -> Iterator[tuple[str, float]]:
    """The seconds of each backend, of both passes in training."""
    at = width, causal, length
    for backend in ("triton:hopper", "sdpa:cudnn", *libraries):
        if backend == "flash_attn:3":  # which has no backward, and was measured with a sink of its own
            if not training:
                yield backend, TIMES[("forward", *at, "flash-attn 3 sink n=1")] + (FOLD if n == "1" else 0.0)
            continue
        contender = f"attn_n {backend} n={n}"
        backward = TIMES[("backward", *at, contender)] if training else 0.0
        yield backend, TIMES[("forward", *at, contender)] + backward


@pytest.mark.parametrize("libraries", [(), ("flash_attn:3",), ("flash_attn:4",), ("flash_attn:3", "flash_attn:4")])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("n", ["0", "1"])
def test_the_choice_is_the_fastest_or_near_it(libraries: tuple[str, ...], training: bool, n: str) -> None:
    for width, causal, length in itertools.product((64, 128, 256), (False, True), LENGTHS):
        found = dict(times(training, n, width, causal, length, libraries))
        shape = (16384 // length, 2048 // width, length, width)
        call = gpu_call(
            q_shape=shape, k_shape=shape, v_shape=shape, needs_grad=training, n_kind="none" if n == "0" else "float"
        )
        names = (FAMILIES.get(name, name) for name in order.automatic(call))
        chosen = next(name for name in names if name in found)
        speed = min(found.values()) / found[chosen]
        assert speed >= 0.97, (width, causal, length, chosen, speed, found)
