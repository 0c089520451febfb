"""The tiles of each kernel, in one table."""

from __future__ import annotations

from typing import Any, NamedTuple


class Config(NamedTuple):
    tile_q: int
    tile_k: int
    num_warps: int
    num_stages: int

    def keywords(self) -> dict[str, Any]:
        return {
            "TILE_Q": self.tile_q, "TILE_K": self.tile_k, "num_warps": self.num_warps, "num_stages": self.num_stages,
        }  # fmt: skip


def forward(width: int, itemsize: int, descriptors: bool) -> Config:
    """For a head of `width`, the larger of E and Ev rounded up to a power of two."""
    if itemsize == 4:
        return Config(64, 32, 4, 2) if width <= 128 else Config(32, 32, 4, 1)
    if width <= 64:
        return Config(128, 64, 4, 3)
    return Config(128, 64, 8, 3) if width <= 128 else Config(128, 32, 8, 2)


def dkdv(width: int, itemsize: int, descriptors: bool) -> dict[str, Config]:
    """By what one program computes: dK ("k"), dV ("v") or both ("kv")."""
    if itemsize == 4:
        return {"kv": Config(32, 32, 4, 1) if width <= 128 else Config(16, 16, 4, 1)}
    if width <= 128:
        return {"kv": Config(64, 64, 4, 2) if width <= 64 else Config(32, 64, 4, 2)}
    return {"k": Config(32, 128, 8, 2), "v": Config(64, 128, 8, 2)}


def dq(width: int, itemsize: int, descriptors: bool) -> Config:
    if itemsize == 4:
        return Config(32, 32, 4, 1) if width <= 128 else Config(16, 16, 4, 1)
    return Config(64, 64, 4, 2) if width <= 64 else Config(64, 32, 4, 2) if width <= 128 else Config(32, 32, 8, 1)
