"""Our kernels in Triton: n inside the forward, any argument, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from torch.torch_version import TorchVersion
from triton.runtime.interpreter import InterpretedFunction

from attn_n.backends.base import Backend, empty_in_order, memory_order
from attn_n.backends.triton import configs
from attn_n.backends.triton.backward import delta_kernel, dkdv_kernel, dq_kernel
from attn_n.backends.triton.forward import forward_kernel
from attn_n.call import AttentionCall, Options

_OLDEST = "3.4"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_INTERPRETED = isinstance(forward_kernel, InterpretedFunction)
_TILE_OF_DELTA = 64


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
        shape = _Shape(q, k, v, options)
        tile_q, tile_k, num_warps, num_stages = configs.forward(shape.widest, q.element_size())
        per_head = isinstance(log_n, Tensor)
        forward_kernel[(triton.cdiv(shape.longest_q, tile_q), shape.heads, shape.batch)](
            q, k, v, out, lse, log_n if per_head else None,
            *shape.extras(rng_state),
            *shape.strides(q), *shape.strides(k), *shape.strides(v), *shape.strides(out), *shape.strides(lse),
            *shape.strides_of_extras(), log_n.stride(0) if isinstance(log_n, Tensor) else 0,
            *shape.numbers(), 0.0 if per_head or log_n is None else log_n, *shape.dropout(),
            **shape.flags(), N="none" if log_n is None else "per head" if per_head else "number",
            TILE_Q=tile_q, TILE_K=tile_k, num_warps=num_warps, num_stages=num_stages,
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
        dq, dk, dv = (empty_in_order(x, x.shape, memory_order(x)) for x in (q, k, v))
        shape, delta = _Shape(q, k, v, options), torch.empty_like(lse)
        self._delta(shape, out, dout, dlse, delta)
        common = shape.extras(rng_state)
        lse_strides = shape.strides(lse)
        inputs = *shape.strides(q), *shape.strides(k), *shape.strides(v), *shape.strides(dout), *lse_strides
        numbers, flags = (*shape.numbers(), *shape.dropout()), shape.flags()
        tile_q, tile_k, num_warps, num_stages = configs.dkdv(shape.widest, q.element_size())
        dkdv_kernel[(triton.cdiv(shape.longest_k, tile_k), shape.heads_kv, shape.batch)](
            q, k, v, dout, lse, delta, dk, dv, *common,
            *inputs, *shape.strides(dk), *shape.strides(dv), *shape.strides_of_extras(), *numbers,
            **flags, TILE_Q=tile_q, TILE_K=tile_k, num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
        tile_q, tile_k, num_warps, num_stages = configs.dq(shape.widest, q.element_size())
        dq_kernel[(triton.cdiv(shape.longest_q, tile_q), shape.heads, shape.batch)](
            q, k, v, dout, lse, delta, dq, *common,
            *inputs, *shape.strides(dq), *shape.strides_of_extras(), *numbers,
            **flags, TILE_Q=tile_q, TILE_K=tile_k, num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
        return dq, dk, dv

    def _delta(self, shape: _Shape, out: Tensor, dout: Tensor, dlse: Tensor | None, delta: Tensor) -> None:
        rows = out.shape[0] if shape.packed else out.shape[2]
        batch = 1 if shape.packed else shape.batch
        delta_kernel[(triton.cdiv(rows, _TILE_OF_DELTA), shape.heads, batch)](
            out, dout, dlse, delta,
            *shape.strides(out), *shape.strides(dout), *shape.strides(delta),
            *((0, 0, 0) if dlse is None else shape.strides(dlse)), rows,
            HAS_DLSE=dlse is not None, WIDTH_V=out.shape[-1], TILE_Q=_TILE_OF_DELTA, TILE_V=shape.tile_v,
        )  # fmt: skip


class _Shape:
    """The arguments that the kernels have in common."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, options: Options) -> None:
        self._options = options
        self.packed = options.cu_seqlens_q is not None
        self.heads, self.heads_kv = q.shape[1], k.shape[1]
        self._width, self._width_v = q.shape[-1], v.shape[-1]
        self._tile_e, self.tile_v = _tile(self._width), _tile(self._width_v)
        self.widest = max(self._tile_e, self.tile_v)
        self._half = q.element_size() == 2
        if options.cu_seqlens_q is not None:
            self.batch = options.cu_seqlens_q.shape[0] - 1
            self.longest_q, self.longest_k = options.max_seqlen_q, options.max_seqlen_k
        else:
            self.batch, self.longest_q, self.longest_k = q.shape[0], q.shape[2], k.shape[2]

    def strides(self, x: Tensor) -> tuple[int, ...]:
        """Of batch, head, row and column; packed tensors have no batch."""
        stride = x.stride()
        return (0, stride[1], stride[0], *stride[2:]) if self.packed else stride

    def extras(self, rng_state: Tensor | None) -> tuple[Tensor | None, ...]:
        options = self._options
        mask = options.mask.view(torch.uint8) if options.mask is not None and not self._float_mask else options.mask
        return mask, options.alibi_slopes, rng_state, options.cu_seqlens_q, options.cu_seqlens_k

    @property
    def _float_mask(self) -> bool:
        return self._options.mask is not None and self._options.mask.dtype != torch.bool

    def strides_of_extras(self) -> tuple[int, ...]:
        mask, slopes = self._options.mask, self._options.alibi_slopes
        of_mask = (0, 0, 0, 0) if mask is None else tuple(
            0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True)
        )  # fmt: skip
        return *of_mask, *((0, 0) if slopes is None else slopes.stride())

    def numbers(self) -> tuple[float, ...]:
        options = self._options
        return (
            self.longest_q, self.longest_k, options.window_left or 0, options.window_right or 0, options.scale,
            options.softcap or 0.0,
        )  # fmt: skip

    def dropout(self) -> tuple[int, float]:
        p = self._options.dropout_p
        return min(int(p * 2**32), 2**32 - 1), 1 / (1 - p)

    def flags(self) -> dict[str, Any]:
        options = self._options
        return {
            "GROUPS": self.heads // self.heads_kv,
            "WIDTH": self._width,
            "WIDTH_V": self._width_v,
            "HAS_LEFT": options.window_left is not None,
            "HAS_RIGHT": options.window_right is not None,
            "SOFTCAP": options.softcap is not None,
            "MASK": "none" if options.mask is None else "float" if self._float_mask else "bool",
            "ALIBI": options.alibi_slopes is not None,
            "DROPOUT": options.dropout_p > 0,
            "PACKED": self.packed,
            "PRECISION": _precision(self._half),
            "TILE_E": self._tile_e,
            "TILE_V": self.tile_v,
        }


def _tile(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def _precision(half: bool) -> str:
    """Of products: float32 is float32, unless torch's own matrix products may be TF32."""
    return "ieee" if half or torch.get_float32_matmul_precision() == "highest" else "tf32"


BACKEND = TritonBackend()
