"""Measures what lengths cost that a process has not seen before.

Each contender has a process of its own, to which all lengths of a stream are new: `python -m bench.method.lengths time
"attn_n" "growing cache" prompts`. Another process has compiled to disk the kernels that can be kept there.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.contenders import eager, flash_attn, ours, torch_sdpa
from bench.contenders.base import Contender
from bench.contenders.library import one_line
from bench.method import precompile
from bench.method.check import what_is_wrong
from bench.reporting.record import Point
from bench.workloads import Inputs, Workload, make_inputs
from bench.workloads.streams import SUITE, Stream, streams
from bench.workloads.suites import DEVICE

PROCESSES = 5
LONG = 2.0  # seconds of a stream
SECONDS = 240.0

Step = Callable[[], object]


class Library(NamedTuple):
    """A library, or a backend of ours, with a contender for each kind of n that it computes."""

    name: str
    by_n: Mapping[str, Contender]

    def __repr__(self) -> str:
        return self.name.replace(" ", "-")

    def of(self, stream: Stream) -> Contender:
        """Returns the contender with the n of the stream, or with the nearest n that there is."""
        return next(self.by_n[n] for n in (stream.n, "1", "0") if n in self.by_n)


class Timed(NamedTuple):
    """The times of a library for a stream, or the reason why it was not timed.

    Attributes:
        wall: seconds from the first call to the end of all work, divided by the calls; one number for each process.
        steps: seconds of the host in each call of the first process, which does not wait for the GPU.
        backend: the backends of attn_n that served.
    """

    status: str
    reason: str | None = None
    wall: tuple[float, ...] = ()
    steps: tuple[float, ...] = ()
    backend: str | None = None


def libraries(device: str) -> tuple[Library, ...]:
    """Returns our automatic choice, our backends by name, PyTorch's SDPA, eager attention, and FlashAttention."""
    own = tuple(Library(_base(by_n["0"]), by_n) for by_n in ours.by_backend(device))
    peers: dict[str, dict[str, Contender]] = {}
    for each in (torch_sdpa.PLAIN, *eager.GENERAL, *(flash_attn.CONTENDERS if device == "cuda" else ())):
        peers.setdefault(_base(each).removesuffix(" sink"), {})[each.n] = each
    return (*own, *(Library(name, by_n) for name, by_n in peers.items()))


def _base(contender: Contender) -> str:
    return contender.name.removesuffix(f" n={contender.n}")


def prepare_all(asked: Mapping[str, Sequence[str]]) -> dict[str, dict[str, str | None]]:
    """Checks each library and compiles its kernels, many at a time.

    Returns by library and stream the reason why it cannot be timed, or None.
    """
    at_a_time = precompile.at_a_time() if DEVICE == "cuda" else os.cpu_count() or 1
    with ThreadPoolExecutor(at_a_time) as pool:
        return dict(
            zip(asked, pool.map(lambda library: _process("prepare", library, asked[library]), asked), strict=True)
        )


def time_all(asked: Mapping[str, Sequence[str]]) -> dict[str, dict[str, Timed]]:
    """Times each library alone in a new process, PROCESSES times, for one process may be half as fast as another.

    All libraries have a turn before one has its next, and nobody has a next one after SECONDS or with a stream that
    takes longer than LONG. Returns the times by library and stream.
    """
    found: dict[str, dict[str, Timed]] = {}
    end = time.monotonic() + SECONDS
    for turn in range(PROCESSES):
        for library in random.Random(turn).sample(sorted(asked), len(asked)):
            before = found.get(library, {})
            if before and (time.monotonic() > end or any(sum(timed.steps) > LONG for timed in before.values())):
                continue
            for name, timed in time_one(library, asked[library]).items():
                known = before.get(name)
                again = timed if known is None else known._replace(wall=known.wall + timed.wall)
                found.setdefault(library, {})[name] = again
    return found


def time_one(library: str, names: Sequence[str]) -> dict[str, Timed]:
    """Times the streams of one library in one new process."""
    if not names:
        return {}
    return {
        name: Timed(**{**timed, "wall": tuple(timed.get("wall", ())), "steps": tuple(timed.get("steps", ()))})
        for name, timed in _process("time", library, names).items()
    }


