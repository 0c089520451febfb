"""The producer of the backward kernels for Hopper: one warp, which runs ahead of the two consumers."""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from attn_n.backends.triton.hopper.backward_passes import counter_of
from attn_n.backends.triton.hopper.backward_rings import FIELDS
from attn_n.backends.triton.hopper.gluon_compat import async_load, tile_bytes
from attn_n.backends.triton.hopper.mailbox import mailbox_write
from attn_n.backends.triton.hopper.scheduler import Sequences, kv_tile, next_item
from attn_n.backends.triton.hopper.tma import Descriptor, Rows, tile_descriptor, tma_load
from attn_n.backends.triton.hopper.unused import store_zeros, tile_of_zeros
from attn_n.backends.triton.portable.tile import queries_that_see

RUN_TIME = (
    "strides_q", "strides_k", "strides_v", "strides_dout", "strides_dk", "strides_dv", "strides_dq", "batches",
    "heads", "len_q", "len_k", "sum_rows", "left", "right", "swizzle",
)  # fmt: skip


class Sizes(NamedTuple):
    """These are the numbers of a backward.

    Varlen sequences are one of a batch, with whole tiles of queries for each. Where the table lists the tiles len_k is
    0: consumers count keys from the end of their sequence.

    A team is `SPEC.team_heads` query heads that one program processes in sequence for a tile of keys. A KV head has
    `SPEC.teams` of them: if it has one, that writes dK and dV, else the teams add to sums for them.
    """

    batches: gl.tensor
    heads: gl.tensor
    len_q: gl.tensor
    len_k: gl.tensor
    sum_rows: gl.tensor  # of a KV head in the sums for dK and dV
    left: gl.tensor  # None for no bound on that side
    right: gl.tensor
    swizzle: gl.tensor  # how many teams take turns, tile by tile; None where the table lists the tiles
    sequences: Sequences


class Loads(NamedTuple):
    """The descriptors of what a backward loads."""

    q: Descriptor
    k: Descriptor
    v: Descriptor
    dout: Descriptor
    stats: tma.tensor_descriptor


class KeyTile(NamedTuple):
    """A tile of keys that the producer has loaded, and the queries that see it, which it loads next."""

    rows_q: Rows  # of the sequence
    first_head: gl.tensor
    batch_head: gl.tensor  # batch * heads + first_head
    first_row: gl.tensor  # of the sequence, among the rows of a head in stats
    begin: gl.tensor  # the first query of the first tile
    steps: gl.tensor  # tiles of queries of each head


@gluon.jit
def rows_of_head(sizes, SPEC: gl.constexpr):
    """Return the rows of a head in stats and in dq_sum, which the passes around pad."""
    return gl.cdiv(sizes.len_q, SPEC.pass_q) * SPEC.pass_q


@gluon.jit
def make_loads(sizes, q, k, v, dout, stats, strides_q, strides_k, strides_v, strides_dout, SPEC: gl.constexpr):
    TILE_Q: gl.constexpr = SPEC.tile_q
    E: gl.constexpr = SPEC.widths.head_dim
    EV: gl.constexpr = SPEC.widths.head_dim_v
    PADDED: gl.constexpr = SPEC.widths.padded
    TILE_V: gl.constexpr = SPEC.widths.tile_v
    heads, heads_kv = sizes.heads, sizes.heads // (SPEC.team_heads * SPEC.teams)
    batch_dim = sizes.batches if sizes.sequences.table is None else None
    rows = rows_of_head(sizes, SPEC)
    q_desc = tile_descriptor(q, batch_dim, heads, sizes.len_q, strides_q, TILE_Q, E, PADDED)
    k_desc = tile_descriptor(k, batch_dim, heads_kv, sizes.len_k, strides_k, 64, E, PADDED)
    v_desc = tile_descriptor(v, batch_dim, heads_kv, sizes.len_k, strides_v, 64, EV, TILE_V)
    dout_desc = tile_descriptor(dout, batch_dim, heads, sizes.len_q, strides_dout, TILE_Q, EV, TILE_V)
    stats_desc = tma.make_tensor_descriptor(
        stats, [2 * sizes.batches * heads, rows], [rows.to(gl.int64), 1], [1, TILE_Q], gl.NVMMASharedLayout(0, 32)
    )
    # Whatever other roles do begins with what the producer loads.
    gdc_wait()
    gdc_launch_dependents()
    return Loads(q_desc, k_desc, v_desc, dout_desc, stats_desc)


