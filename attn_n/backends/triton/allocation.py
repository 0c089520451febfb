"""The memory of a call: its layouts, found once, and the cheapest way to allocate them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attn_n.backends.base import dense_strides, memory_order
from attn_n.backends.triton.kernel_key import Strides, kernel_strides


class Layout(NamedTuple):
    """The layout of a result: dense, its dimensions in the order of an input, and the last one innermost."""

    shape: tuple[int, ...]
    strides: Strides
    as_input: bool  # the input has this layout itself

    def empty(self, like: Tensor) -> Tensor:
        if self.as_input:  # a third of the time that `empty_strided` takes on the host
            return torch.empty_like(like)
        return torch.empty_strided(self.shape, self.strides, dtype=like.dtype, device=like.device)

    @property
    def of_kernel(self) -> Strides:
        return kernel_strides(self.strides)


def layout(x: Tensor, width: int | None = None) -> Layout:
    """That of a result which lies in memory as x does, with another number of columns if `width` is given."""
    shape = (*x.shape[:-1], x.shape[-1] if width is None else width)
    strides = dense_strides(shape, memory_order(x))
    return Layout(shape, strides, shape == tuple(x.shape) and strides == x.stride())


def template(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of one element, of which `torch.empty_like` makes a contiguous one of `shape`.

    On the host that takes half the time of `torch.empty`.
    """
    return _element(dtype, device).expand(shape)


@functools.cache
def _element(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(1, dtype=dtype, device=device)
