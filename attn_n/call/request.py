"""The arguments of a call, as they were passed."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Request(NamedTuple):
    """The arguments of `flash_attention_n`; `flash_attention_n_varlen` has the same ones but the last three."""

    causal: bool
    sm_scale: float | None
    sm_n: float | Tensor | None
    sinks: Tensor | None
    attn_mask: Tensor | None
    window: tuple[int | None, int | None] | None
    softcap: float | None
    alibi_slopes: Tensor | None
    dropout_p: float
    return_lse: bool
    backend: str | None
    seqused_q: Tensor | None = None
    seqused_k: Tensor | None = None
    leftpad_k: Tensor | None = None


class CacheRequest(NamedTuple):
    """The arguments that `flash_attention_n_with_kvcache` has beside those of a `Request`."""

    k: Tensor | None
    v: Tensor | None
    cache_seqlens: int | Tensor | None
    cache_batch_idx: Tensor | None
    block_table: Tensor | None
    rotary_cos: Tensor | None
    rotary_sin: Tensor | None
    rotary_interleaved: bool
    k_descale: Tensor | None
    v_descale: Tensor | None
    num_splits: int
