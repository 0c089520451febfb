"""n applied to the plain attention of any library: (out, lse) at n = 0 becomes (out, lse) at n, and n gets a gradient.

With `lse_n = logaddexp(lse, log n)`, the logarithm of the whole denominator: `out_n = out * exp(lse - lse_n)`.
All of it works in the dtype of lse: an lse in bfloat16 would cost up to 10 % in the factor.

Here by torch, and on a GPU with Triton by the kernels of `attn_n.sink.fused`, which move less memory.
"""

from __future__ import annotations

import functools
import importlib
import math
import warnings
from typing import Any

import torch
from torch import Tensor


def apply_(out: Tensor, lse: Tensor, log_n: float | Tensor, packed: bool, lse_wanted: bool) -> Tensor:
    """`out` at n = 0 becomes `out` at n, in place; `log_n` is a number or `(Hq,)`.

    Returns the lse at n. If it is not `lse_wanted`, it may be that at n = 0, which saves a launch.
    """
    fused = _fused(out, lse)
    if fused is not None:
        lse_n: Tensor = fused.scale_(out, lse, log_n, packed)
        return lse_n
    scale_(out, lse, log_n, packed)
    return with_n(lse, log_n, packed) if lse_wanted else lse


def scale_(out: Tensor, lse: Tensor, log_n: float | Tensor, packed: bool) -> None:
    """`out` at n = 0 becomes `out` at n, in place; `lse` is that at n = 0, and `log_n` a number or `(Hq,)`."""
    # sigmoid(lse - log n) is exp(lse - lse_n) without the cancellation of two large numbers.
    if isinstance(log_n, Tensor):
        factor = (lse - per_row(log_n, packed)).sigmoid_()
        factor.nan_to_num_(0.0)  # -inf minus -inf: a row without visible keys at n = 0
    else:  # n = 1, the usual one, has nothing to subtract
        factor = torch.sigmoid(lse if log_n == 0.0 else lse - log_n)
    out.mul_(factor.unsqueeze_(-1))


def with_n(lse: Tensor, log_n: float | Tensor, packed: bool) -> Tensor:
    """The lse at n, of that at n = 0."""
    return torch.logaddexp(lse, per_row(log_n, packed) if isinstance(log_n, Tensor) else lse.new_full((), log_n))


def per_row(per_head: Tensor, packed: bool) -> Tensor:
    """`(Hq,)` shaped to broadcast with an lse `(B, Hq, L)`, or packed `(T, Hq)`."""
    return per_head if packed else per_head[:, None]


def gradient_of_n(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, log_n: Tensor | None, packed: bool
) -> Tensor:
    """`-sum_rows exp(log n - lse) * delta` per head, with `delta = rowsum(dout * out) - dlse`: the gradient of log n.

    `log_n` `(Hq,)`; None stands for zeros and gives the gradient of n itself, which is finite at n = 0 too.
    """
    fused = _fused(out, lse)
    if fused is not None:
        gradient: Tensor = fused.gradient_of_n(dout, dlse, out, lse, log_n, packed)
        return gradient
    delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    if dlse is not None:
        delta = delta - dlse
    share = bounded_exp(-lse if log_n is None else per_row(log_n, packed) - lse)
    # A row without visible keys has lse = log n: at n = 0 that is -inf, and n does not reach its zero output.
    rows = (share * delta).masked_fill(lse == -math.inf, 0.0)
    return -rows.sum(0 if packed else (0, 2))


def _fused(out: Tensor, lse: Tensor) -> Any:
    """`attn_n.sink.fused` for tensors that its kernels serve, or None."""
    return _kernels() if out.is_cuda and lse.dtype == torch.float32 and out.numel() else None


@functools.cache
def _kernels() -> Any:
    """None without Triton: torch gives the same numbers."""
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


def bounded_exp(x: Tensor) -> Tensor:
    """exp(x), and a large number instead of infinity: times zero it is zero, and a sum of such products not NaN."""
    largest = math.log(torch.finfo(x.dtype).max) - 0.02
    return x.clamp(max=largest).exp().masked_fill(x > largest, torch.finfo(x.dtype).max ** 0.75)


def as_tensor(n: float, device: torch.device) -> Tensor:
    """n as a tensor `()`, in float64 where the device has that; torch.compile may have a symbol for n."""
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return torch.ones((), dtype=dtype, device=device) * n


def weight_of_n(n: float | Tensor, top: Tensor) -> Tensor:
    """`n exp(-top)`, the term of n in a denominator whose logits are less by `top`, which is at least log n.

    It is linear in n, at n = 0 too, so that its derivatives of every order are right. Neither a large nor a small n
    leaves the range of the numbers of `top`, in whose dtype the result is.
    """
    n = n if isinstance(n, Tensor) else as_tensor(n, top.device)
    n = n.to(torch.promote_types(n.dtype, top.dtype))
    constant = n.detach()
    constant = torch.where(constant > 0, constant, 1.0)
    log_n = constant.log()
    rounded = log_n.to(top.dtype)
    # What a narrower dtype cannot hold of log n is added to the difference, which is small where n counts.
    exponent = (rounded - top) + (log_n - rounded).to(top.dtype)
    return (n / constant).to(top.dtype) * bounded_exp(exponent)


def lse_for_backward(lse: Tensor, dlse: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Rows without a denominator, whose lse is -inf, made to give zero gradients: `exp(S - inf) = 0`."""
    empty = lse == -math.inf
    return lse.masked_fill(empty, math.inf), None if dlse is None else dlse.masked_fill(empty, 0.0)
