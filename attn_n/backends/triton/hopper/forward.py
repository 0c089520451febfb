"""The forward kernel for Hopper (sm_90): warp specialisation, wgmma, and tiles that TMA loads.

    producer, one warp      q --> [Q strip per consumer]    k --> [K ring]    v --> [V ring]
                                  full | empty                full | empty      full | empty
    consumers, 4 warps each  S = Q K^T, softmax, O += P V of 64 queries;  O --> [out strip] --> out

Every buffer has two barriers: `full` ends a phase when the bytes that the producer asked for have come, `empty` when
each consumer that reads it has arrived. A role counts the stage of a ring and the parity of its phase by itself. K and
V have barriers of their own, so that the next S need not wait for this V.

A consumer keeps two wgmmas in flight: S of a block begins before O of the block behind it, and the softmax of S runs
while that O is computed. O is rescaled only where a maximum has grown much (`lazy`: +4 to 8 % at E = 256; at E = 128 +2
to 3 %, if the weights are ready before O is waited for; at E = 64 so too +2 % under a causal mask, else -3 %). Blocks
of keys come from the last to the first, so that those under the diagonal come first. Two or three consumers share keys
and values; for few keys two or three programs of one consumer each fit an SM, of which one computes while another
begins or ends a tile (two: +2 to 15 % at 512 keys; three at E = 64: 7 to 11 % more under a causal mask).

Programs are persistent (+7 % at 2,048 keys), and the producer tells the consumers their next tile by a mailbox in
shared memory: the compiler knows that what is read there is the same for all threads, so that addresses stay in uniform
registers (+2 to 4 % at E = 64 over consumers that count the tiles themselves). Which one is next, `scheduler` says.
Without a causal mask all tiles take equally long and come in turn. Under one a program takes pairs of tiles, one from
each end of a sequence; or for long sequences, where waiting for it does not show, the next tile that nobody has taken,
heavy ones first (+1 to 8 % from 2,048 keys on, most where pairs do not fill the last round). The tiles of varlen
sequences, and those of a padded batch, are taken so from a table, see `schedule`.
n joins the denominator at the end, as one more key with logit log n and value zero.
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from attn_n.backends.triton.hopper.gluon_compat import reinterpret, tile_bytes
from attn_n.backends.triton.hopper.mailbox import mailbox_read, mailbox_write, new_mailbox
from attn_n.backends.triton.hopper.masks import kv_blocks_seen, masked_logits
from attn_n.backends.triton.hopper.ptx import branch_fence, cast_operand, multiply_unless_one
from attn_n.backends.triton.hopper.rings import (
    Ring,
    State,
    advance,
    barriers,
    consumer_release,
    consumer_wait,
    producer_acquire,
    wait_turn,
)
from attn_n.backends.triton.hopper.schedule import Extents, rows_of_sequence
from attn_n.backends.triton.hopper.scheduler import Sequences, Sizes, next_item, query_tiles
from attn_n.backends.triton.hopper.tma import Rows, tile_descriptor, tma_load, tma_store
from attn_n.backends.triton.hopper.unused import store_zeros, tile_of_zeros
from attn_n.backends.triton.portable.tile import LN2, LOG2E, tanh

STRIP = gl.constexpr(64)  # queries of a consumer: the rows of a wgmma
# `lazy`: what is subtracted from the logits of a row lags behind their maximum by up to this, in base 2, so that O is
# seldom rescaled. Weights are then up to 256, for which float16 and the sums have room. (As in FlashAttention 4.)
LAG = gl.constexpr(8.0)

RUN_TIME = (
    "strides_q", "strides_k", "strides_v", "strides_out", "stride_n", "batch", "heads", "len_q", "len_k", "left",
    "right", "items", "swizzle",
)  # fmt: skip


class Shared(NamedTuple):
    """The roles share this memory, and the barriers on it."""

    q: Ring  # [CONSUMERS, 64, PADDED]: each consumer has a buffer of its own
    k: Ring  # [STAGES * PANELS, TILE_K, PANEL], see `panel_of`
    v: Ring  # [STAGES, TILE_K, TILE_V]
    out: gl.shared_memory_descriptor  # [CONSUMERS, 64, TILE_V], or the buffers of q, a number of such tiles each
    mailbox: gl.shared_memory_descriptor  # of this tile of queries and of the next one
    mailbox_full: gl.shared_memory_descriptor  # a slot is free again when the q of the tile between them are


# What the producer tells the consumers of a tile of queries.
FIELDS = gl.constexpr(
    (
        "first",  # its first query, or -1: there are no more tiles
        "head",  # batch * heads + head; of varlen sequences the head
        "end_q",  # of varlen sequences: the row behind the last one
        "len_q",  # of its sequence
        "len_k",
    )
)


class Tile(NamedTuple):
    """A role is at this tile of queries, and its sequence has these rows."""

    batch_head: gl.tensor  # batch * heads + head; None of varlen sequences
    head: gl.tensor
    first: gl.tensor
    rows_q: Rows  # of q, or of out
    rows_k: Rows
    sizes: Sizes  # of the sequence


class Results(NamedTuple):
    """These say where out and lse go, and what the logits and n are."""

    out: gl.tensor
    lse: gl.tensor  # (B, H, L) or varlen (T, H), float32
    all_q: gl.tensor  # L of a padded batch; None of others
    sinks: gl.tensor  # log n of each head, or of each row as lse; None: log_n is the number for all, or None for n = 0
    stride_n: gl.tensor  # between heads; None if it is one of each row
    log_n: gl.tensor
    scale: gl.tensor
    softcap: gl.tensor


@gluon.jit
def produce(smem, q, k, v, batches, strides_q, strides_k, strides_v, sizes, sequences, SPEC: gl.constexpr):
    """The producer warp tells the consumers their next tile of queries, and loads what that needs."""
    TILE_Q: gl.constexpr = SPEC.tiles.consumers * STRIP
    TILE_K: gl.constexpr = SPEC.tiles.tile_k
    E: gl.constexpr = SPEC.widths.head_dim
    EV: gl.constexpr = SPEC.widths.head_dim_v
    VARLEN: gl.constexpr = sequences.queries.starts is not None
    heads_kv = sizes.heads // SPEC.group_size
    batch_dim = None if SPEC.padded else batches
    # Each role makes its own descriptors beside the others: one takes about half a microsecond.
    k_desc = tile_descriptor(k, batch_dim, heads_kv, sizes.len_k, strides_k, TILE_K, E, panel_of(SPEC))
    q_desc = tile_descriptor(q, batch_dim, sizes.heads, sizes.len_q, strides_q, STRIP, E, SPEC.widths.padded)
    v_desc = tile_descriptor(v, batch_dim, heads_kv, sizes.len_k, strides_v, TILE_K, EV, SPEC.widths.tile_v)
    heads, tiles = sizes.heads, gl.cdiv(sizes.len_q, TILE_Q)  # `query_tiles` counts those in a table itself
    state, turn = State(0, 1), 0  # turn counts the tiles of queries, modulo 4
    item, items = gl.program_id(0), sizes.items
    if VARLEN or SPEC.padded:
        items = gl.load(sequences.table + 1) * heads
    while item < items:
        work = query_tiles(item, tiles, sizes, sequences, TILE_Q, SPEC)
        head = work.head if VARLEN else work.head % heads
        batch = None if VARLEN else work.head // heads
        rows_q, rows_k = Rows(batch, work.end_q, work.len_q), Rows(batch, work.end_k, work.len_k)
        of_sequence = Sizes(None, heads, work.len_q, work.len_k, sizes.left, sizes.right, None)
        first = work.first
        for _ in range(work.count):
            slot = turn & 1
            mailbox_write(smem.mailbox, slot, FIELDS, "first", first)
            mailbox_write(smem.mailbox, slot, FIELDS, "len_q", work.len_q)
            mailbox_write(smem.mailbox, slot, FIELDS, "len_k", work.len_k)
            mailbox_write(smem.mailbox, slot, FIELDS, "head", work.head)
            if VARLEN:
                mailbox_write(smem.mailbox, slot, FIELDS, "end_q", work.end_q)
            mbarrier.arrive(smem.mailbox_full.index(slot), count=1)
            tile = Tile(None, head, first, rows_q, rows_k, of_sequence)
            state = load_tile(smem, q_desc, k_desc, v_desc, tile, state, slot ^ 1, SPEC)
            turn = (turn + 1) & 3
            first = work.second
        # Asked for while the consumers have the last blocks before them, so that they do not wait for it.
        item = next_item(item, sequences.table)
    mailbox_write(smem.mailbox, turn & 1, FIELDS, "first", -1)
    mbarrier.arrive(smem.mailbox_full.index(turn & 1), count=1)


@gluon.jit
def load_tile(smem, q_desc, k_desc, v_desc, tile, state, q_phase, SPEC: gl.constexpr):
    """Load a tile of queries, and the blocks of keys and values that they see, from the last to the first."""
    CONSUMERS: gl.constexpr = SPEC.tiles.consumers
    TILE_K: gl.constexpr = SPEC.tiles.tile_k
    begin, _full_begin, _full_end, end = kv_blocks_seen(
        tile.first, tile.first + CONSUMERS * STRIP - 1, tile.sizes, TILE_K
    )
    head_kv, last = tile.head // SPEC.group_size, end - 1
    PANELS: gl.constexpr = SPEC.widths.tile // panel_of(SPEC)
    # The first keys before the queries, whose buffers become free one by one.
    load_block(k_desc, tile.rows_k, head_kv, last * TILE_K, smem.k, state, PANELS)
    for c in gl.static_range(CONSUMERS):
        load_block(q_desc, tile.rows_q, tile.head, tile.first + c * STRIP, smem.q, State(c, q_phase), 1)
    for block in range(last, begin - 1, -1):
        load_block(v_desc, tile.rows_k, head_kv, block * TILE_K, smem.v, state, 1)
        state = advance(state, smem.k)
        if block > begin:
            load_block(k_desc, tile.rows_k, head_kv, (block - 1) * TILE_K, smem.k, state, PANELS)
    return state


@gluon.jit
def load_block(descriptor, rows, head, row, ring, state, PANELS: gl.constexpr):
    """Load a block of rows into a buffer of a ring, or into its panels of columns, when that is empty."""
    producer_acquire(ring, state, PANELS * tile_bytes(descriptor.tiles))
    for p in gl.static_range(PANELS):
        buffer = ring.buffers.index(state.stage * PANELS + p)
        tma_load(descriptor, rows, head, row, p * buffer.shape[1], ring.full.index(state.stage), buffer)


@gluon.constexpr_function
def panel_of(spec):
    """Return how many columns of K a buffer holds: shapes are powers of two, so 192 columns are three panels of 64."""
    return spec.widths.tile if spec.widths.tile == spec.widths.padded else 64


@gluon.jit
def begin_scores(q, k_ring, stage, s, SPEC: gl.constexpr):
    """Begin S = Q K^T; s is what its registers have held."""
    PANEL: gl.constexpr = panel_of(SPEC)
    PANELS: gl.constexpr = SPEC.widths.tile // PANEL
    if PANELS == 1:
        s = warpgroup_mma(q, k_ring.buffers.index(stage).permute((1, 0)), s, use_acc=False, is_async=True)
    else:
        for p in gl.static_range(PANELS):
            panel = k_ring.buffers.index(stage * PANELS + p)  # [TILE_K, PANEL]
            q_panel = q.slice(p * PANEL, PANEL, 1)
            s = warpgroup_mma(q_panel, panel.permute((1, 0)), s, use_acc=p > 0, is_async=True)
    return s


@gluon.jit
def consume(
    CONSUMER: gl.constexpr, smem, sizes, batches, strides_out, results, SPEC: gl.constexpr, VARLEN: gl.constexpr,
):  # fmt: skip
    """A consumer warpgroup attends with 64 queries of each tile that the producer names."""
    EV: gl.constexpr = SPEC.widths.head_dim_v
    TILE_V: gl.constexpr = SPEC.widths.tile_v
    batch_dim = None if SPEC.padded else batches
    out_desc = tile_descriptor(results.out, batch_dim, sizes.heads, sizes.len_q, strides_out, STRIP, EV, TILE_V)
    factor = results.scale * LOG2E if results.softcap is None else 1.0
    heads = sizes.heads
    state, turn = State(0, 0), 0
    mbarrier.wait(smem.mailbox_full.index(0), 0)
    first = mailbox_read(smem.mailbox, 0, FIELDS, "first")
    while first >= 0:
        slot = turn & 1
        len_q = mailbox_read(smem.mailbox, slot, FIELDS, "len_q")
        len_k = mailbox_read(smem.mailbox, slot, FIELDS, "len_k")
        of_sequence = Sizes(None, heads, len_q, len_k, sizes.left, sizes.right, None)
        if VARLEN:
            rows = Rows(None, mailbox_read(smem.mailbox, slot, FIELDS, "end_q"), len_q)
            tile = Tile(None, mailbox_read(smem.mailbox, slot, FIELDS, "head"), first, rows, None, of_sequence)
        else:
            batch_head = mailbox_read(smem.mailbox, slot, FIELDS, "head")
            rows = Rows(batch_head // heads, len_q, len_q)
            tile = Tile(batch_head, batch_head % heads, first, rows, rows, of_sequence)
        state = attend(CONSUMER, smem, out_desc, tile, results, factor, state, slot, SPEC)
        turn = (turn + 1) & 3
        wait_turn(smem.mailbox_full, turn)
        first = mailbox_read(smem.mailbox, turn & 1, FIELDS, "first")
    tma.store_wait(0)


@gluon.jit
def attend(CONSUMER: gl.constexpr, smem, out_desc, tile, results, factor, state, q_phase, SPEC: gl.constexpr):
    """Compute out and lse of the 64 queries of a consumer, and return how far it has gone in the rings of K and V."""
    TILE_K: gl.constexpr = SPEC.tiles.tile_k
    TILE_Q: gl.constexpr = SPEC.tiles.consumers * STRIP
    TILE_V: gl.constexpr = SPEC.widths.tile_v
    Q_IN_REGISTERS: gl.constexpr = SPEC.tiles.q_in_registers
    OUT_APART: gl.constexpr = SPEC.tiles.out_apart
    LAZY: gl.constexpr = SPEC.tiles.lazy
    scale, softcap = results.scale, results.softcap
    len_q, len_k = tile.sizes.len_q, tile.sizes.len_k
    dtype: gl.constexpr = out_desc.tiles.dtype
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TILE_K, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TILE_V, 16])
    P: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUT, k_width=2)
    ROWS: gl.constexpr = gl.SliceLayout(1, S)
    # [64, 4]: of the sums that each thread makes of its own numbers.
    PARTS: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[8, 0]], lane_bases=[[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], warp_bases=[[16, 0], [32, 0]],
        block_bases=[], shape=[STRIP, 4],
    )  # fmt: skip
    BOUNDED: gl.constexpr = tile.sizes.left is not None or tile.sizes.right is not None
    # Whether a row may see no key: a sequence with a length of its own may have none.
    MAYBE_EMPTY: gl.constexpr = BOUNDED or tile.batch_head is None or SPEC.padded

    # Prologue: S and P of the last block of keys that these queries see.
    first = tile.first
    begin, _full_begin, _full_end, end = kv_blocks_seen(first, first + TILE_Q - 1, tile.sizes, TILE_K)
    first += CONSUMER * STRIP
    own_begin, full_begin, full_end, own_end = begin, 0, len_k // TILE_K, end
    if BOUNDED:
        own_begin, full_begin, full_end, own_end = kv_blocks_seen(first, first + STRIP - 1, tile.sizes, TILE_K)
        own_end = gl.minimum(own_end, end)
        own_begin = gl.maximum(gl.minimum(own_begin, own_end - 1), begin)
    rows = first + gl.arange(0, STRIP, layout=ROWS)  # [64]

    # A sink is asked for while the queries and keys are on their way.
    sink = sink_of(rows, tile, results)
    consumer_wait(smem.q, State(CONSUMER, q_phase))
    q = smem.q.buffers.index(CONSUMER)  # [64, PADDED]
    if Q_IN_REGISTERS:
        q = q.load(gl.DotOperandLayout(operand_index=0, parent=S, k_width=2))
        fence_async_shared()
        consumer_release(smem.q, CONSUMER)
    if BOUNDED:
        state = skip_blocks(smem, end - own_end, state)
    consumer_wait(smem.k, state)
    s = gl.zeros([STRIP, TILE_K], gl.float32, layout=S)
    s = begin_scores(q, smem.k, state.stage, s, SPEC)
    s = warpgroup_mma_wait(0, deps=[s])
    consumer_release(smem.k, state.stage)
    s = capped(s, scale, softcap)
    if BOUNDED or own_end > full_end:
        s = masked_logits(s, rows, (own_end - 1) * TILE_K, tile.sizes, TILE_K, S)
    row_max = gl.max(s, axis=1) * factor  # [64]
    p = gl.exp2(s * factor - gl.expand_dims(finite(row_max, MAYBE_EMPTY), 1))  # [64, TILE_K]
    sums = sums_of_threads(p, TILE_K, PARTS)  # [64, 4]
    p_operand = cast_operand(p, P, dtype)  # [64, TILE_K]
    acc = gl.zeros([STRIP, TILE_V], gl.float32, layout=OUT)  # O, not divided by row_sum

    # Loop: S and P of each block before, while O takes in the block behind it.
    for i in range(1, own_end - own_begin):
        block = own_end - 1 - i
        next_state = advance(state, smem.k)
        # (1) S = Q K^T of this block begins.
        consumer_wait(smem.k, next_state)
        s = begin_scores(q, smem.k, next_state.stage, p, SPEC)
        # (2) O += P V of the block behind begins.
        consumer_wait(smem.v, state)
        acc = warpgroup_mma(p_operand, smem.v.buffers.index(state.stage), acc, is_async=True)
        # (3) S is complete: its softcap and mask.
        s = warpgroup_mma_wait(1, deps=[s])
        consumer_release(smem.k, next_state.stage)
        s = capped(s, scale, softcap)
        if not SPEC.one_edge and ((block < full_begin) | (block >= full_end)):
            s = masked_logits(s, rows, block * TILE_K, tile.sizes, TILE_K, S)
        # (4) Online softmax: the new maximum of each row, P, and its sums.
        new_max = gl.maximum(row_max, gl.max(s, axis=1) * factor)
        if LAZY:
            new_max = gl.where(new_max - row_max > LAG, new_max, row_max)
        shift = finite(new_max, MAYBE_EMPTY)
        p = gl.exp2(s * factor - gl.expand_dims(shift, 1))
        rescale = gl.exp2(row_max - shift)  # [64]
        row_max = new_max
        block_sums = sums_of_threads(p, TILE_K, PARTS)
        if SPEC.tiles.weights_first:
            block_sums = branch_fence(block_sums)
        sums = sums * as_column(rescale, PARTS) + block_sums
        # (5) O is complete, and rescaled. The wait lists p too, so that Triton cannot hoist it above the softmax;
        # ptxas can, unless `weights_first` fences it.
        acc, p_operand, p = warpgroup_mma_wait(0, deps=[acc, p_operand, p])
        consumer_release(smem.v, state.stage)
        factors = as_column(rescale, OUT)
        acc = multiply_unless_one(acc, factors) if LAZY else acc * factors
        # (6) P as the operand of the next O.
        p_operand = cast_operand(p, P, dtype)
        state = next_state

    # Epilogue: O of the first block; lse with n in it, and out.
    if OUT_APART and not Q_IN_REGISTERS:
        consumer_release(smem.q, CONSUMER)
    consumer_wait(smem.v, state)
    acc = warpgroup_mma(p_operand, smem.v.buffers.index(state.stage), acc, is_async=True)
    row_sum = gl.convert_layout(gl.sum(sums, axis=1), ROWS, assert_trivial=True)  # [64]
    rescale = finish_softmax(row_max, row_sum, sink, rows, tile, results)
    acc, p_operand = warpgroup_mma_wait(0, deps=[acc, p_operand])
    consumer_release(smem.v, state.stage)
    state = advance(state, smem.k)
    if BOUNDED:
        state = skip_blocks(smem, own_begin - begin, state)

    acc = acc * as_column(rescale, OUT)
    if OUT_APART:
        out_strip = smem.out.index(CONSUMER)  # [64, TILE_V]
        tma.store_wait(0)
    else:
        out_strip = smem.out.index(CONSUMER * (SPEC.widths.padded // TILE_V))
    out_strip.store(acc.to(dtype))
    fence_async_shared()
    if first < len_q:
        tma_store(out_desc, tile.rows_q, tile.head, first, 0, out_strip)
    if not OUT_APART:
        tma.store_wait(0)
        consumer_release(smem.q, CONSUMER)
    return state


@gluon.jit
def sink_of(rows, tile, results):
    """Return log n of a tile, or of its rows; None if n is 0."""
    sink = results.log_n
    if results.sinks is not None:
        if results.stride_n is None:
            len_q, all_q = tile.sizes.len_q, results.all_q
            sink = gl.load(pointers_to_rows(results.sinks, tile, rows, all_q), mask=rows < len_q, other=0.0)
        else:
            sink = gl.load(results.sinks + tile.head * results.stride_n)
    return sink


@gluon.jit
def finish_softmax(row_max, row_sum, sink, rows, tile, results):
    """Store lse, and return what O is to be multiplied by, `[64]`: one over the denominator, with n in it."""
    rescale = gl.full([STRIP], 1.0, gl.float32, layout=rows.type.layout)
    if sink is not None:
        sink *= LOG2E
        new_max = gl.maximum(row_max, sink)
        shift = finite(new_max, True)
        rescale = gl.exp2(row_max - shift)
        row_sum = row_sum * rescale + gl.exp2(sink - shift)
        row_max = new_max
    empty = row_sum == 0.0
    rescale = rescale / gl.where(empty, 1.0, row_sum)
    row_lse = gl.where(empty, float("-inf"), (row_max + gl.log2(row_sum)) * LN2)
    gl.store(pointers_to_rows(results.lse, tile, rows, results.all_q), row_lse, mask=rows < tile.sizes.len_q)
    return rescale


@gluon.jit
def pointers_to_rows(x, tile, rows, all_q):
    """Return the pointers to the rows of a tile in a tensor of one number a row, `(B, H, L)` or varlen `(T, H)`."""
    if tile.batch_head is not None:
        return x + tile.batch_head.to(gl.int64) * (tile.sizes.len_q if all_q is None else all_q) + rows
    else:
        return x + (tile.rows_q.end - tile.sizes.len_q + rows).to(gl.int64) * tile.sizes.heads + tile.head


@gluon.jit
def skip_blocks(smem, blocks, state):
    """Release blocks of K and V unread, since only other consumers read them."""
    for _ in range(blocks):
        consumer_wait(smem.k, state)
        consumer_release(smem.k, state.stage)
        consumer_wait(smem.v, state)
        consumer_release(smem.v, state.stage)
        state = advance(state, smem.k)
    return state


@gluon.jit
def sums_of_threads(p, TILE_K: gl.constexpr, LAYOUT: gl.constexpr):
    """Sum up the numbers of each thread by rows, `[64, 4]`: threads are added up once, at the end (up to +5 %)."""
    parts = gl.sum(gl.sum(gl.reshape(p, [STRIP, TILE_K // 8, 4, 2]), axis=3), axis=1)
    return gl.convert_layout(parts, LAYOUT, assert_trivial=True)


@gluon.jit
def capped(s, scale, softcap):
    """Return logits in base 2 if there is a softcap; else s as it is, which `factor` scales."""
    if softcap is not None:
        s = tanh(s * (scale / softcap)) * (softcap * LOG2E)
    return s


@gluon.jit
def as_column(x, LAYOUT: gl.constexpr):
    """Return x `[rows]` as `[rows, 1]`, beside a matrix of that layout."""
    return gl.expand_dims(gl.convert_layout(x, gl.SliceLayout(1, LAYOUT), assert_trivial=True), 1)


@gluon.jit
def finite(row_max, MAYBE_EMPTY: gl.constexpr):
    """Return what to subtract from the logits of a row: one that has seen no key yet has no maximum."""
    return gl.where(row_max == float("-inf"), 0.0, row_max) if MAYBE_EMPTY else row_max


@gluon.jit
def fill(strides_out, results, sizes, sequences, batch, SPEC: gl.constexpr):
    """A warp fills the rows that do not exist as those of queries without keys: zeros in out, n alone in lse."""
    heads, all_q = sizes.heads, sizes.len_q
    zeros = tile_of_zeros(results.out.dtype.element_ty)
    store_zeros(results.out, strides_out, batch, heads, sequences.queries, zeros, SPEC.widths.head_dim_v)
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    row_sum = gl.zeros([STRIP], gl.float32, layout=LAYOUT)
    row_max = gl.full([STRIP], float("-inf"), gl.float32, layout=LAYOUT)
    for batch_head in range(gl.program_id(0), batch * heads, gl.num_programs(0)):
        _, length = rows_of_sequence(sequences.queries, batch_head // heads)
        tile = Tile(batch_head, batch_head % heads, None, None, None, sizes)
        for first in range(length, all_q, STRIP):
            rows = first + gl.arange(0, STRIP, layout=LAYOUT)
            finish_softmax(row_max, row_sum, sink_of(rows, tile, results), rows, tile, results)


@gluon.jit(do_not_specialize=RUN_TIME)
def forward_kernel(
    q, k, v, out, lse, sinks, log_n, starts_q, used_q, starts_k, used_k, leftpad, table,
    strides_q, strides_k, strides_v, strides_out, stride_n,
    batch, heads, len_q, len_k, left, right, scale, softcap, items, swizzle, SPEC: gl.constexpr,
):  # fmt: skip
    """At most as many programs as fit the GPU at once go through all tiles; `SPEC` is a `configs.ForwardSpec`."""
    CONSUMERS: gl.constexpr = SPEC.tiles.consumers
    TILE_K: gl.constexpr = SPEC.tiles.tile_k
    STAGES: gl.constexpr = SPEC.tiles.stages
    OUT_APART: gl.constexpr = SPEC.tiles.out_apart
    VARLEN: gl.constexpr = starts_q is not None
    TILE_V: gl.constexpr = SPEC.widths.tile_v
    PADDED: gl.constexpr = SPEC.widths.padded
    PANEL: gl.constexpr = panel_of(SPEC)
    PANELS: gl.constexpr = SPEC.widths.tile // PANEL
    gl.static_assert(
        OUT_APART or not SPEC.tiles.q_in_registers, "out waits in the buffer of q, which is then free already"
    )
    dtype: gl.constexpr = q.dtype.element_ty

    TILED: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    q_strips = gl.allocate_shared_memory(dtype, [CONSUMERS, STRIP, PADDED], TILED)
    k_blocks = gl.allocate_shared_memory(dtype, [STAGES * PANELS, TILE_K, PANEL], TILED)
    v_blocks = gl.allocate_shared_memory(dtype, [STAGES, TILE_K, TILE_V], TILED)
    if OUT_APART:
        out_strips = gl.allocate_shared_memory(dtype, [CONSUMERS, STRIP, TILE_V], TILED)
    else:
        out_strips = reinterpret(q_strips, dtype, [CONSUMERS * PADDED // TILE_V, STRIP, TILE_V], TILED)
    q_ring = Ring(q_strips, barriers(CONSUMERS, 1), barriers(CONSUMERS, 1))
    k_ring = Ring(k_blocks, barriers(STAGES, 1), barriers(STAGES, CONSUMERS))
    v_ring = Ring(v_blocks, barriers(STAGES, 1), barriers(STAGES, CONSUMERS))
    smem = Shared(q_ring, k_ring, v_ring, out_strips, new_mailbox(FIELDS), barriers(2, 1))
    fence_async_shared()
    queries = Extents(starts_q, used_q, None, len_q if SPEC.padded else None)
    keys = Extents(starts_k, used_k, leftpad, len_k if SPEC.padded else None)
    sequences = Sequences(queries, keys, table)
    sizes = Sizes(items, heads, len_q, len_k, left, right, swizzle)
    results = Results(out, lse, len_q if SPEC.padded else None, sinks, stride_n, log_n, scale, softcap)
    FILLED: gl.constexpr = used_q is not None
    # The producer, and who fills, need 24 registers to issue TMA loads and stores; the consumers share the others.
    OTHERS: gl.constexpr = 240 if CONSUMERS == 2 else 160
    gl.warp_specialize(
        [
            (consume, (CONSUMERS - 3, smem, sizes, batch, strides_out, results, SPEC, VARLEN)),
            (consume, (CONSUMERS - 2, smem, sizes, batch, strides_out, results, SPEC, VARLEN)),
            (consume, (CONSUMERS - 1, smem, sizes, batch, strides_out, results, SPEC, VARLEN)),
            (produce, (smem, q, k, v, batch, strides_q, strides_k, strides_v, sizes, sequences, SPEC)),
            (fill, (strides_out, results, sizes, sequences, batch, SPEC)),
        ][3 - CONSUMERS : 4 + FILLED],
        [4, 4, 1, 1][3 - CONSUMERS : 3 + FILLED], [OTHERS, OTHERS, 24, 24][3 - CONSUMERS : 3 + FILLED],
    )  # fmt: skip
