"""PyTorch's fused kernels for CUDA, by the operators beneath SDPA.

Those operators know more than SDPA offers: FlashAttention-2 and the memory-efficient kernel align a causal mask with
the last query and the last key, take windows, and FlashAttention-2 takes packed sequences too.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_n.backends.adapt import flash2
from attn_n.backends.adapt.efficient import MemoryEfficientBackend
from attn_n.backends.adapt.flash import FlashBackend, sequences
from attn_n.backends.adapt.layout import HALF, aligned_bias, of_width, rounds_bias
from attn_n.backends.adapt.signatures import changed_operator
from attn_n.backends.base import Backend, empty_in_order, lies_in_order, memory_order
from attn_n.backends.sdpa import aten
from attn_n.call import AttentionCall, Options
from attn_n.compilation import constant_when_compiled


def _unserved(call: AttentionCall, *signatures: str) -> str | None:
    if call.device != "cuda":
        return f"runs on CUDA, not on {call.device}"
    return aten.unserved_field(call) or changed_operator(*signatures)


@constant_when_compiled
def _has_cudnn() -> bool:
    return bool(torch.backends.cudnn.is_available())


class FlashAttention(FlashBackend):
    name = "sdpa:flash"
    summary = "FlashAttention-2 as PyTorch carries it"

    _signatures = (
        "aten::_flash_attention_forward(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,"
        " return_debug_mask, *, scale, window_size_left, window_size_right) -> 5",
        "aten::_flash_attention_backward(grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q,"
        " max_k, dropout_p, is_causal, rng_state, unused, *, scale, window_size_left, window_size_right) -> 3",
    )

    def why_not(self, call: AttentionCall) -> str | None:
        unserved = self.unserved(call) or _unserved(call, *self._signatures)
        if unserved is not None:
            return unserved
        if call.capability is None or call.capability < (8, 0):
            return f"needs compute capability 8.0 or later, got {call.capability}"
        if call.alibi:
            return "PyTorch builds FlashAttention without ALiBi"
        return flash2.unserved(call)

    def kernel_forward(self, q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor | None]:
        lengths = sequences(options, q, k)
        causal, left, right, max_k = flash2.visible(options, lengths)
        out, lse, rng_state, _, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, *lengths[:3], max_k, options.dropout_p, causal, False,
            scale=options.scale, window_size_left=left, window_size_right=right,
        )  # fmt: skip
        lse = flash2.rows_without_keys(lse, options, lengths)
        return out, lse, rng_state.view(torch.int64) if options.dropout_p else None

    def kernel_backward(
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
        lengths = sequences(options, q, k)
        causal, left, right, max_k = flash2.visible(options, lengths)
        state = q.new_empty(2, dtype=torch.uint64) if rng_state is None else rng_state.view(torch.uint64)
        gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
            dout, q, k, v, out, lse, *lengths[:3], max_k, options.dropout_p, causal,
            state, q.new_empty(0, dtype=torch.uint64), scale=options.scale,
            window_size_left=left, window_size_right=right,
        )  # fmt: skip
        return gradients


class CudnnAttention(Backend):
    name = "sdpa:cudnn"
    summary = "cuDNN's fused attention"

    _signatures = (
        "aten::_scaled_dot_product_cudnn_attention(query, key, value, attn_bias, compute_log_sumexp, dropout_p,"
        " is_causal, return_debug_mask, *, scale) -> 9",
        "aten::_scaled_dot_product_cudnn_attention_backward(grad_out, query, key, value, out, logsumexp, philox_seed,"
        " philox_offset, attn_bias, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, *, scale) -> 3",
    )

    def why_not(self, call: AttentionCall) -> str | None:
        unserved = _unserved(call, *self._signatures)
        if unserved is not None:
            return unserved
        if call.capability is None or call.capability < (8, 0) or not _has_cudnn():
            return f"needs cuDNN and compute capability 8.0 or later, got {call.capability}"
        if call.dtype not in HALF:
            return f"takes float16 and bfloat16, not {str(call.dtype).removeprefix('torch.')}"
        if call.mask_shape is not None or call.alibi or call.windowed or call.dropout_p or call.varlen:
            return "is used here without mask, ALiBi, window, dropout and packed sequences"
        if call.causal and call.q_shape[2] != call.k_shape[2]:
            return (
                "aligns a causal mask with the first query and key: it serves causal calls of as many queries as keys"
            )
        if call.q_shape[2] == call.k_shape[2] == 1:
            return "does not take one query with one key"
        if call.return_lse and call.needs_grad:
            return "has no gradient of lse"
        largest = 256 if call.capability[0] == 9 else 128
        if call.head_dim % 8 or call.head_dim_v != call.head_dim or call.head_dim > largest:
            return f"takes E = Ev, a multiple of 8 up to {largest}, got {call.head_dim} and {call.head_dim_v}"
        return None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, log_n: float | Tensor | None, options: Options
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        q, k, v = (of_width(x, x.shape[-1]) for x in (q, k, v))
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, options.window_right == 0, False, scale=options.scale
        )
        return out, lse.view(q.shape[:-1]), None

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
        q, k, v = (of_width(x, x.shape[-1]) for x in (q, k, v))
        # PyTorch keeps cuDNN's plan of a backward by the strides of q, k and v alone, and would read wrong numbers from
        # an out or a dout that lie in another way than those of the first call. So both lie as the q that it is given.
        order = memory_order(q)
        out, dout = (x if lies_in_order(x, order) else empty_in_order(x, x.shape, order).copy_(x) for x in (out, dout))
        out, dout = of_width(out, out.shape[-1]), of_width(dout, dout.shape[-1])
        gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            dout, q, k, v, out, lse[..., None], None, None, None, None, None, q.shape[2], k.shape[2],
            0.0, options.window_right == 0, scale=options.scale,
        )  # fmt: skip
        return gradients


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
        unserved = _unserved(call, *self._signatures)
        if unserved is not None:
            return unserved
        if torch.version.hip is not None:
            return "PyTorch's memory-efficient kernel for ROCm has not been tested here"
        if call.dtype == torch.float64:
            return "takes float16, bfloat16 and float32, not float64"
        if call.dtype == torch.bfloat16 and (call.capability is None or call.capability < (8, 0)):
            return f"takes bfloat16 from compute capability 8.0 on, got {call.capability}"
        if call.dropout_p:
            return "keeps the state of its dropout on the host"
        return rounds_bias(call)

    def kernel_forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, bias: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        tensors = self.tensors(q, k, v)
        out, lse, *_ = torch.ops.aten._efficient_attention_forward(
            *tensors, aligned_bias(q, k, bias), None, None, None, None, 0.0, int(causal), True, scale=scale
        )
        return out.transpose(1, 2), lse[:, :, : q.shape[2]]

    def kernel_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        bias: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tensors = self.tensors(q, k, v)
        dout, out, lse = self.results(dout, out, lse)
        lse = F.pad(lse, (0, -q.shape[2] % 32), value=math.inf)  # it is read in blocks of 32 rows
        no_dropout = torch.zeros((), dtype=torch.int64)
        dq, dk, dv, _ = torch.ops.aten._efficient_attention_backward(
            dout, *tensors, aligned_bias(q, k, bias), out, None, None, q.shape[2], k.shape[2], lse, 0.0,
            no_dropout, no_dropout, int(causal), False, scale=scale,
        )  # fmt: skip
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)
