"""FlashAttention 2.8's functions: its positional signatures, defaults, layouts and returns, plus n.

Tensors are `(batch, length, heads, head_dim)`, varlen `(total, heads, head_dim)`, and -1 is an unlimited side of a
window. By keyword only: `s_aux` or `learnable_sink` (one logit a head, as FlashAttention 3 and 4 call a sink), `sm_n`,
`backend`, and what FlashAttention 3 adds.

`deterministic=True` takes `triton:portable` on a GPU, whose gradients are the same bits each time.
`return_attn_probs=True` returns `(out, lse, None)`: there is no matrix of probabilities.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from attn_n.cache.layout import Layout, gather
from attn_n.call.errors import UnsupportedError
from attn_n.functional import flash_attention_n, flash_attention_n_varlen
from attn_n.inference import flash_attention_n_with_kvcache

WithProbs: TypeAlias = Tensor | tuple[Tensor, Tensor, None]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    s_aux: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    sm_n: float | Tensor | None = None,
    backend: str | None = None,
) -> WithProbs:
    """`flash_attn.flash_attn_func`: q `(B, L, Hq, E)`, k and v `(B, S, Hkv, E)`; returns `(B, L, Hq, Ev)`.

    With `return_attn_probs` also lse `(B, Hq, L)` and None.
    """
    common = _common(
        q, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
        s_aux, learnable_sink, sm_n, backend,
    )  # fmt: skip
    found: Tensor | tuple[Tensor, Tensor] = flash_attention_n(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), **common
    )
    if isinstance(found, tuple):
        return found[0].transpose(1, 2), found[1], None
    return found.transpose(1, 2)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    **sinks: Any,
) -> WithProbs:
    """`flash_attn.flash_attn_qkvpacked_func`: qkv `(B, S, 3, H, E)`; `sinks` are the keywords of `flash_attn_func`."""
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv: expected shape (batch, length, 3, heads, head_dim), got {tuple(qkv.shape)}")
    q, k, v = qkv.unbind(2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs, **sinks,
    )  # fmt: skip


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    s_aux: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    sm_n: float | Tensor | None = None,
    backend: str | None = None,
) -> WithProbs:
    """`flash_attn.flash_attn_varlen_func`: q `(total_q, Hq, E)`, k and v `(total_k, Hkv, E)`; returns as q.

    With `block_table` `(B, most)` k and v are the blocks of a paged cache, `(blocks, block, Hkv, E)`. `seqused_q` and
    `seqused_k` `(B,)` shorten the sequences, as in FlashAttention 3. With `return_attn_probs` also lse `(Hq, total_q)`
    and None.
    """
    common = _common(
        q, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
        s_aux, learnable_sink, sm_n, backend,
    )  # fmt: skip
    found: Tensor | tuple[Tensor, Tensor]
    if block_table is None and seqused_q is None and seqused_k is None:
        found = flash_attention_n_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **common)
    else:
        used_q = cu_seqlens_q.diff() if seqused_q is None else seqused_q
        used_k = cu_seqlens_k.diff() if seqused_k is None else seqused_k
        keys, values = (
            _batched(x, cu_seqlens_k, max_seqlen_k)
            if block_table is None
            else gather(x.transpose(1, 2), Layout(used_k.shape[0], x.shape[1], block_table), used_k)
            for x in (k, v)
        )
        queries = _batched(q, cu_seqlens_q, max_seqlen_q)
        found = flash_attention_n(queries, keys, values, seqused_q=used_q, seqused_k=used_k, **common)
        token = torch.arange(q.shape[0], device=q.device)
        batch = torch.searchsorted(cu_seqlens_q[1:].long(), token, right=True).clamp_max(used_q.shape[0] - 1)
        row = token - cu_seqlens_q[batch]
        out, lse = found if isinstance(found, tuple) else (found, None)
        out = out.transpose(1, 2)[batch, row]
        found = out if lse is None else (out, lse.transpose(1, 2)[batch, row])
    if isinstance(found, tuple):
        return found[0], found[1].transpose(0, 1), None
    return found


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    s_aux: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    sm_n: float | Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`flash_attn.flash_attn_with_kvcache`: q `(B, L, Hq, E)`, caches `(B, Smax, Hkv, E)` or `(blocks, block, Hkv, E)`.

    Returns `(B, L, Hq, Ev)`, and with `return_softmax_lse` also lse `(B, Hq, L)`.
    """
    found = flash_attention_n_with_kvcache(
        q.transpose(1, 2), k_cache.transpose(1, 2), v_cache.transpose(1, 2),
        None if k is None else k.transpose(1, 2), None if v is None else v.transpose(1, 2),
        cache_seqlens=cache_seqlens, cache_batch_idx=cache_batch_idx, cache_leftpad=cache_leftpad,
        block_table=block_table, causal=causal, sm_scale=softmax_scale, sm_n=sm_n,
        sinks=_sinks(s_aux, learnable_sink), window=_window(window_size), softcap=softcap or None,
        alibi_slopes=alibi_slopes, rotary_cos=rotary_cos, rotary_sin=rotary_sin, rotary_interleaved=rotary_interleaved,
        k_descale=k_descale, v_descale=v_descale, num_splits=num_splits, return_lse=return_softmax_lse,
        backend=backend,
    )  # fmt: skip
    if isinstance(found, tuple):
        return found[0].transpose(1, 2), found[1]
    return found.transpose(1, 2)


def _common(
    q: Tensor, dropout_p: float, softmax_scale: float | None, causal: bool, window_size: tuple[int, int],
    softcap: float, alibi_slopes: Tensor | None, deterministic: bool, return_attn_probs: bool, s_aux: Tensor | None,
    learnable_sink: Tensor | None, sm_n: float | Tensor | None, backend: str | None,
) -> dict[str, Any]:  # fmt: skip
    """Return the keywords of our functions for those of FlashAttention."""
    if return_attn_probs and dropout_p:
        raise UnsupportedError(
            "return_attn_probs: with dropout FlashAttention returns the matrix of what was dropped, for its tests;"
            " there is none here.\nTo do: pass dropout_p=0.0 to get lse."
        )
    if deterministic and backend is None and q.is_cuda:
        backend = "triton:portable"
    return {
        "causal": causal,
        "sm_scale": softmax_scale,
        "sm_n": sm_n,
        "sinks": _sinks(s_aux, learnable_sink),
        "window": _window(window_size),
        "softcap": softcap or None,
        "alibi_slopes": alibi_slopes,
        "dropout_p": dropout_p,
        "return_lse": return_attn_probs,
        "backend": backend,
    }


def _sinks(s_aux: Tensor | None, learnable_sink: Tensor | None) -> Tensor | None:
    if s_aux is not None and learnable_sink is not None:
        raise ValueError("learnable_sink: expected None together with s_aux, which is the same, got both")
    return learnable_sink if s_aux is None else s_aux


def _window(window_size: tuple[int, int]) -> tuple[int | None, int | None]:
    left, right = (None if side is None or side < 0 else int(side) for side in window_size)
    return left, right


def _batched(x: Tensor, starts: Tensor, longest: int) -> Tensor:
    """Return varlen `(T, H, E)` as a batch `(B, H, longest, E)`: behind a sequence are rows of another one."""
    rows = starts[:-1, None].long() + torch.arange(longest, device=x.device)
    return x[rows.clamp_max(max(x.shape[0] - 1, 0))].transpose(1, 2)
