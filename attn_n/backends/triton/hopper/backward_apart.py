"""The backward kernel for Hopper, for heads of 64: dQ has a warpgroup of its own, and the consumers never meet.

Where the two consumers of `backward` meet in each step, both compute their exponentials at the same time, and the
tensor cores wait. Here they drift apart by up to `SLOTS` tiles of queries, so that the exponentials of one run beside
the wgmmas of the other: on an H100 that is 5 to 18 % faster than the kernel in which they met. Programs are persistent,
and go through tiles of 128 keys:

    producer, 1 warp       consumers, 2 x 4 warps, 64 keys each             dQ, 4 warps

    next tile of keys      wait kv.full; K and V to registers  -> kv.empty    wait kv.full
      wait kv.empty        for each tile of 64 queries, of each query head:   for each of them:
      k, v, the mailbox      wait queries.full                                  wait `dS is full`, of both
        -> kv.full           S^T = K Q^T   P^T = exp2(S^T - lse)                dQ = dS K
      for each tile:         dP^T = V dO^T - delta   dV += P^T dO               -> ds_empty
        wait `free`          dS^T = P^T * dP^T                                  dQ is added to global memory
        q, dout, lse,        wait ds_empty; dS to shared memory -> `dS is full`
          delta -> full      dK += dS^T Q, the next S^T begins -> `free`      -> kv.empty
                           dV and dK are written, or added

`free` and `dS is full` are named barriers, one for each buffer, at which a consumer arrives without waiting and without
a barrier of its four warps before it, as an mbarrier would need. The other barriers are mbarriers.

K and V take part in S^T and dP^T from registers, which takes a third of the load off shared memory. There are two
buffers of K and V, so that the next tile is there when this one ends; the mailbox has a slot for each tile of keys that
a role may be at. dS is stored as rows of queries, since it is the left operand of dQ.
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

from attn_n.backends.triton.hopper.backward_passes import counter_of
from attn_n.backends.triton.hopper.backward_producer import (
    RUN_TIME,
    Sizes,
    fill,
    items_of,
    load_keys,
    load_queries,
    make_loads,
    rows_of_head,
    sum_shares,
)
from attn_n.backends.triton.hopper.backward_rings import (
    FIELDS,
    Rings,
    allocate_tiles,
    begin_matmul,
    gradients_of_keys,
    in_order,
    row_vector,
    weights,
    write_gradients,
)
from attn_n.backends.triton.hopper.gluon_compat import async_reduce_add, reinterpret
from attn_n.backends.triton.hopper.mailbox import mailbox_read, mailbox_write, new_mailbox
from attn_n.backends.triton.hopper.ptx import arrive_named, cast_operand, recomputed, wait_named
from attn_n.backends.triton.hopper.rings import Ring, barriers, consumer_release, consumer_wait, state_of
from attn_n.backends.triton.hopper.schedule import Extents
from attn_n.backends.triton.hopper.scheduler import Sequences, next_item

STAGES = gl.constexpr(3)  # buffers of a tile of queries
SLOTS = gl.constexpr(3)  # buffers of dS of each consumer
KV = gl.constexpr(2)  # buffers of a tile of keys
MAILS = gl.constexpr(4)  # slots of the mailbox: a role is at most two tiles of keys behind the producer
# Named barriers; 0 to 7 are left to the compiler.
FREE = gl.constexpr(8)  # of each buffer of a tile of queries; 288 threads: two consumers and the producer
DS_FULL = gl.constexpr(12)  # of each buffer of dS; 384 threads: two consumers and dQ


class Shared(NamedTuple):
    """The consumers and dQ share this memory."""

    ds: gl.shared_memory_descriptor  # [2 * SLOTS, 64 queries, 64 keys]
    ds_empty: gl.shared_memory_descriptor  # [SLOTS, 1] mbarriers
    dq: gl.shared_memory_descriptor  # [2, 64, 64] float32
    out: gl.shared_memory_descriptor  # [2, 64, 64]: dV and dK of each consumer


@gluon.jit
def produce(
    rings, sizes, q, k, v, dout, stats, shares, dn, strides_q, strides_k, strides_v, strides_dout, SPEC: gl.constexpr,
):  # fmt: skip
    """The producer warp, as in `backward_producer`, with more buffers."""
    loads = make_loads(sizes, q, k, v, dout, stats, strides_q, strides_k, strides_v, strides_dout, SPEC)
    tiles, items = items_of(sizes, 2, SPEC)
    rows = rows_of_head(sizes, SPEC)
    counter = counter_of(stats, sizes.batches.to(gl.int64) * sizes.heads * rows)
    turn, t = 0, 0  # count the tiles of queries, and those of keys
    item = gl.program_id(0)
    while item < items:
        tile = load_keys(rings, item, tiles, t % KV, (t // KV) & 1, t % MAILS, sizes, loads, SPEC)
        t += 1
        for head in range(SPEC.team_heads):
            for step in range(tile.steps):
                if turn >= STAGES:
                    wait_named(FREE + turn % STAGES, 288)
                load_queries(rings, tile, head, step, turn % STAGES, sizes, loads, SPEC)
                turn += 1
        item = next_item(item, counter)
    # No named barrier is left with arrivals that nobody waits for.
    for last in gl.static_range(STAGES):
        if last < turn:
            wait_named(FREE + (turn - 1 - last) % STAGES, 288)
    mbarrier.wait(rings.kv.empty.index(t % KV), ((t // KV) & 1) ^ 1)
    mailbox_write(rings.mailbox, t % MAILS, FIELDS, "steps", -1)
    mbarrier.arrive(rings.kv.full.index(t % KV), count=2)
    sum_shares(shares, dn, sizes, SPEC)


@gluon.jit
def consume(
    CONSUMER: gl.constexpr, rings, shared, sizes, dk, dv, strides_dk, strides_dv, scale, softcap, SPEC: gl.constexpr,
):  # fmt: skip
    """A consumer warpgroup computes dK and dV of its 64 keys of each tile, and hands dS to dQ."""
    _batches, _heads, _len_q, len_k, _sum_rows, left, right, _swizzle, sequences = sizes
    E: gl.constexpr = SPEC.widths.tile
    TILE_Q: gl.constexpr = SPEC.tile_q
    kv, queries = rings.kv.buffers, rings.queries.buffers
    dtype: gl.constexpr = kv.k.dtype
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_Q, 16])
    DKV: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, E, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, DKV, 2)
    KEYS: gl.constexpr = gl.DotOperandLayout(0, S, 2)
    into = gradients_of_keys(dk, dv, strides_dk, strides_dv, sizes, SPEC)
    turn, t = 0, 0  # as in the producer
    consumer_wait(rings.kv, state_of(0, KV))
    steps = mailbox_read(rings.mailbox, 0, FIELDS, "steps")
    while steps >= 0:
        slot, stage_kv = t % MAILS, t % KV
        dk_acc = gl.zeros([64, E], gl.float32, DKV)
        dv_acc = gl.zeros([64, E], gl.float32, DKV)
        begin = mailbox_read(rings.mailbox, slot, FIELDS, "begin")
        full_begin = mailbox_read(rings.mailbox, slot, FIELDS, "full_begin")
        full_end = mailbox_read(rings.mailbox, slot, FIELDS, "full_end")
        row, end = begin, begin + steps * TILE_Q
        keys = kv.k.index(2 * stage_kv + CONSUMER).load(KEYS)  # [64, E]
        values = kv.v.index(2 * stage_kv + CONSUMER).load(KEYS)
        fence_async_shared()
        consumer_release(rings.kv, stage_kv)
        if steps > 0:
            consumer_wait(rings.queries, state_of(turn, STAGES))
        # Begun also where no tile of queries is left, since a wgmma in flight cannot cross a branch.
        s = begin_matmul(keys, queries.q.index(turn % STAGES), TILE_Q, S)
        dp = begin_matmul(values, queries.dout.index(turn % STAGES), TILE_Q, S)
        s = warpgroup_mma_wait(1, deps=[s])
        for step in range(1, steps * SPEC.team_heads + 1):
            stage, place = turn % STAGES, turn % SLOTS
            q_tile, dout_tile = queries.q.index(stage), queries.dout.index(stage)  # [TILE_Q, E]
            # (1) P^T = exp2(S^T - lse), masked.
            edge = (row < full_begin) | (row >= full_end)
            p_operand, p = weights(
                s, row_vector(queries.lse.index(stage), S), edge, rings, slot, row, len_k, left, right, scale, softcap,
                dtype, CONSUMER, TILE_Q, S, OPERAND,
            )  # fmt: skip
            # (2) dV += P^T dO begins; dS^T = P^T * dP^T, for dQ.
            dp = warpgroup_mma_wait(0, deps=[dp])
            dv_acc = warpgroup_mma(p_operand, dout_tile, dv_acc, is_async=True)
            dp += row_vector(queries.delta.index(stage), S)
            ds_operand = cast_operand(p * dp, OPERAND, dtype)  # [64, TILE_Q]
            mbarrier.wait(shared.ds_empty.index(place), ((turn // SLOTS) & 1) ^ 1)
            of_queries = shared.ds.index(2 * place + CONSUMER).permute((1, 0))
            of_queries.store(gl.convert_layout(ds_operand, S, assert_trivial=True))
            fence_async_shared()
            arrive_named(DS_FULL + place, 384)
            # (3) dK += dS^T Q and the next S^T begin.
            dk_acc = warpgroup_mma(ds_operand, q_tile, dk_acc, is_async=True)
            turn += 1
            if step < steps * SPEC.team_heads:
                consumer_wait(rings.queries, state_of(turn, STAGES))
            s = begin_matmul(keys, queries.q.index(turn % STAGES), TILE_Q, S)
            # (4) dV and dK are complete, the tile of queries is free, and the next dP^T begins.
            dv_acc, dk_acc, p_operand, ds_operand = warpgroup_mma_wait(1, deps=[dv_acc, dk_acc, p_operand, ds_operand])
            arrive_named(FREE + stage, 288)
            dp = begin_matmul(values, queries.dout.index(turn % STAGES), TILE_Q, S)
            s = warpgroup_mma_wait(1, deps=[s])
            row += TILE_Q
            if SPEC.team_heads > 1 and row == end:  # the next query head
                row = begin
        dp = warpgroup_mma_wait(0, deps=[dp])
        buffer = shared.out.index(CONSUMER)
        write_gradients(dk_acc, dv_acc, into, buffer, rings, slot, scale, sequences, CONSUMER, DKV, SPEC)
        t += 1
        consumer_wait(rings.kv, state_of(t, KV))
        steps = mailbox_read(rings.mailbox, t % MAILS, FIELDS, "steps")
    tma.store_wait(0)


@gluon.jit
def sum_dq(rings, shared, sizes, dq_sum, SPEC: gl.constexpr):
    """The third warpgroup computes what each tile of keys adds to dQ, `[64, 64]` for a tile of queries."""
    E: gl.constexpr = SPEC.widths.tile
    TILE_Q: gl.constexpr = SPEC.tile_q
    DQ: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, E, 16])
    rows = rows_of_head(sizes, SPEC)
    sum_desc = tma.make_tensor_descriptor(
        dq_sum, [sizes.batches * sizes.heads * rows, E], [E, 1], [TILE_Q, E], gl.NVMMASharedLayout(0, 32)
    )
    k = rings.kv.buffers.k
    turn, t = 0, 0
    consumer_wait(rings.kv, state_of(0, KV))
    steps = mailbox_read(rings.mailbox, 0, FIELDS, "steps")
    while steps >= 0:
        slot, stage_kv = t % MAILS, t % KV
        first = mailbox_read(rings.mailbox, slot, FIELDS, "sum_row") + mailbox_read(
            rings.mailbox, slot, FIELDS, "begin"
        )
        for _ in range(SPEC.team_heads):
            row = first
            for _ in range(steps):
                place = turn % SLOTS
                wait_named(DS_FULL + place, 384)
                dq = gl.zeros([TILE_Q, E], gl.float32, DQ)
                for c in gl.static_range(2):
                    ds = shared.ds.index(2 * place + c)  # [TILE_Q, 64]
                    dq = warpgroup_mma(ds, k.index(recomputed(2 * stage_kv + c)), dq, use_acc=c > 0, is_async=True)
                dq = warpgroup_mma_wait(0, deps=[dq])
                mbarrier.arrive(shared.ds_empty.index(place), count=1)
                tma.store_wait(1)
                buffer = shared.dq.index(turn & 1)
                buffer.store(dq)
                fence_async_shared()
                flat = reinterpret(buffer, gl.float32, sum_desc.block_shape, sum_desc.layout)
                async_reduce_add(sum_desc, [row, 0], flat)
                turn += 1
                row += TILE_Q
            first += rows
        consumer_release(rings.kv, stage_kv)
        t += 1
        consumer_wait(rings.kv, state_of(t, KV))
        steps = mailbox_read(rings.mailbox, t % MAILS, FIELDS, "steps")
    tma.store_wait(0)


@gluon.jit(do_not_specialize=RUN_TIME)
def apart_kernel(
    q, k, v, dout, stats, dq_sum, dk, dv, filled_dq, filled_dk, filled_dv,
    starts_q, used_q, starts_k, used_k, leftpad, table, shares, dn,
    strides_q, strides_k, strides_v, strides_dout, strides_dk, strides_dv, strides_dq,
    batches, heads, len_q, len_k, sum_rows, left, right, scale, softcap, swizzle, SPEC: gl.constexpr,
):  # fmt: skip
    """At most as many programs as fit the GPU at once go through all tiles; `SPEC` is a `configs.BackwardSpec`."""
    gl.static_assert(SPEC.widths.tile == 64 and SPEC.widths.tile_v == 64 and SPEC.tile_q == 64)
    dtype: gl.constexpr = q.dtype.element_ty
    TILED: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    kv, queries = allocate_tiles(dtype, 2 * KV, STAGES, SPEC)
    kv_ring = Ring(kv, barriers(KV, 2), barriers(KV, 3))
    queries_full = barriers(STAGES, 1)
    # `free` takes the place of `empty`.
    rings = Rings(kv_ring, Ring(queries, queries_full, queries_full), new_mailbox(FIELDS, MAILS))
    shared = Shared(
        gl.allocate_shared_memory(dtype, [2 * SLOTS, 64, 64], TILED),
        barriers(SLOTS, 1),
        gl.allocate_shared_memory(gl.float32, [2, 64, 64], in_order(64)),
        gl.allocate_shared_memory(dtype, [2, 64, 64], TILED),
    )
    fence_async_shared()
    queries = Extents(starts_q, used_q, None, len_q if SPEC.padded else None)
    keys = Extents(starts_k, used_k, leftpad, len_k if SPEC.padded else None)
    sequences = Sequences(queries, keys, table)
    counted = 0 if SPEC.padded else len_k
    sizes = Sizes(batches, heads, len_q, counted, sum_rows, left, right, swizzle, sequences)
    gl.warp_specialize(
        [
            (consume, (0, rings, shared, sizes, dk, dv, strides_dk, strides_dv, scale, softcap, SPEC)),
            (consume, (1, rings, shared, sizes, dk, dv, strides_dk, strides_dv, scale, softcap, SPEC)),
            (sum_dq, (rings, shared, sizes, dq_sum, SPEC)),
            (produce, (rings, sizes, q, k, v, dout, stats, shares, dn, strides_q, strides_k, strides_v, strides_dout,
                       SPEC)),
            (fill, (filled_dq, filled_dk, filled_dv, strides_dq, strides_dk, strides_dv, sizes, dtype, SPEC)),
        ][: 4 + SPEC.padded],
        [4, 4, 1, 1][: 3 + SPEC.padded], [208, 72, 24, 24][: 3 + SPEC.padded],
    )  # fmt: skip
