"""Rotary position embedding (RoFormer, J. Su et al., 2021), as FlashAttention applies it to a cache."""

from __future__ import annotations

import torch
from torch import Tensor


def turn(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """Return x `(B, H, L, E)` turned by the angles of its positions `(B, L)`.

    Pairs of the first columns are turned, as many as cos and sin `(longest, pairs)` have: columns 2i and 2i + 1 if they
    are interleaved (GPT-J), else i and i + pairs (GPT-NeoX). It is computed in float32, and rounded once.
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    of_cos, of_sin = (table.to(compute)[positions.long()][:, None] for table in (cos, sin))  # (B, 1, L, pairs)
    pairs = cos.shape[1]
    turned, rest = x[..., : 2 * pairs].to(compute), x[..., 2 * pairs :]
    if interleaved:
        a, b = turned.unflatten(-1, (pairs, 2)).unbind(-1)
    else:
        a, b = turned.chunk(2, -1)
    both = a * of_cos - b * of_sin, a * of_sin + b * of_cos
    turned = torch.stack(both, -1).flatten(-2) if interleaved else torch.cat(both, -1)
    return torch.cat([turned.to(x.dtype), rest], -1)
