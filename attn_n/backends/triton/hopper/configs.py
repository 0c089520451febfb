"""The tiles of the Hopper kernels, in one table, with where they were measured."""

from __future__ import annotations

from typing import NamedTuple

from attn_n.backends.triton.kernel_key import KernelKey


class Tiles(NamedTuple):
    """What the forward kernel is compiled for."""

    consumers: int  # of 64 queries each; of programs with one, two fit an SM
    tile_k: int
    stages: int
    q_in_registers: bool = False  # each consumer keeps its queries there
    out_apart: bool = True  # out is stored from a buffer of its own, so that the next queries can come (+3 % at 2048)
    lazy: bool = False  # O is rescaled only where a maximum has grown much
    weights_first: bool = False  # those of a block are complete before O of the block behind it is waited for


class Config(NamedTuple):
    """A row of the table, and what decides which keys get it."""

    tiles: Tiles
    counted: bool = False  # programs take tiles by a counter, heavy ones first: only where the last keys are masked
    at_least: int = 0  # keys that a query sees on the average


class ForwardSpec(NamedTuple):
    """The one constant of the forward kernel."""

    tiles: Tiles
    width: int
    group_size: int  # query heads of a KV head
    one_edge: bool  # of the blocks of keys that a consumer sees at most one needs a mask, the last one


class BackwardSpec(NamedTuple):
    """The one constant of the backward kernels."""

    width: int
    tile_q: int
    team_heads: int  # query heads that a program processes in sequence for a tile of keys: a team
    teams: int  # of a KV head


# By width, the longest first: the best of some, causal and not. An H200, 2026-11-23, S = 512 to 8192; on an H100,
# S = 512 to 16,384, `counted` 2026-11-25, `lazy` and all of E = 128 and 256 2026-11-26: bfloat16, PyTorch 2.11, Triton
# 3.6.
FORWARD: dict[int, tuple[Config, ...]] = {
    64: (
        Config(Tiles(3, 128, 2, lazy=True, weights_first=True), counted=True, at_least=1500),
        Config(Tiles(3, 128, 2), at_least=1500),
        Config(Tiles(1, 128, 2, q_in_registers=True), counted=True, at_least=1000),
        Config(Tiles(1, 128, 2, q_in_registers=True), at_least=400),
        Config(Tiles(1, 64, 4, q_in_registers=True)),
    ),
    128: (
        Config(Tiles(2, 128, 2, q_in_registers=True, lazy=True, weights_first=True), counted=True, at_least=1000),
        Config(Tiles(2, 128, 2, q_in_registers=True, lazy=True, weights_first=True), at_least=400),
        Config(Tiles(1, 64, 2, q_in_registers=True)),
    ),
    256: (
        Config(Tiles(2, 64, 2, out_apart=False, lazy=True), counted=True, at_least=3000),
        Config(Tiles(2, 64, 2, out_apart=False, lazy=True)),
    ),
}

# Queries and keys of a tile of the backward: the largest that fit.
BACKWARD = {64: (128, 128), 128: (64, 128), 256: (64, 64)}

# Where programs drift apart, see `heads_of_item`: up to so many query heads of a key head stay together, and of more so
# many at most. (An H100, 2026-11-26, S = 512 to 65,536, 4, 8 and 32 query heads a key head, bfloat16.)
UNEVEN = {64: (8, 4), 128: (4, 2), 256: (2, 2)}


def find(key: KernelKey) -> Config:
    """The tiles of the forward."""
    keys, masked = key.keys_on_average, key.right is not None
    return next(row for row in FORWARD[key.width] if keys >= row.at_least and (masked or not row.counted))


def heads_of_item(key: KernelKey, processors: int) -> int:
    """How many of the query heads of a key head a program of the backward takes through a tile of keys.

    Having taken all of them it writes dK and dV; else it adds its part to sums in float32, which cost a twentieth. That
    is worth it where tiles are few, and where some are seen by more queries than others: then programs are soon at
    different heads, and a cache no longer holds what they read and add. (8 query heads a key head, E = 128, causal:
    0.96 to 0.98 of the rate with as many key heads, in place of 0.70 to 0.96.)
    """
    p, groups = key, key.heads // key.heads_kv
    seen = p.queries_on_average
    if groups * seen < (2_000 if None in p.window else 16_000):  # the sums would take more than they bring
        return groups
    uneven = p.varlen or p.window != (None, None)
    together, apart = UNEVEN[p.width] if uneven else (groups, groups)
    rounds = 2 if p.causal else 1  # a heavy tile and a light one
    items = p.heads_kv * p.keys / BACKWARD[p.width][1]
    for heads in range(groups if groups <= together else apart, 1, -1):
        if groups % heads == 0 and items * groups / heads >= 0.9 * rounds * processors:
            return heads
    return 1
