"""Our kernels in Triton: n inside the forward, any argument, forward and backward."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.torch_version import TorchVersion
from triton.runtime.interpreter import InterpretedFunction

from attn_n.backends.base import Backend, empty_in_order, memory_order
from attn_n.backends.triton.backward import dkdv_kernel, dq_kernel
from attn_n.backends.triton.forward import forward_kernel
from attn_n.backends.triton.launch import Problem, launch, strides
from attn_n.call import AttentionCall, Options

_OLDEST = "3.4"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_INTERPRETED = isinstance(forward_kernel, InterpretedFunction)


class TritonBackend(Backend):
    name = "triton"
    summary = "our own kernels, with n inside"
    applies_n = True

    def why_not(self, call: AttentionCall) -> str | None:
        if TorchVersion(triton.__version__) < _OLDEST:
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
        sinks = log_n if isinstance(log_n, Tensor) else None
        problem = Problem(q, k, v, options)
        config = problem.config("forward", q, k, v)
        launch(
            forward_kernel, problem.programs_of_queries(config), config, problem.constants(),
            q, k, v, out, lse, sinks, *problem.extras(rng_state),
            *map(strides, (q, k, v, out)), *problem.strides_of_extras(),
            None if sinks is None else sinks.stride(0), None if sinks is not None else log_n, *problem.numbers(),
        )  # fmt: skip
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
        if dout.stride(-1) != 1:  # that of a sum: read many times, it is worth laying out once
            dout = dout.contiguous()
        lse, dlse = lse.contiguous(), None if dlse is None else dlse.contiguous()
        dq, dk, dv = (empty_in_order(x, x.shape, memory_order(x)) for x in (q, k, v))
        problem = Problem(q, k, v, options)
        lse_log2, delta = torch.empty(2, problem.heads, problem.padded, dtype=torch.float32, device=q.device)
        extras, constants = problem.extras(rng_state), problem.constants()
        numbers = *problem.strides_of_extras(), problem.padded, *problem.numbers()
        config = problem.config("dq", q, k, v, dout)
        launch(
            dq_kernel, problem.programs_of_queries(config), config, constants,
            q, k, v, out, dout, lse, dlse, lse_log2, delta, dq, *extras,
            *map(strides, (q, k, v, out, dout, dq)), *numbers,
        )  # fmt: skip
        for wanted in problem.kernels_of_keys():
            config = problem.config(wanted, q, k, v, dout)
            launch(
                dkdv_kernel, problem.programs_of_keys(config), config,
                {**constants, "DK": "dk" in wanted, "DV": "dv" in wanted},
                q, k, v, dout, lse_log2, delta, dk, dv, *extras,
                *map(strides, (q, k, v, dout, dk, dv)), *numbers,
            )  # fmt: skip
        return dq, dk, dv


BACKEND = TritonBackend()
