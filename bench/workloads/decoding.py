"""Decoding: one query or a few against the KV cache of each sequence."""

from __future__ import annotations

import itertools

import torch

from bench.workloads.suites import Case
from bench.workloads.workload import Workload

SUITE = "decode"
# Of one call: the time of the device, with a cold L2; the wall time in a decode step, whose calls are launched one by
# one, or replayed as one CUDA graph.
MEASURES = ("forward", "eager", "graph")


class Decoding(Case):
    """A case in which each contender is measured by all of MEASURES."""

    def _name(self) -> str:
        return f"{self.suite}-B{self.workload.batch}-{self.workload}"


def decoding(device: str, quick: bool) -> list[Decoding]:
    sizes = _quick(device) if quick else _all(device)
    blocks = (0, 16, 128) if device == "cuda" else (0, 16)
    workloads = (_workload(device, *size, block) for size in sizes for block in blocks)
    return [Decoding(SUITE, workload, "forward", training=False) for workload in workloads]


# Of a size: the queries, the KV heads, the sequences and the keys of each.
Size = tuple[int, int, int, int]


def _all(device: str) -> list[Size]:
    if device == "cpu":
        return list(itertools.product((1, 4), (1,), (1, 3), (64,)))
    return list(itertools.product((1, 4), (8, 1), (1, 4, 32), (1024, 4096, 16384, 65536, 131072)))


def _quick(device: str) -> list[Size]:
    """Returns those sizes that tell how far the kernels are from the bandwidth and from their peers."""
    if device == "cpu":
        return _all(device)[:2]
    sequences = (
        (1, 1024), (1, 4096), (1, 16384), (1, 65536), (1, 131072), (4, 65536), (32, 16384), (32, 65536)
    )  # fmt: skip
    return [(*kind, *each) for kind in ((1, 8), (4, 1)) for each in sequences]


def _workload(device: str, length: int, heads_kv: int, batch: int, keys: int, block: int) -> Workload:
    heads, width, dtype = (32, 128, torch.bfloat16) if device == "cuda" else (4, 16, torch.float32)
    return Workload(
        length, length > 1, batch, heads, width, keys=keys, heads_kv=heads_kv, block=block, dtype=dtype, device=device
    )
