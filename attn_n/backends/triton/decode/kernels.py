"""Split-KV kernels for a few queries over many keys, which may lie in a paged cache.

A program attends with all query heads of a KV head, so that keys and values are loaded once for them. The keys of a
sequence are split among programs, since a few sequences alone would keep a few SMs busy: each stores its out and its
lse at n = 0, and `merge_kernel` puts them together. n is applied once, there.

    split_kernel   (sequence, KV head, rows, split)      rows = query heads of the KV head x queries
    merge_kernel   (sequence, query head, query)         out = sum of exp(lse_i - lse) out_i, with n as one more part

How many keys a sequence has is read on the GPU. A split without keys stores -inf. Where it can (PDL), `merge_kernel` is
launched while the last programs of `split_kernel` store their parts.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from attn_n.backends.triton.portable.tile import LN2, LOG2E, add_dot, dot, logits

RUN_TIME = ("stride_n", "heads", "len_q", "len_k", "left", "right", "splits", "row_tiles")


@triton.jit
def sequence_rows(used, leftpad, batch, len_k):
    """Return the first key of a sequence, and the end of its keys."""
    begin, end = 0, len_k
    if used is not None:
        end = tl.load(used + batch)
    if leftpad is not None:
        begin = tl.load(leftpad + batch)
    return begin, end


@triton.jit
def places_of(table, row_of_cache, keys, exist, BLOCK: tl.constexpr, TILE_K: tl.constexpr):
    """Return where keys (TILE_K,) lie: in which row of a contiguous cache, or in which blocks, and where in these."""
    if BLOCK == 0:
        return row_of_cache.to(tl.int64), keys
    elif BLOCK % TILE_K == 0:  # all in one block
        return tl.load(table + tl.min(keys, 0) // BLOCK).to(tl.int64), keys % BLOCK
    else:
        return tl.load(table + keys // BLOCK, mask=exist, other=0).to(tl.int64), keys % BLOCK


@triton.jit
def load_keys(x, block, row, exist, strides, WIDTH: tl.constexpr, TILE_WIDTH: tl.constexpr):
    """Load the rows (TILE_K, TILE_WIDTH) of a head that lie there; `x` points to its first row."""
    of_row, columns = x + (block * strides[0] + row.to(tl.int64) * strides[2]), tl.arange(0, TILE_WIDTH)
    inside = exist[:, None]
    if WIDTH != TILE_WIDTH:
        inside = inside & (columns < WIDTH)[None, :]
    return tl.load(of_row[:, None] + columns.to(tl.int64)[None, :] * strides[3], mask=inside, other=0.0)


@triton.jit
def row_sink(sinks, log_n, stride_n, head, row):
    """Return log n in base 2 of each row. `row` counts the rows of all sequences and heads."""
    if sinks is None:
        return log_n * LOG2E
    elif stride_n is None:
        return tl.load(sinks + row) * LOG2E
    else:
        return tl.load(sinks + head * stride_n) * LOG2E


@triton.jit(do_not_specialize=RUN_TIME)
def split_kernel(
    q, k, v, out, lse, sinks, log_n, slopes, used, leftpad, table, cache_rows, k_descale, v_descale,
    strides_q, strides_k, strides_v, strides_out, stride_table, strides_slopes, strides_k_descale, strides_v_descale,
    stride_n, heads, len_q, len_k, left, right, scale, softcap, splits, row_tiles,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, TILE_E: tl.constexpr, TILE_V: tl.constexpr,
    TILE_R: tl.constexpr, TILE_K: tl.constexpr, BLOCK: tl.constexpr, LINEAR: tl.constexpr, SPLIT: tl.constexpr,
    PDL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend with a tile of rows to one part of the keys.

    If it is SPLIT, `out` and `lse` are the parts, `(B, Hq, L, splits, Ev)` in float32 and `(B, Hq, L, splits)` in base
    2. Else they are the results, with n.
    """
    program = tl.program_id(0)
    split, program = program % splits, program // splits
    row_tile, program = program % row_tiles, program // row_tiles
    heads_kv = heads // GROUPS
    head_kv, batch = program % heads_kv, (program // heads_kv).to(tl.int64)

    rows = row_tile * TILE_R + tl.arange(0, TILE_R)
    query, head = rows // GROUPS, head_kv * GROUPS + rows % GROUPS
    there = query < len_q
    columns = tl.arange(0, TILE_E)
    of_q = q + batch * strides_q[0] + head.to(tl.int64) * strides_q[1] + query.to(tl.int64) * strides_q[2]
    q_tile = tl.load(
        of_q[:, None] + columns.to(tl.int64)[None, :] * strides_q[3], mask=there[:, None] & (columns < WIDTH)[None, :],
        other=0.0,
    )  # fmt: skip
    slope = None
    if slopes is not None:
        slope = tl.load(slopes + batch * strides_slopes[0] + head * strides_slopes[1], mask=there, other=0.0)[:, None]
    if k_descale is not None:
        scale *= tl.load(k_descale + batch * strides_k_descale[0] + head_kv * strides_k_descale[1])
    factor = scale * LOG2E if LINEAR else 1.0  # which `logits` leaves to its caller

    # The keys that some row of the tile sees, by whole tiles of keys from `start` on, and those that every row sees.
    first, end = sequence_rows(used, leftpad, batch, len_k)
    of_first = row_tile * TILE_R // GROUPS + (end - len_q)  # the positions of the first and the last query
    of_last = tl.minimum(((row_tile + 1) * TILE_R - 1) // GROUPS, len_q - 1) + (end - len_q)
    begin, stop = first, end
    of_all, to_all = first, end
    if right is not None:
        stop = tl.maximum(tl.minimum(end, of_last + right + 1), 0)
        to_all = tl.minimum(end, of_first + right + 1)
    if left is not None:
        begin = tl.maximum(first, of_first - left)
        of_all = tl.maximum(first, of_last - left)
    start = begin // TILE_K * TILE_K
    of_split = tl.cdiv(tl.cdiv(tl.maximum(stop - start, 0), TILE_K), splits) * TILE_K
    from_key = start + split * of_split
    to_key = tl.minimum(from_key + of_split, stop)

    row_of_cache = batch if cache_rows is None else tl.load(cache_rows + batch)
    of_table = None
    if BLOCK > 0:
        of_table = table + batch * stride_table
    of_k, of_v = k + head_kv.to(tl.int64) * strides_k[1], v + head_kv.to(tl.int64) * strides_v[1]
    acc = tl.zeros((TILE_R, TILE_V), tl.float32)
    row_sum = tl.zeros((TILE_R,), tl.float32)
    row_max = tl.full((TILE_R,), float("-inf"), tl.float32)
    for first_key in tl.range(from_key, to_key, TILE_K):
        keys = first_key + tl.arange(0, TILE_K)
        exist = (keys >= first) & (keys < end)
        of_block, of_row = places_of(of_table, row_of_cache, keys, exist, BLOCK, TILE_K)
        k_tile = load_keys(of_k, of_block, of_row, exist, strides_k, WIDTH, TILE_E)
        padding = None
        if leftpad is not None:
            padding = (keys >= first)[None, :]
        s, _ = logits(
            dot(q_tile, k_tile.to(q_tile.dtype).T, PRECISION), query[:, None], keys[None, :], len_q, end, left, right,
            scale, softcap, padding, slope, (first_key < of_all) | (first_key + TILE_K > to_all), LINEAR, False,
        )  # fmt: skip
        new_max = tl.maximum(row_max, tl.max(s, 1) * factor)
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(s * factor - shift[:, None])
        rescale = tl.exp2(row_max - shift)
        row_sum = row_sum * rescale + tl.sum(weights, 1)
        v_tile = load_keys(of_v, of_block, of_row, exist, strides_v, WIDTH_V, TILE_V)
        acc = add_dot(acc * rescale[:, None], weights.to(q_tile.dtype), v_tile.to(q_tile.dtype), PRECISION)
        row_max = new_max

    if PDL:
        gdc_launch_dependents()
    row = (batch * heads + head) * len_q + query
    if not SPLIT and (sinks is not None or log_n is not None):
        sink = row_sink(sinks, log_n, stride_n, tl.where(there, head, 0), tl.where(there, row, 0))
        new_max = tl.maximum(row_max, sink)
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        rescale = tl.exp2(row_max - shift)
        acc *= rescale[:, None]
        row_sum = row_sum * rescale + tl.exp2(sink - shift)
        row_max = new_max
    empty = row_sum == 0.0
    if v_descale is not None:
        acc *= tl.load(v_descale + batch * strides_v_descale[0] + head_kv * strides_v_descale[1])
    acc = acc / tl.where(empty, 1.0, row_sum)[:, None]
    row_lse = tl.where(empty, float("-inf"), row_max + tl.log2(row_sum))
    columns_v = tl.arange(0, TILE_V)
    inside = there[:, None] & (columns_v < WIDTH_V)[None, :]
    if SPLIT:
        part = row * splits + split
        tl.store(lse + part, row_lse, mask=there)
        tl.store(out + part[:, None] * WIDTH_V + columns_v[None, :], acc, mask=inside)
    else:
        tl.store(lse + row, row_lse * LN2, mask=there)
        of_out = out + batch * strides_out[0] + head.to(tl.int64) * strides_out[1] + query.to(tl.int64) * strides_out[2]
        tl.store(of_out[:, None] + columns_v[None, :] * strides_out[3], acc.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=RUN_TIME)
def merge_kernel(
    parts, parts_lse, out, lse, sinks, log_n, strides_out, stride_n, heads, len_q, splits,
    WIDTH_V: tl.constexpr, TILE_V: tl.constexpr, TILE_S: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Merge the parts of one row, all of its splits in one tile, and apply n."""
    row = tl.program_id(0).to(tl.int64)
    query, program = row % len_q, row // len_q
    head, batch = program % heads, program // heads
    split, columns = tl.arange(0, TILE_S), tl.arange(0, TILE_V)
    of_part = row * splits + split
    has_sink: tl.constexpr = sinks is not None or log_n is not None
    if has_sink:
        sink = row_sink(sinks, log_n, stride_n, head, row)
    if PDL:
        gdc_wait()
    lses = tl.load(parts_lse + of_part, mask=split < splits, other=float("-inf"))
    row_max = tl.max(lses, 0)
    if has_sink:
        row_max = tl.maximum(row_max, sink)
    shift = tl.where(row_max == float("-inf"), 0.0, row_max)
    weights = tl.exp2(lses - shift)
    row_sum = tl.sum(weights, 0)
    if has_sink:
        row_sum += tl.exp2(sink - shift)
    inside = (split < splits)[:, None] & (columns < WIDTH_V)[None, :]
    part = tl.load(parts + of_part[:, None] * WIDTH_V + columns[None, :], mask=inside, other=0.0)
    found = tl.sum(part * weights[:, None], 0) / tl.where(row_sum == 0.0, 1.0, row_sum)
    tl.store(lse + row, tl.where(row_sum == 0.0, float("-inf"), (row_max + tl.log2(row_sum)) * LN2))
    of_out = out + batch * strides_out[0] + head * strides_out[1] + query * strides_out[2] + columns * strides_out[3]
    tl.store(of_out, found.to(out.dtype.element_ty), mask=columns < WIDTH_V)
