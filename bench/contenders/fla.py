"""The attention of flash-linear-attention, which is causal."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from bench.contenders.base import Attend, Contender, by_autograd
from bench.contenders.library import why_absent
from bench.workloads import Inputs, Workload


def _attend(inputs: Inputs) -> Attend:
    parallel_attn = importlib.import_module("fla.ops.attn").parallel_attn
    # Its window counts the key of the query itself.
    window = None if inputs.workload.window is None else inputs.workload.window + 1
    starts = None if inputs.starts is None else inputs.starts.long()

    def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        bias = None if sinks is None else sinks.float()
        out: Tensor = parallel_attn(q, k, v, window_size=window, cu_seqlens=starts, sink_bias=bias)
        return out

    return attend if starts is None else lambda q, k, v, sinks: attend(q[None], k[None], v[None], sinks)[0]


def _why_not(workload: Workload) -> str | None:
    if workload.device != "cuda":
        return "no CPU kernel"
    if not workload.causal or workload.length != workload.len_k:
        return "causal self-attention only"
    if workload.dtype not in (torch.float16, torch.bfloat16):
        return "half precision only"
    if workload.width > 128:
        return "asks for more shared memory than there is for heads over 128"
    return why_absent("fla.ops.attn")


def _contender(name: str, n: str) -> Contender:
    return Contender(f"{name} n={n}", n, by_autograd(_attend, n, token_first=True), _why_not)


CONTENDERS = (_contender("fla", "0"), _contender("fla sink", "1"), _contender("fla sink", "per head"))