@gluon.jit
def load_keys(rings, item, tiles, stage, phase, slot, sizes, loads, SPEC: gl.constexpr):
    """Tell the consumers their next tile of keys and load it, when the buffer `stage` is empty."""
    _batches, heads, _len_q, _len_k, sum_rows, left, right, _swizzle, sequences = sizes
    TEAM_HEADS: gl.constexpr = SPEC.team_heads
    TILE_Q: gl.constexpr = SPEC.tile_q
    kv = rings.kv.buffers
    PARTS: gl.constexpr = kv.k.shape[0] // rings.kv.full.shape[0]
    TILE_K: gl.constexpr = 64 * PARTS
    teams, heads_kv = heads // TEAM_HEADS, heads // (TEAM_HEADS * SPEC.teams)
    rows = rows_of_head(sizes, SPEC)
    work = kv_tile(item, tiles, teams, sizes, TILE_K, SPEC)
    first_key, batch = work.first_key, work.batch
    rows_q, rows_k = work.rows_q, work.rows_k
    len_q, len_k = rows_q.length, rows_k.length
    first_head, head_kv = work.team * TEAM_HEADS, work.team // SPEC.teams
    batch_head = batch * heads + first_head
    begin, full_begin, full_end, end = queries_that_see(first_key, len_q, len_k, left, right, TILE_Q, TILE_K)
    if first_key + TILE_K > len_k:
        full_end = full_begin
    steps = gl.cdiv(gl.maximum(end - begin, 0), TILE_Q)
    mbarrier.wait(rings.kv.empty.index(stage), phase ^ 1)
    mailbox_write(rings.mailbox, slot, FIELDS, "steps", steps)
    mailbox_write(rings.mailbox, slot, FIELDS, "begin", begin)
    mailbox_write(rings.mailbox, slot, FIELDS, "full_begin", full_begin)
    mailbox_write(rings.mailbox, slot, FIELDS, "full_end", full_end)
    mailbox_write(rings.mailbox, slot, FIELDS, "sum_row", batch_head * rows + work.first_row)
    counted = first_key if sequences.table is None else first_key - len_k
    mailbox_write(rings.mailbox, slot, FIELDS, "first_key", counted)
    mailbox_write(rings.mailbox, slot, FIELDS, "diagonal", first_key - (len_k - len_q))
    mailbox_write(rings.mailbox, slot, FIELDS, "batch", work.rows_k.end if sequences.keys.starts is not None else batch)
    mailbox_write(rings.mailbox, slot, FIELDS, "head", head_kv)
    if SPEC.teams > 1:
        key_row = (batch * heads_kv + head_kv) * sum_rows + work.key_row
        mailbox_write(rings.mailbox, slot, FIELDS, "key_row", key_row)
    elif SPEC.padded:
        mailbox_write(rings.mailbox, slot, FIELDS, "key_row", rows_k.end)
    kv_full = rings.kv.full.index(stage)
    mbarrier.arrive(kv_full, count=1)
    mbarrier.expect(kv_full, PARTS * (tile_bytes(loads.k.tiles) + tile_bytes(loads.v.tiles)))
    for c in gl.static_range(PARTS):
        tma_load(loads.k, rows_k, head_kv, first_key + 64 * c, 0, kv_full, kv.k.index(stage * PARTS + c))
        tma_load(loads.v, rows_k, head_kv, first_key + 64 * c, 0, kv_full, kv.v.index(stage * PARTS + c))
    return KeyTile(rows_q, first_head, batch_head, work.first_row, begin, steps)


@gluon.jit
def load_queries(rings, tile, head, step, stage, sizes, loads, SPEC: gl.constexpr):
    """Load a tile of queries of the team's head of that number, into a buffer that is empty."""
    queries, row = rings.queries.buffers, tile.begin + step * SPEC.tile_q
    stats_row = tile.batch_head + head
    full = rings.queries.full.index(stage)
    mbarrier.expect(full, tile_bytes(loads.q.tiles) + tile_bytes(loads.dout.tiles) + 2 * tile_bytes(loads.stats))
    tma_load(loads.q, tile.rows_q, tile.first_head + head, row, 0, full, queries.q.index(stage))
    async_load(loads.stats, [stats_row, tile.first_row + row], full, queries.lse.index(stage))
    tma_load(loads.dout, tile.rows_q, tile.first_head + head, row, 0, full, queries.dout.index(stage))
    of_delta = [sizes.batches * sizes.heads + stats_row, tile.first_row + row]
    async_load(loads.stats, of_delta, full, queries.delta.index(stage))


