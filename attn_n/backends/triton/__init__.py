"""Our kernels in Triton, with n inside: those for Hopper, portable ones, and those for decoding."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence

from attn_n.backends.base import Family
from attn_n.backends.triton import hopper
from attn_n.backends.triton.decode import MOST_QUERIES, DecodeKernels
from attn_n.backends.triton.hopper import HopperKernels
from attn_n.backends.triton.portable import PortableKernels
from attn_n.call import AttentionCall
from attn_n.compilation import constant_when_compiled


class Triton(Family):
    name = "triton"
    summary = "our own kernels, with n inside"
    applies_n = True

    def __init__(self) -> None:
        self.members = {"hopper": HopperKernels(), "portable": PortableKernels(), "decode": DecodeKernels()}

    def priority(self, call: AttentionCall) -> Sequence[str]:
        if call.cached:
            return ("decode",)
        if call.device != "cuda":
            return ("portable",)
        if call.padded and not call.needs_grad and call.q_shape[2] <= MOST_QUERIES:
            return ("decode", "portable")
        if self.by_name(call):
            _say_what_is_lost()
            return ("portable",)
        return ("hopper", "portable")

    def by_name(self, call: AttentionCall) -> Mapping[str, str]:
        # What a new release makes of the kernels may be wrong, and only a GPU can tell.
        untested = hopper.untested() if call.capability == (9, 0) else None
        return {} if untested is None else {"hopper": untested}


@constant_when_compiled
@functools.cache
def _say_what_is_lost() -> None:
    said = (
        f"attn_n: triton:hopper was {hopper.untested()}, so that triton:portable runs, at 0.64 to 0.83 of its speed. "
        "To try it: `python -m attn_n` checks it against float64, and backend='triton:hopper' or "
        "ATTN_N_BACKEND=triton:hopper takes it."
    )
    warnings.warn(said, RuntimeWarning, stacklevel=2)


BACKEND = Triton()
