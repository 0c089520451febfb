"""The device functions that the kernels share: loads and stores of tiles, the bounds of the mask, and the logits.

Logits are in base 2, `log2(e)` times those of the formulas, because the hardware has exp2. Beside a floating mask they
are natural: `finfo.min` times log2(e) would be -inf, and only -inf may hide a key. An argument that is None (a mask, a
side of the window, ...) is a constant of the compiled kernel and costs nothing.

Addresses have 64 bits. Triton gives an integer argument, a stride too, 32 bits if its value fits, and the product of
two such numbers has 32 bits as well. Therefore every kernel of this package and of `attn_n.sink.kernels` casts to int64
whatever it multiplies by a stride or by a length (batch, head, row, column, key, the start of a sequence), and also
batch before `batch * heads`. Only these stay within 32 bits:

- Programs, and the tiles and items that they count: a grid has fewer than 2^31 programs.
- Rows and keys within their sequence, and their distances: `why_not` refuses a length that is less than a tile below
  2^31, and a longer one has 64 bits by its value. `KernelKey` bounds the window and the longest sequence by lengths.
  (Nobody refuses such a length for `attn_n.sink.kernels`, whose rows have 64 bits.)
- `head * stride_n`: the stride of log n is 0 or 1, as `attn_n.autograd.passes` makes it.
- The columns of the tensors that we allocate ourselves, whose last stride is 1.
- In the Hopper kernels, whose heads have 64 columns or more: the rows of all heads, also as coordinates of a TMA
  descriptor. 2^31 of them would take 512 GB in the sum for dQ.
"""

import os

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Triton's interpreter multiplies the bits of bfloat16 as if they were integers.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

# The rounding of an lse of at least this size changes the weights by more than 3e-5.
LARGE_LSE = tl.constexpr(1024.0)

# Rows after each sequence in the backward's own tensors: at least the longest tile of queries.
ROW_PADDING = tl.constexpr(128)

# Triton does not specialise kernels on the values of these. (It does on strides: for multiples of 16 and for others.)
RUN_TIME = ("stride_n", "heads", "padded", "len_q", "len_k", "left", "right", "dropout_threshold", "span")


