"""This adds the sink to the plain attention of any library: it turns (out, lse) at n = 0 into (out, lse) at n.

The logarithm of the whole denominator is `lse_n = logaddexp(lse, log n)`, and `out_n = out * exp(lse - lse_n)`. All is
computed in the dtype of lse: an lse in bfloat16 would cost up to 10 % in the factor.

These functions use torch, and on a GPU with Triton the kernels of `attn_n.sink.fused`, which move less memory.
"""

from __future__ import annotations

import functools
import importlib
import math
import warnings
from typing import Any

import torch
from torch import Tensor

from attn_n.sink.weight import bounded_exp


def add_sink_(out: Tensor, lse: Tensor, log_n: float | Tensor, varlen: bool, lse_wanted: bool) -> Tensor:
    """Rescale `out` from n = 0 to n in place, and return the lse at n.

    `log_n` is a number, `(Hq,)`, or one a row, of the shape of lse. Without `lse_wanted` the returned lse
    may still be that at n = 0, which saves a launch.
    """
    fused = _fused(out, lse) if out.is_cuda else None
    if fused is not None:
        lse_n: Tensor = fused.add_sink_(out, lse, log_n)
        return lse_n
    scale_(out, lse, log_n, varlen)
    return add_to_lse(lse, log_n, varlen) if lse_wanted else lse


def scale_(out: Tensor, lse: Tensor, log_n: float | Tensor, varlen: bool) -> None:
    """Rescale `out` from n = 0 to n in place. `lse` is that at n = 0; `log_n` as above."""
    # sigmoid(lse - log n) is exp(lse - lse_n) without the cancellation of two large numbers.
    if isinstance(log_n, Tensor):
        factor = (lse - per_row(log_n, varlen)).sigmoid_()
        factor.nan_to_num_(0.0)  # -inf minus -inf: a row without visible keys at n = 0
    else:  # n = 1, the usual one, has nothing to subtract
        factor = torch.sigmoid(lse if log_n == 0.0 else lse - log_n)
    out.mul_(factor.unsqueeze_(-1))


def add_to_lse(lse: Tensor, log_n: float | Tensor, varlen: bool) -> Tensor:
    """Return the lse at n, given that at n = 0."""
    return torch.logaddexp(lse, of_rows(lse, log_n, varlen))


def of_rows(lse: Tensor, log_n: float | Tensor, varlen: bool) -> Tensor:
    """Return log n to broadcast with lse: it is the lse of a row that sees no key."""
    return per_row(log_n, varlen) if isinstance(log_n, Tensor) else lse.new_full((), log_n)


def per_row(log_n: Tensor, varlen: bool) -> Tensor:
    """Shape `(Hq,)` to broadcast with an lse `(B, Hq, L)`, or `(T, Hq)` of varlen tensors."""
    return log_n if varlen or log_n.dim() > 1 else log_n.unsqueeze(-1)


def gradient_of_n(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, log_n: Tensor | None, varlen: bool
) -> Tensor:
    """Return the gradient of log n per head, `-sum_rows exp(log n - lse) * delta`, or without the sum, per row.

    There `delta = rowsum(dout * out) - dlse`. `log_n` is `(Hq,)`, or of the shape of lse; None stands for zeros and
    gives the gradient of n itself per head, which is finite at n = 0 too.
    """
    fused = _fused(out, lse)
    if fused is not None:
        gradient: Tensor = fused.gradient_of_n(dout, dlse, out, lse, log_n)
        return gradient
    delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    if dlse is not None:
        delta = delta - dlse
    share = bounded_exp(-lse if log_n is None else per_row(log_n, varlen) - lse)
    # A row without visible keys has lse = log n: at n = 0 that is -inf, and n does not reach its zero output.
    rows = (share * delta).masked_fill(lse == -math.inf, 0.0)
    return -rows if log_n is not None and log_n.dim() > 1 else -rows.sum(0 if varlen else (0, 2))


def _fused(out: Tensor, lse: Tensor) -> Any:
    """Return `attn_n.sink.fused` for tensors that its kernels serve, or None."""
    return _kernels() if out.is_cuda and lse.dtype == torch.float32 and out.numel() else None


@functools.cache
def _kernels() -> Any:
    """Return `attn_n.sink.fused`, or None without Triton: torch gives the same numbers."""
    try:
        return importlib.import_module("attn_n.sink.fused")
    except Exception as error:  # a broken Triton can raise anything
        if not (isinstance(error, ModuleNotFoundError) and error.name == "triton"):
            warnings.warn(
                "attn_n: the kernels that apply n behind other libraries cannot be imported "
                f"({' '.join(f'{type(error).__name__}: {error}'.split())}); torch applies it, exactly but more slowly. "
                "Mend or remove Triton.",
                RuntimeWarning,
                stacklevel=2,
            )
        return None


def lse_for_backward(lse: Tensor, dlse: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Make rows with an empty denominator (lse = -inf) give zero gradients: `exp(S - inf) = 0`."""
    empty = lse == -math.inf
    return lse.masked_fill(empty, math.inf), None if dlse is None else dlse.masked_fill(empty, 0.0)
