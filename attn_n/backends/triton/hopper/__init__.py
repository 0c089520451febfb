"""The kernels for Hopper (sm_90), in Gluon: warps with roles, the copy engine, asynchronous products.

What they do not serve is left to the portable kernels; so is the backward.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from attn_n.backends.base import empty_in_order
from attn_n.backends.triton.portable import PortableKernels
from attn_n.backends.triton.problem import describe
from attn_n.call import AttentionCall, Options

# Gluon changes from release to release: these are those that the tests have run on, on a GPU.
_TESTED = ("3.6",)
WIDTHS = (64, 128, 256)


class HopperKernels(PortableKernels):
    name = "triton:hopper"
    summary = "for the usual calls on sm_90; the backward is the portable one"

    def why_not(self, call: AttentionCall) -> str | None:
        if call.device != "cuda" or torch.version.hip is not None or call.capability != (9, 0):
            return "runs on compute capability 9.0"
        if not tested():
            return f"was tested on Triton {', '.join(_TESTED)}, found {triton.__version__}"
        if call.dtype not in (torch.float16, torch.bfloat16):
            return f"computes in float16 and bfloat16, not in {str(call.dtype).removeprefix('torch.')}"
        if call.head_dim != call.head_dim_v or call.head_dim not in WIDTHS:
            return f"takes heads of {', '.join(map(str, WIDTHS))} with E = Ev, got {call.head_dim}, {call.head_dim_v}"
        if call.varlen:
            return "no packed sequences"
        if call.mask_shape is not None or call.alibi or call.dropout_p:
            return "no attn_mask, alibi_slopes or dropout"
        if not all(map(_fits_descriptors, (call.q_stride, call.k_stride, call.v_stride))):
            return "reads strides that are multiples of 16 bytes, and nothing expanded over heads or rows"
        return super().why_not(call)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, log_n: float | Tensor | None, options: Options
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        # Imported here, where the release of Gluon is one that has been tested.
        from attn_n.backends.triton.hopper.prepare import prepared

        out = empty_in_order(q, q.shape, self.out_order(q))
        problem = describe((q, k, v, out), log_n, options)
        if not problem.fits_descriptors:  # q, k or v begins off a multiple of 16 bytes, which a call does not tell
            return super().forward(q, k, v, log_n, options)
        lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
        sinks, number = (log_n, None) if isinstance(log_n, Tensor) else (None, log_n)
        prepared(problem)(q, k, v, out, lse, sinks, number)
        return out, lse, None


def tested() -> bool:
    """Whether this release of Triton is one that the kernels have run on."""
    return triton.__version__.rpartition(".")[0] in _TESTED


def _fits_descriptors(strides: tuple[int, ...]) -> bool:
    batch, head, row, column = strides
    return column == 1 and head > 0 and row > 0 and not (batch % 8 or head % 8 or row % 8)
