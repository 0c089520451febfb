"""Attention in plain PyTorch operations, as models have it."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.contenders.base import KINDS_OF_N, Attend, Contender, by_autograd, too_large_for_quadratic
from bench.workloads import Inputs, Workload


def _attend(inputs: Inputs) -> Attend:
    hidden = _hidden(inputs.workload)

    def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        logits = (q / q.shape[-1] ** 0.5) @ k.mT
        if hidden is not None:
            logits = logits.masked_fill(hidden, float("-inf"))
        top = logits.detach().amax(-1, keepdim=True)
        weights = (logits - top).exp()
        out: Tensor = (weights / ((-top).exp() + weights.sum(-1, keepdim=True))) @ v
        return out

    return attend


def _hidden(workload: Workload) -> Tensor | None:
    """Returns the pairs of query and key that a causal mask hides; the last query sees the last key."""
    if not workload.causal:
        return None
    pairs = torch.ones(workload.length, workload.len_k, dtype=torch.bool, device=workload.device)
    return pairs.triu(1 + workload.len_k - workload.length)


def _why_not(workload: Workload) -> str | None:
    if workload.sequences or workload.window is not None or workload.heads_kv is not None:
        return "whole batches of equal heads, full or causal"
    return too_large_for_quadratic(workload)


def _attend_general(inputs: Inputs) -> Attend:
    """Attends with groups of heads and any n, as models do: the sink is one more column of the logits."""
    workload, hidden = inputs.workload, _hidden(inputs.workload)
    groups = workload.heads // workload.num_heads_kv

    def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        k, v = (x if groups == 1 else x.repeat_interleave(groups, 1) for x in (k, v))
        logits = q @ k.mT * q.shape[-1] ** -0.5
        if hidden is not None:
            logits = logits.masked_fill(hidden, float("-inf"))
        if sinks is None:
            return logits.softmax(-1) @ v
        column = sinks[:, None, None].expand(*logits.shape[:-1], 1)
        return torch.cat([logits, column], -1).softmax(-1)[..., :-1] @ v

    return attend


CONTENDERS = (Contender("eager softmax_n n=1", "1", by_autograd(_attend, "1"), _why_not, apart=True),)
GENERAL = tuple(
    Contender(f"eager n={n}", n, by_autograd(_attend_general, n), too_large_for_quadratic, apart=True)
    for n in KINDS_OF_N
)
