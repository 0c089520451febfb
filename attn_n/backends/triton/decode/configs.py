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
    programs: int  # that an SM gets


MOST_SPLITS = 128
LEAST_KEYS = 64  # of a split, where there are enough


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    """Return what matters of a GPU; a CPU counts as a GPU of four SMs, so that the interpreter splits keys too."""
    if device.type != "cuda":
        return Gpu(4, True, False)
    properties: Any = torch.cuda.get_device_properties(device)
    pdl = torch.version.hip is None and properties.major >= 9
    return Gpu(properties.multi_processor_count, properties.shared_memory_per_block_optin > 120000, pdl)


# Measured on an H100 and an H200, 2026-11-28, PyTorch 2.11, Triton 3.6, bfloat16, E = 64 and 128: 1 to 32 sequences of
# 1,024 to 131,072 keys, 32 query heads; one query beside 8 KV heads (4 rows) up to 64 queries (256 rows), and four
# queries beside one KV head (128 rows).
def find(rows: int, width: int, itemsize: int, paged: bool, gpu: Gpu) -> Config:
    """Return the tiles for so many rows; `width` is the larger of those of the tiles of k and v."""
    bytes_of_row, stages = width * itemsize, 3 if gpu.room else 2
    if rows > 64 and gpu.room and bytes_of_row <= 256:  # two warpgroups share keys and values
        config = Config(128, 128, 8, 2, 1) if paged and bytes_of_row > 128 else Config(128, 64, 8, stages, 1)
    else:
        tile_r = max(16, min(64, power_of_two(rows)))
        warps = 4 if gpu.room or tile_r < 64 else 8
        bytes_of_tile, programs = (8192, 2) if paged or bytes_of_row <= 128 else (16384, 1)
        config = Config(tile_r, max(16, min(64, bytes_of_tile // bytes_of_row)), warps, stages, programs)
    # Paged, a load waits for that of the table, and Triton divides the stages between the two.
    return config._replace(num_stages=2 * config.num_stages - 1) if paged else config


def splits_for(items: int, keys: int, at_once: int) -> int:
    """Return into how many parts to split the keys, so that the programs fill the SMs, which take `at_once` of them.

    It depends on what the host knows: how many keys a sequence may have, not how many it has.
    """
    most = max(1, min(MOST_SPLITS, keys // LEAST_KEYS, -(-2 * at_once // items)))

    def filled(splits: int) -> float:
        rounds = items * splits / at_once
        return rounds / -(-items * splits // at_once)

    best = max(filled(splits) for splits in range(1, most + 1))
    return next(splits for splits in range(1, most + 1) if filled(splits) >= 0.95 * best)


def power_of_two(size: int, least: int = 16) -> int:
    return max(least, 1 << (size - 1).bit_length())
