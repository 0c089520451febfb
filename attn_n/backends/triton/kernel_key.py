"""What the kernels of a call depend on, but for the contents of its tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attn_n.call import Options

Strides = tuple[int, ...]


class KernelKey(NamedTuple):
    """Two calls with equal ones run the same kernels with the same numbers: hence it is the key of what is prepared."""

    device: torch.device
    dtype: torch.dtype
    batch: int
    heads: int
    heads_kv: int
    len_q: int  # the longest, of varlen sequences
    len_k: int
    more_keys: int | None  # S - L; None if varlen sequences may differ in it
    varlen: bool
    rows: int  # queries of all sequences together
    keys: int
    width: int
    width_v: int
    # Of batch (0 if varlen), head, row and column: of q, k, v, and in a backward of out and dout.
    strides: tuple[Strides, ...]
    strides_mask: Strides | None
    strides_slopes: Strides | None
    stride_n: int | None
    scale: float
    left: int | None
    right: int | None
    softcap: float | None
    dropout_p: float
    mask_dtype: torch.dtype | None
    aligned: bool  # all of them begin at multiples of 16 bytes
    tf32: bool  # whether products of float32 may be rounded

    @property
    def linear(self) -> bool:
        """Whether the logits are the products of q and k times a positive number."""
        bent = self.softcap is not None or self.strides_slopes is not None or self.strides_mask is not None
        return self.scale > 0 and not bent

    @property
    def float_mask(self) -> bool:
        """Whether a mask is added to the logits."""
        return self.mask_dtype is not None and self.mask_dtype.is_floating_point

    @property
    def causal(self) -> bool:
        """Whether the masked keys are later ones alone: later queries see more, and the first keys are seen by most."""
        return self.left is None and self.right is not None

    @property
    def window(self) -> tuple[int | None, int | None]:
        """Left and right as kernels get them: wider ones see nothing more, and their edges would overflow."""
        left, right = self.left, self.right
        return None if left is None else min(left, self.len_k), None if right is None else min(right, self.len_q)

    @property
    def keys_on_average(self) -> int:
        """How many keys a query sees, roughly: what decides which tiles are worth their preparation."""
        return self._seen(self.len_k if self.right is None else max(0, self.len_k + min(self.right, 0)))

    @property
    def queries_on_average(self) -> int:
        """The same for the queries that see a key."""
        return self._seen(self.len_q)

    def _seen(self, length: int) -> int:
        if self.left is not None and self.right is not None:
            return max(0, min(length, self.left + self.right + 1))
        return length if self.left is None and self.right is None else length // 2

    @property
    def fits_descriptors(self) -> bool:
        """Whether tensor descriptors can address all of the tensors; those that are allocated here they can."""
        return self.aligned and all(fits_descriptors(strides, self.dtype.itemsize) for strides in self.strides)


def fits_descriptors(strides: Strides, itemsize: int) -> bool:
    """Whether a tensor descriptor can step so: by multiples of 16 bytes, nothing expanded over heads or rows."""
    *outer, column = strides  # (batch, head, row), or of varlen tensors (row, head)
    if column != 1 or outer[-1] <= 0 or outer[-2] <= 0:
        return False
    step = 16 // itemsize
    for stride in outer:  # noqa: SIM110  (a generator takes three times as long)
        if stride % step:
            return False
    return True


def aligned(*tensors: Tensor) -> bool:
    """Whether all of them begin at multiples of 16 bytes."""
    return not any([x.data_ptr() & 15 for x in tensors])


def describe(tensors: tuple[Tensor, ...], log_n: float | Tensor | None, options: Options) -> KernelKey:
    """`tensors` are q, k, v, and in a backward out and dout."""
    q, k, v, *_ = tensors
    mask, slopes, starts = options.mask, options.alibi_slopes, options.cu_seqlens_q
    if starts is None:
        batch, len_q, len_k = q.shape[0], q.shape[2], k.shape[2]
        rows, keys = batch * len_q, batch * len_k
        more_keys: int | None = len_k - len_q
    else:
        batch, rows, keys = starts.shape[0] - 1, q.shape[0], k.shape[0]
        # The longest sequence may be overstated, up to numbers of which kernels cannot count the tiles.
        len_q, len_k = min(options.max_seqlen_q, rows), min(options.max_seqlen_k, keys)
        assert options.cu_seqlens_k is not None
        more_keys = 0 if starts.data_ptr() == options.cu_seqlens_k.data_ptr() else None
    return KernelKey(
        q.device, q.dtype, batch, q.shape[1], k.shape[1], len_q, len_k, more_keys, starts is not None, rows,
        keys, q.shape[-1], v.shape[-1], tuple([kernel_strides(x.stride()) for x in tensors]),
        None if mask is None else _broadcast_strides(mask), None if slopes is None else slopes.stride(),
        log_n.stride(0) if isinstance(log_n, Tensor) else None,
        options.scale, options.window_left, options.window_right, options.softcap, options.dropout_p,
        None if mask is None else mask.dtype, aligned(*tensors),
        q.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest",
    )  # fmt: skip


def kernel_strides(strides: Strides) -> Strides:
    """Of batch, head, row and column."""
    return (0, strides[1], strides[0], strides[2]) if len(strides) == 3 else strides


def _broadcast_strides(x: Tensor) -> Strides:
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))
