"""Allocation of a call's results: their layouts are found once, and each is allocated in the cheapest way."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attn_n.backends.base import dense_strides, memory_order
from attn_n.backends.triton.kernel_key import Strides, kernel_strides


class Layout(NamedTuple):
    """The layout of a result: dense, with the dimension order of an input but the last dimension innermost."""

    shape: tuple[int, ...]
    strides: Strides
    as_input: bool  # the input itself has this layout

    def empty(self, like: Tensor) -> Tensor:
        """Return an uninitialised tensor of this layout, with the dtype and the device of `like`."""
        if self.as_input:  # on the host it takes a third of the time of `empty_strided`
            return torch.empty_like(like)
        return torch.empty_strided(self.shape, self.strides, dtype=like.dtype, device=like.device)

    @property
    def of_kernel(self) -> Strides:
        """The strides as kernels get them."""
        return kernel_strides(self.strides)


def layout(x: Tensor, width: int | None = None) -> Layout:
    """That of a result which lies in memory as x does, with another number of columns if `width` is given."""
    if (width is None or width == x.shape[-1]) and x.is_contiguous():
        return Layout(tuple(x.shape), x.stride(), True)
    shape = (*x.shape[:-1], x.shape[-1] if width is None else width)
    strides = dense_strides(shape, memory_order(x))
    return Layout(shape, strides, shape == tuple(x.shape) and strides == x.stride())


def template(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an expanded element of which `torch.empty_like` makes a contiguous tensor of `shape`.

    On the host that takes half the time of `torch.empty`.
    """
    return _element(dtype, device).expand(shape)


@functools.cache
def _element(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(1, dtype=dtype, device=device)
