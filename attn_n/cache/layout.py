"""Where the keys of a sequence lie in a cache, contiguous `(B, Hkv, Smax, E)` or paged `(blocks, Hkv, block, E)`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """Attributes:
    batch: how many sequences there are.
    block: keys of a block, or of a sequence in a contiguous cache.
    block_table: `(B, most)`, the blocks of each sequence in their order; None for a contiguous cache.
    batch_idx: `(B,)`, the row of each sequence in a contiguous cache; None if they are its rows in their order.
    """

    batch: int
    block: int
    block_table: Tensor | None = None
    batch_idx: Tensor | None = None

    @property
    def most(self) -> int:
        """The most keys of a sequence."""
        return self.block if self.block_table is None else self.block * self.block_table.shape[1]

    def places(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the first and the third index into the cache of the rows `(B, rows)` of each sequence."""
        if self.block_table is not None:
            block = torch.div(rows, self.block, rounding_mode="floor")
            return self.block_table.gather(1, block).long(), rows - block * self.block
        batch = torch.arange(self.batch, device=rows.device) if self.batch_idx is None else self.batch_idx.long()
        return batch[:, None], rows


def write(cache: Tensor, layout: Layout, first: Tensor, new: Tensor) -> None:
    """Write the rows of new `(B, Hkv, rows, E)` into the cache, in place, from row `first[b]` of each sequence on."""
    rows = first.long()[:, None] + torch.arange(new.shape[2], device=new.device)
    index, row = layout.places(rows)
    bits, of_new = _bits(cache), _bits(new)
    bits[index, :, row] = of_new.transpose(1, 2)


def gather(cache: Tensor, layout: Layout, used: Tensor | None) -> Tensor:
    """Return the cache as a batch `(B, Hkv, Smax, E)`: a copy in the order of the sequences.

    Entries of a block table beyond `used` may be anything, and are not followed.
    """
    if layout.block_table is None:
        return cache if layout.batch_idx is None else _bits(cache)[layout.batch_idx.long()].view(cache.dtype)
    table = layout.block_table.long()
    if used is not None:
        behind = torch.arange(table.shape[1], device=table.device) * layout.block >= used[:, None]
        table = table.masked_fill(behind, 0)
    blocks = _bits(cache)[table].view(cache.dtype)  # (B, most, Hkv, block, E)
    return blocks.transpose(1, 2).flatten(2, 3)


def _bits(x: Tensor) -> Tensor:
    """Return x so that it can be indexed, which PyTorch does not do with every float8."""
    return x.view(torch.uint8) if x.dtype.itemsize == 1 else x
