"""Attention that was computed in parts, put together."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from attn_n.call import checks
from attn_n.sink import rescale
from attn_n.sink.weight import as_tensor, weight_of_n


def merge_attention(
    outs: Sequence[Tensor] | Tensor,
    lses: Sequence[Tensor] | Tensor,
    *,
    sm_n: float | Tensor | None = None,
    sinks: Tensor | None = None,
    varlen: bool = False,
) -> tuple[Tensor, Tensor]:
    """Merge attention of the same queries over several sets of keys, each at n = 0, and apply n once.

    `lse = log(n + sum_i exp(lse_i))`, `out = sum_i exp(lse_i - lse) out_i`. So a prefix that a batch shares is attended
    to once for all of it, and split keys and ranks of a ring are put together. n in a part would count once a part.

    Args:
        outs: of each part `(N, ..., Hq, L, Ev)`, 2 to 6 dimensions, or varlen `(T, Hq, Ev)`; or one tensor of these,
            stacked.
        lses: of each part `(N, ..., Hq, L)`, or varlen `(T, Hq)`: the natural logarithms that `return_lse` gives.
            A row that sees no key of a part has -inf there (or +inf, as FlashAttention 2 says it).
        sm_n: n >= 0: None is 0; a number; or a differentiable tensor `()` or `(Hq,)`.
        sinks: differentiable `log n`: `(Hq,)`, or one a row of the shape of lse, with 1 for any of its sizes. Excludes
            `sm_n`.
        varlen: the parts are of varlen sequences.

    Returns:
        `(out, lse)`: out in the dtype of the parts, lse in float32 (float64 for parts in float64). Both are
        differentiable, by all outs, lses and n. A row that sees no key of any part has `out = 0` and `lse = log n`.

    Raises:
        TypeError, ValueError: the text names the argument, what was expected and what came.

    The formula is that of FlashDecoding (T. Dao et al., 2023), with n as one more part whose out is zero.
    """
    outs, lses = list(outs), list(lses)
    checks.parts(outs, lses, varlen)
    like, rows = outs[0], outs[0].shape[:-1]
    compute = torch.promote_types(like.dtype, torch.float32)
    lses = [lse.to(compute).masked_fill(lse == math.inf, -math.inf) for lse in lses]
    checks.not_both(sm_n, sinks)
    if sinks is not None or isinstance(sm_n, Tensor):
        heads = like.shape[1] if varlen else like.shape[-3] if like.dim() > 2 else 1
        n = checks.n_tensor(sm_n, sinks, like, heads, rows)
        n = rescale.per_row(n, varlen) if n.dim() else n
    else:
        n = as_tensor(checks.n_number("sm_n", 0.0 if sm_n is None else sm_n), like.device)
    log_n = n.detach().to(compute) if sinks is not None else n.detach().to(torch.promote_types(n.dtype, compute)).log()
    row_max = log_n.to(compute).expand(rows)
    for lse in lses:
        row_max = torch.maximum(row_max, lse.detach())
    row_max = row_max.masked_fill(row_max == -math.inf, 0.0)
    row_sum = (n.to(compute) - row_max).exp() if sinks is not None else weight_of_n(n, row_max)
    weighted = torch.zeros((), dtype=compute, device=like.device)
    for out, lse in zip(outs, lses, strict=True):
        weight = (lse - row_max).exp()
        row_sum = row_sum + weight
        weighted = weighted + weight[..., None] * out
    empty = row_sum == 0
    row_sum = row_sum.masked_fill(empty, 1.0)
    return (weighted / row_sum[..., None]).to(like.dtype), (row_max + row_sum.log()).masked_fill(empty, -math.inf)