@gluon.jit
def items_of(sizes, PARTS: gl.constexpr, SPEC: gl.constexpr):
    """Return how many tiles of keys a KV head has, unless the table lists them, and how many all teams have."""
    teams, tiles, table = sizes.heads // SPEC.team_heads, gl.cdiv(sizes.len_k, 64 * PARTS), sizes.sequences.table
    items = sizes.batches * teams * tiles if table is None else gl.load(table + 1) * teams
    return tiles, items


@gluon.jit
def sum_shares(shares, dn, sizes, SPEC: gl.constexpr):
    """Sum up the gradient of n of each head, of which `preprocess_kernel` has written the share of each tile.

    Tiles without rows have shares of 0. A warp of each program does so for some heads while its consumers compute.
    """
    if dn is not None:
        LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
        tiles = rows_of_head(sizes, SPEC) // SPEC.pass_q
        count = sizes.batches * tiles
        for head in range(gl.program_id(0), sizes.heads, gl.num_programs(0)):
            total = gl.zeros([128], gl.float32, LAYOUT)
            for first in range(0, count, 128):
                i = first + gl.arange(0, 128, LAYOUT)
                at = (i // tiles * sizes.heads + head) * tiles + i % tiles
                total += gl.load(shares + at, mask=i < count, other=0.0)
            gl.store(dn + head, gl.sum(total, 0))


@gluon.jit
def produce(
    rings, sizes, q, k, v, dout, stats, shares, dn, strides_q, strides_k, strides_v, strides_dout, SPEC: gl.constexpr,
):  # fmt: skip
    """The producer warp tells the consumers their next tile of keys, and loads it and the queries that see it."""
    loads = make_loads(sizes, q, k, v, dout, stats, strides_q, strides_k, strides_v, strides_dout, SPEC)
    tiles, items = items_of(sizes, rings.kv.buffers.k.shape[0], SPEC)
    rows = rows_of_head(sizes, SPEC)
    counter = counter_of(stats, sizes.batches.to(gl.int64) * sizes.heads * rows)

    turn, slot = 0, 0  # count the tiles of queries, modulo 4, and those of keys, modulo 2
    item = gl.program_id(0)
    while item < items:
        tile = load_keys(rings, item, tiles, 0, slot, slot, sizes, loads, SPEC)
        slot ^= 1
        for head in range(SPEC.team_heads):
            for step in range(tile.steps):
                mbarrier.wait(rings.queries.empty.index(turn & 1), (turn >> 1) ^ 1)
                load_queries(rings, tile, head, step, turn & 1, sizes, loads, SPEC)
                turn = (turn + 1) & 3
        # Asked for while the consumers have the last tiles of queries before them, so that they do not wait for it.
        item = next_item(item, counter)
    mbarrier.wait(rings.kv.empty.index(0), slot ^ 1)
    mailbox_write(rings.mailbox, slot, FIELDS, "steps", -1)
    mbarrier.arrive(rings.kv.full.index(0), count=2)
    sum_shares(shares, dn, sizes, SPEC)


@gluon.jit
def fill(dq, dk, dv, strides_dq, strides_dk, strides_dv, sizes, dtype: gl.constexpr, SPEC: gl.constexpr):
    """A warp stores zeros into the rows of dQ, dK and dV that do not exist."""
    sequences = sizes.sequences
    heads_kv = sizes.heads // (SPEC.team_heads * SPEC.teams)
    zeros = tile_of_zeros(dtype)
    store_zeros(dq, strides_dq, sizes.batches, sizes.heads, sequences.queries, zeros, SPEC.widths.head_dim)
    store_zeros(dk, strides_dk, sizes.batches, heads_kv, sequences.keys, zeros, SPEC.widths.head_dim)
    store_zeros(dv, strides_dv, sizes.batches, heads_kv, sequences.keys, zeros, SPEC.widths.head_dim_v)
