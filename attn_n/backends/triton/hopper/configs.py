"""The tiles of the Hopper kernels, in one table, with where they were measured."""

from __future__ import annotations

from typing import NamedTuple

from attn_n.backends.triton.problem import Problem


class Config(NamedTuple):
    consumers: int  # of 64 queries each; of a program with one, two fit a processor
    tile_k: int
    stages: int
    q_in_registers: bool = False  # each consumer keeps its queries there
    out_apart: bool = True  # out is stored from a buffer of its own, so that the next queries can come (+3 % at 2048)
    counted: bool = False  # under a causal mask programs take tiles by a counter, heavy ones first, not in pairs
    at_least: int = 0  # keys that a query sees on the average


# By width, the longest first: the best of some, causal and not. An H200, 2026-11-23, S = 512 to 8192, and `counted` on
# an H100, 2026-11-25, S = 512 to 16,384: bfloat16, PyTorch 2.11, Triton 3.6.
FORWARD: dict[int, tuple[Config, ...]] = {
    64: (
        Config(3, 128, 2, counted=True, at_least=1500),
        Config(1, 128, 2, q_in_registers=True, counted=True, at_least=1000),
        Config(1, 128, 2, q_in_registers=True, at_least=400),
        Config(1, 64, 4, q_in_registers=True),
    ),
    128: (
        Config(2, 128, 2, counted=True, at_least=1000),
        Config(2, 128, 2, at_least=400),
        Config(1, 64, 2, q_in_registers=True),
    ),
    256: (Config(2, 64, 2, out_apart=False, counted=True, at_least=3000), Config(2, 64, 2, out_apart=False)),
}

# Queries and keys of a tile of the backward: the largest that fit.
BACKWARD = {64: (128, 128), 128: (64, 128), 256: (64, 64)}


def find(problem: Problem) -> Config:
    """The tiles of the forward."""
    keys = problem.keys_on_average
    return next(row for row in FORWARD[problem.width] if keys >= row.at_least)
