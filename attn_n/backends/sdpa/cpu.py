"""PyTorch's flash attention for CPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from attn_n.backends.adapt.blockwise import BlockwiseBackend
from attn_n.backends.adapt.layout import repeat_kv
from attn_n.backends.adapt.signatures import changed_operator
from attn_n.call import AttentionCall, Gradients, Saved

_SIGNATURES = (
    "aten::_scaled_dot_product_flash_attention_for_cpu"
    "(query, key, value, dropout_p, is_causal, *, attn_mask, scale) -> 2",
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward"
    "(grad_out, query, key, value, out, logsumexp, dropout_p, is_causal, *, attn_mask, scale) -> 3",
)
# The kernel of PyTorch 2.8 overruns its buffers under GQA; those of 2.11 and 2.13 were tested with it.
_KNOWS_GQA = TorchVersion(torch.__version__) >= "2.11"


class CpuFlash(BlockwiseBackend):
    name = "sdpa:cpu"
    summary = "PyTorch's flash attention for CPU"
    honours = (
        "causal", "window", "negative window", "softcap", "mask", "alibi", "varlen", "lse gradient", "seqused",
        "leftpad",
    )  # fmt: skip
    devices = ("cpu",)
    bias_elements = 1 << 22
    most_rows = 256
    repeats_kv = not _KNOWS_GQA

    def why_not(self, call: AttentionCall) -> str | None:
        return changed_operator(*_SIGNATURES)

    def lse_dim_order(self, q: Tensor) -> tuple[int, ...]:
        """The kernel writes lse and gradients with tokens before heads, whatever the layout of the inputs."""
        return (0, 2, 1) if q.dim() == 4 else (0, 1)

    def gradient_dim_order(self, x: Tensor) -> tuple[int, ...]:
        return (0, 2, 1, 3) if x.dim() == 4 else (0, 1, 2)

    def widths(self, size: int, size_v: int) -> tuple[int, int]:
        return max(size, size_v), max(size, size_v)

    def kernel_forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, bias: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        if not _KNOWS_GQA:
            k, v = repeat_kv(q, k, v)
        # This binding takes half the time of the same operator in torch.ops.aten.
        return torch._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=None if bias is None else bias.contiguous(), scale=scale
        )

    def kernel_backward(self, dout: Tensor, saved: Saved, causal: bool, bias: Tensor | None, scale: float) -> Gradients:
        q, k, v, out, lse, *_ = saved
        if not _KNOWS_GQA:
            k, v = repeat_kv(q, k, v)
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default(
            dout, q, k, v, out, lse, 0.0, causal, attn_mask=None if bias is None else bias.contiguous(), scale=scale
        )
        return Gradients(dq, dk, dv)
