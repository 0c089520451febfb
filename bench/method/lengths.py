"""The cost of lengths that a process has not seen: streams of calls, hardly two of which have the same lengths.

Each contender has a process of its own, whose lengths are all new to it: `python -m bench.method.lengths time "attn_n"
"growing cache" prompts`. Kernels that are kept on disk have been compiled by another process before.
"""

from __future__ import annotations

import dataclasses
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
from bench.workloads.suites import DEVICE

SUITE = "lengths: "  # and the name of a stream
PROCESSES = 5
LONG = 2.0  # seconds of a stream
SECONDS = 240.0

Step = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Stream:
    """Calls one after the other, once each.

    Attributes:
        workloads: a call each.
        before: of other lengths, which come untimed before: what a process does once does not count.
        n: which of KINDS_OF_N; a peer that does not have it computes another.
        training: forward and backward; otherwise a forward without gradients.
        cached: k and v are the beginning of one cache; otherwise each call has dense tensors.
    """

    name: str
    workloads: tuple[Workload, ...]
    before: tuple[Workload, ...]
    n: str
    training: bool = False
    cached: bool = False

    def __str__(self) -> str:
        return self.name.replace(" ", "-").replace("=", "")

    @property
    def longest(self) -> Workload:
        """It stands for the stream in the results."""
        return max(self.workloads, key=lambda workload: workload.length * workload.len_k)


class Party(NamedTuple):
    """One way to compute attention, by the kinds of n that it has."""

    name: str
    by_n: Mapping[str, Contender]

    def __repr__(self) -> str:
        return self.name.replace(" ", "-")

    def of(self, stream: Stream) -> Contender:
        """With the n of the stream, or the nearest that there is."""
        return next(self.by_n[n] for n in (stream.n, "1", "0") if n in self.by_n)


class Timed(NamedTuple):
    """The times of a party for a stream, or the reason why it was not timed.

    Attributes:
        wall: seconds from the first call to the end of all work, for each call; one number for each process.
        steps: seconds of the host in each call of the first process; it does not wait for a GPU.
        backend: of attn_n, those that served.
    """

    status: str
    reason: str | None = None
    wall: tuple[float, ...] = ()
    steps: tuple[float, ...] = ()
    backend: str | None = None


