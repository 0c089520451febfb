"""Triton's kernels compile for GPUs that are not there: every target, and variants of the Hopper kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

import triton

from attn_n.backends.triton import hopper
from attn_n.backends.triton.hopper.configs import BACKWARD, FORWARD
from bench.kernels.ahead_of_time import PARTS, TARGETS
from tests.places import slow

with_gluon = pytest.mark.skipif(hopper.release() < hopper.FIRST, reason="this Triton has no such Gluon")

# What Triton 3.4 compiles is right but slower: it spills more in float32, and its ptxas serialises one matmul on sm_90.
BOUNDED = not triton.__version__.startswith("3.4.")
# The ptxas of Triton 3.7 serialises one, too.
SERIALISED = {("dv", 256)} if triton.__version__.startswith("3.7.") else set()


def compiling(module: str, *arguments: object) -> str:
    """Run `python -m module arguments...` in a process in which Triton compiles, and return what it prints."""
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        env={**os.environ, "TRITON_INTERPRET": "0"}, cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE,
        text=True, check=True,
    ).stdout  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("target", ["sm_90", *slow("sm_80", "sm_89", "sm_100", "gfx942")])
def test_ahead_of_time(target: str, part: str) -> None:
    """Every shipped configuration compiles, fits the shared memory, and spills next to nothing."""
    if part == "hopper" and (target != "sm_90" or hopper.release() < hopper.FIRST):
        pytest.skip("there are none")
    lines = [json.loads(line) for line in compiling("bench.kernels.ahead_of_time", target, part).splitlines()]
    assert len(lines) >= 18
    for line in lines:
        assert line["shared"] <= TARGETS[target].shared, line
        most = 256 if line["dtype"] == "torch.bfloat16" else 2048
        assert not BOUNDED or line["spills"] <= most, line
        assert not BOUNDED or not line["warnings"] or (line["kernel"], line["width"]) in SERIALISED, line


def test_numbers_compile_nothing() -> None:
    """Lengths, window, scale, softcap and n are values: other ones run the same kernel."""
    compiling("tests.compiled", "numbers_compile_nothing")


@with_gluon
@pytest.mark.parametrize("width", [128, *slow(*(width for width in FORWARD if width != 128))])
def test_variants_of_the_varlen_forward_ahead_of_time(width: int) -> None:
    """Variants with a window, softcap, or other boundaries for keys spill little; other numbers compile nothing new."""
    compiling("tests.compiled", "varlen_forward", width)


@with_gluon
@pytest.mark.slow
def test_heads_that_do_not_fill_their_tiles_ahead_of_time() -> None:
    compiling("tests.compiled", "heads_beside_their_tiles")


@with_gluon
@pytest.mark.slow
@pytest.mark.parametrize("width", FORWARD)
def test_padded_batches_ahead_of_time(width: int) -> None:
    compiling("tests.compiled", "padded_batches", width)


@with_gluon
@pytest.mark.slow
@pytest.mark.parametrize("width", BACKWARD)
def test_variants_of_the_backward_ahead_of_time(width: int) -> None:
    """Windows, softcap and float16 spill little, no product waits for another, and numbers compile nothing."""
    compiling("tests.compiled", "backward", width)
