"""The canonical form of a call: checked, `(B, H, L, E)` or varlen `(T, H, E)`, with one window and one n."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attn_n.call import autocast, checks, transforms
from attn_n.call.description import AttentionCall, describe
from attn_n.call.passes import Options
from attn_n.call.request import CacheRequest, Request


class Canonical(NamedTuple):
    """A valid call: canonical tensors, its options and its description."""

    q: Tensor
    k: Tensor
    v: Tensor
    n: float | Tensor | None
    n_is_logit: bool
    options: Options
    call: AttentionCall
    out_shape: Sequence[int]  # of out, but for its last dimension

    def as_it_came(self, q: Tensor, k: Tensor, v: Tensor, request: Request) -> bool:
        """Return True if a call with the same metadata has the same canonical form without further conversions."""
        mask = request.attn_mask
        masked = mask is None or mask.dtype != torch.float64 or q.dtype == torch.float64
        options = self.options
        lengths = options.seqused_q is request.seqused_q and options.seqused_k is request.seqused_k
        lengths = lengths and options.leftpad_k is request.leftpad_k
        return self.q is q and self.k is k and self.v is v and masked and lengths


def batch(q: Tensor, k: Tensor, v: Tensor, request: Request, plain: bool = False) -> Canonical:
    """Check a call of `flash_attention_n` and return its canonical form.

    `plain` says that the call has a cache key: no autocast or transform surrounds it, and q, k, v, n are plain tensors.
    """
    if not plain:
        checks.not_traced()
        q, k, v = _autocast(q, k, v)
    checks.qkv(q, k, v, varlen=False)
    if not plain:
        q, k, v = _neg_resolved(q), _neg_resolved(k), _neg_resolved(v)
    if not q.shape[:-3] == k.shape[:-3] == v.shape[:-3]:
        leading = torch.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
        q, k, v = (x.expand(*leading, *x.shape[-3:]) for x in (q, k, v))
    shape, mask = q.shape[:-1], request.attn_mask
    seqused_q, seqused_k, leftpad_k = _lengths(q, k, request)
    right_of_mask = checks.causal_bias(mask, q.shape[-2], k.shape[-2])
    if right_of_mask is not None:
        mask = None
        if right_of_mask and (seqused_q is not None or seqused_k is not None):
            raise ValueError(
                "attn_mask: expected no causal_upper_left together with seqused_q or seqused_k, whose lengths are not"
                " its own: pass torch.ones(L, S, dtype=torch.bool).tril()"
            )
    if mask is not None:
        checks.mask(mask, q, (*shape, k.shape[-2]))
        mask = _canonical_mask(_clamped_to_float32(_neg_resolved(mask), q), q.shape)
    q, k, v = _canonical(q), _canonical(k), _canonical(v)
    left, right = window(request, q.shape[2], k.shape[2], right_of_mask)
    if right == 0:
        _warn_of_rows_without_keys(q, k)
    options = Options(
        checks.scale(request.sm_scale, q), left, right, mask=mask, seqused_q=seqused_q, seqused_k=seqused_k,
        leftpad_k=leftpad_k,
    )  # fmt: skip
    return _describe(q, k, v, q.shape[0], request, options, shape, plain)


def varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    request: Request,
) -> Canonical:
    """Check a call of `flash_attention_n_varlen` and return its canonical form."""
    checks.not_traced()
    q, k, v = _autocast(q, k, v)
    checks.qkv(q, k, v, varlen=True)
    q, k, v = _neg_resolved(q), _neg_resolved(k), _neg_resolved(v)
    checks.no_causal_bias(request.attn_mask)
    checks.cu_seqlens("cu_seqlens_q", cu_seqlens_q, q)
    checks.cu_seqlens("cu_seqlens_k", cu_seqlens_k, q)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        expected, got = tuple(cu_seqlens_q.shape), tuple(cu_seqlens_k.shape)
        raise ValueError(f"cu_seqlens_k: expected the shape of cu_seqlens_q, {expected}, got {got}")
    max_seqlen_q = checks.length("max_seqlen_q", max_seqlen_q)
    max_seqlen_k = checks.length("max_seqlen_k", max_seqlen_k)
    if checks.readable(cu_seqlens_q) and checks.readable(cu_seqlens_k):
        checks.boundaries("cu_seqlens_q", cu_seqlens_q, q.shape[0], max_seqlen_q)
        checks.boundaries("cu_seqlens_k", cu_seqlens_k, k.shape[0], max_seqlen_k)
    batch, mask = cu_seqlens_q.shape[0] - 1, request.attn_mask
    if mask is not None:
        checks.mask(mask, q, (batch, q.shape[1], max_seqlen_q, max_seqlen_k))
        mask = _clamped_to_float32(_neg_resolved(mask), q)[(None,) * (4 - mask.dim())]
    left, right = window(request)
    # Sides beyond the longest sequence bound nothing, and kernels of other libraries truncate them to 32 bits.
    left = None if left is None else min(left, max_seqlen_k)
    right = None if right is None else min(right, max_seqlen_q)
    options = Options(
        checks.scale(request.sm_scale, q),
        left,
        right,
        mask=mask,
        cu_seqlens_q=cu_seqlens_q.contiguous(),
        cu_seqlens_k=cu_seqlens_k.contiguous(),
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
    )
    return _describe(q, k, v, batch, request, options, q.shape[:-1])


def cached(q: Tensor, k: Tensor, v: Tensor, request: Request, cache: CacheRequest) -> Canonical:
    """Return the canonical form of a call over a KV cache that is read in place; `attn_n.cache.checks` has checked it.

    The new rows of `cache` are in it, and `request` has the lengths with them.
    """
    q, k, v, table = _neg_resolved(q), _neg_resolved(k), _neg_resolved(v), cache.block_table
    left, right = window(request, q.shape[2], k.shape[2] * (1 if table is None else table.shape[1]))
    options = Options(
        checks.scale(request.sm_scale, q), left, right, seqused_k=request.seqused_k, leftpad_k=request.leftpad_k,
        block_table=table, cache_batch_idx=cache.cache_batch_idx, k_descale=cache.k_descale,
        v_descale=cache.v_descale, num_splits=cache.num_splits,
    )  # fmt: skip
    return _describe(q, k, v, q.shape[0], request, options, q.shape[:-1])


def _describe(
    q: Tensor, k: Tensor, v: Tensor, batch: int, request: Request, options: Options, out_shape: Sequence[int],
    plain: bool = False,
) -> Canonical:  # fmt: skip
    """Do the checks and conversions that batches and varlen sequences share."""
    heads = q.shape[1]
    sm_n, sinks, slopes = request.sm_n, request.sinks, request.alibi_slopes
    checks.not_both(sm_n, sinks)
    n: float | Tensor | None
    if sinks is not None or isinstance(sm_n, Tensor):
        n = _neg_resolved(checks.n_tensor(sm_n, sinks, q, heads, out_shape))
        n_kind = "per row" if n.dim() > 1 else "per head" if n.dim() else "scalar tensor"
        if n.dim() > 1:
            n = _of_rows(n, out_shape, 2 if options.varlen else 3)
    else:
        n = checks.n_number("sm_n", 0.0 if sm_n is None else sm_n)
        n, n_kind = (n, "float") if n > 0 else (None, "none")
    if slopes is not None:
        compute = torch.promote_types(q.dtype, torch.float32)
        slopes = _neg_resolved(checks.alibi(slopes, q, batch, heads)).to(compute).expand(batch, heads)
    softcap, dropout_p = checks.softcap(request.softcap, q), checks.dropout(request.dropout_p)
    if softcap is not None or dropout_p or slopes is not None:
        options = options.replaced(softcap=softcap, dropout_p=dropout_p, alibi_slopes=slopes)
    smallest = 2.3e-308 if q.dtype == torch.float64 else 1.2e-38  # the smallest normal number of the logits' dtype
    if options.scale < smallest:  # kernels flush smaller ones to zero, and take the maximum before they scale
        tiny = options.scale > -smallest
        q, scale = (q * options.scale, 1.0) if tiny else (-q, -options.scale)
        options = options.replaced(scale=scale)
    mask, transform = options.mask, None
    tensors = q, k, v, n if isinstance(n, Tensor) else None, mask, slopes
    needing = [x is not None and x.requires_grad for x in tensors]
    if not plain:
        needing = [transforms.requires_grad(x) for x in tensors]
        transform = transforms.beyond_one_backward(*tensors)
    *_, of_mask, of_slopes = needing
    differentiates = torch.is_grad_enabled()
    call = describe(
        q,
        k,
        v,
        options,
        n_kind=n_kind,
        return_lse=checks.flag("return_lse", request.return_lse),
        needs_grad=differentiates and any(needing),
        mask_needs_grad=differentiates and of_mask,
        alibi_needs_grad=differentiates and of_slopes,
        transform=transform,
    )
    return Canonical(q, k, v, n, sinks is not None, options, call, out_shape)


def _lengths(q: Tensor, k: Tensor, request: Request) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return seqused_q, seqused_k and leftpad_k `(B,)`, where B is all dimensions before the heads."""
    given = {"seqused_q": request.seqused_q, "seqused_k": request.seqused_k, "leftpad_k": request.leftpad_k}
    found = [None if x is None else checks.lengths(name, x, q).contiguous() for name, x in given.items()]
    if q.dim() > 4:
        found = [None if x is None else x.repeat_interleave(math.prod(q.shape[1:-3])) for x in found]
    seqused_q, seqused_k, leftpad_k = found
    if all(x is None or checks.readable(x) for x in found):
        checks.values_in_use(seqused_q, seqused_k, leftpad_k, q.shape[-2], k.shape[-2])
    return seqused_q, seqused_k, leftpad_k


