"""The attention function: what a model of transformers passes, as a call of ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attn_n.call.errors import UnsupportedError
from attn_n.functional import flash_attention_n, flash_attention_n_varlen
from attn_n.integrations.transformers import context_parallel, paged
from attn_n.integrations.transformers.layers import of_this_rank
from attn_n.integrations.transformers.masks import packed_by
from attn_n.integrations.transformers.pattern import MaskPattern, Visible, Window

# What models hand on to every function that they call, and what does not change which keys are seen.
IRRELEVANT = {
    "position_ids",  # beyond packed sequences: rotary embedding is done
    "cache_position",
    "use_cache",
    "return_dict",
    "output_hidden_states",
    "output_router_logits",
    "num_items_in_batch",
    "logits_to_keep",
    "seq_idx",  # of state-space layers
}


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    position_bias: Tensor | None = None,
    indices: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Any = None,
    max_length_q: int | Tensor | None = None,
    max_length_k: Any = None,
    deterministic: bool | None = None,
    output_attentions: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of a layer of transformers: `(N, L, Hq, Ev)`, and no weights.

    Args:
        module: the layer: its `is_causal` counts where neither `is_causal` nor a mask is given.
        query: `(N, Hq, L, E)`; key `(N, Hkv, S, E)`; value `(N, Hkv, S, Ev)`.
        attention_mask: of our mask function, or any mask `(N, 1 or Hq, L, S)`, bool (True is seen) or floating (added),
            and then it alone says what is seen; or padding `(N, S)`; or None.
        sliding_window: how many keys a query sees, itself among them, where there is no mask.
        s_aux: sinks `(Hq,)`; sinks: `(N, Hq, L, 1)`, one a token.
        position_bias: added to the logits, `(N or 1, Hq, L, S)`, differentiable.
        indices: `(N, L, k)`, different ones: each query sees these keys alone, of those that the mask lets it see
            (the sparse attention of DeepSeek V3.2 and Hunyuan 4, whose indices only we get, and not their masks).
        cu_seq_lens_q: `(sequences + 1,)` packed sequences, as FlashAttention has them, with the three others.

    Raises:
        TypeError: an argument that is not known here and is not None. It might say which keys are seen.
        UnsupportedError: what cannot be computed; the text says what to do.
    """
    if output_attentions:
        raise UnsupportedError(
            "output_attentions: attn_n computes no matrix of weights.\n"
            'To do: model.set_attn_implementation("eager") for the calls that need them.'
        )
    sinks = _sinks(module, query, s_aux, sinks)
    common: dict[str, Any] = {
        "sm_scale": scaling,
        "sinks": sinks,
        "softcap": softcap or None,
        "dropout_p": dropout,
        "backend": "triton:portable" if deterministic and query.is_cuda else None,
    }
    serving = any(others.get(name) is not None for name in paged.SIGNS)
    known = IRRELEVANT | paged.KNOWN if serving else IRRELEVANT
    if unknown := sorted(name for name, x in others.items() if x is not None and name not in known):
        raise TypeError(
            f"attn_n does not know the argument(s) {', '.join(unknown)} of {type(module).__name__}, and ignoring them"
            " might give wrong numbers"
        )
    if serving:
        if position_bias is not None or indices is not None:
            raise UnsupportedError("position_bias, indices: continuous batching has none")
        lengths = paged.Lengths(cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
        return paged.attention(module, query, key, value, sliding_window, lengths, others, common), None
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if context_parallel.entered():
        if any(x is not None for x in (position_bias, indices, cu_seq_lens_q, cu_seq_lens_k)):
            raise UnsupportedError("context_parallel: position_bias, indices and cu_seq_lens_q have no place in it")
        bounds = _rule(None, bool(causal), sliding_window)
        positions = others.get("position_ids")
        return context_parallel.attention(query, key, value, attention_mask, positions, **bounds, common=common), None
    if indices is not None and indices.shape[-1] < key.shape[2]:
        attention_mask = _sparse(attention_mask, indices, key.shape[2])
    if cu_seq_lens_q is not None or cu_seq_lens_k is not None:
        rule = _rule(attention_mask, bool(causal), sliding_window)
        sequences = cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k
        return _packed(query, key, value, position_bias, sequences, common | rule), None
    if isinstance(attention_mask, MaskPattern):
        visible = packed_by(attention_mask, others.get("position_ids")) or _fitting(attention_mask, query, key)
    else:
        visible = _without_pattern(attention_mask, query, key, bool(causal), sliding_window)
        attention_mask = attention_mask if attention_mask is not None and attention_mask.dim() == 4 else None
    if visible is None or (visible.cu_seqlens is not None and position_bias is not None):
        assert attention_mask is not None
        dense = attention_mask.dense() if isinstance(attention_mask, MaskPattern) else attention_mask
        out = flash_attention_n(query, key, value, attn_mask=_biased(dense, position_bias), **common)
        return out.transpose(1, 2), None
    if visible.keys is not None:
        key, value = key[:, :, : visible.keys], value[:, :, : visible.keys]
        position_bias = None if position_bias is None else position_bias[..., : visible.keys]
    if visible.cu_seqlens is not None:
        starts, longest = visible.cu_seqlens, visible.max_seqlen
        keywords = common | {"causal": visible.causal, "window": visible.window}
        return _packed(query, key, value, None, (starts, starts, longest, longest), keywords), None
    out = flash_attention_n(
        query, key, value, visible.causal, window=visible.window, seqused_q=visible.seqused_q,
        seqused_k=visible.seqused_k, leftpad_k=visible.leftpad_k, attn_mask=_biased(visible.key_mask, position_bias),
        **common,
    )  # fmt: skip
    return out.transpose(1, 2), None


def _sinks(module: nn.Module, query: Tensor, s_aux: Tensor | None, sinks: Tensor | None) -> Tensor | None:
    """Return the sinks of a call in our form: `(Hq,)`, or one a row `(N, Hq, L)`."""
    softmax_n = getattr(module, "softmax_n", None)
    given = [of_this_rank(x, query) for x in (s_aux, sinks) if x is not None]
    if len(given) + (softmax_n is not None) > 1:
        raise ValueError("sinks: expected one of s_aux, sinks and set_softmax_n, got several")
    if softmax_n is not None:
        return of_this_rank(softmax_n(query), query)
    if not given:
        return None
    if given[0].dim() == 4 and given[0].shape[-1] == 1:
        return given[0].squeeze(-1)
    return given[0]


def _sparse(mask: Tensor | None, indices: Tensor, len_k: int) -> Tensor:
    """Return the mask `(N, 1, L, S)` without the keys that `indices` `(N, L, k)` do not name."""
    if mask is None or mask.dim() != 4:
        raise ValueError("attention_mask: expected a mask (N, 1, L, S) together with indices, which are not causal")
    dense = mask.dense() if isinstance(mask, MaskPattern) else mask
    named = torch.zeros(*indices.shape[:2], len_k, dtype=torch.bool, device=indices.device)
    named = named.scatter(-1, indices.long(), True)[:, None]
    return dense & named if dense.dtype == torch.bool else dense.masked_fill(~named, -torch.inf)


def _without_pattern(
    mask: Tensor | None, query: Tensor, key: Tensor, causal: bool, sliding_window: int | None
) -> Visible | None:
    """Return what is seen where our mask function made no mask; None is a dense mask."""
    len_q, len_k = query.shape[2], key.shape[2]
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() not in (2, 4)):
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"attention_mask: expected a tensor (N, 1, L, S) or (N, S), got {shape}")
    if mask is not None and mask.dim() == 4:
        return None
    key_mask = None if mask is None else mask.to(torch.bool)[:, None, None, -len_k:]
    if key_mask is not None and key_mask.shape[-1] != len_k:
        raise ValueError(f"attention_mask: expected (N, S) with S of at least {len_k}, got {tuple(mask.shape)}")  # type: ignore[union-attr]
    if causal and 1 < len_q != len_k:
        raise UnsupportedError(
            f"attention_mask: expected a mask for {len_q} causal queries of {len_k} keys, got none: nothing says where"
            " the queries stand.\nTo do: call the model with its own masks (attn_n.integrations.transformers.register()"
            " registers them too), or pass a mask (N, 1, L, S)."
        )
    causal = causal and len_q > 1
    window: Window = (None, None)
    if sliding_window is not None and sliding_window < len_k:
        window = (sliding_window - 1, 0 if causal or len_q == 1 else sliding_window - 1)
    return Visible(causal, window, key_mask=key_mask)


