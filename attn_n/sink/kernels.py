"""The Triton kernels of `attn_n.sink.fused`.

On 64-bit addressing see `attn_n.backends.triton.portable.tile`.
"""

import triton
import triton.language as tl

_RUN_TIME = ("stride_n", "heads", "rows")  # no kernel is compiled again for their values


@triton.jit(do_not_specialize=_RUN_TIME)
def scale_kernel(
    out, lse, lse_n, sinks, number, strides, strides_lse, strides_lse_n, strides_sinks, stride_n, heads, rows,
    WIDTH: tl.constexpr, TILE: tl.constexpr, TILE_E: tl.constexpr, UNCHANGED: tl.constexpr,
):  # fmt: skip
    # The last rows first: the kernel before stored them last, so that they may still be in L2.
    batch, head, first = place(tl.num_programs(0) - 1 - tl.program_id(0), heads, rows, TILE)
    row = first + tl.arange(0, TILE)
    inside = row < rows
    log_n = number if sinks is None else load_log_n(sinks, strides_sinks, stride_n, batch, head, row, inside)
    row_lse = tl.load(row_of(lse, strides_lse, batch, head, row), mask=inside, other=0.0)
    high, low = tl.maximum(row_lse, log_n), tl.minimum(row_lse, log_n)
    nothing = high == float("-inf")  # a row without visible keys at n = 0
    sum_lse = tl.where(nothing, high, high + tl.log(1.0 + tl.exp(low - high)))
    tl.store(row_of(lse_n, strides_lse_n, batch, head, row), sum_lse, mask=inside)
    # exp(row_lse - sum_lse), without the difference of two large numbers
    factor = tl.where(nothing, 0.0, 1.0 / (1.0 + tl.exp(log_n - row_lse)))
    # Rows of which n is too small to change a bit are not even loaded.
    touched = inside & ~(factor >= UNCHANGED)
    pointers, mask = tile_of(out, strides, batch, head, row, touched, WIDTH, TILE_E)
    tl.store(pointers, tl.load(pointers, mask=mask).to(tl.float32) * factor[:, None], mask=mask)


@triton.jit(do_not_specialize=_RUN_TIME)
def gradient_kernel(
    dout, out, dlse, lse, sinks, shares, strides_dout, strides_out, strides_dlse, strides_lse, strides_sinks, stride_n,
    heads, rows,
    WIDTH: tl.constexpr, TILE: tl.constexpr, TILE_E: tl.constexpr,
):  # fmt: skip
    batch, head, first = place(tl.program_id(0), heads, rows, TILE)
    row = first + tl.arange(0, TILE)
    inside = row < rows
    pointers, mask = tile_of(out, strides_out, batch, head, row, inside, WIDTH, TILE_E)
    out_tile = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    pointers, mask = tile_of(dout, strides_dout, batch, head, row, inside, WIDTH, TILE_E)
    dout_tile = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    delta = tl.sum(out_tile * dout_tile, 1)
    if dlse is not None:
        delta -= tl.load(row_of(dlse, strides_dlse, batch, head, row), mask=inside, other=0.0)
    row_lse = tl.load(row_of(lse, strides_lse, batch, head, row), mask=inside, other=float("inf"))
    log_n = 0.0 if sinks is None else load_log_n(sinks, strides_sinks, stride_n, batch, head, row, inside)
    # A large number instead of infinity: times a delta of zero that would be NaN, and so would be its sum with the
    # opposite. At n = 0 a row without visible keys has lse = log n = -inf, and n does not reach its zero output.
    power = log_n - row_lse
    share = tl.where(power > 88.7, 7.9e28, tl.exp(power))  # 2**96
    share = tl.where(row_lse == float("-inf"), 0.0, share)
    if strides_sinks is None:
        tl.store(shares + tl.program_id(0), -tl.sum(share * delta))
    else:
        tl.store(row_of(shares, strides_sinks, batch, head, row), -share * delta, mask=inside)


@triton.jit
def load_log_n(sinks, strides_sinks, stride_n, batch, head, row, inside):
    """Return log n of the head or, if it has `strides_sinks`, of each row."""
    if strides_sinks is None:
        return tl.load(sinks + head * stride_n)
    else:
        return tl.load(row_of(sinks, strides_sinks, batch, head, row), mask=inside, other=0.0)


@triton.jit
def place(program, heads, rows, TILE: tl.constexpr):
    """Return batch, head and first row of a program."""
    head = (program % heads).to(tl.int64)
    tile = program // heads
    tiles = tl.cdiv(rows, TILE)
    return (tile // tiles).to(tl.int64), head, (tile % tiles).to(tl.int64) * TILE


@triton.jit
def row_of(x, strides, batch, head, row):
    return x + batch * strides[0] + head * strides[1] + row * strides[2]


@triton.jit
def tile_of(x, strides, batch, head, row, inside, WIDTH: tl.constexpr, TILE_E: tl.constexpr):
    """Return the pointers and the mask of a tile of rows of one head."""
    column = tl.arange(0, TILE_E)
    pointers = row_of(x, strides, batch, head, row)[:, None] + column[None, :].to(tl.int64) * strides[3]
    return pointers, inside[:, None] & (column < WIDTH)[None, :]
