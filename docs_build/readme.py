"""The README's summary of speed."""

from __future__ import annotations

import pandas as pd

from bench.reporting.frame import best_pairs
from docs_build.blocks import filled, table
from docs_build.measured import PASSES, costs_of_n, newest, of_suite, percent, points, span
from docs_build.names import AUTOMATIC, CUDNN, FA3, FA4, FLEX, HOPPER, NAMES

LENGTH = 8192
_FORWARD, _BOTH = "host: n=1, forward without gradients", "host: n=1, both passes"


def speed() -> str:
    return f"{_speed_of_long_sequences()}\n\n{_whole_grid()}"


def _speed_of_long_sequences() -> str:
    """A row for each pass and head size, the fastest of each in bold."""
    there = of_suite(newest("grid"), "grid")
    there = there[(there.S == LENGTH) & there.causal]
    names = [AUTOMATIC, HOPPER, FA4, FA3, CUDNN, FLEX]
    rows = []
    for measure in PASSES:
        for width, group in there[there.measure == measure].groupby("E"):
            speeds = group.set_index("contender").speed.reindex(names)
            best = f"{speeds.max():.0f}"
            cells = ["-" if pd.isna(speed) else f"{speed:.0f}" for speed in speeds]
            rows.append([f"{measure}, E = {width}", *(f"**{cell}**" if cell == best else cell for cell in cells)])
    return table(["TFLOP/s", *(NAMES[name] for name in names)], rows)


def _whole_grid() -> str:
    path = newest("grid")
    pairs = best_pairs(of_suite(path, "grid"))
    pairs = pairs[pairs.measure.isin(PASSES)]
    ahead = int((pairs.times_faster >= 1).sum())
    cost = costs_of_n(path, HOPPER)
    most = {measure: percent(cost[cost.measure == measure].cost.max()) for measure in PASSES}
    host = points(newest("host"))
    ours, torchs = (host[host.contender == name].set_index("suite").value * 1e6 for name in (HOPPER, "torch sdpa n=0"))
    said = (
        f"Over the {len(pairs)} points of the grid (heads of 64, 128 and 256, 512 to 16,384 keys, causal or not), our"
        f" fastest backend with n has {span(pairs.times_faster)} times the speed of the fastest other library, with"
        f" or without n. It is at least as fast in {ahead}. In `triton:hopper`, n = 1 costs at most {most['forward']}"
        f" forward and {most['backward']} backward. The host, which bounds short calls, takes"
        f" {ours[_FORWARD]:.0f} us for its forward without gradients and {ours[_BOTH]:.0f} us for both passes"
        f" (PyTorch's SDPA: {torchs[_FORWARD]:.0f} and {torchs[_BOTH]:.0f})."
    )
    return filled(said)
