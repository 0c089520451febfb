"""From tensors and options to the launch of a kernel."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from attn_n.backends.triton import configs
from attn_n.backends.triton.tile import ROW_PADDING
from attn_n.call import Options


class Problem:
    """What the kernels of one call have in common: shapes, and the arguments made of them."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, options: Options) -> None:
        self._options = options
        self.heads, self._heads_kv = q.shape[1], k.shape[1]
        self._width, self._width_v = q.shape[-1], v.shape[-1]
        self._tile_e, self._tile_v = _tile(self._width), _tile(self._width_v)
        self.widest = max(self._tile_e, self._tile_v)
        if options.cu_seqlens_q is None:
            self._batch, self._len_q, self._len_k = q.shape[0], q.shape[2], k.shape[2]
            rows = self._batch * self._len_q
        else:
            self._batch = options.cu_seqlens_q.shape[0] - 1
            self._len_q, self._len_k = options.max_seqlen_q, options.max_seqlen_k
            rows = q.shape[0]
        self.padded = rows + self._batch * ROW_PADDING.value
        self._capability = torch.cuda.get_device_capability(q.device) if q.is_cuda and not torch.version.hip else None
        self._table = configs.table(self._capability, q.element_size())
        self._precise = q.element_size() == 4 and torch.get_float32_matmul_precision() == "highest"

    def config(self, kernel: str, *tensors: Tensor) -> configs.Config:
        """The tiles of `kernel`, which reads the tiles of `tensors`."""
        left, right = self._options.window_left, self._options.window_right
        length = self._len_q if kernel.startswith("d") and kernel != "dq" else self._len_k
        if left is not None and right is not None:
            length = min(length, left + right + 1)
        elif left is not None or right is not None:
            length //= 2  # on the average
        descriptors = (
            self._capability is not None and self._capability >= (9, 0) and all(map(_fits_descriptor, tensors))
        )
        return configs.find(self._table, kernel, self.widest, length, descriptors)

    def kernels_of_keys(self) -> tuple[str, ...]:
        """One kernel gives dK and dV, unless the registers hold but one of them."""
        return ("dk and dv",) if self.widest <= 128 else ("dk", "dv")

    def programs_of_queries(self, config: configs.Config) -> int:
        return triton.cdiv(self._len_q, config.tile_q) * self.heads * self._batch

    def programs_of_keys(self, config: configs.Config) -> int:
        return triton.cdiv(self._len_k, config.tile_k) * self._heads_kv * self._batch

    def extras(self, rng_state: Tensor | None) -> tuple[Tensor | None, ...]:
        options, mask = self._options, self._options.mask
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
        options, p = self._options, self._options.dropout_p
        return (
            self.heads, self._len_q, self._len_k, options.window_left, options.window_right, options.scale,
            options.softcap, min(int(p * 2**31), 2**31 - 1), 1 / (1 - p),
        )  # fmt: skip

    def constants(self) -> dict[str, Any]:
        options = self._options
        bent = options.softcap is not None or options.alibi_slopes is not None or options.mask is not None
        return {
            "GROUPS": self.heads // self._heads_kv, "WIDTH": self._width, "WIDTH_V": self._width_v,
            "TILE_E": self._tile_e, "TILE_V": self._tile_v, "LINEAR": options.scale > 0 and not bent,
            "PRECISION": "ieee" if self._precise else "tf32",
        }  # fmt: skip


def strides(x: Tensor) -> tuple[int, ...]:
    """Of batch, head, row and column; packed tensors have no batch."""
    stride = x.stride()
    return (0, stride[1], stride[0], stride[2]) if len(stride) == 3 else stride


def launch(
    kernel: Any, programs: int, config: configs.Config, constants: dict[str, Any], q: Tensor, *arguments: Any
) -> None:
    if config.descriptors:
        # Of this thread, and backward has another than forward.
        triton.set_allocator(_workspace)
    with torch.cuda.device_of(q):  # Triton launches on the current device
        kernel[programs,](q, *arguments, **constants, **config.keywords())


def _workspace(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory for the descriptors that a kernel writes for itself."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _fits_descriptor(x: Tensor) -> bool:
    """Whether tensor descriptors can address x: everything at multiples of 16 bytes."""
    step = 16 // x.element_size()
    return (
        x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(stride % step == 0 for stride in x.stride()[:-1])
    )  # fmt: skip


def _tile(width: int) -> int:
    return max(16, triton.next_power_of_2(width))
