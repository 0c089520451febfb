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
from attn_n.recent import Recent
from attn_n.sink.kernels import gradient_kernel, scale_kernel

_TILE = 8192  # elements
_OPTIONS = {"num_warps": 4, "num_stages": 1}


def add_sink_(out: Tensor, lse: Tensor, log_n: float | Tensor, varlen: bool) -> Tensor:
    """Rescale `out` from n = 0 to n in place, and return the lse at n."""
    # Not in place: threads of a program load it more than once, and some of them after the first has stored.
    lse_n = torch.empty_like(lse)
    sinks, number = (log_n, None) if isinstance(log_n, Tensor) else (None, float(log_n))
    stride_n = 0 if sinks is None else sinks.stride(0)
    key = out.device, out.dtype, out.shape, out.stride(), lse.stride(), lse_n.stride(), stride_n
    launch = _launches.get(key)
    if launch is None:
        views = [_by_batch(x, varlen) for x in (out, lse, lse_n)]
        of_out, *of_rows = (x.stride() for x in views)
        launch = launch_for("scale", out.device, out.dtype, views[0].shape, (of_out,), tuple(of_rows), stride_n)
        _launches.put(key, launch)
    launch(out, lse, lse_n, sinks, number)  # not the views: a kernel takes addresses, which are the same
    return lse_n


_launches: Recent[tuple[Any, ...], Launch] = Recent()


def gradient_of_n(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, log_n: Tensor | None, varlen: bool
) -> Tensor:
    """Compute `rescale.gradient_of_n`: each program stores its share, and these are added up in a fixed order."""
    views = [None if x is None else _by_batch(x, varlen) for x in (dout, out, dlse, lse)]
    view_dout, view_out, view_dlse, view_lse = views
    assert view_dout is not None
    assert view_out is not None
    assert view_lse is not None
    launch = launch_for(
        "gradient", out.device, out.dtype, view_out.shape, (view_dout.stride(), view_out.stride()),
        (None if view_dlse is None else view_dlse.stride(), view_lse.stride()),
        0 if log_n is None else log_n.stride(0),
    )  # fmt: skip
    shares = torch.empty(launch.programs, dtype=torch.float32, device=out.device)
    launch(view_dout, view_out, view_dlse, view_lse, log_n, shares)
    return shares.view(-1, view_out.shape[1]).sum(0)


def _by_batch(x: Tensor, varlen: bool) -> Tensor:
    """View varlen `(T, H, ...)` as a batch of one, `(1, H, T, ...)`."""
    return x.transpose(0, 1)[None] if varlen else x


@functools.lru_cache(1024)
def launch_for(
    kernel: str, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[Any, ...],
    row_strides: tuple[Any, ...], stride_n: int,
) -> Launch:  # fmt: skip
    """Return the launch for all calls of these strides and shapes."""
    batch, heads, rows, width = shape
    tile_e = triton.next_power_of_2(width)
    tile_rows = min(max(1, _TILE // tile_e), triton.next_power_of_2(rows))
    # Times a factor between this and 1 every number rounds to itself. The worst case is a power of two: the next number
    # below it is nearest, at eps / 2 of it, and the product is less than half of that away.
    unchanged = 1.0 - torch.finfo(dtype).eps / 4
    constants = {"WIDTH": width, "TILE": tile_rows, "TILE_E": tile_e, "UNCHANGED": unchanged}
    numbers = (*strides, *row_strides, stride_n, heads, rows)
    function = scale_kernel if kernel == "scale" else gradient_kernel
    programs = batch * heads * triton.cdiv(rows, tile_rows)
    return Launch(function, programs, device, numbers, constants, _OPTIONS, descriptors=False)
