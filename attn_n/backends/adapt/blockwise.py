"""Attention put together from rectangles of queries and keys, for kernels that know little.

Such a kernel knows a causal mask that joins the first query to the first key, and a dense bias. Everything else is
made of rectangles that it can do: their outputs are merged by their lse, and their gradients add up, because each is
given the out and the lse of the whole row. Memory beyond the inputs stays linear in L, and the cost of a window
proportional to the window.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from attn_n.backends.adapt import large_bias, one_by_one
from attn_n.backends.adapt.dense_bias import dense_bias
from attn_n.backends.adapt.layout import lse_as_value_column, narrowed, of_width
from attn_n.backends.base import Backend, empty_in_order, memory_order
from attn_n.call import Gradients, Grads, Options, Saved


class RectangleBackend(Backend):
    """A backend by a kernel for rectangles: `widths`, `kernel_forward` and `kernel_backward` say what it does.

    Attributes:
        bias_elements: how many elements a bias that is built here may have: small beside the inputs of a long call.
        most_rows: how many rows a rectangle with such a bias may have.
        base_2: the kernel multiplies logits by log2(e), their bias with them, so that `finfo.min` becomes -inf.
    """

    bias_elements: int
    most_rows: int
    base_2: bool = False

    def widths(self, size: int, size_v: int) -> tuple[int, int]:
        """The head sizes that the kernel runs at, for E and for Ev."""
        raise NotImplementedError

    def kernel_forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, bias: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        """out and lse; causal joins the first query to the first key. A row without visible keys may be anything."""
        raise NotImplementedError

    def kernel_backward(self, dout: Tensor, saved: Saved, causal: bool, bias: Tensor | None, scale: float) -> Gradients:
        """dq, dk, dv; dk and dv may have as many heads as q."""
        raise NotImplementedError

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, log_n: float | Tensor | None, options: Options
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        if not options.varlen:
            return *self._forward(q, k, v, options), None
        return *one_by_one.forward_one_by_one(self._forward, q, k, v, options), None

    def backward(self, grads: Grads, saved: Saved, options: Options) -> Gradients:
        if not options.varlen:
            return self._backward(grads, saved, options)
        return one_by_one.backward_one_by_one(self._backward, grads, saved, options)

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
        size_v = v.shape[3]
        width, width_v = self.widths(q.shape[3], size_v)
        q, k, v = of_width(q, width), of_width(k, width), of_width(v, width_v)
        out = lse = None
        for piece in self._pieces(q, k, options):
            some = (q, k, v) if piece.whole else (q[:, :, piece.rows], k[:, :, piece.keys], v[:, :, piece.keys])
            bias, top = piece.bias, None
            if bias is not None and self.base_2 and _adds_large(options):
                bias, top = large_bias.alone(bias)
            part, part_lse = self.kernel_forward(*some, piece.causal, bias, options.scale)
            if top is not None:
                part_lse = torch.where(top.isnan(), part_lse, top)
            if piece.bias is not None:
                hidden = (piece.bias == -math.inf).all(-1)
                part = part.masked_fill(hidden[..., None], 0.0)
                part_lse = part_lse.masked_fill(hidden, -math.inf)
            if piece.whole:
                return narrowed(part, size_v), part_lse
            if out is None or lse is None:
                out, lse = _nothing(q, width_v)
            _merge_(out[:, :, piece.rows], lse[:, :, piece.rows], part, part_lse)
        if out is None or lse is None:
            out, lse = _nothing(q, width_v)
        return narrowed(out, size_v).to(q.dtype), lse

    def _backward(self, grads: Grads, saved: Saved, options: Options) -> Gradients:
        (dout, dlse, *_), (q, k, v, out, lse, *_) = grads, saved
        size, size_v = q.shape[3], v.shape[3]
        width, width_v = self.widths(size, size_v if dlse is None else size_v + 1)
        if dlse is not None:
            dout, v, out = lse_as_value_column(dout, dlse, v, out, width_v)
        q, k = of_width(q, width), of_width(k, width)
        dout, v, out = (of_width(x, width_v) for x in (dout, v, out))
        gradients: list[Tensor] | None = None
        for piece in self._pieces(q, k, options):
            rows, keys, bias = piece.rows, piece.keys, piece.bias
            some_dout, some_q, some_k, some_lse = dout[:, :, rows], q[:, :, rows], k[:, :, keys], lse[:, :, rows]
            if bias is not None and _adds(options):
                sums: Tensor | None = None
                if self.base_2 and _adds_large(options):
                    bias, top = large_bias.alone(bias)
                    some_lse, sums = large_bias.backward_of_alone(bias, top, some_lse, some_k.shape[2])
                elif not self.base_2:
                    sums = large_bias.sums_of_weights(some_q, some_k, bias, some_lse, options.scale)
                some_dout = some_dout if sums is None else (some_dout / sums[..., None]).to(dout.dtype)
            some = Saved(some_q, some_k, v[:, :, keys], out[:, :, rows], some_lse)
            parts = self.kernel_backward(some_dout, some, piece.causal, bias, options.scale)[:3]
            if piece.whole:
                gradients = list(parts)
                break
            if gradients is None:
                shapes = ((*part.shape[:2], *x.shape[2:]) for x, part in zip((q, k, v), parts, strict=True))
                gradients = [q.new_zeros(shape, dtype=_accumulator(q)) for shape in shapes]
            for gradient, part, span in zip(gradients, parts, (rows, keys, keys), strict=True):
                gradient[:, :, span] += part
        if gradients is None:
            gradients = [torch.zeros_like(x) for x in (q, k, v)]
        dq, dk, dv = (gradient.to(q.dtype) for gradient in gradients)
        return Gradients(narrowed(dq, size), narrowed(dk, size), narrowed(dv, size_v))

    def _pieces(self, q: Tensor, k: Tensor, options: Options) -> Iterator[_Piece]:
        len_q, len_k = q.shape[2], k.shape[2]
        left, right = options.window_left, options.window_right
        if options.alibi_slopes is None and left is None and right is None:
            bias = None
            if options.mask is not None:
                bias = dense_bias(options, len_q, len_k, (0, len_q), (0, len_k), _accumulator(q), q.device)
            yield _Piece(_ALL, _ALL, bias=bias, whole=True)
        elif options.alibi_slopes is None and options.mask is None and left is None and right is not None:
            # Keys that every query sees, or if negative queries that see none.
            before = min(len_k, len_k - len_q + right)
            row, key = max(0, -before), max(0, before)
            side = min(len_q - row, len_k - key)  # of the square on the diagonal; the rows below it see all its keys
            if before == 0 and side == len_q == len_k:
                yield _Piece(_ALL, _ALL, causal=True, whole=True)
                return
            if key > 0:
                yield _Piece(slice(0, len_q), slice(0, key))
            if side > 0:
                yield _Piece(slice(row, row + side), slice(key, key + side), causal=True)
                if row + side < len_q:
                    yield _Piece(slice(row + side, len_q), slice(key, key + side))
        else:
            step = self._rows_a_piece(options, len_k)
            for start in range(0, len_q, step):
                stop = min(start + step, len_q)
                first = 0 if left is None else max(0, start + len_k - len_q - left)
                last = len_k if right is None else min(len_k, stop + len_k - len_q + right)
                if first < last:
                    bias = dense_bias(options, len_q, len_k, (start, stop), (first, last), _accumulator(q), q.device)
                    whole = (start, stop, first, last) == (0, len_q, 0, len_k)
                    yield _Piece(slice(start, stop), slice(first, last), bias=bias, whole=whole)

    def _rows_a_piece(self, options: Options, len_k: int) -> int:
        copies = 1  # of the bias, for batches and heads
        if options.alibi_slopes is not None:
            copies = options.alibi_slopes.numel()
        elif options.mask is not None:
            copies = options.mask.shape[0] * options.mask.shape[1]
        return max(32, min(self.most_rows, self.bias_elements // (copies * len_k)))


_ALL = slice(None)


class _Piece(NamedTuple):
    """A rectangle: full, or causal with its first query at its first key, or with a bias."""

    rows: slice
    keys: slice
    causal: bool = False
    bias: Tensor | None = None
    whole: bool = False  # it is all there is


def _adds(options: Options) -> bool:
    """A floating mask adds numbers to the logits; a bool mask only hides keys."""
    return options.mask is not None and options.mask.is_floating_point()


def _adds_large(options: Options) -> bool:
    """Whether what it adds can be so large that float32 has nothing beside it: float16 ends at 65504."""
    return _adds(options) and options.mask is not None and options.mask.dtype != torch.float16


def _nothing(q: Tensor, width_v: int) -> tuple[Tensor, Tensor]:
    """out and lse of rows that have seen no key yet, for accumulation."""
    shape, dtype = q.shape[:-1], _accumulator(q)
    out = empty_in_order(q, (*shape, width_v), memory_order(q)).to(dtype).zero_()
    return out, torch.full(shape, -math.inf, dtype=dtype, device=q.device)


def _merge_(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Add to `out` and `lse`, in place, the attention of the same rows over further keys."""
    hidden = (lse == -math.inf) & (part_lse == -math.inf)
    weight = torch.sigmoid(part_lse - lse).masked_fill_(hidden, 0.0)[..., None]
    out.mul_(1.0 - weight).addcmul_(part.to(out.dtype), weight)
    lse.copy_(torch.logaddexp(lse, part_lse))


def _accumulator(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)
