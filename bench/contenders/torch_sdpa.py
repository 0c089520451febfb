"""PyTorch's scaled_dot_product_attention: each of its kernels, and with a zero key and value as the first of all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from bench.contenders.base import Attend, Contender, by_autograd
from bench.problem import Inputs, Problem

_KERNELS: dict[str, tuple[SDPBackend, Callable[[Any], bool]]] = {
    "flash": (SDPBackend.FLASH_ATTENTION, torch.backends.cuda.can_use_flash_attention),
    "cudnn": (SDPBackend.CUDNN_ATTENTION, torch.backends.cuda.can_use_cudnn_attention),
    "efficient": (SDPBackend.EFFICIENT_ATTENTION, torch.backends.cuda.can_use_efficient_attention),
}


def contenders(device: str) -> tuple[Contender, ...]:
    plain = tuple(map(_of_kernel, _KERNELS)) if device == "cuda" else (PLAIN,)
    return (*plain, _ZERO_PADDED)


def _options(problem: Problem) -> dict[str, Any]:
    # is_causal lines up the first query with the first key, a single query sees all keys.
    causal = problem.causal and problem.length > 1
    return {"is_causal": causal} | ({} if problem.heads_kv is None else {"enable_gqa": True})


def _attend(inputs: Inputs) -> Attend:
    options = _options(inputs.problem)
    return lambda q, k, v, sinks: scaled_dot_product_attention(q, k, v, **options)


def _zero_padded(inputs: Inputs) -> Attend:
    options = _options(inputs.problem)

    def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        k, v = _zero_first(k), _zero_first(v)
        if not options["is_causal"]:
            return scaled_dot_product_attention(q, k, v, **options)
        # With a query in front, too, the mask is that of L + 1 queries and keys: everyone sees the first key.
        return scaled_dot_product_attention(_zero_first(q), k, v, **options)[:, :, 1:]

    return attend


def _zero_first(x: Tensor) -> Tensor:
    return pad(x, (0, 0, 1, 0))


def _why_not(problem: Problem) -> str | None:
    if problem.sequences:
        return "no packed sequences"
    if problem.window is not None:
        return "no window"
    if problem.causal and problem.length not in (1, problem.len_k):
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

    def why_not(problem: Problem) -> str | None:
        return _why_not(problem) or (None if can_use(_params(problem)) else "torch says that its kernel can not")

    return Contender(f"torch sdpa {name} n=0", "0", by_autograd(attend, "0"), why_not)


def _params(problem: Problem) -> torch.backends.cuda.SDPAParams:
    """What the call looks like to torch's choice of a kernel, without its memory."""
    token = torch.empty(problem.width, dtype=problem.dtype, device=problem.device, requires_grad=True)
    q = token.expand(problem.batch, problem.heads, problem.length, -1)
    k = token.expand(problem.batch, problem.num_heads_kv, problem.len_k, -1)
    options = _options(problem)
    return torch.backends.cuda.SDPAParams(q, k, k, None, 0.0, options["is_causal"], "enable_gqa" in options)


PLAIN = Contender("torch sdpa n=0", "0", by_autograd(_attend, "0"), _why_not)
_ZERO_PADDED = Contender("zero-padded sdpa n=1", "1", by_autograd(_zero_padded, "1"), _why_not)
