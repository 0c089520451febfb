"""FlashAttention 4 (CuTe), the package flash-attn-4: it compiles when first called, and its backward takes dlse."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from attn_n.backends.adapt.flash import sequences
from attn_n.backends.adapt.in_place import InPlaceFlash, Places
from attn_n.backends.adapt.library import Library
from attn_n.backends.adapt.signatures import changed_function
from attn_n.backends.base import gradients_like
from attn_n.call import AttentionCall, Gradients, Grads, Options, Saved
from attn_n.compilation import constant_when_compiled

LIBRARY = Library("flash-attn 4", "flash_attn.cute.interface", "pip install flash-attn-4", ("flash-attn-4",))
_OPTIONS = (
    "softmax_scale", "softcap", "window_size_left", "window_size_right", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q",
    "max_seqlen_k",
)  # fmt: skip


@constant_when_compiled
def why_not_usable() -> str | None:
    reason = LIBRARY.why_not()
    if reason is not None:
        return reason
    module = _module()
    return changed_function(module, "_flash_attn_fwd", "q", "k", "v", "return_lse", *_OPTIONS) or changed_function(
        module, "_flash_attn_bwd", "q", "k", "v", "out", "dout", "lse", "dq", "dk", "dv", "dlse", "deterministic",
        *_OPTIONS,
    )  # fmt: skip


@constant_when_compiled
def why_not_cache() -> str | None:
    """Return the reason why its forward cannot be called for KV caches; None if it can."""
    module = _module()
    return changed_function(module, "_flash_attn_fwd", "seqused_k", "page_table", "num_splits") or changed_function(
        module, "_tile_size_fwd_sm90", "head_dim", "head_dim_v", "is_causal", "is_local"
    )


def _module() -> Any:
    return importlib.import_module(LIBRARY.module)


class FlashAttention4(InPlaceFlash):
    """Its TMA loads whole tiles of keys, and those that lie beyond a sequence reach the result if they are NaN.

    Pages are loaded row by row, unless they are tiles. Hence a contiguous KV cache is passed as a paged one.
    """

    name = "flash_attn:4"
    summary = "FlashAttention 4, for Hopper and Blackwell"
    honours = ("causal", "window", "softcap", "varlen", "lse gradient", "seqused", "leftpad", "cache", "block table")
    takes_dlse = True
    # At other head sizes 4.0.0b36 on Hopper computes a wrong dq for all but the first queries, since its kernel and its
    # buffers round the size differently: https://github.com/Dao-AILab/flash-attention/pull/2896
    backward_multiple = 32

    def why_not(self, call: AttentionCall) -> str | None:
        if call.capability is None or call.capability[0] not in (9, 10, 11):
            return f"is used here for compute capability 9.0 to 11.0, got {call.capability}"
        reason = self.too_wide(call, 256 if call.capability[0] == 9 else 128) or why_not_usable()
        return reason or (self.why_not_in_place(call) if call.cached else None)

    def why_not_in_place(self, call: AttentionCall) -> str | None:
        if call.leftpad:
            return "has no cache_leftpad"
        reason = super().why_not_in_place(call) or why_not_cache()
        if reason is not None or call.k_shape[2] != _keys_of_tile(
            call.capability, call.head_dim, call.head_dim_v, call.causal, call.windowed
        ):
            return reason
        return f"loads blocks of {call.k_shape[2]} keys whole, and NaN behind the last key would reach the result"

    def out_dim_order(self, q: Tensor) -> tuple[int, ...]:
        """Tokens come before heads, whatever the dimension order of q."""
        return (0, 2, 1, 3) if q.dim() == 4 else (0, 1, 2)

    def kernel_forward(self, q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor | None]:
        out, lse, *_ = _module()._flash_attn_fwd(q, k, v, return_lse=True, **_keywords(options, q, k))
        return out, lse, None

    def kernel_in_place(
        self, q: Tensor, k: Tensor, v: Tensor, places: Places, options: Options
    ) -> tuple[Tensor, Tensor]:
        # It splits keys on Blackwell alone.
        splits = 1 if torch.cuda.get_device_capability(q.device)[0] == 9 else max(1, options.num_splits)
        out, lse, *_ = _module()._flash_attn_fwd(
            q, k, v, return_lse=True, seqused_k=places.used, page_table=places.as_table(), num_splits=splits,
            **_keywords(options, q, k),
        )  # fmt: skip
        return out, lse

    def kernel_backward(self, grads: Grads, saved: Saved, options: Options) -> Gradients:
        q, k, v, out, lse, *_ = saved
        dq, dk, dv = gradients_like(q, k, v)
        _module()._flash_attn_bwd(
            q, k, v, out, grads.dout, lse, dq=dq, dk=dk, dv=dv, dlse=grads.dlse,
            deterministic=torch.are_deterministic_algorithms_enabled(), **_keywords(options, q, k),
        )  # fmt: skip
        return Gradients(dq, dk, dv)


@constant_when_compiled
def _keys_of_tile(
    capability: tuple[int, int] | None, head_dim: int, head_dim_v: int, causal: bool, windowed: bool
) -> int:
    if capability is None or capability[0] != 9:
        return 128
    keys: int = _module()._tile_size_fwd_sm90(head_dim, head_dim_v, causal, windowed).n_block_size
    return keys


def _keywords(options: Options, q: Tensor, k: Tensor) -> dict[str, Any]:
    starts_q, starts_k, max_q, max_k = sequences(options, q, k)
    return {
        "softmax_scale": options.scale,
        "softcap": options.softcap or 0.0,
        "window_size_left": options.window_left,
        "window_size_right": options.window_right,
        "cu_seqlens_q": starts_q,
        "cu_seqlens_k": starts_k,
        "max_seqlen_q": None if starts_q is None else max_q,
        "max_seqlen_k": None if starts_q is None else max_k,
    }
