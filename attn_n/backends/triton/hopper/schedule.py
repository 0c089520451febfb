"""The table of the tiles of varlen sequences, in the order in which programs take them.

Only the GPU knows how many tiles there are. `schedule_kernel` lists them, long sequences first (those whose tiles take
the longest, so that no program is left with one at the end), in a table of int32: a counter of the tiles that have been
taken, the number of tiles, and for each tile its sequence and the place of that sequence's first tile in the list.
"""

import triton
import triton.language as tl

BLOCK = tl.constexpr(128)  # sequences of a program
GROUP = tl.constexpr(1024)  # sequences that are sorted; of more, one group comes behind the other
HEADER = tl.constexpr(2)  # numbers before those of the tiles


@triton.jit
def lengths(starts, sequences, batch):
    inside = sequences < batch
    return tl.load(starts + sequences + 1, mask=inside, other=0) - tl.load(starts + sequences, mask=inside, other=0)


@triton.jit(do_not_specialize=("batch",))
def schedule_kernel(table, starts, others, batch, TILE: tl.constexpr):
    """List the tiles of the rows that begin at `starts`; `others` are those that each of them meets.

    In the forward these are queries and keys, in the backward keys and queries.
    """
    mine = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    tiles, work = tl.cdiv(lengths(starts, mine, batch), TILE), lengths(others, mine, batch)
    # The tiles of the groups before.
    group, total = tl.program_id(0) * BLOCK // GROUP * GROUP, 0
    for first in range(0, group, GROUP):
        total += tl.sum(tl.cdiv(lengths(starts, first + tl.arange(0, GROUP), batch), TILE))
    # The tiles of those sequences of the group that come earlier.
    place = tl.zeros((BLOCK,), tl.int32) + total
    for first in range(group, tl.minimum(group + GROUP, batch), 32):
        their = first + tl.arange(0, 32)
        their_tiles, their_work = tl.cdiv(lengths(starts, their, batch), TILE), lengths(others, their, batch)
        equal = (their_work[None, :] == work[:, None]) & (their[None, :] < mine[:, None])  # [BLOCK, 32]
        earlier = (their_work[None, :] > work[:, None]) | equal
        place += tl.sum(tl.where(earlier, their_tiles[None, :], 0), 1)
        total += tl.sum(their_tiles)
    if tl.program_id(0) == tl.num_programs(0) - 1:
        tl.store(table, 0)
        tl.store(table + 1, total)
    for first in range(0, tl.max(tiles), 8):
        tile = first + tl.arange(0, 8)[None, :]
        of_tile = table + HEADER + 2 * (place[:, None] + tile)
        tl.store(of_tile, mine[:, None] + 0 * tile, mask=tile < tiles[:, None])
        tl.store(of_tile + 1, place[:, None] + 0 * tile, mask=tile < tiles[:, None])


@triton.jit
def sequence_of(table, item, heads):
    """Return the sequence of a work item, which is a tile of one head, and the item's place among its sequence's."""
    of_tile = table + HEADER + 2 * (item // heads)
    return tl.load(of_tile), item - tl.load(of_tile + 1) * heads


@triton.jit
def tile_and_head(item, tiles, heads, swizzle):
    """Return the tile and the head of a work item of a sequence.

    `swizzle` heads take turns, tile by tile, so that L2 holds what they read; then come the next heads.
    """
    swizzle = tl.minimum(tl.maximum(swizzle, 1), heads)
    first_head = item // (tiles * swizzle) * swizzle
    item, swizzle = item - first_head * tiles, tl.minimum(swizzle, heads - first_head)
    return item // swizzle, first_head + item % swizzle


@triton.jit
def rows_of_sequence(starts, sequence):
    """Return the first row of a sequence, and how many it has."""
    start = tl.load(starts + sequence)
    return start, tl.load(starts + sequence + 1) - start
