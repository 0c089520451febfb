"""The tile sizes of the Hopper kernels in one table, with the GPU that they were measured on."""

from __future__ import annotations

from typing import NamedTuple

from attn_n.backends.triton.kernel_key import KernelKey


class Tiles(NamedTuple):
    """The constants that the forward kernel is compiled for."""

    consumers: int  # consumer warpgroups, of 64 queries each
    tile_k: int
    stages: int  # of the ring of K and V
    q_in_registers: bool = False  # each consumer keeps its queries in registers
    out_apart: bool = True  # out has a buffer of its own, so the next queries can be loaded meanwhile (+3 % at 2048)
    lazy: bool = False  # O is rescaled only where row_max has grown by much (see `forward.py`)
    weights_first: bool = False  # all weights of a block are computed before the wait for O of the block before it
    programs: int = 1  # that share an SM


class Config(NamedTuple):
    """A row of the table: tiles, and the calls that they are for."""

    tiles: Tiles
    counted: bool = False  # programs take tiles by an atomic counter, heavy ones first; for masks of later keys
    at_least: int = 0  # a query sees at least so many keys on average
    masked: bool = False  # the row is for masks of later keys alone


class Widths(NamedTuple):
    """Columns of the heads, and of the tiles in shared memory that hold them: TMA fills these up with zeros."""

    head_dim: int
    head_dim_v: int
    tile: int  # of q and k
    tile_v: int  # of v, out and dout
    padded: int  # of q and k, a power of two


class ForwardSpec(NamedTuple):
    """The constexpr of the forward kernel."""

    tiles: Tiles
    widths: Widths
    group_size: int  # query heads of a KV head
    one_edge: bool  # at most one of the blocks of keys that a consumer sees needs a mask, the last one
    padded: bool  # some rows of a batch may not exist


class BackwardSpec(NamedTuple):
    """The constexpr of the backward kernels."""

    widths: Widths
    tile_q: int
    pass_q: int  # queries of a tile of the passes around, whose rows are padded to a multiple of it
    team_heads: int  # query heads that a program processes in sequence for a tile of keys: a team
    teams: int  # for each KV head
    padded: bool  # some rows of a batch may not exist


# Columns of a tile of q and k, and of the tile of v that goes with it: 192 is that of multi-head latent attention.
TILE_V = {64: 64, 128: 128, 192: 128, 256: 256}

# By tile, then by length, the longest first; each row was the fastest of those tried, causal or not. Measured in
# bfloat16, PyTorch 2.11, Triton 3.6: on an H200, 2026-11-23, S = 512 to 8192; on an H100, S = 512 to 16,384, `counted`
# 2026-11-25, `lazy` and all of E = 128 and 256 2026-11-26, `masked` 2026-11-28. Not measured: 192, here and below.
FORWARD: dict[int, tuple[Config, ...]] = {
    64: (
        Config(Tiles(3, 128, 2, lazy=True, weights_first=True), counted=True, at_least=1500),
        Config(Tiles(3, 128, 2), at_least=1500),
        Config(Tiles(1, 128, 2, q_in_registers=True, programs=2), counted=True, at_least=1000),
        Config(Tiles(1, 64, 3, q_in_registers=True, programs=3), masked=True),
        Config(Tiles(1, 128, 2, q_in_registers=True, programs=2), at_least=400),
        Config(Tiles(1, 64, 4, q_in_registers=True, programs=2)),
    ),
    128: (
        Config(Tiles(2, 128, 2, q_in_registers=True, lazy=True, weights_first=True), counted=True, at_least=1000),
        Config(Tiles(2, 128, 2, q_in_registers=True, lazy=True, weights_first=True), at_least=400),
        Config(Tiles(1, 64, 2, q_in_registers=True, programs=2)),
    ),
    192: (
        Config(Tiles(2, 128, 2, out_apart=False, lazy=True), counted=True, at_least=1000),
        Config(Tiles(2, 128, 2, out_apart=False, lazy=True)),
    ),
    256: (
        Config(Tiles(2, 64, 2, out_apart=False, lazy=True), counted=True, at_least=3000),
        Config(Tiles(2, 64, 2, out_apart=False, lazy=True)),
    ),
}

# Queries and keys of a tile in the backward, by its columns, and rows of a tile of the passes around it.
BACKWARD = {64: (64, 128, 128), 128: (64, 128, 64), 192: (64, 64, 64), 256: (64, 64, 64)}

# For uneven work, by tile: one program takes all query heads of a KV head if they are at most the first number, and
# else at most the second (see `heads_of_item`). Measured on an H100, 2026-11-26, bfloat16, S = 512 to 65,536, with 4, 8
# and 32 query heads for each KV head.
UNEVEN = {64: (8, 4), 128: (4, 2), 192: (2, 2), 256: (2, 2)}


def widths(head_dim: int, head_dim_v: int) -> Widths | None:
    """Return the narrowest tiles that hold such heads."""
    for tile, tile_v in TILE_V.items():
        if head_dim <= tile and head_dim_v <= tile_v:
            return Widths(head_dim, head_dim_v, tile, tile_v, 1 << (tile - 1).bit_length())
    return None


def find(key: KernelKey, tile: int) -> Config:
    """Return the row of the table for a forward."""
    keys, masked = key.keys_on_average, key.right is not None
    return next(row for row in FORWARD[tile] if keys >= row.at_least and (masked or not (row.counted or row.masked)))


def heads_of_item(key: KernelKey, tile: int, sm_count: int) -> int:
    """Return how many query heads of a KV head one program of the backward processes for a tile of keys: a team.

    A program that processes all of them writes dK and dV; otherwise it adds its part to float32 sums, which costs 5 %.
    Smaller teams pay off in two cases. Where tiles are few, they keep more SMs busy. Where some tiles are seen by more
    queries than others, programs soon work on different heads, and the L2 cache no longer holds what they load and add.
    (With 8 query heads for each KV head, E = 128, causal: 0.96 to 0.98 of the rate with as many KV heads,
    in place of 0.70 to 0.96.)
    """
    p, groups = key, key.heads // key.heads_kv
    seen = p.queries_on_average
    if groups * seen < (2_000 if None in p.window else 16_000):  # the float32 sums would cost more than they gain
        return groups
    uneven = p.varlen or p.padded or p.window != (None, None)
    whole, split = UNEVEN[tile] if uneven else (groups, groups)
    rounds = 2 if p.causal else 1  # for each SM: a heavy tile and a light one, or one tile
    items = p.heads_kv * p.keys / BACKWARD[tile][1]
    for heads in range(groups if groups <= whole else split, 1, -1):
        if groups % heads == 0 and items * groups / heads >= 0.9 * rounds * sm_count:
            return heads
    return 1
