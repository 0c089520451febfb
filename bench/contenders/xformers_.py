"""xFormers' memory_efficient_attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attn_n.backends.xformers import library, load
from bench.contenders.base import Attend, Contender, by_autograd
from bench.contenders.library import why_absent
from bench.workloads import Inputs, Workload


def _attend(inputs: Inputs) -> Attend:
    fmha, packed = load(library().module), bool(inputs.workload.sequences)
    fmha._set_use_fa3(False)  # it takes any FlashAttention 3 for one that has a backward pass
    bias = (_bias_packed if packed else _bias)(fmha.attn_bias, inputs.workload)

    def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        out: Tensor = fmha.memory_efficient_attention(q, k, v, attn_bias=bias)
        return out

    return (lambda q, k, v, sinks: attend(q[None], k[None], v[None], sinks)[0]) if packed else attend


def _bias(masks: Any, workload: Workload) -> Any:
    if workload.window is not None:
        return masks.LowerTriangularFromBottomRightLocalAttentionMask(workload.window + 1)
    return masks.LowerTriangularFromBottomRightMask() if workload.causal else None


def _bias_packed(masks: Any, workload: Workload) -> Any:
    bias = masks.BlockDiagonalMask.from_seqlens(workload.sequences, device=workload.device)
    if workload.window is not None:
        return bias.make_local_attention(workload.window + 1)
    return bias.make_causal() if workload.causal else bias


def _why_not(workload: Workload) -> str | None:
    if workload.device != "cuda":
        return "no CPU kernel"
    if workload.heads_kv is not None:
        return "grouped heads in the forward pass alone"
    if workload.window is not None and not workload.causal:
        return "a window only with a causal mask"
    return why_absent(library().module, load)


CONTENDERS = (Contender("xformers n=0", "0", by_autograd(_attend, "0", token_first=True), _why_not),)
