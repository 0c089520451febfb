"""The decoding kernels: a few queries over many keys, forward alone, from contiguous and from paged caches."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from attn_n.backends.base import Prepared
from attn_n.backends.triton.decode.prepare import call_for
from attn_n.backends.triton.portable import PortableKernels
from attn_n.call import AttentionCall, Options

MOST_QUERIES = 64


class DecodeKernels(PortableKernels):
    name = "triton:decode"
    summary = "split-KV, for up to 64 queries without gradients, and for KV caches"
    honours: Collection[str] = (
        "causal", "window", "negative window", "softcap", "alibi", "n a row", "seqused", "leftpad", "cache",
        "block table",
    )  # fmt: skip

    def why_not(self, call: AttentionCall) -> str | None:
        if call.needs_grad:
            return "has no backward"
        if call.q_shape[2] > MOST_QUERIES:
            return f"takes up to {MOST_QUERIES} queries, got {call.q_shape[2]}"
        if call.seqused_q:
            return "has no seqused_q"
        if max(call.head_dim, call.head_dim_v) > 256:
            return f"takes heads of up to 256, got {max(call.head_dim, call.head_dim_v)}"
        if call.cache_dtype == torch.float8_e4m3fn and (call.capability or (9, 0)) < (8, 9):
            return "takes float8 caches from compute capability 8.9 on"
        return super().why_not(call)

    def prepare(self, q: Tensor, k: Tensor, v: Tensor, log_n: float | Tensor | None, options: Options) -> Prepared:
        return call_for(q, k, v, log_n, options)
