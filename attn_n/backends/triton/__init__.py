"""Our kernels in Triton, with n inside: those for Hopper, and portable ones."""

from __future__ import annotations

from collections.abc import Sequence

from attn_n.backends.base import Family
from attn_n.backends.triton.hopper import HopperKernels
from attn_n.backends.triton.portable import PortableKernels
from attn_n.call import AttentionCall


class Triton(Family):
    name = "triton"
    summary = "our own kernels, with n inside"
    applies_n = True

    def __init__(self) -> None:
        self.members = {"hopper": HopperKernels(), "portable": PortableKernels()}

    def priority(self, call: AttentionCall) -> Sequence[str]:
        return ("hopper", "portable") if call.device == "cuda" else ("portable",)


BACKEND = Triton()
