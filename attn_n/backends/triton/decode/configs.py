"""The tiles of the decoding kernels, and into how many parts they split the keys."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch


class Gpu(NamedTuple):
    """What the choice depends on."""

    sm_count: int
    room: bool  # a program may have the shared memory of an A100, 163 KB; consumer GPUs have 99 KB, ROCm's 64 KB
    pdl: bool  # programmatic dependent launch: a kernel is launched while the one before it ends


class Config(NamedTuple):
    tile_r: int  # rows: the query heads of a KV head, times the queries
    tile_k: int
    num_warps: int
    num_stages: int
    programs: int  # that fit an SM


MOST_SPLITS = 128
# A split has at least so many keys, where there are enough: it takes as long to begin and to end as to read some.
LEAST_KEYS = 256


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    """Return what matters of a GPU; a CPU counts as a GPU of four SMs, so that the interpreter splits keys too."""
    if device.type != "cuda":
        return Gpu(4, True, False)
    properties: Any = torch.cuda.get_device_properties(device)
    pdl = torch.version.hip is None and properties.major >= 9
    return Gpu(properties.multi_processor_count, properties.shared_memory_per_block_optin > 120000, pdl)


def find(rows: int, width: int, itemsize: int, paged: bool, gpu: Gpu) -> Config:
    """Return the tiles for so many rows; `width` is the larger of those of the tiles of k and v."""
    tile_r = max(16, min(64, power_of_two(rows)))
    tile_k = max(16, min(64, 16384 // (width * itemsize)))  # a tile of keys has 16 KB
    stages, programs = 3 if gpu.room else 2, 2
    warps = 4 if gpu.room or tile_r < 64 else 8
    if rows > 64 and gpu.room and width * itemsize <= 256:  # two warpgroups share keys and values
        tile_r, warps, programs = 128, 8, 1
    if paged:  # a load waits for that of the table, and Triton divides the stages between the two
        stages = 2 * stages - 1
    return Config(tile_r, tile_k, warps, stages, programs)


def splits_for(items: int, keys: int, at_once: int) -> int:
    """Return into how many parts to split the keys, so that the programs fill the SMs, which take `at_once` of them.

    It depends on what the host knows: how many keys a sequence may have, not how many it has.
    """
    most = max(1, min(MOST_SPLITS, keys // LEAST_KEYS, -(-2 * at_once // items)))

    def filled(splits: int) -> float:
        rounds = items * splits / at_once
        return rounds / -(-items * splits // at_once)

    best = max(filled(splits) for splits in range(1, most + 1))
    return next(splits for splits in range(1, most + 1) if filled(splits) >= 0.9 * best)


def power_of_two(size: int, least: int = 16) -> int:
    return max(least, 1 << (size - 1).bit_length())
