"""The backward on Hopper: dQ, dK and dV by one kernel over tiles of keys, between two small passes over the queries.

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
and q and dout are zero beyond the end of the queries, so that these rows add nothing. The order in which tiles of keys
add to dQ is not fixed: its last bits differ from run to run.
"""

from typing import NamedTuple

import triton
import triton.language as tl
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

from attn_n.backends.triton.portable.tile import (
    LN2,
    LOG2E,
    ROW_PADDING,
    load,
    matrix,
    place,
    queries_that_see,
    rows_of,
    store,
)

TILE_K = gl.constexpr(128)  # 64 for each consumer

RUN_TIME = ("stride_n", "heads", "padded", "len_q", "len_k", "rows_q", "rows_k", "left", "right", "batches")


@triton.jit
def sum_row(batch, len_q):
    """Where the rows of a sequence begin in a head of `stats` and `dq_sum`: ROW_PADDING rows follow each sequence.

    Hence tiles of rows are read, and added, without a mask.
    """
    return batch * len_q + batch * ROW_PADDING


@triton.jit(do_not_specialize=RUN_TIME)
def prepare_kernel(
    out, dout, lse, dlse, stats, dq_sum, counter, sinks, dn, strides_out, strides_dout, stride_n,
    padded, heads, len_q, WIDTH: tl.constexpr, TILE_Q: tl.constexpr,
):  # fmt: skip
    """For a tile of rows: lse in base 2, `delta = rowsum(dout * out) - dlse`, a sum of zeros for dQ, a share of dn.

    lse is infinite and delta 0 beyond the end. `stats` has lse and -delta.
    """
    if tl.program_id(0) == 0:
        tl.store(counter, 0)
    tiles = tl.cdiv(len_q, TILE_Q)
    tile, head, batch, first_q, _, len_q, _ = place(None, None, heads, len_q, len_q, tiles)
    first_row = tile * TILE_Q

    rows = first_row + tl.arange(0, TILE_Q)
    of_out, of_dout = matrix(out, strides_out, batch, head, first_q), matrix(dout, strides_dout, batch, head, first_q)
    out_tile = load(of_out, 0, first_row, len_q, strides_out, WIDTH, TILE_Q, WIDTH, False)
    dout_tile = load(of_dout, 0, first_row, len_q, strides_dout, WIDTH, TILE_Q, WIDTH, False)
    of_lse, step = rows_of(lse, batch, head, heads, first_q, len_q, False)
    row_lse = tl.load(of_lse + rows * step, mask=rows < len_q, other=float("inf")) * LOG2E
    row_delta = tl.sum(out_tile.to(tl.float32) * dout_tile.to(tl.float32), 1)
    if dlse is not None:
        of_dlse, _ = rows_of(dlse, batch, head, heads, first_q, len_q, False)
        row_delta -= tl.load(of_dlse + rows * step, mask=rows < len_q, other=0.0)
    sums = head.to(tl.int64) * padded + sum_row(batch, len_q) + rows
    tl.store(stats + sums, row_lse)
    tl.store(stats + heads.to(tl.int64) * padded + sums, -row_delta)
    columns = tl.arange(0, WIDTH)[None, :]
    tl.store(dq_sum + sums[:, None] * WIDTH + columns, tl.zeros((TILE_Q, WIDTH), tl.float32))
    if dn is not None:
        # exp(log n - lse) * delta, or without sinks exp(-lse) * delta, which is the gradient of n itself
        sink = tl.load(sinks + head * stride_n) * LOG2E if sinks is not None else 0.0
        share = tl.exp2(tl.minimum(sink - row_lse, 126.0))
        tl.store(dn + tl.program_id(0), -tl.sum(share * row_delta))


