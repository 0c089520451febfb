"""The portable kernels, forward and backward: they take every argument, on every GPU that Triton supports."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence

import torch
import triton
from torch import Tensor
from torch.torch_version import TorchVersion
from triton.runtime.interpreter import InterpretedFunction

from attn_n.backends.base import HALF, Backend, Prepared
from attn_n.backends.triton.portable.forward import forward_kernel
from attn_n.backends.triton.portable.prepare import call_for
from attn_n.call import AttentionCall, Gradients, Grads, Options, Saved
from attn_n.compilation import constant_when_compiled

_OLDEST = "3.4"
_INTERPRETED = isinstance(forward_kernel, InterpretedFunction)


class PortableKernels(Backend):
    name = "triton:portable"
    summary = "for any argument, on every GPU that Triton supports"
    honours: Collection[str] = (
        "causal", "window", "negative window", "softcap", "dropout", "mask", "mask gradient", "alibi", "alibi gradient",
        "varlen", "lse gradient", "n a row", "seqused", "leftpad",
    )  # fmt: skip
    devices: Sequence[str] = ("cuda", "cpu")
    dtypes: Sequence[torch.dtype] = (*HALF, torch.float32)
    capability = (8, 0)
    compares_lengths = True
    applies_n = True

    def why_not(self, call: AttentionCall) -> str | None:
        if _too_old():
            return f"needs Triton {_OLDEST} or later, found {triton.__version__}"
        if call.device == "cpu" and not _INTERPRETED:
            return "runs on a GPU; on a CPU only under Triton's interpreter (TRITON_INTERPRET=1)"
        widest = 256 if call.dtype == torch.float32 else 512
        if max(call.head_dim, call.head_dim_v) > widest:
            name = str(call.dtype).removeprefix("torch.")
            return f"takes heads of up to {widest} in {name}, got {max(call.head_dim, call.head_dim_v)}"
        if call.mask_needs_grad and call.leftpad:
            return "has no gradient of attn_mask together with leftpad_k"
        rows, keys = (shape[0] if call.varlen else shape[2] for shape in (call.q_shape, call.k_shape))
        if 0 < 2**31 - rows <= 256 or 0 < 2**31 - keys <= 256:  # longer ones make Triton count in 64 bits
            return f"counts rows tile by tile in 32 bits, up to 2**31 - 256, got {rows} and {keys}"
        return None

    def prepare(self, q: Tensor, k: Tensor, v: Tensor, log_n: float | Tensor | None, options: Options) -> Prepared:
        return call_for(q, k, v, log_n, options)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, log_n: float | Tensor | None, options: Options
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.prepare(q, k, v, log_n, options).forward(q, k, v, log_n, options)

    def backward(self, grads: Grads, saved: Saved, options: Options) -> Gradients:
        return self.prepare(*saved[:3], saved.log_n, options).backward(grads, saved, options)


@constant_when_compiled
def _too_old() -> bool:
    return _older(triton.__version__)


@functools.cache  # comparing versions takes longer than all other checks
def _older(version: str) -> bool:
    return bool(TorchVersion(version) < _OLDEST)
