"""The tables at the end of a run."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.contenders import ATTN_N, EAGER, SDPA
from bench.interleaved import paired_ratio, ratio_of_medians
from bench.problem import Problem

Times = Mapping[tuple[str, Problem], Mapping[str, Sequence[float]]]


@dataclass(frozen=True)
class Target:
    """A ratio of two contenders' times that is to be reached, at one length or at all."""

    over: str
    under: str
    at_most: float = float("inf")
    at_least: float = 0.0
    length: int | None = None
    paired: bool = True  # False where one of them is measured apart

    def __str__(self) -> str:
        bound = f">= {self.at_least:g}" if self.at_least else f"<= {self.at_most:g}"
        return f"{self.over} / {self.under} {bound}" + (f" at L{self.length}" if self.length else "")

    def applies(self, problem: Problem) -> bool:
        return self.length in (None, problem.length)

    def met(self, ratio: float) -> bool:
        return self.at_least <= ratio <= self.at_most


TARGETS = (
    Target(ATTN_N.name, SDPA.name, at_most=1.05),
    Target(EAGER.name, ATTN_N.name, at_least=3.0, length=4096, paired=False),
)


def speed(times: Times) -> list[str]:
    """Milliseconds of every contender, and the ratios that have a target: of the medians, and as judged."""
    names = list(dict.fromkeys(name for measured in times.values() for name in measured))
    ratios = [cell for target in TARGETS for cell in (f"{target.over} / {target.under}", "judged")]
    rows = [["median ms", "", *names, *ratios]]
    judged: dict[Target, list[bool]] = {target: [] for target in TARGETS}
    for (direction, problem), measured in sorted(times.items(), key=_order):
        medians = {name: statistics.median(seconds) for name, seconds in measured.items()}
        row = [direction, str(problem), *(f"{medians[name] * 1e3:.2f}" if name in medians else "-" for name in names)]
        for target in TARGETS:
            if target.over not in medians or target.under not in medians:
                row += ["-", "-"]
                continue
            ratio = ratio_of_medians(measured, target.over, target.under)
            judged_by = paired_ratio(measured, target.over, target.under) if target.paired else ratio
            missed = target.applies(problem) and not target.met(judged_by)
            row += [f"{ratio:.3f}", f"{judged_by:.3f}{'!' if missed else ' '}"]
            if target.applies(problem):
                judged[target].append(not missed)
        rows.append(row)
    verdicts = [f"{target}: {sum(met)} of {len(met)} (! marks the others)" for target, met in judged.items() if met]
    return [*_aligned(rows), "", *verdicts]


def _order(item: tuple[tuple[str, Problem], object]) -> tuple[bool, int, bool]:
    direction, problem = item[0]
    return direction == "backward", problem.length, problem.causal


def memory(peaks: Mapping[tuple[str, int], int]) -> list[str]:
    """Megabytes at the peak of one forward and backward, and how they grow when the length doubles."""
    names, lengths = (list(dict.fromkeys(keys)) for keys in zip(*peaks, strict=True))
    rows = [["peak MB", *(f"L{length}" for length in lengths), *(f"x{b / a:g}" for a, b in _steps(lengths))]]
    for name in names:
        sizes = [f"{peaks[name, length] / 1e6:.1f}" if (name, length) in peaks else "-" for length in lengths]
        growth = [
            f"{peaks[name, b] / peaks[name, a]:.2f}" if {(name, a), (name, b)} <= peaks.keys() else "-"
            for a, b in _steps(lengths)
        ]
        rows.append([name, *sizes, *growth])
    return _aligned(rows)


def _steps(lengths: Sequence[int]) -> list[tuple[int, int]]:
    return list(itertools.pairwise(lengths))


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
