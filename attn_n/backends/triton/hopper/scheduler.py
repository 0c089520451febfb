"""Which tile a program of the Hopper kernels takes next: the producer asks, and tells the consumers by the mailbox.

Programs are persistent. A work item is a tile of one head, or where the forward is causal and takes no tiles by a
counter, a pair of tiles.
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from attn_n.backends.triton.hopper.schedule import Extents, rows_of_sequence, sequence_of, tile_and_head
from attn_n.backends.triton.hopper.tma import Rows


class Sequences(NamedTuple):
    """These are the sequences of varlen tensors, or of a padded batch, and `schedule_kernel`'s table of their tiles.

    The table of a batch without padding is None, or one number where the forward takes its tiles by a counter.
    """

    queries: Extents
    keys: Extents
    table: gl.tensor


class Sizes(NamedTuple):
    """These are the numbers of a forward; those of one sequence are only heads, lengths and window."""

    items: gl.tensor
    heads: gl.tensor
    len_q: gl.tensor
    len_k: gl.tensor
    left: gl.tensor  # None for no bound on that side
    right: gl.tensor
    swizzle: gl.tensor  # how many heads take turns, tile by tile


class QueryTiles(NamedTuple):
    """A work item of the forward is one or two tiles of queries of a head."""

    count: gl.tensor
    first: gl.tensor  # the first query of the first tile
    second: gl.tensor  # the first query of the second tile
    head: gl.tensor  # batch * heads + head; of varlen sequences the head
    len_q: gl.tensor  # of the sequence
    len_k: gl.tensor
    end_q: gl.tensor  # the row behind its last one; 0 of a batch without padding
    end_k: gl.tensor


@gluon.jit
def query_tiles(item, tiles, sizes, sequences, TILE_Q: gl.constexpr, SPEC: gl.constexpr):
    """Return the work item of that number; `tiles` are those of a head, unless the table lists them.

    Under a causal mask the last queries see the most keys. Where tiles are taken by a counter, heavy ones come first;
    else a heavy and a light one make a pair.
    """
    count, len_q, len_k, end_q, end_k = 1, sizes.len_q, sizes.len_k, 0, 0
    if sequences.queries.starts is not None or SPEC.padded:
        # Heads whose keys and values together take 32 MB.
        IN_L2: gl.constexpr = (1 << 23) // SPEC.widths.tile
        sequence, inside = sequence_of(sequences.table, item, sizes.heads)
        start_q, len_q = rows_of_sequence(sequences.queries, sequence)
        start_k, len_k = rows_of_sequence(sequences.keys, sequence)
        tiles = gl.cdiv(len_q, TILE_Q)
        tile, head = tile_and_head(inside, tiles, sizes.heads, IN_L2 // gl.maximum(len_k, 1) * SPEC.group_size)
        first = (tiles - 1 - tile) * TILE_Q
        end_q, end_k = start_q + len_q, start_k + len_k
        if SPEC.padded:
            head += sequence * sizes.heads
    elif sequences.table is not None:
        tile, head = tile_and_head(item, tiles, sizes.items // tiles, sizes.swizzle)
        first = (tiles - 1 - tile) * TILE_Q
    elif sizes.left is None and sizes.right is not None:
        pairs = gl.cdiv(tiles, 2)
        head, tile = item // pairs, item % pairs
        first = (tiles - 1 - tile) * TILE_Q
        count = gl.where(tile == tiles - 1 - tile, 1, 2)  # the tile in the middle is alone
    else:
        head, tile = item // tiles, item % tiles
        first = tile * TILE_Q
    return QueryTiles(count, first, tile * TILE_Q, head, len_q, len_k, end_q, end_k)


@gluon.jit
def next_item(item, counter):
    """Return the next work item of this program: in turn, or by a counter the next one that nobody has taken."""
    if counter is None:
        following = item + gl.num_programs(0)
    else:
        following = gl.num_programs(0) + gl.atomic_add(counter, 1, sem="relaxed")
    return following


class KvWork(NamedTuple):
    """A work item of the backward is a tile of keys, for a team of query heads."""

    first_key: gl.tensor
    team: gl.tensor
    batch: gl.tensor  # 0 of varlen sequences
    rows_q: Rows  # of the sequence, as is `rows_k`
    rows_k: Rows
    first_row: gl.tensor  # of the sequence, among the rows of a head in stats and dq_sum
    key_row: gl.tensor  # of the tile, among the rows of a KV head in the sums for dK and dV


@gluon.jit
def kv_tile(item, tiles, teams, sizes, TILE_K: gl.constexpr, SPEC: gl.constexpr):
    """Return the work item of that number; `tiles` are those of a KV head, unless the table lists them.

    Under a causal mask the first keys are seen by the most queries, and come first.
    """
    sequences = sizes.sequences
    if sequences.table is None:
        tile, batch_team = tile_and_head(item, tiles, sizes.batches * teams, sizes.swizzle)
        first_key, team, batch = tile * TILE_K, batch_team % teams, batch_team // teams
        first_row, key_row = 0, first_key
        rows_q, rows_k = Rows(batch, 0, sizes.len_q), Rows(batch, 0, sizes.len_k)
    else:
        # Teams whose queries, dout and sums for dQ together take 32 MB.
        IN_L2: gl.constexpr = (1 << 22) // (SPEC.widths.tile * SPEC.team_heads)
        sequence, inside = sequence_of(sequences.table, item, teams)
        start_q, len_q = rows_of_sequence(sequences.queries, sequence)
        start_k, len_k = rows_of_sequence(sequences.keys, sequence)
        tile, team = tile_and_head(inside, gl.cdiv(len_k, TILE_K), teams, IN_L2 // gl.maximum(len_q, 1))
        first_key = tile * TILE_K
        if SPEC.padded:
            batch, first_row, key_row = sequence, 0, first_key
        else:
            batch, first_row = 0, (start_q // SPEC.pass_q + sequence) * SPEC.pass_q
            key_row = (start_k // TILE_K + sequence + tile) * TILE_K
        rows_q, rows_k = Rows(batch, start_q + len_q, len_q), Rows(batch, start_k + len_k, len_k)
    return KvWork(first_key, team, batch, rows_q, rows_k, first_row, key_row)
