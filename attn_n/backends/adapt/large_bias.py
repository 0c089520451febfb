"""Rows whose bias is so large that float32 loses something: whole rows of `finfo.min` or -1e9, say.

Only -inf hides a key; any other number is added to the logit in float32. Beside 1e9 a float32 knows nothing smaller
than 32, so that such a row attends to its keys equally, and the forward kernels compute exactly this. But the lse of
the row loses the logarithm of how many there are: `exp(S - lse)` is then 1 for each of them, where `1 / sum` is right.
All that a backward does is linear in dout, hence what it gives for `dout / sum` is right.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LARGE = 2.0**10  # from here on an lse is rounded by more than 3e-5
_ALONE = 2.0**29  # from here on float32 numbers are 64 apart, and logits up to 32 leave the largest bias as it is
_INSTEAD = -(2.0**60)
_ELEMENTS = 1 << 22  # of the logits that are computed at a time


def sums_of_weights(q: Tensor, k: Tensor, bias: Tensor, lse: Tensor, scale: float) -> Tensor | None:
    """`sum_j exp(S_j - lse)` where that is not 1 because of the rounding of lse, and 1 elsewhere; None if nowhere.

    It computes the logits of those rows, and reads on the host which they are.
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
    # What a rounding cannot have done n did, a sink of 2,000 beside logits as large: that is part of the lse by right.
    return torch.where(sums.log().abs() <= 2 * torch.finfo(lse.dtype).eps * lse.abs(), sums, 1.0)


def alone(bias: Tensor) -> tuple[Tensor, Tensor]:
    """A bias with the same softmax whose rows nowhere overflow in base 2, and the lse of each row that differs.

    Of such a row the keys of the largest bias share the weight. The lse is NaN for the other rows, which stay.
    """
    top = bias.amax(-1, keepdim=True)
    replaced = (top.abs() >= _ALONE) & top.isfinite()
    instead = torch.where(bias == top, _INSTEAD, -math.inf)
    return torch.where(replaced, instead, bias), torch.where(replaced, top, math.nan)[..., 0]


def backward_of_alone(bias: Tensor, top: Tensor, lse: Tensor, keys: int) -> tuple[Tensor, Tensor]:
    """The lse that the backward of a kernel wants, and the sums of the weights that it then computes over its keys.

    `bias` and `top` are what `alone` returned.
    """
    # Unless n outweighs the keys, be it 1 beside -1e9: then exp(bias - lse) is zero as it should be.
    of_keys = (lse - top).abs() <= 2.0**-20 * top.abs()  # false for NaN
    sums = (bias == _INSTEAD).sum(-1).to(lse.dtype) * (keys // bias.shape[-1])
    return torch.where(of_keys, _INSTEAD, lse), torch.where(of_keys, sums, 1.0)
