"""PyTorch's `scaled_dot_product_attention`, with n."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_upper_left

from attn_n.functional import flash_attention_n


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    sm_n: float | Tensor | None = None,
    sinks: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`; n, sinks and backend are those of `flash_attention_n`.

    `is_causal` is aligned top-left, as PyTorch has it: query i sees the keys `j <= i`, also where there are more keys
    or fewer. That takes no mask in memory. Leading dimensions broadcast, heads too; with `enable_gqa` fewer KV heads
    serve several query heads. A row that sees no key is zero.

    Raises:
        ValueError: `is_causal` together with a mask, or heads that need `enable_gqa`.
    """
    if is_causal and attn_mask is not None:
        raise ValueError("attn_mask: expected None together with is_causal=True, got both")
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor) or x.dim() < 2:
            shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name}: expected a tensor of 2 or more dimensions (..., length, E), got {shape}")
    dims = max(x.dim() for x in (query, key, value))
    query, key, value = (x[(None,) * (dims - x.dim())] for x in (query, key, value))
    if dims > 2:
        heads, heads_kv = query.shape[-3], max(key.shape[-3], value.shape[-3])
        if heads != heads_kv and 1 not in (heads, heads_kv) and not enable_gqa:
            raise ValueError(
                f"enable_gqa: expected True for {heads_kv} KV heads beside {heads} heads of query, got False"
            )
        if heads == 1:
            query = query.expand(*query.shape[:-3], heads_kv, *query.shape[-2:])
        key, value = (x.expand(*x.shape[:-3], heads_kv, *x.shape[-2:]) for x in (key, value))
        leading = torch.broadcast_shapes(*(x.shape[:-3] for x in (query, key, value)))
        query = query.expand(*leading, *query.shape[-3:])
    mask = causal_upper_left(query.shape[-2], key.shape[-2]) if is_causal else attn_mask
    return flash_attention_n(
        query, key, value, sm_scale=scale, sm_n=sm_n, sinks=sinks, attn_mask=mask, dropout_p=dropout_p, backend=backend
    )
