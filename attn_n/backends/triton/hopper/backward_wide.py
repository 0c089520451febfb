"""The backward kernel for Hopper, for heads of 256: dQ, dK and dV together, by tiles of keys.

As in `backward`, with which it shares the producer, but for what does not fit: a tile has 64 keys, and dK and dV of one
are all that the registers of two consumers hold. Hence each has one of them, half of the products, and half of dQ:

    for values                                    for keys

    S^T = K Q^T                                   dP^T = V dO^T - delta
    P^T = exp2(S^T - lse), to shared memory   ->  wait for it
    dV += P^T dO, the first half of it            dS^T = P^T * dP^T, to shared memory
                                                  dK += dS^T Q, the first half of it
                              meet the other consumer
    dQ = dS K, its left half                      dQ = dS K, its right half
    the second half of dV                         the second half of dK
      meanwhile dQ is added to global memory        meanwhile dQ is added to global memory
    -> empty                                      -> empty

One buffer each is enough for P and dS. The next P is written when that one has been read, for they have met since; and
the next dS when the next P has come, which is after dQ.
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

VALUES = gl.constexpr(0)  # the consumers
KEYS = gl.constexpr(1)


class Buffers(NamedTuple):
    """What the roles share: memory, and the barriers on it."""

    k: gl.shared_memory_descriptor  # [1, 64, E]
    v: gl.shared_memory_descriptor
    q: gl.shared_memory_descriptor  # [2, TILE_Q, E]
    dout: gl.shared_memory_descriptor
    lse: gl.shared_memory_descriptor  # [2, 1, TILE_Q]
    delta: gl.shared_memory_descriptor
    p: gl.shared_memory_descriptor  # [64, E // 2], of which it takes [64, TILE_Q]: dV goes through it too
    ds: gl.shared_memory_descriptor  # the same, and dK
    tile: gl.shared_memory_descriptor  # [2 * FIELDS, 1]: the numbers of this tile of keys, or of the last one
    kv_full: gl.shared_memory_descriptor
    kv_empty: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor


@gluon.jit
def consume(
    ME: gl.constexpr, b, sizes, dq_sum, dx, strides_dx, scale, softcap,
    GROUPS: gl.constexpr, SHARES: gl.constexpr, E: gl.constexpr, TILE_Q: gl.constexpr,
):  # fmt: skip
    """dx is dV or dK, which lies in two halves of its columns, or where heads share it the sum for it."""
    batches, heads, len_q, len_k, _sum_rows, left, right, _together, packed = sizes
    rows = gl.cdiv(len_q, TILE_Q) * TILE_Q
    HALF: gl.constexpr = E // 2
    OF_S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_Q, 16])
    OF_HALF: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, OF_HALF, 2)

    if SHARES == 1:
        of_dx = tiles_of(dx, batches if packed.table is None else None, heads // GROUPS, len_k, strides_dx, 64, E, HALF)
    ds = b.ds._reinterpret(b.ds.dtype, [64, TILE_Q], b.ds.layout)
    turn, slot = 0, 0  # as in the producer
    mbarrier.wait(b.kv_full.index(0), slot)
    steps = told(b.tile, slot * FIELDS + STEPS)
    while steps >= 0:
        first = gl.zeros([64, HALF], gl.float32, OF_HALF)
        second = gl.zeros([64, HALF], gl.float32, OF_HALF)
        begin, sum_row = told(b.tile, slot * FIELDS + BEGIN), told(b.tile, slot * FIELDS + SUM_ROW)
        for _ in range(GROUPS):
            for row in range(begin, begin + steps * TILE_Q, TILE_Q):
                stage = turn & 1
                mbarrier.wait(b.full.index(stage), turn >> 1)
                if ME == VALUES:
                    x = b.dout.index(stage)
                    operand = weights(b, slot, stage, row, len_k, left, right, scale, softcap, TILE_Q, OF_S, OPERAND)
                else:
                    x = b.q.index(stage)
                    operand = slopes(b, ds, stage, TILE_Q, OF_S, OPERAND)
                first = warpgroup_mma(operand, x.slice(0, HALF, 1), first, is_async=True)
                meet()
                dq = gl.zeros([TILE_Q, HALF], gl.float32, OF_HALF)
                keys = b.k.index(0).slice(HALF * ME, HALF, 1)
                dq = warpgroup_mma(ds.permute((1, 0)), keys, dq, use_acc=False, is_async=True)
                second = warpgroup_mma(operand, x.slice(HALF, HALF, 1), second, is_async=True)
                first, dq = warpgroup_mma_wait(1, deps=[first, dq])
                # From registers: the products alone take up most of what shared memory can bring.
                add_from_registers(dq_sum + ((sum_row + row).to(gl.int64) * E + TILE_Q * HALF * ME), dq, OF_HALF)
                second, operand = warpgroup_mma_wait(0, deps=[second, operand])
                mbarrier.arrive(b.empty.index(stage), count=1)
                turn = (turn + 1) & 3
            sum_row += rows
        mbarrier.arrive(b.kv_empty.index(0), count=1)
        if SHARES > 1:
            sums = dx + told(b.tile, slot * FIELDS + KEY_ROW).to(gl.int64) * E
            add_from_registers(sums, first, OF_HALF)
            add_from_registers(sums + 64 * HALF, second, OF_HALF)
        else:
            if ME == VALUES:
                buffer = b.p
            else:
                buffer = b.ds
                first *= scale
                second *= scale
            meet()  # the last dS has been read
            write(first, buffer, b, slot, of_dx, packed, 0, 0)
            write(second, buffer, b, slot, of_dx, packed, 0, HALF)
            tma.store_wait(0)
        slot ^= 1
        mbarrier.wait(b.kv_full.index(0), slot)
        steps = told(b.tile, slot * FIELDS + STEPS)


@gluon.jit
def weights(
    b, slot, stage, row, len_k, left, right, scale, softcap,
    TILE_Q: gl.constexpr, OF_S: gl.constexpr, OPERAND: gl.constexpr,
):  # fmt: skip
    """P^T, the other consumer's told; with softcap that gets P times the derivative of it."""
    dtype: gl.constexpr = b.k.dtype
    factor = (scale if softcap is None else softcap) * LOG2E
    s = gl.zeros([64, TILE_Q], gl.float32, OF_S)
    s = warpgroup_mma(b.k.index(0), b.q.index(stage).permute((1, 0)), s, use_acc=False, is_async=True)
    lse = row_vector(b.lse.index(stage), OF_S)
    s = warpgroup_mma_wait(0, deps=[s])
    edge = (row < told(b.tile, slot * FIELDS + FULL_BEGIN)) | (row >= told(b.tile, slot * FIELDS + FULL_END))
    # Masked are the weights, or the logits if these are needed once more: either way few registers wait.
    if softcap is not None:
        s = tanh(s * (scale / softcap))
        if edge:
            s = gl.where(visible(b, slot, row, len_k, left, right, 0, TILE_Q, OF_S), s, float("-inf"))
    p = gl.exp2(s * factor - lse)
    if softcap is None and edge:
        p = gl.where(visible(b, slot, row, len_k, left, right, 0, TILE_Q, OF_S), p, 0.0)
    found = rounded(p, OPERAND, dtype)
    if softcap is None:
        handed = gl.convert_layout(found, OF_S, assert_trivial=True)
    else:
        handed = rounded(p * gl.maximum(1 - s * s, 0.0), OF_S, dtype)  # not -inf where s is
    by_threads(b.p, TILE_Q).store(handed)
    gl.inline_asm_elementwise("mov.b32 $0, $1; bar.arrive 9, 256;", "=r,r", [0], gl.int32, False, 1)
    return found


