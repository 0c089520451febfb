"""The backward kernel for Hopper: dQ, dK and dV together, by tiles of keys.

A program stays on its processor and goes through tiles of 128 keys. It has three roles, which share nothing but buffers
in shared memory and the barriers on them:

    producer, 1 warp                          consumers, 2 x 4 warps, each with its own 64 keys

    next tile of keys                         wait kv_full
      wait kv_empty                           for each tile of queries, of each of its query heads:
      k, v, the tile's numbers -> kv_full       wait full
      for each tile of queries:                 P^T = exp2(S^T - lse)   dP^T = V dO^T - delta
        wait empty                              dV += P^T dO            dS^T = P^T * dP^T, to shared memory
        q, dout, lse, delta    -> full          meet the other consumer
                                                dQ = dS K, half of it each
                                                dK += dS^T Q            dQ is added to global memory
                                                the next S^T = K Q^T    -> empty
                                              -> kv_empty
                                              dV and dK are written, or added, to global memory

At E = 128, where the registers allow it, the next dP is begun right behind the next S, so that the first exponentials
find the product beside which they run already there (+1 to 2 %; at E = 64 it is 3 % slower).

A barrier is waited for by its phase, which flips each time its ring of buffers has gone around; `empty` and `kv_empty`
count an arrival of each consumer. There are two buffers of each kind, of dS too: a consumer overwrites the dS of two
tiles ago, which the other one has read, for they have met since.

Keys and queries that do not see each other are never loaded; tiles in which only some do are masked. lse is infinite
and q and dout are zero beyond the end of the queries, so that these rows add nothing. n is in the lse and appears
nowhere else. The order in which tiles of keys add to dQ is not fixed: its last bits differ from run to run. So do those
of dK and dV where several programs add to them, each for some of the query heads of a key head.
"""

from typing import NamedTuple

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from attn_n.backends.triton.hopper.backward_producer import (
    BEGIN,
    FIELDS,
    FULL_BEGIN,
    FULL_END,
    KEY_ROW,
    RUN_TIME,
    STEPS,
    SUM_ROW,
    Sizes,
    add_from_registers,
    here,
    meet,
    produce,
    row_vector,
    visible,
    write,
)
from attn_n.backends.triton.hopper.pipeline import Packed, barriers, rounded, tiles_of, told
from attn_n.backends.triton.portable.tile import LOG2E, tanh


class Buffers(NamedTuple):
    """What the roles share: memory, and the barriers on it."""

    k: gl.shared_memory_descriptor  # [2, 64, E], of each consumer
    v: gl.shared_memory_descriptor
    q: gl.shared_memory_descriptor  # [2, TILE_Q, E]
    dout: gl.shared_memory_descriptor
    lse: gl.shared_memory_descriptor  # [2, 1, TILE_Q]
    delta: gl.shared_memory_descriptor
    ds: gl.shared_memory_descriptor  # [4, 64, TILE_Q], of each consumer
    dq: gl.shared_memory_descriptor  # [2, 64, 64] float32, of each consumer; dK and dV go through it too
    tile: gl.shared_memory_descriptor  # [2 * FIELDS, 1]: the numbers of this tile of keys, or of the last one
    kv_full: gl.shared_memory_descriptor
    kv_empty: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor


