"""xFormers, called by the explicit forward and backward of memory_efficient_attention; `attn_n.sink` applies n.

xFormers 0.0.35 is the last with that function; it lives on in MSLK, in the same words. Whichever is installed is used.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attn_n.backends.adapt import flash2
from attn_n.backends.adapt.efficient import MemoryEfficientBackend
from attn_n.backends.adapt.flash import FlashBackend, sequences
from attn_n.backends.adapt.layout import aligned_bias, repeat_kv, rounds_bias
from attn_n.backends.adapt.library import IMPORTING, Library
from attn_n.backends.adapt.signatures import changed_function
from attn_n.backends.base import Backend, Family
from attn_n.call import AttentionCall, Gradients, Grads, Options, Saved
from attn_n.compilation import constant_when_compiled


def load(module: str) -> Any:
    """Import a module of xFormers or MSLK, with `flash_attn` hidden where only FlashAttention 4 is installed.

    They take any `flash_attn` for FlashAttention 2, and fail on the namespace package of FlashAttention 4. Without
    `flash_attn` they run PyTorch's kernels.
    """
    only_4 = module not in sys.modules and _has("flash_attn") and not _has("flash_attn.flash_attn_interface")
    if not only_4:
        return importlib.import_module(module)
    with IMPORTING:
        hidden = sys.modules.pop("flash_attn", None)
        sys.modules["flash_attn"] = None  # type: ignore[assignment]  # with None a module counts as absent
        try:
            return importlib.import_module(module)
        finally:
            del sys.modules["flash_attn"]
            if hidden is not None:
                sys.modules["flash_attn"] = hidden


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


LIBRARY = Library("xformers", "xformers.ops.fmha", "pip install xformers", ("xformers",), oldest="0.0.32", load=load)
SUCCESSOR = Library("MSLK", "mslk.attention.fmha", "pip install mslk-cuda", ("mslk-cuda",), oldest="1.1.0", load=load)


@functools.cache
def library() -> Library:
    """Return MSLK if it can be used and xFormers cannot, else xFormers."""
    return SUCCESSOR if LIBRARY.why_not() is not None and SUCCESSOR.why_not() is None else LIBRARY


@constant_when_compiled
def why_not_usable(kernel: str) -> str | None:
    """Return the reason why the operators of `kernel`, "flash" or "cutlass", cannot be used; None if they can."""
    found = library()
    reason = found.why_not()
    if reason is not None:
        return reason
    if found is LIBRARY and not importlib.import_module("xformers._cpp_lib")._built_with_cuda:
        return (
            f"the operators of xformers {LIBRARY.version()} cannot be loaded: it was built for another PyTorch, or its"
            " CUDA libraries are missing (pip install nvidia-cuda-runtime-cu12 for a wheel that was built with CUDA 12)"
        )
    fmha = _fmha()
    operators = getattr(fmha, kernel)
    if not (operators.FwOp.is_available() and operators.BwOp.is_available()):
        return f"{found.name} {found.version()} has no {kernel} kernels here"
    arguments = "query", "key", "value", "attn_bias", "scale", "op"
    return changed_function(fmha, "memory_efficient_attention_forward_requires_grad", *arguments) or changed_function(
        fmha, "memory_efficient_attention_backward", "grad", "output", "lse", *arguments
    )


def _fmha() -> Any:
    return importlib.import_module(library().module)


def _why_not_capability(call: AttentionCall) -> str | None:
    if call.capability is None or not (8, 0) <= call.capability <= (9, 0):
        return f"is used here for compute capability 8.0 to 9.0, got {call.capability}"
    return None


class Flash(FlashBackend):
    name = "xformers:flash"
    summary = "FlashAttention 2 as xFormers calls it"
    honours = ("causal", "window", "varlen", "lse gradient", "seqused", "leftpad")

    def why_not(self, call: AttentionCall) -> str | None:
        reason = _why_not_capability(call) or self.too_wide(call)
        if reason is not None:
            return reason
        if (call.varlen or call.padded) and call.windowed and call.window_right != 0:
            return "has varlen masks for full attention, causal attention and causal windows alone"
        if call.needs_grad and torch.are_deterministic_algorithms_enabled():
            return "is not deterministic"
        return flash2.why_not_window(call) or why_not_usable("flash")

    def kernel_forward(self, q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor | None]:
        fmha, lengths = _fmha(), sequences(options, q, k)
        out, lse = fmha.memory_efficient_attention_forward_requires_grad(
            *_tensors(options, q, k, v), attn_bias=_mask(options, q, k), scale=options.scale,
            op=fmha.flash.FwOp,
        )  # fmt: skip
        lse = flash2.rows_without_keys(lse, options, lengths)
        return (out, lse, None) if lengths.starts_q is None else (out[0], lse[0], None)

    def kernel_backward(self, grads: Grads, saved: Saved, options: Options) -> Gradients:
        fmha, (q, k, v, out, lse, *_) = _fmha(), saved
        dq, dk, dv = fmha.memory_efficient_attention_backward(
            *_as_batch(options, grads.dout, out, lse), *_tensors(options, q, k, v),
            attn_bias=_mask(options, q, k), scale=options.scale, op=fmha.flash.BwOp,
        )  # fmt: skip
        return Gradients(dq[0], dk[0], dv[0]) if options.varlen else Gradients(dq, dk, dv)


class Cutlass(MemoryEfficientBackend):
    name = "xformers:cutlass"
    summary = "xFormers' memory-efficient kernel"

    def why_not(self, call: AttentionCall) -> str | None:
        return _why_not_capability(call) or rounds_bias(call) or why_not_usable("cutlass")

    def kernel_forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, bias: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        fmha = _fmha()
        out, lse = fmha.memory_efficient_attention_forward_requires_grad(
            *self.tensors(q, k, v), attn_bias=self._mask(q, k, causal, bias), scale=scale, op=fmha.cutlass.FwOp
        )
        return out.transpose(1, 2), lse[:, :, : q.shape[2]]

    def kernel_backward(self, dout: Tensor, saved: Saved, causal: bool, bias: Tensor | None, scale: float) -> Gradients:
        fmha, (q, k, v, out, lse, *_) = _fmha(), saved
        dq, dk, dv = fmha.memory_efficient_attention_backward(
            *self.results(dout, out, lse), *self.tensors(q, k, v), attn_bias=self._mask(q, k, causal, bias),
            scale=scale, op=fmha.cutlass.BwOp,
        )  # fmt: skip
        return Gradients(dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2))

    def _mask(self, q: Tensor, k: Tensor, causal: bool, bias: Tensor | None) -> Any:
        return _fmha().attn_bias.LowerTriangularMask() if causal else aligned_bias(q, k, bias)


class Xformers(Family):
    name = "xformers"
    summary = "xFormers' memory_efficient_attention: FlashAttention 2, or its own kernel"

    def __init__(self) -> None:
        kernels: tuple[Backend, ...] = (Flash(), Cutlass())
        self.members = {kernel.name.partition(":")[2]: kernel for kernel in kernels}

    def priority(self, call: AttentionCall) -> Sequence[str]:
        return tuple(self.members) if call.device == "cuda" else ()


def _tensors(options: Options, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """Return q, k, v as xFormers takes them, with a KV head for each query head; their tokens come before heads."""
    return _as_batch(options, q, *repeat_kv(q, k, v, q.dim() - 2))


def _as_batch(options: Options, *tensors: Tensor) -> list[Tensor]:
    return [x[None] for x in tensors] if options.varlen else list(tensors)


def _mask(options: Options, q: Tensor, k: Tensor) -> Any:
    """Return the mask of a call, aligned bottom-right: xFormers' plain causal masks are aligned top-left."""
    masks, lengths = _fmha().attn_bias, sequences(options, q, k)
    left, right = options.window_left, options.window_right
    if lengths.starts_q is not None:
        # seqstart_py is for helpers of xFormers on the host; filling it would synchronize with the GPU.
        blocks = [
            masks._SeqLenInfo(seqstart=starts, max_seqlen=longest, min_seqlen=0, seqstart_py=[])
            for starts, longest in ((lengths.starts_q, lengths.max_q), (lengths.starts_k, lengths.max_k))
        ]
        if right is None:
            return masks.BlockDiagonalMask(*blocks)
        if left is None:
            return masks.BlockDiagonalCausalFromBottomRightMask(*blocks)
        return masks.BlockDiagonalCausalLocalAttentionFromBottomRightMask(*blocks, _window_size=left + 1)
    if left is None and right is None:
        return None
    if options.causal:
        return masks.LowerTriangularFromBottomRightMask()
    # A side of S or more bounds nothing.
    return masks.LocalAttentionFromBottomRightMask(
        lengths.max_k if left is None else left, lengths.max_k if right is None else right
    )


BACKEND = Xformers()
