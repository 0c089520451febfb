"""python -m bench.compare OLD NEW flags contenders of ours that got slower; its exit status is 1 if any did.

Absolute times are never compared. Each of our contenders is compared with the peers that ran in the same rounds. The
(upper) median of its changes against each peer counts, so that a peer that itself got faster or slower flags nothing. A
contender is flagged if by that measure it fell below 95 % not only in the median round but in three quarters of the new
rounds, so that a few slow rounds flag nothing either.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bench.reporting.ratios import measured, read, rounds_of_ratio, workload_of
from bench.reporting.record import Point, Run
from bench.workloads import PASSES

AT_LEAST = 0.95
# The first call is one reading of a compiler and of disk caches: too noisy to judge.
_JUDGED = (*PASSES, "memory", "host")

_Key = tuple[tuple[object, ...], str]


class Change(NamedTuple):
    """The change of one of our contenders against its peers, NEW over OLD; below 1 it fell.

    Attributes:
        middle: by the median round.
        most: by the round that three quarters of the new rounds do not exceed.
    """

    ours: Point
    peers: int
    middle: float
    most: float

    @property
    def fell(self) -> bool:
        return self.most < AT_LEAST


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description="Flags what fell against its peers.")
    parser.add_argument("old", type=Path, metavar="OLD.json")
    parser.add_argument("new", type=Path, metavar="NEW.json")
    paths = parser.parse_args(arguments)
    try:
        old, new = read(paths.old), read(paths.new)
        _check_device(old, new)
        compared = changes(old, new)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for line in (*_differences(old, new), *_missing(old, new)):
        print(line)
    print(*_summary(compared), sep="\n")
    return int(any(change.fell for change in compared))


def changes(old: Run, new: Run) -> list[Change]:
    """Returns a change for each place and contender of ours that both runs measured beside a common peer."""
    before, after = _judged(old), _judged(new)
    compared = []
    for (place, name), ours in after.items():
        if not ours.ours or (place, name) not in before:
            continue
        peers = [key for key, point in after.items() if key[0] == place and not point.ours and key in before]
        if peers:
            pairs = [_against(before[key], before[place, name], after[key], ours) for key in peers]
            middle, most = (statistics.median_high(values) for values in zip(*pairs, strict=True))
            compared.append(Change(ours, len(peers), middle, most))
    if not compared:
        raise ValueError(
            "nothing to compare: expected a workload where both files measured the same contender of ours and the same "
            f"peer, got {len(before)} and {len(after)} points without one; run the same command for both"
        )
    return compared


def _against(old_peer: Point, old_ours: Point, new_peer: Point, new_ours: Point) -> tuple[float, float]:
    was = statistics.median(rounds_of_ratio(old_peer, old_ours))
    now = sorted(rounds_of_ratio(new_peer, new_ours))
    return statistics.median(now) / was, now[math.ceil(0.75 * (len(now) - 1))] / was


def _judged(run: Run) -> dict[_Key, Point]:
    return {(point.place, point.contender): point for point in measured(run.points) if point.measure in _JUDGED}


def _check_device(old: Run, new: Run) -> None:
    if old.machine["device"] != new.machine["device"]:
        raise ValueError(
            f"expected two runs on one device, got {old.machine['device']!r} and {new.machine['device']!r}: ratios of "
            "different chips say nothing about a change of the code; measure both on one machine"
        )


def _differences(old: Run, new: Run) -> list[str]:
    """Warns of differences other than the code that may have moved the ratios."""
    names = [name for name in {**old.machine, **new.machine} if name != "ceilings"]
    pairs = [(name, old.machine.get(name), new.machine.get(name)) for name in names]
    return [f"warning: {name} differs: {was} then, {now} now" for name, was, now in pairs if was != now]


def _missing(old: Run, new: Run) -> list[str]:
    reasons = {(point.place, point.contender): f" ({point.status}: {point.reason})" for point in new.points}
    after = _judged(new)
    return [
        f"missing in NEW: {_where(point)}{reasons.get(key, '')}"
        for key, point in _judged(old).items()
        if key not in after
    ]


def _summary(compared: Sequence[Change]) -> list[str]:
    fallen = sorted((change for change in compared if change.fell), key=lambda change: change.middle)
    mean = statistics.geometric_mean(change.middle for change in compared)
    counted = f"{len(compared)} points compared, geometric mean change x{mean:.3f}, {len(fallen)} fell below {AT_LEAST}"
    table = [f"x{change.middle:.3f} against {change.peers} peers: {_where(change.ours)}" for change in fallen]
    return [*table, counted]


def _where(point: Point) -> str:
    workload = workload_of(point)
    return f"{point.contender}, {point.suite} {point.measure} {workload}, {workload.batch}x{workload.heads} heads"


if __name__ == "__main__":
    sys.exit(main())
