"""FlexAttention, compiled for each workload; n = 1 by its logsumexp: out * sigmoid(lse - log n)."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch.nn.attention import flex_attention as flex

from bench.contenders.base import Attend, Contender, by_autograd
from bench.workloads import Inputs, Workload


def _plain(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, options: dict[str, Any]) -> Tensor:
    out: Tensor = flex.flex_attention(q, k, v, **options)
    return out


def _by_lse(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, options: dict[str, Any]) -> Tensor:
    assert sinks is not None
    if hasattr(flex, "AuxRequest"):  # since PyTorch 2.9
        out, aux = flex.flex_attention(q, k, v, **options, return_aux=flex.AuxRequest(lse=True))
        lse = aux.lse
    else:
        out, lse = flex.flex_attention(q, k, v, **options, return_lse=True)
    kept = torch.sigmoid(lse - sinks[:, None])[..., None]
    result: Tensor = (out * kept).to(out.dtype)
    return result


def _compiled(function: Callable[..., Tensor]) -> Callable[[Inputs], Attend]:
    def of(inputs: Inputs) -> Attend:
        # The benchmark differentiates one forward pass many times, which needs its buffers kept.
        functorch_config.donated_buffer = False
        # Worker processes get the SIGTERM of `timeout` as well, and torch waits five minutes for dead ones.
        inductor_config.compile_threads = 1
        compiled = torch.compile(_copy(function), dynamic=False, fullgraph=True)
        workload, options = inputs.workload, _options(inputs)

        def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
            return compiled(q, k, v, sinks, options)

        def attend_packed(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
            q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
            return compiled(q, k, v, sinks, options)[0].transpose(0, 1)

        return attend_packed if workload.sequences else attend

    return of


def _copy(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Copies the function, so that what is compiled for other workloads does not count as recompilation of this one."""
    assert isinstance(function, FunctionType)
    return FunctionType(function.__code__.replace(), function.__globals__)


def _options(inputs: Inputs) -> dict[str, Any]:
    workload = inputs.workload
    return {"block_mask": _mask(inputs), "enable_gqa": workload.heads_kv is not None}


def _mask(inputs: Inputs) -> flex.BlockMask | None:
    workload = inputs.workload
    shift, reach = workload.len_k - workload.length, workload.window
    visible = [lambda b, h, q, k: k <= q + shift] if workload.causal else []
    if reach is not None:
        visible.append(lambda b, h, q, k: k >= q + shift - reach)
    if inputs.starts is not None:
        tokens = torch.arange(workload.length, device=workload.device)
        sequence = torch.bucketize(tokens, inputs.starts, right=True)
        visible.append(lambda b, h, q, k: sequence[q] == sequence[k])
    if not visible:
        return None
    mask = flex.and_masks(*visible)
    # Without compilation each pair of query and key takes 8 bytes.
    long = workload.length * workload.len_k > 65536**2
    create = torch.compile(flex.create_block_mask) if long else flex.create_block_mask
    return create(mask, None, None, workload.length, workload.len_k, workload.device)


def _contender(name: str, n: str, function: Callable[..., Tensor]) -> Contender:
    return Contender(f"{name} n={n}", n, by_autograd(_compiled(function), n), _why_not)


def _why_not(workload: Workload) -> str | None:
    return None if workload.device == "cuda" else "no backward pass on the CPU"


CONTENDERS = (_contender("flex", "0", _plain), _contender("flex by lse", "1", _by_lse))
