"""The backward kernels: delta, then dK and dV by tiles of keys, and dQ by tiles of queries.

n is in the lse and appears nowhere else. Nothing is added by atomics: the same gradients each time, bit by bit.
"""

import triton
import triton.language as tl

from attn_n.backends.triton.tile import LOG2E, add_dot, dot, kept, keys_seen, load, logits, queries_that_see


@triton.jit
def delta_kernel(
    out, dout, dlse, delta,
    stride_ob, stride_oh, stride_ol, stride_oe,
    stride_db, stride_dh, stride_dl, stride_de,
    stride_lb, stride_lh, stride_ll,
    stride_nb, stride_nh, stride_nl,
    len_q,
    HAS_DLSE: tl.constexpr, WIDTH_V: tl.constexpr, TILE_Q: tl.constexpr, TILE_V: tl.constexpr,
):  # fmt: skip
    """`rowsum(dout * out) - dlse`, float32."""
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    rows = (tl.program_id(0) * TILE_Q + tl.arange(0, TILE_Q)).to(tl.int64)
    ev = tl.arange(0, TILE_V)[None, :]
    inside = (rows[:, None] < len_q) & (ev < WIDTH_V)
    of_out = out + batch * stride_ob + head * stride_oh + rows[:, None] * stride_ol + ev * stride_oe
    of_dout = dout + batch * stride_db + head * stride_dh + rows[:, None] * stride_dl + ev * stride_de
    product = tl.load(of_out, mask=inside, other=0.0).to(tl.float32) * tl.load(of_dout, mask=inside, other=0.0)
    found = tl.sum(product, 1)
    if HAS_DLSE:
        found -= tl.load(dlse + batch * stride_nb + head * stride_nh + rows * stride_nl, mask=rows < len_q, other=0.0)
    tl.store(delta + batch * stride_lb + head * stride_lh + rows * stride_ll, found, mask=rows < len_q)


