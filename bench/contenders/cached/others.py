"""PyTorch's SDPA, FlexAttention and eager attention, which take a contiguous cache for keys and values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from bench.contenders import eager, flex, torch_sdpa
from bench.contenders.base import Contender
from bench.contenders.cached.base import decoder, over_contiguous
from bench.workloads import Inputs, Workload


def contenders(device: str) -> tuple[Contender, ...]:
    if device == "cpu":
        found: tuple[Contender, ...] = (torch_sdpa.PLAIN, *eager.GENERAL)
    else:
        kernels = (each for each in torch_sdpa.contenders(device) if each.name in _KERNELS)
        found = (*kernels, _CUDNN_WITH_MASK, flex.CONTENDERS[0])
    return tuple(map(over_contiguous, found))


_KERNELS = ("torch sdpa flash n=0", "torch sdpa cudnn n=0")


def _with_mask(inputs: Inputs) -> Callable[[], Tensor]:
    q, k, v = inputs.q, inputs.k, inputs.v
    len_q, len_k = q.shape[2], k.shape[2]
    hidden = torch.ones(len_q, len_k, dtype=torch.bool, device=q.device).triu(1 + len_k - len_q)
    mask = torch.zeros(len_q, len_k, dtype=q.dtype, device=q.device).masked_fill_(hidden, float("-inf"))

    def attend() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    return attend


def _why_no_mask(workload: Workload) -> str | None:
    return None if workload.causal else "nothing is hidden from one query"


_CUDNN_WITH_MASK = decoder("torch sdpa cudnn mask n=0", "0", _with_mask, _why_no_mask)
