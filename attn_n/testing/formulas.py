"""Attention with sinks as a plain formula, and the ways in which implementations get it wrong."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mistakes:
    """What an implementation does differently; by default nothing.

    Attributes:
        times: how often the sinks are in the denominator.
        half_lse: the lse is rounded to bfloat16.
        detached_lse: no gradient goes through the lse.
        finite_mask: hidden keys have the smallest finite logit, not -inf.
    """

    times: int = 1
    half_lse: bool = False
    detached_lse: bool = False
    finite_mask: bool = False


def attention(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, attn_mask: Tensor | None = None, mistakes: Mistakes | None = None
) -> Tensor:
    """Return `softmax(s) v * sigmoid(lse - sinks)`, `s = q k^T / sqrt(E)`, in the dtype of q.

    q is `(B, H, L, E)`, sinks `(H,)`; attn_mask is bool and broadcasts to `(B, H, L, S)`. Differentiated by autograd
    this is attention with softmax_n, forward and backward: here the lse is a result like any other.
    """
    mistakes = mistakes or Mistakes()
    logits = (q @ k.mT / math.sqrt(q.shape[-1])).to(torch.promote_types(q.dtype, torch.float32))
    if attn_mask is not None:
        hidden = torch.finfo(torch.float32).min if mistakes.finite_mask else -math.inf
        logits = logits.masked_fill(~attn_mask, hidden)
    row_max = logits.detach().amax(-1, keepdim=True)
    weights = (logits - row_max.masked_fill(row_max == -math.inf, 0.0)).exp()
    row_sum = weights.sum(-1, keepdim=True)
    empty = row_sum == 0
    row_sum = row_sum.masked_fill(empty, 1.0)
    lse = (row_max + row_sum.log()).masked_fill(empty, 0.0)
    if mistakes.half_lse:
        lse = lse + (lse.to(torch.bfloat16).to(lse.dtype) - lse).detach()
    if mistakes.detached_lse:
        lse = lse.detach()
    share = torch.ones_like(lse)
    if mistakes.times:
        share = (lse - sinks.to(lse.dtype)[:, None, None] - math.log(mistakes.times)).sigmoid()
    return (weights / row_sum * share.masked_fill(empty, 0.0)).to(q.dtype) @ v
