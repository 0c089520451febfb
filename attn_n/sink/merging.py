"""Attention over several sets of keys, each at n = 0, merged in place."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def merge_(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Add to `out` and `lse`, in place, the attention of the same rows over further keys."""
    hidden = (lse == -math.inf) & (part_lse == -math.inf)
    weight = torch.sigmoid(part_lse - lse).masked_fill_(hidden, 0.0)[..., None]
    out.lerp_(part.to(out.dtype), weight)
    lse.copy_(torch.logaddexp(lse, part_lse))
