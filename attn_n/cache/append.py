"""New keys and values are turned and written into a cache, in place: by torch, or on a GPU by one Triton kernel."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from attn_n.cache import rotary
from attn_n.cache.layout import Layout, write
from attn_n.call import CacheRequest, transforms

# From q, both caches, the keys `(B,)` that each sequence has before, and the call: q turned, and the keys after.
Append: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor, CacheRequest], tuple[Tensor, Tensor]]


def prepare(q: Tensor, k_cache: Tensor, v_cache: Tensor, cache: CacheRequest, bounded: bool) -> Append:
    """Return what writes k and v into the caches, for all calls with this metadata.

    `bounded`: each query is turned by a position of its own; otherwise all of them by the first.
    """
    fused = _fused(q, k_cache)
    if fused is not None:
        found: Append = fused.FusedAppend(q, k_cache, v_cache, cache, bounded)
        return found
    return functools.partial(by_torch, bounded)


def by_torch(
    bounded: bool, q: Tensor, k_cache: Tensor, v_cache: Tensor, before: Tensor, cache: CacheRequest
) -> tuple[Tensor, Tensor]:
    k, v, cos, sin = cache.k, cache.v, cache.rotary_cos, cache.rotary_sin
    assert k is not None
    assert v is not None
    new, length = k.shape[2], q.shape[2]
    layout = Layout(q.shape[0], k_cache.shape[2], cache.block_table, cache.cache_batch_idx)
    with torch.no_grad():
        if cos is not None and sin is not None:
            positions = before[:, None] + torch.arange(max(new, length), device=q.device)
            of_q = positions[:, :length] if bounded else before[:, None].expand(-1, length)
            q = rotary.turn(q, cos, sin, of_q, cache.rotary_interleaved)
            k = rotary.turn(k, cos, sin, positions[:, :new], cache.rotary_interleaved)
        write(k_cache, layout, before, scaled_down(k, cache.k_descale, k_cache))
        write(v_cache, layout, before, scaled_down(v, cache.v_descale, v_cache))
        return q, before + new


def scaled_down(x: Tensor, factors: Tensor | None, cache: Tensor) -> Tensor:
    """Return new rows as a cache holds them."""
    if cache.dtype == x.dtype:
        return x
    if factors is not None:
        x = x.float() / factors[:, :, None, None]
    largest = torch.finfo(cache.dtype).max  # what lies beyond would become NaN
    return x.clamp(-largest, largest).to(cache.dtype)


def scaled_up(x: Tensor, factors: Tensor | None, q: Tensor) -> Tensor:
    """Return the rows of a cache in the dtype of q."""
    if x.dtype == q.dtype:
        return x
    return (x.float() if factors is None else x.float() * factors[:, :, None, None]).to(q.dtype)


def _fused(q: Tensor, k_cache: Tensor) -> Any:
    """Return `attn_n.cache.fused` for calls that its kernel serves, or None."""
    if not q.is_cuda or q.dtype == torch.float64 or q.shape[0] == 0 or transforms.needs_dispatcher(q):
        return None
    if k_cache.dtype != q.dtype and torch.version.hip is None and torch.cuda.get_device_capability(q.device) < (8, 9):
        return None  # Triton has no float8_e4m3fn there
    return _kernels()


@functools.cache
def _kernels() -> Any:
    """Return `attn_n.cache.fused`, or None without a Triton that can be imported: torch gives the same numbers."""
    try:
        return importlib.import_module("attn_n.cache.fused")
    except Exception:  # a broken Triton can raise anything, of which `attn_n.sink.rescale` warns
        return None
