"""The rows of a padded batch that do not exist: results have zeros there, which one warp stores by TMA.

It runs beside the roles that compute, which leave most of the memory bandwidth unused, and has a few kB under way at a
time, so that no load waits behind many stores. A pass of its own would have to write the same bytes while nobody
computes. The warp costs no registers: beside the producer it is one of the three that are idle otherwise.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from attn_n.backends.triton.hopper.schedule import rows_of_sequence
from attn_n.backends.triton.hopper.tma import Rows, tile_descriptor, tma_store

ROWS = gl.constexpr(8)  # of a tile of zeros, which has to fit beside the other buffers
WIDTH = gl.constexpr(64)
IN_FLIGHT = gl.constexpr(4)  # stores of such a tile


@gluon.jit
def tile_of_zeros(dtype: gl.constexpr):
    """Allocate what `store_zeros` stores, in one warp."""
    values = gl.zeros([ROWS, WIDTH], dtype, gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0]))
    zeros = gl.allocate_shared_memory(dtype, [ROWS, WIDTH], gl.NVMMASharedLayout(128, 16), values)
    fence_async_shared()
    return zeros


@gluon.jit
def store_zeros(x, strides, batch, heads, extents, zeros, E: gl.constexpr):
    """Store zeros into those rows of x `(B, heads, L, E)` that `extents` leaves out; all programs share the work."""
    descriptor = tile_descriptor(x, None, heads, None, strides, ROWS, E, WIDTH)
    for b in range(batch):
        first, length = rows_of_sequence(extents, b)
        if extents.leftpad is not None:
            store_rows(descriptor, Rows(b, first, first), heads, zeros, E)
        store_rows(descriptor, Rows(b, extents.rows, extents.rows - first - length), heads, zeros, E)
    tma.store_wait(0)


@gluon.jit
def store_rows(descriptor, rows, heads, zeros, E: gl.constexpr):
    """Store zeros into these rows of all heads. Their tiles are counted without a division: it takes registers."""
    tiles = gl.cdiv(rows.length, ROWS)
    head, tile = 0, gl.program_id(0)
    while head < heads:
        if tile < tiles:
            for column in gl.static_range(0, E, WIDTH):
                tma_store(descriptor, rows, head, tile * ROWS, column, zeros)
            tma.store_wait(IN_FLIGHT)
            tile += gl.num_programs(0)
        else:
            tile -= tiles
            head += 1
