"""The kernels for Hopper (sm_90) in Gluon: warp specialisation, TMA loads, asynchronous wgmma.

The portable kernels run what these do not serve. Under `torch.use_deterministic_algorithms(True)` that is every
backward: the Hopper backward adds up dq, and dk and dv of some KV heads that several query heads share, in no fixed
order.
"""

from __future__ import annotations

import triton
from torch import Tensor

from attn_n.backends.base import HALF, Prepared
from attn_n.backends.triton.hopper import configs
from attn_n.backends.triton.kernel_key import fits_descriptors
from attn_n.backends.triton.portable import PortableKernels
from attn_n.call import AttentionCall, Options

# Gluon changes between releases of Triton. From the first to the last of these the tests have passed on an H100.
FIRST, LAST = (3, 6), (3, 9)


class HopperKernels(PortableKernels):
    name = "triton:hopper"
    summary = "for the usual calls on sm_90; gradients vary in their last bits, but for deterministic algorithms"
    honours = (
        "causal", "window", "negative window", "softcap", "varlen", "lse gradient", "n a row", "seqused", "leftpad",
    )  # fmt: skip
    devices = ("cuda",)
    dtypes = HALF
    rocm = False

    def why_not(self, call: AttentionCall) -> str | None:
        if call.capability != (9, 0):
            return "runs on compute capability 9.0"
        if release() < FIRST:
            return f"needs Triton {_dotted(FIRST)} or later, found {triton.__version__}"
        sizes = call.head_dim, call.head_dim_v
        if configs.widths(*sizes) is None or max(sizes) <= 32 or any(size % 8 for size in sizes):
            return f"takes E and Ev up to 256, multiples of 8, the larger above 32, got {sizes[0]}, {sizes[1]}"
        left, right = call.window_left, call.window_right
        if left is not None and right is not None and left + right < 0:  # consumers wait for at least one tile of keys
            return "takes no window that holds no key (left + right < 0)"
        strides = (call.q_stride, call.k_stride, call.v_stride)
        if not all(fits_descriptors(stride, call.dtype.itemsize) for stride in strides):
            return "reads strides that are multiples of 16 bytes, and nothing expanded over heads or rows"
        return super().why_not(call)

    def prepare(self, q: Tensor, k: Tensor, v: Tensor, log_n: float | Tensor | None, options: Options) -> Prepared:
        # Imported here, once the release of Gluon is known: on older ones the import fails.
        from attn_n.backends.triton.hopper.call import call_for

        return call_for(q, k, v, log_n, options)


def release() -> tuple[int, int]:
    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


def untested() -> str | None:
    """Return what there is to say of a release of Triton that is newer than the last one tested."""
    if release() <= LAST:
        return None
    return f"tested on Triton {_dotted(FIRST)} to {_dotted(LAST)}, found {triton.__version__}"


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
