"""Streams of calls, hardly two of which have the same lengths."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Sequence

import torch

from bench.workloads.workload import Workload

SUITE = "lengths: "  # and the name of a stream


@dataclasses.dataclass(frozen=True)
class Stream:
    """Calls that are made one after the other, once each.

    Attributes:
        workloads: one for each call.
        before: workloads of other lengths that run first and untimed, so that what a process does once does not count.
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
        """Returns the workload that stands for the stream in the results."""
        return max(self.workloads, key=lambda workload: workload.length * workload.len_k)


def streams(device: str) -> tuple[Stream, ...]:
    """Returns a decoder's growing cache, prompts, and batches as long as their longest sequence."""
    cuda = device == "cuda"
    one = {"device": device, "dtype": torch.bfloat16 if cuda else torch.float32, "width": 64 if cuda else 16}
    heads = {"heads": 32, "heads_kv": 4} if cuda else {"heads": 4, "heads_kv": 2}
    start, steps, count, batches, middle, most = (2000, 400, 200, 100, 512, 4096) if cuda else (40, 8, 10, 5, 32, 100)

    def decoding(keys: int) -> Workload:
        return Workload(1, batch=8 if cuda else 2, keys=keys, **heads, **one)  # type: ignore[arg-type]

    def prompt(length: int) -> Workload:
        return Workload(length, True, **heads, **one)  # type: ignore[arg-type]

    def batch(length: int) -> Workload:
        return Workload(length, True, batch=4 if cuda else 2, heads=heads["heads"] // 2, **one)  # type: ignore[arg-type]

    def others(most: int) -> list[int]:
        # Triton compiles other kernels for multiples of 16, and by their length calls go to other kernels and backends.
        lengths = [4]
        while lengths[-1] * 3 // 2 < most - 2:
            lengths.append(lengths[-1] * 3 // 2)
        return [*lengths, middle, middle + 1, most - 1, most, most + 1]

    prompts = _as_in_text(count, middle, most, others(most))
    of_batches = _as_in_text(batches, middle, most // 2, others(most // 2))
    return (
        Stream(
            "growing cache", tuple(decoding(start + step) for step in range(steps)),
            tuple(decoding(start + steps + each) for each in (0, 1, 8, 12)), "per head", cached=True,
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
    """Draws log-normal lengths, none of which is among `others`."""
    lengths = [random.Random(seed).lognormvariate(math.log(middle), 1.0) for seed in range(count)]
    within = [min(max(int(length), 2), most - 2) for length in lengths]
    return [next(free for free in itertools.count(length) if free not in others) for length in within]