@triton.jit
def locate(heads, len_q, len_k, tiles, starts_q=None, starts_k=None, used_q=None, used_k=None, leftpad=None):
    """Return the tile, head and batch of this program, the first rows of its sequence in q and k, and its lengths."""
    program = tl.program_id(0)
    tile, head, batch = program % tiles, (program // tiles) % heads, (program // tiles // heads).to(tl.int64)
    first_q, first_k = batch * 0, batch * 0
    if starts_q is not None:  # varlen sequences
        first_q, first_k = tl.load(starts_q + batch).to(tl.int64), tl.load(starts_k + batch).to(tl.int64)
        len_q = (tl.load(starts_q + batch + 1) - first_q).to(tl.int32)
        len_k = (tl.load(starts_k + batch + 1) - first_k).to(tl.int32)
    len_q, first_k, len_k = rows_in_use(used_q, used_k, leftpad, batch, len_q, first_k, len_k)
    return tile, head, batch, first_q, first_k, len_q, len_k


@triton.jit
def rows_in_use(used_q, used_k, leftpad, batch, len_q, first_k, len_k):
    """Return the number of queries, the first key, and the number of keys from there on, of those that exist."""
    if used_q is not None:
        len_q = tl.load(used_q + batch)
    if used_k is not None:
        len_k = tl.load(used_k + batch)
    if leftpad is not None:
        first = tl.load(leftpad + batch)
        first_k, len_k = first.to(tl.int64), tl.maximum(len_k - first, 0)
    return len_q, first_k, len_k


@triton.jit
def head_pointer(x, strides, batch, head):
    """Return the pointer to the elements of x for a batch (int64) and a head."""
    return x + (batch * strides[0] + head.to(tl.int64) * strides[1])


@triton.jit
def base_of(x, strides, batch, head, first_row):
    """Return the pointer to the first row of a sequence in a head. (The batch stride of varlen tensors is zero.)"""
    return x + (batch * strides[0] + head.to(tl.int64) * strides[1] + first_row * strides[2])


@triton.jit
def view(
    x, heads, rows, strides,
    WIDTH: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_WIDTH: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Return what `load` takes: a tensor descriptor of `(heads, rows, WIDTH)` at x, or the pointer x itself."""
    if DESCRIPTORS:
        return tl.make_tensor_descriptor(
            x, [heads, rows, WIDTH], [strides[1], strides[2], 1], [1, TILE_ROWS, TILE_WIDTH]
        )
    else:
        return x


@triton.jit
def load(
    view, head, first_row, rows, strides, WIDTH: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_WIDTH: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Load the tile `(TILE_ROWS, TILE_WIDTH)` that begins at `first_row`, with zeros out of bounds."""
    if DESCRIPTORS:
        return view.load([head, first_row, 0]).reshape(TILE_ROWS, TILE_WIDTH)
    else:
        row, column = (first_row + tl.arange(0, TILE_ROWS))[:, None], tl.arange(0, TILE_WIDTH)[None, :]
        of_row = view + tl.cast(head, tl.int64) * strides[1] + row.to(tl.int64) * strides[2]
        pointers = of_row + column.to(tl.int64) * strides[3]
        if WIDTH == TILE_WIDTH:
            return tl.load(pointers, mask=row < rows, other=0.0)
        else:
            return tl.load(pointers, mask=(row < rows) & (column < WIDTH), other=0.0)


@triton.jit
def view_batches(
    x, batches, heads, rows, strides,
    WIDTH: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_WIDTH: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Return what `load_from` takes: a descriptor of `(batches, heads, rows, WIDTH)`, or the pointer x itself."""
    if DESCRIPTORS:
        return tl.make_tensor_descriptor(
            x, [batches, heads, rows, WIDTH], [strides[0], strides[1], strides[2], 1], [1, 1, TILE_ROWS, TILE_WIDTH]
        )
    else:
        return x


@triton.jit
def load_from(
    view, batch, head, first_of_sequence, first_row, rows, strides,
    WIDTH: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_WIDTH: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Load as `load` does, of any batch."""
    if DESCRIPTORS:
        return view.load([batch.to(tl.int32), head, first_row, 0]).reshape(TILE_ROWS, TILE_WIDTH)
    else:
        base = base_of(view, strides, batch, head, first_of_sequence)
        return load(base, 0, first_row, rows, strides, WIDTH, TILE_ROWS, TILE_WIDTH, False)


@triton.jit
def view_mask(
    mask, strides, batch, head, heads, first_k, leftpad, len_q, len_k,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, MASK_DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """Return what `load_mask` takes for `heads` heads from `head` on: a tensor descriptor, or a pointer.

    Behind padding on the left it begins at the first key that exists.
    """
    first = head_pointer(mask, strides, batch, head)
    if leftpad is not None:
        first += first_k * strides[3]
    if MASK_DESCRIPTOR:
        # A descriptor has no stride of 0: a mask that all heads have in common is that of one head.
        stride = tl.where(strides[1] == 0, strides[2], strides[1])
        return tl.make_tensor_descriptor(first, [heads, len_q, len_k], [stride, strides[2], 1], [1, TILE_Q, TILE_K])
    else:
        return first


@triton.jit
def load_mask(
    view, strides, mask_keys, head, first_row, first_key, len_q, len_k,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, MASK_DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """Load the tile `(TILE_Q, TILE_K)` of a mask, with zeros out of bounds.

    `mask_keys` is `len_k`, specialised: if both are multiples of 16 several keys are one load. It is None where
    sequences have lengths of their own.
    """
    if MASK_DESCRIPTOR:
        return view.load([tl.where(strides[1] == 0, 0, head), first_row, first_key]).reshape(TILE_Q, TILE_K)
    else:
        row, key = (first_row + tl.arange(0, TILE_Q))[:, None], (first_key + tl.arange(0, TILE_K))[None, :]
        of_head = view + tl.cast(head, tl.int64) * strides[1]
        pointers = of_head + row.to(tl.int64) * strides[2] + key.to(tl.int64) * strides[3]
        return tl.load(pointers, mask=(row < len_q) & (key < (len_k if mask_keys is None else mask_keys)), other=0)


@triton.jit
def store(
    x, tile, first_row, rows, strides, WIDTH: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_WIDTH: tl.constexpr,
):  # fmt: skip
    """Store the part of a tile that is in bounds."""
    row, column = (first_row + tl.arange(0, TILE_ROWS))[:, None], tl.arange(0, TILE_WIDTH)[None, :]
    pointers = x + row.to(tl.int64) * strides[2] + column * strides[3]
    tl.store(pointers, tile.to(x.dtype.element_ty), mask=(row < rows) & (column < WIDTH))


@triton.jit
def row_pointers(x, batch, head, heads, first_q, rows, all_q, VARLEN: tl.constexpr):
    """Return the pointers to rows of a head in a tensor of one number a row, `(B, H, L)` or varlen `(T, H)`."""
    if VARLEN:
        return x + (first_q + rows) * heads + head
    else:
        return x + (batch * heads + head) * all_q + rows


@triton.jit
def load_sink(sinks, stride_n, batch, head, heads, first_q, rows, len_q, all_q, VARLEN: tl.constexpr):
    """Return log n of the head or, where it has no stride, of each row."""
    if stride_n is None:
        of_rows = row_pointers(sinks, batch, head, heads, first_q, rows, all_q, VARLEN)
        return tl.load(of_rows, mask=rows < len_q, other=0.0)
    else:
        return tl.load(sinks + head * stride_n)


@triton.jit
def padded_base(x, batch, head, padded, first_q, all_q, VARLEN: tl.constexpr):
    """Return the pointer to the first row of a sequence in the backward's own tensors `(H, padded)`.

    There ROW_PADDING rows follow each sequence, so tiles can be loaded unmasked: a pipelined load would keep its mask
    in registers.
    """
    return x + (head.to(tl.int64) * padded + (first_q if VARLEN else batch * all_q) + batch * ROW_PADDING)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def add_dot(acc, a, b, PRECISION: tl.constexpr):
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def tanh(x):
    """Compute tanh by its series near zero, where the difference of two exponentials would cancel."""
    square = x * x
    series = 1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
    return tl.where(tl.abs(x) < 0.3, x * series, 1 - 2 / (1 + tl.exp2(x * (2 * LOG2E))))


@triton.jit
def logits(
    qk,  # Q K^T, float32: (Q, K), or transposed (K, Q)
    row,  # positions of the queries, (Q, 1), or (1, Q) beside a transposed qk; those of the keys are (1, K), or (K, 1)
    key,
    len_q, len_k, left, right, scale, softcap,
    mask,  # its tile, shaped as qk, or None
    slope,  # the ALiBi slope, or None
    edge,  # some pairs may be outside of the window, or some keys beyond the end
    LINEAR: tl.constexpr,  # the logits are qk times a positive number, by which the caller multiplies
    FLOAT_MASK: tl.constexpr,
):  # fmt: skip
    """Return the logits, shaped as qk, and the derivative of the softcap.

    The logits are in base 2, or natural beside a floating mask, and -inf where a query does not see a key.
    """
    cap_derivative = 1.0
    unit: tl.constexpr = 1.0 if FLOAT_MASK else LOG2E
    if LINEAR:
        s = qk
    elif softcap is not None:
        capped = tanh(qk * (scale / softcap))
        cap_derivative = 1 - capped * capped
        s = capped * (softcap * unit)
    else:
        s = qk * (scale * unit)
    distance = row + (len_k - len_q) - key
    if slope is not None:
        s -= tl.abs(distance).to(tl.float32) * (slope * unit)
    if mask is not None:
        if FLOAT_MASK:
            s += mask.to(tl.float32)
        else:
            s = tl.where(mask != 0, s, float("-inf"))
    if edge:
        visible = key < len_k
        if left is not None:
            visible &= distance <= left
        if right is not None:
            visible &= -distance <= right
        s = tl.where(visible, s, float("-inf"))
    return s, cap_derivative


@triton.jit
def dropout_mask(rng_state, head, row, key, threshold):
    """Return True for the weights that dropout keeps: each pair has its own 31 random bits, whatever the tiles."""
    seed, offset = tl.load(rng_state), tl.load(rng_state + 1).to(tl.int32)
    zero = row * 0 + key * 0
    random, _, _, _ = tl.philox(seed, key + zero, row + zero, head.to(tl.int32) + zero, offset + zero)
    return (random.to(tl.uint32, bitcast=True) >> 1).to(tl.int32) >= threshold


@triton.jit
def keys_seen(first_row, len_q, len_k, left, right, TILE_Q: tl.constexpr, TILE_K: tl.constexpr):
    """Return `begin, full_begin, full_end, end` of the keys that a tile of queries sees.

    Some query of the tile sees each key from begin to end, and from full_begin to full_end all queries see all keys, so
    that no mask is needed. All but `end` are multiples of TILE_K.
    """
    first = first_row + (len_k - len_q)
    last = tl.minimum(first_row + TILE_Q, len_q) - 1 + (len_k - len_q)
    begin, full_begin, end, full_end = 0, 0, len_k, len_k
    if right is not None:
        end = tl.maximum(0, tl.minimum(len_k, last + right + 1))
        full_end = tl.maximum(0, tl.minimum(len_k, first + right + 1))
    if left is not None:
        begin = tl.maximum(0, first - left) // TILE_K * TILE_K
        full_begin = tl.cdiv(tl.maximum(0, last - left), TILE_K) * TILE_K
    full_end = tl.maximum(full_end // TILE_K * TILE_K, full_begin)
    return begin, full_begin, full_end, end


@triton.jit
def queries_that_see(first_key, len_q, len_k, left, right, TILE_Q: tl.constexpr, TILE_K: tl.constexpr):
    """Return `begin, full_begin, full_end, end` of the queries that see a tile of keys, as `keys_seen` does of keys."""
    first = first_key - (len_k - len_q)
    last = tl.minimum(first_key + TILE_K, len_k) - 1 - (len_k - len_q)
    begin, full_begin, end, full_end = 0, 0, len_q, len_q
    if left is not None:
        end = tl.maximum(0, tl.minimum(len_q, last + left + 1))
        full_end = tl.maximum(0, tl.minimum(len_q, first + left + 1))
    if right is not None:
        begin = tl.maximum(0, first - right) // TILE_Q * TILE_Q
        full_begin = tl.cdiv(tl.maximum(0, last - right), TILE_Q) * TILE_Q
    full_end = tl.maximum(full_end // TILE_Q * TILE_Q, full_begin)
    return begin, full_begin, full_end, end
