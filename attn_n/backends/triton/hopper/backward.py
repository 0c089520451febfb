"""The backward kernel for Hopper: dQ, dK and dV together, by tiles of keys.

A program stays on its processor and goes through tiles of 128 keys. It has three roles, which share nothing but buffers
in shared memory and the barriers on them:

    producer, 1 warp                          consumers, 2 x 4 warps, each with its own 64 keys

    next tile of keys                         wait kv_full
      wait kv_empty                           for each tile of queries, of each query head of this key head:
      k, v, the tile's numbers -> kv_full       wait full
      for each tile of queries:                 S^T = K Q^T          dP^T = V dO^T - delta
        wait empty                              P^T = exp2(S^T - lse)
        q, dout, lse, delta    -> full          dV += P^T dO         dS^T = P^T * dP^T, to shared memory
                                                meet the other consumer
                                                dQ = dS K, half of it each
                                                dK += dS^T Q         dQ is added to global memory
                                                -> empty
                                              -> kv_empty
                                              dV and dK to global memory

A barrier is waited for by its phase, which flips each time its ring of buffers has gone around; `empty` and `kv_empty`
count an arrival of each consumer. There are two buffers of each kind, of dS too: a consumer overwrites the dS of two
tiles ago, which the other one has read, for they have met since.

Keys and queries that do not see each other are never loaded; tiles in which only some do are masked. lse is infinite
and q and dout are zero beyond the end of the queries, so that these rows add nothing. n is in the lse and appears
nowhere else. The order in which tiles of keys add to dQ is not fixed: its last bits differ from run to run.
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

from attn_n.backends.triton.hopper.packed import rows_of_sequence, sequence_of, tile_and_head
from attn_n.backends.triton.hopper.passes import counter_of
from attn_n.backends.triton.hopper.pipeline import Packed, Rows, barriers, bring, put, rounded, tiles_of
from attn_n.backends.triton.portable.tile import LOG2E, queries_that_see, tanh

TILE_K = gl.constexpr(128)  # 64 for each consumer

RUN_TIME = (
    "strides_q", "strides_k", "strides_v", "strides_dout", "strides_dk", "strides_dv", "batches", "heads", "len_q",
    "len_k", "left", "right",
)  # fmt: skip


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


class Sizes(NamedTuple):
    batches: gl.tensor
    heads: gl.tensor
    heads_kv: gl.tensor
    len_q: gl.tensor
    len_k: gl.tensor
    left: gl.tensor
    right: gl.tensor
    packed: Packed  # its sequences are one of a batch, with whole tiles of queries for each, and len_k is 0


# What the producer says of a tile of keys, and where among its numbers: it spares the consumers registers.
FIELDS = gl.constexpr(9)
STEPS = gl.constexpr(0)  # tiles of queries that see it; -1: there are no more tiles of keys
BEGIN = gl.constexpr(1)  # the first row of the first one
FULL_BEGIN = gl.constexpr(2)  # those from here
FULL_END = gl.constexpr(3)  # to there need no mask
SUM_ROW = gl.constexpr(4)  # the row in dq_sum of its first head's first query
FIRST_KEY = gl.constexpr(5)  # of packed sequences counted from their end
DIAGONAL = gl.constexpr(6)  # the query at the position of the first key
BATCH = gl.constexpr(7)  # or the end of a packed sequence
HEAD = gl.constexpr(8)


@gluon.jit
def tell(b, slot, FIELD: gl.constexpr, number):
    b.tile.index(slot * FIELDS + FIELD).store(gl.full([1], number, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))


@gluon.jit
def told(b, slot, FIELD: gl.constexpr):
    return gl.max(b.tile.index(slot * FIELDS + FIELD).load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def produce(
    b, sizes, q, k, v, dout, stats, strides_q, strides_k, strides_v, strides_dout,
    GROUPS: gl.constexpr, E: gl.constexpr, TILE_Q: gl.constexpr,
):  # fmt: skip
    batches, heads, heads_kv, len_q, len_k, left, right, packed = sizes
    tiles, rows = gl.cdiv(len_k, TILE_K), gl.cdiv(len_q, TILE_Q) * TILE_Q
    items = batches * heads_kv * tiles if packed.table is None else gl.load(packed.table + 1) * heads_kv
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
            first_key, head_kv, batch = item % tiles * TILE_K, item // tiles % heads_kv, item // tiles // heads_kv
            queries, keys, first_row = len_q, len_k, 0
            rows_q = Rows(batch, None, None)
            rows_k = rows_q
        else:
            # Heads whose queries, dout and sums for dQ together take 32 MB.
            IN_CACHE: gl.constexpr = (1 << 22) // (E * GROUPS)
            sequence, inside = sequence_of(packed.table, item, heads_kv)
            start_q, queries = rows_of_sequence(packed.starts_q, sequence)
            start_k, keys = rows_of_sequence(packed.starts_k, sequence)
            tile, head_kv = tile_and_head(inside, gl.cdiv(keys, TILE_K), heads_kv, IN_CACHE // gl.maximum(queries, 1))
            first_key, first_row, batch = tile * TILE_K, (start_q // TILE_Q + sequence) * TILE_Q, 0
            rows_q, rows_k = Rows(None, start_q + queries, queries), Rows(None, start_k + keys, keys)
        place = batch * heads + head_kv * GROUPS
        begin, full_begin, full_end, end = queries_that_see(first_key, queries, keys, left, right, TILE_Q, TILE_K)
        if first_key + TILE_K > keys:
            full_end = full_begin
        steps = gl.cdiv(gl.maximum(end - begin, 0), TILE_Q)
        mbarrier.wait(b.kv_empty.index(0), slot ^ 1)
        tell(b, slot, STEPS, steps)
        tell(b, slot, BEGIN, begin)
        tell(b, slot, FULL_BEGIN, full_begin)
        tell(b, slot, FULL_END, full_end)
        tell(b, slot, SUM_ROW, place * rows + first_row)
        tell(b, slot, FIRST_KEY, first_key if packed.table is None else first_key - keys)
        tell(b, slot, DIAGONAL, first_key - (keys - queries))
        tell(b, slot, BATCH, batch if packed.table is None else rows_k.end)
        tell(b, slot, HEAD, head_kv)
        kv_full = b.kv_full.index(0)
        mbarrier.arrive(kv_full, count=1)
        mbarrier.expect(kv_full, 2 * (of_k.block_type.nbytes + of_v.block_type.nbytes))
        for c in gl.static_range(2):
            bring(of_k, rows_k, head_kv, first_key + 64 * c, kv_full, b.k.index(c))
            bring(of_v, rows_k, head_kv, first_key + 64 * c, kv_full, b.v.index(c))
        slot ^= 1
        for group in range(GROUPS):
            for step in range(steps):
                row, stage = begin + step * TILE_Q, turn & 1
                head, of_lse = head_kv * GROUPS + group, place + group
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
        item = gl.num_programs(0) + gl.atomic_add(counter, 1)
    mbarrier.wait(b.kv_empty.index(0), slot ^ 1)
    tell(b, slot, STEPS, -1)
    mbarrier.arrive(b.kv_full.index(0), count=2)


@gluon.jit
def consume(
    ME: gl.constexpr, b, sizes, dq_sum, dk, dv, strides_dk, strides_dv, scale, softcap,
    GROUPS: gl.constexpr, E: gl.constexpr, TILE_Q: gl.constexpr,
):  # fmt: skip
    batches, heads, heads_kv, len_q, len_k, left, right, packed = sizes
    rows = gl.cdiv(len_q, TILE_Q) * TILE_Q
    dtype: gl.constexpr = b.k.dtype
    OF_S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_Q, 16])
    OF_DKV: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, E, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, OF_DKV, 2)
    HALF: gl.constexpr = 64 * 64 // E  # rows of dq_sum that are as much as a consumer's part of dQ

    sums = tma.make_tensor_descriptor(
        dq_sum, [batches * heads * rows, E], [E, 1], [HALF, E], gl.NVMMASharedLayout(0, 32)
    )  # fmt: skip
    dim = batches if packed.table is None else None
    of_dk = tiles_of(dk, dim, heads_kv, len_k, strides_dk, 64, E)
    of_dv = tiles_of(dv, dim, heads_kv, len_k, strides_dv, 64, E)
    factor = (scale if softcap is None else softcap) * LOG2E
    turn, slot = 0, 0  # as in the producer
    mbarrier.wait(b.kv_full.index(0), slot)
    steps = told(b, slot, STEPS)
    while steps >= 0:
        dk_tile = gl.zeros([64, E], gl.float32, OF_DKV)
        dv_tile = gl.zeros([64, E], gl.float32, OF_DKV)
        begin, full_begin, full_end = told(b, slot, BEGIN), told(b, slot, FULL_BEGIN), told(b, slot, FULL_END)
        sum_row = told(b, slot, SUM_ROW)
        for _ in range(GROUPS):
            for row in range(begin, begin + steps * TILE_Q, TILE_Q):
                stage = turn & 1
                mbarrier.wait(b.full.index(stage), turn >> 1)
                q_tile, dout_tile = b.q.index(stage), b.dout.index(stage)
                zeros = gl.zeros([64, TILE_Q], gl.float32, OF_S)
                minus_delta = here(gl.broadcast(row_vector(b.delta.index(stage), OF_S), zeros)[0])
                s = warpgroup_mma(b.k.index(ME), q_tile.permute((1, 0)), zeros, use_acc=False, is_async=True)
                dp = warpgroup_mma(b.v.index(ME), dout_tile.permute((1, 0)), minus_delta, is_async=True)
                s = warpgroup_mma_wait(1, deps=[s])
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
                dk_tile, ds = warpgroup_mma_wait(0, deps=[dk_tile, ds])
                mbarrier.arrive(b.empty.index(stage), count=1)
                turn = (turn + 1) & 3
            sum_row += rows
        mbarrier.arrive(b.kv_empty.index(0), count=1)
        write(dv_tile, b, slot, of_dv, packed, ME)
        write(dk_tile * scale, b, slot, of_dk, packed, ME)
        slot ^= 1
        mbarrier.wait(b.kv_full.index(0), slot)
        steps = told(b, slot, STEPS)
    tma.store_wait(0)


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
    rows = gl.expand_dims(row - told(b, slot, DIAGONAL) + gl.arange(0, TILE_Q, gl.SliceLayout(0, layout)), 0)
    seen = keys < len_k - told(b, slot, FIRST_KEY)
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


@gluon.jit
def write(tile, b, slot, descriptor, packed, ME: gl.constexpr):
    """64 rows of dK or dV, through shared memory."""
    staged = b.dq.index(ME)._reinterpret(descriptor.dtype, [64, tile.shape[1]], gl.NVMMASharedLayout(128, 16))
    tma.store_wait(0)
    staged.store(tile.to(descriptor.dtype))
    fence_async_shared()
    batch = told(b, slot, BATCH)
    rows = Rows(batch, None, None) if packed.table is None else Rows(None, batch, 0)
    put(descriptor, rows, told(b, slot, HEAD), told(b, slot, FIRST_KEY) + 64 * ME, staged)


@gluon.jit(do_not_specialize=RUN_TIME)
def backward_kernel(
    q, k, v, dout, stats, dq_sum, dk, dv, starts_q, starts_k, table,
    strides_q, strides_k, strides_v, strides_dout, strides_dk, strides_dv,
    batches, heads, len_q, len_k, left, right, scale, softcap,
    GROUPS: gl.constexpr, E: gl.constexpr, TILE_Q: gl.constexpr,
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
    sizes = Sizes(batches, heads, heads // GROUPS, len_q, len_k, left, right, Packed(starts_q, starts_k, table))
    # Of the 504 registers for three threads, one of each role, the producer needs the fewest.
    gl.warp_specialize(
        [
            (consume, (0, b, sizes, dq_sum, dk, dv, strides_dk, strides_dv, scale, softcap, GROUPS, E, TILE_Q)),
            (consume, (1, b, sizes, dq_sum, dk, dv, strides_dk, strides_dv, scale, softcap, GROUPS, E, TILE_Q)),
            (produce, (b, sizes, q, k, v, dout, stats, strides_q, strides_k, strides_v, strides_dout,
                       GROUPS, E, TILE_Q)),
        ],
        [4, 1], [240, 24],
    )  # fmt: skip
