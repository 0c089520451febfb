"""Times of several functions, measured in turns so that the drift of the machine hits all of them alike."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import TypeVar

from bench.method.clocks import Clock, Run

Key = TypeVar("Key")


def measure(runs: Mapping[Key, Run], clock: Clock) -> dict[Key, list[float]]:
    """The seconds of each run; a round has a turn of each."""
    if not runs:
        return {}
    times: dict[Key, list[float]] = {name: [] for name in runs}
    order, shuffle = list(runs), random.Random(0).shuffle
    for _ in range(clock.rounds(list(runs.values()))):
        # A mere rotation would put each run always behind the same other one and what that leaves in the caches.
        shuffle(order)
        for name in order:
            times[name] += clock.turn(runs[name])
    return times
