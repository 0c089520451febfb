"""PyTorch's fused kernels for CUDA, by the operators beneath SDPA.

Those operators know more than SDPA offers: FlashAttention-2 and the memory-efficient kernel align a causal mask with
the last query and the last key, take windows, and FlashAttention-2 takes ALiBi and packed sequences too.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_n import packed
from attn_n.backends.base import Backend
from attn_n.backends.sdpa import aten
from attn_n.bias import dense_bias
from attn_n.call import AttentionCall, Options
from attn_n.fold import lse_as_value_column

_HALF = (torch.float16, torch.bfloat16)


def _unserved(call: AttentionCall, *signatures: str) -> str | None:
    if call.device != "cuda":
        return f"runs on CUDA, not on {call.device}"
    return aten.unserved_field(call) or aten.changed_operator(*signatures)


def _width(size: int, size_v: int, extra: int = 0) -> int:
    """The head size that a kernel of one head size, a multiple of 8, runs at."""
    return -(-max(size, size_v + extra) // 8) * 8


class FlashAttention(Backend):
    name = "sdpa:flash"
    summary = "FlashAttention-2 as PyTorch carries it"

    _signatures = (
        "_flash_attention_forward(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,"
        " return_debug_mask, *, scale, window_size_left, window_size_right, alibi_slopes) -> 5",
        "_flash_attention_backward(grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k,"
        " dropout_p, is_causal, rng_state, unused, *, scale, window_size_left, window_size_right) -> 3",
    )

    def why_not(self, call: AttentionCall) -> str | None:
        unserved = _unserved(call, *self._signatures)
        if unserved is not None:
            return unserved
        if torch.version.hip is not None:
            return "PyTorch's FlashAttention for ROCm has not been tested here"
        if call.capability is None or call.capability < (8, 0):
            return f"needs compute capability 8.0 or later, got {call.capability}"
        if call.dtype not in _HALF:
            return f"takes float16 and bfloat16, not {str(call.dtype).removeprefix('torch.')}"
        if call.mask_shape is not None:
            return "FlashAttention-2 takes no attn_mask"
        if call.alibi and call.needs_grad:
            return "PyTorch's operator has no backward with ALiBi"
        extra = 1 if call.return_lse and call.needs_grad else 0
        width = _width(call.head_dim, call.head_dim_v, extra)
        if width > 256:
            of = ", of which one carries the gradient of lse" if extra else ""
            return f"takes head sizes up to 256, got {width}{of}"
        return None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, log_n: float | Tensor | None, options: Options
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        size_v = v.shape[-1]
        q, k, v = _tokens_first(options, _width(q.shape[-1], size_v), q, k, v)
        out, lse, rng_state, _, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, *_sequences(options, q, k), options.dropout_p, options.window_right == 0, False,
            scale=options.scale, **_windows(options), alibi_slopes=options.alibi_slopes,
        )  # fmt: skip
        lse = lse.masked_fill(lse == math.inf, -math.inf)  # what the kernel writes for rows without visible keys
        if options.cu_seqlens_q is None:
            out = out.transpose(1, 2)
        else:
            lse = lse.transpose(0, 1)
        return out[..., :size_v], lse, rng_state.view(torch.int64) if options.dropout_p else None

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
        size, size_v = q.shape[-1], v.shape[-1]
        width = _width(size, size_v, 0 if dlse is None else 1)
        if dlse is not None:
            dout, v, out = lse_as_value_column(dout, dlse, v, out, width)
        dout, q, k, v, out = _tokens_first(options, width, dout, q, k, v, out)
        if options.cu_seqlens_q is not None:
            lse = lse.transpose(0, 1).contiguous()
        state = q.new_empty(2, dtype=torch.uint64) if rng_state is None else rng_state.view(torch.uint64)
        gradients = torch.ops.aten._flash_attention_backward(
            dout, q, k, v, out, lse, *_sequences(options, q, k), options.dropout_p, options.window_right == 0,
            state, q.new_empty(0, dtype=torch.uint64), scale=options.scale, **_windows(options),
        )  # fmt: skip
        if options.cu_seqlens_q is None:
            gradients = [gradient.transpose(1, 2) for gradient in gradients]
        dq, dk, dv = gradients
        return dq[..., :size], dk[..., :size], dv[..., :size_v]


class CudnnAttention(Backend):
    name = "sdpa:cudnn"
    summary = "cuDNN's fused attention"

    _signatures = (
        "_scaled_dot_product_cudnn_attention(query, key, value, attn_bias, compute_log_sumexp, dropout_p, is_causal,"
        " return_debug_mask, *, scale) -> 9",
        "_scaled_dot_product_cudnn_attention_backward(grad_out, query, key, value, out, logsumexp, philox_seed,"
        " philox_offset, attn_bias, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, *, scale) -> 3",
    )

    def why_not(self, call: AttentionCall) -> str | None:
        unserved = _unserved(call, *self._signatures)
        if unserved is not None:
            return unserved
        if call.capability is None or call.capability < (8, 0) or not torch.backends.cudnn.is_available():
            return f"needs cuDNN and compute capability 8.0 or later, got {call.capability}"
        if call.dtype not in _HALF:
            return f"takes float16 and bfloat16, not {str(call.dtype).removeprefix('torch.')}"
        if call.mask_shape is not None or call.alibi or call.windowed or call.dropout_p or call.varlen:
            return "is used here without mask, ALiBi, window, dropout and packed sequences"
        if call.causal and call.q_shape[2] != call.k_shape[2]:
            return "aligns a causal mask with the first query and key: it serves causal calls of as many queries as keys"
        if call.return_lse and call.needs_grad:
            return "has no gradient of lse"
        largest = 256 if call.capability[0] == 9 else 128
        if call.head_dim % 8 or call.head_dim_v != call.head_dim or call.head_dim > largest:
            return f"takes E = Ev, a multiple of 8 up to {largest}, got {call.head_dim} and {call.head_dim_v}"
        return None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, log_n: float | Tensor | None, options: Options
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        q, k, v = (aten.of_width(x, x.shape[-1]) for x in (q, k, v))
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
        dout, q, k, v = (aten.of_width(x, x.shape[-1]) for x in (dout, q, k, v))
        nothing = q.new_empty(0, dtype=torch.int64)
        gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            dout, q, k, v, out, lse[..., None], nothing, nothing, q.new_empty(0), None, None, q.shape[2], k.shape[2],
            0.0, options.window_right == 0, scale=options.scale,
        )  # fmt: skip
        return gradients


class EfficientAttention(Backend):
    name = "sdpa:efficient"
    summary = "the memory-efficient kernel of xformers as PyTorch carries it"

    _signatures = (
        "_efficient_attention_forward(query, key, value, bias, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,"
        " dropout_p, custom_mask_type, compute_log_sumexp, *, scale) -> 6",
        "_efficient_attention_backward(grad_out_, query, key, value, bias, out, cu_seqlens_q, cu_seqlens_k,"
        " max_seqlen_q, max_seqlen_k, logsumexp, dropout_p, philox_seed, philox_offset, custom_mask_type,"
        " bias_requires_grad, *, scale) -> 4",
    )
    _causal_bottom_right = 2

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
        return None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, log_n: float | Tensor | None, options: Options
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        if options.cu_seqlens_q is None:
            return *self._forward(q, k, v, options), None
        return *packed.forward_one_by_one(self._forward, q, k, v, options), None

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
            return self._backward(dout, dlse, q, k, v, out, lse, options)
        return packed.backward_one_by_one(self._backward, dout, dlse, q, k, v, out, lse, options)

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
        size_v, len_q = v.shape[3], q.shape[2]
        mask_type, bias = self._mask(q, k, options)
        q, k, v = self._inputs(q, k, v)
        out, lse, *_ = torch.ops.aten._efficient_attention_forward(
            q, k, v, bias, None, None, None, None, 0.0, mask_type, True, scale=options.scale
        )
        out, lse = out.transpose(1, 2)[..., :size_v], lse[:, :, :len_q]
        hidden = self._hidden(bias, options, len_q, k.shape[1], q.device)
        if hidden is not None:
            out, lse = out.masked_fill(hidden[..., None], 0.0), lse.masked_fill(hidden, -math.inf)
        return out, lse

    def _backward(
        self,
        dout: Tensor,
        dlse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        options: Options,
    ) -> tuple[Tensor, Tensor, Tensor]:
        size, size_v, len_q, len_k = q.shape[3], v.shape[3], q.shape[2], k.shape[2]
        mask_type, bias = self._mask(q, k, options)
        if dlse is not None:
            dout, v, out = lse_as_value_column(dout, dlse, v, out, _width(1, size_v, 1))
        q, k, v = self._inputs(q, k, v)
        dout, out = (aten.of_width(x, v.shape[-1]).transpose(1, 2) for x in (dout, out))
        # The kernel reads the lse in blocks of 32 rows.
        lse = F.pad(lse, (0, -len_q % 32), value=math.inf)
        nothing = torch.zeros((), dtype=torch.int64)
        dq, dk, dv, _ = torch.ops.aten._efficient_attention_backward(
            dout, q, k, v, bias, out, None, None, len_q, len_k, lse, 0.0, nothing, nothing, mask_type, False,
            scale=options.scale,
        )  # fmt: skip
        dq, dk, dv = (gradient.transpose(1, 2) for gradient in (dq, dk, dv))
        return dq[..., :size], dk[..., :size], dv[..., :size_v]

    def _inputs(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens first, head sizes filled up to a multiple of 8, and a key head for each query head.

        The kernel has no GQA; the repeated keys are a copy unless the strides allow a view.
        """
        heads, groups = k.shape[1], q.shape[1] // k.shape[1]
        if groups > 1:
            k, v = (x[:, :, None].expand(-1, heads, groups, -1, -1).flatten(1, 2) for x in (k, v))
        q, k, v = (aten.of_width(x, _width(x.shape[-1], 1)).transpose(1, 2) for x in (q, k, v))
        return q, k, v

    def _mask(self, q: Tensor, k: Tensor, options: Options) -> tuple[int, Tensor | None]:
        """The kernel's own causal mask where that is all, or else a dense bias (B, H, L, S), its rows aligned."""
        plain = options.mask is None and options.alibi_slopes is None and options.window_left is None
        if plain and options.window_right in (None, 0):
            return (0 if options.window_right is None else self._causal_bottom_right), None
        len_q, len_k = q.shape[2], k.shape[2]
        bias = dense_bias(options, len_q, len_k, (0, len_q), (0, len_k), torch.float32, q.device)
        if bias is None:
            return 0, None
        bias = F.pad(bias.expand(-1, -1, len_q, len_k).to(q.dtype), (0, -len_k % 16))[..., :len_k]
        return 0, bias.expand(q.shape[0], q.shape[1], len_q, len_k)

    def _hidden(
        self, bias: Tensor | None, options: Options, len_q: int, len_k: int, device: torch.device
    ) -> Tensor | None:
        """Which rows see no key, `(B or 1, H or 1, L)`; None if every row sees one."""
        if bias is not None:
            return (bias == -math.inf).all(-1)
        if options.window_right == 0 and len_q > len_k:
            return (torch.arange(len_q, device=device) < len_q - len_k)[None, None]
        return None


def _tokens_first(options: Options, width: int, *tensors: Tensor) -> list[Tensor]:
    """(B, H, L, E) as (B, L, H, E), the order of FlashAttention; packed tensors have it already."""
    wide = [aten.of_width(x, width) for x in tensors]
    return wide if options.cu_seqlens_q is not None else [x.transpose(1, 2) for x in wide]


def _sequences(options: Options, q: Tensor, k: Tensor) -> tuple[Tensor | None, Tensor | None, int, int]:
    if options.cu_seqlens_q is None:
        return None, None, q.shape[1], k.shape[1]
    return options.cu_seqlens_q, options.cu_seqlens_k, options.max_seqlen_q, options.max_seqlen_k


def _windows(options: Options) -> dict[str, int | None]:
    """FlashAttention's window: a side without a limit is None here and -1 in the kernel."""
    return {"window_size_left": options.window_left, "window_size_right": options.window_right}
