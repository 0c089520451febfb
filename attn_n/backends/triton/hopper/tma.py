"""TMA loads and stores of tiles of rows, of tensors `(B, H, L, E)` and of the sequences of varlen ones `(T, H, E)`."""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

from attn_n.backends.triton.hopper.gluon_compat import async_load, async_store, reinterpret


class Rows(NamedTuple):
    """These are the rows of one sequence: those of a batch, or in a varlen tensor the `length` rows before `end`."""

    batch: gl.tensor  # None of varlen tensors
    end: gl.tensor  # None of batched ones, as is `length`
    length: gl.tensor


# Varlen: to the dimensions of the tensor two are added, along which the coordinates are such that they shift the rows
# of one sequence to the end of theirs. There TMA's bounds are those of the sequence: what it loads from beyond is zero,
# what it stores there is dropped. (The trick is that of triton.tools.ragged_tma.) The address is
#   SHIFT * (2**34 - row stride) + end * row stride + (SHIFT - length + row) * row stride  =  (start + row) * row stride
# in numbers of 2 bytes, for addresses are modulo 2**64, and so is SHIFT * 2**34 * 2.
SHIFT = gl.constexpr(1 << 30)
UNBOUNDED = gl.constexpr(0x7FFF0000)


@gluon.jit
def tile_descriptor(
    x, batch, heads, rows, strides, ROWS: gl.constexpr, E: gl.constexpr, WIDTH: gl.constexpr,
):  # fmt: skip
    """Make a descriptor of tiles `[ROWS, WIDTH]` of `(B, H, L, E)`, or if batch is None of varlen `(T, H, E)`.

    Zeros fill up what a tile has beyond the E columns, which are not stored. The kernel makes the descriptor, because
    the host takes longer for one than a short kernel runs.
    """
    if batch is not None:
        LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, 1, ROWS, WIDTH], x.dtype.element_ty)
        return tma.make_tensor_descriptor(
            x, [batch, heads, rows, E], [strides[0], strides[1], strides[2], 1], [1, 1, ROWS, WIDTH], LAYOUT
        )
    else:
        OF_VARLEN: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, 1, 1, ROWS, WIDTH], x.dtype.element_ty)
        row = strides[2].to(gl.int64)
        return tma.make_tensor_descriptor(
            x, [UNBOUNDED, UNBOUNDED, heads, SHIFT, E], [(1 << 34) - row, row, strides[1], row, 1],
            [1, 1, 1, ROWS, WIDTH], OF_VARLEN,
        )  # fmt: skip


@gluon.jit
def boxed(buffer, descriptor):
    """View a buffer `[rows, E]` in the shape of the descriptor's tiles, which has dimensions of length 1 in front."""
    return reinterpret(buffer, descriptor.dtype, descriptor.block_shape, descriptor.layout)


@gluon.jit
def tma_load(descriptor, rows, head, row, column: gl.constexpr, full, buffer):
    """Begin to load the tile whose first row and column these are; the barrier `full` counts the bytes."""
    if rows.batch is not None:
        async_load(descriptor, [rows.batch, head, row, column], full, boxed(buffer, descriptor))
    else:
        at = [SHIFT, rows.end, head, SHIFT - rows.length + row, column]
        async_load(descriptor, at, full, boxed(buffer, descriptor))


@gluon.jit
def tma_store(descriptor, rows, head, row, column, buffer):
    """Begin to store the tile whose first row and column these are."""
    if rows.batch is not None:
        async_store(descriptor, [rows.batch, head, row, column], boxed(buffer, descriptor))
    else:
        at = [SHIFT, rows.end, head, SHIFT - rows.length + row, column]
        async_store(descriptor, at, boxed(buffer, descriptor))
