"""PyTorch's scaled_dot_product_attention: each of its kernels, and with a zero key and value as the first of all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from bench.contenders.base import Attend, Contender, by_autograd
from bench.workloads import Inputs, Workload

_KERNELS: dict[str, tuple[SDPBackend, Callable[[Any], bool]]] = {
    "flash": (SDPBackend.FLASH_ATTENTION, torch.backends.cuda.can_use_flash_attention),
    "cudnn": (SDPBackend.CUDNN_ATTENTION, torch.backends.cuda.can_use_cudnn_attention),
    "efficient": (SDPBackend.EFFICIENT_ATTENTION, torch.backends.cuda.can_use_efficient_attention),
}


def contenders(device: str) -> tuple[Contender, ...]:
    plain = tuple(map(_of_kernel, _KERNELS)) if device == "cuda" else (PLAIN,)
    return (*plain, _ZERO_PADDED)


def _options(workload: Workload) -> dict[str, Any]:
    # is_causal lines up the first query with the first key, a single query sees all keys.
    causal = workload.causal and workload.length > 1
    return {"is_causal": causal} | ({} if workload.heads_kv is None else {"enable_gqa": True})


def _attend(inputs: Inputs) -> Attend:
    options = _options(inputs.workload)
    return lambda q, k, v, sinks: scaled_dot_product_attention(q, k, v, **options)


def _zero_padded(inputs: Inputs) -> Attend:
    options = _options(inputs.workload)

    def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        k, v = _zero_first(k), _zero_first(v)
        if not options["is_causal"]:
            return scaled_dot_product_attention(q, k, v, **options)
        # With a query in front, too, the mask is that of L + 1 queries and keys: everyone sees the first key.
        return scaled_dot_product_attention(_zero_first(q), k, v, **options)[:, :, 1:]

    return attend


def _zero_first(x: Tensor) -> Tensor:
    return pad(x, (0, 0, 1, 0))


def _why_not(workload: Workload) -> str | None:
    if workload.sequences:
        return "no packed sequences"
    if workload.window is not None:
        return "no window"
    if workload.causal and workload.length not in (1, workload.len_k):
        return "lines up the first query with the first key"
    return None


def _of_kernel(name: str) -> Contender:
    backend, can_use = _KERNELS[name]

    def attend(inputs: Inputs) -> Attend:
        chosen = _attend(inputs)

        def within(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
            with sdpa_kernel(backend):
                return chosen(q, k, v, sinks)

        return within

    def why_not(workload: Workload) -> str | None:
        return _why_not(workload) or (None if can_use(_params(workload)) else "torch says that its kernel can not")

    return Contender(f"torch sdpa {name} n=0", "0", by_autograd(attend, "0"), why_not)


def _params(workload: Workload) -> torch.backends.cuda.SDPAParams:
    """What the call looks like to torch's choice of a kernel, without its memory."""
    token = torch.empty(workload.width, dtype=workload.dtype, device=workload.device, requires_grad=True)
    q = token.expand(workload.batch, workload.heads, workload.length, -1)
    k = token.expand(workload.batch, workload.num_heads_kv, workload.len_k, -1)
    options = _options(workload)
    return torch.backends.cuda.SDPAParams(q, k, k, None, 0.0, options["is_causal"], "enable_gqa" in options)


PLAIN = Contender("torch sdpa n=0", "0", by_autograd(_attend, "0"), _why_not)
_ZERO_PADDED = Contender("zero-padded sdpa n=1", "1", by_autograd(_zero_padded, "1"), _why_not)