@gluon.jit
def consume(
    ME: gl.constexpr, b, sizes, dq_sum, dk, dv, strides_dk, strides_dv, scale, softcap,
    GROUPS: gl.constexpr, SHARES: gl.constexpr, E: gl.constexpr, TILE_Q: gl.constexpr,
):  # fmt: skip
    batches, heads, len_q, len_k, _sum_rows, left, right, _together, packed = sizes
    rows = gl.cdiv(len_q, TILE_Q) * TILE_Q
    dtype: gl.constexpr = b.k.dtype
    OF_S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_Q, 16])
    OF_DKV: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, E, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, OF_DKV, 2)
    HALF: gl.constexpr = 64 * 64 // E  # rows of dq_sum that are as much as a consumer's part of dQ
    AHEAD: gl.constexpr = E == 128  # whether dP begins behind the S before

    sums = tma.make_tensor_descriptor(
        dq_sum, [batches * heads * rows, E], [E, 1], [HALF, E], gl.NVMMASharedLayout(0, 32)
    )  # fmt: skip
    if SHARES == 1:
        dim = batches if packed.table is None else None
        of_dk = tiles_of(dk, dim, heads // GROUPS, len_k, strides_dk, 64, E)
        of_dv = tiles_of(dv, dim, heads // GROUPS, len_k, strides_dv, 64, E)
    factor = (scale if softcap is None else softcap) * LOG2E
    turn, slot = 0, 0  # as in the producer
    mbarrier.wait(b.kv_full.index(0), slot)
    steps = told(b.tile, slot * FIELDS + STEPS)
    while steps >= 0:
        dk_tile = gl.zeros([64, E], gl.float32, OF_DKV)
        dv_tile = gl.zeros([64, E], gl.float32, OF_DKV)
        begin, full_begin = told(b.tile, slot * FIELDS + BEGIN), told(b.tile, slot * FIELDS + FULL_BEGIN)
        full_end, sum_row = told(b.tile, slot * FIELDS + FULL_END), told(b.tile, slot * FIELDS + SUM_ROW)
        row, end = begin, begin + steps * TILE_Q
        if steps > 0:
            mbarrier.wait(b.full.index(turn & 1), turn >> 1)
        # Without queries, and behind the last tile of them, these are of what nobody reads: a product that still runs
        # cannot leave a branch.
        s = logits(b, turn & 1, ME, TILE_Q, OF_S)
        if AHEAD:
            dp = gradient_of_weights(b, turn & 1, ME, TILE_Q, OF_S)
            s = warpgroup_mma_wait(1, deps=[s])
        else:
            s = warpgroup_mma_wait(0, deps=[s])
        for step in range(1, steps * GROUPS + 1):
            stage = turn & 1
            q_tile, dout_tile = b.q.index(stage), b.dout.index(stage)
            if not AHEAD:
                zeros = gl.zeros([64, TILE_Q], gl.float32, OF_S)
                minus_delta = here(gl.broadcast(row_vector(b.delta.index(stage), OF_S), zeros)[0])
                dp = warpgroup_mma(b.v.index(ME), dout_tile.permute((1, 0)), minus_delta, is_async=True)
            edge = (row < full_begin) | (row >= full_end)
            # Masked are the weights, or the logits if these are needed once more: either way few registers wait.
            if softcap is not None:
                s = tanh(s * (scale / softcap))
                if edge:
                    s = gl.where(visible(b, slot, row, len_k, left, right, ME, TILE_Q, OF_S), s, float("-inf"))
            p = gl.exp2(s * factor - row_vector(b.lse.index(stage), OF_S))
            if softcap is None and edge:
                p = gl.where(visible(b, slot, row, len_k, left, right, ME, TILE_Q, OF_S), p, 0.0)
            weights = rounded(p, OPERAND, dtype)
            if softcap is not None:
                p *= gl.maximum(1 - s * s, 0.0)  # not -inf where s is
            dp = warpgroup_mma_wait(0, deps=[dp])
            dv_tile = warpgroup_mma(weights, dout_tile, dv_tile, is_async=True)
            if AHEAD:
                dp += row_vector(b.delta.index(stage), OF_S)
            ds = rounded(p * dp, OPERAND, dtype)
            b.ds.index(2 * stage + ME).store(gl.convert_layout(ds, OF_S, assert_trivial=True))
            fence_async_shared()
            meet()
            dq = dq_part(b, stage, ME, E)
            dk_tile = warpgroup_mma(ds, q_tile, dk_tile, is_async=True)
            dv_tile, dq, weights = warpgroup_mma_wait(1, deps=[dv_tile, dq, weights])
            tma.store_wait(0)
            b.dq.index(ME).store(dq)
            fence_async_shared()
            flat = b.dq.index(ME)._reinterpret(gl.float32, sums.block_type.shape, sums.layout)
            add_to_global(sums, [sum_row + row + ME * HALF, 0], flat)
            turn = (turn + 1) & 3
            if step < steps * GROUPS:
                mbarrier.wait(b.full.index(turn & 1), turn >> 1)
            s = logits(b, turn & 1, ME, TILE_Q, OF_S)
            if AHEAD:
                dk_tile, ds = warpgroup_mma_wait(1, deps=[dk_tile, ds])  # whose registers the next product needs
                dp = gradient_of_weights(b, turn & 1, ME, TILE_Q, OF_S)
                mbarrier.arrive(b.empty.index(stage), count=1)
                s = warpgroup_mma_wait(1, deps=[s])
            else:
                dk_tile, ds, s = warpgroup_mma_wait(0, deps=[dk_tile, ds, s])
                mbarrier.arrive(b.empty.index(stage), count=1)
            row += TILE_Q
            if GROUPS > 1 and row == end:
                row = begin
                sum_row += rows
        if AHEAD:
            dp = warpgroup_mma_wait(0, deps=[dp])
        mbarrier.arrive(b.kv_empty.index(0), count=1)
        if SHARES > 1:
            of_sums = (told(b.tile, slot * FIELDS + KEY_ROW) + 64 * ME).to(gl.int64) * E
            add_from_registers(dv + of_sums, dv_tile, OF_DKV)
            add_from_registers(dk + of_sums, dk_tile, OF_DKV)
        else:
            write(dv_tile, b.dq.index(ME), b, slot, of_dv, packed, 64 * ME, 0)
            write(dk_tile * scale, b.dq.index(ME), b, slot, of_dk, packed, 64 * ME, 0)
        slot ^= 1
        mbarrier.wait(b.kv_full.index(0), slot)
        steps = told(b.tile, slot * FIELDS + STEPS)
    tma.store_wait(0)


@gluon.jit
def logits(b, stage, ME: gl.constexpr, TILE_Q: gl.constexpr, OF_S: gl.constexpr):
    """S^T = K Q^T, begun."""
    return keys_by_queries(b.k.index(ME), b.q.index(stage), TILE_Q, OF_S)


@gluon.jit
def gradient_of_weights(b, stage, ME: gl.constexpr, TILE_Q: gl.constexpr, OF_S: gl.constexpr):
    """dP^T = V dO^T without delta, begun."""
    return keys_by_queries(b.v.index(ME), b.dout.index(stage), TILE_Q, OF_S)


@gluon.jit
def keys_by_queries(of_keys, of_queries, TILE_Q: gl.constexpr, OF_S: gl.constexpr):
    zeros = gl.zeros([64, TILE_Q], gl.float32, OF_S)
    return warpgroup_mma(of_keys, of_queries.permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def dq_part(b, stage, ME: gl.constexpr, E: gl.constexpr):
    """64 x 64 of dS K, begun: of wide heads a half of the columns, of narrow ones a half of the rows."""
    OF_DQ: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    dq = gl.zeros([64, 64], gl.float32, OF_DQ)
    for c in gl.static_range(2):
        ds, keys = b.ds.index(2 * stage + c), b.k.index(c)
        if E == 128:
            keys = keys.slice(64 * ME, 64, 1)
        else:
            ds = ds.slice(64 * ME, 64, 1)
        dq = warpgroup_mma(ds.permute((1, 0)), keys, dq, use_acc=c > 0, is_async=True)
    return dq


@builtin
def add_to_global(descriptor, coordinates, buffer, _semantic=None):
    """TMA's reduction, which Gluon 3.6 has no function for."""
    coordinates = _semantic._convert_to_ir_values(coordinates, require_i64=False)
    _semantic.builder.create_async_tma_reduce(
        ir.DESCRIPTOR_REDUCE_KIND.ADD, descriptor.handle, coordinates, buffer.handle
    )


@gluon.jit(do_not_specialize=RUN_TIME)
def backward_kernel(
    q, k, v, dout, stats, dq_sum, dk, dv, starts_q, starts_k, table,
    strides_q, strides_k, strides_v, strides_dout, strides_dk, strides_dv,
    batches, heads, len_q, len_k, sum_rows, left, right, scale, softcap, together,
    GROUPS: gl.constexpr, SHARES: gl.constexpr, E: gl.constexpr, TILE_Q: gl.constexpr,
):  # fmt: skip
    """As many programs as fit the GPU at once; each goes through tiles of keys."""
    dtype: gl.constexpr = q.dtype.element_ty
    tiled: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    row: gl.constexpr = gl.NVMMASharedLayout(0, 32)
    # As a product lies in registers: by four numbers of a thread, then by threads. `round_kernel` reads them so.
    in_order: gl.constexpr = gl.SharedLinearLayout(
        [[0, 1], [8, 0], [0, 2], [0, 4], [1, 0], [2, 0], [4, 0], [16, 0], [32, 0], [0, 8], [0, 16], [0, 32]]
    )
    b = Buffers(
        gl.allocate_shared_memory(dtype, [2, 64, E], tiled),
        gl.allocate_shared_memory(dtype, [2, 64, E], tiled),
        gl.allocate_shared_memory(dtype, [2, TILE_Q, E], tiled),
        gl.allocate_shared_memory(dtype, [2, TILE_Q, E], tiled),
        gl.allocate_shared_memory(gl.float32, [2, 1, TILE_Q], row),
        gl.allocate_shared_memory(gl.float32, [2, 1, TILE_Q], row),
        gl.allocate_shared_memory(dtype, [4, 64, TILE_Q], tiled),
        gl.allocate_shared_memory(gl.float32, [2, 64, 64], in_order),
        gl.allocate_shared_memory(gl.int32, [2 * FIELDS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0])),
        barriers(1, 2), barriers(1, 2), barriers(2, 1), barriers(2, 2),
    )  # fmt: skip
    fence_async_shared()
    packed = Packed(starts_q, starts_k, table)
    sizes = Sizes(batches, heads, len_q, len_k, sum_rows, left, right, together, packed)
    # Of the 504 registers for three threads, one of each role, the producer needs the fewest.
    gl.warp_specialize(
        [
            (consume, (0, b, sizes, dq_sum, dk, dv, strides_dk, strides_dv, scale, softcap,
                       GROUPS, SHARES, E, TILE_Q)),
            (consume, (1, b, sizes, dq_sum, dk, dv, strides_dk, strides_dv, scale, softcap,
                       GROUPS, SHARES, E, TILE_Q)),
            (produce, (b, sizes, q, k, v, dout, stats, strides_q, strides_k, strides_v, strides_dout,
                       GROUPS, SHARES, E, TILE_Q)),
        ],
        [4, 1], [240, 24],
    )  # fmt: skip
