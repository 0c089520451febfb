"""Measures several functions in turns, so that drift of the machine hits all of them alike."""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping
from typing import TypeVar

from bench.method.clocks import Clock, Run

Key = TypeVar("Key")


def measure(runs: Mapping[Key, Run], clock: Clock) -> dict[Key, list[float]]:
    """Returns the seconds of each run's calls; every round has one turn of each run."""
    if not runs:
        return {}
    times: dict[Key, list[float]] = {name: [] for name in runs}
    order, shuffle = list(runs), random.Random(0).shuffle
    for _ in range(clock.rounds(list(runs.values()))):
        # In a fixed order each run would always find the caches as the same other run leaves them.
        shuffle(order)
        for name in order:
            times[name] += clock.turn(runs[name])
    return times


def medians(runs: Mapping[Key, Run], clock: Clock) -> dict[Key, float]:
    """Returns the median seconds of each run."""
    return {name: statistics.median(times) for name, times in measure(runs, clock).items()}
