"""What the backward kernels for Hopper share: their producer, and what their consumers read and write alike."""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from attn_n.backends.triton.hopper.backward_passes import counter_of
from attn_n.backends.triton.hopper.pipeline import Packed, Rows, bring, put, tell, tiles_of, told
from attn_n.backends.triton.hopper.schedule import rows_of_sequence, sequence_of, tile_and_head
from attn_n.backends.triton.portable.tile import queries_that_see

RUN_TIME = (
    "strides_q", "strides_k", "strides_v", "strides_dout", "strides_dk", "strides_dv", "batches", "heads", "len_q",
    "len_k", "sum_rows", "left", "right", "together",
)  # fmt: skip


class Sizes(NamedTuple):
    """A team are `GROUPS` query heads, which go through a tile of keys one behind the other.

    `SHARES` teams have the same key head. If it has one, dK and dV are written, else the teams add to sums for them.
    """

    batches: gl.tensor
    heads: gl.tensor
    len_q: gl.tensor
    len_k: gl.tensor
    sum_rows: gl.tensor  # of a key head in the sums for dK and dV
    left: gl.tensor
    right: gl.tensor
    together: gl.tensor  # teams whose tiles are taken one length behind the other; None for packed sequences
    packed: Packed  # its sequences are one of a batch, with whole tiles of queries for each, and len_k is 0


# What the producer says of a tile of keys, and where among its numbers: it spares the consumers registers.
FIELDS = gl.constexpr(10)
STEPS = gl.constexpr(0)  # tiles of queries that see it; -1: there are no more tiles of keys
BEGIN = gl.constexpr(1)  # the first row of the first one
FULL_BEGIN = gl.constexpr(2)  # those from here
FULL_END = gl.constexpr(3)  # to there need no mask
SUM_ROW = gl.constexpr(4)  # the row in dq_sum of its first head's first query
FIRST_KEY = gl.constexpr(5)  # of packed sequences counted from their end
DIAGONAL = gl.constexpr(6)  # the query at the position of the first key
BATCH = gl.constexpr(7)  # or the end of a packed sequence
HEAD = gl.constexpr(8)
KEY_ROW = gl.constexpr(9)  # the row of the first key in the sums for dK and dV


