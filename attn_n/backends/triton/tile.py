"""What the kernels share: how a tile is read, which keys a tile of queries sees, and its logits.

Everything is in base 2: a logit is `log2(e)` times that of the formulas, because exp2 is what the hardware has.
"""

import os

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Triton's interpreter multiplies the bits of bfloat16 as if they were integers.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def load(pointers, rows, row_limit, columns, WIDTH: tl.constexpr, TILE_WIDTH: tl.constexpr, CHECK_ROWS: tl.constexpr):
    """A tile of a matrix that is WIDTH wide; what lies outside of it is zero."""
    if CHECK_ROWS and WIDTH != TILE_WIDTH:
        return tl.load(pointers, mask=(rows < row_limit) & (columns < WIDTH), other=0.0)
    if CHECK_ROWS:
        return tl.load(pointers, mask=rows < row_limit, other=0.0)
    if WIDTH != TILE_WIDTH:
        return tl.load(pointers, mask=columns < WIDTH, other=0.0)
    return tl.load(pointers)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def add_dot(acc, a, b, PRECISION: tl.constexpr):
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def tanh(x):
    """By its series near zero, where the difference of two exponentials would cancel."""
    square = x * x
    series = 1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
    return tl.where(tl.abs(x) < 0.3, x * series, 1 - 2 / (1 + tl.exp2(2 * LOG2E * x)))


@triton.jit
def logits(
    products,  # of queries and keys, float32
    rows,  # of the queries, shaped to broadcast with products, and so are the keys: (Q, K) or (K, Q)
    keys,
    len_q,
    len_k,
    left,
    right,
    scale,  # sm_scale; in base 2 unless there is a softcap
    softcap,
    mask,  # of this batch and head
    stride_mask_q,
    stride_mask_k,
    slope,
    BOUNDED: tl.constexpr,  # whether some of the pairs may be out of the window, or beyond the end
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASK: tl.constexpr,  # "none", "bool" or "float"
    ALIBI: tl.constexpr,
):
    """Logits in base 2, -inf where a query does not see a key, and the derivative of the softcap (or 1)."""
    slope_of_cap = 1.0
    if SOFTCAP:
        capped = tanh(products * (scale / softcap))
        slope_of_cap = 1 - capped * capped
        s = capped * (softcap * LOG2E)
    else:
        s = products * (scale * LOG2E)
    distance = rows + (len_k - len_q) - keys
    if ALIBI:
        s -= tl.abs(distance).to(tl.float32) * (slope * LOG2E)
    if MASK != "none":
        inside = (rows < len_q) & (keys < len_k)
        pointers = mask + rows.to(tl.int64) * stride_mask_q + keys.to(tl.int64) * stride_mask_k
        if MASK == "bool":
            s = tl.where(tl.load(pointers, mask=inside, other=0) != 0, s, float("-inf"))
        else:
            s += tl.load(pointers, mask=inside, other=0.0).to(tl.float32) * LOG2E
    if BOUNDED:
        visible = keys < len_k
        if HAS_LEFT:
            visible &= distance <= left
        if HAS_RIGHT:
            visible &= -distance <= right
        s = tl.where(visible, s, float("-inf"))
    return s, slope_of_cap


@triton.jit
def keys_seen(
    first_row, len_q, len_k, left, right,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
):  # fmt: skip
    """`begin, full_begin, full_end, end`: the keys that a tile of queries sees, and of those the tiles that all see.

    All but `end` are multiples of TILE_K.
    """
    first = first_row + (len_k - len_q)
    last = tl.minimum(first_row + TILE_Q, len_q) - 1 + (len_k - len_q)
    begin, full_begin, end, full_end = 0, 0, len_k, len_k
    if HAS_RIGHT:
        end = tl.maximum(0, tl.minimum(len_k, last + right + 1))
        full_end = tl.maximum(0, tl.minimum(len_k, first + right + 1))
    if HAS_LEFT:
        begin = tl.maximum(0, first - left) // TILE_K * TILE_K
        full_begin = tl.cdiv(tl.maximum(0, last - left), TILE_K) * TILE_K
    full_end = tl.maximum(full_end // TILE_K * TILE_K, full_begin)
    return begin, full_begin, full_end, end


@triton.jit
def kept(rng_state, head, rows, keys, threshold):
    """Which weights dropout keeps: one random number for each pair, whatever the tiles."""
    seed = tl.load(rng_state)
    offset = tl.load(rng_state + 1)
    zero = rows * 0 + keys * 0
    random, _, _, _ = tl.philox(seed, keys + zero, rows + zero, head + zero, offset.to(tl.int32) + zero)
    return random.to(tl.uint32, bitcast=True) >= threshold


@triton.jit
def queries_that_see(
    first_key, len_q, len_k, left, right,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
):  # fmt: skip
    """`begin, full_begin, full_end, end` of the queries that see a tile of keys, as `keys_seen` for the keys."""
    first = first_key - (len_k - len_q)
    last = tl.minimum(first_key + TILE_K, len_k) - 1 - (len_k - len_q)
    begin, full_begin, end, full_end = 0, 0, len_q, len_q
    if HAS_LEFT:
        end = tl.maximum(0, tl.minimum(len_q, last + left + 1))
        full_end = tl.maximum(0, tl.minimum(len_q, first + left + 1))
    if HAS_RIGHT:
        begin = tl.maximum(0, first - right) // TILE_Q * TILE_Q
        full_begin = tl.cdiv(tl.maximum(0, last - right), TILE_Q) * TILE_Q
    full_end = tl.maximum(full_end // TILE_Q * TILE_Q, full_begin)
    return begin, full_begin, full_end, end
