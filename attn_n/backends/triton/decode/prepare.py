"""A prepared call of the decoding kernels: its launches, and what it allocates."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attn_n.backends.triton import allocation
from attn_n.backends.triton.decode import configs
from attn_n.backends.triton.decode.configs import Config, Gpu, power_of_two
from attn_n.backends.triton.decode.kernels import merge_kernel, split_kernel
from attn_n.call import Gradients, Grads, Options, Saved
from attn_n.launcher import Launch
from attn_n.recent import Recent


class DecodeKey(NamedTuple):
    """The metadata of a call; two calls with equal keys launch the same kernels with the same numbers."""

    device: torch.device
    dtype: torch.dtype
    cache_dtype: torch.dtype
    q_shape: tuple[int, ...]
    heads_kv: int
    width_v: int
    most: int  # keys of a sequence
    block: int  # keys of a block of a paged cache; 0 of a contiguous one
    strides: tuple[tuple[int, ...], ...]  # of q, k and v
    stride_table: int | None
    strides_slopes: tuple[int, ...] | None
    strides_k_descale: tuple[int, ...] | None
    strides_v_descale: tuple[int, ...] | None
    stride_n: int | None  # of log n per head; None if n is a number, or log n one a row and dense
    scale: float
    left: int | None
    right: int | None
    softcap: float | None
    tf32: bool
    num_splits: int  # 0 chooses

    @property
    def linear(self) -> bool:
        """The logits are q k times a positive number."""
        without = self.softcap, self.strides_slopes, self.strides_k_descale
        return self.scale > 0 and all([x is None for x in without])

    @property
    def most_seen(self) -> int:
        """How many keys the queries of a sequence see together at most."""
        if self.left is None or self.right is None:
            return self.most
        return max(0, min(self.most, self.left + self.right + self.q_shape[2]))


class DecodeCall:
    """A prepared call: the launches of a forward, and what allocates its results and its parts."""

    def __init__(self, key: DecodeKey, q: Tensor, gpu: Gpu, config: Config | None = None) -> None:
        """`config` replaces the tiles that are chosen."""
        batch, heads, len_q, width = key.q_shape
        groups = heads // key.heads_kv
        tile_e, tile_v = power_of_two(width), power_of_two(key.width_v)
        config = config or configs.find(groups * len_q, max(tile_e, tile_v), key.dtype.itemsize, key.block > 0, gpu)
        row_tiles = -(-groups * len_q // config.tile_r)
        items = batch * key.heads_kv * row_tiles
        splits = key.num_splits or configs.splits_for(items, key.most_seen, config.programs * gpu.sm_count)
        self._out, strides_out = allocation.empty_like(q, key.width_v)
        self._lse = allocation.empty(key.q_shape[:-1], torch.float32, key.device)
        rows = batch * heads * len_q
        self._parts = allocation.empty((rows, splits, key.width_v), torch.float32, key.device)
        self._parts_lse = allocation.empty((rows, splits), torch.float32, key.device)
        numbers = (
            *key.strides, strides_out, key.stride_table, key.strides_slopes, key.strides_k_descale,
            key.strides_v_descale, key.stride_n, heads, len_q, key.most, key.left, key.right, key.scale, key.softcap,
            splits, row_tiles,
        )  # fmt: skip
        constants = {
            "GROUPS": groups, "WIDTH": width, "WIDTH_V": key.width_v, "TILE_E": tile_e, "TILE_V": tile_v,
            "TILE_R": config.tile_r, "TILE_K": config.tile_k, "BLOCK": key.block, "LINEAR": key.linear,
            "SPLIT": splits > 1, "PDL": splits > 1 and gpu.pdl, "PRECISION": "tf32" if key.tf32 else "ieee",
        }  # fmt: skip
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        self.split = Launch(split_kernel, items * splits, key.device, numbers, constants, options, False)
        self.merge = None
        if splits > 1:
            constants = {"WIDTH_V": key.width_v, "TILE_V": tile_v, "TILE_S": power_of_two(splits, 1), "PDL": gpu.pdl}
            options = {"num_warps": 4} | ({"launch_pdl": True} if gpu.pdl else {})
            numbers = strides_out, key.stride_n, heads, len_q, splits
            self.merge = Launch(merge_kernel, rows, key.device, numbers, constants, options, False)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, log_n: float | Tensor | None, options: Options
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        out, lse = self._out(), self._lse()
        sinks, number = (log_n, None) if isinstance(log_n, Tensor) else (None, log_n)
        into = (out, lse) if self.merge is None else (self._parts(), self._parts_lse())
        self.split(
            q, k, v, *into, sinks, number, options.alibi_slopes, options.seqused_k, options.leftpad_k,
            options.block_table, options.cache_batch_idx, options.k_descale, options.v_descale,
        )  # fmt: skip
        if self.merge is not None:
            self.merge(*into, out, lse, sinks, number)
        return out, lse, None

    def backward(self, grads: Grads, saved: Saved, options: Options) -> Gradients:
        raise NotImplementedError("the decoding kernels have no backward")


def call_for(q: Tensor, k: Tensor, v: Tensor, log_n: float | Tensor | None, options: Options) -> DecodeCall:
    key = key_of(q, k, v, log_n, options)
    return _calls.get(key) or _calls.put(key, DecodeCall(key, q, configs.gpu_of(key.device)))


def key_of(q: Tensor, k: Tensor, v: Tensor, log_n: float | Tensor | None, options: Options) -> DecodeKey:
    table, slopes = options.block_table, options.alibi_slopes
    paged = table is not None
    return DecodeKey(
        q.device, q.dtype, k.dtype, tuple(q.shape), k.shape[1], v.shape[3],
        k.shape[2] * (table.shape[1] if table is not None else 1), k.shape[2] if paged else 0,
        (q.stride(), k.stride(), v.stride()), None if table is None else table.stride(0),
        None if slopes is None else slopes.stride(), _strides(options.k_descale), _strides(options.v_descale),
        log_n.stride(0) if isinstance(log_n, Tensor) and log_n.dim() == 1 else None, options.scale,
        options.window_left, options.window_right, options.softcap,
        q.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest", options.num_splits,
    )  # fmt: skip


_calls: Recent[DecodeKey, DecodeCall] = Recent()


def _strides(x: Tensor | None) -> tuple[int, ...] | None:
    return None if x is None else x.stride()
