"""From a call over a KV cache to its result: new rows are written first, then a backend reads the cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attn_n.autograd.prepared import PreparedCall
from attn_n.cache import append, checks
from attn_n.cache.layout import gather
from attn_n.call import AttentionCall, CacheRequest, Request, canonical
from attn_n.call.checks import flag, reads_values, window
from attn_n.dispatch import call_cache, choose, run


def attend(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, request: Request, cache: CacheRequest
) -> Tensor | tuple[Tensor, Tensor]:
    """`flash_attention_n_with_kvcache`."""
    key = None if run.watchers else call_cache.key_over_cache(q, k_cache, v_cache, request, cache)
    known = call_cache.get_over_cache(key)
    if known is not None:
        return _attend_known(*known, q, k_cache, v_cache, request, cache)
    layout, new, before = checks.arguments(q, k_cache, v_cache, cache, request.leftpad_k)
    given = cache.cache_seqlens, request.leftpad_k, cache.block_table, cache.cache_batch_idx
    used, leftpad, table, rows = dense = [_dense(x) for x in given]
    request = request._replace(leftpad_k=leftpad)
    cache = cache._replace(cache_seqlens=used, block_table=table, cache_batch_idx=rows)
    moved, one_length = _kind(q, k_cache, cache)
    writer = None
    with torch.no_grad():
        if isinstance(used, int) and (new or not one_length):
            used = _for_each(used, q)
        if new:
            bounded = flag("causal", request.causal) or window(request.window) != (None, None)
            writer = append.prepare(q, k_cache, v_cache, cache, bounded)
            q, used = writer(q, k_cache, v_cache, used, cache)
        if one_length:
            return run.batch(q, *_in_use(k_cache, v_cache, before, new), request)
        request = request._replace(seqused_k=used)
        prepared = canonical.cached(q, k_cache, v_cache, request, cache)
        chosen = choose.chosen(prepared.call, request.backend)
        if chosen is None and moved:
            keys, values = (
                append.scaled_up(gather(x, layout, used), factors, q)
                for x, factors in ((k_cache, cache.k_descale), (v_cache, cache.v_descale))
            )
            return run.batch(q, keys, values, request)
        as_it_came = prepared.as_it_came(q, k_cache, v_cache, request)
        as_it_came = as_it_came and all([x is y for x, y in zip(dense, given, strict=True)])
        return run.attend(prepared, request, _keeper(key, writer) if as_it_came else None, chosen)


def described(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, request: Request, cache: CacheRequest
) -> tuple[AttentionCall, bool]:
    """Return the call that backends are asked for, and whether the cache is copied first, as nobody reads it in place.

    Nothing is written.
    """
    layout, new, before = checks.arguments(q, k_cache, v_cache, cache, request.leftpad_k)
    moved, one_length = _kind(q, k_cache, cache)
    if one_length:
        return canonical.batch(q, *_in_use(k_cache, v_cache, before, new), request).call, False
    used = None if before is None else (before if isinstance(before, Tensor) else _for_each(before, q)) + new
    request = request._replace(seqused_k=used)
    call = canonical.cached(q, k_cache, v_cache, request, cache).call
    if not moved or choose.chosen(call, request.backend) is not None:
        return call, False
    keys, values = (q.new_empty(()).expand(q.shape[0], x.shape[1], layout.most, x.shape[3]) for x in (k_cache, v_cache))
    return canonical.batch(q, keys, values, request).call, True


def _kind(q: Tensor, k_cache: Tensor, cache: CacheRequest) -> tuple[bool, bool]:
    """Return whether the keys do not lie as a batch in the dtype of q, and if they do, whether it has one length."""
    moved = cache.block_table is not None or cache.cache_batch_idx is not None or k_cache.dtype != q.dtype
    return moved, not (moved or cache.num_splits or isinstance(cache.cache_seqlens, Tensor))


def _in_use(k_cache: Tensor, v_cache: Tensor, before: Any, new: int) -> tuple[Tensor, Tensor]:
    """Return the keys and values of a batch of one length, an int; None is all of them."""
    end = None if before is None else before + new
    return k_cache[:, :, :end], v_cache[:, :, :end]


def _for_each(length: int, q: Tensor) -> Tensor:
    return torch.full(q.shape[:1], length, dtype=torch.int32, device=q.device)


def _keeper(key: call_cache.Key | None, writer: append.Append | None) -> run.Keep | None:
    """Return what keeps a call by its key; None if it is not kept."""
    if key is None:
        return None

    def keep(known: PreparedCall, _: AttentionCall) -> None:
        call_cache.over_cache.put(key, (known, writer))

    return keep


def _attend_known(
    known: PreparedCall, writer: append.Append | None, q: Tensor, k_cache: Tensor, v_cache: Tensor, request: Request,
    cache: CacheRequest,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    if reads_values(q):
        checks.arguments(q, k_cache, v_cache, cache, request.leftpad_k)
    used: Any = cache.cache_seqlens
    if writer is not None:
        q, used = writer(q, k_cache, v_cache, used, cache)
    options = known.options._replace(
        seqused_k=used, leftpad_k=request.leftpad_k, block_table=cache.block_table,
        cache_batch_idx=cache.cache_batch_idx, k_descale=cache.k_descale, v_descale=cache.v_descale,
    )  # fmt: skip
    return run.attend_known(known, q, k_cache, v_cache, request, options)


def _dense(x: Any) -> Any:
    """Return a tensor with a stride of 1 in its last dimension, as kernels read lengths and tables."""
    if not isinstance(x, Tensor) or x.stride(-1) == 1:
        return x
    return x.clone(memory_format=torch.contiguous_format)
