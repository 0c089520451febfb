"""Allocation of a call's results and workspaces: sizes and layouts are found once.

What is kept between calls holds no tensor: its memory could be that of a CUDA graph, which wants all of it back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from attn_n.backends.base import dense_strides, memory_order
from attn_n.backends.triton.kernel_key import Strides, kernel_strides

Allocation: TypeAlias = Callable[[], Tensor]


def empty(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, strides: Sequence[int] | None = None
) -> Allocation:
    """Return what allocates a contiguous tensor, or one with these strides."""
    if strides is None:
        strides = dense_strides(shape, range(len(shape)))
    return functools.partial(torch.empty_strided, tuple(shape), strides, dtype=dtype, device=device)


def empty_like(x: Tensor, width: int | None = None) -> tuple[Allocation, Strides]:
    """Return what allocates a result that lies in memory as x does, and its strides as kernels get them.

    It is dense, with the dimension order of x but the last dimension innermost, and with another number of columns if
    `width` is given.
    """
    shape = x.shape if width is None else (*x.shape[:-1], width)
    strides = dense_strides(shape, range(x.dim()) if x.is_contiguous() else memory_order(x))
    return empty(shape, x.dtype, x.device, strides), kernel_strides(strides)