@triton.jit
def dkdv_kernel(
    q, k, v, dout, lse, delta, dk, dv, mask, slopes, rng_state, starts_q, starts_k,
    stride_qb, stride_qh, stride_ql, stride_qe,
    stride_kb, stride_kh, stride_ks, stride_ke,
    stride_vb, stride_vh, stride_vs, stride_ve,
    stride_db, stride_dh, stride_dl, stride_de,
    stride_lb, stride_lh, stride_ll,
    stride_dkb, stride_dkh, stride_dks, stride_dke,
    stride_dvb, stride_dvh, stride_dvs, stride_dve,
    stride_mb, stride_mh, stride_mq, stride_mk,
    stride_slope_b, stride_slope_h,
    len_q, len_k, left, right, scale, softcap, dropout_threshold, dropout_scale,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, MASK: tl.constexpr, ALIBI: tl.constexpr,
    DROPOUT: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, TILE_E: tl.constexpr, TILE_V: tl.constexpr,
):  # fmt: skip
    tile, head_kv, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    first_q, first_k = 0, 0
    if PACKED:
        first_q, first_k = tl.load(starts_q + batch).to(tl.int64), tl.load(starts_k + batch).to(tl.int64)
        len_q = (tl.load(starts_q + batch + 1) - first_q).to(tl.int32)
        len_k = (tl.load(starts_k + batch + 1) - first_k).to(tl.int32)
    first_key = tile * TILE_K
    if first_key >= len_k:
        return

    rows = tl.arange(0, TILE_Q)
    keys = (first_key + tl.arange(0, TILE_K))[:, None]
    e, ev = tl.arange(0, TILE_E)[None, :], tl.arange(0, TILE_V)[None, :]
    outer = 0 if PACKED else batch
    k += outer * stride_kb + head_kv.to(tl.int64) * stride_kh + first_k * stride_ks
    v += outer * stride_vb + head_kv.to(tl.int64) * stride_vh + first_k * stride_vs
    k_tile = load(k + keys.to(tl.int64) * stride_ks + e * stride_ke, keys, len_k, e, WIDTH, TILE_E, True)
    v_tile = load(v + keys.to(tl.int64) * stride_vs + ev * stride_ve, keys, len_k, ev, WIDTH_V, TILE_V, True)
    dk_tile = tl.zeros((TILE_K, TILE_E), tl.float32)
    dv_tile = tl.zeros((TILE_K, TILE_V), tl.float32)

    begin, full_begin, full_end, end = queries_that_see(
        first_key, len_q, len_k, left, right, TILE_Q, TILE_K, HAS_LEFT, HAS_RIGHT
    )
    for group in range(GROUPS):
        head = head_kv * GROUPS + group
        of_q = q + outer * stride_qb + head.to(tl.int64) * stride_qh + first_q * stride_ql
        of_dout = dout + outer * stride_db + head.to(tl.int64) * stride_dh + first_q * stride_dl
        at = outer * stride_lb + head.to(tl.int64) * stride_lh + first_q * stride_ll
        of_mask = mask + batch * stride_mb + head.to(tl.int64) * stride_mh if MASK != "none" else mask
        slope = tl.load(slopes + batch * stride_slope_b + head * stride_slope_h) if ALIBI else 0.0
        random_head = batch * tl.num_programs(1) * GROUPS + head
        for part in tl.static_range(0 if HAS_RIGHT else 1, 3):
            start = begin if part == 0 else (full_begin if part == 1 else full_end)
            stop = tl.minimum(full_begin, end) if part == 0 else (full_end if part == 1 else end)
            for first_row in tl.range(start, stop, TILE_Q):
                here = first_row + rows
                along = here[:, None].to(tl.int64)
                q_tile = load(of_q + along * stride_ql + e * stride_qe, here[:, None], len_q, e, WIDTH, TILE_E, part != 1)
                dout_tile = load(
                    of_dout + along * stride_dl + ev * stride_de, here[:, None], len_q, ev, WIDTH_V, TILE_V, part != 1
                )
                # Beyond the end lse is infinite, and the weights zero.
                row_lse = tl.load(lse + at + here.to(tl.int64) * stride_ll, mask=here < len_q, other=float("inf"))
                row_delta = tl.load(delta + at + here.to(tl.int64) * stride_ll, mask=here < len_q, other=0.0)
                products = dot(k_tile, q_tile.T, PRECISION)
                s, slope_of_cap = logits(
                    products, here[None, :], keys, len_q, len_k, left, right, scale, softcap, of_mask, stride_mq,
                    stride_mk, slope, part != 1, HAS_LEFT, HAS_RIGHT, SOFTCAP, MASK, ALIBI,
                )  # fmt: skip
                weights = tl.exp2(s - row_lse[None, :] * LOG2E)
                dweights = dot(v_tile, dout_tile.T, PRECISION)
                if DROPOUT:
                    keep = kept(rng_state, random_head, here[None, :], keys, dropout_threshold)
                    dropped = tl.where(keep, weights * dropout_scale, 0.0)
                    dweights = tl.where(keep, dweights * dropout_scale, 0.0)
                else:
                    dropped = weights
                dv_tile = add_dot(dv_tile, dropped.to(dout_tile.dtype), dout_tile, PRECISION)
                ds = weights * (dweights - row_delta[None, :]) * slope_of_cap
                dk_tile = add_dot(dk_tile, ds.to(q_tile.dtype), q_tile, PRECISION)

    dk += outer * stride_dkb + head_kv.to(tl.int64) * stride_dkh + first_k * stride_dks
    dv += outer * stride_dvb + head_kv.to(tl.int64) * stride_dvh + first_k * stride_dvs
    along = keys.to(tl.int64)
    tl.store(dk + along * stride_dks + e * stride_dke, (dk_tile * scale).to(dk.dtype.element_ty),
             mask=(keys < len_k) & (e < WIDTH))  # fmt: skip
    tl.store(dv + along * stride_dvs + ev * stride_dve, dv_tile.to(dv.dtype.element_ty),
             mask=(keys < len_k) & (ev < WIDTH_V))  # fmt: skip


