"""The requirements of xFormers' memory-efficient kernel, which PyTorch and xFormers carry."""

from __future__ import annotations

import torch
from torch import Tensor

from attn_n.backends.adapt.blockwise import BlockwiseBackend
from attn_n.backends.adapt.layout import repeat_kv
from attn_n.backends.base import HALF


class MemoryEfficientBackend(BlockwiseBackend):
    """A backend on that kernel, which adds a bias in the dtype of q."""

    honours = frozenset(("causal", "window", "negative window", "mask", "alibi", "varlen", "lse gradient"))
    devices = ("cuda",)
    dtypes = (*HALF, torch.float32)
    rocm = False
    bias_elements = 1 << 25
    most_rows = 2048
    base_2 = True
    repeats_kv = True

    def out_dim_order(self, q: Tensor) -> tuple[int, ...]:
        """Tokens come before heads: the backward kernel reads out in this layout, whatever its strides are."""
        return (0, 2, 1, 3) if q.dim() == 4 else (0, 1, 2)

    def gradient_dim_order(self, x: Tensor) -> tuple[int, ...]:
        return self.out_dim_order(x)

    def widths(self, size: int, size_v: int) -> tuple[int, int]:
        return -(-size // 8) * 8, -(-size_v // 8) * 8

    def tensors(self, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        """Return q, k, v with tokens before heads, and with a KV head for each query head."""
        return [x.transpose(1, 2) for x in (q, *repeat_kv(q, k, v))]

    def results(self, dout: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return dout and out with tokens before heads, and lse contiguous: in varlen a head's rows have a stride."""
        return dout.transpose(1, 2).contiguous(), out.transpose(1, 2).contiguous(), lse.contiguous()