@gluon.jit
def produce(
    b, sizes, q, k, v, dout, stats, strides_q, strides_k, strides_v, strides_dout,
    GROUPS: gl.constexpr, SHARES: gl.constexpr, E: gl.constexpr, TILE_Q: gl.constexpr,
):  # fmt: skip
    """Runs ahead of the two consumers; `b.k` and `b.v` are as many parts of 64 keys as a tile has."""
    batches, heads, len_q, len_k, sum_rows, left, right, together, packed = sizes
    teams, heads_kv = heads // GROUPS, heads // (GROUPS * SHARES)
    PARTS: gl.constexpr = b.k.shape[0]
    TILE_K: gl.constexpr = 64 * PARTS
    tiles, rows = gl.cdiv(len_k, TILE_K), gl.cdiv(len_q, TILE_Q) * TILE_Q
    items = batches * teams * tiles if packed.table is None else gl.load(packed.table + 1) * teams
    dim = batches if packed.table is None else None
    of_q = tiles_of(q, dim, heads, len_q, strides_q, TILE_Q, E)
    of_k = tiles_of(k, dim, heads_kv, len_k, strides_k, 64, E)
    of_v = tiles_of(v, dim, heads_kv, len_k, strides_v, 64, E)
    of_dout = tiles_of(dout, dim, heads, len_q, strides_dout, TILE_Q, E)
    of_stats = tma.make_tensor_descriptor(
        stats, [2 * batches * heads, rows], [rows.to(gl.int64), 1], [1, TILE_Q], gl.NVMMASharedLayout(0, 32)
    )
    counter = counter_of(stats, batches.to(gl.int64) * heads * rows)

    turn, slot = 0, 0  # how many tiles of queries so far, modulo 4, and how many of keys, modulo 2
    item = gl.program_id(0)
    while item < items:
        if packed.table is None:
            # Under a causal mask the first keys are seen by the most queries.
            tile, place = tile_and_head(item, tiles, batches * teams, together)
            first_key, team, batch = tile * TILE_K, place % teams, place // teams
            queries, keys, first_row, key_row = len_q, len_k, 0, first_key
            rows_q = Rows(batch, None, None)
            rows_k = rows_q
        else:
            # Heads whose queries, dout and sums for dQ together take 32 MB.
            IN_CACHE: gl.constexpr = (1 << 22) // (E * GROUPS)
            sequence, inside = sequence_of(packed.table, item, teams)
            start_q, queries = rows_of_sequence(packed.starts_q, sequence)
            start_k, keys = rows_of_sequence(packed.starts_k, sequence)
            tile, team = tile_and_head(inside, gl.cdiv(keys, TILE_K), teams, IN_CACHE // gl.maximum(queries, 1))
            first_key, first_row, batch = tile * TILE_K, (start_q // TILE_Q + sequence) * TILE_Q, 0
            key_row = (start_k // TILE_K + sequence + tile) * TILE_K
            rows_q, rows_k = Rows(None, start_q + queries, queries), Rows(None, start_k + keys, keys)
        first_head, head_kv = team * GROUPS, team // SHARES
        place = batch * heads + first_head
        begin, full_begin, full_end, end = queries_that_see(first_key, queries, keys, left, right, TILE_Q, TILE_K)
        if first_key + TILE_K > keys:
            full_end = full_begin
        steps = gl.cdiv(gl.maximum(end - begin, 0), TILE_Q)
        mbarrier.wait(b.kv_empty.index(0), slot ^ 1)
        tell(b.tile, slot * FIELDS + STEPS, steps)
        tell(b.tile, slot * FIELDS + BEGIN, begin)
        tell(b.tile, slot * FIELDS + FULL_BEGIN, full_begin)
        tell(b.tile, slot * FIELDS + FULL_END, full_end)
        tell(b.tile, slot * FIELDS + SUM_ROW, place * rows + first_row)
        tell(b.tile, slot * FIELDS + FIRST_KEY, first_key if packed.table is None else first_key - keys)
        tell(b.tile, slot * FIELDS + DIAGONAL, first_key - (keys - queries))
        tell(b.tile, slot * FIELDS + BATCH, batch if packed.table is None else rows_k.end)
        tell(b.tile, slot * FIELDS + HEAD, head_kv)
        if SHARES > 1:
            tell(b.tile, slot * FIELDS + KEY_ROW, (batch * heads_kv + head_kv) * sum_rows + key_row)
        kv_full = b.kv_full.index(0)
        mbarrier.arrive(kv_full, count=1)
        mbarrier.expect(kv_full, PARTS * (of_k.block_type.nbytes + of_v.block_type.nbytes))
        for c in gl.static_range(PARTS):
            bring(of_k, rows_k, head_kv, first_key + 64 * c, kv_full, b.k.index(c))
            bring(of_v, rows_k, head_kv, first_key + 64 * c, kv_full, b.v.index(c))
        slot ^= 1
        for group in range(GROUPS):
            for step in range(steps):
                row, stage = begin + step * TILE_Q, turn & 1
                head, of_lse = first_head + group, place + group
                mbarrier.wait(b.empty.index(stage), (turn >> 1) ^ 1)
                full = b.full.index(stage)
                mbarrier.expect(full, 2 * (of_q.block_type.nbytes + of_stats.block_type.nbytes))
                bring(of_q, rows_q, head, row, full, b.q.index(stage))
                tma.async_copy_global_to_shared(of_stats, [of_lse, first_row + row], full, b.lse.index(stage))
                bring(of_dout, rows_q, head, row, full, b.dout.index(stage))
                at = [batches * heads + of_lse, first_row + row]
                tma.async_copy_global_to_shared(of_stats, at, full, b.delta.index(stage))
                turn = (turn + 1) & 3
        # Now, while the consumers have the last tiles of queries before them: they do not notice how long it takes.
        item = gl.num_programs(0) + gl.atomic_add(counter, 1, sem="relaxed")
    mbarrier.wait(b.kv_empty.index(0), slot ^ 1)
    tell(b.tile, slot * FIELDS + STEPS, -1)
    mbarrier.arrive(b.kv_full.index(0), count=2)


@gluon.jit
def row_vector(buffer, layout: gl.constexpr):
    """Numbers in shared memory as `(1, length)` in registers."""
    flat = buffer._reinterpret(buffer.dtype, [buffer.shape[1]], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    return gl.expand_dims(flat.load(gl.SliceLayout(0, layout)), 0)


@gluon.jit
def here(x):
    """x, computed at this place: the compiler would put it between two products, and wait for the first one there."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], gl.float32, False, 1)


@gluon.jit
def visible(b, slot, row, len_k, left, right, ME: gl.constexpr, TILE_Q: gl.constexpr, layout: gl.constexpr):
    """Counted from the first key of the tile."""
    keys = gl.expand_dims(64 * ME + gl.arange(0, 64, gl.SliceLayout(1, layout)), 1)
    first_row = row - told(b.tile, slot * FIELDS + DIAGONAL)
    rows = gl.expand_dims(first_row + gl.arange(0, TILE_Q, gl.SliceLayout(0, layout)), 0)
    seen = keys < len_k - told(b.tile, slot * FIELDS + FIRST_KEY)
    if right is not None:
        seen = seen & (keys <= rows + right)
    if left is not None:
        seen = seen & (keys >= rows - left)
    return seen


@gluon.jit
def meet():
    """A barrier of both consumers. One of memory takes longer, and Gluon 3.6 has no other."""
    gl.inline_asm_elementwise("mov.b32 $0, $1; bar.sync 8, 256;", "=r,r", [0], gl.int32, False, 1)


@gluon.jit
def add_from_registers(x, tile, LAYOUT: gl.constexpr):
    """To a sum in global memory, by tiles of 64 x 64 in the order in which `passes.round_kernel` reads them.

    That is the order of the registers: four numbers of a thread, of all threads, then the next four.
    """
    rows = gl.expand_dims(gl.arange(0, tile.shape[0], gl.SliceLayout(1, LAYOUT)), 1)
    columns = gl.expand_dims(gl.arange(0, tile.shape[1], gl.SliceLayout(0, LAYOUT)), 0)
    thread = rows // 16 * 32 + rows % 8 * 4 + columns % 8 // 2
    gl.inline_asm_elementwise(
        "mov.b32 $0, 0; red.relaxed.gpu.global.add.v4.f32 [$1], {$5, $6, $7, $8};", "=r,l,l,l,l,r,r,r,r",
        [x.to(gl.int64) + 16 * thread.to(gl.int64) + columns.to(gl.int64) // 8 * 2048, tile], gl.int8, False, 4,
    )  # fmt: skip


@gluon.jit
def write(tile, buffer, b, slot, descriptor, packed, key, column):
    """64 rows of dK or dV, from that key and column of the tile, through shared memory."""
    staged = buffer._reinterpret(descriptor.dtype, [64, tile.shape[1]], gl.NVMMASharedLayout(128, 16))
    tma.store_wait(0)
    staged.store(tile.to(descriptor.dtype))
    fence_async_shared()
    batch = told(b.tile, slot * FIELDS + BATCH)
    rows = Rows(batch, None, None) if packed.table is None else Rows(None, batch, 0)
    head, first_key = told(b.tile, slot * FIELDS + HEAD), told(b.tile, slot * FIELDS + FIRST_KEY)
    put(descriptor, rows, head, first_key + key, column, staged)
