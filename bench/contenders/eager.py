"""The definition, one torch operation after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.contenders.base import Attend, Contender, by_autograd, too_large_for_quadratic
from bench.problem import Inputs, Problem


def _attend(inputs: Inputs) -> Attend:
    hidden = _hidden(inputs.problem)

    def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        logits = (q / q.shape[-1] ** 0.5) @ k.mT
        if hidden is not None:
            logits = logits.masked_fill(hidden, float("-inf"))
        top = logits.detach().amax(-1, keepdim=True)
        weights = (logits - top).exp()
        out: Tensor = (weights / ((-top).exp() + weights.sum(-1, keepdim=True))) @ v
        return out

    return attend


def _hidden(problem: Problem) -> Tensor | None:
    """The pairs of query and key that a causal mask hides; the last query sees the last key."""
    if not problem.causal:
        return None
    pairs = torch.ones(problem.length, problem.len_k, dtype=torch.bool, device=problem.device)
    return pairs.triu(1 + problem.len_k - problem.length)


def _why_not(problem: Problem) -> str | None:
    if problem.sequences or problem.window is not None or problem.heads_kv is not None:
        return "whole batches of equal heads, full or causal"
    return too_large_for_quadratic(problem)


CONTENDERS = (Contender("eager softmax_n n=1", "1", by_autograd(_attend, "1"), _why_not, apart=True),)
