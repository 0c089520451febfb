"""What the backward kernels for Hopper share: the rings between producer and consumers, and the steps of consumers."""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma, warpgroup_mma

from attn_n.backends.triton.hopper.gluon_compat import reinterpret
from attn_n.backends.triton.hopper.mailbox import mailbox_read, new_mailbox
from attn_n.backends.triton.hopper.ptx import add_accumulator, cast_operand
from attn_n.backends.triton.hopper.rings import Ring, barriers
from attn_n.backends.triton.hopper.tma import Descriptor, Rows, tile_descriptor, tma_store
from attn_n.backends.triton.portable.tile import LOG2E, tanh


class KvBuffers(NamedTuple):
    """These hold tiles of keys and values, in parts of 64."""

    k: gl.shared_memory_descriptor  # [PARTS, 64, E], of all tiles
    v: gl.shared_memory_descriptor  # [PARTS, 64, EV]


class QueryBuffers(NamedTuple):
    """These hold tiles of queries, and what belongs to them."""

    q: gl.shared_memory_descriptor  # [STAGES, TILE_Q, E]
    dout: gl.shared_memory_descriptor  # [STAGES, TILE_Q, EV]
    lse: gl.shared_memory_descriptor  # [STAGES, 1, TILE_Q] float32, in base 2
    delta: gl.shared_memory_descriptor  # [STAGES, 1, TILE_Q] float32, -delta


class Rings(NamedTuple):
    """The roles share these, beside what only consumers use."""

    kv: Ring
    queries: Ring
    mailbox: gl.shared_memory_descriptor  # of this tile of keys and of the last ones; kv.full publishes it


class KeyGradients(NamedTuple):
    """These are TMA descriptors, or where several programs share a KV head the pointers of float32 sums."""

    dk: Descriptor
    dv: Descriptor


# What the producer tells the consumers of a tile of keys; it spares them registers.
FIELDS = gl.constexpr(
    (
        "steps",  # tiles of queries that see it; -1: there are no more tiles of keys
        "begin",  # the first query of the first one
        "full_begin",  # those from here
        "full_end",  # to there need no mask
        "sum_row",  # the row in dq_sum of its first head's first query
        "first_key",  # counted from the end of a sequence that has a length of its own
        "diagonal",  # the query at the position of the first key
        "batch",  # of varlen sequences the row behind the last one
        "head",
        # Where several teams share the sums for dK and dV, the row of the first key there; else of a padded batch the
        # row behind the last key.
        "key_row",
    )
)


@gluon.constexpr_function
def in_order(columns):
    """Return the layout of dQ `[64, columns]`: as an accumulator of 64 x 64 lies in registers, and then the next one.

    Thus `postprocess_kernel` reads it: four numbers of a thread, then those of the next.
    """
    bases = [[0, 1], [8, 0], [0, 2], [0, 4], [1, 0], [2, 0], [4, 0], [16, 0], [32, 0], [0, 8], [0, 16], [0, 32]]
    return gl.SharedLinearLayout(bases + ([[0, 64]] if columns == 128 else []))


@gluon.jit
def allocate_tiles(dtype: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr, SPEC: gl.constexpr):
    E: gl.constexpr = SPEC.widths.padded
    EV: gl.constexpr = SPEC.widths.tile_v
    TILE_Q: gl.constexpr = SPEC.tile_q
    TILED: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    ROW: gl.constexpr = gl.NVMMASharedLayout(0, 32)
    kv = KvBuffers(
        gl.allocate_shared_memory(dtype, [PARTS, 64, E], TILED),
        gl.allocate_shared_memory(dtype, [PARTS, 64, EV], TILED),
    )
    queries = QueryBuffers(
        gl.allocate_shared_memory(dtype, [STAGES, TILE_Q, E], TILED),
        gl.allocate_shared_memory(dtype, [STAGES, TILE_Q, EV], TILED),
        gl.allocate_shared_memory(gl.float32, [STAGES, 1, TILE_Q], ROW),
        gl.allocate_shared_memory(gl.float32, [STAGES, 1, TILE_Q], ROW),
    )
    return kv, queries


@gluon.jit
def allocate_rings(dtype: gl.constexpr, PARTS: gl.constexpr, SPEC: gl.constexpr):
    """Allocate the rings of two consumers: of one tile of keys, and of two tiles of queries."""
    kv, queries = allocate_tiles(dtype, PARTS, 2, SPEC)
    mailbox = new_mailbox(FIELDS)
    # The producer arrives at `full` with the bytes that it expects; at kv.full once more, to publish the mailbox.
    kv_ring = Ring(kv, barriers(1, 2), barriers(1, 2))
    return Rings(kv_ring, Ring(queries, barriers(2, 1), barriers(2, 2)), mailbox)


