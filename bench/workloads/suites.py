"""The suites: the grid, which every library can compute, and short suites along other axes."""

from __future__ import annotations

import dataclasses
import random
import re
from typing import NamedTuple

import torch

from bench.workloads.workload import FORWARD, PASSES, Workload

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Suite(NamedTuple):
    name: str
    workloads: tuple[Workload, ...]
    quick: tuple[Workload, ...]  # those of --quick
    measures: tuple[str, ...] = PASSES


@dataclasses.dataclass(frozen=True)
class Case:
    """One workload and one pass, in which all contenders are measured together.

    Attributes:
        suite: the name by which the results know it.
        measure: one of PASSES.
        training: whether gradients are on.
    """

    suite: str
    workload: Workload
    measure: str
    training: bool

    def __str__(self) -> str:
        """The case in characters that -k takes."""
        return re.sub(r"\W+", "-", self._name().replace("=", ""))

    def _name(self) -> str:
        return f"{self.suite}-{self.measure}-{self.workload}"


def cases(quick: bool) -> list[Case]:
    """Returns the cases of all suites; gradients are off where a suite has a forward alone."""
    return [
        Case(suite.name, workload, measure, suite.measures != FORWARD)
        for suite in _suites()
        for workload in (suite.quick if quick else suite.workloads)
        for measure in suite.measures
        if not (quick and measure == "both")
    ]


def _suites() -> tuple[Suite, ...]:
    return _cuda() if DEVICE == "cuda" else _cpu()


def _cpu() -> tuple[Suite, ...]:
    grid = tuple(Workload(length, causal) for length in (512, 1024, 2048, 4096, 8192) for causal in (False, True))
    return (Suite("grid", grid, tuple(workload for workload in grid if workload.length <= 2048), PASSES[:2]),)


def _cuda() -> tuple[Suite, ...]:
    tokens, hidden = 16384, 2048
    grid = tuple(
        _half(length, causal, batch=tokens // length, heads=hidden // width, width=width)
        for width in (64, 128, 256)
        for length in (512, 2048, 8192, 16384)
        for causal in (False, True)
    )
    gqa = tuple(_half(8192, True, batch=2, heads=32, heads_kv=heads) for heads in (None, 8, 4, 1))
    varlen = tuple(
        _half(sum(lengths), True, heads=16, sequences=lengths)
        for lengths in ((2048,) * 8, _lengths(32, 16384), _lengths(256, 16384), _lengths(64, 65536))
    )
    window = tuple(_half(16384, True, heads=16, window=window) for window in (256, 1024, 4096))
    heads = tuple(
        _half(4096, True, batch=4, heads=heads, heads_kv=heads_kv, width=width, width_v=width_v)
        for width, width_v, heads, heads_kv in (
            (48, None, 32, None), (80, None, 24, None), (96, None, 24, None), (112, None, 16, None),
            (192, 128, 16, None), (192, None, 16, None), (512, None, 16, 1),
        )
    )  # fmt: skip
    scaling = tuple(_half(512 << step, True, batch=1, heads=16) for step in range(9))
    return (
        Suite("grid", grid, tuple(p for p in grid if p.width == 128 and p.length == 8192 and p.causal)),
        Suite("gqa", gqa, (), PASSES[:2]),
        Suite("varlen", varlen, varlen[1:2], PASSES[:2]),
        Suite("window", window, window[1:2], PASSES[:2]),
        Suite("heads", heads, (), PASSES[:2]),
        Suite("scaling", scaling, (), PASSES[:2]),
    )


def _half(length: int, causal: bool = False, width: int = 128, **fields: object) -> Workload:
    return Workload(length, causal, width=width, dtype=torch.bfloat16, device="cuda", **fields)  # type: ignore[arg-type]


def _lengths(count: int, total: int) -> tuple[int, ...]:
    """Draws the lengths of `count` sequences as real text has them: many short ones, a few long ones."""
    weights = [random.Random(seed).lognormvariate(0.0, 1.0) for seed in range(count)]
    lengths = [max(1, int(total * weight / sum(weights))) for weight in weights]
    lengths[0] += total - sum(lengths)
    return tuple(lengths)


def memory_lengths(quick: bool) -> tuple[int, ...]:
    lengths = (2048, 4096, 8192) if DEVICE == "cpu" else (2048, 8192, 32768)
    return lengths[:1] if quick else lengths


def memory_workload(length: int) -> Workload:
    return Workload(length) if DEVICE == "cpu" else _half(length, True, heads=16)


def tiny_workload() -> Workload:
    """Returns a workload whose work takes next to no time beside its call."""
    return Workload(16, heads=1) if DEVICE == "cpu" else _half(128, heads=1)
