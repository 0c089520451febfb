"""The backward kernels: dQ and delta by tiles of queries, then dK and dV by tiles of keys.

n is part of the lse and appears nowhere else. No atomics are used, so that gradients are the same from run to run, bit
by bit.

A floating mask can make an lse so large that rounding drops the logarithm of the sum: in a row that is -1e9 throughout
each weight `exp(s - lse)` is 1. For such rows the dQ kernel first sums up the weights, and both kernels divide by the
sum. What the lse lost is called `lost`: the base-2 logarithm of that sum.
"""

import triton
import triton.language as tl

from attn_n.backends.triton.portable.tile import (
    LARGE_LSE,
    LOG2E,
    RUN_TIME,
    add_dot,
    base_of,
    dot,
    dropout_mask,
    head_pointer,
    keys_seen,
    load,
    load_from,
    load_mask,
    load_sink,
    locate,
    logits,
    padded_base,
    queries_that_see,
    row_pointers,
    rows_in_use,
    store,
    view,
    view_batches,
    view_mask,
)


@triton.jit
def weights_of(s, row_lse, row_lost):
    """Return exp(s - lse): s and lse are in base 2, or natural beside `row_lost`, which is subtracted too."""
    if row_lost is None:
        return tl.exp2(s - row_lse)
    else:
        return tl.exp2((s - row_lse) * LOG2E - row_lost)


