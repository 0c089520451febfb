"""The tables of the grid in docs/results.md."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import pandas as pd

from bench.reporting.ratios import ratio
from docs_build.blocks import table
from docs_build.measured import PASSES, costs_of_n, headed, newest, of_suite, percent, run, span, whole
from docs_build.names import AUTOMATIC, CUDNN, FA2, FA3, FA4, FLEX, HOPPER, NAMES, PORTABLE, TORCHS_FA2, label

PEERS = (FA4, FA3, CUDNN, FLEX, FA2)
MASKS = "full", "causal"
LENGTH = 8192


def machine() -> str:
    """The GPU, and the versions of the newest grid."""
    found = run(newest("grid")).machine
    packages = found.get("packages") or {}
    rows = [["PyTorch", found["torch"]], *([name, packages[name]] for name in sorted(packages) if name != "torch")]
    return table(["GPU", found["device"]], rows)


def grid() -> str:
    """A row for each pass, E and mask; in each cell the speeds by length."""
    there = of_suite(newest("grid"), "grid")
    lengths = sorted(there.S.unique())
    rows = _rows_of_grid(there, (AUTOMATIC, HOPPER, *PEERS), lengths)
    return headed(f"TFLOP/s at {_listed(lengths)}", (AUTOMATIC, HOPPER, *PEERS), rows, newest("grid"))


def ratios() -> str:
    """The speed of the Hopper kernels as a multiple of each peer's."""
    there = of_suite(newest("grid"), "grid")
    ours = there[there.contender == HOPPER][["place", "point"]]
    widths = sorted(there.E.unique())
    rows = []
    for name in PEERS:
        pairs = there[there.contender == name].merge(ours, on="place", suffixes=("", "_of_ours"))
        pairs = pairs.assign(times=list(map(ratio, pairs.point, pairs.point_of_ours)))
        cells = [
            pairs[(pairs.measure == measure) & (pairs["E"] == width)].times for measure in PASSES for width in widths
        ]
        timed = pairs[pairs.measure.isin(PASSES)].times
        rows.append([NAMES[name], *(span(cell) if len(cell) else "-" for cell in cells), _of(timed)])
    head = [f"{measure}, E = {width}" for measure in PASSES for width in widths]
    return table(["`triton:hopper`, n = 1, over", *head, "1.0 or more"], rows)


def portable() -> str:
    """The portable kernels, and the peers that run on every GPU, at two lengths of the grid."""
    there = of_suite(newest("grid"), "grid")
    lengths = [2048, LENGTH]
    names = PORTABLE, FLEX, TORCHS_FA2
    rows = _rows_of_grid(there, names, lengths)
    return headed(f"TFLOP/s at {_listed(lengths)}", names, rows)


def everybody() -> str:
    """Every contender at one point of the grid, the fastest forward first."""
    there = of_suite(newest("grid"), "grid")
    there = there[(there.E == 128) & (there.S == LENGTH)]
    kinds = [(measure, mask) for mask in MASKS for measure in PASSES]
    speeds = {
        kind: there[(there.measure == kind[0]) & (there["mask"] == kind[1])].set_index("contender").speed
        for kind in kinds
    }
    order = pd.DataFrame(speeds).sort_values(kinds[0], ascending=False, na_position="last")
    rows = [
        [label(name), *(whole(speed) for speed in row)] for name, row in zip(order.index, order.values, strict=True)
    ]
    return table(["TFLOP/s", *(f"{measure}, {mask}" for measure, mask in kinds)], rows)


def costs() -> str:
    """What n = 1 and a learned n add to the time of a backend, at most, by length."""
    path = newest("grid")
    lengths = sorted(of_suite(path, "grid").S.unique())
    rows = []
    for name in _costed():
        pairs = costs_of_n(path, name)
        for measure in PASSES:
            of_pass = pairs[pairs.measure == measure]
            if len(of_pass):
                most = [of_pass[of_pass["S"] == length].cost.max() for length in lengths]
                rows.append([label(name), measure, *map(percent, most)])
    return table(["time over n = 0, at most", "pass", *(f"S = {length:,}" for length in lengths)], rows)


def _costed() -> list[str]:
    there = of_suite(newest("grid"), "grid")
    ours = there[there.ours & (there.n != "0")].contender.unique()
    return [name for name in ours if " n=" in name.removeprefix("attn_n n=") and "reference" not in name]


def _rows_of_grid(there: pd.DataFrame, names: Sequence[str], lengths: Sequence[int]) -> list[list[str]]:
    rows = []
    for measure in PASSES:
        for (width, mask), group in there[there.measure == measure].groupby(["E", "mask"], sort=False):
            rows.append([f"{measure}, E = {width}, {mask}", *(_by_length(group, name, lengths) for name in names)])
    return sorted(rows, key=_order_of_grid)


def _order_of_grid(row: list[str]) -> tuple[object, ...]:
    measure, width, mask = row[0].split(", ")
    return PASSES.index(measure), int(width.removeprefix("E = ")), MASKS.index(mask)


def _by_length(group: pd.DataFrame, name: str, lengths: Iterable[int]) -> str:
    speeds = group[group.contender == name].set_index("S").speed
    return "-" if speeds.empty else " / ".join(whole(speeds.get(length, math.nan)) for length in lengths)


def _of(times: pd.Series) -> str:
    return f"{int((times >= 1).sum())} of {len(times)}"


def _listed(lengths: Iterable[int]) -> str:
    return " / ".join(f"{length:,}" for length in lengths)