@triton.jit(do_not_specialize=RUN_TIME)
def round_kernel(
    dq_sum, dq, strides_dq, padded, heads, len_q, scale, WIDTH: tl.constexpr, TILE_Q: tl.constexpr,
):  # fmt: skip
    """dQ in its own dtype, from the sum in float32.

    That consists of tiles of 64 x 64 in the order in which a product lies in registers: 8 columns by 8; then 4 warps of
    16 rows, of each 8 x 4 threads, of each 2 x 2 numbers, which are 8 rows apart.
    """
    tiles = tl.cdiv(len_q, TILE_Q)
    tile, head, batch, first_q, _, len_q, _ = place(None, None, heads, len_q, len_q, tiles)
    first_row = tile * TILE_Q
    row = head.to(tl.int64) * padded + sum_row(batch, len_q) + first_row
    x = tl.load(dq_sum + row * WIDTH + tl.arange(0, TILE_Q * WIDTH)) * scale
    x = x.reshape(TILE_Q // 64, WIDTH // 64, 8, 4, 8, 4, 2, 2).permute(0, 3, 6, 4, 1, 2, 5, 7).reshape(TILE_Q, WIDTH)
    store(matrix(dq, strides_dq, batch, head, first_q), x, first_row, len_q, strides_dq, WIDTH, TILE_Q, WIDTH)


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
    heads: gl.tensor  # of keys
    len_q: gl.tensor
    len_k: gl.tensor
    left: gl.tensor
    right: gl.tensor
    padded: gl.tensor  # rows of a head in stats and dq_sum


# What the producer says of a tile of keys, and where among its numbers.
FIELDS = gl.constexpr(10)
STEPS = gl.constexpr(0)  # tiles of queries that see it; -1: there are no more tiles of keys
BEGIN = gl.constexpr(1)  # the first row of the first one
FULL_BEGIN = gl.constexpr(2)  # those from here
FULL_END = gl.constexpr(3)  # to there need no mask
SUM_ROW = gl.constexpr(4)  # the row in dq_sum of the sequence's first query
KEYS = gl.constexpr(5)  # from the tile's first one to the end of the sequence
DIAGONAL = gl.constexpr(6)  # the query at the position of the first key
BATCH = gl.constexpr(7)
HEAD = gl.constexpr(8)
ROW_K = gl.constexpr(9)  # the row in k of the first key


@gluon.jit
def describe(x, sizes, heads, rows, strides, TILE: gl.constexpr, WIDTH: gl.constexpr):
    """A descriptor for tiles of rows. Made here and not by the host, where it takes longer than a short kernel runs."""
    return tma.make_tensor_descriptor(
        x, [sizes.batches, heads, rows, WIDTH], [strides[0], strides[1], strides[2], 1], [1, 1, TILE, WIDTH],
        gl.NVMMASharedLayout(128, 16, rank=4),
    )  # fmt: skip


@gluon.jit
def fetch(descriptor, batch, head, row, full, buffer):
    tma.async_copy_global_to_shared(
        descriptor, [batch, head, row, 0], full,
        buffer._reinterpret(descriptor.dtype, descriptor.block_type.shape, descriptor.layout),
    )  # fmt: skip


@gluon.jit
def tell(b, slot, FIELD: gl.constexpr, number):
    b.tile.index(slot * FIELDS + FIELD).store(gl.full([1], number, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))


@gluon.jit
def told(b, slot, FIELD: gl.constexpr):
    return gl.max(b.tile.index(slot * FIELDS + FIELD).load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def produce(
    b, sizes, q, k, v, dout, stats, counter, strides_q, strides_k, strides_v, strides_dout,
    GROUPS: gl.constexpr, WIDTH: gl.constexpr, TILE_Q: gl.constexpr,
):  # fmt: skip
    heads, heads_q, len_q, len_k, padded = sizes.heads, sizes.heads * GROUPS, sizes.len_q, sizes.len_k, sizes.padded
    tiles = gl.cdiv(len_k, TILE_K)
    items = sizes.batches * heads * tiles
    of_q = describe(q, sizes, heads_q, len_q, strides_q, TILE_Q, WIDTH)
    of_stats = tma.make_tensor_descriptor(
        stats, [2 * heads_q, padded], [padded.to(gl.int64), 1], [1, TILE_Q], gl.NVMMASharedLayout(0, 32)
    )
    of_k = describe(k, sizes, heads, len_k, strides_k, 64, WIDTH)
    of_v = describe(v, sizes, heads, len_k, strides_v, 64, WIDTH)
    of_dout = describe(dout, sizes, heads_q, len_q, strides_dout, TILE_Q, WIDTH)

    turn, slot = 0, 0  # how many tiles of queries so far, and how many of keys, modulo 2
    item = gl.program_id(0)
    while item < items:
        tile, head, batch = item % tiles, (item // tiles) % heads, item // tiles // heads
        first_key = tile * TILE_K
        begin, full_begin, full_end, end = queries_that_see(
            first_key, len_q, len_k, sizes.left, sizes.right, TILE_Q, TILE_K
        )
        if first_key + TILE_K > len_k:
            full_end = full_begin
        steps = gl.cdiv(gl.maximum(end - begin, 0), TILE_Q)
        first_sum = sum_row(batch, len_q)
        mbarrier.wait(b.kv_empty, slot ^ 1)
        tell(b, slot, STEPS, steps)
        tell(b, slot, BEGIN, begin)
        tell(b, slot, FULL_BEGIN, full_begin)
        tell(b, slot, FULL_END, full_end)
        tell(b, slot, SUM_ROW, first_sum + head * GROUPS * padded)
        tell(b, slot, KEYS, len_k - first_key)
        tell(b, slot, DIAGONAL, first_key - (len_k - len_q))
        tell(b, slot, BATCH, batch)
        tell(b, slot, HEAD, head)
        tell(b, slot, ROW_K, first_key)
        mbarrier.arrive(b.kv_full, count=1)
        mbarrier.expect(b.kv_full, 2 * (of_k.block_type.nbytes + of_v.block_type.nbytes))
        for c in gl.static_range(2):
            key = first_key + 64 * c
            fetch(of_k, batch, head, key, b.kv_full, b.k.index(c))
            fetch(of_v, batch, head, key, b.kv_full, b.v.index(c))
        slot ^= 1
        for head_q in range(head * GROUPS, head * GROUPS + GROUPS):
            for step in range(steps):
                row = begin + step * TILE_Q
                stage = turn & 1
                mbarrier.wait(b.empty.index(stage), (turn >> 1) ^ 1)
                full = b.full.index(stage)
                mbarrier.expect(full, 2 * (of_q.block_type.nbytes + of_stats.block_type.nbytes))
                fetch(of_q, batch, head_q, row, full, b.q.index(stage))
                tma.async_copy_global_to_shared(of_stats, [head_q, first_sum + row], full, b.lse.index(stage))
                fetch(of_dout, batch, head_q, row, full, b.dout.index(stage))
                tma.async_copy_global_to_shared(
                    of_stats, [heads_q + head_q, first_sum + row], full, b.delta.index(stage)
                )
                turn = (turn + 1) & 3
        # Now, while the consumers have the last tiles of queries before them: they do not notice how long it takes.
        item = gl.num_programs(0) + gl.atomic_add(counter, 1)
    mbarrier.wait(b.kv_empty, slot ^ 1)
    tell(b, slot, STEPS, -1)
    mbarrier.arrive(b.kv_full, count=2)


@builtin
def add_to_global(descriptor, coordinates, buffer, _semantic=None):
    """TMA's reduction, which Gluon 3.6 has no function for."""
    coordinates = _semantic._convert_to_ir_values(coordinates, require_i64=False)
    _semantic.builder.create_async_tma_reduce(
        ir.DESCRIPTOR_REDUCE_KIND.ADD, descriptor.handle, coordinates, buffer.handle
    )


@gluon.jit
def narrow(x, dtype: gl.constexpr, layout: gl.constexpr):
    """Two elements by one instruction, which the compiler does not find; then as the operand of a product."""
    if dtype == gl.bfloat16:
        x = gl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], gl.bfloat16, True, 2)
    else:
        x = gl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [x], gl.float16, True, 2)
    return gl.convert_layout(x, layout, assert_trivial=True)