def _process(task: str, library: str, names: Sequence[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.method.lengths", task, library, *names]
    root = Path(__file__).parents[2]
    said = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, check=True).stdout
    found: dict[str, Any] = json.loads(said.splitlines()[-1])
    return found


def prepare(library: Library, stream: Stream) -> str | None:
    """Checks the library and compiles all that the stream needs; returns the reason why it cannot be timed, or None."""
    contender = library.of(stream)
    try:
        checked = make_inputs(stream.before[0])
        reason = what_is_wrong(contender.prepare(checked), contender.n, checked, stream.training)
        if reason is None:
            for step in _steps(contender, stream, (*stream.before, *stream.workloads)):
                step()
            _wait()
    except Exception as failure:  # of one library; the others are timed all the same
        reason = f"fails: {one_line(failure)}"
    return reason


def why_absent(library: Library, stream: Stream) -> str | None:
    contender, measure = library.of(stream), "both" if stream.training else "forward"
    reasons = (contender.why_absent(workload, measure) for workload in (*stream.before, *stream.workloads))
    return next((reason for reason in reasons if reason is not None), None)


def run(library: Library, stream: Stream) -> Timed:
    """Times the stream, whose lengths are new to this process."""
    contender = library.of(stream)
    for step in _steps(contender, stream, stream.before):
        step()
    steps = list(_steps(contender, stream, stream.workloads))
    _wait()
    marks = [time.perf_counter()]
    for step in steps:
        step()
        marks.append(time.perf_counter())
    _wait()
    wall = (time.perf_counter() - marks[0]) / len(steps)
    served = {contender.backend(workload, stream.training) for workload in stream.workloads} - {None}
    host = tuple(end - start for start, end in itertools.pairwise(marks))
    return Timed("measured", None, (wall,), host, ", ".join(sorted(map(str, served))) or None)


def points(library: Library, stream: Stream, timed: Timed) -> list[Point]:
    """Makes two points: the wall time of a call, and the host's time of each call."""
    contender, measured = library.of(stream), timed.status == "measured"
    return [
        Point(
            f"{SUITE}{stream.name}", stream.longest.fields(), measure, contender.name, contender.n, contender.ours,
            timed.status, timed.reason, timed.backend, values if measured else (),
        )
        for measure, values in (("wall", timed.wall), ("step", timed.steps))
    ]  # fmt: skip


def _steps(contender: Contender, stream: Stream, workloads: Sequence[Workload]) -> Iterable[Step]:
    """Prepares the calls, whose tensors are views of the same memory."""
    most = stream.longest
    memory: dict[str, Tensor] = {}
    for workload in workloads:
        heads, heads_kv, width = workload.heads, workload.num_heads_kv, workload.width
        of_q, of_k = (
            (workload.batch, h, length, width) for h, length in ((heads, workload.length), (heads_kv, workload.len_k))
        )
        whole = (workload.batch, heads_kv, max(most.len_k, workload.len_k), width) if stream.cached else of_k
        q, dout = (_view(memory, name, of_q, workload) for name in ("q", "dout"))
        k, v = (_view(memory, name, whole, workload)[:, :, : workload.len_k] for name in ("k", "v"))
        q, k, v = (x.requires_grad_(stream.training) for x in (q, k, v))
        yield _step(contender, Inputs(q, k, v, dout, None, workload), stream.training)


def _view(memory: dict[str, Tensor], name: str, shape: tuple[int, ...], workload: Workload) -> Tensor:
    """Returns a dense tensor at the beginning of the memory of that name."""
    size = math.prod(shape)
    if name not in memory or memory[name].numel() < size:
        memory[name] = torch.randn(2 * size, dtype=workload.dtype, device=workload.device)
    return memory[name][:size].view(shape)


def _step(contender: Contender, inputs: Inputs, training: bool) -> Step:
    passes = contender.prepare(inputs)
    return (lambda: passes.backward(passes.forward())) if training else torch.no_grad()(passes.forward)


def _wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def main(task: str, name: str, *names: str) -> None:
    library = next(each for each in libraries(DEVICE) if each.name == name)
    found: dict[str, Any] = {}
    for stream in streams(DEVICE):
        if stream.name in names:
            found[stream.name] = prepare(library, stream) if task == "prepare" else run(library, stream)._asdict()
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
