"""softmax_n by itself, without attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attn_n.call import checks
from attn_n.sink.weight import as_tensor, weight_of_n


def softmax_n(
    x: Tensor, n: float | Tensor | None = 0.0, dim: int | None = -1, dtype: torch.dtype | None = None
) -> Tensor:
    """`exp(x_i) / (n + sum_j exp(x_j))` along `dim`; n = 0 is `torch.softmax`.

    Args:
        x: floating tensor of any shape. float16 and bfloat16 are computed in float32 and rounded once.
        n: a finite number >= 0, or a tensor of them that broadcasts against `x` with `dim` of size 1;
            a tensor n is differentiable. None is 0.
        dim: the dimension that is normalised; None is the last one.
        dtype: cast `x` to this first, as `torch.softmax` does: a floating one.

    Returns:
        A tensor shaped as `x`. A slice that is -inf everywhere gives zeros, for every n.

    Raises:
        TypeError: `x` is no dense (or jagged) floating tensor, n neither that nor a number, `dim` no integer, or
            `dtype` no floating `torch.dtype`.
        ValueError: n is negative, NaN or infinite, its shape does not broadcast, or x has no such `dim`.

    The maximum that is subtracted is `max(max_j x_j, log n)`, so that neither a large x nor a large n overflows.
    """
    checks.for_operators("x", x)
    n, dim = 0.0 if n is None else n, checks.dimension("dim", -1 if dim is None else dim, x)
    if dtype is not None:
        x = x.to(checks.dtype("dtype", dtype))
    compute = x.to(torch.promote_types(x.dtype, torch.float32))
    if isinstance(n, Tensor):
        checks.n_values("n", checks.for_operators("n", n))
        reduced = list(x.shape)
        if reduced:
            reduced[dim] = 1
        if not checks.broadcasts(n.shape, reduced):
            raise ValueError(f"n: expected a shape that broadcasts to {tuple(reduced)}, got {tuple(n.shape)}")
        n = n.to(device=x.device, dtype=torch.promote_types(n.dtype, compute.dtype))
    else:
        n = as_tensor(checks.n_number("n", n), x.device)
    row_max = compute.detach().amax(dim, keepdim=True) if x.numel() else compute.detach().sum(dim, keepdim=True)
    row_max = torch.maximum(row_max, n.detach().log().to(row_max.dtype))
    row_max = row_max.masked_fill(row_max == -math.inf, 0.0)
    weights = (compute - row_max).exp()
    denominator = weights.sum(dim, keepdim=True) + weight_of_n(n, row_max)
    # The denominator is zero only where all of x is -inf and n = 0, and there every weight is zero too.
    return (weights / denominator.masked_fill(denominator == 0, 1.0)).to(x.dtype)
