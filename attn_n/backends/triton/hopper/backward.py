"""The backward kernel for Hopper, for heads of 128: dQ, dK and dV together, by tiles of keys.

Programs are persistent, and go through tiles of 128 keys. Each has three roles, which share nothing but buffers in
shared memory and the barriers on them:

    producer, 1 warp                          consumers, 2 x 4 warps, each with its own 64 keys

    next tile of keys                         wait kv.full
      wait kv.empty                           for each tile of queries, of each of its query heads:
      k, v, the mailbox      -> kv.full         wait queries.full
      for each tile of queries:                 P^T = exp2(S^T - lse)   dP^T = V dO^T - delta
        wait queries.empty                      dV += P^T dO            dS^T = P^T * dP^T, to shared memory
        q, dout, lse, delta -> queries.full     dK += dS^T Q            -> queries.empty
                                                for every other tile, else -> `dS is full`:
                                                  wait `dS is full` of the other consumer
                                                  dQ = dS K             dQ is added to global memory
                                                the next S^T = K Q^T    and dP^T begin
                                              -> kv.empty
                                              dV and dK are written, or added, to global memory

The consumers take turns with dQ: each computes all of it for every other tile of queries, while the other one goes on.
So they drift apart by up to a tile, and the exponentials of one run beside the wgmmas of the other (+3 to 7 % on an
H100). The next dP is begun right behind the next S, so that the first exponentials have that wgmma to run beside (+1 to
2 %).

A barrier is waited for by its phase, which flips each time its ring of buffers has gone around; `empty` counts an
arrival of each consumer. That dS is there is said at a named barrier, where a consumer arrives without waiting. There
are two buffers of each kind, of dS too: a consumer overwrites the dS of two tiles ago, which the other one has read,
because it has announced its own dS since. The one buffer of dQ has left for global memory before a consumer announces
its dS, which lets the other one write there.

Keys and queries that do not see each other are never loaded; tiles in which only some do are masked. lse is infinite
and q and dout are zero beyond the end of the queries, so that these rows add nothing. n is in the lse and appears
nowhere else. The order in which tiles of keys add to dQ is not fixed: its last bits differ from run to run. So do those
of dK and dV where several programs add to them, each for some of the query heads of a KV head.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from attn_n.backends.triton.hopper.backward_producer import RUN_TIME, Sizes, fill, produce, rows_of_head
from attn_n.backends.triton.hopper.backward_rings import (
    FIELDS,
    allocate_rings,
    begin_matmul,
    gradients_of_keys,
    in_order,
    row_vector,
    weights,
    write_gradients,
)
from attn_n.backends.triton.hopper.gluon_compat import async_reduce_add, reinterpret
from attn_n.backends.triton.hopper.mailbox import mailbox_read
from attn_n.backends.triton.hopper.ptx import arrive_named, cast_operand, recomputed, wait_named
from attn_n.backends.triton.hopper.rings import State, consumer_release, consumer_wait, wait_turn
from attn_n.backends.triton.hopper.schedule import Extents
from attn_n.backends.triton.hopper.scheduler import Sequences

# Named barriers, each of the threads of both consumers; 0 to 7 are left to the compiler.
DS_FULL = gl.constexpr(8)  # of each consumer
TILE_END = gl.constexpr(10)


@gluon.jit
def consume(
    CONSUMER: gl.constexpr, rings, ds_buffers, dq_buffers, sizes, dq_sum, dk, dv, strides_dk, strides_dv, scale,
    softcap, SPEC: gl.constexpr,
):  # fmt: skip
    """A consumer warpgroup computes dK and dV of its 64 keys of each tile, and half of what the tile adds to dQ."""
    batches, heads, _len_q, len_k, _sum_rows, left, right, _swizzle, sequences = sizes
    E: gl.constexpr = SPEC.widths.tile
    TILE_Q: gl.constexpr = SPEC.tile_q
    kv, queries = rings.kv.buffers, rings.queries.buffers
    rows = rows_of_head(sizes, SPEC)
    dtype: gl.constexpr = kv.k.dtype
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_Q, 16])
    DKV: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, E, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, DKV, 2)

    sum_desc = tma.make_tensor_descriptor(
        dq_sum, [batches * heads * rows, E], [E, 1], [TILE_Q, E], gl.NVMMASharedLayout(0, 32)
    )
    into = gradients_of_keys(dk, dv, strides_dk, strides_dv, sizes, SPEC)
    turn, slot = 0, 0  # as in the producer
    consumer_wait(rings.kv, State(0, slot))
    steps = mailbox_read(rings.mailbox, slot, FIELDS, "steps")
    while steps >= 0:
        dk_acc = gl.zeros([64, E], gl.float32, DKV)
        dv_acc = gl.zeros([64, E], gl.float32, DKV)
        begin = mailbox_read(rings.mailbox, slot, FIELDS, "begin")
        full_begin = mailbox_read(rings.mailbox, slot, FIELDS, "full_begin")
        full_end = mailbox_read(rings.mailbox, slot, FIELDS, "full_end")
        sum_row = mailbox_read(rings.mailbox, slot, FIELDS, "sum_row")
        row, end = begin, begin + steps * TILE_Q
        if steps > 0:
            wait_turn(rings.queries.full, turn)
        # S^T = K Q^T and dP^T = V dO^T begin also where no tile of queries is left, since a wgmma in flight cannot
        # cross a branch; nobody reads them then.
        s = begin_matmul(kv.k.index(recomputed(CONSUMER)), queries.q.index(turn & 1), TILE_Q, S)
        dp = begin_matmul(kv.v.index(recomputed(CONSUMER)), queries.dout.index(turn & 1), TILE_Q, S)
        s = warpgroup_mma_wait(1, deps=[s])
        for step in range(1, steps * SPEC.team_heads + 1):
            stage = turn & 1
            q_tile, dout_tile = queries.q.index(stage), queries.dout.index(stage)  # [TILE_Q, E]
            # (1) P^T = exp2(S^T - lse), masked.
            edge = (row < full_begin) | (row >= full_end)
            p_operand, p = weights(
                s, row_vector(queries.lse.index(stage), S), edge, rings, slot, row, len_k, left, right, scale, softcap,
                dtype, CONSUMER, TILE_Q, S, OPERAND,
            )  # fmt: skip
            # (2) dV += P^T dO begins.
            dp = warpgroup_mma_wait(0, deps=[dp])
            dv_acc = warpgroup_mma(p_operand, dout_tile, dv_acc, is_async=True)
            # (3) dS^T = P^T * dP^T, for whoever computes this dQ.
            dp += row_vector(queries.delta.index(stage), S)
            ds_operand = cast_operand(p * dp, OPERAND, dtype)  # [64, TILE_Q]
            ds_buffers.index(2 * stage + CONSUMER).store(gl.convert_layout(ds_operand, S, assert_trivial=True))
            fence_async_shared()
            if stage != CONSUMER:
                tma.store_wait(0)
                arrive_named(DS_FULL + CONSUMER, 256)
            # (4) dK += dS^T Q; the tile of queries is released.
            dk_acc = warpgroup_mma(ds_operand, q_tile, dk_acc, is_async=True)
            dv_acc, dk_acc, p_operand, ds_operand = warpgroup_mma_wait(0, deps=[dv_acc, dk_acc, p_operand, ds_operand])
            consumer_release(rings.queries, stage)
            # (5) dQ = dS K, which is added to global memory by TMA.
            if stage == CONSUMER:
                wait_named(DS_FULL + 1 - CONSUMER, 256)
                dq = gl.zeros([TILE_Q, E], gl.float32, DKV)
                for c in gl.static_range(2):
                    ds = ds_buffers.index(2 * stage + c).permute((1, 0))  # [TILE_Q, 64]
                    dq = warpgroup_mma(ds, kv.k.index(recomputed(c)), dq, use_acc=c > 0, is_async=True)
                dq = warpgroup_mma_wait(0, deps=[dq])
                tma.store_wait(0)
                reinterpret(dq_buffers, gl.float32, [TILE_Q, E], in_order(E)).store(dq)
                fence_async_shared()
                flat = reinterpret(dq_buffers, gl.float32, sum_desc.block_shape, sum_desc.layout)
                async_reduce_add(sum_desc, [sum_row + row, 0], flat)
            # (6) The next S^T and dP^T begin.
            turn = (turn + 1) & 3
            if step < steps * SPEC.team_heads:
                wait_turn(rings.queries.full, turn)
            s = begin_matmul(kv.k.index(recomputed(CONSUMER)), queries.q.index(turn & 1), TILE_Q, S)
            dp = begin_matmul(kv.v.index(recomputed(CONSUMER)), queries.dout.index(turn & 1), TILE_Q, S)
            s = warpgroup_mma_wait(1, deps=[s])
            row += TILE_Q
            if SPEC.team_heads > 1 and row == end:  # the next query head
                row = begin
                sum_row += rows
        dp = warpgroup_mma_wait(0, deps=[dp])
        consumer_release(rings.kv, 0)
        # The buffer of dQ has to be free for dV and dK of both.
        tma.store_wait(0)
        wait_named(TILE_END, 256)
        buffer = dq_buffers.index(CONSUMER)
        write_gradients(dk_acc, dv_acc, into, buffer, rings, slot, scale, sequences, CONSUMER, DKV, SPEC)
        slot ^= 1
        consumer_wait(rings.kv, State(0, slot))
        steps = mailbox_read(rings.mailbox, slot, FIELDS, "steps")
    tma.store_wait(0)


@gluon.jit(do_not_specialize=RUN_TIME)
def backward_kernel(
    q, k, v, dout, stats, dq_sum, dk, dv, filled_dq, filled_dk, filled_dv,
    starts_q, used_q, starts_k, used_k, leftpad, table, shares, dn,
    strides_q, strides_k, strides_v, strides_dout, strides_dk, strides_dv, strides_dq,
    batches, heads, len_q, len_k, sum_rows, left, right, scale, softcap, swizzle, SPEC: gl.constexpr,
):  # fmt: skip
    """At most as many programs as fit the GPU at once go through all tiles; `SPEC` is a `configs.BackwardSpec`."""
    gl.static_assert(SPEC.widths.tile == 128 and SPEC.widths.tile_v == 128)
    dtype: gl.constexpr = q.dtype.element_ty
    rings = allocate_rings(dtype, 2, SPEC)
    # dS of each consumer and stage, and dQ; dK and dV go through the latter too.
    ds_buffers = gl.allocate_shared_memory(dtype, [4, 64, SPEC.tile_q], gl.NVMMASharedLayout(128, 16))
    dq_buffers = gl.allocate_shared_memory(gl.float32, [2, 64, 64], in_order(64))
    fence_async_shared()
    queries = Extents(starts_q, used_q, None, len_q if SPEC.padded else None)
    keys = Extents(starts_k, used_k, leftpad, len_k if SPEC.padded else None)
    sequences = Sequences(queries, keys, table)
    counted = 0 if SPEC.padded else len_k
    sizes = Sizes(batches, heads, len_q, counted, sum_rows, left, right, swizzle, sequences)
    # Of the 504 registers for three threads, one of each role, the producer needs the fewest.
    gl.warp_specialize(
        [
            (consume, (0, rings, ds_buffers, dq_buffers, sizes, dq_sum, dk, dv, strides_dk, strides_dv, scale,
                       softcap, SPEC)),
            (consume, (1, rings, ds_buffers, dq_buffers, sizes, dq_sum, dk, dv, strides_dk, strides_dv, scale,
                       softcap, SPEC)),
            (produce, (rings, sizes, q, k, v, dout, stats, shares, dn, strides_q, strides_k, strides_v, strides_dout,
                       SPEC)),
            (fill, (filled_dq, filled_dk, filled_dv, strides_dq, strides_dk, strides_dv, sizes, dtype, SPEC)),
        ][: 3 + SPEC.padded],
        [4, 1, 1][: 2 + SPEC.padded], [240, 24, 24][: 2 + SPEC.padded],
    )  # fmt: skip
