"""PyTorch's flash attention for CPU.

The kernel knows a causal mask aligned to the first query and the first key, and a dense bias. What it is asked for
here is put together from rectangles of queries and keys: their outputs are merged by their lse, their gradients add
up. Memory beyond the inputs stays linear in L, and the cost of a window proportional to the window.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from attn_n import packed
from attn_n.backends.base import Backend, empty_in_order, memory_order
from attn_n.backends.sdpa import aten
from attn_n.bias import dense_bias
from attn_n.call import AttentionCall, Options
from attn_n.fold import lse_as_value_column

_SIGNATURES = (
    "_scaled_dot_product_flash_attention_for_cpu(query, key, value, dropout_p, is_causal, *, attn_mask, scale) -> 2",
    "_scaled_dot_product_flash_attention_for_cpu_backward"
    "(grad_out, query, key, value, out, logsumexp, dropout_p, is_causal, *, attn_mask, scale) -> 3",
)
# Elements of a bias that is built here: 16 MB in float32, small beside the inputs of a long sequence.
_BIAS_ELEMENTS = 1 << 22


class CpuFlash(Backend):
    name = "sdpa:cpu"
    summary = "PyTorch's flash attention for CPU"

    def why_not(self, call: AttentionCall) -> str | None:
        if call.device != "cpu":
            return f"runs on CPU, not on {call.device}"
        if call.dropout_p:
            return "PyTorch's CPU kernel has no dropout"
        return aten.unserved_field(call) or aten.changed_operator(*_SIGNATURES)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, log_n: float | Tensor | None, options: Options
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        if options.cu_seqlens_q is None:
            return *_forward(q, k, v, options), None
        return *packed.forward_one_by_one(_forward, q, k, v, options), None

    def backward(
        self,
        dout: Tensor,
        dlse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        rng_state: Tensor | None,
        options: Options,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if options.cu_seqlens_q is None:
            return _backward(dout, dlse, q, k, v, out, lse, options)
        return packed.backward_one_by_one(_backward, dout, dlse, q, k, v, out, lse, options)

    def gradient_order(self, x: Tensor) -> tuple[int, ...]:
        """The kernel writes gradients token by token, whatever the order of the inputs."""
        return (0, 2, 1, 3) if x.dim() == 4 else (0, 1, 2)


class _Piece(NamedTuple):
    """A rectangle of queries and keys: causal with its first query at its first key, or with a bias, or full."""

    rows: slice
    keys: slice
    causal: bool = False
    bias: Tensor | None = None


def _pieces(options: Options, q: Tensor, k: Tensor) -> Iterator[_Piece]:
    len_q, len_k = q.shape[2], k.shape[2]
    left, right = options.window_left, options.window_right
    everything = _Piece(slice(0, len_q), slice(0, len_k))
    if options.mask is None and options.alibi_slopes is None and left is None and right in (None, 0):
        before = len_k - len_q  # keys that every query sees, or if negative queries that see none
        if right is None:
            yield everything
        elif before <= 0:
            yield _Piece(slice(-before, len_q), slice(0, len_k), causal=True)
        else:
            yield _Piece(slice(0, len_q), slice(0, before))
            yield _Piece(slice(0, len_q), slice(before, len_k), causal=True)
        return
    if options.alibi_slopes is None and left is None and right is None:
        bias = dense_bias(options, len_q, len_k, (0, len_q), (0, len_k), _accumulator(q), q.device)
        yield everything._replace(bias=bias)
        return
    step = _rows_a_piece(options, q, len_k)
    for start in range(0, len_q, step):
        stop = min(start + step, len_q)
        first = 0 if left is None else max(0, start + len_k - len_q - left)
        last = len_k if right is None else min(len_k, stop + len_k - len_q + right)
        if first < last:
            bias = dense_bias(options, len_q, len_k, (start, stop), (first, last), _accumulator(q), q.device)
            yield _Piece(slice(start, stop), slice(first, last), bias=bias)


def _rows_a_piece(options: Options, q: Tensor, len_k: int) -> int:
    """Rows of a rectangle whose bias is built here: few enough for the memory, enough to keep the kernel busy."""
    copies = 1
    if options.alibi_slopes is not None:
        copies = q.shape[0] * q.shape[1]
    elif options.mask is not None:
        copies = options.mask.shape[0] * options.mask.shape[1]
    return max(32, min(256, _BIAS_ELEMENTS // (copies * len_k)))


def _forward(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    size_v, width = v.shape[3], max(q.shape[3], v.shape[3])
    q, k, v = (aten.of_width(x, width) for x in (q, k, v))
    shape, dtype = q.shape[:-1], _accumulator(q)
    out = lse = None
    for piece in _pieces(options, q, k):
        part, part_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q[:, :, piece.rows], k[:, :, piece.keys], v[:, :, piece.keys], 0.0, piece.causal,
            attn_mask=_in_kernel(piece.bias), scale=options.scale,
        )  # fmt: skip
        if piece.bias is not None:
            # The kernel writes lse = 0 for a row whose keys are all hidden.
            part_lse = part_lse.masked_fill((piece.bias == -math.inf).all(-1), -math.inf)
        if part.shape == q.shape and part_lse.shape == shape and piece.keys == slice(0, k.shape[2]):
            return part[..., :size_v], part_lse
        if out is None or lse is None:
            out = empty_in_order(q, (*shape, width), memory_order(q)).to(dtype).zero_()
            lse = torch.full(shape, -math.inf, dtype=dtype, device=q.device)
        _merge_(out[:, :, piece.rows], lse[:, :, piece.rows], part, part_lse)
    if out is None or lse is None:
        return q.new_zeros((*shape, size_v)), torch.full(shape, -math.inf, dtype=dtype, device=q.device)
    return out[..., :size_v].to(q.dtype), lse


def _merge_(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Add to `out` and `lse`, in place, the attention of the same rows over further keys."""
    hidden = (lse == -math.inf) & (part_lse == -math.inf)
    weight = torch.sigmoid(part_lse - lse).masked_fill_(hidden, 0.0)[..., None]
    out.mul_(1.0 - weight).addcmul_(part.to(out.dtype), weight)
    lse.copy_(torch.logaddexp(lse, part_lse))