@gluon.jit
def begin_matmul(of_keys, of_queries, TILE_Q: gl.constexpr, S: gl.constexpr):
    """Begin `of_keys @ of_queries^T`, `[64, TILE_Q]`."""
    zeros = gl.zeros([64, TILE_Q], gl.float32, S)
    return warpgroup_mma(of_keys, of_queries.permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def row_vector(buffer, LAYOUT: gl.constexpr):
    """Load numbers from shared memory as `[1, length]`."""
    flat = reinterpret(buffer, buffer.dtype, [buffer.shape[1]], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    return gl.expand_dims(flat.load(gl.SliceLayout(0, LAYOUT)), 0)


@gluon.jit
def visible(
    rings, slot, row, len_k, left, right, PART: gl.constexpr, TILE_Q: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Return which keys of a part the queries from `row` on see, `[64, TILE_Q]`.

    Both are counted from the first key of the tile.
    """
    keys = gl.expand_dims(64 * PART + gl.arange(0, 64, gl.SliceLayout(1, LAYOUT)), 1)
    # Of the bits of a column 1 and 2 are those of a thread's lane. The others are constants to it, which a comparison
    # takes as they are.
    columns = gl.expand_dims(gl.arange(0, TILE_Q, gl.SliceLayout(0, LAYOUT)), 0)
    of_lane, constant = columns & 6, columns & ~6
    first_row = row - mailbox_read(rings.mailbox, slot, FIELDS, "diagonal")
    behind = keys - (first_row + of_lane)  # how far behind the query at `constant` 0
    seen = keys < len_k - mailbox_read(rings.mailbox, slot, FIELDS, "first_key")
    if right is not None:
        seen = seen & (behind - right <= constant)
    if left is not None:
        seen = seen & (behind + left >= constant)
    return seen


@gluon.jit
def weights(
    s, lse, edge, rings, slot, row, len_k, left, right, scale, softcap, dtype: gl.constexpr,
    PART: gl.constexpr, TILE_Q: gl.constexpr, S: gl.constexpr, OPERAND: gl.constexpr,
):  # fmt: skip
    """Return P^T = exp2(S^T - lse) `[64, TILE_Q]` as an operand, and P^T times the derivative of softcap.

    At an edge P is masked, or with softcap, whose derivative needs S again, S is: either way few registers stay alive.
    """
    factor = (scale if softcap is None else softcap) * LOG2E
    if softcap is not None:
        s = tanh(s * (scale / softcap))
        if edge:
            s = gl.where(visible(rings, slot, row, len_k, left, right, PART, TILE_Q, S), s, float("-inf"))
    p = gl.exp2(s * factor - lse)
    if softcap is None and edge:
        p = gl.where(visible(rings, slot, row, len_k, left, right, PART, TILE_Q, S), p, 0.0)
    p_operand = cast_operand(p, OPERAND, dtype)
    if softcap is not None:
        p *= gl.maximum(1 - s * s, 0.0)  # not -inf where s is
    return p_operand, p


@gluon.jit
def gradients_of_keys(dk, dv, strides_dk, strides_dv, sizes, SPEC: gl.constexpr):
    """Return where consumers with 64 keys each write dK and dV."""
    if SPEC.teams > 1:
        return KeyGradients(dk, dv)
    else:
        batch = sizes.batches if sizes.sequences.table is None else None
        heads_kv = sizes.heads // SPEC.team_heads
        E: gl.constexpr = SPEC.widths.tile
        return KeyGradients(
            tile_descriptor(dk, batch, heads_kv, sizes.len_k, strides_dk, 64, SPEC.widths.head_dim, E),
            tile_descriptor(dv, batch, heads_kv, sizes.len_k, strides_dv, 64, SPEC.widths.head_dim_v, E),
        )


@gluon.jit
def write_gradients(
    dk_acc, dv_acc, into, buffer, rings, slot, scale, sequences,
    PART: gl.constexpr, DKV: gl.constexpr, SPEC: gl.constexpr,
):  # fmt: skip
    """Store dK and dV of a part of 64 keys, or add them where several programs share a KV head."""
    if SPEC.teams > 1:
        key_row = mailbox_read(rings.mailbox, slot, FIELDS, "key_row")
        of_sums = (key_row + 64 * PART).to(gl.int64) * SPEC.widths.tile
        add_accumulator(into.dv + of_sums, dv_acc, DKV)
        add_accumulator(into.dk + of_sums, dk_acc, DKV)
    else:
        store_tile(dv_acc, buffer, rings, slot, into.dv, sequences, 64 * PART, 0)
        store_tile(dk_acc * scale, buffer, rings, slot, into.dk, sequences, 64 * PART, 0)


@gluon.jit
def store_tile(tile, buffer, rings, slot, descriptor, sequences, key, column):
    """Store 64 rows of dK or dV by TMA, from that key and column of the tile on."""
    WIDTH: gl.constexpr = tile.shape[1]
    # A view has the size of the buffer: as many such tiles as fill it, of which the first is used.
    COUNT: gl.constexpr = buffer.numel * buffer.dtype.primitive_bitwidth // (64 * WIDTH * 16)
    dtype: gl.constexpr = descriptor.tiles.dtype
    staged = reinterpret(buffer, dtype, [COUNT, 64, WIDTH], gl.NVMMASharedLayout(128, 16)).index(0)
    tma.store_wait(0)
    staged.store(tile.to(dtype))
    fence_async_shared()
    batch = mailbox_read(rings.mailbox, slot, FIELDS, "batch")
    if sequences.table is None:
        rows = Rows(batch, 0, 0)
    elif sequences.keys.starts is not None:
        rows = Rows(0, batch, 0)
    else:
        rows = Rows(batch, mailbox_read(rings.mailbox, slot, FIELDS, "key_row"), 0)
    head = mailbox_read(rings.mailbox, slot, FIELDS, "head")
    first_key = mailbox_read(rings.mailbox, slot, FIELDS, "first_key")
    tma_store(descriptor, rows, head, first_key + key, column, staged)