def _fitting(mask: MaskPattern, query: Tensor, key: Tensor) -> Visible | None:
    """Return what is seen by a mask of our mask function, if that was made for this query and this key."""
    if (mask.shape[2], mask.shape[3]) != (query.shape[2], key.shape[2]):
        raise ValueError(
            f"attention_mask: expected one for {query.shape[2]} queries and {key.shape[2]} keys,"
            f" got one for {mask.shape[2]} and {mask.shape[3]}"
        )
    return mask.visible if mask.shape[0] == query.shape[0] else None


def _biased(mask: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """Return one mask for a mask of any kind and a bias."""
    if bias is None or mask is None:
        return bias if mask is None else mask
    return torch.where(mask, bias, -torch.inf) if mask.dtype == torch.bool else mask + bias


def _rule(mask: Tensor | None, causal: bool, sliding_window: int | None) -> dict[str, Any]:
    """Return `causal` and `window` within packed sequences whose lengths are given."""
    if isinstance(mask, MaskPattern) and mask.rule is not None:
        if mask.rule.chunk is not None:
            raise UnsupportedError("cu_seq_lens_q: chunks within packed sequences.\nTo do: pass position_ids alone.")
        return {"causal": mask.rule.causal, "window": mask.rule.window}
    if mask is not None and not isinstance(mask, MaskPattern):
        raise ValueError("attention_mask: expected None together with cu_seq_lens_q, got both")
    right = 0 if causal else None if sliding_window is None else sliding_window - 1
    return {"causal": causal, "window": (None if sliding_window is None else sliding_window - 1, right)}


def _packed(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, sequences: tuple[Any, ...], keywords: dict[str, Any]
) -> Tensor:
    """Return attention within packed sequences, row behind row."""
    starts_q, starts_k, longest_q, longest_k = sequences
    if starts_q is None or starts_k is None:
        raise ValueError("cu_seq_lens_q, cu_seq_lens_k: expected both, got one of them")
    if bias is not None:
        raise UnsupportedError("position_bias: packed sequences have no place for it.\nTo do: pass a dense mask.")
    batch, heads, len_q, _ = query.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    sinks = keywords["sinks"]
    if sinks is not None and sinks.dim() == 3:
        keywords = keywords | {"sinks": sinks.expand(batch, heads, len_q).transpose(1, 2).flatten(0, 1)}
    out: Tensor = flash_attention_n_varlen(
        q, k, v, starts_q.to(torch.int32), starts_k.to(torch.int32),
        paged.longest(longest_q, q), paged.longest(longest_k, k), **keywords,
    )  # fmt: skip
    unpacked: Tensor = out.unflatten(0, (batch, len_q))
    return unpacked