_warned = False


def _warn_of_rows_without_keys(q: Tensor, k: Tensor) -> None:
    """Warn once if a causal mask leaves most rows without keys, as when `(B, L, H, E)` is passed for `(B, H, L, E)`.

    With fewer KV heads than query heads nothing else shows that mistake: heads of q pass for queries, of k for keys.
    """
    global _warned
    if torch.compiler.is_compiling() or _warned or not 0 < 2 * k.shape[2] < q.shape[2]:
        return
    _warned = True
    shapes = f"q {tuple(q.shape)} and k {tuple(k.shape)} were read as (N, heads, length, E)"
    warnings.warn(
        f"{q.shape[2] - k.shape[2]} of {q.shape[2]} rows see no key under this causal mask, and are zero: {shapes}. If"
        " the length comes before the heads, pass q.transpose(1, 2), and k and v so too. (This is said once.)",
        stacklevel=5,
    )


def _autocast(q: Any, k: Any, v: Any) -> tuple[Any, Any, Any]:
    """Cast q, k and v to the dtype of an enclosing autocast, except float64 and what is no tensor."""
    if not isinstance(q, Tensor):
        return q, k, v
    dtype = autocast.dtype(q.device.type)
    if dtype is None:
        return q, k, v
    cast = (torch.float16, torch.bfloat16, torch.float32)
    q, k, v = (x.to(dtype) if isinstance(x, Tensor) and x.dtype in cast else x for x in (q, k, v))
    return q, k, v


