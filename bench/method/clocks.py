"""Clocks measure a function: wall time on a CPU, device time on a GPU, or the time of the host."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

Run = Callable[[], object]


class Clock(Protocol):
    def rounds(self, runs: Sequence[Run]) -> int:
        """Returns the number of rounds; in a round each run has one turn."""

    def turn(self, run: Run) -> list[float]:
        """Returns the seconds of each call of one turn."""


class CpuClock:
    """Makes one call a turn, for about two seconds (quick: 0.3) a run."""

    def __init__(self, quick: bool) -> None:
        self._seconds, self._least = (0.3, 5) if quick else (2.0, 7)

    def rounds(self, runs: Sequence[Run]) -> int:
        once = sum(self.turn(run)[0] for run in runs)
        return max(self._least, int(self._seconds * len(runs) / once))

    def turn(self, run: Run) -> list[float]:
        start = time.perf_counter()
        run()
        return [time.perf_counter() - start]


class HostClock:
    """Times calls whose work takes the device next to no time, several a turn after an untimed one.

    Each call has a time of its own, so that the median does not see a host that was interrupted. On a GPU the host does
    not wait for the device before the turn ends.
    """

    ROUNDS, CALLS = 25, 10

    def rounds(self, runs: Sequence[Run]) -> int:
        return self.ROUNDS

    def turn(self, run: Run) -> list[float]:
        run()
        _wait()
        marks = [time.perf_counter()]
        for _ in range(self.CALLS):
            run()
            marks.append(time.perf_counter())
        _wait()
        return [end - start for start, end in itertools.pairwise(marks)]


class CudaClock:
    """Times several calls a turn by events, each with a cold L2.

    Each call is queued behind work that keeps the device busy, so that the host's time never counts. The pause after a
    turn lets the chip recover: back to back it hits its power limit, and later contenders run at lower clocks.
    """

    REST = 10.0  # times as long as the calls of the turn took
    LONGEST_REST = 0.1
    AHEAD = 2_000_000  # cycles, about 1 ms
    TRIES = 5  # a call is repeated if the device reached it before the host had queued all of it

    def __init__(self, quick: bool) -> None:
        self._rounds, self._calls = (1, 4) if quick else (2, 5)
        self._l2 = torch.empty(256 << 20, dtype=torch.int8, device="cuda")

    def rounds(self, runs: Sequence[Run]) -> int:
        return self._rounds

    def turn(self, run: Run) -> list[float]:
        run()
        spans = [self._queue(run) for _ in range(self._calls)]
        torch.cuda.synchronize()
        times = [start.elapsed_time(end) / 1e3 for start, end in spans]
        time.sleep(min(self.LONGEST_REST, self.REST * sum(times)))
        return times

    def _queue(self, run: Run) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        for _ in range(self.TRIES):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush()
            torch.cuda._sleep(self.AHEAD)
            start.record()
            run()
            end.record()
            if not start.query():
                break  # otherwise the event span may contain time of the host
        return start, end

    def _flush(self) -> None:
        self._l2.fill_(1)


class CleanCudaClock(CudaClock):
    """A CudaClock that leaves no written lines in the L2: to write them back would slow what reads at full speed."""

    def _flush(self) -> None:
        self._l2.amax()


class StepClock:
    """Wall time of a step of several calls, from the first call to the end of all work, by call."""

    ROUNDS = 3

    def __init__(self, calls: Mapping[Run, int]) -> None:
        """`calls` has the number of calls of each step."""
        self._calls = calls

    def rounds(self, runs: Sequence[Run]) -> int:
        return self.ROUNDS

    def turn(self, run: Run) -> list[float]:
        _wait()
        start = time.perf_counter()
        run()
        _wait()
        return [(time.perf_counter() - start) / self._calls[run]]


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
