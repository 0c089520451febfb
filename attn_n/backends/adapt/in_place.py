"""Libraries with FlashAttention's interface that read keys where they lie: in a KV cache, or in a padded batch.

A padded batch without `seqused_q` is a contiguous cache whose rows are the batch. What lies beyond the keys of a
sequence may be NaN, and 0 * NaN is NaN: a library serves what it reads row by row, not what it loads in whole tiles.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attn_n.backends.adapt.flash import FlashBackend
from attn_n.backends.adapt.layout import is_of_width, of_width
from attn_n.backends.base import Prepared, aligned
from attn_n.call import AttentionCall, Options, describe


class Places(NamedTuple):
    """Where the keys of each sequence lie: int32 tensors whose last stride is 1.

    Attributes:
        used: `(B,)`, the end of its keys.
        leftpad: `(B,)`, its first key, at most `used`; None for 0.
        table: `(B, most)`, its blocks in a paged cache; None for a contiguous one.
        rows: `(B,)`, its row of a contiguous cache; None if sequence b lies in row b.
    """

    used: Tensor
    leftpad: Tensor | None
    table: Tensor | None
    rows: Tensor | None

    def as_table(self) -> Tensor:
        """Return the table of blocks; a contiguous cache is a paged one with a block for each sequence."""
        if self.table is not None:
            return self.table
        if self.rows is not None:
            return self.rows[:, None]
        return torch.arange(len(self.used), dtype=torch.int32, device=self.used.device)[:, None]


class InPlaceFlash(FlashBackend):
    """A `FlashBackend` of a library with a function that reads keys where they lie."""

    def kernel_in_place(
        self, q: Tensor, k: Tensor, v: Tensor, places: Places, options: Options
    ) -> tuple[Tensor, Tensor]:
        """Return out `(B, L, Hq, E)` and lse `(B, Hq, L)`, which is -inf for rows without visible keys.

        q is `(B, L, Hq, E)`; k and v are `(rows, S, Hkv, E)`, or paged, `(blocks, block, Hkv, E)`.
        """
        raise NotImplementedError

    def why_not_in_place(self, call: AttentionCall) -> str | None:
        """Return the reason why it does not read the keys of a call where they lie; None if it does."""
        if call.seqused_q:
            return "has no seqused_q where it reads keys in place"
        if call.dropout_p:
            return "has no dropout where it reads keys in place"
        if call.cache_dtype is not None:
            return f"reads a KV cache in the dtype of q, not {str(call.cache_dtype).removeprefix('torch.')}"
        if call.head_dim != call.head_dim_v or call.head_dim % 8:
            sizes = f"{call.head_dim} and {call.head_dim_v}"
            return f"reads a KV cache with one head size for keys and values, a multiple of 8, got {sizes}"
        for name, stride in (("keys", call.k_stride), ("values", call.v_stride)):
            *outer, column = stride
            if column != 1 or any(step * call.dtype.itemsize % 16 for step in outer):
                return f"reads a KV cache with dense rows on 16-byte boundaries, got {name} with strides {stride}"
        return None

    def prepare(self, q: Tensor, k: Tensor, v: Tensor, log_n: float | Tensor | None, options: Options) -> Prepared:
        if self._in_place(q, k, v, options):
            return InPlace(self, q)
        return super().prepare(q, k, v, log_n, options)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, log_n: float | Tensor | None, options: Options
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        if self._in_place(q, k, v, options):
            return InPlace(self, q).forward(q, k, v, log_n, options)
        return super().forward(q, k, v, log_n, options)

    def _in_place(self, q: Tensor, k: Tensor, v: Tensor, options: Options) -> bool:
        if options.cached:
            return True
        if not options.padded:
            return False
        call = describe(q, k, v, options, n_kind="none", return_lse=False, needs_grad=False)
        return self.why_not_in_place(call) is None


class InPlace:
    """A prepared call whose keys are read where they lie."""

    def __init__(self, backend: InPlaceFlash, q: Tensor) -> None:
        self._backend, self.backward = backend, backend.backward
        self._q_as_it_is = is_of_width(q, q.shape[3])

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, log_n: float | Tensor | None, options: Options
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        if not self._q_as_it_is or not aligned(q, k, v):
            q, k, v = (of_width(x, x.shape[3]) for x in (q, k, v))
        out, lse = self._backend.kernel_in_place(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), places_of(q, k, options), options
        )
        return out.transpose(1, 2), lse, None


def places_of(q: Tensor, k: Tensor, options: Options) -> Places:
    table, leftpad, used = options.block_table, options.leftpad_k, options.seqused_k
    if used is None:
        most = k.shape[2] * (1 if table is None else table.shape[1])
        used = torch.full(q.shape[:1], most, dtype=torch.int32, device=q.device)
    elif leftpad is not None:
        used = torch.maximum(used, leftpad)  # kernels count a negative number of keys as a large one
    return Places(used, leftpad, table, options.cache_batch_idx)