@gluon.jit
def slopes(b, buffer, stage, TILE_Q: gl.constexpr, OF_S: gl.constexpr, OPERAND: gl.constexpr):
    """dS^T, in shared memory too."""
    zeros = gl.zeros([64, TILE_Q], gl.float32, OF_S)
    dp = here(gl.broadcast(row_vector(b.delta.index(stage), OF_S), zeros)[0])
    dp = warpgroup_mma(b.v.index(0), b.dout.index(stage).permute((1, 0)), dp, is_async=True)
    dp = warpgroup_mma_wait(0, deps=[dp])
    gl.inline_asm_elementwise("mov.b32 $0, $1; bar.sync 9, 256;", "=r,r", [0], gl.int32, False, 1)
    p = by_threads(b.p, TILE_Q).load(OF_S)
    found = rounded(p.to(gl.float32) * dp, OPERAND, b.k.dtype)
    buffer.store(gl.convert_layout(found, OF_S, assert_trivial=True))
    fence_async_shared()
    return found


@gluon.jit
def by_threads(buffer, TILE_Q: gl.constexpr):
    """Where a thread leaves its part of P for that of the other consumer with the same part of dP, by 16 bytes."""
    layout: gl.constexpr = gl.SharedLinearLayout(
        [[0, 1], [8, 0], [0, 8], [0, 2], [0, 4], [1, 0], [2, 0], [4, 0], [16, 0], [32, 0], [0, 16], [0, 32]]
    )
    return buffer._reinterpret(buffer.dtype, [64, TILE_Q], layout)