def streams(device: str) -> tuple[Stream, ...]:
    """A decoder's growing cache, prompts, and batches as long as the longest of their sequences."""
    cuda = device == "cuda"
    one = {"device": device, "dtype": torch.bfloat16 if cuda else torch.float32, "width": 64 if cuda else 16}
    heads = {"heads": 32, "heads_kv": 4} if cuda else {"heads": 4, "heads_kv": 2}
    start, steps, count, batches, middle, most = (2000, 100, 200, 40, 512, 4096) if cuda else (40, 8, 10, 5, 32, 100)

    def decoding(keys: int) -> Workload:
        return Workload(1, batch=8 if cuda else 2, keys=keys, **heads, **one)  # type: ignore[arg-type]

    def prompt(length: int) -> Workload:
        return Workload(length, True, **heads, **one)  # type: ignore[arg-type]

    def batch(length: int) -> Workload:
        return Workload(length, True, batch=4 if cuda else 2, heads=heads["heads"] // 2, **one)  # type: ignore[arg-type]

    def others(most: int) -> list[int]:
        # Kernels in Triton differ for lengths that are a multiple of 16 and for others, and may differ for long ones.
        return [middle, middle + 1, middle // 16 * 8, most - 1, most, most + 1]

    prompts = _as_in_text(count, middle, most, others(most))
    of_batches = _as_in_text(batches, middle, most // 2, others(most // 2))
    return (
        Stream(
            "growing cache", tuple(decoding(start + step) for step in range(steps)),
            tuple(decoding(start // 2 + each) for each in (0, 1, 8, 16)), "per head", cached=True,
        ),
        *(
            Stream(f"prompts n={n}", tuple(map(prompt, prompts)), tuple(map(prompt, others(most))), n)
            for n in ("0", "per head")
        ),
        Stream(
            "training", tuple(map(batch, of_batches)), tuple(map(batch, others(most // 2))), "per head",
            training=True,
        ),
    )  # fmt: skip


def _as_in_text(count: int, middle: int, most: int, others: Sequence[int]) -> list[int]:
    """Log-normal lengths, none of which is among the others."""
    lengths = [random.Random(seed).lognormvariate(math.log(middle), 1.0) for seed in range(count)]
    within = [min(max(int(length), 2), most - 2) for length in lengths]
    return [length + 2 if length in others else length for length in within]


def parties(device: str) -> tuple[Party, ...]:
    """The automatic choice, each backend by name, PyTorch's own SDPA and choice, eager, and FlashAttention."""
    own = tuple(Party(_base(by_n["0"]), by_n) for by_n in ours.by_backend(device))
    peers: dict[str, dict[str, Contender]] = {}
    for each in (torch_sdpa.PLAIN, *eager.GENERAL, *(flash_attn.CONTENDERS if device == "cuda" else ())):
        peers.setdefault(_base(each).removesuffix(" sink"), {})[each.n] = each
    return (*own, *(Party(name, by_n) for name, by_n in peers.items()))


def _base(contender: Contender) -> str:
    return contender.name.removesuffix(f" n={contender.n}")


def prepare_all(asked: Mapping[str, Sequence[str]]) -> dict[str, dict[str, str | None]]:
    """Has each party checked and its kernels compiled, many at a time: by party and stream, why it cannot be timed."""
    at_a_time = precompile.at_a_time() if DEVICE == "cuda" else os.cpu_count() or 1
    with ThreadPoolExecutor(at_a_time) as pool:
        return dict(zip(asked, pool.map(lambda party: _process("prepare", party, asked[party]), asked), strict=True))


def time_all(asked: Mapping[str, Sequence[str]]) -> dict[str, dict[str, Timed]]:
    """By party and stream, each party alone in a new process, and PROCESSES times: one may be half as fast as another.

    All parties have their turn before one has another, and no other one after SECONDS. What takes long is far from the
    others, and has one turn.
    """
    found: dict[str, dict[str, Timed]] = {}
    end = time.monotonic() + SECONDS
    for turn in range(PROCESSES):
        for party in random.Random(turn).sample(sorted(asked), len(asked)):
            before = found.get(party, {})
            if before and (time.monotonic() > end or any(sum(timed.steps) > LONG for timed in before.values())):
                continue
            for name, timed in time_one(party, asked[party]).items():
                known = before.get(name)
                again = timed if known is None else known._replace(wall=known.wall + timed.wall)
                found.setdefault(party, {})[name] = again
    return found


def time_one(party: str, names: Sequence[str]) -> dict[str, Timed]:
    """By stream, in one process."""
    if not names:
        return {}
    return {
        name: Timed(**{**timed, "wall": tuple(timed.get("wall", ())), "steps": tuple(timed.get("steps", ()))})
        for name, timed in _process("time", party, names).items()
    }


def _process(task: str, party: str, names: Sequence[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.method.lengths", task, party, *names]
    root = Path(__file__).parents[2]
    said = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, check=True).stdout
    found: dict[str, Any] = json.loads(said.splitlines()[-1])
    return found


def prepare(party: Party, stream: Stream) -> str | None:
    """Check the party, and compile all that the stream needs; returns why it cannot be timed."""
    contender = party.of(stream)
    try:
        checked = make_inputs(stream.before[0])
        reason = what_is_wrong(contender.prepare(checked), contender.n, checked, stream.training)
        if reason is None:
            for step in _steps(contender, stream, (*stream.before, *stream.workloads)):
                step()
            _wait()
    except Exception as failure:  # of one party; the others are timed all the same
        reason = f"fails: {one_line(failure)}"
    return reason


def why_absent(party: Party, stream: Stream) -> str | None:
    contender, measure = party.of(stream), "both" if stream.training else "forward"
    reasons = (contender.why_absent(workload, measure) for workload in (*stream.before, *stream.workloads))
    return next((reason for reason in reasons if reason is not None), None)


def run(party: Party, stream: Stream) -> Timed:
    """Time the stream, whose lengths this process has not seen."""
    contender = party.of(stream)
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


def points(party: Party, stream: Stream, timed: Timed) -> list[Point]:
    """As the results hold it: the wall time of a call, and the host's of each."""
    contender, measured = party.of(stream), timed.status == "measured"
    return [
        Point(
            f"{SUITE}{stream.name}", stream.longest.fields(), measure, contender.name, contender.n, contender.ours,
            timed.status, timed.reason, timed.backend, values if measured else (),
        )
        for measure, values in (("wall", timed.wall), ("step", timed.steps))
    ]  # fmt: skip


def _steps(contender: Contender, stream: Stream, workloads: Sequence[Workload]) -> Iterable[Step]:
    """The calls, ready to run: their tensors are views of the same memory."""
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
    """Dense, at the beginning of the memory of that name."""
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
    party = next(each for each in parties(DEVICE) if each.name == name)
    found: dict[str, Any] = {}
    for stream in streams(DEVICE):
        if stream.name in names:
            found[stream.name] = prepare(party, stream) if task == "prepare" else run(party, stream)._asdict()
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
