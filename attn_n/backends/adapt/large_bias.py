"""Corrections for rows whose bias is so large that float32 rounds the lse: whole rows of `finfo.min` or -1e9, say.

Only -inf hides a key; any other number is added to the logit in float32. Near 1e9 float32 numbers are 64 apart, so that
such a row attends to its keys equally, and the forward kernels compute exactly this. But the lse of the row loses the
logarithm of the number of keys: `exp(S - lse)` is 1 for each key, where `1 / sum` is right. A backward is linear in
dout, so it is right for `dout / sum`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LARGE = 2.0**10  # an lse of at least this size is rounded by more than 3e-5
_ALONE = 2.0**29  # float32 numbers of at least this size are 64 apart: logits up to 32 do not change the largest bias
_INSTEAD = -(2.0**60)
_ELEMENTS = 1 << 22  # logits that are computed at a time


def sums_of_weights(q: Tensor, k: Tensor, bias: Tensor, lse: Tensor, scale: float) -> Tensor | None:
    """Return `sum_j exp(S_j - lse)` where the rounding of lse keeps that from 1, and 1 elsewhere; None if nowhere.

    This computes the logits of those rows, and finds out on the host which they are.
    """
    large = (lse.abs() >= _LARGE) & lse.isfinite()
    if not large.any():
        return None
    sums, groups = torch.ones_like(lse), q.shape[1] // k.shape[1]
    bias = bias.expand(*q.shape[:3], k.shape[2])
    for b, head in large.any(-1).nonzero().tolist():
        keys = k[b, head // groups].to(lse.dtype).T
        for rows in large[b, head].nonzero()[:, 0].split(max(1, _ELEMENTS // k.shape[2])):
            logits = q[b, head, rows].to(lse.dtype) @ keys * scale + bias[b, head, rows]
            sums[b, head, rows] = (logits - lse[b, head, rows, None]).exp_().sum(-1)
    # A sum further from 1 than rounding can bring it is due to n (a sink of 2,000 beside logits as large), and is part
    # of the lse by right.
    return torch.where(sums.log().abs() <= 2 * torch.finfo(lse.dtype).eps * lse.abs(), sums, 1.0)


def alone(bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return a bias with the same softmax that does not overflow in base 2, and the lse of each row that differs.

    In such a row the keys with the largest bias share the weight. Other rows stay, and their lse is NaN.
    """
    row_max = bias.amax(-1, keepdim=True)
    replaced = (row_max.abs() >= _ALONE) & row_max.isfinite()
    instead = torch.where(bias == row_max, _INSTEAD, -math.inf)
    return torch.where(replaced, instead, bias), torch.where(replaced, row_max, math.nan)[..., 0]


def backward_of_alone(bias: Tensor, row_max: Tensor, lse: Tensor, keys: int) -> tuple[Tensor, Tensor]:
    """Return the lse to pass to the backward of a kernel, and the sums over its keys of the weights it then computes.

    `alone` returned `bias` and `row_max`.
    """
    # This holds unless n outweighs the keys, as 1 does beside -1e9: then exp(bias - lse) is zero, as it should be.
    of_keys = (lse - row_max).abs() <= 2.0**-20 * row_max.abs()  # false for NaN
    sums = (bias == _INSTEAD).sum(-1).to(lse.dtype) * (keys // bias.shape[-1])
    return torch.where(of_keys, _INSTEAD, lse), torch.where(of_keys, sums, 1.0)
