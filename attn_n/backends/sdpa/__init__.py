"""PyTorch's own fused kernels, by their explicit forward and backward operators; n is applied by `attn_n.fold`."""

from __future__ import annotations

from collections.abc import Sequence

from attn_n.backends.base import Backend, Family
from attn_n.backends.sdpa.cpu import CpuFlash
from attn_n.backends.sdpa.cuda import CudnnAttention, EfficientAttention, FlashAttention
from attn_n.call import AttentionCall


class Sdpa(Family):
    name = "sdpa"
    summary = "PyTorch's fused kernels: flash, cuDNN and memory-efficient on CUDA, flash on CPU"

    def __init__(self) -> None:
        kernels: tuple[Backend, ...] = (CpuFlash(), FlashAttention(), CudnnAttention(), EfficientAttention())
        self.members = {kernel.name.partition(":")[2]: kernel for kernel in kernels}

    def order(self, call: AttentionCall) -> Sequence[str]:
        if call.device == "cpu":
            return ("cpu",)
        if call.device != "cuda":
            return ()
        # cuDNN is the fastest of them on Hopper, where it is about twice as fast as PyTorch's FlashAttention-2.
        if call.capability is not None and call.capability >= (9, 0):
            return ("cudnn", "flash", "efficient")
        return ("flash", "efficient", "cudnn")


BACKEND = Sdpa()
