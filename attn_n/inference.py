"""Attention over a KV cache, for inference."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

from torch import Tensor

from attn_n.call import AttentionCall, CacheRequest, Request
from attn_n.dispatch import over_cache

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in typing from Python 3.11 on


class _Keywords(TypedDict, total=False):
    """The keyword arguments without `return_lse`, on which the type of the result depends."""

    cache_seqlens: int | Tensor | None
    cache_batch_idx: Tensor | None
    cache_leftpad: Tensor | None
    block_table: Tensor | None
    causal: bool
    sm_scale: float | None
    sm_n: float | Tensor | None
    sinks: Tensor | None
    window: tuple[int | None, int | None] | None
    softcap: float | None
    alibi_slopes: Tensor | None
    rotary_cos: Tensor | None
    rotary_sin: Tensor | None
    rotary_interleaved: bool
    k_descale: Tensor | None
    v_descale: Tensor | None
    num_splits: int
    backend: str | None


@overload
def flash_attention_n_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None = ..., v: Tensor | None = ...,
    *, return_lse: Literal[False] = ..., **keywords: Unpack[_Keywords],
) -> Tensor: ...  # fmt: skip


@overload
def flash_attention_n_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None = ..., v: Tensor | None = ...,
    *, return_lse: bool, **keywords: Unpack[_Keywords],
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip


def flash_attention_n_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    causal: bool = True,
    sm_scale: float | None = None,
    sm_n: float | Tensor | None = None,
    sinks: Tensor | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = True,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    num_splits: int = 0,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of new queries over a KV cache, into which new keys and values are written first, in place.

    The last query meets the last key: query i stands at position `p = i + used - L`, where `used` counts the keys of
    its sequence, the new ones among them. So L is 1 for a decoding step, and larger for a chunk of a prompt or for
    speculative decoding. Nothing is read on the host: in a CUDA graph it can be replayed with other lengths and tables.

    Args:
        q: `(B, Hq, L, E)`, float16, bfloat16, float32 or float64, any strides. There is no gradient: call it under
            `torch.no_grad()`.
        k_cache: `(B, Hkv, Smax, E)`, any strides (of a cache `(B, Smax, Hkv, E)` pass `transpose(1, 2)`); or paged,
            `(blocks, Hkv, block, E)`. In the dtype of q, or float8_e4m3fn.
        v_cache: the same with Ev columns.
        k: new keys `(B, Hkv, new, E)`, or None: the cache is only read.
        v: new values `(B, Hkv, new, Ev)`.
        cache_seqlens: the keys that each sequence has in the cache before the new ones: `(B,)` int32, or an integer for
            all. None is a full cache, and is refused together with k and v.
        cache_batch_idx: `(B,)` int32: the row of the contiguous cache in which each sequence lies.
        cache_leftpad: `(B,)` int32: keys before this one do not exist.
        block_table: `(B, most)` int32: the blocks of each sequence in a paged cache. Entries beyond its keys may be
            anything.
        causal: query i sees the keys `j <= p`.
        sm_scale, sm_n, sinks, window, softcap, alibi_slopes, backend: as in `flash_attention_n`.
        rotary_cos, rotary_sin: `(positions, pairs)`: the first `2 * pairs` columns of q and of the new k are turned by
            their positions in the cache, from `cache_seqlens` on (`cache_leftpad` is not subtracted); without `causal`
            and a bounded `window` all queries are at `cache_seqlens`. This is FlashAttention 2's meaning.
        rotary_interleaved: pairs are neighbouring columns (GPT-J), else the two halves (GPT-NeoX).
        k_descale, v_descale: `(B, Hkv)`: what a float8 cache is multiplied by; None is 1. New keys and values are
            divided by them.
        num_splits: into how many parts the keys are split for kernels that split them; 0 lets them choose.
        return_lse: also return `log(n + sum_j exp(s_ij))`, float32 (float64 for float64), `(B, Hq, L)`.

    Returns:
        `out` `(B, Hq, L, Ev)` in the dtype of q, or `(out, lse)`.

    Raises:
        TypeError, ValueError: a malformed call. Lengths and tables on a GPU are checked if `ATTN_N_CHECK=1` is set when
            attn_n is imported, by reading them.
        UnsupportedError: no backend, or not the one that was named, serves the call.
    """
    request = Request(
        causal, sm_scale, sm_n, sinks, None, window, softcap, alibi_slopes, 0.0, return_lse, backend,
        leftpad_k=cache_leftpad,
    )  # fmt: skip
    cache = CacheRequest(
        k, v, cache_seqlens, cache_batch_idx, block_table, rotary_cos, rotary_sin, rotary_interleaved, k_descale,
        v_descale, num_splits,
    )  # fmt: skip
    return over_cache.attend(q, k_cache, v_cache, request, cache)


# What tells this function's arguments from those of `flash_attention_n`.
OF_CACHE = {"cache_leftpad", *CacheRequest._fields} - {"k", "v"}


def described(*args: Any, **kwargs: Any) -> tuple[AttentionCall, str | None, bool]:
    """Return, for the arguments of `flash_attention_n_with_kvcache`, the call that backends are asked for.

    With it come the backend that is named, and whether the cache is copied first, as nobody reads it in place.
    """
    bound = inspect.signature(flash_attention_n_with_kvcache).bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments | {"attn_mask": None, "dropout_p": 0.0, "leftpad_k": bound.arguments["cache_leftpad"]}
    request = Request(**{name: given[name] for name in Request._fields if name in given})
    cache = CacheRequest(**{name: given[name] for name in CacheRequest._fields})
    call, copied = over_cache.described(given["q"], given["k_cache"], given["v_cache"], request, cache)
    return call, request.backend, copied
