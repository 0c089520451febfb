"""Tensors as the kernels of other libraries read them: width, alignment, heads, bias."""

from __future__ import annotations

import torch
from torch import Tensor

from attn_n.call import AttentionCall

HALF = (torch.float16, torch.bfloat16)


def common_width(size: int, size_v: int, extra: int = 0, multiple: int = 8) -> int:
    """The head size that a kernel of one head size, a multiple of 8 or more, runs at."""
    return -(-max(size, size_v + extra) // multiple) * multiple


def of_width(x: Tensor, width: int) -> Tensor:
    """x as a kernel reads it: filled up to `width` with zeros, unit stride in the last dimension, and on CUDA on
    16-byte boundaries; x itself if it is so already."""
    if x.shape[-1] != width:
        return torch.nn.functional.pad(x, (0, width - x.shape[-1]))
    if x.stride(-1) != 1:
        return x.contiguous()
    if x.is_cuda:
        aligned = all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1])
        if not aligned or x.data_ptr() % 16:
            return x.clone(memory_format=torch.contiguous_format)
    return x


def narrowed(x: Tensor, size: int) -> Tensor:
    """The first `size` columns."""
    return x if x.shape[-1] == size else x[..., :size]


def key_head_each(q: Tensor, k: Tensor, v: Tensor, dim: int = 1) -> tuple[Tensor, Tensor]:
    """k and v with a head for each head of q, for kernels without GQA: a copy unless the strides allow a view.

    `dim` is that of the heads.
    """
    groups = q.shape[dim] // k.shape[dim]
    if groups > 1:
        shape = (*k.shape[: dim + 1], groups)
        k, v = (x.unsqueeze(dim + 1).expand(*shape, *x.shape[dim + 1 :]).flatten(dim, dim + 1) for x in (k, v))
    return k, v


def rounds_bias(call: AttentionCall) -> str | None:
    """The reason why a kernel that adds a bias in the dtype of q does not serve the call."""
    bias = torch.float32 if call.alibi else call.mask_dtype
    if bias is not None and bias.is_floating_point and torch.promote_types(bias, call.dtype) != call.dtype:
        return f"rounds what is added to the logits to {str(call.dtype).removeprefix('torch.')}"
    return None


def aligned_bias(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor | None:
    """(B, H, L, S) by strides, in the dtype of q, its rows on 16-byte boundaries: for the memory-efficient kernel."""
    if bias is None:
        return None
    len_q, len_k = q.shape[2], k.shape[2]
    rows = torch.nn.functional.pad(bias.to(q.dtype).expand(-1, -1, -1, len_k), (0, -len_k % 16))[..., :len_k]
    return rows.expand(q.shape[0], q.shape[1], len_q, len_k)