def _backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    size, size_v = q.shape[3], v.shape[3]
    width = max(size, size_v if dlse is None else size_v + 1)
    if dlse is not None:
        dout, v, out = lse_as_value_column(dout, dlse, v, out, width)
    dout, q, k, v, out = (aten.of_width(x, width) for x in (dout, q, k, v, out))
    gradients: list[Tensor] | None = None
    for piece in _pieces(options, q, k):
        rows, keys = piece.rows, piece.keys
        parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout[:, :, rows], q[:, :, rows], k[:, :, keys], v[:, :, keys], out[:, :, rows], lse[:, :, rows],
            0.0, piece.causal, attn_mask=_in_kernel(piece.bias), scale=options.scale,
        )  # fmt: skip
        if parts[0].shape == q.shape and parts[1].shape == k.shape:
            gradients = list(parts)
            break
        if gradients is None:
            gradients = [torch.zeros(x.shape, dtype=_accumulator(q), device=q.device) for x in (q, k, v)]
        for gradient, part, span in zip(gradients, parts, (rows, keys, keys), strict=True):
            gradient[:, :, span] += part
    if gradients is None:
        gradients = [torch.zeros_like(x) for x in (q, k, v)]
    dq, dk, dv = (gradient.to(q.dtype) for gradient in gradients)
    return dq[..., :size], dk[..., :size], dv[..., :size_v]


def _in_kernel(bias: Tensor | None) -> Tensor | None:
    """The kernel reads a bias of two or four dimensions, unit stride in the last."""
    return None if bias is None else bias.contiguous()


def _accumulator(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32
