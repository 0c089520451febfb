"""PyTorch's `scaled_dot_product_attention`, with n."""

from __future__ import annotations

import torch
from torch import Tensor

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
    serve several query heads. A row that sees no key is zero. Jagged NestedTensors `(N, H, j, E)` are served as they
    are.

    PyTorch's own tests of its function pass through this one, but for the type of errors (here ValueError and
    TypeError, there mostly RuntimeError), TorchScript, which cannot compile it, and heads of size 0, which are refused.
    So is `dropout_p=1`.

    Raises:
        ValueError: `is_causal` together with a mask or with NestedTensors of two lengths, or heads that need
            `enable_gqa`.
    """
    if is_causal and attn_mask is not None:
        raise ValueError("attn_mask: expected None together with is_causal=True, got both")
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor) or x.dim() < 2:
            shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name}: expected a tensor of 2 or more dimensions (..., length, E), got {shape}")
    nested = query.is_nested or key.is_nested or value.is_nested
    if not nested:
        dims = max(x.dim() for x in (query, key, value))
        query, key, value = (x[(None,) * (dims - x.dim())] for x in (query, key, value))
    if query.dim() > 2 and not (nested and query.layout is torch.strided):  # whose shape PyTorch does not say
        heads, heads_kv = query.shape[-3], max(key.shape[-3], value.shape[-3])
        if heads != heads_kv and 1 not in (heads, heads_kv) and not enable_gqa:
            raise ValueError(
                f"enable_gqa: expected True for {heads_kv} KV heads beside {heads} heads of query, got False"
            )
        if not nested:
            query, key, value = _broadcast(query, key, value, heads_kv)
    causal, window = is_causal, None
    if is_causal:
        len_q, len_k = query.shape[-2], key.shape[-2]
        if nested and len_q != len_k:
            raise ValueError(
                "is_causal: expected False for NestedTensors of two lengths, whose corners differ for each sequence"
            )
        if len_q < len_k:
            key, value = key[..., :len_q, :], value[..., :len_q, :]  # the others are never seen
        elif len_q > len_k:
            causal, window = False, (None, len_q - len_k)  # of the last query, and so of bottom-right windows
    return flash_attention_n(
        query, key, value, causal, scale, sm_n, sinks=sinks, attn_mask=attn_mask, window=window, dropout_p=dropout_p,
        backend=backend,
    )  # fmt: skip


def _broadcast(query: Tensor, key: Tensor, value: Tensor, heads_kv: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return views whose heads and leading dimensions go together."""
    if query.shape[-3] == 1:
        query = query.expand(*query.shape[:-3], heads_kv, *query.shape[-2:])
    key, value = (x.expand(*x.shape[:-3], heads_kv, *x.shape[-2:]) for x in (key, value))
    leading = torch.broadcast_shapes(*(x.shape[:-3] for x in (query, key, value)))
    return query.expand(*leading, *query.shape[-3:]), key, value
