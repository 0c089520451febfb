"""PyTorch's SDPA: its own choice, each of its kernels, with a mask, and with a zero key and value put first.

For packed sequences PyTorch has `varlen_attn`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from bench.contenders.base import Attend, Contender, by_autograd
from bench.contenders.library import why_absent
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
    # is_causal aligns the first query with the first key, and a single query here sees all keys.
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
        # With a zero query put first as well, is_causal shows the zero key to every query.
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
    """Describes the call to PyTorch's choice of a kernel, without allocating its tensors."""
    token = torch.empty(workload.width, dtype=workload.dtype, device=workload.device, requires_grad=True)
    q = token.expand(workload.batch, workload.heads, workload.length, -1)
    k = token.expand(workload.batch, workload.num_heads_kv, workload.len_k, -1)
    options = _options(workload)
    return torch.backends.cuda.SDPAParams(q, k, k, None, 0.0, options["is_causal"], "enable_gqa" in options)


def _with_mask(inputs: Inputs) -> Attend:
    mask = _visible(inputs.workload) if inputs.mask is None else inputs.mask
    return lambda q, k, v, sinks: scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _visible(workload: Workload) -> Tensor:
    """Returns a float mask of what the causal mask and the window hide, which may be nothing."""
    shape, shift = (workload.length, workload.len_k), workload.len_k - workload.length
    mask = torch.zeros(shape, dtype=workload.dtype, device=workload.device)
    distance = torch.arange(shape[0], device=workload.device)[:, None] + shift
    distance = distance - torch.arange(shape[1], device=workload.device)
    if workload.causal:
        mask.masked_fill_(distance < 0, float("-inf"))
    if workload.window is not None:
        mask.masked_fill_(distance > workload.window, float("-inf"))
    return mask


def _why_no_mask(workload: Workload) -> str | None:
    return "no packed sequences" if workload.sequences else None


def _varlen(inputs: Inputs) -> Attend:
    varlen_attn: Callable[..., Tensor] = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    starts, longest = inputs.starts, max(inputs.workload.sequences)
    return lambda q, k, v, sinks: varlen_attn(q, k, v, starts, starts, longest, longest)


def _why_no_varlen(workload: Workload) -> str | None:
    if workload.device != "cuda":
        return "no CPU kernel"
    if not workload.sequences or workload.causal:
        return "packed sequences without a mask"
    return why_absent("torch.nn.attention.varlen")


MASKED = Contender("torch sdpa mask n=0", "0", by_autograd(_with_mask, "0"), _why_no_mask)
VARLEN = Contender("torch varlen n=0", "0", by_autograd(_varlen, "0"), _why_no_varlen)
PLAIN = Contender("torch sdpa n=0", "0", by_autograd(_attend, "0"), _why_not)
_ZERO_PADDED = Contender("zero-padded sdpa n=1", "1", by_autograd(_zero_padded, "1"), _why_not)
