"""The tiles of each kernel, in one table, with where they were measured.

Nothing is tuned while a program runs. `python -m bench.tune` finds new rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Config(NamedTuple):
    tile_q: int
    tile_k: int
    num_warps: int
    num_stages: int
    descriptors: bool = False  # tiles come by tensor descriptors (the copy engine of sm_90 and later), not by pointers
    longer_than: int = 0  # for loops over more queries or keys than this

    def keywords(self) -> dict[str, Any]:
        return {
            "TILE_Q": self.tile_q, "TILE_K": self.tile_k, "DESCRIPTORS": self.descriptors,
            "num_warps": self.num_warps, "num_stages": self.num_stages,
        }  # fmt: skip


Rows = tuple[Config, ...]  # the longest loops first; the last one is for any length, and by pointers

# By kernel and by width, the wider of the two heads rounded up to a power of two. Below 64 that of 64 serves.
Table = dict[str, dict[int, Rows]]

# An H200, bfloat16, 2026-11-22, PyTorch 2.11, Triton 3.6: the best of each at S = 512, 2048 and 8192, causal and not.
SM_90: Table = {
    "forward": {
        64: (Config(64, 128, 4, 2, True, 1500), Config(64, 64, 4, 3)),
        128: (Config(128, 64, 4, 2, True, 400), Config(64, 64, 4, 3)),
        256: (Config(128, 64, 8, 2),),
    },
    "dq": {
        64: (Config(128, 64, 8, 3, True, 1500), Config(128, 64, 8, 3, False, 700), Config(64, 32, 4, 3)),
        128: (Config(128, 64, 8, 3, True, 3000), Config(128, 64, 8, 3, False, 700), Config(128, 32, 4, 3)),
        256: (Config(128, 32, 8, 3, True, 400), Config(128, 32, 8, 3)),
    },
    "dk and dv": {
        64: (Config(32, 64, 4, 3, True, 1500), Config(32, 64, 4, 3)),
        128: (Config(64, 64, 4, 2, True, 700), Config(64, 64, 4, 2)),
    },
    "dk": {256: (Config(32, 128, 8, 3, True, 700), Config(32, 128, 8, 3))},
    "dv": {256: (Config(64, 64, 4, 3, True, 700), Config(64, 128, 8, 2))},
}

# Not measured: what fits the 163 KB of shared memory of an A100 without spilling registers.
LARGE: Table = {
    "forward": {64: (Config(128, 64, 4, 3),), 128: (Config(128, 64, 8, 3),), 256: (Config(64, 32, 4, 2),)},
    "dq": {64: (Config(64, 64, 4, 2),), 128: (Config(64, 64, 4, 2),), 256: (Config(64, 32, 8, 2),)},
    "dk and dv": {64: (Config(32, 64, 4, 2),), 128: (Config(32, 64, 4, 2),)},
    "dk": {256: (Config(32, 64, 8, 2),)},
    "dv": {256: (Config(32, 64, 8, 2),)},
}

# Not measured: what fits 64 KB of shared memory (ROCm; consumer GPUs have 99 KB).
SMALL: Table = {
    "forward": {64: (Config(64, 32, 4, 2),), 128: (Config(64, 32, 4, 1),), 256: (Config(32, 32, 4, 1),)},
    "dq": {64: (Config(64, 32, 4, 1),), 128: (Config(32, 32, 4, 1),), 256: (Config(16, 32, 4, 1),)},
    "dk and dv": {64: (Config(32, 64, 4, 1),), 128: (Config(32, 32, 4, 1),)},
    "dk": {256: (Config(16, 32, 4, 1),)},
    "dv": {256: (Config(16, 32, 4, 1),)},
}

# float32 on any GPU: its exact products run outside of the matrix units, from registers.
FLOAT32: Table = {
    "forward": {64: (Config(32, 32, 4, 1),), 128: (Config(32, 32, 4, 1),), 256: (Config(16, 32, 4, 1),)},
    "dq": {64: (Config(32, 32, 4, 1),), 128: (Config(32, 16, 4, 1),), 256: (Config(16, 16, 4, 1),)},
    "dk and dv": {64: (Config(32, 32, 4, 1),), 128: (Config(16, 32, 4, 1),)},
    "dk": {256: (Config(16, 16, 4, 1),)},
    "dv": {256: (Config(16, 16, 4, 1),)},
}

_LARGE = ((8, 0), (8, 7), (10, 0), (10, 3))


def table(capability: tuple[int, int] | None, itemsize: int) -> Table:
    """That of a GPU; `capability` is None for ROCm and for the interpreter."""
    if itemsize == 4:
        return FLOAT32
    return SM_90 if capability == (9, 0) else LARGE if capability in _LARGE else SMALL


def find(table: Table, kernel: str, width: int, length: int, descriptors: bool) -> Config:
    """The row for a head of `width` and loops over `length` queries or keys; `descriptors`: the tensors allow them."""
    rows = table[kernel][max(64, width)]
    return next(row for row in rows if length > row.longer_than and (descriptors or not row.descriptors))
