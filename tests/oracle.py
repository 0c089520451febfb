"""Attention with softmax_n, written to be read: plain formulas, in whatever dtype the tensors have.

In float64 it is the truth that backends are measured against; in the dtype of the inputs it is the plain PyTorch
computation whose error sets the tolerance. It shares no code with the library.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attention_n(
    q: Tensor,  # (B, Hq, L, E)
    k: Tensor,  # (B, Hkv, S, E)
    v: Tensor,  # (B, Hkv, S, Ev)
    n: float | Tensor = 0.0,  # a number, (), or (Hq,)
    sinks: Tensor | None = None,  # (Hq,) = log n, or one a row: (B, Hq, L), or 1 for any of these
    causal: bool = False,
    scale: float | None = None,
    mask: Tensor | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,  # (Hq,) or (B, Hq)
    keep: Tensor | None = None,  # (B, Hq, L, S): weights after dropout are weights * keep
) -> tuple[Tensor, Tensor]:
    """Return out (B, Hq, L, Ev) and lse (B, Hq, L)."""
    batch, heads, len_q, size = q.shape
    len_k = k.shape[2]
    k = k.repeat_interleave(heads // k.shape[1], 1)
    v = v.repeat_interleave(heads // v.shape[1], 1)

    logits = q @ k.mT * (1 / math.sqrt(size) if scale is None else scale)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    position = torch.arange(len_q, device=q.device)[:, None] + len_k - len_q
    key = torch.arange(len_k, device=q.device)[None, :]
    if alibi_slopes is not None:
        slopes = alibi_slopes.to(q.dtype).expand(batch, heads)
        logits = logits - slopes[:, :, None, None] * (position - key).abs()
    visible = torch.ones(len_q, len_k, dtype=torch.bool, device=q.device)
    if causal:
        visible = visible & (key <= position)
    if window is not None:
        left, right = window
        if left is not None:
            visible = visible & (key >= position - left)
        if right is not None:
            visible = visible & (key <= position + right)
    if mask is not None and mask.dtype == torch.bool:
        visible = visible & mask
    elif mask is not None:
        logits = logits + mask.to(q.dtype)
    logits = logits.masked_fill(~visible, -math.inf)

    # As in torch.softmax, half precision is normalised in float32; only the matmuls are in half precision.
    wide = torch.promote_types(q.dtype, torch.float32)
    logits = logits.to(wide)
    per_head = torch.zeros(heads, dtype=wide, device=q.device)
    if sinks is not None and sinks.dim() > 1:
        log_n = sinks.to(wide)
    elif sinks is not None:
        log_n = (per_head + sinks)[:, None]
    else:
        n = per_head + n
        log_n = n.detach().log()[:, None]
    top = torch.cat([logits.detach(), log_n.detach().expand(batch, heads, len_q)[..., None]], -1).amax(-1)
    top = top.masked_fill(top == -math.inf, 0.0)
    weights = (logits - top[..., None]).exp()
    # n itself, not exp(log n): it has a gradient at n = 0 too
    nothing = n[:, None] * (-top).exp() if sinks is None else (log_n - top).exp()
    total = weights.sum(-1) + nothing
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    weights = weights / total[..., None]
    if keep is not None:
        weights = weights * keep
    return weights.to(q.dtype) @ v, (top + total.log()).masked_fill(empty, -math.inf)
