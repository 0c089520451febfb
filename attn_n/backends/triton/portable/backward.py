"""The backward kernels: dQ and delta by tiles of queries, then dK and dV by tiles of keys.

n is in the lse and appears nowhere else. Nothing is added by atomics: the same gradients each time, bit by bit.

A floating mask can make an lse so large that it loses the logarithm of the sum: of a whole row of -1e9 the weights
`exp(s - lse)` are 1 each. There dQ's kernel takes the sum of the weights first, and both kernels divide by it.
"""

import triton
import triton.language as tl

from attn_n.backends.triton.portable.tile import (
    LARGE_LSE,
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
    padded_rows_of,
    place,
    queries_that_see,
    rows_of,
    store,
    view,
)


@triton.jit
def weights_of(s, row_lse, row_lost):
    """exp(s - lse), by what lse has lost less; without that s and lse are in base 2, and with it natural."""
    if row_lost is None:
        return tl.exp2(s - row_lse)
    else:
        return tl.exp2((s - row_lse) * LOG2E - row_lost)


@triton.jit(do_not_specialize=RUN_TIME)
def dq_kernel(
    q, k, v, out, dout, lse, dlse, lse_log2, delta, lost, dq, sinks, dn, mask, slopes, rng_state, starts_q, starts_k,
    strides_q, strides_k, strides_v, strides_out, strides_dout, strides_dq, strides_mask, strides_slopes, stride_n,
    padded, heads, len_q, len_k, left, right, scale, softcap, dropout_threshold, dropout_scale,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, TILE_E: tl.constexpr, TILE_V: tl.constexpr,
    LINEAR: tl.constexpr, FLOAT_MASK: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """One program for each tile of queries of one head.

    It leaves lse in base 2 (natural beside a floating mask) and `delta = rowsum(dout * out) - dlse` for the other
    kernel, infinite and 0 beyond the end, and beside a floating mask what lse has lost, in base 2.
    """
    tiles = tl.cdiv(len_q, TILE_Q)
    tile, head, batch, first_q, first_k, len_q, len_k = place(starts_q, starts_k, heads, len_q, len_k, tiles)
    first_row = (tiles - 1 - tile) * TILE_Q
    if first_row >= len_q:
        return

    head_kv = head // GROUPS
    of_q, of_dq = matrix(q, strides_q, batch, head, first_q), matrix(dq, strides_dq, batch, head, first_q)
    of_k, of_v = matrix(k, strides_k, batch, head_kv, first_k), matrix(v, strides_v, batch, head_kv, first_k)
    of_out, of_dout = matrix(out, strides_out, batch, head, first_q), matrix(dout, strides_dout, batch, head, first_q)
    of_mask = None if mask is None else of_head(mask, strides_mask, batch, head)
    slope = None if slopes is None else tl.load(of_head(slopes, strides_slopes, batch, head))

    rows = first_row + tl.arange(0, TILE_Q)
    # By pointers, all at once: they come once, and a descriptor takes longer to make than that.
    q_tile = load(of_q, 0, first_row, len_q, strides_q, WIDTH, TILE_Q, TILE_E, False)
    dout_tile = load(of_dout, 0, first_row, len_q, strides_dout, WIDTH_V, TILE_Q, TILE_V, False)
    out_tile = load(of_out, 0, first_row, len_q, strides_out, WIDTH_V, TILE_Q, TILE_V, False)
    of_lse = rows_of(lse, batch, head, heads, first_q, rows, len_q, starts_q is not None)
    unit: tl.constexpr = LOG2E if FLOAT_MASK else 1.0  # from the logits to base 2
    row_lse = tl.load(of_lse, mask=rows < len_q, other=float("inf")) * (LOG2E / unit)
    row_delta = tl.sum(out_tile.to(tl.float32) * dout_tile.to(tl.float32), 1)
    if dlse is not None:
        of_dlse = rows_of(dlse, batch, head, heads, first_q, rows, len_q, starts_q is not None)
        row_delta -= tl.load(of_dlse, mask=rows < len_q, other=0.0)
    tl.store(padded_rows_of(lse_log2, batch, head, padded, first_q, len_q, starts_q is not None) + rows, row_lse)
    tl.store(padded_rows_of(delta, batch, head, padded, first_q, len_q, starts_q is not None) + rows, row_delta)
    if dn is not None:
        # exp(log n - lse) * delta, or without sinks exp(-lse) * delta, which is the gradient of n itself
        sink = tl.load(sinks + head * stride_n) * (LOG2E / unit) if sinks is not None else 0.0
        # A large number instead of infinity, so that the shares of two rows are not infinite and opposite.
        power = (sink - row_lse) * unit
        share = tl.where(power > 127.9, 7.9e28, tl.exp2(tl.minimum(power, 127.9)))  # 2**96
        tl.store(dn + tl.program_id(0), -tl.sum(share * row_delta))
    view_k = view(of_k, 1, len_k, strides_k, WIDTH, TILE_K, TILE_E, DESCRIPTORS)
    view_v = view(of_v, 1, len_k, strides_v, WIDTH_V, TILE_K, TILE_V, DESCRIPTORS)
    factor = scale * LOG2E if LINEAR else 1.0
    dq_tile = tl.zeros((TILE_Q, TILE_E), tl.float32)

    begin, full_begin, full_end, end = keys_seen(first_row, len_q, len_k, left, right, TILE_Q, TILE_K)
    if FLOAT_MASK:
        row_lost = tl.zeros((TILE_Q,), tl.float32)
        large = (tl.abs(row_lse) >= LARGE_LSE) & (tl.abs(row_lse) < float("inf"))
        if tl.max(large.to(tl.int32), 0) > 0:
            total = tl.zeros((TILE_Q,), tl.float32)
            for first_key in tl.range(begin, end, TILE_K):
                k_tile = load(view_k, 0, first_key, len_k, strides_k, WIDTH, TILE_K, TILE_E, DESCRIPTORS)
                s, _ = logits(
                    dot(q_tile, k_tile.T, PRECISION), rows[:, None], first_key + tl.arange(0, TILE_K)[None, :],
                    len_q, len_k, left, right, scale, softcap, of_mask, strides_mask, slope,
                    (first_key < full_begin) | (first_key >= full_end), LINEAR, FLOAT_MASK,
                )  # fmt: skip
                total += tl.sum(tl.exp2((s - row_lse[:, None]) * unit), 1)
            # What a rounding cannot have done n did, a sink of 2,000 beside logits as large: that is no loss.
            log_total = tl.log2(total)
            lost_here = large & (tl.abs(log_total) <= tl.abs(row_lse) * (LOG2E * 2.0**-22))
            row_lost = tl.where(lost_here, log_total, 0.0)
        tl.store(padded_rows_of(lost, batch, head, padded, first_q, len_q, starts_q is not None) + rows, row_lost)
    for first_key in tl.range(begin, end, TILE_K):
        here = first_key + tl.arange(0, TILE_K)[None, :]
        k_tile = load(view_k, 0, first_key, len_k, strides_k, WIDTH, TILE_K, TILE_E, DESCRIPTORS)
        v_tile = load(view_v, 0, first_key, len_k, strides_v, WIDTH_V, TILE_K, TILE_V, DESCRIPTORS)
        s, slope_of_cap = logits(
            dot(q_tile, k_tile.T, PRECISION), rows[:, None], here, len_q, len_k, left, right, scale, softcap,
            of_mask, strides_mask, slope, (first_key < full_begin) | (first_key >= full_end), LINEAR, FLOAT_MASK,
        )  # fmt: skip
        weights = weights_of(s * factor, row_lse[:, None], row_lost[:, None] if FLOAT_MASK else None)
        dweights = dot(dout_tile, v_tile.T, PRECISION)
        if rng_state is not None:
            keep = kept(rng_state, batch * heads + head, rows[:, None], here, dropout_threshold)
            dweights = tl.where(keep, dweights * dropout_scale, 0.0)
        ds = weights * (dweights - row_delta[:, None]) * slope_of_cap
        dq_tile = add_dot(dq_tile, ds.to(k.dtype.element_ty), k_tile, PRECISION)
    store(of_dq, dq_tile * scale, first_row, len_q, strides_dq, WIDTH, TILE_Q, TILE_E)


@triton.jit(do_not_specialize=RUN_TIME)
def dkdv_kernel(
    q, k, v, dout, lse_log2, delta, lost, dk, dv, mask, slopes, rng_state, starts_q, starts_k,
    strides_q, strides_k, strides_v, strides_dout, strides_dk, strides_dv, strides_mask, strides_slopes,
    padded, heads, len_q, len_k, left, right, scale, softcap, dropout_threshold, dropout_scale,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, TILE_E: tl.constexpr, TILE_V: tl.constexpr,
    LINEAR: tl.constexpr, FLOAT_MASK: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """One program for each tile of keys of one key head; it goes through the query heads that share it.

    It computes dK, dV or both: of wide heads the registers hold but one.
    """
    tile, head_kv, batch, first_q, first_k, len_q, len_k = place(
        starts_q, starts_k, heads // GROUPS, len_q, len_k, tl.cdiv(len_k, TILE_K)
    )
    first_key = tile * TILE_K
    if first_key >= len_k:
        return

    first_head = head_kv * GROUPS
    of_q, of_dout = (
        matrix(q, strides_q, batch, first_head, first_q),
        matrix(dout, strides_dout, batch, first_head, first_q),
    )
    of_k, of_v = matrix(k, strides_k, batch, head_kv, first_k), matrix(v, strides_v, batch, head_kv, first_k)
    view_q = view(of_q, GROUPS, len_q, strides_q, WIDTH, TILE_Q, TILE_E, DESCRIPTORS)
    view_dout = view(of_dout, GROUPS, len_q, strides_dout, WIDTH_V, TILE_Q, TILE_V, DESCRIPTORS)
    # By pointers, both at once: they come once, and a descriptor takes longer to make than that.
    k_tile = load(of_k, 0, first_key, len_k, strides_k, WIDTH, TILE_K, TILE_E, False)
    v_tile = load(of_v, 0, first_key, len_k, strides_v, WIDTH_V, TILE_K, TILE_V, False)
    keys = first_key + tl.arange(0, TILE_K)[:, None]
    factor = scale * LOG2E if LINEAR else 1.0
    dk_tile = tl.zeros((TILE_K, TILE_E), tl.float32)
    dv_tile = tl.zeros((TILE_K, TILE_V), tl.float32)

    begin, full_begin, full_end, end = queries_that_see(first_key, len_q, len_k, left, right, TILE_Q, TILE_K)
    bounded: tl.constexpr = left is not None or right is not None
    count = tl.cdiv(tl.maximum(end - begin, 0), TILE_Q)
    for step in tl.range(0, count * GROUPS):
        member = step // count if GROUPS > 1 else 0
        head = first_head + member
        first_row = begin + (step % count if GROUPS > 1 else step) * TILE_Q
        rows = first_row + tl.arange(0, TILE_Q)
        q_tile = load(view_q, member, first_row, len_q, strides_q, WIDTH, TILE_Q, TILE_E, DESCRIPTORS)
        dout_tile = load(view_dout, member, first_row, len_q, strides_dout, WIDTH_V, TILE_Q, TILE_V, DESCRIPTORS)
        row_lse = tl.load(padded_rows_of(lse_log2, batch, head, padded, first_q, len_q, starts_q is not None) + rows)
        row_delta = tl.load(padded_rows_of(delta, batch, head, padded, first_q, len_q, starts_q is not None) + rows)
        row_lost = None
        if FLOAT_MASK:
            row_lost = tl.load(padded_rows_of(lost, batch, head, padded, first_q, len_q, starts_q is not None) + rows)
        # The end of the queries needs no care: beyond it lse is infinite, and the weights zero.
        edge = (first_row < full_begin) | (first_row >= full_end) if bounded else False
        of_mask = None if mask is None else of_head(mask, strides_mask, batch, head)
        slope = None if slopes is None else tl.load(of_head(slopes, strides_slopes, batch, head))
        s, slope_of_cap = logits(
            dot(k_tile, q_tile.T, PRECISION), rows[None, :], keys, len_q, len_k, left, right, scale, softcap,
            of_mask, strides_mask, slope, edge, LINEAR, FLOAT_MASK,
        )  # fmt: skip
        weights = weights_of(s * factor, row_lse[None, :], row_lost[None, :] if FLOAT_MASK else None)
        keep = (
            None if rng_state is None
            else kept(rng_state, batch * heads + head, rows[None, :], keys, dropout_threshold)
        )  # fmt: skip
        if DV:
            dropped = weights if keep is None else tl.where(keep, weights * dropout_scale, 0.0)
            dv_tile = add_dot(dv_tile, dropped.to(v.dtype.element_ty), dout_tile, PRECISION)
        if DK:
            dweights = dot(v_tile, dout_tile.T, PRECISION)
            dweights = dweights if keep is None else tl.where(keep, dweights * dropout_scale, 0.0)
            ds = weights * (dweights - row_delta[None, :]) * slope_of_cap
            dk_tile = add_dot(dk_tile, ds.to(q.dtype.element_ty), q_tile, PRECISION)

    if DK:
        of_dk = matrix(dk, strides_dk, batch, head_kv, first_k)
        store(of_dk, dk_tile * scale, first_key, len_k, strides_dk, WIDTH, TILE_K, TILE_E)
    if DV:
        of_dv = matrix(dv, strides_dv, batch, head_kv, first_k)
        store(of_dv, dv_tile, first_key, len_k, strides_dv, WIDTH_V, TILE_K, TILE_V)
