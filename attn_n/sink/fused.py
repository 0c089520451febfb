"""The sink in Triton: one kernel rescales `out` in place and adds n to `lse`, another one computes the gradient of n.

`out` is loaded and stored at most once, and no other tensor of its size is. Rows that n does not change, such as those
of many keys, are neither loaded nor stored. A program takes a tile of rows of one head. Consecutive programs take the
heads of the same rows, which are adjacent in memory where tokens come first.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from attn_n.launcher import Launch
from attn_n.sink.kernels import gradient_kernel, scale_kernel

_TILE = 8192  # elements
_OPTIONS = {"num_warps": 4, "num_stages": 1}


def add_sink_(out: Tensor, lse: Tensor, log_n: float | Tensor) -> Tensor:
    """Rescale `out` from n = 0 to n in place, and return the lse at n."""
    # Not in place: threads of a program load it more than once, and some of them after the first has stored.
    lse_n = torch.empty_like(lse)
    sinks, number = (log_n, None) if isinstance(log_n, Tensor) else (None, float(log_n))
    launch = launch_for(
        "scale", out.device, out.dtype, out.shape, (out.stride(),), (lse.stride(), lse_n.stride(), _a_row(sinks)),
        _a_head(sinks),
    )  # fmt: skip
    launch(out, lse, lse_n, sinks, number)
    return lse_n


def gradient_of_n(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, log_n: Tensor | None) -> Tensor:
    """Compute `rescale.gradient_of_n`: each program stores its share, and these are added up in a fixed order."""
    launch = launch_for(
        "gradient", out.device, out.dtype, out.shape, (dout.stride(), out.stride()),
        (None if dlse is None else dlse.stride(), lse.stride(), _a_row(log_n)), _a_head(log_n),
    )  # fmt: skip
    if log_n is not None and log_n.dim() > 1:
        of_rows = torch.empty_like(log_n)
        launch(dout, out, dlse, lse, log_n, of_rows)
        return of_rows
    shares = torch.empty(launch.programs, dtype=torch.float32, device=out.device)
    launch(dout, out, dlse, lse, log_n, shares)
    return shares.view(-1, out.shape[1]).sum(0)


def _a_head(log_n: Tensor | None) -> int:
    return log_n.stride(0) if log_n is not None and log_n.dim() == 1 else 0


def _a_row(log_n: Tensor | None) -> tuple[int, ...] | None:
    return log_n.stride() if log_n is not None and log_n.dim() > 1 else None


def _by_batch(strides: tuple[int, ...] | None, varlen: bool) -> tuple[int, ...] | None:
    """Return the strides of varlen `(T, H, ...)` as those of a batch of one, `(1, H, T, ...)`."""
    return strides if strides is None or not varlen else (0, strides[1], strides[0], *strides[2:])


@functools.lru_cache(1024)
def launch_for(
    kernel: str, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[Any, ...],
    row_strides: tuple[Any, ...], stride_n: int,
) -> Launch:  # fmt: skip
    """Return the launch for all calls of these strides and shapes, `(B, H, L, E)` or varlen `(T, H, E)`."""
    varlen = len(shape) == 3
    batch, heads, rows, width = (1, shape[1], shape[0], shape[2]) if varlen else shape
    tile_e = triton.next_power_of_2(width)
    tile_rows = min(max(1, _TILE // tile_e), triton.next_power_of_2(rows))
    # Times a factor between this and 1 every number rounds to itself. The worst case is a power of two: the next number
    # below it is nearest, at eps / 2 of it, and the product is less than half of that away.
    unchanged = 1.0 - torch.finfo(dtype).eps / 4
    constants = {"WIDTH": width, "TILE": tile_rows, "TILE_E": tile_e, "UNCHANGED": unchanged}
    numbers = (*[_by_batch(x, varlen) for x in (*strides, *row_strides)], stride_n, heads, rows)
    function = scale_kernel if kernel == "scale" else gradient_kernel
    programs = batch * heads * triton.cdiv(rows, tile_rows)
    return Launch(function, programs, device, numbers, constants, _OPTIONS, descriptors=False)