@gluon.jit
def consume(
    ME: gl.constexpr, b, sizes, results,
    GROUPS: gl.constexpr, WIDTH: gl.constexpr, TILE_Q: gl.constexpr, PART: gl.constexpr,
):  # fmt: skip
    dq_sum, dk, dv, strides_dk, strides_dv, scale, softcap = results
    dtype: gl.constexpr = b.k.dtype
    PARTS: gl.constexpr = TILE_Q // PART
    of_s: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PART, 16])
    of_dkv: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    of_dq: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, of_dkv, 2)

    sums = tma.make_tensor_descriptor(
        dq_sum,
        [sizes.heads * GROUPS * sizes.padded, WIDTH],
        [WIDTH, 1],
        [4096 // WIDTH, WIDTH],
        gl.NVMMASharedLayout(0, 32),
    )
    of_dk = describe(dk, sizes, sizes.heads, sizes.len_k, strides_dk, 64, WIDTH)
    of_dv = describe(dv, sizes, sizes.heads, sizes.len_k, strides_dv, 64, WIDTH)
    turn, slot = 0, 0  # as in the producer
    mbarrier.wait(b.kv_full, slot)
    steps = told(b, slot, STEPS)
    while steps >= 0:
        dk_tile = gl.zeros([64, WIDTH], gl.float32, of_dkv)
        dv_tile = gl.zeros([64, WIDTH], gl.float32, of_dkv)
        begin, full_begin, full_end = told(b, slot, BEGIN), told(b, slot, FULL_BEGIN), told(b, slot, FULL_END)
        sum_row = told(b, slot, SUM_ROW)
        for _ in range(GROUPS):
            for row in range(begin, begin + steps * TILE_Q, TILE_Q):
                stage = turn & 1
                mbarrier.wait(b.full.index(stage), turn >> 1)
                s, dp = (), ()
                for i in gl.static_range(PARTS):
                    zeros = gl.zeros([64, PART], gl.float32, of_s)
                    q_tile = b.q.index(stage).slice(i * PART, PART, 0).permute((1, 0))
                    s += (warpgroup_mma(b.k.index(ME), q_tile, zeros, use_acc=False, is_async=True),)
                    dout_tile = b.dout.index(stage).slice(i * PART, PART, 0).permute((1, 0))
                    minus_delta = gl.broadcast(row_vector(b.delta.index(stage), i * PART, PART, of_s), zeros)[0]
                    dp += (warpgroup_mma(b.v.index(ME), dout_tile, minus_delta, is_async=True),)
                p_operands, ds_operands = (), ()
                for i in gl.static_range(PARTS):
                    lse = row_vector(b.lse.index(stage), i * PART, PART, of_s)
                    products = warpgroup_mma_wait(2 * PARTS - 1 - i, deps=[s[i]])
                    if softcap is None:
                        p = gl.exp2(products * scale - lse)
                    else:
                        capped = tanh(products * (scale / softcap))
                        p = gl.exp2(capped * softcap - lse)
                    if (row < full_begin) | (row >= full_end):
                        p = gl.where(visible(b, slot, sizes, row + i * PART, ME, of_s, PART), p, 0.0)
                    p_operands += (narrow(p, dtype, operand),)
                    if softcap is not None:
                        p *= 1 - capped * capped
                    dp_done = warpgroup_mma_wait(2 * PARTS - 2 - i, deps=[dp[i]])
                    dv_tile = warpgroup_mma(
                        p_operands[i], b.dout.index(stage).slice(i * PART, PART, 0), dv_tile, is_async=True
                    )
                    ds = narrow(p * dp_done, dtype, operand)
                    ds_operands += (ds,)
                    b.ds.index(2 * stage + ME).slice(i * PART, PART, 1).store(
                        gl.convert_layout(ds, of_s, assert_trivial=True)
                    )
                fence_async_shared()
                meet()
                dq = dq_part(b, stage, ME, WIDTH, of_dq)
                for i in gl.static_range(PARTS):
                    q_tile = b.q.index(stage).slice(i * PART, PART, 0)
                    dk_tile = warpgroup_mma(ds_operands[i], q_tile, dk_tile, is_async=True)
                dv_tile, dq = warpgroup_mma_wait(PARTS, deps=[dv_tile, dq] + p_operands)[:2]
                tma.store_wait(0)
                b.dq.index(ME).store(dq)
                fence_async_shared()
                flat = b.dq.index(ME)._reinterpret(gl.float32, sums.block_type.shape, sums.layout)
                add_to_global(sums, [sum_row + row + ME * (4096 // WIDTH), 0], flat)
                dk_tile = warpgroup_mma_wait(0, deps=[dk_tile] + ds_operands)[0]
                mbarrier.arrive(b.empty.index(stage), count=1)
                turn = (turn + 1) & 3
            sum_row += sizes.padded
        mbarrier.arrive(b.kv_empty, count=1)
        write(dv_tile, b, slot, of_dv, ME)
        write(dk_tile * (scale * LN2), b, slot, of_dk, ME)
        slot ^= 1
        mbarrier.wait(b.kv_full, slot)
        steps = told(b, slot, STEPS)
    tma.store_wait(0)


@gluon.jit
def meet():
    """A barrier of both consumers. One of memory takes longer, and Gluon 3.6 has no other."""
    gl.inline_asm_elementwise("mov.b32 $0, $1; bar.sync 8, 256;", "=r,r", [0], gl.int32, False, 1)


@gluon.jit
def row_vector(buffer, FIRST: gl.constexpr, LENGTH: gl.constexpr, layout: gl.constexpr):
    """LENGTH numbers in shared memory as (1, LENGTH) in registers."""
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    row = buffer._reinterpret(buffer.dtype, [buffer.shape[1]], flat).slice(FIRST, LENGTH)
    return gl.expand_dims(row.load(gl.SliceLayout(0, layout)), 0)


@gluon.jit
def tanh(x):
    """Its error is one of the cap, a small fraction: that of the logits."""
    return 1 - gl.fdiv(2.0, 1 + gl.exp2(2 * LOG2E * x))


@gluon.jit
def visible(b, slot, sizes, first_row, ME: gl.constexpr, layout: gl.constexpr, PART: gl.constexpr):
    keys = gl.expand_dims(64 * ME + gl.arange(0, 64, gl.SliceLayout(1, layout)), 1)
    seen = keys < told(b, slot, KEYS)
    rows = gl.expand_dims(first_row - told(b, slot, DIAGONAL) + gl.arange(0, PART, gl.SliceLayout(0, layout)), 0)
    if sizes.right is not None:
        seen = seen & (keys <= rows + sizes.right)
    if sizes.left is not None:
        seen = seen & (keys >= rows - sizes.left)
    return seen


@gluon.jit
def dq_part(b, stage, ME: gl.constexpr, WIDTH: gl.constexpr, layout: gl.constexpr):
    """64 x 64 of dS K: of wide heads a half of the columns, of narrow ones a half of the rows."""
    zeros = gl.zeros([64, 64], gl.float32, layout)
    if WIDTH == 128:
        dq = warpgroup_mma(
            b.ds.index(2 * stage).permute((1, 0)),
            b.k.index(0).slice(64 * ME, 64, 1),
            zeros,
            use_acc=False,
            is_async=True,
        )
        return warpgroup_mma(
            b.ds.index(2 * stage + 1).permute((1, 0)), b.k.index(1).slice(64 * ME, 64, 1), dq, is_async=True
        )
    else:
        dq = warpgroup_mma(
            b.ds.index(2 * stage).slice(64 * ME, 64, 1).permute((1, 0)),
            b.k.index(0),
            zeros,
            use_acc=False,
            is_async=True,
        )
        return warpgroup_mma(
            b.ds.index(2 * stage + 1).slice(64 * ME, 64, 1).permute((1, 0)), b.k.index(1), dq, is_async=True
        )


@gluon.jit
def write(tile, b, slot, descriptor, ME: gl.constexpr):
    """64 rows of dK or dV, through shared memory."""
    staged = b.dq.index(ME)._reinterpret(descriptor.dtype, [64, tile.shape[1]], gl.NVMMASharedLayout(128, 16))
    tma.store_wait(0)
    staged.store(tile.to(descriptor.dtype))
    fence_async_shared()
    row = told(b, slot, ROW_K) + 64 * ME
    tma.async_copy_shared_to_global(
        descriptor, [told(b, slot, BATCH), told(b, slot, HEAD), row, 0],
        staged._reinterpret(descriptor.dtype, descriptor.block_type.shape, descriptor.layout),
    )  # fmt: skip


@gluon.jit(do_not_specialize=RUN_TIME)
def backward_kernel(
    q, k, v, dout, stats, dq_sum, dk, dv, counter,
    strides_q, strides_k, strides_v, strides_dout, strides_dk, strides_dv,
    padded, batches, heads, len_q, len_k, left, right, scale, softcap,
    GROUPS: gl.constexpr, WIDTH: gl.constexpr, TILE_Q: gl.constexpr, PART: gl.constexpr,
):  # fmt: skip
    """As many programs as fit the GPU at once; each goes through tiles of keys."""
    dtype: gl.constexpr = q.dtype.element_ty
    tiled: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    row: gl.constexpr = gl.NVMMASharedLayout(0, 32)
    # As a product lies in registers: by four numbers of a thread, then by threads. See `round_kernel`.
    in_order: gl.constexpr = gl.SharedLinearLayout(
        [[0, 1], [8, 0], [0, 2], [0, 4], [1, 0], [2, 0], [4, 0], [16, 0], [32, 0], [0, 8], [0, 16], [0, 32]]
    )
    b = Buffers(
        gl.allocate_shared_memory(dtype, [2, 64, WIDTH], tiled),
        gl.allocate_shared_memory(dtype, [2, 64, WIDTH], tiled),
        gl.allocate_shared_memory(dtype, [2, TILE_Q, WIDTH], tiled),
        gl.allocate_shared_memory(dtype, [2, TILE_Q, WIDTH], tiled),
        gl.allocate_shared_memory(gl.float32, [2, 1, TILE_Q], row),
        gl.allocate_shared_memory(gl.float32, [2, 1, TILE_Q], row),
        gl.allocate_shared_memory(dtype, [4, 64, TILE_Q], tiled),
        gl.allocate_shared_memory(gl.float32, [2, 64, 64], in_order),
        gl.allocate_shared_memory(gl.int32, [2 * FIELDS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0])),
        barriers(1, 2), barriers(1, 2), barriers(2, 1), barriers(2, 2),
    )  # fmt: skip
    fence_async_shared()
    sizes = Sizes(batches, heads, len_q, len_k, left, right, padded)
    results = (dq_sum, dk, dv, strides_dk, strides_dv, scale, softcap)
    # Of the 504 registers for three threads, one of each role, the producer needs the fewest.
    gl.warp_specialize(
        [
            (consume, (0, b, sizes, results, GROUPS, WIDTH, TILE_Q, PART)),
            (consume, (1, b, sizes, results, GROUPS, WIDTH, TILE_Q, PART)),
            (produce, (b, sizes, q, k, v, dout, stats, counter, strides_q, strides_k, strides_v, strides_dout,
                       GROUPS, WIDTH, TILE_Q)),
        ],
        [4, 1], [240, 24],
    )  # fmt: skip


@gluon.jit
def barriers(NUMBER: gl.constexpr, ARRIVALS: gl.constexpr):
    """A ring of barriers; a single one for NUMBER = 1."""
    if NUMBER == 1:
        bars = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        mbarrier.init(bars, count=ARRIVALS)
        return bars
    else:
        bars = gl.allocate_shared_memory(gl.int64, [NUMBER, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(NUMBER):
            mbarrier.init(bars.index(i), count=ARRIVALS)
        return bars
