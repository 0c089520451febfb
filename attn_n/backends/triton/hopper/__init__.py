"""The kernels for Hopper (sm_90), in Gluon: warps with roles, the copy engine, asynchronous products.

What they do not serve is left to the portable kernels: among it, under
`torch.use_deterministic_algorithms(True)`, every backward, for that of Hopper adds up dq, and dk and dv of some key
heads that several query heads share, in no fixed order.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from attn_n.backends.adapt.layout import HALF
from attn_n.backends.base import empty_in_order, gradients_like
from attn_n.backends.triton.portable import PortableKernels
from attn_n.backends.triton.problem import describe, fits_descriptors
from attn_n.call import AttentionCall, Options

# Gluon changes from release to release: these are those that the tests have run on, on a GPU.
_TESTED = ("3.6",)
WIDTHS = (64, 128, 256)


class HopperKernels(PortableKernels):
    name = "triton:hopper"
    summary = "for the usual calls on sm_90; gradients vary in their last bits, but for deterministic algorithms"

    def why_not(self, call: AttentionCall) -> str | None:
        if call.device != "cuda" or torch.version.hip is not None or call.capability != (9, 0):
            return "runs on compute capability 9.0"
        if not tested():
            return f"was tested on Triton {', '.join(_TESTED)}, found {triton.__version__}"
        if call.dtype not in HALF:
            return f"computes in float16 and bfloat16, not in {str(call.dtype).removeprefix('torch.')}"
        if call.head_dim != call.head_dim_v or call.head_dim not in WIDTHS:
            return f"takes heads of {', '.join(map(str, WIDTHS))} with E = Ev, got {call.head_dim}, {call.head_dim_v}"
        if call.mask_shape is not None or call.alibi or call.dropout_p:
            return "no attn_mask, alibi_slopes or dropout"
        left, right = call.window_left, call.window_right
        if left is not None and right is not None and left + right < 0:  # its warps wait for at least one tile of keys
            return "no window that holds no key (left + right < 0)"
        strides = (call.q_stride, call.k_stride, call.v_stride)
        if not all(fits_descriptors(stride, call.dtype.itemsize) for stride in strides):
            return "reads strides that are multiples of 16 bytes, and nothing expanded over heads or rows"
        return super().why_not(call)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, log_n: float | Tensor | None, options: Options
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        # Imported here, where the release of Gluon is one that has been tested.
        from attn_n.backends.triton.hopper.prepare import list_of_tiles, prepared

        out = empty_in_order(q, q.shape, self.out_order(q))
        launches = prepared(describe((q, k, v, out), log_n, options))
        if launches is None:  # q, k or v begins off a multiple of 16 bytes, which a call does not tell
            return super().forward(q, k, v, log_n, options)
        lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
        sinks, number = (log_n, None) if isinstance(log_n, Tensor) else (None, log_n)
        starts_q, starts_k = options.cu_seqlens_q, options.cu_seqlens_k
        table = list_of_tiles(launches, q, starts_q, starts_k)
        launches.main(q, k, v, out, lse, sinks, number, starts_q, starts_k, table)
        return out, lse, None

    def _backward(
        self, dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        rng_state: Tensor | None, log_n: Tensor | None, options: Options, dn_wanted: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
        from attn_n.backends.triton.hopper.prepare import list_of_tiles, prepared_backward

        arguments = dlse, q, k, v, out, lse, rng_state, log_n, options, dn_wanted
        if torch.are_deterministic_algorithms_enabled():
            return super()._backward(dout, *arguments)
        if not fits_descriptors(dout.stride(), dout.itemsize) or dout.data_ptr() % 16:  # that of a sum, of a slice
            dout = dout.clone(memory_format=torch.contiguous_format)
        lse, dlse = lse.contiguous(), None if dlse is None else dlse.contiguous()
        dq, dk, dv = gradients_like(q, k, v)
        p = describe((q, k, v, out, dout, dq, dk, dv), log_n, options)
        if not p.fits_descriptors:
            return super()._backward(dout, *arguments)
        launches = prepared_backward(p)
        stats, dq_sum = (
            torch.empty(size, dtype=torch.float32, device=q.device) for size in (launches.stats, launches.dq_sum)
        )
        shares = None
        if dn_wanted:
            shares = torch.empty(launches.prepare.programs, dtype=torch.float32, device=q.device)
        starts_q, starts_k = options.cu_seqlens_q, options.cu_seqlens_k
        table = list_of_tiles(launches, q, starts_k, starts_q)
        launches.prepare(out, dout, lse, dlse, stats, dq_sum, log_n, shares, starts_q)
        into: tuple[Tensor, ...] = dk, dv
        if launches.round_kv:
            into = torch.zeros(2, launches.dkv_sum, dtype=torch.float32, device=q.device).unbind()
        launches.main(q, k, v, dout, stats, dq_sum, *into, starts_q, starts_k, table)
        for launch, x_sum, x in zip(launches.round_kv, into, (dk, dv), strict=False):
            launch(x_sum, x, starts_k)
        launches.round(dq_sum, dq, starts_q)
        return dq, dk, dv, None if shares is None else shares.view(1 if p.packed else p.batch, p.heads, -1)


def tested() -> bool:
    """Whether this release of Triton is one that the kernels have run on."""
    return triton.__version__.rpartition(".")[0] in _TESTED
