"""The forward kernel: one program for each tile of queries of one head.

n joins the denominator at the end, as one more key with logit log n and value zero (gpt-oss's sink).
"""

import triton
import triton.language as tl

from attn_n.backends.triton.portable.tile import (
    LN2,
    LOG2E,
    RUN_TIME,
    add_dot,
    dot,
    kept,
    keys_seen,
    load,
    logits,
    matrix,
    of_head,
    place,
    rows_of,
    store,
    view,
)


@triton.jit(do_not_specialize=RUN_TIME)
def forward_kernel(
    q, k, v, out, lse, sinks, log_n, mask, slopes, rng_state, starts_q, starts_k,
    strides_q, strides_k, strides_v, strides_out, strides_mask, strides_slopes, stride_n,
    heads, len_q, len_k, left, right, scale, softcap, dropout_threshold, dropout_scale,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, TILE_E: tl.constexpr, TILE_V: tl.constexpr,
    LINEAR: tl.constexpr, FLOAT_MASK: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(len_q, TILE_Q)
    tile, head, batch, first_q, first_k, len_q, len_k = place(starts_q, starts_k, heads, len_q, len_k, tiles)
    # Under a causal mask the last tiles take longest; begun first, they leave no tail behind.
    first_row = (tiles - 1 - tile) * TILE_Q
    if first_row >= len_q:
        return

    head_kv = head // GROUPS
    of_q, of_out = matrix(q, strides_q, batch, head, first_q), matrix(out, strides_out, batch, head, first_q)
    of_k, of_v = matrix(k, strides_k, batch, head_kv, first_k), matrix(v, strides_v, batch, head_kv, first_k)
    of_mask = None if mask is None else of_head(mask, strides_mask, batch, head)
    slope = None if slopes is None else tl.load(of_head(slopes, strides_slopes, batch, head))

    view_q = view(of_q, 1, len_q, strides_q, WIDTH, TILE_Q, TILE_E, DESCRIPTORS)
    view_k = view(of_k, 1, len_k, strides_k, WIDTH, TILE_K, TILE_E, DESCRIPTORS)
    view_v = view(of_v, 1, len_k, strides_v, WIDTH_V, TILE_K, TILE_V, DESCRIPTORS)
    q_tile = load(view_q, 0, first_row, len_q, strides_q, WIDTH, TILE_Q, TILE_E, DESCRIPTORS)
    # What comes last is asked for first.
    sink = log_n if sinks is None else tl.load(sinks + head * stride_n)
    rows = first_row + tl.arange(0, TILE_Q)
    factor = scale * LOG2E if LINEAR else 1.0
    unit: tl.constexpr = LOG2E if FLOAT_MASK else 1.0  # from the logits to base 2
    acc = tl.zeros((TILE_Q, TILE_V), tl.float32)
    total = tl.zeros((TILE_Q,), tl.float32)
    top = tl.full((TILE_Q,), float("-inf"), tl.float32)

    begin, full_begin, full_end, end = keys_seen(first_row, len_q, len_k, left, right, TILE_Q, TILE_K)
    for first_key in tl.range(begin, end, TILE_K):
        here = first_key + tl.arange(0, TILE_K)[None, :]
        k_tile = load(view_k, 0, first_key, len_k, strides_k, WIDTH, TILE_K, TILE_E, DESCRIPTORS)
        s, _ = logits(
            dot(q_tile, k_tile.T, PRECISION), rows[:, None], here, len_q, len_k, left, right, scale, softcap,
            of_mask, strides_mask, slope, (first_key < full_begin) | (first_key >= full_end), LINEAR, FLOAT_MASK,
        )  # fmt: skip
        new_top = tl.maximum(top, tl.max(s, 1) * factor)
        # A row that has seen no key yet has no maximum to subtract.
        hidden: tl.constexpr = left is not None or right is not None or mask is not None
        shift = tl.where(new_top == float("-inf"), 0.0, new_top) if hidden else new_top
        weights = tl.exp2((s * factor - shift[:, None]) * unit)
        rescale = tl.exp2((top - shift) * unit)
        total = total * rescale + tl.sum(weights, 1)
        if rng_state is not None:
            weights = tl.where(
                kept(rng_state, batch * heads + head, rows[:, None], here, dropout_threshold), weights, 0.0
            )
        v_tile = load(view_v, 0, first_key, len_k, strides_v, WIDTH_V, TILE_K, TILE_V, DESCRIPTORS)
        acc = add_dot(acc * rescale[:, None], weights.to(v.dtype.element_ty), v_tile, PRECISION)
        top = new_top

    if sink is not None:
        sink *= LOG2E / unit
        new_top = tl.maximum(top, sink)
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        rescale = tl.exp2((top - shift) * unit)
        acc *= rescale[:, None]
        total = total * rescale + tl.exp2((sink - shift) * unit)
        top = new_top
    nothing = total == 0.0
    acc = acc * ((dropout_scale if rng_state is not None else 1.0) / tl.where(nothing, 1.0, total))[:, None]
    found = top + tl.log2(total) * LN2 if FLOAT_MASK else (top + tl.log2(total)) * LN2
    found = tl.where(nothing, float("-inf"), found)
    of_lse = rows_of(lse, batch, head, heads, first_q, rows, len_q, starts_q is not None)
    tl.store(of_lse, found, mask=rows < len_q)
    store(of_out, acc, first_row, len_q, strides_out, WIDTH_V, TILE_Q, TILE_V)
