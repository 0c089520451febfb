"""The backward kernel for Hopper, for heads of more than 128: dQ, dK and dV together, by tiles of keys.

As in `backward`, with which it shares the producer, but for what does not fit: a tile has 64 keys, and dK and dV of one
are all that the registers of two consumers hold. Hence each has one of them, half of the matmuls, and half of dQ:

    for values                                    for keys

    S^T = K Q^T                                   dP^T = V dO^T - delta
    P^T = exp2(S^T - lse), to shared memory   ->  wait for it
    dV += P^T dO, the first half of it            dS^T = P^T * dP^T, to shared memory
                                                  dK += dS^T Q, the first half of it
                              barrier of both consumers
    dQ = dS K, its left half                      dQ = dS K, its right half
    the second half of dV                         the second half of dK
      meanwhile dQ is added to global memory        meanwhile dQ is added to global memory
    -> queries.empty                              -> queries.empty

Of q and k only the first 192 columns are used if there are no more, in parts of 128 and 64.

One buffer each is enough for P and dS. The next P is written when that one has been read, since both have passed their
barrier then; and the next dS when the next P has come, which is after dQ.
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
    row_vector,
    store_tile,
    weights,
)
from attn_n.backends.triton.hopper.gluon_compat import reinterpret
from attn_n.backends.triton.hopper.mailbox import mailbox_read
from attn_n.backends.triton.hopper.ptx import (
    add_accumulator,
    announce_p,
    await_p,
    cast_operand,
    consumer_barrier,
    pin_here,
    recomputed,
)
from attn_n.backends.triton.hopper.rings import State, consumer_release, consumer_wait, wait_turn
from attn_n.backends.triton.hopper.schedule import Extents
from attn_n.backends.triton.hopper.scheduler import Sequences
from attn_n.backends.triton.hopper.tma import tile_descriptor

VALUES = gl.constexpr(0)  # the consumers
KEYS = gl.constexpr(1)


@gluon.jit
def consume(
    CONSUMER: gl.constexpr, rings, p_buffer, ds_buffer, sizes, dq_sum, dx, strides_dx, scale, softcap,
    SPEC: gl.constexpr,
):  # fmt: skip
    """A consumer warpgroup computes dX, which is dV or dK, in two halves of its columns, and half of dQ.

    Where several teams share a KV head, dx is the sum for it.
    """
    batches, heads, _len_q, len_k, _sum_rows, left, right, _swizzle, sequences = sizes
    PADDED: gl.constexpr = SPEC.widths.padded
    TILE_Q: gl.constexpr = SPEC.tile_q
    EX: gl.constexpr = SPEC.widths.head_dim_v if CONSUMER == VALUES else SPEC.widths.head_dim
    FIRST: gl.constexpr = (SPEC.widths.tile_v if CONSUMER == VALUES else PADDED) // 2  # columns of the halves of dX
    SECOND: gl.constexpr = second_half(FIRST, EX)
    HALF: gl.constexpr = PADDED // 2
    DQ: gl.constexpr = HALF if CONSUMER == VALUES else second_half(HALF, SPEC.widths.head_dim)  # columns of its dQ
    kv, queries = rings.kv.buffers, rings.queries.buffers
    rows = rows_of_head(sizes, SPEC)
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_Q, 16])
    OF_FIRST: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, FIRST, 16])
    OF_SECOND: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SECOND, 16])
    OF_DQ: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DQ, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, OF_FIRST, 2)
    OPERAND_2: gl.constexpr = gl.DotOperandLayout(0, OF_SECOND, 2)

    if SPEC.teams == 1:
        batch_dim = batches if sequences.table is None else None
        heads_kv = heads // SPEC.team_heads
        first_desc = tile_descriptor(dx, batch_dim, heads_kv, len_k, strides_dx, 64, EX, FIRST)
        second_desc = first_desc
        if SECOND != FIRST:
            second_desc = tile_descriptor(dx, batch_dim, heads_kv, len_k, strides_dx, 64, EX, SECOND)
    ds = ds_buffer.index(0)
    turn, slot = 0, 0  # as in the producer
    consumer_wait(rings.kv, State(0, slot))
    steps = mailbox_read(rings.mailbox, slot, FIELDS, "steps")
    while steps >= 0:
        first = gl.zeros([64, FIRST], gl.float32, OF_FIRST)
        second = gl.zeros([64, SECOND], gl.float32, OF_SECOND)
        begin = mailbox_read(rings.mailbox, slot, FIELDS, "begin")
        sum_row = mailbox_read(rings.mailbox, slot, FIELDS, "sum_row")
        for _ in range(SPEC.team_heads):
            for row in range(begin, begin + steps * TILE_Q, TILE_Q):
                stage = turn & 1
                # (1) P^T or dS^T, in shared memory and as an operand.
                wait_turn(rings.queries.full, turn)
                if CONSUMER == VALUES:
                    x = queries.dout.index(stage)  # [TILE_Q, TILE_V]
                    operand = weights_for_both(
                        rings, p_buffer, slot, stage, row, len_k, left, right, scale, softcap, SPEC, S, OPERAND
                    )
                else:
                    x = queries.q.index(stage)  # [TILE_Q, PADDED]
                    operand = dscores(rings, p_buffer, ds, stage, SPEC, S, OPERAND)
                # (2) The first half of dX += operand @ x begins.
                first = warpgroup_mma(operand, x.slice(0, FIRST, 1), first, is_async=True)
                consumer_barrier()
                # (3) A half of dQ = dS K begins, and the second half of dX.
                dq = gl.zeros([TILE_Q, DQ], gl.float32, OF_DQ)
                keys = kv.k.index(recomputed(0)).slice(HALF * CONSUMER, DQ, 1)  # [64, DQ]
                dq = warpgroup_mma(ds.permute((1, 0)), keys, dq, use_acc=False, is_async=True)
                for_second = operand if SECOND == FIRST else gl.convert_layout(operand, OPERAND_2, assert_trivial=True)
                second = warpgroup_mma(for_second, x.slice(FIRST, SECOND, 1), second, is_async=True)
                # (4) dQ is added to global memory, from registers: the wgmmas alone take up most of what shared memory
                # can bring.
                first, dq = warpgroup_mma_wait(1, deps=[first, dq])
                of_sum = dq_sum + ((sum_row + row).to(gl.int64) * PADDED + TILE_Q * HALF * CONSUMER)
                add_accumulator(of_sum, dq, OF_DQ)
                # (5) dX is complete, and the tile of queries is released.
                second, for_second = warpgroup_mma_wait(0, deps=[second, for_second])
                consumer_release(rings.queries, stage)
                turn = (turn + 1) & 3
            sum_row += rows
        consumer_release(rings.kv, 0)
        if SPEC.teams > 1:
            of_sums = dx + mailbox_read(rings.mailbox, slot, FIELDS, "key_row").to(gl.int64) * PADDED
            add_accumulator(of_sums, first, OF_FIRST)
            add_accumulator(of_sums + 64 * FIRST, second, OF_SECOND)
        else:
            if CONSUMER == VALUES:
                buffer = p_buffer
            else:
                buffer = ds_buffer
                first *= scale
                second *= scale
            consumer_barrier()  # the last dS has been read
            store_tile(first, buffer, rings, slot, first_desc, sequences, 0, 0)
            store_tile(second, buffer, rings, slot, second_desc, sequences, 0, FIRST)
            tma.store_wait(0)
        slot ^= 1
        consumer_wait(rings.kv, State(0, slot))
        steps = mailbox_read(rings.mailbox, slot, FIELDS, "steps")


@gluon.constexpr_function
def second_half(half, head_dim):
    """Return how many columns behind the first half are used: 64 of 128 if the head has no more."""
    return 64 if half == 128 and head_dim <= 192 else half


@gluon.jit
def begin_matmul(of_keys, of_queries, acc, USE_ACC: gl.constexpr, E: gl.constexpr):
    """Begin `acc + of_keys @ of_queries^T`, over the columns that heads of E use, or without `acc`."""
    HALF: gl.constexpr = of_keys.shape[1] // 2
    SECOND: gl.constexpr = second_half(HALF, E)
    if SECOND < HALF:
        acc = warpgroup_mma(
            of_keys.slice(0, HALF, 1), of_queries.slice(0, HALF, 1).permute((1, 0)), acc, use_acc=USE_ACC, is_async=True
        )
        acc = warpgroup_mma(
            of_keys.slice(HALF, SECOND, 1), of_queries.slice(HALF, SECOND, 1).permute((1, 0)), acc, is_async=True
        )
    else:
        acc = warpgroup_mma(of_keys, of_queries.permute((1, 0)), acc, use_acc=USE_ACC, is_async=True)
    return acc


@gluon.jit
def weights_for_both(
    rings, p_buffer, slot, stage, row, len_k, left, right, scale, softcap,
    SPEC: gl.constexpr, S: gl.constexpr, OPERAND: gl.constexpr,
):  # fmt: skip
    """Return P^T `[64, TILE_Q]`, and hand it to the other consumer: with softcap times the derivative of that."""
    kv, queries = rings.kv.buffers, rings.queries.buffers
    dtype: gl.constexpr = kv.k.dtype
    TILE_Q: gl.constexpr = SPEC.tile_q
    s = gl.zeros([64, TILE_Q], gl.float32, S)
    s = begin_matmul(kv.k.index(recomputed(0)), queries.q.index(stage), s, False, SPEC.widths.head_dim)
    lse = row_vector(queries.lse.index(stage), S)
    s = warpgroup_mma_wait(0, deps=[s])
    full_begin = mailbox_read(rings.mailbox, slot, FIELDS, "full_begin")
    edge = (row < full_begin) | (row >= mailbox_read(rings.mailbox, slot, FIELDS, "full_end"))
    p_operand, p = weights(
        s, lse, edge, rings, slot, row, len_k, left, right, scale, softcap, dtype, 0, TILE_Q, S, OPERAND
    )
    handed = gl.convert_layout(p_operand, S, assert_trivial=True) if softcap is None else cast_operand(p, S, dtype)
    by_threads(p_buffer, TILE_Q).store(handed)
    announce_p()
    return p_operand


@gluon.jit
def dscores(rings, p_buffer, ds, stage, SPEC: gl.constexpr, S: gl.constexpr, OPERAND: gl.constexpr):
    """Return dS^T `[64, TILE_Q]`, and store it to shared memory."""
    kv, queries = rings.kv.buffers, rings.queries.buffers
    TILE_Q: gl.constexpr = SPEC.tile_q
    zeros = gl.zeros([64, TILE_Q], gl.float32, S)
    dp = pin_here(gl.broadcast(row_vector(queries.delta.index(stage), S), zeros)[0])
    dp = begin_matmul(kv.v.index(recomputed(0)), queries.dout.index(stage), dp, True, SPEC.widths.head_dim_v)
    dp = warpgroup_mma_wait(0, deps=[dp])
    await_p()
    p = by_threads(p_buffer, TILE_Q).load(S)
    ds_operand = cast_operand(p.to(gl.float32) * dp, OPERAND, kv.k.dtype)
    ds.store(gl.convert_layout(ds_operand, S, assert_trivial=True))
    fence_async_shared()
    return ds_operand


@gluon.jit
def by_threads(buffer, TILE_Q: gl.constexpr):
    """View a buffer so that a thread finds in it, by 16 bytes, the P for its dP, as the other consumer left it."""
    LAYOUT: gl.constexpr = gl.SharedLinearLayout(
        [[0, 1], [8, 0], [0, 8], [0, 2], [0, 4], [1, 0], [2, 0], [4, 0], [16, 0], [32, 0], [0, 16], [0, 32]]
    )
    return reinterpret(buffer.index(0), buffer.dtype, [64, TILE_Q], LAYOUT)


@gluon.jit(do_not_specialize=RUN_TIME)
def wide_kernel(
    q, k, v, dout, stats, dq_sum, dk, dv, filled_dq, filled_dk, filled_dv,
    starts_q, used_q, starts_k, used_k, leftpad, table, shares, dn,
    strides_q, strides_k, strides_v, strides_dout, strides_dk, strides_dv, strides_dq,
    batches, heads, len_q, len_k, sum_rows, left, right, scale, softcap, swizzle, SPEC: gl.constexpr,
):  # fmt: skip
    """At most as many programs as fit the GPU at once go through all tiles; `SPEC` is a `configs.BackwardSpec`."""
    gl.static_assert(SPEC.widths.padded == 256 and SPEC.tile_q == 64)
    dtype: gl.constexpr = q.dtype.element_ty
    TILED: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    rings = allocate_rings(dtype, 1, SPEC)
    # P and dS are the first half of these; half of dV and of dK takes all of them.
    p_buffer = gl.allocate_shared_memory(dtype, [2, 64, SPEC.tile_q], TILED)
    ds_buffer = gl.allocate_shared_memory(dtype, [2, 64, SPEC.tile_q], TILED)
    fence_async_shared()
    queries = Extents(starts_q, used_q, None, len_q if SPEC.padded else None)
    keys = Extents(starts_k, used_k, leftpad, len_k if SPEC.padded else None)
    sequences = Sequences(queries, keys, table)
    counted = 0 if SPEC.padded else len_k
    sizes = Sizes(batches, heads, len_q, counted, sum_rows, left, right, swizzle, sequences)
    # Of the 504 registers for three threads, one of each role, the producer needs the fewest.
    gl.warp_specialize(
        [
            (consume, (VALUES, rings, p_buffer, ds_buffer, sizes, dq_sum, dv, strides_dv, scale, softcap, SPEC)),
            (consume, (KEYS, rings, p_buffer, ds_buffer, sizes, dq_sum, dk, strides_dk, scale, softcap, SPEC)),
            (produce, (rings, sizes, q, k, v, dout, stats, shares, dn, strides_q, strides_k, strides_v, strides_dout,
                       SPEC)),
            (fill, (filled_dq, filled_dk, filled_dv, strides_dq, strides_dk, strides_dv, sizes, dtype, SPEC)),
        ][: 3 + SPEC.padded],
        [4, 1, 1][: 2 + SPEC.padded], [240, 24, 24][: 2 + SPEC.padded],
    )  # fmt: skip
