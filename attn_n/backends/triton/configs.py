"""The tiles of each kernel, in one table."""

from __future__ import annotations

from typing import NamedTuple


class Config(NamedTuple):
    tile_q: int
    tile_k: int
    num_warps: int
    num_stages: int


def forward(width: int, itemsize: int) -> Config:
    """For a head of `width`, the larger of E and Ev rounded up to a power of two."""
    if itemsize == 4:
        return Config(64, 32, 4, 2) if width <= 128 else Config(32, 32, 4, 1)
    if width <= 64:
        return Config(128, 64, 4, 3)
    return Config(128, 64, 8, 3) if width <= 128 else Config(128, 32, 8, 2)


def dkdv(width: int, itemsize: int) -> Config:
    if itemsize == 4:
        return Config(32, 32, 4, 1) if width <= 128 else Config(16, 16, 4, 1)
    return Config(64, 64, 4, 2) if width <= 64 else Config(32, 64, 4, 2) if width <= 128 else Config(32, 32, 8, 1)


def dq(width: int, itemsize: int) -> Config:
    if itemsize == 4:
        return Config(32, 32, 4, 1) if width <= 128 else Config(16, 16, 4, 1)
    return Config(64, 64, 4, 2) if width <= 64 else Config(64, 32, 4, 2) if width <= 128 else Config(32, 32, 8, 1)
