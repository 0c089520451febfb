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
    base_of,
    dot,
    dropout_mask,
    head_pointer,
    keys_seen,
    load,
    load_mask,
    load_sink,
    locate,
    logits,
    row_pointers,
    store,
    view,
    view_mask,
)


@triton.jit(do_not_specialize=RUN_TIME)
def forward_kernel(
    q, k, v, out, lse, sinks, log_n, mask, slopes, rng_state, starts_q, starts_k, used_q, used_k, leftpad,
    strides_q, strides_k, strides_v, strides_out, strides_mask, mask_keys, strides_slopes, stride_n,
    heads, len_q, len_k, left, right, scale, softcap, dropout_threshold, dropout_scale,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, TILE_E: tl.constexpr, TILE_V: tl.constexpr,
    LINEAR: tl.constexpr, FLOAT_MASK: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
    MASK_DESCRIPTOR: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    all_q, tiles = len_q, tl.cdiv(len_q, TILE_Q)
    tile, head, batch, first_q, first_k, len_q, len_k = locate(
        heads, len_q, len_k, tiles, starts_q, starts_k, used_q, used_k, leftpad
    )
    # Under a causal mask the last tiles take longest; started first, they leave no tail.
    first_row = (tiles - 1 - tile) * TILE_Q
    if first_row >= len_q:
        return

    head_kv = head // GROUPS
    of_q, of_out = base_of(q, strides_q, batch, head, first_q), base_of(out, strides_out, batch, head, first_q)
    of_k, of_v = base_of(k, strides_k, batch, head_kv, first_k), base_of(v, strides_v, batch, head_kv, first_k)
    slope = None if slopes is None else tl.load(head_pointer(slopes, strides_slopes, batch, head))

    view_q = view(of_q, 1, len_q, strides_q, WIDTH, TILE_Q, TILE_E, DESCRIPTORS)
    view_k = view(of_k, 1, len_k, strides_k, WIDTH, TILE_K, TILE_E, DESCRIPTORS)
    view_v = view(of_v, 1, len_k, strides_v, WIDTH_V, TILE_K, TILE_V, DESCRIPTORS)
    if mask is not None:
        of_mask = view_mask(
            mask, strides_mask, batch, head, 1, first_k, leftpad, len_q, len_k, TILE_Q, TILE_K, MASK_DESCRIPTOR
        )
    q_tile = load(view_q, 0, first_row, len_q, strides_q, WIDTH, TILE_Q, TILE_E, DESCRIPTORS)
    rows = first_row + tl.arange(0, TILE_Q)
    # Issue this load early: it is needed only in the epilogue.
    sink = log_n
    if sinks is not None:
        sink = load_sink(sinks, stride_n, batch, head, heads, first_q, rows, len_q, all_q, starts_q is not None)
    factor = scale * LOG2E if LINEAR else 1.0  # which `logits` leaves to its caller
    unit: tl.constexpr = LOG2E if FLOAT_MASK else 1.0  # from the logits to base 2
    acc = tl.zeros((TILE_Q, TILE_V), tl.float32)
    row_sum = tl.zeros((TILE_Q,), tl.float32)
    row_max = tl.full((TILE_Q,), float("-inf"), tl.float32)  # of the logits times factor

    begin, full_begin, full_end, end = keys_seen(first_row, len_q, len_k, left, right, TILE_Q, TILE_K)
    for first_key in tl.range(begin, end, TILE_K):
        keys = first_key + tl.arange(0, TILE_K)[None, :]
        k_tile = load(view_k, 0, first_key, len_k, strides_k, WIDTH, TILE_K, TILE_E, DESCRIPTORS)
        mask_tile = None
        if mask is not None:
            mask_tile = load_mask(
                of_mask, strides_mask, mask_keys, 0, first_row, first_key, len_q, len_k, TILE_Q, TILE_K,
                MASK_DESCRIPTOR,
            )  # fmt: skip
        s, _ = logits(
            dot(q_tile, k_tile.T, PRECISION), rows[:, None], keys, len_q, len_k, left, right, scale, softcap,
            mask_tile, slope, (first_key < full_begin) | (first_key >= full_end), LINEAR, FLOAT_MASK,
        )  # fmt: skip
        new_max = tl.maximum(row_max, tl.max(s, 1) * factor)
        # A row that has seen no key yet has no maximum to subtract.
        hidden: tl.constexpr = left is not None or right is not None or mask is not None
        shift = tl.where(new_max == float("-inf"), 0.0, new_max) if hidden else new_max
        weights = tl.exp2((s * factor - shift[:, None]) * unit)
        rescale = tl.exp2((row_max - shift) * unit)
        row_sum = row_sum * rescale + tl.sum(weights, 1)
        if rng_state is not None:
            weights = tl.where(
                dropout_mask(rng_state, batch * heads + head, rows[:, None], keys, dropout_threshold), weights, 0.0
            )
        v_tile = load(view_v, 0, first_key, len_k, strides_v, WIDTH_V, TILE_K, TILE_V, DESCRIPTORS)
        acc = add_dot(acc * rescale[:, None], weights.to(v.dtype.element_ty), v_tile, PRECISION)
        row_max = new_max

    if sink is not None:
        sink *= LOG2E / unit
        new_max = tl.maximum(row_max, sink)
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        rescale = tl.exp2((row_max - shift) * unit)
        acc *= rescale[:, None]
        row_sum = row_sum * rescale + tl.exp2((sink - shift) * unit)
        row_max = new_max
    empty = row_sum == 0.0
    acc = acc * ((dropout_scale if rng_state is not None else 1.0) / tl.where(empty, 1.0, row_sum))[:, None]
    row_lse = row_max + tl.log2(row_sum) * LN2 if FLOAT_MASK else (row_max + tl.log2(row_sum)) * LN2
    row_lse = tl.where(empty, float("-inf"), row_lse)
    of_lse = row_pointers(lse, batch, head, heads, first_q, rows, all_q, starts_q is not None)
    tl.store(of_lse, row_lse, mask=rows < len_q)
    store(of_out, acc, first_row, len_q, strides_out, WIDTH_V, TILE_Q, TILE_V)
