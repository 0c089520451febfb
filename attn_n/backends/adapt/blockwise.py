"""Attention put together from blocks, for kernels limited to top-left causal masks and a dense bias.

A call is divided into blocks of queries and keys that such a kernel can compute. Their outputs are merged by their lse,
as in split-KV. Their gradients add up, because the backward of each block gets the out and the lse of the whole row.
Memory beyond the inputs stays linear in L, and the cost of a window is proportional to the window.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from attn_n.backends.adapt import large_bias, matmuls, one_by_one, padding
from attn_n.backends.adapt.dense_bias import dense_bias
from attn_n.backends.adapt.layout import is_of_width, lse_as_value_column, narrowed, of_width
from attn_n.backends.base import Backend, Prepared, empty_in_order, memory_order
from attn_n.call import Gradients, Grads, Options, Saved
from attn_n.sink.merging import merge_


class BlockwiseBackend(Backend):
    """A backend on a kernel for blocks, which `widths`, `kernel_forward` and `kernel_backward` describe.

    Attributes:
        bias_elements: how many elements a bias that is built here may have: small beside the inputs of a long call.
        most_rows: how many rows a block with such a bias may have.
        repeats_kv: the backward gives dk and dv for each query head.
        base_2: the kernel multiplies logits by log2(e), their bias with them, so that `finfo.min` becomes -inf.
    """

    compares_lengths = True
    bias_elements: int
    most_rows: int
    base_2: bool = False
    repeats_kv: bool = False

    def widths(self, size: int, size_v: int) -> tuple[int, int]:
        """Return the head sizes that the kernel runs at, for E and for Ev."""
        raise NotImplementedError

    def kernel_forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, bias: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Return out and lse; `causal` is aligned top-left. Rows without visible keys may hold anything."""
        raise NotImplementedError

    def kernel_backward(self, dout: Tensor, saved: Saved, causal: bool, bias: Tensor | None, scale: float) -> Gradients:
        """Return dq, dk, dv; dk and dv may have as many heads as q."""
        raise NotImplementedError

    def prepare(self, q: Tensor, k: Tensor, v: Tensor, log_n: float | Tensor | None, options: Options) -> Prepared:
        if options.varlen or options.padded or self.widths(q.shape[3], v.shape[3]) != (q.shape[3], v.shape[3]):
            return self
        # On CUDA an address decides whether a tensor is read as it is.
        if q.is_cpu and all(is_of_width(x, x.shape[3]) for x in (q, k, v)):
            blocks = self._blocks(q, k, options)
            if len(blocks) == 1 and blocks[0].rows is None:
                plain = blocks[0] == Block(None, None, blocks[0].causal) and options.softcap is None
                return Whole(self, blocks[0].causal) if plain else OneBlock(self, blocks[0])
        return self

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, log_n: float | Tensor | None, options: Options
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        if options.padded:
            return *padding.forward_each(self._forward, self, q, k, v, options), None
        if not options.varlen:
            return *self._forward(q, k, v, options), None
        return *one_by_one.forward_one_by_one(self._forward, q, k, v, options), None

    def backward(self, grads: Grads, saved: Saved, options: Options) -> Gradients:
        if options.padded:
            return padding.backward_each(self._backward, grads, saved, options)
        if not options.varlen:
            return self._backward(grads, saved, options)
        return one_by_one.backward_one_by_one(self._backward, grads, saved, options)

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
        size_v = v.shape[3]
        width, width_v = self.widths(q.shape[3], size_v)
        q, k, v = of_width(q, width), of_width(k, width), of_width(v, width_v)
        blocks = self._blocks(q, k, options)
        if len(blocks) == 1 and blocks[0].rows is None:
            out, lse = self.forward_of(blocks[0], q, k, v, options)
            return narrowed(out, size_v), lse
        out, lse = _nothing(q, width_v)
        for block in blocks:
            part, part_lse = self.forward_of(block, q, k, v, options)
            some_out, some_lse = _some(out, block.rows), _some(lse, block.rows)
            if block.alone:
                some_out.copy_(part)
                some_lse.copy_(part_lse)
            else:
                merge_(some_out, some_lse, part, part_lse)
        return narrowed(out, size_v).to(q.dtype), lse

    def forward_of(self, block: Block, q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
        bias = _bias(block, q, k, options)
        if block.rows is not None:
            q = _some(q, block.rows)
        if block.keys is not None:
            k, v = _some(k, block.keys), _some(v, block.keys)
        if options.softcap is not None:
            return matmuls.forward(q, k, v, bias, options.scale, options.softcap)
        if bias is None:
            return self.kernel_forward(q, k, v, block.causal, None, options.scale)
        given, row_max = large_bias.alone(bias) if self.base_2 and _adds_large(options) else (bias, None)
        out, lse = self.kernel_forward(q, k, v, False, given, options.scale)
        if row_max is not None:
            lse = torch.where(row_max.isnan(), lse, row_max)
        largest = bias.amax(-1)
        if largest.is_cpu and largest.min().item() > -math.inf:  # on a GPU this would synchronize
            return out, lse
        hidden = largest == -math.inf
        return out.masked_fill(hidden[..., None], 0.0), lse.masked_fill(hidden, -math.inf)

    def _backward(self, grads: Grads, saved: Saved, options: Options) -> Gradients:
        (dout, dlse, *_), (q, k, v, out, lse, *_) = grads, saved
        size, size_v = q.shape[3], v.shape[3]
        width, width_v = self.widths(size, size_v if dlse is None else size_v + 1)
        if dlse is not None:
            dout, v, out = lse_as_value_column(dout, dlse, v, out, width_v)
        wide = Saved(of_width(q, width), of_width(k, width), of_width(v, width_v), of_width(out, width_v), lse)
        dout = of_width(dout, width_v)
        blocks = self._blocks(q, k, options)
        if len(blocks) == 1 and blocks[0].rows is blocks[0].keys is None:
            gradients = list(self._backward_of(blocks[0], dout, wide, options))
        else:
            of_kv = q if self.repeats_kv and options.softcap is None else k
            heads = q.shape[1], *(of_kv.shape[1],) * 2
            shapes = ((x.shape[0], of_x, *x.shape[2:]) for x, of_x in zip(wide[:3], heads, strict=True))
            gradients = [q.new_zeros(shape, dtype=_accumulator(q)) for shape in shapes]
            for block in blocks:
                parts = self._backward_of(block, dout, wide, options)
                for gradient, part, span in zip(gradients, parts, (block.rows, block.keys, block.keys), strict=True):
                    _some(gradient, span).add_(part)
        dq, dk, dv = (gradient.to(q.dtype) for gradient in gradients)
        return Gradients(narrowed(dq, size), narrowed(dk, size), narrowed(dv, size_v))

    def _backward_of(self, block: Block, dout: Tensor, saved: Saved, options: Options) -> tuple[Tensor, ...]:
        q, k, v, out, lse, *_ = saved
        bias = _bias(block, q, k, options)
        q, dout, out, lse = (_some(x, block.rows) for x in (q, dout, out, lse))
        k, v = _some(k, block.keys), _some(v, block.keys)
        if options.softcap is not None:
            return matmuls.backward(dout, Saved(q, k, v, out, lse), bias, options.scale, options.softcap)[:3]
        if bias is not None and _adds(options):
            sums: Tensor | None = None
            if self.base_2 and _adds_large(options):
                bias, row_max = large_bias.alone(bias)
                lse, sums = large_bias.backward_of_alone(bias, row_max, lse, k.shape[2])
            elif not self.base_2:
                sums = large_bias.sums_of_weights(q, k, bias, lse, options.scale)
            dout = dout if sums is None else (dout / sums[..., None]).to(dout.dtype)
        return self.kernel_backward(dout, Saved(q, k, v, out, lse), block.causal, bias, options.scale)[:3]

    def _blocks(self, q: Tensor, k: Tensor, options: Options) -> tuple[Block, ...]:
        batch, heads, len_q, _ = q.shape
        len_k = k.shape[2]
        mask, slopes = options.mask, options.alibi_slopes
        copies = 1  # of a bias, or of the logits, for batches and heads
        if options.softcap is not None:
            copies = batch * heads
        elif slopes is not None:
            copies = slopes.numel()
        elif mask is not None:
            copies = mask.shape[0] * mask.shape[1]
        step = max(32, min(self.most_rows, self.bias_elements // (copies * len_k)))
        return _blocks(
            len_q, len_k, options.window_left, options.window_right, mask is not None, slopes is not None,
            options.softcap is not None, step,
        )  # fmt: skip


class OneBlock:
    """A prepared call of one block whose tensors the kernel takes as they are."""

    def __init__(self, backend: BlockwiseBackend, block: Block) -> None:
        self._backend, self._block, self.backward = backend, block, backend.backward

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, log_n: float | Tensor | None, options: Options
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        out, lse = self._backend.forward_of(self._block, q, k, v, options)
        return out, lse, None


class Whole:
    """A prepared call that the kernel takes as it is, without a bias."""

    def __init__(self, backend: BlockwiseBackend, causal: bool) -> None:
        self._backend, self._causal = backend, causal

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, log_n: float | Tensor | None, options: Options
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        out, lse = self._backend.kernel_forward(q, k, v, self._causal, None, options.scale)
        return out, lse, None

    def backward(self, grads: Grads, saved: Saved, options: Options) -> Gradients:
        # Hooks of saved tensors may have changed the strides of what the forward got, and dout may have any.
        if grads.dlse is None and all([is_of_width(x, x.shape[3]) for x in (grads.dout, *saved[:4])]):
            return self._backend.kernel_backward(grads.dout, saved, self._causal, None, options.scale)
        return self._backend.backward(grads, saved, options)


class Block(NamedTuple):
    """A rectangle of the logits: it is full, or causal from its top-left corner, or it has a dense bias.

    Attributes:
        rows, keys: the first one and the one after the last; None stands for all.
        alone: no other block has these rows.
    """

    rows: tuple[int, int] | None
    keys: tuple[int, int] | None
    causal: bool = False
    biased: bool = False
    alone: bool = True


@functools.lru_cache(1024)
def _blocks(
    len_q: int, len_k: int, left: int | None, right: int | None, masked: bool, alibi: bool, softcap: bool, step: int
) -> tuple[Block, ...]:
    """Return the blocks of a call; those with a bias that is built here, or with a softcap, have up to `step` rows."""
    if left is None and right is None and not alibi and not softcap:
        return (Block(None, None, biased=masked),)
    if left is None and right is not None and not masked and not alibi and not softcap:
        return _causal_blocks(len_q, len_k, right)
    found = []
    for start in range(0, len_q, step):
        stop = min(start + step, len_q)
        # The diagonals of the first and the last row; `begin` and `end` bound the keys that the block sees.
        of_first, of_last = start + len_k - len_q, stop - 1 + len_k - len_q
        begin = 0 if left is None else max(0, of_first - left)
        end = len_k if right is None else min(len_k, of_last + right + 1)
        if begin < end:
            all_see_all = (left is None or of_last - left <= begin) and (right is None or end <= of_first + right + 1)
            rows = None if (start, stop) == (0, len_q) else (start, stop)
            keys = None if (begin, end) == (0, len_k) else (begin, end)
            found.append(Block(rows, keys, biased=masked or alibi or not all_see_all))
    return tuple(found)


def _causal_blocks(len_q: int, len_k: int, right: int) -> tuple[Block, ...]:
    # The number of keys that every query sees; if negative, of queries that see none.
    before = min(len_k, len_k - len_q + right)
    row, key = max(0, -before), max(0, before)
    side = min(len_q - row, len_k - key)  # of the square on the diagonal; the rows below it see all its keys
    if before == 0 and side == len_q == len_k:
        return (Block(None, None, causal=True),)
    found = []
    if key > 0:
        found.append(Block(None, None if key == len_k else (0, key), alone=side <= 0))
    if side > 0:
        of_keys = None if (key, side) == (0, len_k) else (key, key + side)
        # One query sees all keys of its square, which has one.
        found.append(Block((row, row + side), of_keys, causal=side > 1, alone=key == 0))
        if row + side < len_q:
            found.append(Block((row + side, len_q), of_keys, alone=key == 0))
    return tuple(found)


def _some(x: Tensor, span: tuple[int, int] | None) -> Tensor:
    """Return these rows of `(B, H, L, ...)`."""
    return x if span is None else x.narrow(2, span[0], span[1] - span[0])


def _bias(block: Block, q: Tensor, k: Tensor, options: Options) -> Tensor | None:
    if not block.biased:
        return None
    len_q, len_k = q.shape[2], k.shape[2]
    return dense_bias(
        options, len_q, len_k, block.rows or (0, len_q), block.keys or (0, len_k), _accumulator(q), q.device
    )


def _adds(options: Options) -> bool:
    """Return True if the mask adds numbers to the logits; a bool mask only hides keys."""
    return options.mask is not None and options.mask.is_floating_point()


def _adds_large(options: Options) -> bool:
    """Return True if these numbers can be so large that float32 rounds the logits away; float16 ends at 65504."""
    mask = options.mask
    return mask is not None and mask.is_floating_point() and mask.dtype != torch.float16


def _nothing(q: Tensor, width_v: int) -> tuple[Tensor, Tensor]:
    """Return out and lse of rows that have seen no key yet, for accumulation."""
    shape, dtype = q.shape[:-1], _accumulator(q)
    out = empty_in_order(q, (*shape, width_v), memory_order(q)).to(dtype).zero_()
    return out, torch.full(shape, -math.inf, dtype=dtype, device=q.device)


def _accumulator(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype is torch.float64 else torch.float32
