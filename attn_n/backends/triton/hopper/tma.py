"""TMA loads and stores of tiles of rows, of tensors `(B, H, L, E)` and of the sequences of varlen ones `(T, H, E)`.

This file alone knows how a row of a sequence is addressed.
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

from attn_n.backends.triton.hopper.gluon_compat import async_load, async_store, reinterpret


class Rows(NamedTuple):
    """These are the rows of one sequence: all of a batch, or the `length` rows before `end`.

    In a varlen tensor `end` counts its rows, in a padded batch those of the batch. What says nothing is 0.
    """

    batch: gl.tensor  # of a varlen tensor 0, or None, which spares consumers the steps
    end: gl.tensor
    length: gl.tensor


class Descriptor(NamedTuple):
    """This is a TMA descriptor of tiles, and in which steps it counts to the end of a sequence."""

    tiles: tma.tensor_descriptor
    batch_step: gl.tensor
    row_step: gl.tensor


# Varlen: to the dimensions of the tensor two are added, along which the coordinates are such that they shift the rows
# of one sequence to the end of theirs. There TMA's bounds are those of the sequence: what it loads from beyond is zero,
# what it stores there is dropped. (The trick is that of triton.tools.ragged_tma.) The address is
#   SHIFT * (2**34 - row stride) + end * row stride + (SHIFT - length + row) * row stride  =  (start + row) * row stride
# in numbers of 2 bytes, for addresses are modulo 2**64, and so is SHIFT * 2**34 * 2. In a padded batch `(batch * batch
# step + end * row step) * unit` takes the place of `end * row stride`: see `prepare.ragged`.
SHIFT = gl.constexpr(1 << 30)
UNBOUNDED = gl.constexpr(0x7FFF0000)


@gluon.jit
def tile_descriptor(
    x, batch, heads, rows, strides, ROWS: gl.constexpr, E: gl.constexpr, WIDTH: gl.constexpr,
):  # fmt: skip
    """Make a descriptor of tiles `[ROWS, WIDTH]` of `(B, H, L, E)`, or if batch is None of the sequences of a tensor.

    These are varlen, or in a padded batch, whose strides have three more numbers: see `prepare.ragged`.

    Zeros fill up what a tile has beyond the E columns, which are not stored. The kernel makes the descriptor, because
    the host takes longer for one than a short kernel runs.
    """
    if batch is not None:
        LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, 1, ROWS, WIDTH], x.dtype.element_ty)
        tiles = tma.make_tensor_descriptor(
            x, [batch, heads, rows, E], [strides[0], strides[1], strides[2], 1], [1, 1, ROWS, WIDTH], LAYOUT
        )
        return Descriptor(tiles, 0, 0)
    else:
        PADDED: gl.constexpr = len(strides) > 4
        OF_VARLEN: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, 1, 1, ROWS, WIDTH], x.dtype.element_ty)
        row = strides[2].to(gl.int64)
        unit = strides[4] if PADDED else row
        tiles = tma.make_tensor_descriptor(
            x, [UNBOUNDED, UNBOUNDED, heads, SHIFT, E], [(1 << 34) - row, unit, strides[1], row, 1],
            [1, 1, 1, ROWS, WIDTH], OF_VARLEN,
        )  # fmt: skip
        if PADDED:
            return Descriptor(tiles, strides[5], strides[6])
        else:
            return Descriptor(tiles, 0, 1)


@gluon.jit
def boxed(buffer, descriptor):
    """View a buffer `[rows, E]` in the shape of the descriptor's tiles, which has dimensions of length 1 in front."""
    return reinterpret(buffer, descriptor.dtype, descriptor.block_shape, descriptor.layout)


@gluon.jit
def coordinates(descriptor, rows, head, row, column):
    if len(descriptor.tiles.block_shape) == 4:
        return [rows.batch, head, row, column]
    else:
        end = rows.end
        if rows.batch is not None:
            end = (rows.batch * descriptor.batch_step + end * descriptor.row_step).to(gl.int32)
        return [SHIFT, end, head, SHIFT - rows.length + row, column]


@gluon.jit
def tma_load(descriptor, rows, head, row, column: gl.constexpr, full, buffer):
    """Begin to load the tile whose first row and column these are; the barrier `full` counts the bytes."""
    tiles = descriptor.tiles
    async_load(tiles, coordinates(descriptor, rows, head, row, column), full, boxed(buffer, tiles))


@gluon.jit
def tma_store(descriptor, rows, head, row, column, buffer):
    """Begin to store the tile whose first row and column these are."""
    tiles = descriptor.tiles
    async_store(tiles, coordinates(descriptor, rows, head, row, column), boxed(buffer, tiles))