@gluon.jit(do_not_specialize=RUN_TIME)
def wide_kernel(
    q, k, v, dout, stats, dq_sum, dk, dv, starts_q, starts_k, table,
    strides_q, strides_k, strides_v, strides_dout, strides_dk, strides_dv,
    batches, heads, len_q, len_k, sum_rows, left, right, scale, softcap, together,
    GROUPS: gl.constexpr, SHARES: gl.constexpr, E: gl.constexpr, TILE_Q: gl.constexpr,
):  # fmt: skip
    """As many programs as fit the GPU at once; each goes through tiles of keys."""
    gl.static_assert(E == 256 and TILE_Q == 64)
    dtype: gl.constexpr = q.dtype.element_ty
    tiled: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    row: gl.constexpr = gl.NVMMASharedLayout(0, 32)
    b = Buffers(
        gl.allocate_shared_memory(dtype, [1, 64, E], tiled),
        gl.allocate_shared_memory(dtype, [1, 64, E], tiled),
        gl.allocate_shared_memory(dtype, [2, TILE_Q, E], tiled),
        gl.allocate_shared_memory(dtype, [2, TILE_Q, E], tiled),
        gl.allocate_shared_memory(gl.float32, [2, 1, TILE_Q], row),
        gl.allocate_shared_memory(gl.float32, [2, 1, TILE_Q], row),
        gl.allocate_shared_memory(dtype, [64, E // 2], tiled),
        gl.allocate_shared_memory(dtype, [64, E // 2], tiled),
        gl.allocate_shared_memory(gl.int32, [2 * FIELDS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0])),
        barriers(1, 2), barriers(1, 2), barriers(2, 1), barriers(2, 2),
    )  # fmt: skip
    fence_async_shared()
    packed = Packed(starts_q, starts_k, table)
    sizes = Sizes(batches, heads, len_q, len_k, sum_rows, left, right, together, packed)
    # Of the 504 registers for three threads, one of each role, the producer needs the fewest.
    gl.warp_specialize(
        [
            (consume, (VALUES, b, sizes, dq_sum, dv, strides_dv, scale, softcap, GROUPS, SHARES, E, TILE_Q)),
            (consume, (KEYS, b, sizes, dq_sum, dk, strides_dk, scale, softcap, GROUPS, SHARES, E, TILE_Q)),
            (produce, (b, sizes, q, k, v, dout, stats, strides_q, strides_k, strides_v, strides_dout,
                       GROUPS, SHARES, E, TILE_Q)),
        ],
        [4, 1], [240, 24],
    )  # fmt: skip
