"""Tensors as the kernels of other libraries read them: width, strides, alignment, heads, bias.

Such a kernel takes the strides of its inputs, but assumes that the columns of a row are contiguous. Where they are not,
PyTorch's CPU kernel loads the wrong numbers, and FlashAttention and the memory-efficient kernel raise errors. torch's
`pad`, `clone`, `zeros_like`, `empty_like` and `to` do not make columns contiguous: they keep the order of the
dimensions in memory, even one in which heads are innermost. Hence whatever a backend pads, slices or copies for such a
kernel passes through `of_width` last, or is allocated by `filled_up` or `base.empty_in_order`, whose last dimension is
contiguous.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attn_n.call import AttentionCall


def common_width(size: int, size_v: int, extra: int = 0, multiple: int = 8) -> int:
    """Return the head size for a kernel that takes one size for q, k and v, which is a multiple of `multiple`."""
    return -(-max(size, size_v + extra) // multiple) * multiple


def of_width(x: Tensor, width: int) -> Tensor:
    """Return x as a kernel reads it: x itself if it is so already.

    - It has `width` columns; those beyond x are zero.
    - Its last stride is 1.
    - No other dimension has a stride of 1 (overlapping rows, as `Tensor.unfold` gives). A kernel that allocates its
      output by `empty_like` would take that dimension for the innermost one. Strides of 0, as `expand` gives, stay.
    - On CUDA its rows begin on 16-byte boundaries.
    """
    if x.shape[-1] != width:
        return filled_up(x, width)
    return x if is_of_width(x, width) else x.clone(memory_format=torch.contiguous_format)


def is_of_width(x: Tensor, width: int) -> bool:
    """Return True if `of_width` returns x itself."""
    *outer, column = x.stride()
    # is_contiguous ignores the strides of dimensions of size 1, which do not matter.
    if x.shape[-1] != width or ((column != 1 or 1 in outer) and not x.is_contiguous()):
        return False
    if not x.is_cuda:
        return True
    return x.data_ptr() % 16 == 0 and all(stride * x.element_size() % 16 == 0 for stride in outer)


def filled_up(x: Tensor, width: int) -> Tensor:
    """Return a contiguous copy of x, padded with zeros to `width` columns."""
    size = x.shape[-1]
    wide = x.new_empty((*x.shape[:-1], width))
    wide[..., :size].copy_(x)
    wide[..., size:].zero_()
    return wide


def lse_as_value_column(
    dout: Tensor, dlse: Tensor, v: Tensor, out: Tensor, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dout, v and out of `width` columns, with which a library without dlse computes `delta - dlse`.

    The library takes `delta = rowsum(dout * out)` and `dP = dout V^T`. One more column, 1 in dout, 0 in v and -dlse in
    out, adds -dlse to the first and nothing to the second. The further columns are zero; those of dV are dropped.
    """
    size = v.shape[-1]
    wide_dout, wide_v, wide_out = (filled_up(x, width) for x in (dout, v, out))
    wide_dout[..., size] = 1.0
    wide_out[..., size] = -dlse
    return wide_dout, wide_v, wide_out


def narrowed(x: Tensor, size: int) -> Tensor:
    """Return the first `size` columns."""
    return x if x.shape[-1] == size else x[..., :size]


def repeat_kv(q: Tensor, k: Tensor, v: Tensor, dim: int = 1) -> tuple[Tensor, Tensor]:
    """Repeat the KV heads for kernels without GQA, so that each query head has one; this copies unless a view will do.

    `dim` is that of the heads.
    """
    groups = q.shape[dim] // k.shape[dim]
    if groups > 1:
        shape = (*k.shape[: dim + 1], groups)
        k, v = (x.unsqueeze(dim + 1).expand(*shape, *x.shape[dim + 1 :]).flatten(dim, dim + 1) for x in (k, v))
    return k, v


def rounds_bias(call: AttentionCall) -> str | None:
    """Return the reason why a kernel that adds a bias in the dtype of q does not serve the call, or None."""
    bias = torch.float32 if call.alibi else call.mask_dtype
    if bias is not None and torch.promote_types(bias, call.dtype) != call.dtype:
        return f"rounds what is added to the logits to {str(call.dtype).removeprefix('torch.')}"
    return None


def aligned_bias(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor | None:
    """Expand a bias to `(B, H, L, S)` in the dtype of q, its rows on 16-byte boundaries, for xFormers' kernel."""
    if bias is None:
        return None
    len_q, len_k = q.shape[2], k.shape[2]
    rows = filled_up(bias.to(q.dtype).expand(-1, -1, -1, len_k), len_k + -len_k % 16)[..., :len_k]
    return rows.expand(q.shape[0], q.shape[1], len_q, len_k)
