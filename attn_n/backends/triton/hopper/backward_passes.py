"""The two small kernels before and after the backward kernel: they preprocess its rows and convert its sums.

All three share `stats`, which has lse in base 2 and -delta of all rows and a counter, and `dq_sum`, the float32 sum for
dQ. Both have a whole number of tiles of rows for each head, so that tiles are loaded and added without a mask. Varlen
sequences lie one behind the other, as if of a batch of one, and each begins with a tile of its own: sequence b with the
tile of number `starts[b] // TILE_Q + b`, which leaves room enough and needs no sum over the other sequences. A padded
batch has the tiles of all rows; those that do not exist have no zeros in `dq_sum`, and 0 is their share of dn.

The three overlap (programmatic dependent launch): each may start when the one before it has, and waits for its end
before it reads what that has written.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from attn_n.backends.triton.portable.tile import (
    INTERPRETED,
    LOG2E,
    base_of,
    load,
    load_sink,
    locate,
    row_pointers,
    store,
)

RUN_TIME = ("sequences", "stride_n", "heads", "len_q", "length")


@triton.jit
def counter_of(stats, rows):
    """Return the counter of the tiles of keys that are taken: it is behind lse and delta of the rows of all heads."""
    return (stats + 2 * rows).to(tl.pointer_type(tl.int32), bitcast=True)


@triton.jit
def rows_of_tile(starts, sequences, tile, TILE_Q: tl.constexpr):
    """Return the first row of a tile in its sequence, where that sequence begins, and its length.

    The sequence of a tile is the last one that begins at it or before; the tile may lie beyond the sequence's end.
    """
    sequence, end = 0, sequences
    while end - sequence > 1:
        middle = (sequence + end) // 2
        if tl.load(starts + middle) // TILE_Q + middle <= tile:
            sequence = middle
        else:
            end = middle
    first_q = tl.load(starts + sequence)
    return (
        (tile - sequence - first_q // TILE_Q) * TILE_Q,
        first_q.to(tl.int64),
        tl.load(starts + sequence + 1) - first_q,
    )


@triton.jit(do_not_specialize=RUN_TIME)
def preprocess_kernel(
    out, dout, lse, dlse, stats, dq_sum, sinks, dn, starts, used,
    strides_out, strides_dout, sequences, stride_n, heads, len_q, SPEC: tl.constexpr,
):  # fmt: skip
    """Write lse in base 2, `-delta = dlse - rowsum(dout * out)`, zeros in dq_sum, and this tile's share of dn.

    lse is infinite and delta 0 beyond the end of a sequence, which of a padded batch is at `used`.
    """
    if not INTERPRETED:
        gdc_launch_dependents()
    TILE_Q: tl.constexpr = SPEC.pass_q
    EV: tl.constexpr = SPEC.widths.head_dim_v
    TILE_V: tl.constexpr = SPEC.widths.tile_v
    PADDED: tl.constexpr = SPEC.widths.padded
    all_q = len_q
    tile, head, batch, first_q, _, len_q, _ = locate(heads, all_q, all_q, tl.cdiv(all_q, TILE_Q), used_q=used)
    first_row = tile * TILE_Q
    if starts is not None:
        first_row, first_q, len_q = rows_of_tile(starts, sequences, tile, TILE_Q)
    rows = first_row + tl.arange(0, TILE_Q)  # [TILE_Q], as are row_lse and row_delta
    sink = 0.0  # without sinks the gradient is that of n itself
    if dn is not None and sinks is not None:  # asked for with the other rows, so that nothing waits for it alone
        sink = load_sink(sinks, stride_n, batch, head, heads, first_q, rows, len_q, all_q, starts is not None)
        sink *= LOG2E
    of_out, of_dout = (
        base_of(out, strides_out, batch, head, first_q),
        base_of(dout, strides_dout, batch, head, first_q),
    )
    out_tile = load(of_out, 0, first_row, len_q, strides_out, EV, TILE_Q, TILE_V, False)  # [TILE_Q, TILE_V]
    dout_tile = load(of_dout, 0, first_row, len_q, strides_dout, EV, TILE_Q, TILE_V, False)
    of_lse = row_pointers(lse, batch, head, heads, first_q, rows, all_q, starts is not None)
    row_lse = tl.load(of_lse, mask=rows < len_q, other=float("inf")) * LOG2E
    row_delta = tl.sum(out_tile.to(tl.float32) * dout_tile.to(tl.float32), 1)
    if dlse is not None:
        of_dlse = row_pointers(dlse, batch, head, heads, first_q, rows, all_q, starts is not None)
        row_delta -= tl.load(of_dlse, mask=rows < len_q, other=0.0)

    first, all_rows = tl.program_id(0).to(tl.int64) * TILE_Q, tl.num_programs(0).to(tl.int64) * TILE_Q
    tl.store(stats + first + tl.arange(0, TILE_Q), row_lse)
    tl.store(stats + all_rows + first + tl.arange(0, TILE_Q), -row_delta)
    if True if used is None else first_row < len_q:
        tl.store(dq_sum + first * PADDED + tl.arange(0, TILE_Q * PADDED), tl.zeros((TILE_Q * PADDED,), tl.float32))
    if tl.program_id(0) == 0:
        tl.store(counter_of(stats, all_rows), 0)
    if dn is not None:
        # The gradient of log n is the sum of -exp(log n - lse) * delta; without sinks this is that of n itself, which
        # is the sum of -exp(-lse) * delta.
        # A large number in place of infinity, since the shares of two rows could be infinite and of opposite sign.
        power = sink - row_lse
        share = tl.where(power > 127.9, 7.9e28, tl.exp2(tl.minimum(power, 127.9)))  # 2**96
        if sinks is not None and stride_n is None:
            of_dn = row_pointers(dn, batch, head, heads, first_q, rows, all_q, starts is not None)
            tl.store(of_dn, -share * row_delta, mask=rows < (len_q if used is None else all_q))
        else:
            tl.store(dn + tl.program_id(0), -tl.sum(share * row_delta))


@triton.jit(do_not_specialize=RUN_TIME)
def postprocess_kernel(
    x_sum, x, starts, used, leftpad, strides, sequences, heads, length, scale,
    E: tl.constexpr, TILE: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """Convert a float32 sum to dQ `[..., E]`, or to dK or dV where several programs add to these.

    Of a padded batch only the rows from `leftpad` to `used` are stored.

    The sum consists of tiles of 64 x 64 in the order in which a wgmma's accumulator lies in registers: 8 columns by 8;
    then 4 warps of 16 rows, of each 8 x 4 threads, of each 2 x 2 numbers, which are 8 rows apart.
    """
    tile, head, batch, _, first, _, length = locate(
        heads, length, length, tl.cdiv(length, TILE), used_k=used, leftpad=leftpad
    )
    WIDTH: tl.constexpr = SPEC.widths.padded
    at = tl.program_id(0).to(tl.int64) * TILE * WIDTH
    if not INTERPRETED:
        gdc_wait()
    if used is not None or leftpad is not None:  # noqa: SIM102  (a constant of the compiled kernel)
        if tile * TILE >= length:
            return
    found = tl.load(x_sum + at + tl.arange(0, TILE * WIDTH)) * scale
    found = found.reshape(TILE // 64, WIDTH // 64, 8, 4, 8, 4, 2, 2).permute(0, 3, 6, 4, 1, 2, 5, 7)
    found = found.reshape(TILE, WIDTH)
    first_row = tile * TILE
    if starts is not None:
        first_row, first, length = rows_of_tile(starts, sequences, tile, TILE)
    store(base_of(x, strides, batch, head, first), found, first_row, length, strides, E, TILE, WIDTH)
