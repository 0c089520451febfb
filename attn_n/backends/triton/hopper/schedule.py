"""The table of the tiles of sequences whose lengths only the GPU knows, in the order in which programs take them.

They are varlen, or what exists of a padded batch. `schedule_kernel` lists their tiles, long sequences first (those
whose tiles take the longest, so that no program is left with one at the end), in a table of int32: a counter of the
tiles that have been taken, the number of tiles, and for each tile its sequence and the place of that sequence's first
tile in the list.
"""

from typing import NamedTuple

import triton
import triton.language as tl

BLOCK = tl.constexpr(128)  # sequences of a program
GROUP = tl.constexpr(1024)  # sequences that are sorted; of more, one group comes behind the other
HEADER = tl.constexpr(2)  # numbers before those of the tiles


class Extents(NamedTuple):
    """These say which queries, or which keys, the sequences have. All are None where each has all rows of its batch."""

    starts: tl.tensor  # (B + 1,): the first row of each varlen sequence
    used: tl.tensor  # (B,): the end in each batch; None if that is `rows`
    leftpad: tl.tensor  # (B,): the first row in each batch; None if that is 0
    rows: tl.tensor  # of a padded batch


@triton.jit
def rows_of_sequence(extents, sequence, inside=None):
    """Return the first row of a sequence, and how many it has: none where it is not `inside`."""
    other: tl.constexpr = None if inside is None else 0
    if extents.starts is not None:
        start = tl.load(extents.starts + sequence, mask=inside, other=other)
        return start, tl.load(extents.starts + sequence + 1, mask=inside, other=other) - start
    else:
        first, end = 0, extents.rows
        if extents.leftpad is not None:
            first = tl.load(extents.leftpad + sequence, mask=inside, other=other)
        if extents.used is not None:
            end = tl.load(extents.used + sequence, mask=inside, other=other)
        length = tl.maximum(end - first, 0)
        return first, length if inside is None else tl.where(inside, length, 0)


@triton.jit
def lengths(extents, sequences, batch):
    _, found = rows_of_sequence(extents, sequences, sequences < batch)
    return found


@triton.jit(do_not_specialize=("batch", "rows", "other_rows"))
def schedule_kernel(
    table, starts, used, leftpad, other_starts, other_used, other_leftpad, batch, rows, other_rows, TILE: tl.constexpr,
):  # fmt: skip
    """List the tiles of all sequences; those that meet the most of the other rows come first.

    In the forward these are queries and keys, in the backward keys and queries.
    """
    of_tiles = Extents(starts, used, leftpad, rows)
    of_others = Extents(other_starts, other_used, other_leftpad, other_rows)
    mine = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    tiles, work = tl.cdiv(lengths(of_tiles, mine, batch), TILE), lengths(of_others, mine, batch)
    # The tiles of the groups before.
    group, total = tl.program_id(0) * BLOCK // GROUP * GROUP, 0
    for first in range(0, group, GROUP):
        total += tl.sum(tl.cdiv(lengths(of_tiles, first + tl.arange(0, GROUP), batch), TILE))
    # The tiles of those sequences of the group that come earlier.
    place = tl.zeros((BLOCK,), tl.int32) + total
    for first in range(group, tl.minimum(group + GROUP, batch), 32):
        their = first + tl.arange(0, 32)
        their_tiles, their_work = tl.cdiv(lengths(of_tiles, their, batch), TILE), lengths(of_others, their, batch)
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
