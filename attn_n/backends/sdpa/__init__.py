"""PyTorch's fused kernels, called by their explicit forward and backward operators; `attn_n.sink` applies n."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from attn_n.backends.base import Backend, Family
from attn_n.backends.sdpa.cpu import CpuFlash
from attn_n.backends.sdpa.cuda import CudnnAttention, EfficientAttention, FlashAttention
from attn_n.call import AttentionCall


class Sdpa(Family):
    name = "sdpa"
    summary = "PyTorch's fused kernels: flash and memory-efficient on CUDA, cuDNN when named, flash on CPU"

    def __init__(self) -> None:
        kernels: tuple[Backend, ...] = (CpuFlash(), FlashAttention(), CudnnAttention(), EfficientAttention())
        self.members = {kernel.name.partition(":")[2]: kernel for kernel in kernels}

    def priority(self, call: AttentionCall) -> Sequence[str]:
        if call.device == "cpu":
            return ("cpu",)
        return ("flash", "efficient") if call.device == "cuda" else ()

    def by_name(self, call: AttentionCall) -> Mapping[str, str]:
        # On an H100 the first call of new lengths takes 49 ms, and the next ones 0.13 ms. Nothing tells whether lengths
        # will come again: the cache of a decoder grows, and prompts and batches differ in length.
        return {"cudnn": "it builds a plan for every new shape (about 50 ms)"} if call.device == "cuda" else {}


BACKEND = Sdpa()
