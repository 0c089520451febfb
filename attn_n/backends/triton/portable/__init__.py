"""The portable kernels: any argument on every GPU that Triton serves, forward and backward."""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor
from torch.torch_version import TorchVersion
from triton.runtime.interpreter import InterpretedFunction

from attn_n.backends.base import Backend, empty_in_order, gradients_like
from attn_n.backends.triton.portable import configs
from attn_n.backends.triton.portable.forward import forward_kernel
from attn_n.backends.triton.portable.prepare import padded_rows, prepared
from attn_n.backends.triton.problem import describe
from attn_n.call import AttentionCall, Options
from attn_n.compilation import constant_when_compiled

_OLDEST = "3.4"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_INTERPRETED = isinstance(forward_kernel, InterpretedFunction)


class PortableKernels(Backend):
    name = "triton:portable"
    summary = "for any argument, on every GPU that Triton serves"
    applies_n = True

    def why_not(self, call: AttentionCall) -> str | None:
        if _too_old():
            return f"needs Triton {_OLDEST} or later, found {triton.__version__}"
        if call.device == "cpu" and not _INTERPRETED:
            return "runs on a GPU; on a CPU only under Triton's interpreter (TRITON_INTERPRET=1)"
        if call.device not in ("cpu", "cuda"):
            return f"runs on CUDA and ROCm, not on {call.device}"
        if call.capability is not None and torch.version.hip is None and call.capability < (8, 0):
            return f"needs compute capability 8.0 or later, found {'.'.join(map(str, call.capability))}"
        if call.dtype not in _DTYPES:
            return f"computes in float16, bfloat16 and float32, not in {str(call.dtype).removeprefix('torch.')}"
        if max(call.head_dim, call.head_dim_v) > 256:
            return f"takes heads of up to 256, got {max(call.head_dim, call.head_dim_v)}"
        rows, keys = (shape[0] if call.varlen else shape[2] for shape in (call.q_shape, call.k_shape))
        if 0 < 2**31 - rows <= 256 or 0 < 2**31 - keys <= 256:  # longer ones are counted in 64 bits
            return f"counts rows tile by tile in 32 bits, up to 2**31 - 256, got {rows} and {keys}"
        if call.mask_needs_grad:
            return "no gradient of attn_mask"
        if call.alibi_needs_grad:
            return "no gradient of alibi_slopes"
        return None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, log_n: float | Tensor | None, options: Options
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        out = empty_in_order(q, (*q.shape[:-1], v.shape[-1]), self.out_order(q))
        lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
        rng_state = None
        if options.dropout_p:
            # Two random numbers of torch's own generator: they follow its seed, also in a captured graph.
            rng_state = torch.randint(1 << 62, (2,), device=q.device)
        sinks, number = (log_n, None) if isinstance(log_n, Tensor) else (None, log_n)
        launch = prepared("forward", describe((q, k, v, out), log_n, options))
        launch(q, k, v, out, lse, sinks, number, *_extras(rng_state, options))
        return out, lse, rng_state

    def backward(
        self,
        dout: Tensor,
        dlse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        rng_state: Tensor | None,
        options: Options,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv, _ = self._backward(dout, dlse, q, k, v, out, lse, rng_state, None, options, dn_wanted=False)
        return dq, dk, dv

    def backward_with_n(
        self,
        dout: Tensor,
        dlse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        rng_state: Tensor | None,
        log_n: Tensor | None,
        options: Options,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dq, dk, dv, shares = self._backward(dout, dlse, q, k, v, out, lse, rng_state, log_n, options, dn_wanted=True)
        assert shares is not None
        return dq, dk, dv, shares.sum((0, 2))

    def _backward(
        self, dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        rng_state: Tensor | None, log_n: Tensor | None, options: Options, dn_wanted: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
        """dq, dk, dv, and if wanted the share of each program in the gradient of n, `(B, Hq, tiles)`."""
        if dout.stride(-1) != 1:  # that of a sum: read many times, it is worth laying out once
            dout = dout.contiguous()
        lse, dlse = lse.contiguous(), None if dlse is None else dlse.contiguous()
        dq, dk, dv = gradients_like(q, k, v)
        problem = describe((q, k, v, out, dout, dq, dk, dv), log_n, options)
        scratch = torch.empty(
            3 if problem.float_mask else 2, problem.heads, padded_rows(problem), dtype=torch.float32, device=q.device
        )
        lse_log2, delta, lost = scratch[0], scratch[1], scratch[2] if problem.float_mask else None
        extras = _extras(rng_state, options)
        launch = prepared("dq", problem)
        shares = None
        if dn_wanted:
            # A program beyond the end of a packed sequence writes nothing.
            new = torch.empty if options.cu_seqlens_q is None else torch.zeros
            shares = new(launch.programs, dtype=torch.float32, device=q.device)
        launch(q, k, v, out, dout, lse, dlse, lse_log2, delta, lost, dq, log_n, shares, *extras)
        for kernel in configs.kernels_of_keys(problem):
            prepared(kernel, problem)(q, k, v, dout, lse_log2, delta, lost, dk, dv, *extras)
        return dq, dk, dv, None if shares is None else shares.view(problem.batch, problem.heads, -1)


@constant_when_compiled
def _too_old() -> bool:
    return _older(triton.__version__)


@functools.cache  # comparing versions takes longer than all other questions
def _older(version: str) -> bool:
    return bool(TorchVersion(version) < _OLDEST)


def _extras(rng_state: Tensor | None, options: Options) -> tuple[Tensor | None, ...]:
    mask = options.mask
    if mask is not None and mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    return mask, options.alibi_slopes, rng_state, options.cu_seqlens_q, options.cu_seqlens_k
