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
from attn_n.backends.triton.backward import dkdv_kernel, dq_kernel
from attn_n.backends.triton.forward import forward_kernel
from attn_n.backends.triton.tile import ROW_PADDING
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
        shape = _Shape(q, k, v, options)
        descriptors = all(map(fits_descriptor, (q, k, v)))
        config = configs.forward(shape.widest, q.element_size(), descriptors)
        _launch(
            forward_kernel, shape.programs_of_queries(config.tile_q), config, shape.constants(descriptors),
            q, k, v, out, lse, sinks, *shape.extras(rng_state),
            *map(shape.strides, (q, k, v, out)), *shape.strides_of_extras(),
            None if sinks is None else sinks.stride(0), None if sinks is not None else log_n, *shape.numbers(),
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
        shape = _Shape(q, k, v, options)
        lse_log2, delta = torch.empty(2, q.shape[1], shape.padded, dtype=torch.float32, device=q.device)
        extras, numbers = shape.extras(rng_state), shape.numbers()
        descriptors = all(map(fits_descriptor, (q, k, v, dout)))
        config = configs.dq(shape.widest, q.element_size(), descriptors)
        _launch(
            dq_kernel, shape.programs_of_queries(config.tile_q), config, shape.constants(descriptors),
            q, k, v, out, dout, lse, dlse, lse_log2, delta, dq, *extras,
            *map(shape.strides, (q, k, v, out, dout, dq)), *shape.strides_of_extras(), shape.padded, *numbers,
        )  # fmt: skip
        for wanted, config in configs.dkdv(shape.widest, q.element_size(), descriptors).items():
            _launch(
                dkdv_kernel, shape.programs_of_keys(config.tile_k), config,
                {**shape.constants(descriptors), "DK": "k" in wanted, "DV": "v" in wanted},
                q, k, v, dout, lse_log2, delta, dk, dv, *extras,
                *map(shape.strides, (q, k, v, dout, dk, dv)), *shape.strides_of_extras(), shape.padded, *numbers,
            )  # fmt: skip
        return dq, dk, dv


class _Shape:
    """The arguments that the kernels have in common."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, options: Options) -> None:
        self._options = options
        self._heads, self._heads_kv = q.shape[1], k.shape[1]
        self._width, self._width_v = q.shape[-1], v.shape[-1]
        self._tile_e, self._tile_v = _tile(self._width), _tile(self._width_v)
        self.widest = max(self._tile_e, self._tile_v)
        self._half = q.element_size() == 2
        if options.cu_seqlens_q is not None:
            self._batch = options.cu_seqlens_q.shape[0] - 1
            self._len_q, self._len_k = options.max_seqlen_q, options.max_seqlen_k
        else:
            self._batch, self._len_q, self._len_k = q.shape[0], q.shape[2], k.shape[2]
        self.padded = q.numel() // (self._heads * self._width) + self._batch * ROW_PADDING.value

    def programs_of_queries(self, tile: int) -> int:
        return triton.cdiv(self._len_q, tile) * self._heads * self._batch

    def programs_of_keys(self, tile: int) -> int:
        return triton.cdiv(self._len_k, tile) * self._heads_kv * self._batch

    def strides(self, x: Tensor) -> tuple[int, ...]:
        """Of batch, head, row and column; packed tensors have no batch."""
        stride = x.stride()
        return (0, stride[1], stride[0], stride[2]) if len(stride) == 3 else stride

    def extras(self, rng_state: Tensor | None) -> tuple[Tensor | None, ...]:
        options = self._options
        mask = options.mask
        if mask is not None and mask.dtype == torch.bool:
            mask = mask.view(torch.uint8)
        return mask, options.alibi_slopes, rng_state, options.cu_seqlens_q, options.cu_seqlens_k

    def strides_of_extras(self) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        mask, slopes = self._options.mask, self._options.alibi_slopes
        of_mask = None if mask is None else tuple(
            0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True)
        )  # fmt: skip
        return of_mask, None if slopes is None else slopes.stride()

    def numbers(self) -> tuple[float | None, ...]:
        options = self._options
        p = options.dropout_p
        return (
            self._heads, self._len_q, self._len_k, options.window_left, options.window_right,
            options.scale, options.softcap, min(int(p * 2**31), 2**31 - 1), 1 / (1 - p),
        )  # fmt: skip

    def constants(self, descriptors: bool) -> dict[str, Any]:
        options = self._options
        return {
            "GROUPS": self._heads // self._heads_kv,
            "WIDTH": self._width,
            "WIDTH_V": self._width_v,
            "TILE_E": self._tile_e,
            "TILE_V": self._tile_v,
            "LINEAR": options.scale > 0 and options.softcap is None and options.alibi_slopes is None
            and options.mask is None,
            "PRECISION": _precision(self._half),
            "DESCRIPTORS": descriptors,
        }  # fmt: skip


def _launch(
    kernel: Any, programs: int, config: configs.Config, constants: dict[str, Any], q: Tensor, *arguments: Any
) -> None:
    if constants["DESCRIPTORS"]:
        # Of this thread, and backward has another than forward.
        triton.set_allocator(_descriptors)
    with torch.cuda.device_of(q):  # Triton launches on the current device
        kernel[programs,](q, *arguments, **constants, **config.keywords())


def _descriptors(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory for the descriptors that a kernel writes for itself."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def fits_descriptor(x: Tensor) -> bool:
    """Whether the copy engine of sm_90 and later can read tiles of x: rows of 16-byte steps."""
    step = 16 // x.element_size()
    return (
        x.is_cuda
        and torch.version.hip is None
        and torch.cuda.get_device_capability(x.device) >= (9, 0)
        and x.stride(-1) == 1
        and x.data_ptr() % 16 == 0
        and all(stride % step == 0 for stride in x.stride()[:-1])
    )


def _tile(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def _precision(half: bool) -> str:
    """Of products: float32 is float32, unless torch's own matrix products may be TF32."""
    return "ieee" if half or torch.get_float32_matmul_precision() == "highest" else "tf32"


BACKEND = TritonBackend()
