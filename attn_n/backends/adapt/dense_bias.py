"""Conversion of masks, windows, ALiBi and padding to one dense additive bias, for backends that take nothing else."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from attn_n.call import Options


def dense_bias(
    options: Options,
    len_q: int,
    len_k: int,
    rows: tuple[int, int],
    keys: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor | None:
    """Return the bias of queries `rows[0]:rows[1]` and keys `keys[0]:keys[1]` out of `len_q` and `len_k`.

    Its shape is `(B or 1, Hq or 1, rows or 1, keys or 1)`, and it is -inf where a key is hidden or does not exist; None
    if there is none.
    """
    left, right, slopes = options.window_left, options.window_right, options.alibi_slopes
    bias: Tensor | None = None
    if options.mask is not None:
        mask = _narrow(_narrow(options.mask, 2, rows), 3, keys)
        bias = torch.where(mask, *_seen_and_hidden(dtype)) if mask.dtype == torch.bool else mask.to(dtype)
    if slopes is None and left is None and right is None and not options.padded:
        return bias
    row, key = torch.arange(rows[0], rows[1], device=device)[:, None], torch.arange(keys[0], keys[1], device=device)
    distance = row - key + (_per_batch(options.seqused_k, len_k) - _per_batch(options.seqused_q, len_q))
    if slopes is not None:
        alibi = -slopes.to(dtype)[:, :, None, None] * distance.abs()
        bias = alibi if bias is None else bias + alibi
    if left is None and right is None and not options.padded:
        return bias
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if left is not None:
        hidden = hidden | (distance > left)
    if right is not None:
        hidden = hidden | (-distance > right)
    if options.padded:
        hidden = hidden | (row >= _per_batch(options.seqused_q, len_q)) | (key >= _per_batch(options.seqused_k, len_k))
        hidden = hidden | (key < _per_batch(options.leftpad_k, 0))
    if bias is None:
        bias = torch.zeros((1,) * (4 - hidden.dim()) + hidden.shape, dtype=dtype, device=device)
    return bias.masked_fill(hidden, -math.inf)


def _per_batch(lengths: Tensor | None, otherwise: int) -> Any:
    """Return lengths `(B,)` to broadcast with `(B, H, L, S)`."""
    return otherwise if lengths is None else lengths[:, None, None, None]


def _narrow(mask: Tensor, dim: int, span: tuple[int, int]) -> Tensor:
    size = mask.shape[dim]
    return mask if size == 1 or span == (0, size) else mask.narrow(dim, span[0], span[1] - span[0])


def _seen_and_hidden(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return 0 and -inf as `()` tensors, which are added to the logits of visible and of hidden keys on any device."""
    if torch.compiler.is_compiling():
        return torch.zeros((), dtype=dtype), torch.full((), -math.inf, dtype=dtype)
    return _constants(dtype)


@functools.cache
def _constants(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.zeros((), dtype=dtype), torch.full((), -math.inf, dtype=dtype)
