"""Allocation of a call's results: their layout is found once."""

from __future__ import annotations

from torch import Tensor

from attn_n.backends.base import dense_strides, memory_order
from attn_n.template import template


def template_like(x: Tensor, width: int | None = None) -> Tensor:
    """Return the template of a result which lies in memory as x does, with another number of columns if given.

    It is dense, with the dimension order of x but the last dimension innermost.
    """
    shape = (*x.shape[:-1], x.shape[-1] if width is None else width)
    return template(shape, x.dtype, x.device, dense_strides(shape, memory_order(x)))
