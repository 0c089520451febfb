"""FlashAttention 2, the package flash-attn."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from attn_n.backends.adapt import flash2
from attn_n.backends.adapt.flash import Sequences, sequences
from attn_n.backends.adapt.in_place import InPlaceFlash, Places
from attn_n.backends.adapt.library import Library
from attn_n.backends.adapt.signatures import changed_function, changed_operator
from attn_n.backends.base import gradients_like
from attn_n.call import AttentionCall, Gradients, Grads, Options, Saved
from attn_n.compilation import constant_when_compiled

LIBRARY = Library(
    "flash-attn 2", "flash_attn.flash_attn_interface", "pip install flash-attn", ("flash-attn",), oldest="2.7"
)
MOST_SPLITS = 128
_VARLEN = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, "
_OPTIONS = "dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes"
_GRADIENTS = "dout, q, k, v, out, softmax_lse, dq, dk, dv, "


@constant_when_compiled
def why_not_usable() -> str | None:
    return LIBRARY.why_not() or changed_operator(
        f"flash_attn::_flash_attn_forward(q, k, v, {_OPTIONS}, return_softmax) -> 4",
        f"flash_attn::_flash_attn_varlen_forward(q, k, v, {_VARLEN}{_OPTIONS}) -> 4",
        f"flash_attn::_flash_attn_backward({_GRADIENTS}{_OPTIONS}, deterministic, rng_state) -> 1",
        f"flash_attn::_flash_attn_varlen_backward({_GRADIENTS}{_VARLEN}{_OPTIONS}, deterministic, rng_state) -> 1",
    )


@constant_when_compiled
def why_not_cache() -> str | None:
    """Return the reason why its function for KV caches cannot be called; None if it can."""
    return changed_function(
        _module(), "flash_attn_with_kvcache", "cache_seqlens", "cache_batch_idx", "cache_leftpad", "block_table",
        "softmax_scale", "causal", "window_size", "softcap", "alibi_slopes", "num_splits", "return_softmax_lse",
    )  # fmt: skip


def _module() -> Any:
    return importlib.import_module(LIBRARY.module)


class FlashAttention2(InPlaceFlash):
    name = "flash_attn:2"
    summary = "FlashAttention 2, the package flash-attn"
    honours = (
        "causal", "window", "softcap", "dropout", "alibi", "varlen", "lse gradient", "seqused", "leftpad", "cache",
        "block table",
    )  # fmt: skip
    capability = (8, 0)

    def why_not(self, call: AttentionCall) -> str | None:
        if call.softcap is not None and call.dropout_p:
            return "takes no dropout together with softcap"
        reason = self.too_wide(call) or flash2.why_not_window(call) or why_not_usable()
        return reason or (self.why_not_in_place(call) if call.cached else None)

    def why_not_in_place(self, call: AttentionCall) -> str | None:
        if call.block_table and call.k_shape[2] % 256:
            return f"takes blocks of a multiple of 256 keys, got {call.k_shape[2]}"
        if call.block_table and call.leftpad:
            return "has no cache_leftpad together with a block table"
        return flash2.why_not_window(call, in_place=True) or super().why_not_in_place(call) or why_not_cache()

    def kernel_forward(self, q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor | None]:
        lengths = sequences(options, q, k)
        window = flash2.window_arguments(options, lengths)
        arguments = _library_arguments(options, window)
        library = torch.ops.flash_attn
        if lengths.starts_q is None:
            out, lse, _, rng_state = library._flash_attn_forward(q, k, v, *arguments, False)
        else:
            out, lse, _, rng_state = library._flash_attn_varlen_forward(q, k, v, *lengths[:3], window.max_k, *arguments)
        return out, flash2.rows_without_keys(lse, options, lengths), rng_state if options.dropout_p else None

    def kernel_in_place(
        self, q: Tensor, k: Tensor, v: Tensor, places: Places, options: Options
    ) -> tuple[Tensor, Tensor]:
        most = k.shape[1] if places.table is None else k.shape[1] * places.table.shape[1]
        window = flash2.window_arguments(options, Sequences(None, None, q.shape[1], most))
        out, lse = _module().flash_attn_with_kvcache(
            q, k, v, cache_seqlens=places.used, cache_batch_idx=places.rows, cache_leftpad=places.leftpad,
            block_table=places.table, softmax_scale=options.scale, causal=window.causal,
            window_size=(window.left, window.right), softcap=options.softcap or 0.0, alibi_slopes=options.alibi_slopes,
            num_splits=min(options.num_splits, MOST_SPLITS), return_softmax_lse=True,
        )  # fmt: skip
        return out, flash2.minus_infinity_(lse)

    def kernel_backward(self, grads: Grads, saved: Saved, options: Options) -> Gradients:
        q, k, v, out, lse, _, rng_state = saved
        dout, lengths = grads.dout, sequences(options, q, k)
        window = flash2.window_arguments(options, lengths)
        arguments = *_library_arguments(options, window), torch.are_deterministic_algorithms_enabled(), rng_state
        dq, dk, dv = gradients_like(q, k, v)
        library = torch.ops.flash_attn
        if lengths.starts_q is None:
            library._flash_attn_backward(dout, q, k, v, out, lse, dq, dk, dv, *arguments)
        else:
            library._flash_attn_varlen_backward(
                dout, q, k, v, out, lse, dq, dk, dv, *lengths[:3], window.max_k, *arguments
            )
        return Gradients(dq, dk, dv)


def _library_arguments(
    options: Options, window: flash2.WindowArguments
) -> tuple[float, float, bool, int, int, float, Tensor | None]:
    return (
        options.dropout_p, options.scale, window.causal, window.left, window.right, options.softcap or 0.0,
        options.alibi_slopes,
    )  # fmt: skip
