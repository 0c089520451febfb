"""Measures what lengths cost that a process has not seen before.

Each contender has a process of its own, to which all lengths of a stream are new: `python -m bench.method.lengths time
"attn_n" "growing cache" prompts`. Another process has compiled to disk the kernels that can be kept there.

The processes live side by side and take turns of a few calls, while the others wait. One after the other would compare
the machine with itself: the speed of a host with neighbours was seen to change by 1.7 times within seconds.
"""

from __future__ import annotations

import contextlib
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

CALLS_A_TURN = 5
ROOT = Path(__file__).parents[2]

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
        wall: of each turn, the seconds from its first call to the end of all work, divided by its calls.
        steps: seconds of the host in each call, which does not wait for the GPU.
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
        return dict(zip(asked, pool.map(lambda library: _process(library, asked[library]), asked), strict=True))


def time_all(asked: Mapping[str, Sequence[str]]) -> dict[str, dict[str, Timed]]:
    """Times each library in a process of its own, by turns; returns the times by library and stream."""
    found: dict[str, dict[str, Timed]] = {library: {} for library in asked}
    with contextlib.ExitStack() as stack:
        processes = {library: stack.enter_context(_start(library, names)) for library, names in asked.items() if names}
        for stream in streams(DEVICE):
            those = sorted(library for library, names in asked.items() if stream.name in names)
            for library in those:
                found[library][stream.name] = Timed("measured", backend=_reply(processes[library])["backend"])
            for turn in range(turns_of(stream)):
                for library in random.Random(turn).sample(those, len(those)):
                    before, process = found[library][stream.name], processes[library]
                    assert process.stdin is not None
                    process.stdin.write("your turn\n")
                    process.stdin.flush()
                    said = _reply(process)
                    found[library][stream.name] = before._replace(
                        wall=(*before.wall, said["wall"]), steps=(*before.steps, *said["steps"])
                    )
    return found


def _start(library: str, names: Sequence[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        _command("time", library, names), cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def _reply(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Returns the next line that the process says in JSON, after what libraries print."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            said: dict[str, Any] = json.loads(line)
            return said
    raise subprocess.CalledProcessError(process.wait(), process.args)


def turns_of(stream: Stream) -> int:
    return math.ceil(len(stream.workloads) / CALLS_A_TURN)


def _command(task: str, library: str, names: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "bench.method.lengths", task, library, *names]


def _process(library: str, names: Sequence[str]) -> dict[str, str | None]:
    """Checks the library in a process of its own, so that what it compiles is found on disk by the next one."""
    said = subprocess.run(_command("prepare", library, names), cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
    found: dict[str, str | None] = json.loads(said.splitlines()[-1])
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


class Turn(NamedTuple):
    wall: float
    steps: tuple[float, ...]


class InTurns:
    """The calls of a stream, by turns; what is not timed has run when it is made."""

    def __init__(self, library: Library, stream: Stream) -> None:
        contender = library.of(stream)
        self._known = list(_steps(contender, stream, stream.before))
        for step in self._known:
            step()
        self._steps, self._turns = list(_steps(contender, stream, stream.workloads)), turns_of(stream)

    def time(self, turn: int) -> Turn:
        for step in self._known:  # untimed: a core that was idle starts at a lower clock, with cold caches
            step()
        _wait()
        marks = [time.perf_counter()]
        steps = self._steps[turn :: self._turns]
        for step in steps:
            step()
            marks.append(time.perf_counter())
        _wait()
        wall = (time.perf_counter() - marks[0]) / len(steps)
        return Turn(wall, tuple(end - start for start, end in itertools.pairwise(marks)))


def backend_of(library: Library, stream: Stream) -> str | None:
    contender = library.of(stream)
    served = {contender.backend(workload, stream.training) for workload in stream.workloads} - {None}
    return ", ".join(sorted(map(str, served))) or None


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
    asked = [stream for stream in streams(DEVICE) if stream.name in names]
    if task == "prepare":
        print(json.dumps({stream.name: prepare(library, stream) for stream in asked}))
        return
    for stream in asked:
        served = backend_of(library, stream)  # asked before, for it may load a backend
        in_turns = InTurns(library, stream)
        print(json.dumps({"backend": served}), flush=True)
        for turn in range(turns_of(stream)):
            sys.stdin.readline()
            print(json.dumps(in_turns.time(turn)._asdict()), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