@triton.jit(do_not_specialize=RUN_TIME)
def dq_kernel(
    q, k, v, out, dout, lse, dlse, lse_log2, delta, lost, dq, sinks, dn, dslopes, mask, slopes, rng_state,
    starts_q, starts_k, used_q, used_k, leftpad,
    strides_q, strides_k, strides_v, strides_out, strides_dout, strides_dq, strides_mask, mask_keys, strides_slopes,
    stride_n, padded, heads, len_q, len_k, left, right, scale, softcap, dropout_threshold, dropout_scale,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, TILE_E: tl.constexpr, TILE_V: tl.constexpr,
    LINEAR: tl.constexpr, FLOAT_MASK: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
    MASK_DESCRIPTOR: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """Compute dQ, one program for each tile of queries of one head.

    For the other kernel it stores `lse_log2` (natural beside a floating mask) and `delta = rowsum(dout * out) - dlse`.
    Beyond the end they are inf and 0. Beside a floating mask it also stores `lost`.
    """
    all_q, tiles = len_q, tl.cdiv(len_q, TILE_Q)
    tile, head, batch, first_q, first_k, len_q, len_k = locate(
        heads, len_q, len_k, tiles, starts_q, starts_k, used_q, used_k, leftpad
    )
    first_row = (tiles - 1 - tile) * TILE_Q
    if first_row >= len_q:
        return

    head_kv = head // GROUPS
    of_q, of_dq = base_of(q, strides_q, batch, head, first_q), base_of(dq, strides_dq, batch, head, first_q)
    of_k, of_v = base_of(k, strides_k, batch, head_kv, first_k), base_of(v, strides_v, batch, head_kv, first_k)
    of_out, of_dout = base_of(out, strides_out, batch, head, first_q), base_of(dout, strides_dout, batch, head, first_q)
    slope = None if slopes is None else tl.load(head_pointer(slopes, strides_slopes, batch, head))

    rows = first_row + tl.arange(0, TILE_Q)
    # These are loaded once, by pointers: making a descriptor takes longer than one load.
    q_tile = load(of_q, 0, first_row, len_q, strides_q, WIDTH, TILE_Q, TILE_E, False)
    dout_tile = load(of_dout, 0, first_row, len_q, strides_dout, WIDTH_V, TILE_Q, TILE_V, False)
    out_tile = load(of_out, 0, first_row, len_q, strides_out, WIDTH_V, TILE_Q, TILE_V, False)
    of_lse = row_pointers(lse, batch, head, heads, first_q, rows, all_q, starts_q is not None)
    unit: tl.constexpr = LOG2E if FLOAT_MASK else 1.0  # from the logits to base 2
    row_lse = tl.load(of_lse, mask=rows < len_q, other=float("inf")) * (LOG2E / unit)
    row_delta = tl.sum(out_tile.to(tl.float32) * dout_tile.to(tl.float32), 1)
    if dlse is not None:
        of_dlse = row_pointers(dlse, batch, head, heads, first_q, rows, all_q, starts_q is not None)
        row_delta -= tl.load(of_dlse, mask=rows < len_q, other=0.0)
    tl.store(padded_base(lse_log2, batch, head, padded, first_q, all_q, starts_q is not None) + rows, row_lse)
    tl.store(padded_base(delta, batch, head, padded, first_q, all_q, starts_q is not None) + rows, row_delta)
    if dn is not None:
        # The gradient of log n is the sum of -exp(log n - lse) * delta; without sinks this is that of n itself, which
        # is the sum of -exp(-lse) * delta.
        sink = 0.0
        if sinks is not None:
            sink = load_sink(sinks, stride_n, batch, head, heads, first_q, rows, len_q, all_q, starts_q is not None)
            sink *= LOG2E / unit
        # A large number in place of infinity, since the shares of two rows could be infinite and of opposite sign.
        power = (sink - row_lse) * unit
        share = tl.where(power > 127.9, 7.9e28, tl.exp2(tl.minimum(power, 127.9)))  # 2**96
        if sinks is not None and stride_n is None:
            of_dn = row_pointers(dn, batch, head, heads, first_q, rows, all_q, starts_q is not None)
            tl.store(of_dn, -share * row_delta, mask=rows < len_q)
        else:
            tl.store(dn + tl.program_id(0), -tl.sum(share * row_delta))
    view_k = view(of_k, 1, len_k, strides_k, WIDTH, TILE_K, TILE_E, DESCRIPTORS)
    view_v = view(of_v, 1, len_k, strides_v, WIDTH_V, TILE_K, TILE_V, DESCRIPTORS)
    if mask is not None:
        of_mask = view_mask(
            mask, strides_mask, batch, head, 1, first_k, leftpad, len_q, len_k, TILE_Q, TILE_K, MASK_DESCRIPTOR
        )
    factor = scale * LOG2E if LINEAR else 1.0
    dq_tile = tl.zeros((TILE_Q, TILE_E), tl.float32)
    if dslopes is not None:
        of_slope = tl.zeros((TILE_Q,), tl.float32)

    begin, full_begin, full_end, end = keys_seen(first_row, len_q, len_k, left, right, TILE_Q, TILE_K)
    if FLOAT_MASK:
        row_lost = tl.zeros((TILE_Q,), tl.float32)
        large = (tl.abs(row_lse) >= LARGE_LSE) & (tl.abs(row_lse) < float("inf"))
        if tl.max(large.to(tl.int32), 0) > 0:
            row_sum = tl.zeros((TILE_Q,), tl.float32)
            for first_key in tl.range(begin, end, TILE_K):
                k_tile = load(view_k, 0, first_key, len_k, strides_k, WIDTH, TILE_K, TILE_E, DESCRIPTORS)
                mask_tile = None
                if mask is not None:
                    mask_tile = load_mask(
                        of_mask, strides_mask, mask_keys, 0, first_row, first_key, len_q, len_k, TILE_Q, TILE_K,
                        MASK_DESCRIPTOR,
                    )  # fmt: skip
                s, _ = logits(
                    dot(q_tile, k_tile.T, PRECISION), rows[:, None], first_key + tl.arange(0, TILE_K)[None, :],
                    len_q, len_k, left, right, scale, softcap, mask_tile, slope,
                    (first_key < full_begin) | (first_key >= full_end), LINEAR, FLOAT_MASK,
                )  # fmt: skip
                row_sum += tl.sum(tl.exp2((s - row_lse[:, None]) * unit), 1)
            # A sum further from 1 than rounding can bring it is due to n (a sink of 2,000 beside logits as large), and
            # is part of the lse by right.
            log_sum = tl.log2(row_sum)
            has_lost = large & (tl.abs(log_sum) <= tl.abs(row_lse) * (LOG2E * 2.0**-22))
            row_lost = tl.where(has_lost, log_sum, 0.0)
        tl.store(padded_base(lost, batch, head, padded, first_q, all_q, starts_q is not None) + rows, row_lost)
    for first_key in tl.range(begin, end, TILE_K):
        keys = first_key + tl.arange(0, TILE_K)[None, :]
        k_tile = load(view_k, 0, first_key, len_k, strides_k, WIDTH, TILE_K, TILE_E, DESCRIPTORS)
        v_tile = load(view_v, 0, first_key, len_k, strides_v, WIDTH_V, TILE_K, TILE_V, DESCRIPTORS)
        mask_tile = None
        if mask is not None:
            mask_tile = load_mask(
                of_mask, strides_mask, mask_keys, 0, first_row, first_key, len_q, len_k, TILE_Q, TILE_K,
                MASK_DESCRIPTOR,
            )  # fmt: skip
        s, cap_derivative = logits(
            dot(q_tile, k_tile.T, PRECISION), rows[:, None], keys, len_q, len_k, left, right, scale, softcap,
            mask_tile, slope, (first_key < full_begin) | (first_key >= full_end), LINEAR, FLOAT_MASK,
        )  # fmt: skip
        weights = weights_of(s * factor, row_lse[:, None], row_lost[:, None] if FLOAT_MASK else None)
        dweights = dot(dout_tile, v_tile.T, PRECISION)
        if rng_state is not None:
            keep = dropout_mask(rng_state, batch * heads + head, rows[:, None], keys, dropout_threshold)
            dweights = tl.where(keep, dweights * dropout_scale, 0.0)
        ds = weights * (dweights - row_delta[:, None])
        if dslopes is not None:
            distance = tl.abs(rows[:, None] + (len_k - len_q) - keys)
            of_slope += tl.sum(ds * distance.to(tl.float32), 1)
        ds *= cap_derivative
        dq_tile = add_dot(dq_tile, ds.to(k.dtype.element_ty), k_tile, PRECISION)
    if dslopes is not None:
        tl.store(dslopes + tl.program_id(0), -tl.sum(of_slope))
    store(of_dq, dq_tile * scale, first_row, len_q, strides_dq, WIDTH, TILE_Q, TILE_E)


@triton.jit(do_not_specialize=RUN_TIME)
def dkdv_kernel(
    q, k, v, dout, lse_log2, delta, lost, dk, dv, mask, slopes, rng_state, starts_q, starts_k, used_q, used_k, leftpad,
    strides_q, strides_k, strides_v, strides_dout, strides_dk, strides_dv, strides_mask, mask_keys, strides_slopes,
    padded, heads, len_q, len_k, left, right, scale, softcap, dropout_threshold, dropout_scale,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, TILE_E: tl.constexpr, TILE_V: tl.constexpr,
    LINEAR: tl.constexpr, FLOAT_MASK: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
    MASK_DESCRIPTOR: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """Compute dK, dV or both, one program for each tile of keys of one KV head; it loops over the query heads of that.

    For wide heads the registers hold only one of the two.
    """
    all_q = len_q
    tile, head_kv, batch, first_q, first_k, len_q, len_k = locate(
        heads // GROUPS, len_q, len_k, tl.cdiv(len_k, TILE_K), starts_q, starts_k, used_q, used_k, leftpad
    )
    first_key = tile * TILE_K
    if first_key >= len_k:
        return

    first_head = head_kv * GROUPS
    of_q, of_dout = (
        base_of(q, strides_q, batch, first_head, first_q),
        base_of(dout, strides_dout, batch, first_head, first_q),
    )
    of_k, of_v = base_of(k, strides_k, batch, head_kv, first_k), base_of(v, strides_v, batch, head_kv, first_k)
    view_q = view(of_q, GROUPS, len_q, strides_q, WIDTH, TILE_Q, TILE_E, DESCRIPTORS)
    view_dout = view(of_dout, GROUPS, len_q, strides_dout, WIDTH_V, TILE_Q, TILE_V, DESCRIPTORS)
    if mask is not None:
        of_mask = view_mask(
            mask, strides_mask, batch, first_head, GROUPS, first_k, leftpad, len_q, len_k, TILE_Q, TILE_K,
            MASK_DESCRIPTOR,
        )  # fmt: skip
    # These are loaded once, by pointers: making a descriptor takes longer than one load.
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
        row_lse = tl.load(padded_base(lse_log2, batch, head, padded, first_q, all_q, starts_q is not None) + rows)
        row_delta = tl.load(padded_base(delta, batch, head, padded, first_q, all_q, starts_q is not None) + rows)
        row_lost = None
        if FLOAT_MASK:
            row_lost = tl.load(padded_base(lost, batch, head, padded, first_q, all_q, starts_q is not None) + rows)
        # The end of the queries needs no mask: beyond it lse is inf, which makes the weights zero.
        edge = (first_row < full_begin) | (first_row >= full_end) if bounded else False
        mask_tile = None
        if mask is not None:
            mask_tile = load_mask(
                of_mask, strides_mask, mask_keys, member, first_row, first_key, len_q, len_k, TILE_Q, TILE_K,
                MASK_DESCRIPTOR,
            )  # fmt: skip
        slope = None if slopes is None else tl.load(head_pointer(slopes, strides_slopes, batch, head))
        s, cap_derivative = logits(
            dot(k_tile, q_tile.T, PRECISION), rows[None, :], keys, len_q, len_k, left, right, scale, softcap,
            None if mask_tile is None else mask_tile.T, slope, edge, LINEAR, FLOAT_MASK,
        )  # fmt: skip
        weights = weights_of(s * factor, row_lse[None, :], row_lost[None, :] if FLOAT_MASK else None)
        keep = (
            None if rng_state is None
            else dropout_mask(rng_state, batch * heads + head, rows[None, :], keys, dropout_threshold)
        )  # fmt: skip
        if DV:
            dropped = weights if keep is None else tl.where(keep, weights * dropout_scale, 0.0)
            dv_tile = add_dot(dv_tile, dropped.to(v.dtype.element_ty), dout_tile, PRECISION)
        if DK:
            dweights = dot(v_tile, dout_tile.T, PRECISION)
            dweights = dweights if keep is None else tl.where(keep, dweights * dropout_scale, 0.0)
            ds = weights * (dweights - row_delta[None, :]) * cap_derivative
            dk_tile = add_dot(dk_tile, ds.to(q.dtype.element_ty), q_tile, PRECISION)

    if DK:
        of_dk = base_of(dk, strides_dk, batch, head_kv, first_k)
        store(of_dk, dk_tile * scale, first_key, len_k, strides_dk, WIDTH, TILE_K, TILE_E)
    if DV:
        of_dv = base_of(dv, strides_dv, batch, head_kv, first_k)
        store(of_dv, dv_tile, first_key, len_k, strides_dv, WIDTH_V, TILE_K, TILE_V)


@triton.jit(do_not_specialize=RUN_TIME)
def dmask_kernel(
    q, k, v, dout, lse_log2, delta, lost, dmask, mask, slopes, rng_state, starts_q, starts_k, used_q, used_k, leftpad,
    strides_q, strides_k, strides_v, strides_dout, strides_dmask, strides_mask, strides_slopes, sizes, span,
    padded, heads, batches, len_q, len_k, left, right, scale, softcap, dropout_threshold, dropout_scale,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, TILE_E: tl.constexpr, TILE_V: tl.constexpr,
    PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of a floating mask, one program for `span` tiles of it that have their queries in common.

    A program adds up the gradients of all logits that the mask is broadcast to, in a fixed order. `sizes` are those of
    the mask, `(B or 1, Hq or 1, L or 1, S or 1)`; ROWS and KEYS say that it has all queries, and all keys. Tiles of
    which no query sees a key are not stored. `leftpad` is None: its keys begin where those of the mask do.
    """
    tiles_q, tiles_k = tl.cdiv(len_q, TILE_Q), tl.cdiv(len_k, TILE_K)
    program = tl.program_id(0)
    # The sizes of the mask are specialised where lengths are not: of multiples of 16 several elements are one access.
    tile_q, steps_q, mask_rows = 0, tiles_q, len_q
    tile_k, end_k, mask_keys = 0, tiles_k, len_k
    if KEYS:
        spans = tl.cdiv(tiles_k, span)
        tile_k, mask_keys = program % spans * span, sizes[3]
        end_k = tl.minimum(tile_k + span, tiles_k)
        program = program // spans
    if ROWS:
        tile_q, steps_q, mask_rows = program % tiles_q, 1, sizes[2]
        program = program // tiles_q
    own_head, own_batch = program % sizes[1], (program // sizes[1]).to(tl.int64)
    varlen: tl.constexpr = starts_q is not None
    lengths: tl.constexpr = varlen or used_q is not None or used_k is not None  # sequences have their own
    same_rows: tl.constexpr = ROWS and not lengths
    if same_rows:
        begin, full_begin, full_end, end = keys_seen(tile_q * TILE_Q, len_q, len_k, left, right, TILE_Q, TILE_K)
        tile_k, end_k = tl.maximum(tile_k, begin // TILE_K), tl.minimum(end_k, tl.cdiv(end, TILE_K))

    view_q = view_batches(q, batches, heads, len_q, strides_q, WIDTH, TILE_Q, TILE_E, DESCRIPTORS)
    view_k = view_batches(k, batches, heads // GROUPS, len_k, strides_k, WIDTH, TILE_K, TILE_E, DESCRIPTORS)
    view_v = view_batches(v, batches, heads // GROUPS, len_k, strides_v, WIDTH_V, TILE_K, TILE_V, DESCRIPTORS)
    view_dout = view_batches(dout, batches, heads, len_q, strides_dout, WIDTH_V, TILE_Q, TILE_V, DESCRIPTORS)
    of_mask = head_pointer(mask, strides_mask, own_batch, own_head)
    of_dmask = head_pointer(dmask, strides_dmask, own_batch, own_head)
    heads_added = heads // sizes[1]
    steps = batches // sizes[0] * heads_added * steps_q  # for each tile of keys
    acc = tl.zeros((TILE_Q, TILE_K), tl.float32)
    for step in tl.range(0, tl.maximum(end_k - tile_k, 0) * steps):
        first_key = (tile_k + step // steps) * TILE_K
        first_row = (tile_q if ROWS else step % steps_q) * TILE_Q
        member = step % steps // steps_q
        head, batch = own_head + member % heads_added, own_batch + member // heads_added
        first_q, first_k, rows_here, keys_here = batch * 0, batch * 0, len_q, len_k
        if varlen:
            first_q, first_k = tl.load(starts_q + batch).to(tl.int64), tl.load(starts_k + batch).to(tl.int64)
            rows_here = (tl.load(starts_q + batch + 1) - first_q).to(tl.int32)
            keys_here = (tl.load(starts_k + batch + 1) - first_k).to(tl.int32)
        rows_here, first_k, keys_here = rows_in_use(used_q, used_k, None, batch, rows_here, first_k, keys_here)
        begin, full_begin, full_end, end = keys_seen(first_row, rows_here, keys_here, left, right, TILE_Q, TILE_K)
        if True if same_rows else (first_row < rows_here) & (first_key < end) & (first_key + TILE_K > begin):
            # First, and by pointers into registers: Triton overlaps only those loads with earlier steps on which a
            # matmul depends, and for others by descriptors it waits at once.
            mask_tile = load_mask(
                of_mask, strides_mask, mask_keys, 0, first_row, first_key, mask_rows, mask_keys, TILE_Q, TILE_K, False
            )
            q_tile = load_from(
                view_q, batch, head, first_q, first_row, rows_here, strides_q, WIDTH, TILE_Q, TILE_E, DESCRIPTORS
            )
            k_tile = load_from(
                view_k, batch, head // GROUPS, first_k, first_key, keys_here, strides_k, WIDTH, TILE_K, TILE_E,
                DESCRIPTORS,
            )  # fmt: skip
            dout_tile = load_from(
                view_dout, batch, head, first_q, first_row, rows_here, strides_dout, WIDTH_V, TILE_Q, TILE_V,
                DESCRIPTORS,
            )  # fmt: skip
            v_tile = load_from(
                view_v, batch, head // GROUPS, first_k, first_key, keys_here, strides_v, WIDTH_V, TILE_K, TILE_V,
                DESCRIPTORS,
            )  # fmt: skip
            rows, keys = first_row + tl.arange(0, TILE_Q), first_key + tl.arange(0, TILE_K)[None, :]
            inside = rows < rows_here
            base = padded_base(lse_log2, batch, head, padded, first_q, len_q, varlen)
            row_lse = tl.load(base + rows, mask=inside, other=float("inf"))
            base = padded_base(delta, batch, head, padded, first_q, len_q, varlen)
            row_delta = tl.load(base + rows, mask=inside, other=0.0)
            base = padded_base(lost, batch, head, padded, first_q, len_q, varlen)
            row_lost = tl.load(base + rows, mask=inside, other=0.0)
            slope = None if slopes is None else tl.load(head_pointer(slopes, strides_slopes, batch, head))
            s, _ = logits(
                dot(q_tile, k_tile.T, PRECISION), rows[:, None], keys, rows_here, keys_here, left, right, scale,
                softcap, mask_tile, slope, (first_key < full_begin) | (first_key >= full_end), False, True,
            )  # fmt: skip
            weights = weights_of(s, row_lse[:, None], row_lost[:, None])
            dweights = dot(dout_tile, v_tile.T, PRECISION)
            if rng_state is not None:
                keep = dropout_mask(rng_state, batch * heads + head, rows[:, None], keys, dropout_threshold)
                dweights = tl.where(keep, dweights * dropout_scale, 0.0)
            dlogits = weights * (dweights - row_delta[:, None])
            # Another sequence may be longer, and its part of the mask NaN.
            acc += tl.where(inside[:, None], dlogits, 0.0) if lengths else dlogits
        if KEYS and (step + 1) % steps == 0:
            store_dmask(
                of_dmask, acc, tile_q * TILE_Q, first_key, strides_dmask, mask_rows, mask_keys,
                TILE_Q, TILE_K, ROWS, KEYS,
            )  # fmt: skip
            acc = tl.zeros((TILE_Q, TILE_K), tl.float32)
    if not KEYS:
        store_dmask(of_dmask, acc, tile_q * TILE_Q, 0, strides_dmask, mask_rows, mask_keys, TILE_Q, TILE_K, ROWS, KEYS)


@triton.jit
def store_dmask(
    of_dmask, acc, first_row, first_key, strides, rows, keys,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Store the sum of the gradients of a tile, and add it up along queries or keys to which the mask is broadcast."""
    row, key = first_row + tl.arange(0, TILE_Q), first_key + tl.arange(0, TILE_K)
    to_row, to_key = row.to(tl.int64) * strides[2], key.to(tl.int64) * strides[3]
    dtype = of_dmask.dtype.element_ty
    if ROWS and KEYS:
        inside = (row < rows)[:, None] & (key < keys)[None, :]
        tl.store(of_dmask + to_row[:, None] + to_key[None, :], acc.to(dtype), mask=inside)
    elif ROWS:
        tl.store(of_dmask + to_row, tl.sum(acc, 1).to(dtype), mask=row < rows)
    elif KEYS:
        tl.store(of_dmask + to_key, tl.sum(acc, 0).to(dtype), mask=key < keys)
    else:
        tl.store(of_dmask, tl.sum(tl.sum(acc, 1), 0).to(dtype))
