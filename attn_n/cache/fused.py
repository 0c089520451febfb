"""One Triton kernel turns q and k, writes k and v into a cache, and adds up its lengths."""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

from attn_n.cache.kernels import append_kernel
from attn_n.call import CacheRequest
from attn_n.launcher import Launch

_TILE = 2048  # elements


class FusedAppend:
    """An `attn_n.cache.append.Append`: its launch, and what allocates its results."""

    def __init__(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, cache: CacheRequest, bounded: bool) -> None:
        k, v, cos, sin, table = cache.k, cache.v, cache.rotary_cos, cache.rotary_sin, cache.block_table
        assert k is not None
        assert v is not None
        (batch, heads, len_q, width), (_, heads_kv, new, _), width_v = q.shape, k.shape, v.shape[3]
        self._turns = cos is not None
        self._out = functools.partial(torch.empty, q.shape, dtype=q.dtype, device=q.device)
        self._used = functools.partial(torch.empty, (batch,), dtype=torch.int32, device=q.device)
        tile_e, tile_v = triton.next_power_of_2(width), triton.next_power_of_2(width_v)
        most_rows = max(new, len_q if self._turns else 1)
        tile = max(1, min(_TILE // max(tile_e, tile_v), triton.next_power_of_2(most_rows)))
        tiles_new, tiles_q = triton.cdiv(new, tile), triton.cdiv(len_q, tile) if self._turns else 0
        constants = {
            "WIDTH": width, "WIDTH_V": width_v, "PAIRS": 0 if cos is None else cos.shape[1], "TILE": tile,
            "TILE_E": tile_e, "TILE_V": tile_v, "INTERLEAVED": cache.rotary_interleaved, "BOUNDED": bounded,
            "LARGEST": None if k_cache.dtype == q.dtype else torch.finfo(k_cache.dtype).max,
        }  # fmt: skip
        strides_out = (heads * len_q * width, len_q * width, width, 1) if self._turns else None
        numbers = (
            k.stride(), v.stride(), k_cache.stride(), v_cache.stride(), q.stride(), strides_out, _strides(cos),
            _strides(sin), None if table is None else table.stride(0), _strides(cache.k_descale),
            _strides(cache.v_descale), new, len_q, heads, heads_kv, k_cache.shape[2], tiles_new, tiles_q,
        )  # fmt: skip
        programs = batch * (heads_kv * tiles_new + heads * tiles_q)
        options = {"num_warps": 4, "num_stages": 1}
        self.launch = Launch(append_kernel, programs, q.device, numbers, constants, options, False)

    def __call__(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, before: Tensor, cache: CacheRequest
    ) -> tuple[Tensor, Tensor]:
        used, out = self._used(), self._out() if self._turns else None
        self.launch(
            cache.k, cache.v, k_cache, v_cache, before, used, q if self._turns else None, out, cache.rotary_cos,
            cache.rotary_sin, cache.block_table, cache.cache_batch_idx, cache.k_descale, cache.v_descale,
        )  # fmt: skip
        return q if out is None else out, used


def _strides(x: Tensor | None) -> tuple[int, ...] | None:
    return None if x is None else x.stride()
