"""The masks of `torch.nn.MultiheadAttention`, in which True is hidden, as those of `flash_attention_n`."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def combined(
    key_padding_mask: Tensor | None, attn_mask: Tensor | None, q: Tensor, len_k: int, batched: bool
) -> Tensor | None:
    """Return one mask that broadcasts to `(N, heads, L, S)`, bool (True is visible) or floating, for both.

    q is `(N, heads, L, head_dim)`. A key_padding_mask by itself stays `(N, 1, 1, S)`.
    """
    batch, heads, len_q, _ = q.shape
    found = []
    if key_padding_mask is not None:
        expected: tuple[int, ...] = (batch, len_k) if batched else (len_k,)
        _check("key_padding_mask", key_padding_mask, (expected,))
        found.append(key_padding_mask.reshape(batch, 1, 1, len_k))
    if attn_mask is not None:
        _check("attn_mask", attn_mask, ((len_q, len_k), (batch * heads, len_q, len_k)))
        found.append(attn_mask if attn_mask.dim() == 2 else attn_mask.unflatten(0, (batch, heads)))
    if not found:
        return None
    if all(mask.dtype == torch.bool for mask in found):
        hidden = found[0] if len(found) == 1 else found[0] | found[1]
        return ~hidden
    added = [
        torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, -math.inf) if mask.dtype == torch.bool else mask
        for mask in found
    ]
    return added[0] if len(added) == 1 else added[0] + added[1]


def with_one_more_key(mask: Tensor) -> Tensor:
    """Return the mask with one more key, which is visible."""
    return F.pad(mask, (0, 1), value=mask.dtype == torch.bool)


def _check(name: str, mask: Tensor, shapes: tuple[tuple[int, ...], ...]) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"{name}: expected bool (True is hidden) or a floating dtype, got {mask.dtype}")
    if tuple(mask.shape) not in shapes:
        raise ValueError(f"{name}: expected shape {' or '.join(map(str, shapes))}, got {tuple(mask.shape)}")
