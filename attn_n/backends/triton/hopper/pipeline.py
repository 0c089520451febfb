"""What the Hopper kernels share: rings of buffers, tiles of rows in memory, arithmetic, and which keys queries see."""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """`COUNT` barriers whose phase ends with that many arrivals (and the bytes that are expected)."""
    found = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(found.index(i), count=ARRIVALS)
    return found


@gluon.jit
def following(stage, phase, STAGES: gl.constexpr):
    """The next buffer of a ring, and the parity of its phase."""
    stage += 1
    if stage == STAGES:
        stage = 0
        phase ^= 1
    return stage, phase


class Packed(NamedTuple):
    """Where packed sequences begin, and the list of their tiles; None of all for batches."""

    starts_q: gl.tensor
    starts_k: gl.tensor
    table: gl.tensor


class Rows(NamedTuple):
    """Those of a sequence in a tensor `(B, H, L, E)`, or in packed `(T, H, E)`."""

    batch: gl.tensor  # None of packed tensors
    end: gl.tensor  # where the sequence ends, and how long it is, in packed tensors
    length: gl.tensor


# Packed sequences: to the dimensions of the tensor two are added, along which the coordinates are such that they shift
# the rows of one sequence to the end of theirs. There the copy engine's bounds are those of the sequence: what it loads
# from beyond is zero, what it stores there is dropped. (The trick is that of triton.tools.ragged_tma.) The address is
#   SHIFT * (2**34 - row stride) + end * row stride + (SHIFT - length + row) * row stride  =  (start + row) * row stride
# in numbers of 2 bytes, for addresses are modulo 2**64, and so is SHIFT * 2**34 * 2.
SHIFT = gl.constexpr(1 << 30)
UNBOUNDED = gl.constexpr(0x7FFF0000)


@gluon.jit
def tiles_of(
    x, batch, heads, rows, strides, ROWS: gl.constexpr, E: gl.constexpr, COLUMNS: gl.constexpr = None,
):  # fmt: skip
    """A descriptor for tiles of rows of `(B, H, L, E)`, or without `batch` of packed `(T, H, E)`.

    `COLUMNS` of a tile are all, unless it is said. Made by the kernel: the host takes longer for one than a short
    kernel runs.
    """
    WIDTH: gl.constexpr = E if COLUMNS is None else COLUMNS
    if batch is not None:
        LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, 1, ROWS, WIDTH], x.dtype.element_ty)
        return tma.make_tensor_descriptor(
            x, [batch, heads, rows, E], [strides[0], strides[1], strides[2], 1], [1, 1, ROWS, WIDTH], LAYOUT
        )
    else:
        OF_PACKED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, 1, 1, ROWS, WIDTH], x.dtype.element_ty)
        row = strides[2].to(gl.int64)
        return tma.make_tensor_descriptor(
            x, [UNBOUNDED, UNBOUNDED, heads, SHIFT, E], [(1 << 34) - row, row, strides[1], row, 1],
            [1, 1, 1, ROWS, WIDTH], OF_PACKED,
        )  # fmt: skip


@gluon.jit
def boxed(buffer, descriptor):
    """A buffer `(rows, E)` in the shape in which a descriptor copies."""
    return buffer._reinterpret(descriptor.dtype, descriptor.block_type.shape, descriptor.layout)


@gluon.jit
def bring(descriptor, rows, head, row, full, buffer):
    """Ask for the tile that begins at `row`; `full` counts its bytes."""
    if rows.batch is not None:
        tma.async_copy_global_to_shared(descriptor, [rows.batch, head, row, 0], full, boxed(buffer, descriptor))
    else:
        at = [SHIFT, rows.end, head, SHIFT - rows.length + row, 0]
        tma.async_copy_global_to_shared(descriptor, at, full, boxed(buffer, descriptor))


@gluon.jit
def put(descriptor, rows, head, row, column, buffer):
    """The way back."""
    if rows.batch is not None:
        tma.async_copy_shared_to_global(descriptor, [rows.batch, head, row, column], boxed(buffer, descriptor))
    else:
        at = [SHIFT, rows.end, head, SHIFT - rows.length + row, column]
        tma.async_copy_shared_to_global(descriptor, at, boxed(buffer, descriptor))


@gluon.jit
def tell(numbers, place, number):
    """Put down a number for the other roles, which a barrier then shows them."""
    numbers.index(place).store(gl.full([1], number, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))


@gluon.jit
def told(numbers, place):
    return gl.max(numbers.index(place).load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def rounded(p, LAYOUT: gl.constexpr, dtype: gl.constexpr):
    """p as the left operand of the next product, two numbers an instruction, which the compiler does not always find.

    (Forward: +15 % under a causal mask, +9 % where three consumers share the registers.)
    """
    if dtype == gl.bfloat16:
        x = gl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [p], gl.bfloat16, is_pure=True, pack=2)
    else:
        x = gl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [p], gl.float16, is_pure=True, pack=2)
    return gl.convert_layout(x, LAYOUT, assert_trivial=True)


@gluon.jit
def blocks_seen(first, last, sizes, TILE_K: gl.constexpr):
    """`begin, full_begin, full_end, end`: the blocks of keys that the queries `first ... last` see, at least one.

    All of these queries see all keys of the blocks from `full_begin` to before `full_end`.
    """
    len_q, len_k, left, right = sizes.len_q, sizes.len_k, sizes.left, sizes.right
    begin, full_begin, end_key, full_end_key = 0, 0, len_k, len_k
    last = gl.minimum(last, len_q - 1)
    if right is not None:
        end_key = gl.minimum(len_k, last + (len_k - len_q) + right + 1)
        full_end_key = gl.minimum(len_k, first + (len_k - len_q) + right + 1)
    if left is not None:
        begin = gl.maximum(0, first + (len_k - len_q) - left) // TILE_K
        full_begin = (gl.maximum(0, last + (len_k - len_q) - left) + TILE_K - 1) // TILE_K
    end = gl.maximum((gl.maximum(end_key, 0) + TILE_K - 1) // TILE_K, 1)
    return gl.minimum(begin, end - 1), full_begin, gl.maximum(full_end_key, 0) // TILE_K, end
