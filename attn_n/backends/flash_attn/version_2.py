"""FlashAttention 2, the package flash-attn."""

from __future__ import annotations

import torch
from torch import Tensor

from attn_n.backends.adapt import flash2
from attn_n.backends.adapt.flash import FlashBackend, sequences
from attn_n.backends.adapt.library import Library
from attn_n.backends.adapt.signatures import changed_operator
from attn_n.backends.base import gradients_like
from attn_n.call import AttentionCall, Gradients, Grads, Options, Saved
from attn_n.compilation import constant_when_compiled

LIBRARY = Library(
    "flash-attn 2", "flash_attn.flash_attn_interface", "pip install flash-attn", ("flash-attn",), oldest="2.7"
)
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


class FlashAttention2(FlashBackend):
    name = "flash_attn:2"
    summary = "FlashAttention 2, the package flash-attn"
    honours = ("causal", "window", "softcap", "dropout", "alibi", "varlen", "lse gradient", "seqused", "leftpad")
    capability = (8, 0)

    def why_not(self, call: AttentionCall) -> str | None:
        if call.softcap is not None and call.dropout_p:
            return "takes no dropout together with softcap"
        return self.too_wide(call) or flash2.why_not_window(call) or why_not_usable()

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
