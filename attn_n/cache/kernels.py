"""The Triton kernel of `attn_n.cache.fused`.

On 64-bit addressing see `attn_n.backends.triton.portable.tile`.
"""

import triton
import triton.language as tl

_RUN_TIME = ("new", "len_q", "heads", "heads_kv", "block", "tiles_new", "tiles_q")


@triton.jit(do_not_specialize=_RUN_TIME)
def append_kernel(
    k, v, k_cache, v_cache, before, used, q, turned, cos, sin, table, rows_of_cache, k_descale, v_descale,
    strides_k, strides_v, strides_k_cache, strides_v_cache, strides_q, strides_turned, strides_cos, strides_sin,
    stride_table, strides_k_descale, strides_v_descale,
    new, len_q, heads, heads_kv, block, tiles_new, tiles_q,
    WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, PAIRS: tl.constexpr, TILE: tl.constexpr, TILE_E: tl.constexpr,
    TILE_V: tl.constexpr, INTERLEAVED: tl.constexpr, BOUNDED: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """Write a tile of new rows of one head into both caches, or turn a tile of queries of one head.

    The programs of a sequence are (KV head, tile of new rows), and then (query head, tile of queries).
    """
    programs = heads_kv * tiles_new + heads * tiles_q
    program, batch = tl.program_id(0) % programs, (tl.program_id(0) // programs).to(tl.int64)
    first = tl.load(before + batch)
    if program == 0:
        tl.store(used + batch, first + new)
    if program < heads_kv * tiles_new:
        head = (program // tiles_new).to(tl.int64)
        row = program % tiles_new * TILE + tl.arange(0, TILE)
        inside = row < new
        place = first + row
        if table is not None:
            index = tl.load(table + batch * stride_table + place // block, mask=inside, other=0).to(tl.int64)
            place = place % block
        else:
            index = batch if rows_of_cache is None else tl.load(rows_of_cache + batch).to(tl.int64)
            index = index + tl.zeros((TILE,), tl.int64)
        x = load_turned(
            k, strides_k, batch, head, row, inside, first + row, cos, sin, strides_cos, strides_sin, WIDTH, PAIRS,
            TILE_E, INTERLEAVED,
        )  # fmt: skip
        store_row(k_cache, strides_k_cache, index, head, place, inside, x, k_descale, strides_k_descale, batch, WIDTH,
            TILE_E, LARGEST)  # fmt: skip
        x = load_turned(
            v, strides_v, batch, head, row, inside, first + row, None, None, None, None, WIDTH_V, 0, TILE_V, INTERLEAVED
        )
        store_row(v_cache, strides_v_cache, index, head, place, inside, x, v_descale, strides_v_descale, batch, WIDTH_V,
            TILE_V, LARGEST)  # fmt: skip
    else:
        if cos is not None:
            program -= heads_kv * tiles_new
            head = (program // tiles_q).to(tl.int64)
            row = program % tiles_q * TILE + tl.arange(0, TILE)
            inside = row < len_q
            position = first + row if BOUNDED else first + row * 0
            x = load_turned(
                q, strides_q, batch, head, row, inside, position, cos, sin, strides_cos, strides_sin, WIDTH, PAIRS,
                TILE_E, INTERLEAVED,
            )  # fmt: skip
            pointers, mask = pointers_of(turned, strides_turned, batch, head, row, inside, WIDTH, TILE_E)
            tl.store(pointers, x, mask=mask)


@triton.jit
def load_turned(
    x, strides, batch, head, row, inside, position, cos, sin, strides_cos, strides_sin, WIDTH: tl.constexpr,
    PAIRS: tl.constexpr, TILE_E: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Load rows `(TILE, TILE_E)` of one head, their first 2 * PAIRS columns turned by the angles of their positions."""
    pointers, mask = pointers_of(x, strides, batch, head, row, inside, WIDTH, TILE_E)
    found = tl.load(pointers, mask=mask, other=0.0)
    if cos is not None:
        column = tl.arange(0, TILE_E)
        if INTERLEAVED:
            pair, second = column // 2, column % 2 == 1
            other = tl.where(second, column - 1, column + 1)
        else:
            second = column >= PAIRS
            pair = tl.where(second, column - PAIRS, column)
            other = tl.where(second, column - PAIRS, column + PAIRS)
        turns = mask & (column < 2 * PAIRS)[None, :]
        moved = pointers + (other - column).to(tl.int64)[None, :] * strides[3]
        partner = tl.load(moved, mask=turns, other=0.0).to(tl.float32)
        of_cos = cos + position.to(tl.int64)[:, None] * strides_cos[0] + pair.to(tl.int64)[None, :] * strides_cos[1]
        of_sin = sin + position.to(tl.int64)[:, None] * strides_sin[0] + pair.to(tl.int64)[None, :] * strides_sin[1]
        c = tl.load(of_cos, mask=turns, other=1.0).to(tl.float32)
        s = tl.load(of_sin, mask=turns, other=0.0).to(tl.float32)
        s = tl.where(second[None, :], s, -s)
        found = (found.to(tl.float32) * c + partner * s).to(found.dtype)
    return found


@triton.jit
def store_row(
    cache, strides, index, head, place, inside, x, descale, strides_descale, batch, WIDTH: tl.constexpr,
    TILE_E: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """Store rows into the rows `place` of the cache's `index`; a float8 cache holds them divided by `descale`."""
    if LARGEST is not None:
        x = x.to(tl.float32)
        if descale is not None:
            factor = tl.load(descale + batch * strides_descale[0] + head * strides_descale[1]).to(tl.float32)
            x = tl.math.div_rn(x, factor)
        x = tl.clamp(x, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)  # what lies beyond would become NaN
    column = tl.arange(0, TILE_E)
    rows = cache + index * strides[0] + head * strides[1] + place.to(tl.int64) * strides[2]
    mask = inside[:, None] & (column < WIDTH)[None, :]
    tl.store(rows[:, None] + column.to(tl.int64)[None, :] * strides[3], x.to(cache.dtype.element_ty), mask=mask)


@triton.jit
def pointers_of(x, strides, batch, head, row, inside, WIDTH: tl.constexpr, TILE_E: tl.constexpr):
    """Return the pointers and the mask of rows of one head."""
    column = tl.arange(0, TILE_E)
    rows = x + batch * strides[0] + head * strides[1] + row.to(tl.int64) * strides[2]
    return rows[:, None] + column.to(tl.int64)[None, :] * strides[3], inside[:, None] & (column < WIDTH)[None, :]