def _neg_resolved(x: Tensor) -> Tensor:
    """Return x without a negative bit: kernels read memory, where the imaginary part of a conjugate lacks its sign.

    In a compiled graph the operators resolve the bit themselves.
    """
    return x if torch.compiler.is_compiling() else x.resolve_neg()


def _clamped_to_float32(mask: Tensor, q: Tensor) -> Tensor:
    """Clamp finite values of a float64 mask beside narrower inputs to float32, the logits' dtype: only -inf may hide.

    The gradient passes through the clamp as through any rounding.
    """
    if mask.dtype != torch.float64 or q.dtype == torch.float64:
        return mask
    largest = torch.finfo(torch.float32).max
    constant = mask.detach()
    beyond = (constant.abs() > largest) & ~constant.isinf()
    return torch.where(beyond, constant.clamp(-largest, largest) + (mask - constant), mask)


def _canonical(x: Tensor) -> Tensor:
    """Reshape (N, ..., H, L, E) to (B, H, L, E)."""
    if x.dim() == 4:
        return x
    if x.dim() == 2:
        return x[None, None]
    return x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])


def with_dimensions(mask: Tensor, dims: int) -> Tensor:
    """Return a mask with as many dimensions as `dims`: those of size 1 are put in front."""
    return mask if mask.dim() == dims else mask[(None,) * (dims - mask.dim())]


def _canonical_mask(mask: Tensor, q_shape: Sequence[int]) -> Tensor:
    """Reshape a mask that broadcasts to (N, ..., H, L, S) to one that broadcasts to (B, H, L, S)."""
    dims = max(4, len(q_shape))
    mask = with_dimensions(mask, dims)
    if dims == 4:
        return mask
    return _one_batch(mask, q_shape[:-3], 3)


def _of_rows(n: Tensor, shape: Sequence[int], dims: int) -> Tensor:
    """Reshape what broadcasts to rows of the shape (N, ..., H, L) to what broadcasts to (B, H, L)."""
    if n.dim() == dims:
        return n
    return _one_batch(n, shape[:-2], 2)


def _one_batch(x: Tensor, leading: Sequence[int], others: int) -> Tensor:
    """Merge the dimensions before the last `others`, which broadcast to `leading`, into one; it is 1 if all are."""
    own, last = x.shape[:-others], x.shape[-others:]
    leading = own if all(size == 1 for size in own) else leading
    return x.expand(*leading, *last).reshape(math.prod(leading), *last)


def window(
    request: Request, len_q: int | None = None, len_k: int | None = None, right_of_mask: int | None = None
) -> tuple[int | None, int | None]:
    """Combine the window, `causal` and a CausalBias; a side that bounds nothing at these lengths is None."""
    left, right = checks.window(request.window)
    if checks.flag("causal", request.causal):
        right = 0
    if right_of_mask is not None:
        right = right_of_mask if right is None else min(right, right_of_mask)
    if left is not None and len_k is not None and left >= len_k - 1:
        left = None
    if right is not None and len_q is not None and right >= len_q - 1:
        right = None
    return left, right
