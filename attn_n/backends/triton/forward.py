"""The forward kernel: one program for each tile of queries of one head.

n joins the denominator at the end, as one more key with logit log n and value zero (gpt-oss's sink).
"""

import triton
import triton.language as tl

from attn_n.backends.triton.tile import LN2, LOG2E, add_dot, dot, kept, keys_seen, load, logits


@triton.jit
def forward_kernel(
    q, k, v, out, lse, log_n, mask, slopes, rng_state, starts_q, starts_k,
    stride_qb, stride_qh, stride_ql, stride_qe,
    stride_kb, stride_kh, stride_ks, stride_ke,
    stride_vb, stride_vh, stride_vs, stride_ve,
    stride_ob, stride_oh, stride_ol, stride_oe,
    stride_lb, stride_lh, stride_ll,
    stride_mb, stride_mh, stride_mq, stride_mk,
    stride_slope_b, stride_slope_h, stride_n,
    len_q, len_k, left, right, scale, softcap, n_in_log, dropout_threshold, dropout_scale,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, MASK: tl.constexpr, ALIBI: tl.constexpr,
    N: tl.constexpr, DROPOUT: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, TILE_E: tl.constexpr, TILE_V: tl.constexpr,
):  # fmt: skip
    # Under a causal mask the last tiles take longest; begun first, they leave no tail behind.
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
    keys = tl.arange(0, TILE_K)
    e, ev = tl.arange(0, TILE_E)[None, :], tl.arange(0, TILE_V)[None, :]
    outer = 0 if PACKED else batch
    q += outer * stride_qb + head.to(tl.int64) * stride_qh + first_q * stride_ql
    k += outer * stride_kb + head_kv.to(tl.int64) * stride_kh + first_k * stride_ks
    v += outer * stride_vb + head_kv.to(tl.int64) * stride_vh + first_k * stride_vs
    out += outer * stride_ob + head.to(tl.int64) * stride_oh + first_q * stride_ol
    lse += outer * stride_lb + head.to(tl.int64) * stride_lh + first_q * stride_ll
    if MASK != "none":
        mask += batch * stride_mb + head.to(tl.int64) * stride_mh
    slope = tl.load(slopes + batch * stride_slope_b + head * stride_slope_h) if ALIBI else 0.0

    rows_q = rows[:, None]
    q_tile = load(q + rows_q.to(tl.int64) * stride_ql + e * stride_qe, rows_q, len_q, e, WIDTH, TILE_E, True)
    acc = tl.zeros((TILE_Q, TILE_V), tl.float32)
    total = tl.zeros((TILE_Q,), tl.float32)
    top = tl.full((TILE_Q,), float("-inf"), tl.float32)

    begin, full_begin, full_end, end = keys_seen(
        first_row, len_q, len_k, left, right, TILE_Q, TILE_K, HAS_LEFT, HAS_RIGHT
    )
    # The tiles that the window's left edge cuts, those that all queries see, and those that its right edge or the end cuts.
    for part in tl.static_range(0 if HAS_LEFT else 1, 3):
        start = begin if part == 0 else (full_begin if part == 1 else full_end)
        stop = tl.minimum(full_begin, end) if part == 0 else (full_end if part == 1 else end)
        for first_key in tl.range(start, stop, TILE_K):
            acc, total, top = attend_tile(
                acc, total, top, q_tile, k, v, stride_ks, stride_ke, stride_vs, stride_ve,
                rows_q, first_key, keys, e, ev, len_q, len_k, left, right, scale, softcap,
                mask, stride_mq, stride_mk, slope, rng_state, batch * tl.num_programs(1) + head, dropout_threshold,
                part != 1, WIDTH, WIDTH_V, HAS_LEFT, HAS_RIGHT, SOFTCAP, MASK, ALIBI, DROPOUT, PRECISION, TILE_E, TILE_V,
            )  # fmt: skip

    if N != "none":
        sink = (tl.load(log_n + head * stride_n) if N == "per head" else n_in_log) * LOG2E
        new_top = tl.maximum(top, sink)
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        rescale = tl.exp2(top - shift)
        acc *= rescale[:, None]
        total = total * rescale + tl.exp2(sink - shift)
        top = new_top
    nothing = total == 0.0
    acc = acc / tl.where(nothing, 1.0, total)[:, None]
    if DROPOUT:
        acc *= dropout_scale
    found = tl.where(nothing, float("-inf"), (top + tl.log2(total)) * LN2)
    tl.store(lse + rows.to(tl.int64) * stride_ll, found, mask=rows < len_q)
    inside = (rows_q < len_q) & (ev < WIDTH_V)
    tl.store(out + rows_q.to(tl.int64) * stride_ol + ev * stride_oe, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def attend_tile(
    acc, total, top, q_tile, k, v, stride_ks, stride_ke, stride_vs, stride_ve,
    rows_q, first_key, keys, e, ev, len_q, len_k, left, right, scale, softcap,
    mask, stride_mq, stride_mk, slope, rng_state, random_head, dropout_threshold,
    BOUNDED: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr, MASK: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    TILE_E: tl.constexpr, TILE_V: tl.constexpr,
):  # fmt: skip
    """One more tile of keys for the running output, sum and maximum of a tile of queries."""
    here = first_key + keys
    along = here[:, None].to(tl.int64)
    k_tile = load(k + along * stride_ks + e * stride_ke, here[:, None], len_k, e, WIDTH, TILE_E, BOUNDED)
    products = dot(q_tile, k_tile.T, PRECISION)
    s, _ = logits(
        products, rows_q, here[None, :], len_q, len_k, left, right, scale, softcap, mask, stride_mq, stride_mk, slope,
        BOUNDED, HAS_LEFT, HAS_RIGHT, SOFTCAP, MASK, ALIBI,
    )  # fmt: skip
    new_top = tl.maximum(top, tl.max(s, 1))
    # A row that has seen no key yet has no maximum to subtract.
    shift = tl.where(new_top == float("-inf"), 0.0, new_top) if BOUNDED or MASK != "none" else new_top
    weights = tl.exp2(s - shift[:, None])
    rescale = tl.exp2(top - shift)
    total = total * rescale + tl.sum(weights, 1)
    if DROPOUT:
        weights = tl.where(kept(rng_state, random_head, rows_q, here[None, :], dropout_threshold), weights, 0.0)
    v_tile = load(v + along * stride_vs + ev * stride_ve, here[:, None], len_k, ev, WIDTH_V, TILE_V, BOUNDED)
    acc = add_dot(acc * rescale[:, None], weights.to(v.dtype.element_ty), v_tile, PRECISION)
    return acc, total, new_top
