"""The weight of n, as one term in the denominator of a softmax whose logits are taken relative to their maximum."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def bounded_exp(x: Tensor) -> Tensor:
    """Return exp(x), or a large number in place of infinity, which times zero is zero and not NaN."""
    largest = math.log(torch.finfo(x.dtype).max) - 0.02
    return x.clamp(max=largest).exp().masked_fill(x > largest, torch.finfo(x.dtype).max ** 0.75)


def as_tensor(n: float, device: torch.device) -> Tensor:
    """Return n as a tensor `()`, in float64 where the device has that. Under torch.compile n may be a symbol."""
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return torch.ones((), dtype=dtype, device=device) * n


def weight_of_n(n: float | Tensor, row_max: Tensor) -> Tensor:
    """Return `n exp(-row_max)`, the term of n in a denominator whose logits have `row_max` subtracted.

    `row_max` is at least log n, and the result has its dtype, whose range neither a large nor a small n leaves. The
    result is linear in n, at n = 0 too, so that its derivatives of every order are right.
    """
    n = n if isinstance(n, Tensor) else as_tensor(n, row_max.device)
    n = n.to(torch.promote_types(n.dtype, row_max.dtype))
    constant = n.detach()
    constant = torch.where(constant > 0, constant, 1.0)
    log_n = constant.log()
    rounded = log_n.to(row_max.dtype)
    # What a narrower dtype cannot hold of log n is added to the difference, which is small where n counts.
    exponent = (rounded - row_max) + (log_n - rounded).to(row_max.dtype)
    return (n / constant).to(row_max.dtype) * bounded_exp(exponent)
