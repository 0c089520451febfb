"""Everything a kernel launch depends on except the contents of tensors: the key of the cache of prepared calls."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attn_n.backends.base import aligned
from attn_n.call import Options

Strides = tuple[int, ...]


class KernelKey(NamedTuple):
    """The metadata of a call; two calls with equal keys launch the same kernels with the same numbers."""

    device: torch.device
    dtype: torch.dtype
    batch: int
    heads: int
    heads_kv: int
    len_q: int  # of varlen sequences the longest
    len_k: int
    more_keys: int | None  # S - L; None if it may differ between sequences
    varlen: bool
    rows: int  # queries of all sequences together
    keys: int  # keys of all sequences together
    width: int  # E
    width_v: int  # Ev
    # The strides of batch (0 if varlen), head, row and column of q, k, v, and in a backward of out and dout.
    strides: tuple[Strides, ...]
    strides_mask: Strides | None
    strides_slopes: Strides | None
    stride_n: int | None  # of log n per head; None if n is a number, or log n one a row and dense
    scale: float
    left: int | None
    right: int | None
    softcap: float | None
    dropout_p: float
    mask_dtype: torch.dtype | None
    aligned: bool  # q, k, v, the mask (and out and dout) begin at multiples of 16 bytes
    tf32: bool  # float32 matmuls may run in TF32
    padding: tuple[bool, bool, bool] = (False, False, False)  # seqused_q, seqused_k and leftpad_k are given

    @property
    def padded(self) -> bool:
        return any(self.padding)

    @property
    def linear(self) -> bool:
        """True if the logits are Q K^T times a positive number and nothing else."""
        bent = self.softcap is not None or self.strides_slopes is not None or self.strides_mask is not None
        return self.scale > 0 and not bent

    @property
    def float_mask(self) -> bool:
        """True if a mask is added to the logits."""
        return self.mask_dtype is not None and self.mask_dtype.is_floating_point

    @property
    def causal(self) -> bool:
        """True if only later keys are masked: later queries see more keys, and more queries see the first keys."""
        return self.left is None and self.right is not None

    @property
    def window(self) -> tuple[int | None, int | None]:
        """Left and right as kernels get them, at most the lengths: wider sides show no more keys and could overflow."""
        left, right = self.left, self.right
        return None if left is None else min(left, self.len_k), None if right is None else min(right, self.len_q)

    @property
    def keys_on_average(self) -> int:
        """Roughly the number of keys that a query sees, by which tile sizes are chosen."""
        return self._seen(self.len_k if self.right is None else max(0, self.len_k + min(self.right, 0)))

    @property
    def queries_on_average(self) -> int:
        """Roughly the number of queries that see a key."""
        return self._seen(self.len_q)

    def _seen(self, length: int) -> int:
        if self.left is not None and self.right is not None:
            return max(0, min(length, self.left + self.right + 1))
        return length if self.left is None and self.right is None else length // 2

    @property
    def fits_descriptors(self) -> bool:
        """True if TMA descriptors can address all inputs; they can always address what we allocate ourselves."""
        itemsize = self.dtype.itemsize
        return self.aligned and all([fits_descriptors(strides, itemsize) for strides in self.strides])

    @property
    def mask_fits_descriptors(self) -> bool:
        """True if TMA descriptors can address the mask, and its elements are no longer than those of q."""
        if self.strides_mask is None or self.mask_dtype is None or not self.aligned:
            return False
        batch, head, row, column = self.strides_mask
        itemsize = self.mask_dtype.itemsize
        return itemsize <= self.dtype.itemsize and fits_descriptors((batch, head or row, row, column), itemsize)


def fits_descriptors(strides: Strides, itemsize: int) -> bool:
    """Return True if a TMA descriptor can have these strides: multiples of 16 bytes, no heads or rows expanded."""
    *outer, column = strides  # (batch, head, row), or of varlen tensors (row, head)
    if column != 1 or outer[-1] <= 0 or outer[-2] <= 0:
        return False
    step = 16 // itemsize
    for stride in outer:  # noqa: SIM110  (a generator takes three times as long)
        if stride % step:
            return False
    return True


def all_aligned(tensors: tuple[Tensor, ...], options: Options) -> bool:
    """Return True if the tensors and the mask begin at multiples of 16 bytes."""
    return aligned(*tensors) and (options.mask is None or aligned(options.mask))


def describe(tensors: tuple[Tensor, ...], log_n: float | Tensor | None, options: Options) -> KernelKey:
    """Return the key of a call; `tensors` are q, k, v, and in a backward out and dout."""
    q, k, v, *_ = tensors
    mask, slopes, starts = options.mask, options.alibi_slopes, options.cu_seqlens_q
    if starts is None:
        batch, len_q, len_k = q.shape[0], q.shape[2], k.shape[2]
        rows, keys = batch * len_q, batch * len_k
        more_keys: int | None = None if options.padded else len_k - len_q
        if options.seqused_q is not None and options.seqused_q is options.seqused_k and options.leftpad_k is None:
            more_keys = 0
    else:
        batch, rows, keys = starts.shape[0] - 1, q.shape[0], k.shape[0]
        # max_seqlen may be overstated, even so far that kernels could not count the tiles.
        len_q, len_k = min(options.max_seqlen_q, rows), min(options.max_seqlen_k, keys)
        more_keys = 0 if starts is options.cu_seqlens_k else None
    return KernelKey(
        q.device, q.dtype, batch, q.shape[1], k.shape[1], len_q, len_k, more_keys, starts is not None, rows,
        keys, q.shape[-1], v.shape[-1], tuple([kernel_strides(x.stride()) for x in tensors]),
        None if mask is None else _broadcast_strides(mask), None if slopes is None else slopes.stride(),
        log_n.stride(0) if isinstance(log_n, Tensor) and log_n.dim() == 1 else None,
        options.scale, options.window_left, options.window_right, options.softcap, options.dropout_p,
        None if mask is None else mask.dtype, all_aligned(tensors, options),
        q.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest",
        (options.seqused_q is not None, options.seqused_k is not None, options.leftpad_k is not None),
    )  # fmt: skip


def kernel_strides(strides: Strides) -> Strides:
    """Return the strides of batch, head, row and column for those of `(B, H, L, E)` or varlen `(T, H, E)`."""
    return (0, strides[1], strides[0], strides[2]) if len(strides) == 3 else strides


def _broadcast_strides(x: Tensor) -> Strides:
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))
