"""The forward kernel for Hopper (sm_90): warps with roles, and wgmma on tiles that the copy engine brings.

    producer, one warp      q --> [Q strip per consumer]    k --> [K ring]    v --> [V ring]
                                  full | empty                full | empty      full | empty
    consumers, 4 warps each  S = Q K^T, softmax, O += P V of 64 queries;  O --> [out strip] --> out

Every buffer has two barriers: `full` ends a phase when the bytes that the producer asked for have come, `empty` when
each consumer that reads it has arrived. A role counts the stage of a ring and the parity of its phase by itself. K and
V have barriers of their own, so that the next S need not wait for this V.

A consumer keeps two products in flight: S of a block begins before O of the block in front of it, and the softmax of S
runs while that O is computed. O is rescaled only where a maximum has grown much (LAZY: +4 to 8 % at E = 256; at E = 128
+2 to 3 %, if the weights are ready before O is waited for; at E = 64 so too +2 % under a causal mask, else -3 %).
Blocks of keys come from the last to the first, so that those under the diagonal come first. Two or three consumers
share keys and values; for few keys two programs of one consumer each fit a processor, of which one computes while the
other begins or ends a tile (+2 to 15 % at 512 keys).

Programs stay (+7 % at 2,048 keys), and the producer tells the consumers their next tile, by numbers in shared memory:
what is read there the compiler knows to be the same for all threads, so that addresses stay in uniform registers (+2 to
4 % at E = 64 over loops of their own). Which one is next: without a causal mask all take equally long and come in turn.
Under one programs take pairs of tiles, one from each end of a sequence; or for long sequences, when waiting for it does
not show, the next tile that nobody has taken, heavy ones first (+1 to 8 % from 2,048 keys on, most where pairs do not
fill the last round). Of packed sequences they so go through a list, see `packed`.
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

from attn_n.backends.triton.hopper.pipeline import (
    Packed,
    Rows,
    barriers,
    blocks_seen,
    bring,
    following,
    put,
    rounded,
    tell,
    tiles_of,
    told,
)
from attn_n.backends.triton.hopper.schedule import rows_of_sequence, sequence_of, tile_and_head
from attn_n.backends.triton.portable.tile import LN2, LOG2E, tanh

STRIP = gl.constexpr(64)  # queries of a consumer: the rows of a wgmma
# LAZY: what is subtracted from the logits of a row lags behind their maximum by up to this, in base 2, so that O is
# seldom rescaled. Weights are then up to 256, for which float16 and the sums have room. (As in FlashAttention 4.)
LAG = gl.constexpr(8.0)

RUN_TIME = (
    "strides_q", "strides_k", "strides_v", "strides_out", "stride_n", "batch", "heads", "len_q", "len_k", "left",
    "right", "items", "together",
)  # fmt: skip


class Shared(NamedTuple):
    """What the roles share: memory, and the barriers on it."""

    q: gl.shared_memory_descriptor  # [CONSUMERS, 64, E]
    k: gl.shared_memory_descriptor  # [STAGES, TILE_K, E]
    v: gl.shared_memory_descriptor
    out: gl.shared_memory_descriptor  # as q, or q itself
    q_full: gl.shared_memory_descriptor
    q_empty: gl.shared_memory_descriptor
    k_full: gl.shared_memory_descriptor
    k_empty: gl.shared_memory_descriptor
    v_full: gl.shared_memory_descriptor
    v_empty: gl.shared_memory_descriptor
    tile: gl.shared_memory_descriptor  # [2 * FIELDS, 1]: the numbers of a tile and of the next one
    tile_full: gl.shared_memory_descriptor  # free again when the q of the tile between them are


class Sizes(NamedTuple):
    items: gl.tensor
    heads: gl.tensor
    len_q: gl.tensor
    len_k: gl.tensor
    left: gl.tensor  # None for no bound on that side
    right: gl.tensor
    together: gl.tensor  # heads whose tiles of one length are taken one behind the other


class Tile(NamedTuple):
    """The queries that the roles are at, and the rows of their sequence."""

    place: gl.tensor  # batch times heads plus head; not of packed sequences
    head: gl.tensor
    first: gl.tensor
    rows_q: Rows
    rows_k: Rows
    sizes: Sizes  # of the sequence


# What the producer says of a tile of queries.
FIELDS = gl.constexpr(5)
FIRST = gl.constexpr(0)  # -1: there are no more
HEAD = gl.constexpr(1)  # of batches counted through all of them
END_Q = gl.constexpr(2)  # of packed sequences
LEN_Q = gl.constexpr(3)
LEN_K = gl.constexpr(4)


class Results(NamedTuple):
    """Where they go, and what the logits and n are."""

    of_out: gl.tensor
    lse: gl.tensor
    sinks: gl.tensor  # log n of each head, or None: then the number log_n, or None
    stride_n: gl.tensor
    log_n: gl.tensor
    scale: gl.tensor
    softcap: gl.tensor


@gluon.jit
def sums_of_threads(p, TILE_K: gl.constexpr, LAYOUT: gl.constexpr):
    """Row sums that each thread makes of its own numbers, `(64, 4)`: they meet once, at the end (up to +5 %)."""
    parts = gl.sum(gl.sum(gl.reshape(p, [STRIP, TILE_K // 8, 4, 2]), axis=3), axis=1)
    return gl.convert_layout(parts, LAYOUT, assert_trivial=True)


@gluon.jit
def produce(
    b, of_q, of_k, of_v, sizes, packed,
    GROUPS: gl.constexpr, TILE_K: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr,
):  # fmt: skip
    TILE_Q: gl.constexpr = CONSUMERS * STRIP
    heads, tiles = sizes.heads, gl.cdiv(sizes.len_q, TILE_Q)
    stage, phase, turn = 0, 1, 0
    item, items = gl.program_id(0), sizes.items
    if packed.starts_q is not None:
        items = gl.load(packed.table + 1) * heads
    while item < items:
        count = 1
        if packed.starts_q is not None:
            # Heads whose keys and values together take 32 MB.
            IN_CACHE: gl.constexpr = (1 << 23) // of_k.block_type.shape[4]
            sequence, inside = sequence_of(packed.table, item, heads)
            start_q, len_q = rows_of_sequence(packed.starts_q, sequence)
            start_k, len_k = rows_of_sequence(packed.starts_k, sequence)
            tiles = gl.cdiv(len_q, TILE_Q)
            tile, head = tile_and_head(inside, tiles, heads, IN_CACHE // gl.maximum(len_k, 1) * GROUPS)
            first = (tiles - 1 - tile) * TILE_Q  # of causal ones the last takes the longest
            rows_q, rows_k = Rows(None, start_q + len_q, len_q), Rows(None, start_k + len_k, len_k)
            of_tile = Sizes(None, heads, len_q, len_k, sizes.left, sizes.right, None)
        else:
            if packed.table is not None:  # heavy ones first
                tile, place = tile_and_head(item, tiles, items // tiles, sizes.together)
                first = (tiles - 1 - tile) * TILE_Q
            elif sizes.left is None and sizes.right is not None:
                pairs = gl.cdiv(tiles, 2)
                place, tile = item // pairs, item % pairs
                first = (tiles - 1 - tile) * TILE_Q
                count = gl.where(tile == tiles - 1 - tile, 1, 2)  # the middle one has no other
            else:
                place, tile = item // tiles, item % tiles
                first = tile * TILE_Q
            head = place % heads
            rows_q = Rows(place // heads, None, None)
            rows_k, of_tile = rows_q, sizes
        for _ in range(count):
            slot = turn & 1
            tell(b.tile, slot * FIELDS + FIRST, first)
            tell(b.tile, slot * FIELDS + LEN_Q, of_tile.len_q)
            tell(b.tile, slot * FIELDS + LEN_K, of_tile.len_k)
            if packed.starts_q is None:
                tell(b.tile, slot * FIELDS + HEAD, place)
            else:
                tell(b.tile, slot * FIELDS + HEAD, head)
                tell(b.tile, slot * FIELDS + END_Q, rows_q.end)
            mbarrier.arrive(b.tile_full.index(slot), count=1)
            at = Tile(None, head, first, rows_q, rows_k, of_tile)
            stage, phase = bring_tile(
                b, of_q, of_k, of_v, at, stage, phase, slot ^ 1, GROUPS, TILE_K, STAGES, CONSUMERS
            )
            turn = (turn + 1) & 3
            first = tile * TILE_Q
        if packed.table is None:
            item += gl.num_programs(0)
        else:
            # Now, while the consumers have the last blocks before them: they do not notice how long it takes.
            item = gl.num_programs(0) + gl.atomic_add(packed.table, 1, sem="relaxed")
    tell(b.tile, (turn & 1) * FIELDS + FIRST, -1)
    mbarrier.arrive(b.tile_full.index(turn & 1), count=1)


@gluon.jit
def bring_tile(
    b, of_q, of_k, of_v, at, stage, phase, q_phase,
    GROUPS: gl.constexpr, TILE_K: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr,
):  # fmt: skip
    """Queries, and the keys and values that they see."""
    begin, _full_begin, _full_end, end = blocks_seen(at.first, at.first + CONSUMERS * STRIP - 1, at.sizes, TILE_K)
    head_kv, last = at.head // GROUPS, end - 1
    # The first keys before the queries, whose buffers become free one by one.
    bring_block(of_k, at.rows_k, head_kv, last * TILE_K, b.k, b.k_full, b.k_empty, stage, phase)
    for c in gl.static_range(CONSUMERS):
        bring_block(of_q, at.rows_q, at.head, at.first + c * STRIP, b.q, b.q_full, b.q_empty, c, q_phase)
    for block in range(last, begin - 1, -1):
        bring_block(of_v, at.rows_k, head_kv, block * TILE_K, b.v, b.v_full, b.v_empty, stage, phase)
        stage, phase = following(stage, phase, STAGES)
        if block > begin:
            bring_block(of_k, at.rows_k, head_kv, (block - 1) * TILE_K, b.k, b.k_full, b.k_empty, stage, phase)
    return stage, phase


@gluon.jit
def bring_block(descriptor, rows, head, row, buffers, full, empty, stage, phase):
    mbarrier.wait(empty.index(stage), phase)
    mbarrier.expect(full.index(stage), descriptor.block_type.nbytes)
    bring(descriptor, rows, head, row, full.index(stage), buffers.index(stage))


@gluon.jit
def consume(
    ME: gl.constexpr, b, sizes, results,
    E: gl.constexpr, TILE_K: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr,
    Q_IN_REGISTERS: gl.constexpr, OUT_APART: gl.constexpr, LAZY: gl.constexpr, WEIGHTS_FIRST: gl.constexpr,
    ONE_EDGE: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    factor = results.scale * LOG2E if results.softcap is None else 1.0
    heads = sizes.heads
    stage, phase, turn = 0, 0, 0
    mbarrier.wait(b.tile_full.index(0), 0)
    first = told(b.tile, FIRST)
    while first >= 0:
        slot = turn & 1
        len_q = told(b.tile, slot * FIELDS + LEN_Q)
        of_sequence = Sizes(None, heads, len_q, told(b.tile, slot * FIELDS + LEN_K), sizes.left, sizes.right, None)
        if PACKED:
            rows = Rows(None, told(b.tile, slot * FIELDS + END_Q), len_q)
            at = Tile(None, told(b.tile, slot * FIELDS + HEAD), first, rows, None, of_sequence)
        else:
            place = told(b.tile, slot * FIELDS + HEAD)
            rows = Rows(place // heads, None, None)
            at = Tile(place, place % heads, first, rows, rows, of_sequence)
        stage, phase = attend(
            ME, b, at, results, factor, stage, phase, slot,
            E, TILE_K, STAGES, CONSUMERS, Q_IN_REGISTERS, OUT_APART, LAZY, WEIGHTS_FIRST, ONE_EDGE,
        )  # fmt: skip
        turn = (turn + 1) & 3
        mbarrier.wait(b.tile_full.index(turn & 1), turn >> 1)
        first = told(b.tile, (turn & 1) * FIELDS + FIRST)
    tma.store_wait(0)


@gluon.jit
def attend(
    ME: gl.constexpr, b, at, results, factor, stage, phase, q_phase,
    E: gl.constexpr, TILE_K: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr,
    Q_IN_REGISTERS: gl.constexpr, OUT_APART: gl.constexpr, LAZY: gl.constexpr, WEIGHTS_FIRST: gl.constexpr,
    ONE_EDGE: gl.constexpr,
):  # fmt: skip
    """The 64 queries of a consumer."""
    of_out, lse, sinks, stride_n, log_n, scale, softcap = results
    len_q, len_k = at.sizes.len_q, at.sizes.len_k
    dtype: gl.constexpr = of_out.dtype
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TILE_K, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, E, 16])
    P: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUT, k_width=2)
    ROWS: gl.constexpr = gl.SliceLayout(1, S)
    # Of the sums that each thread makes of its own numbers.
    PARTS: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[8, 0]], lane_bases=[[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], warp_bases=[[16, 0], [32, 0]],
        block_bases=[], shape=[STRIP, 4],
    )  # fmt: skip
    BOUNDED: gl.constexpr = at.sizes.left is not None or at.sizes.right is not None
    HIDDEN: gl.constexpr = BOUNDED or at.place is None  # whether rows may see no key: a sequence may have none
    first = at.first
    begin, _full_begin, _full_end, end = blocks_seen(first, first + CONSUMERS * STRIP - 1, at.sizes, TILE_K)
    first += ME * STRIP
    own_begin, full_begin, full_end, own_end = begin, 0, len_k // TILE_K, end
    if BOUNDED:
        own_begin, full_begin, full_end, own_end = blocks_seen(first, first + STRIP - 1, at.sizes, TILE_K)
        own_end = gl.minimum(own_end, end)
        own_begin = gl.maximum(gl.minimum(own_begin, own_end - 1), begin)
    rows = first + gl.arange(0, STRIP, layout=ROWS)

    mbarrier.wait(b.q_full.index(ME), q_phase)
    if Q_IN_REGISTERS:
        q = b.q.index(ME).load(gl.DotOperandLayout(operand_index=0, parent=S, k_width=2))
        fence_async_shared()
        mbarrier.arrive(b.q_empty.index(ME), count=1)
    else:
        q = b.q.index(ME)
    if BOUNDED:
        stage, phase = skip(b, end - own_end, stage, phase, STAGES)
    mbarrier.wait(b.k_full.index(stage), phase)
    s = gl.zeros([STRIP, TILE_K], gl.float32, layout=S)
    s = warpgroup_mma(q, b.k.index(stage).permute((1, 0)), s, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(b.k_empty.index(stage), count=1)
    s = capped(s, scale, softcap)
    if BOUNDED or own_end > full_end:
        s = visible(s, rows, (own_end - 1) * TILE_K, at.sizes, TILE_K, S)
    top = gl.max(s, axis=1) * factor
    p = gl.exp2(s * factor - gl.expand_dims(finite(top, HIDDEN), 1))
    sums = sums_of_threads(p, TILE_K, PARTS)
    weights = rounded(p, P, dtype)
    acc = gl.zeros([STRIP, E], gl.float32, layout=OUT)

    for i in range(1, own_end - own_begin):
        block = own_end - 1 - i
        next_stage, next_phase = following(stage, phase, STAGES)
        mbarrier.wait(b.k_full.index(next_stage), next_phase)
        s = warpgroup_mma(q, b.k.index(next_stage).permute((1, 0)), p, use_acc=False, is_async=True)
        mbarrier.wait(b.v_full.index(stage), phase)
        acc = warpgroup_mma(weights, b.v.index(stage), acc, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s])
        mbarrier.arrive(b.k_empty.index(next_stage), count=1)
        s = capped(s, scale, softcap)
        if not ONE_EDGE and ((block < full_begin) | (block >= full_end)):
            s = visible(s, rows, block * TILE_K, at.sizes, TILE_K, S)
        new_top = gl.maximum(top, gl.max(s, axis=1) * factor)
        if LAZY:
            new_top = gl.where(new_top - top > LAG, new_top, top)
        shift = finite(new_top, HIDDEN)
        p = gl.exp2(s * factor - gl.expand_dims(shift, 1))
        rescale = gl.exp2(top - shift)
        top = new_top
        more = sums_of_threads(p, TILE_K, PARTS)
        if WEIGHTS_FIRST:
            more = complete(more)
        sums = sums * column(rescale, PARTS) + more
        # Triton leaves the wait behind the softmax, because it waits for p too; ptxas does so with WEIGHTS_FIRST.
        acc, weights, p = warpgroup_mma_wait(0, deps=[acc, weights, p])
        mbarrier.arrive(b.v_empty.index(stage), count=1)
        acc = rescaled(acc, column(rescale, OUT)) if LAZY else acc * column(rescale, OUT)
        weights = rounded(p, P, dtype)
        stage, phase = next_stage, next_phase

    if OUT_APART and not Q_IN_REGISTERS:
        mbarrier.arrive(b.q_empty.index(ME), count=1)
    mbarrier.wait(b.v_full.index(stage), phase)
    acc = warpgroup_mma(weights, b.v.index(stage), acc, is_async=True)
    total = gl.convert_layout(gl.sum(sums, axis=1), ROWS, assert_trivial=True)
    rescale = gl.full([STRIP], 1.0, gl.float32, layout=ROWS)
    if sinks is not None or log_n is not None:
        sink = (log_n if sinks is None else gl.load(sinks + at.head * stride_n)) * LOG2E
        new_top = gl.maximum(top, sink)
        shift = finite(new_top, True)
        rescale = gl.exp2(top - shift)
        total = total * rescale + gl.exp2(sink - shift)
        top = new_top
    nothing = total == 0.0
    rescale = rescale / gl.where(nothing, 1.0, total)
    found = gl.where(nothing, float("-inf"), (top + gl.log2(total)) * LN2)
    if at.place is not None:
        gl.store(lse + at.place.to(gl.int64) * len_q + rows, found, mask=rows < len_q)
    else:
        of_lse = lse + (at.rows_q.end - len_q + rows).to(gl.int64) * at.sizes.heads + at.head
        gl.store(of_lse, found, mask=rows < len_q)
    acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])
    mbarrier.arrive(b.v_empty.index(stage), count=1)
    stage, phase = following(stage, phase, STAGES)
    if BOUNDED:
        stage, phase = skip(b, own_begin - begin, stage, phase, STAGES)

    acc = acc * column(rescale, OUT)
    if OUT_APART:
        strip = b.out.index(ME)
        tma.store_wait(0)
    else:
        strip = b.q.index(ME)
    strip.store(acc.to(dtype))
    fence_async_shared()
    if first < len_q:
        put(of_out, at.rows_q, at.head, first, 0, strip)
    if not OUT_APART:
        tma.store_wait(0)
        mbarrier.arrive(b.q_empty.index(ME), count=1)
    return stage, phase


@gluon.constexpr_function
def for_some(comparison, number, first, other, lines):
    """PTX: the lines, which a warp goes past if neither of two numbers of any thread compares so with `number`."""
    head = [
        ".reg .pred some;",
        f"setp.{comparison}.f32 some, {first}, {number};",
        f"setp.{comparison}.or.f32 some, {other}, {number}, some;",
        "vote.sync.any.pred some, some, 0xFFFFFFFF;",
        "@!some bra.uni PAST;",
    ]
    return "{" + "\n".join([*head, *lines, "PAST:"]) + "}"


@gluon.constexpr_function
def products(count):
    """PTX: the numbers of a thread times their factors, if some are not one. They are of two rows, in turns of two."""
    factors = [f"${2 * count + i}" for i in range(count)]
    lines = [f"mul.f32 ${i}, ${i}, {factor};" for i, factor in enumerate(factors)]
    return for_some("neu", "0f3F800000", factors[0], factors[2], lines)


@gluon.constexpr_function
def in_place(count):
    return ",".join(["=f"] * count + [str(i) for i in range(count)] + ["f"] * count)


@gluon.jit
def rescaled(acc, factor):
    COUNT: gl.constexpr = acc.shape[1] // 2  # numbers of a thread, of 128
    return gl.inline_asm_elementwise(
        products(COUNT), in_place(COUNT), [acc, factor], gl.float32, is_pure=True, pack=COUNT
    )


# No sum is negative. What is gone past is long, or the compiler would make no branch of it.
BRANCH = gl.constexpr(for_some("lt", "0f00000000", "$0", "$1", ["mul.f32 $0, $0, $1;"] * 16))


@gluon.jit
def complete(sums):
    """The same, behind a branch: the compiler moves nothing across that, so that what is summed up is complete."""
    return gl.inline_asm_elementwise(BRANCH, "=f,=f,0,1", [sums], gl.float32, is_pure=True, pack=2)


@gluon.jit
def skip(b, blocks, stage, phase, STAGES: gl.constexpr):
    """Let blocks pass that other consumers read."""
    for _ in range(blocks):
        mbarrier.wait(b.k_full.index(stage), phase)
        mbarrier.arrive(b.k_empty.index(stage), count=1)
        mbarrier.wait(b.v_full.index(stage), phase)
        mbarrier.arrive(b.v_empty.index(stage), count=1)
        stage, phase = following(stage, phase, STAGES)
    return stage, phase


@gluon.jit
def capped(s, scale, softcap):
    if softcap is not None:
        s = tanh(s * (scale / softcap)) * (softcap * LOG2E)
    return s


@gluon.jit
def eighths(COUNT: gl.constexpr, LAYOUT: gl.constexpr):
    """`8 * i` and `j` of the columns `8 * i + j` of a product, `(1, COUNT)`.

    In each eighth a thread has the same two j, and i are constants: so `8 * i <= x - j` is one instruction and takes no
    registers for the columns (+1 to 6 % up to 2,048 keys under a causal mask, +3 to 6 % with a window).
    """
    columns = gl.expand_dims(gl.arange(0, COUNT, layout=gl.SliceLayout(0, LAYOUT)), 0)
    return columns & -8, columns & 7


@gluon.jit
def visible(s, rows, first_key, sizes, TILE_K: gl.constexpr, LAYOUT: gl.constexpr):
    """s with -inf where a query does not see a key."""
    diagonal = gl.expand_dims(rows, 1) + (sizes.len_k - sizes.len_q - first_key)
    last = sizes.len_k - 1 - first_key
    if sizes.right is not None:
        last = gl.minimum(diagonal + sizes.right, last)
    eighth, rest = eighths(TILE_K, LAYOUT)
    seen = eighth <= last - rest
    if sizes.left is not None:
        seen = seen & (eighth >= diagonal - sizes.left - rest)
    return gl.where(seen, s, float("-inf"))


@gluon.jit
def column(x, LAYOUT: gl.constexpr):
    """One number a row, beside a matrix of that layout."""
    return gl.expand_dims(gl.convert_layout(x, gl.SliceLayout(1, LAYOUT), assert_trivial=True), 1)


@gluon.jit
def finite(top, BOUNDED: gl.constexpr):
    """What to subtract from logits: a row that has seen no key yet has no maximum."""
    return gl.where(top == float("-inf"), 0.0, top) if BOUNDED else top


@gluon.jit(do_not_specialize=RUN_TIME)
def forward_kernel(
    q, k, v, out, lse, sinks, log_n, starts_q, starts_k, table, strides_q, strides_k, strides_v, strides_out, stride_n,
    batch, heads, len_q, len_k, left, right, scale, softcap, items, together,
    GROUPS: gl.constexpr, E: gl.constexpr, CONSUMERS: gl.constexpr, TILE_K: gl.constexpr, STAGES: gl.constexpr,
    Q_IN_REGISTERS: gl.constexpr, OUT_APART: gl.constexpr, LAZY: gl.constexpr, WEIGHTS_FIRST: gl.constexpr,
    ONE_EDGE: gl.constexpr,
):  # fmt: skip
    gl.static_assert(OUT_APART or not Q_IN_REGISTERS, "out waits in the buffer of q, which is then free already")
    dtype: gl.constexpr = q.dtype.element_ty
    heads_kv = heads // GROUPS
    of_q = tiles_of(q, batch, heads, len_q, strides_q, STRIP, E)
    of_k = tiles_of(k, batch, heads_kv, len_k, strides_k, TILE_K, E)
    of_v = tiles_of(v, batch, heads_kv, len_k, strides_v, TILE_K, E)
    of_out = tiles_of(out, batch, heads, len_q, strides_out, STRIP, E)

    OF_STRIPS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([STRIP, E], dtype)
    OF_BLOCKS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE_K, E], dtype)
    q_strips = gl.allocate_shared_memory(dtype, [CONSUMERS, STRIP, E], OF_STRIPS)
    k_ring = gl.allocate_shared_memory(dtype, [STAGES, TILE_K, E], OF_BLOCKS)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES, TILE_K, E], OF_BLOCKS)
    out_strips = gl.allocate_shared_memory(dtype, [CONSUMERS, STRIP, E], OF_STRIPS) if OUT_APART else q_strips
    q_full, q_empty = barriers(CONSUMERS, 1), barriers(CONSUMERS, 1)
    k_full, k_empty = barriers(STAGES, 1), barriers(STAGES, CONSUMERS)
    v_full, v_empty = barriers(STAGES, 1), barriers(STAGES, CONSUMERS)
    tile = gl.allocate_shared_memory(gl.int32, [2 * FIELDS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    tile_full = barriers(2, 1)
    fence_async_shared()
    b = Shared(q_strips, k_ring, v_ring, out_strips, q_full, q_empty, k_full, k_empty, v_full, v_empty, tile, tile_full)
    packed = Packed(starts_q, starts_k, table)
    sizes = Sizes(items, heads, len_q, len_k, left, right, together)
    results = Results(of_out, lse, sinks, stride_n, log_n, scale, softcap)
    # The registers that are left go to the consumers: 24 are enough to ask for copies.
    if CONSUMERS == 1:
        gl.warp_specialize(
            [
                (consume, (0, b, sizes, results, E, TILE_K, STAGES, CONSUMERS, Q_IN_REGISTERS, OUT_APART, LAZY,
                           WEIGHTS_FIRST, ONE_EDGE, starts_q is not None)),
                (produce, (b, of_q, of_k, of_v, sizes, packed, GROUPS, TILE_K, STAGES, CONSUMERS)),
            ],
            [1], [24],
        )  # fmt: skip
    elif CONSUMERS == 2:
        gl.warp_specialize(
            [
                (consume, (0, b, sizes, results, E, TILE_K, STAGES, CONSUMERS, Q_IN_REGISTERS, OUT_APART, LAZY,
                           WEIGHTS_FIRST, ONE_EDGE, starts_q is not None)),
                (consume, (1, b, sizes, results, E, TILE_K, STAGES, CONSUMERS, Q_IN_REGISTERS, OUT_APART, LAZY,
                           WEIGHTS_FIRST, ONE_EDGE, starts_q is not None)),
                (produce, (b, of_q, of_k, of_v, sizes, packed, GROUPS, TILE_K, STAGES, CONSUMERS)),
            ],
            [4, 1], [240, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (consume, (0, b, sizes, results, E, TILE_K, STAGES, CONSUMERS, Q_IN_REGISTERS, OUT_APART, LAZY,
                           WEIGHTS_FIRST, ONE_EDGE, starts_q is not None)),
                (consume, (1, b, sizes, results, E, TILE_K, STAGES, CONSUMERS, Q_IN_REGISTERS, OUT_APART, LAZY,
                           WEIGHTS_FIRST, ONE_EDGE, starts_q is not None)),
                (consume, (2, b, sizes, results, E, TILE_K, STAGES, CONSUMERS, Q_IN_REGISTERS, OUT_APART, LAZY,
                           WEIGHTS_FIRST, ONE_EDGE, starts_q is not None)),
                (produce, (b, of_q, of_k, of_v, sizes, packed, GROUPS, TILE_K, STAGES, CONSUMERS)),
            ],
            [4, 4, 1], [160, 160, 24],
        )  # fmt: skip
