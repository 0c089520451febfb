"""The fold in Triton: one kernel gives n to `out`, in place, and to `lse`; one more gives the gradient of n.

`out` is read and written at most once, and nothing else of its size moves: rows that n does not change, as those of
many keys, stay where they are. A program takes a tile of rows of one head; programs that follow each other take the
heads of the same rows, which lie together in memory where tokens come first.
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


def scale_(out: Tensor, lse: Tensor, log_n: float | Tensor, packed: bool) -> Tensor:
    """`out` at n = 0 becomes `out` at n, in place; returns the lse at n."""
    # Not in place: the threads of a program read it more than once, and not all of them before the first writes.
    lse_n = torch.empty_like(lse)
    sinks, number = (log_n, None) if isinstance(log_n, Tensor) else (None, float(log_n))
    stride_n = 0 if sinks is None else sinks.stride(0)
    key = out.device, out.dtype, out.shape, out.stride(), lse.stride(), lse_n.stride(), stride_n
    launch = _scales.get(key)
    if launch is None:
        views = [_by_batch(x, packed) for x in (out, lse, lse_n)]
        of_out, *of_rows = (x.stride() for x in views)
        launch = prepared("scale", out.device, out.dtype, views[0].shape, (of_out,), tuple(of_rows), stride_n)
        _scales.put(key, launch)
    launch(out, lse, lse_n, sinks, number)  # a kernel gets addresses: of views they are the same
    return lse_n


_scales: Recent[tuple[Any, ...], Launch] = Recent()


def gradient_of_n(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, log_n: Tensor | None, packed: bool
) -> Tensor:
    """What `fold.gradient_of_n` gives: each program's share, added up in a fixed order."""
    views = [None if x is None else _by_batch(x, packed) for x in (dout, out, dlse, lse)]
    view_dout, view_out, view_dlse, view_lse = views
    assert view_dout is not None
    assert view_out is not None
    assert view_lse is not None
    launch = prepared(
        "gradient", out.device, out.dtype, view_out.shape, (view_dout.stride(), view_out.stride()),
        (None if view_dlse is None else view_dlse.stride(), view_lse.stride()),
        0 if log_n is None else log_n.stride(0),
    )  # fmt: skip
    shares = torch.empty(launch.programs, dtype=torch.float32, device=out.device)
    launch(view_dout, view_out, view_dlse, view_lse, log_n, shares)
    return shares.view(-1, view_out.shape[1]).sum(0)


def _by_batch(x: Tensor, packed: bool) -> Tensor:
    """Packed `(T, H, ...)` as a batch of one, `(1, H, T, ...)`."""
    return x.transpose(0, 1)[None] if packed else x


@functools.lru_cache(1024)
def prepared(
    kernel: str, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[Any, ...],
    row_strides: tuple[Any, ...], stride_n: int,
) -> Launch:  # fmt: skip
    """The launch for all calls that look the same."""
    batch, heads, rows, width = shape
    tile_e = triton.next_power_of_2(width)
    tile_rows = min(max(1, _TILE // tile_e), triton.next_power_of_2(rows))
    # Times a factor from here to 1 every number rounds to itself: a power of two, which has the nearest neighbour below
    # it, at eps / 2 of itself, is less than half of that away.
    unchanged = 1.0 - torch.finfo(dtype).eps / 4
    constants = {"WIDTH": width, "TILE": tile_rows, "TILE_E": tile_e, "UNCHANGED": unchanged}
    numbers = (*strides, *row_strides, stride_n, heads, rows)
    function = scale_kernel if kernel == "scale" else gradient_kernel
    programs = batch * heads * triton.cdiv(rows, tile_rows)
    return Launch(function, programs, device, numbers, constants, _OPTIONS, descriptors=False)
