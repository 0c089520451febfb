"""A results file: what was measured, on what, and when."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Point:
    """One contender at one workload.

    Attributes:
        suite: the group of workloads that it belongs to, such as "grid" or "decode"; of host calls "host: ", the
            kind of call and its pass.
        problem: the fields of `bench.workloads.Workload` that shape the work.
        measure: "forward", "backward" or "both", in seconds; "memory", in bytes; "host", seconds of host time a call;
            "first call", seconds of the first call in a new process; of calls whose lengths change "wall", seconds
            from the first to the end of all for each call, and "step", seconds of the host in each.
        contender: its name; the same name is the same code path on every machine.
        n: "0", "1" or "per head".
        ours: whether it is attn_n; otherwise it is a peer.
        status: "measured", "absent" (`reason` says why) or "wrong" (not timed; `reason` says how far off).
        backend: the backend of attn_n that served the call.
        values: what was measured, a value a round; rounds of one workload and measure were run in turns.
        flops: floating-point operations of one call by FlashAttention's count (only visible pairs of query and key).
    """

    suite: str
    problem: dict[str, Any]
    measure: str
    contender: str
    n: str
    ours: bool
    status: str
    reason: str | None = None
    backend: str | None = None
    values: tuple[float, ...] = ()
    flops: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def place(self) -> tuple[object, ...]:
        """Returns what has to agree for two points to be compared: all but the contender."""
        return self.suite, self.measure, tuple(sorted((k, str(v)) for k, v in self.problem.items()))


@dataclass
class Run:
    """Points of one machine and one state of the code.

    Attributes:
        machine: device, kind ("cuda" or "cpu"), driver, threads, python, torch, cuda, packages (name to version), and
            for a GPU the measured ceilings: matmul_flops and copy_bytes, both a second.
    """

    machine: dict[str, Any]
    commit: str
    date: str
    command: str
    points: list[Point] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Writes all of it at once, so that a run that is interrupted keeps what it had."""
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        head = {name: value for name, value in vars(self).items() if name != "points"}
        points = ",\n".join(json.dumps(_brief(point)) for point in self.points)
        unfinished.write_text(f'{json.dumps(head, indent=1)[:-2]},\n "points": [\n{points}\n]}}\n')
        os.replace(unfinished, path)


def load(path: Path) -> Run:
    stored = json.loads(path.read_text())
    points = [Point(**{**point, "values": tuple(point.get("values", ()))}) for point in stored.pop("points")]
    return Run(**stored, points=points)


def _brief(point: Point) -> dict[str, Any]:
    values = dataclasses.asdict(point)
    values["values"] = [float(f"{value:.5g}") for value in point.values]
    return {name: value for name, value in values.items() if value is not None and value != []}
