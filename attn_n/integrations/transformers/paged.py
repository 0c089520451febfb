"""Continuous batching: attention over transformers' paged KV cache."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attn_n.functional import flash_attention_n_varlen
from attn_n.inference import flash_attention_n_with_kvcache


class Lengths(NamedTuple):
    """Where sequences begin, and how long the longest is; those of keys may be a dict by the kind of a layer."""

    starts_q: Any
    starts_k: Any
    longest_q: Any
    longest_k: Any


SIGNS = ("cache", "read_index", "write_index", "block_table")  # of continuous batching, in one release or another

# What continuous batching passes along, and `attention` below reads or has no use for.
KNOWN = {
    *SIGNS, "k_cache", "v_cache", "max_seqlen_q", "max_seqlen_k", "logits_indices", "logits_processor_args",
}  # fmt: skip


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sliding_window: int | None,
    lengths: Lengths,
    others: dict[str, Any],
    common: dict[str, Any],
) -> Tensor:
    """Return attention `(1, T, Hq, Ev)` of packed queries `(1, Hq, T, E)`, whose keys are in a paged cache.

    transformers 5.17 leaves it to this function to write new keys and values into the cache. Later versions have done
    so, unless there is a block table.
    """
    if getattr(module, "is_causal", True) is False:
        raise ValueError(f"{type(module).__name__}: expected causal attention in continuous batching")
    window = getattr(module, "sliding_window", None) or sliding_window
    bounds: dict[str, Any] = {"causal": True, "window": (window - 1 if window else None, None)}
    kind = "sliding_attention" if window else "full_attention"
    starts_k, longest_k = (x[kind] if isinstance(x, dict) else x for x in (lengths.starts_k, lengths.longest_k))
    if longest_k is None:
        longest_k = others.get("max_seqlen_k")
        longest_k = longest_k[kind] if isinstance(longest_k, dict) else longest_k
    cache: Any = others.get("cache")
    table: Any = others.get("block_table")
    k_cache: Any = others.get("k_cache")
    v_cache: Any = others.get("v_cache")
    old = hasattr(cache, "key_cache") and k_cache is None  # 5.17: the cache is ours to write
    if table is not None:
        if old:
            group, layer = cache.layer_index_to_group_indices[module.layer_idx]
            pages = -1, cache.block_size, cache.num_key_value_heads, cache.head_dim
            k_cache, v_cache, table = (
                cache.key_cache[layer].view(pages),
                cache.value_cache[layer].view(pages),
                table[group],
            )
        # One query a sequence: (1, H, B, E) as (B, H, 1, E).
        q, k, v = (x.permute(2, 1, 0, 3) for x in (query, key, value))
        before = (starts_k.diff()[: q.shape[0]] - 1).to(torch.int32)
        decoded: Tensor = flash_attention_n_with_kvcache(
            q, k_cache.transpose(1, 2), v_cache.transpose(1, 2), k, v,
            cache_seqlens=before, block_table=table, **bounds, **_of_inference(common),
        )  # fmt: skip
        return decoded.permute(2, 0, 1, 3)
    if old:
        key, value = cache.update(
            key_states=key, value_states=value, layer_idx=module.layer_idx,
            read_index=others["read_index"], write_index=others["write_index"],
        )  # fmt: skip
    else:
        key, value = (x[0].transpose(0, 1) for x in (key, value))
    q = query[0].transpose(0, 1)
    longest_q = lengths.longest_q if lengths.longest_q is not None else others.get("max_seqlen_q")
    out: Tensor = flash_attention_n_varlen(
        q, key, value, lengths.starts_q.to(torch.int32), starts_k.to(torch.int32),
        longest(longest_q, q), longest(longest_k, key), **bounds, **common,
    )  # fmt: skip
    return out[None]


def longest(given: int | Tensor | None, packed: Tensor) -> int:
    """Return at least the length of the longest sequence, without waiting for an accelerator."""
    if given is None or (isinstance(given, Tensor) and given.device.type != "cpu"):
        return packed.shape[0]
    return int(given)


def _of_inference(common: dict[str, Any]) -> dict[str, Any]:
    return {name: x for name, x in common.items() if name != "dropout_p"}