@triton.jit
def dq_kernel(
    q, k, v, dout, lse, delta, dq, mask, slopes, rng_state, starts_q, starts_k,
    stride_qb, stride_qh, stride_ql, stride_qe,
    stride_kb, stride_kh, stride_ks, stride_ke,
    stride_vb, stride_vh, stride_vs, stride_ve,
    stride_db, stride_dh, stride_dl, stride_de,
    stride_lb, stride_lh, stride_ll,
    stride_dqb, stride_dqh, stride_dql, stride_dqe,
    stride_mb, stride_mh, stride_mq, stride_mk,
    stride_slope_b, stride_slope_h,
    len_q, len_k, left, right, scale, softcap, dropout_threshold, dropout_scale,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, MASK: tl.constexpr, ALIBI: tl.constexpr,
    DROPOUT: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, TILE_E: tl.constexpr, TILE_V: tl.constexpr,
):  # fmt: skip
    tile, head, batch = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    head_kv = head // GROUPS
    first_q, first_k = 0, 0
    if PACKED:
        first_q, first_k = tl.load(starts_q + batch).to(tl.int64), tl.load(starts_k + batch).to(tl.int64)
        len_q = (tl.load(starts_q + batch + 1) - first_q).to(tl.int32)
        len_k = (tl.load(starts_k + batch + 1) - first_k).to(tl.int32)
    first_row = tile * TILE_Q
    if first_row >= len_q:
        return

    rows = first_row + tl.arange(0, TILE_Q)
    rows_q, along = rows[:, None], rows[:, None].to(tl.int64)
    keys = tl.arange(0, TILE_K)
    e, ev = tl.arange(0, TILE_E)[None, :], tl.arange(0, TILE_V)[None, :]
    outer = 0 if PACKED else batch
    q += outer * stride_qb + head.to(tl.int64) * stride_qh + first_q * stride_ql
    k += outer * stride_kb + head_kv.to(tl.int64) * stride_kh + first_k * stride_ks
    v += outer * stride_vb + head_kv.to(tl.int64) * stride_vh + first_k * stride_vs
    dout += outer * stride_db + head.to(tl.int64) * stride_dh + first_q * stride_dl
    dq += outer * stride_dqb + head.to(tl.int64) * stride_dqh + first_q * stride_dql
    at = outer * stride_lb + head.to(tl.int64) * stride_lh + first_q * stride_ll
    if MASK != "none":
        mask += batch * stride_mb + head.to(tl.int64) * stride_mh
    slope = tl.load(slopes + batch * stride_slope_b + head * stride_slope_h) if ALIBI else 0.0

    q_tile = load(q + along * stride_ql + e * stride_qe, rows_q, len_q, e, WIDTH, TILE_E, True)
    dout_tile = load(dout + along * stride_dl + ev * stride_de, rows_q, len_q, ev, WIDTH_V, TILE_V, True)
    row_lse = tl.load(lse + at + rows.to(tl.int64) * stride_ll, mask=rows < len_q, other=float("inf")) * LOG2E
    row_delta = tl.load(delta + at + rows.to(tl.int64) * stride_ll, mask=rows < len_q, other=0.0)
    dq_tile = tl.zeros((TILE_Q, TILE_E), tl.float32)

    begin, full_begin, full_end, end = keys_seen(
        first_row, len_q, len_k, left, right, TILE_Q, TILE_K, HAS_LEFT, HAS_RIGHT
    )
    for part in tl.static_range(0 if HAS_LEFT else 1, 3):
        start = begin if part == 0 else (full_begin if part == 1 else full_end)
        stop = tl.minimum(full_begin, end) if part == 0 else (full_end if part == 1 else end)
        for first_key in tl.range(start, stop, TILE_K):
            here = first_key + keys
            far = here[:, None].to(tl.int64)
            k_tile = load(k + far * stride_ks + e * stride_ke, here[:, None], len_k, e, WIDTH, TILE_E, part != 1)
            v_tile = load(v + far * stride_vs + ev * stride_ve, here[:, None], len_k, ev, WIDTH_V, TILE_V, part != 1)
            products = dot(q_tile, k_tile.T, PRECISION)
            s, slope_of_cap = logits(
                products, rows_q, here[None, :], len_q, len_k, left, right, scale, softcap, mask, stride_mq, stride_mk,
                slope, part != 1, HAS_LEFT, HAS_RIGHT, SOFTCAP, MASK, ALIBI,
            )  # fmt: skip
            weights = tl.exp2(s - row_lse[:, None])
            dweights = dot(dout_tile, v_tile.T, PRECISION)
            if DROPOUT:
                keep = kept(rng_state, batch * tl.num_programs(1) + head, rows_q, here[None, :], dropout_threshold)
                dweights = tl.where(keep, dweights * dropout_scale, 0.0)
            ds = weights * (dweights - row_delta[:, None]) * slope_of_cap
            dq_tile = add_dot(dq_tile, ds.to(k_tile.dtype), k_tile, PRECISION)
    tl.store(dq + along * stride_dql + e * stride_dqe, (dq_tile * scale).to(dq.dtype.element_ty),
             mask=(rows_q < len_q) & (e < WIDTH))  # fmt: skip
