"""PyTorch's fused kernels for CUDA, called by the operators beneath SDPA.

These operators can do more than SDPA offers: FlashAttention-2 and the memory-efficient kernel take causal masks aligned
bottom-right and windows, and FlashAttention-2 takes varlen sequences too.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_n.backends.adapt import flash2
from attn_n.backends.adapt.efficient import MemoryEfficientBackend
from attn_n.backends.adapt.flash import FlashBackend, sequences
from attn_n.backends.adapt.layout import aligned_bias, is_of_width, of_width, rounds_bias
from attn_n.backends.adapt.signatures import changed_operator
from attn_n.backends.base import HALF, Backend, Prepared, aligned, empty_in_order, lies_in_order, memory_order
from attn_n.call import AttentionCall, Gradients, Grads, Options, Saved
from attn_n.compilation import constant_when_compiled


@constant_when_compiled
def _has_cudnn() -> bool:
    return bool(torch.backends.cudnn.is_available())


class FlashAttention(FlashBackend):
    name = "sdpa:flash"
    summary = "FlashAttention-2 as PyTorch carries it"
    honours = ("causal", "window", "dropout", "varlen", "lse gradient", "seqused", "leftpad")
    capability = (8, 0)

    _signatures = (
        "aten::_flash_attention_forward(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,"
        " return_debug_mask, *, scale, window_size_left, window_size_right) -> 5",
        "aten::_flash_attention_backward(grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q,"
        " max_k, dropout_p, is_causal, rng_state, unused, *, scale, window_size_left, window_size_right) -> 3",
    )

    def why_not(self, call: AttentionCall) -> str | None:
        return self.too_wide(call) or flash2.why_not_window(call) or changed_operator(*self._signatures)

    def prepare(self, q: Tensor, k: Tensor, v: Tensor, log_n: float | Tensor | None, options: Options) -> Prepared:
        prepared = super().prepare(q, k, v, log_n, options)
        unbounded = options.window_left is None and options.window_right is None
        full_or_causal = unbounded or (options.causal and q.shape[2] <= k.shape[2])
        if prepared is self or not full_or_causal or options.dropout_p or changed_operator(*Batch.signatures):
            return prepared
        return Batch(prepared, options.causal)

    def kernel_forward(self, q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor | None]:
        lengths = sequences(options, q, k)
        causal, left, right, max_k = flash2.window_arguments(options, lengths)
        out, lse, rng_state, _, _ = torch.ops.aten._flash_attention_forward.default(
            q, k, v, *lengths[:3], max_k, options.dropout_p, causal, False,
            scale=options.scale, window_size_left=left, window_size_right=right,
        )  # fmt: skip
        lse = flash2.rows_without_keys(lse, options, lengths)
        return out, lse, rng_state.view(torch.int64) if options.dropout_p else None

    def kernel_backward(self, grads: Grads, saved: Saved, options: Options) -> Gradients:
        q, k, v, out, lse, _, rng_state = saved
        lengths = sequences(options, q, k)
        causal, left, right, max_k = flash2.window_arguments(options, lengths)
        state = q.new_empty(2, dtype=torch.uint64) if rng_state is None else rng_state.view(torch.uint64)
        dq, dk, dv = torch.ops.aten._flash_attention_backward.default(
            grads.dout, q, k, v, out, lse, *lengths[:3], max_k, options.dropout_p, causal,
            state, q.new_empty(0, dtype=torch.uint64), scale=options.scale,
            window_size_left=left, window_size_right=right,
        )  # fmt: skip
        return Gradients(dq, dk, dv)


class Batch:
    """A prepared call by the operators of SDPA itself, which cost the host half as much as those beneath them."""

    signatures = (
        "aten::_scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, return_debug_mask, *,"
        " scale) -> 9",
        "aten::_scaled_dot_product_flash_attention_backward(grad_out, query, key, value, out, logsumexp, cum_seq_q,"
        " cum_seq_k, max_q, max_k, dropout_p, is_causal, philox_seed, philox_offset, *, scale) -> 3",
    )

    def __init__(self, otherwise: Prepared, causal: bool) -> None:
        self._otherwise = otherwise  # serves what is not aligned, and the gradient of lse
        self._causal = causal

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, log_n: float | Tensor | None, options: Options
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        if not aligned(q, k, v):
            return self._otherwise.forward(q, k, v, log_n, options)
        out, lse, *_ = torch._scaled_dot_product_flash_attention(q, k, v, 0.0, self._causal, False, scale=options.scale)
        return out, lse, None

    def backward(self, grads: Grads, saved: Saved, options: Options) -> Gradients:
        (dout, dlse, *_), (q, k, v, out, lse, *_) = grads, saved
        if dlse is not None or not (aligned(q, k, v) and is_of_width(dout, q.shape[-1]) and lse.is_contiguous()):
            return self._otherwise.backward(grads, saved, options)
        no_dropout = q.new_empty(2, dtype=torch.uint64)
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_backward.default(
            dout, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, self._causal, no_dropout, no_dropout,
            scale=options.scale,
        )  # fmt: skip
        return Gradients(dq, dk, dv)


class CudnnAttention(Backend):
    name = "sdpa:cudnn"
    summary = "cuDNN's fused attention"
    compares_lengths = True
    honours = ("causal",)
    devices = ("cuda",)
    dtypes = HALF
    capability = (8, 0)
    rocm = False

    _signatures = (
        "aten::_scaled_dot_product_cudnn_attention(query, key, value, attn_bias, compute_log_sumexp, dropout_p,"
        " is_causal, return_debug_mask, *, scale) -> 9",
        "aten::_scaled_dot_product_cudnn_attention_backward(grad_out, query, key, value, out, logsumexp, philox_seed,"
        " philox_offset, attn_bias, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, *, scale) -> 3",
    )

    def why_not(self, call: AttentionCall) -> str | None:
        if not _has_cudnn():
            return "needs cuDNN"
        if call.causal and call.q_shape[2] != call.k_shape[2]:
            return (
                "aligns a causal mask with the first query and key: it serves causal calls of as many queries as keys"
            )
        if call.q_shape[2] == call.k_shape[2] == 1:
            return "does not take one query with one key"
        largest = 256 if call.capability is not None and call.capability[0] == 9 else 128
        if call.head_dim % 8 or call.head_dim_v != call.head_dim or call.head_dim > largest:
            return f"takes E = Ev, a multiple of 8 up to {largest}, got {call.head_dim} and {call.head_dim_v}"
        return changed_operator(*self._signatures)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, log_n: float | Tensor | None, options: Options
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        q, k, v = (of_width(x, x.shape[-1]) for x in (q, k, v))
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, options.causal, False, scale=options.scale
        )
        return out, lse.view(q.shape[:-1]), None

    def backward(self, grads: Grads, saved: Saved, options: Options) -> Gradients:
        q, k, v = (of_width(x, x.shape[-1]) for x in saved[:3])
        # PyTorch caches cuDNN's plan of a backward by the strides of q, k and v alone, and would load wrong numbers of
        # an out or a dout whose layout differs from that of the first call. So both get the layout of q.
        order = memory_order(q)
        out, dout = (
            x if lies_in_order(x, order) else empty_in_order(x, x.shape, order).copy_(x)
            for x in (saved.out, grads.dout)
        )
        out, dout = of_width(out, out.shape[-1]), of_width(dout, dout.shape[-1])
        dq, dk, dv = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            dout, q, k, v, out, saved.lse[..., None], None, None, None, None, None, q.shape[2], k.shape[2],
            0.0, options.causal, scale=options.scale,
        )  # fmt: skip
        return Gradients(dq, dk, dv)


class EfficientAttention(MemoryEfficientBackend):
    name = "sdpa:efficient"
    summary = "the memory-efficient kernel of xformers as PyTorch carries it"

    _signatures = (
        "aten::_efficient_attention_forward(query, key, value, bias, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,"
        " max_seqlen_k, dropout_p, custom_mask_type, compute_log_sumexp, *, scale) -> 6",
        "aten::_efficient_attention_backward(grad_out_, query, key, value, bias, out, cu_seqlens_q, cu_seqlens_k,"
        " max_seqlen_q, max_seqlen_k, logsumexp, dropout_p, philox_seed, philox_offset, custom_mask_type,"
        " bias_requires_grad, *, scale) -> 4",
    )

    def why_not(self, call: AttentionCall) -> str | None:
        if call.dtype == torch.bfloat16 and (call.capability is None or call.capability < (8, 0)):
            return f"takes bfloat16 from compute capability 8.0 on, got {call.capability}"
        return rounds_bias(call) or changed_operator(*self._signatures)

    def kernel_forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, bias: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        tensors = self.tensors(q, k, v)
        out, lse, *_ = torch.ops.aten._efficient_attention_forward.default(
            *tensors, aligned_bias(q, k, bias), None, None, None, None, 0.0, int(causal), True, scale=scale
        )
        return out.transpose(1, 2), lse[:, :, : q.shape[2]]

    def kernel_backward(self, dout: Tensor, saved: Saved, causal: bool, bias: Tensor | None, scale: float) -> Gradients:
        q, k, v, out, lse, *_ = saved
        tensors = self.tensors(q, k, v)
        dout, out, lse = self.results(dout, out, lse)
        lse = F.pad(lse, (0, -q.shape[2] % 32), value=math.inf)  # the kernel loads it in blocks of 32 rows
        no_dropout = torch.zeros((), dtype=torch.int64)
        dq, dk, dv, _ = torch.ops.aten._efficient_attention_backward.default(
            dout, *tensors, aligned_bias(q, k, bias), out, None, None, q.shape[2], k.shape[2], lse, 0.0,
            no_dropout, no_dropout, int(causal), False, scale=scale,
        )  # fmt: skip
        return Gradients(dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2))
