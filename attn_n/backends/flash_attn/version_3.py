"""FlashAttention 3, the module flash_attn_interface of several packages, most of them built without a backward."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from attn_n.backends.adapt.flash import sequences
from attn_n.backends.adapt.in_place import InPlaceFlash, Places
from attn_n.backends.adapt.library import Library
from attn_n.backends.adapt.signatures import changed_operator
from attn_n.backends.base import gradients_like
from attn_n.call import AttentionCall, Gradients, Grads, Options, Saved
from attn_n.compilation import constant_when_compiled

LIBRARY = Library(
    "FlashAttention 3",
    "flash_attn_interface",
    "from its source, or the forward alone by pip install tokenspeed-fa3",
    ("flash-attn-3", "tokenspeed-fa3"),
)
MOST_SPLITS = 256
SMALLEST_TILE = 64  # of query rows; pages are loaded row by row where one tile holds the queries of a KV head
_OPTIONS = (
    "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, is_causal, window_size_left,"
    " window_size_right, softcap"
)


@constant_when_compiled
def why_not_usable() -> str | None:
    return LIBRARY.why_not() or changed_operator(
        f"flash_attn_3::fwd(q, k, v, *, {_OPTIONS}, num_splits) -> 4",
        f"flash_attn_3::bwd(dout, q, k, v, out, softmax_lse, dq, dk, dv, *, {_OPTIONS}, deterministic)",
    )


@constant_when_compiled
def why_not_cache() -> str | None:
    """Return the reason why its forward cannot be called for KV caches; None if it can."""
    return changed_operator(f"flash_attn_3::fwd(q, k, v, *, {_OPTIONS}, seqused_k, page_table, leftpad_k, num_splits)")


@constant_when_compiled
def left_out(feature: str) -> str | None:
    """Return the reason if the build lacks `feature` by its own list of flags; without such a list it lacks nothing."""
    try:
        flags: dict[str, bool] = importlib.import_module("flash_attn_config").CONFIG["build_flags"]
    except ModuleNotFoundError:
        return None
    except Exception as error:  # a list that cannot be read promises nothing
        said = " ".join(f"{type(error).__name__}: {error}".split())
        return f"the list of what this build of FlashAttention 3 has, flash_attn_config, cannot be read: {said}"
    if not flags.get(f"FLASHATTENTION_DISABLE_{feature}"):
        return None
    return f"this build of FlashAttention 3 ({LIBRARY.version()}) was made without {feature.lower()}"


class FlashAttention3(InPlaceFlash):
    """Its TMA loads whole tiles of keys, and those that lie beyond a sequence reach the result if they are NaN.

    Pages are loaded row by row, unless there are many queries, pages hold whole tiles, and no `leftpad_k` moves them.
    Hence a KV cache is passed as a paged one, with a `leftpad_k` beside many queries.
    """

    name = "flash_attn:3"
    summary = "FlashAttention 3, for Hopper"
    honours = ("causal", "window", "softcap", "varlen", "lse gradient", "seqused", "leftpad", "cache", "block table")

    def why_not(self, call: AttentionCall) -> str | None:
        if call.capability != (9, 0):
            return f"is for compute capability 9.0, got {call.capability}"
        reason = self.too_wide(call) or why_not_usable() or _why_not_built(call)
        return reason or (self.why_not_in_place(call) if call.cached else None)

    def why_not_in_place(self, call: AttentionCall) -> str | None:
        return super().why_not_in_place(call) or why_not_cache() or left_out("PAGEDKV")

    def out_dim_order(self, q: Tensor) -> tuple[int, ...]:
        """Tokens come before heads, whatever the dimension order of q."""
        return (0, 2, 1, 3) if q.dim() == 4 else (0, 1, 2)

    def kernel_forward(self, q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor | None]:
        # 0 lets it choose split-KV, which is faster for a few queries.
        splits = 1 if options.varlen else 0
        out, lse, *_ = torch.ops.flash_attn_3.fwd(q, k, v, num_splits=splits, **_keywords(options, q, k))
        return out, lse, None

    def kernel_in_place(
        self, q: Tensor, k: Tensor, v: Tensor, places: Places, options: Options
    ) -> tuple[Tensor, Tensor]:
        leftpad = places.leftpad
        if leftpad is None and q.shape[1] * q.shape[2] > SMALLEST_TILE * k.shape[2]:
            leftpad = torch.zeros_like(places.used)
        splits = min(options.num_splits, MOST_SPLITS) if left_out("SPLIT") is None else 1
        out, lse, *_ = torch.ops.flash_attn_3.fwd(
            q, k, v, seqused_k=places.used, page_table=places.as_table(), leftpad_k=leftpad, num_splits=splits,
            **_keywords(options, q, k),
        )  # fmt: skip
        return out, lse

    def kernel_backward(self, grads: Grads, saved: Saved, options: Options) -> Gradients:
        q, k, v, out, lse, *_ = saved
        dq, dk, dv = gradients_like(q, k, v)
        deterministic = torch.are_deterministic_algorithms_enabled()
        torch.ops.flash_attn_3.bwd(
            grads.dout, q, k, v, out, lse, dq, dk, dv, deterministic=deterministic, **_keywords(options, q, k)
        )
        return Gradients(dq, dk, dv)


def _why_not_built(call: AttentionCall) -> str | None:
    wanted = {
        "BACKWARD": call.needs_grad,
        "SOFTCAP": call.softcap is not None,
        "LOCAL": call.windowed,
        "VARLEN": call.varlen or call.padded or call.cached,
        "FP16": call.dtype == torch.float16,
        "HDIM256": max(call.head_dim, call.head_dim_v) > 192,
    }
    reasons = (left_out(feature) for feature, asked_for in wanted.items() if asked_for)
    return next((reason for reason in reasons if reason is not None), None)


def _keywords(options: Options, q: Tensor, k: Tensor) -> dict[str, Any]:
    starts_q, starts_k, max_q, max_k = sequences(options, q, k)
    left, right = options.window_left, options.window_right
    varlen: dict[str, Any] = {}
    if starts_q is not None:
        varlen = {
            "cu_seqlens_q": starts_q, "cu_seqlens_k": starts_k, "max_seqlen_q": max_q, "max_seqlen_k": max_k,
        }  # fmt: skip
    return {
        "softmax_scale": options.scale,
        "is_causal": options.causal,
        "window_size_left": -1 if left is None else left,
        "window_size_right": -1 if right is None else right,
        "softcap": options.softcap or 0.0,
        **varlen,
    }
