"""The exchange of tokens for heads: from some tokens of all heads to all tokens of some heads, and back.

Tensors are `(B, H, L, E)`. The gradient of one direction is the other direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from attn_n.backends.base import empty_in_order, memory_order
from attn_n.distributed.groups import Ranks
from attn_n.distributed.layout import Span, chunks_of, length_of


class Heads(NamedTuple):
    """The heads that each rank attends with, by rank: some may have the same one.

    Attributes:
        indices: by rank, as many for each.
        all: the number of heads.
        in_order: rank after rank has its share of all, each head once.
    """

    indices: tuple[tuple[int, ...], ...]
    all: int

    @property
    def each(self) -> int:
        return len(self.indices[0])

    @property
    def in_order(self) -> bool:
        return self.each * len(self.indices) == self.all


def to_heads(x: Tensor, heads: Heads, total: int, ranks: Ranks) -> Tensor:
    """Return all tokens of this rank's heads, of a tensor with all heads of this rank's tokens."""
    exchanged: Tensor = _ToHeads.apply(x, heads, total, ranks)  # type: ignore[no-untyped-call]
    return exchanged


def to_tokens(x: Tensor, heads: Heads, total: int, ranks: Ranks) -> Tensor:
    """Return all heads of this rank's tokens, of a tensor with all tokens of this rank's heads."""
    exchanged: Tensor = _ToTokens.apply(x, heads, total, ranks)  # type: ignore[no-untyped-call]
    return exchanged


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, heads: Heads, total: int, ranks: Ranks) -> Tensor:
        ctx.rest = heads, total, ranks
        return _to_heads(x, heads, total, ranks)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> Any:
        return _to_tokens(dx, *ctx.rest), None, None, None


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, heads: Heads, total: int, ranks: Ranks) -> Tensor:
        ctx.rest = heads, total, ranks
        return _to_tokens(x, heads, total, ranks)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> Any:
        return _to_heads(dx, *ctx.rest), None, None, None


def _to_heads(x: Tensor, heads: Heads, total: int, ranks: Ranks) -> Tensor:
    batch, _, length, size = x.shape
    if not heads.in_order:
        x = x[:, torch.tensor(heads.indices, device=x.device).flatten()]
    # For a batch of one this is x itself.
    sent = x.reshape(batch, ranks.size, heads.each, length, size).transpose(0, 1)
    lengths = [length_of(total, ranks.size, rank) for rank in range(ranks.size)]
    pieces = _exchanged(sent.unbind(), [(batch, heads.each, of_rank, size) for of_rank in lengths], ranks)
    whole = empty_in_order(x, (batch, heads.each, total, size), memory_order(x))
    for rank, piece in enumerate(pieces):
        _scatter(whole, piece, chunks_of(total, ranks.size, rank))
    return whole


def _to_tokens(x: Tensor, heads: Heads, total: int, ranks: Ranks) -> Tensor:
    batch, _, _, size = x.shape
    sent = [
        torch.cat([x[:, :, span.start : span.stop] for span in chunks_of(total, ranks.size, rank)], 2)
        for rank in range(ranks.size)
    ]
    length = length_of(total, ranks.size, ranks.rank)
    pieces = _exchanged(sent, [(batch, heads.each, length, size)] * ranks.size, ranks)
    if heads.in_order:
        return torch.cat(pieces, 1)
    # A head that several ranks have gets the sum of what they send.
    dtype = torch.promote_types(x.dtype, torch.float32)
    summed = x.new_zeros((batch, heads.all, length, size), dtype=dtype)
    for indices, piece in zip(heads.indices, pieces, strict=True):
        summed.index_add_(1, torch.tensor(indices, device=x.device), piece.to(dtype))
    return summed.to(x.dtype)


def _scatter(whole: Tensor, piece: Tensor, spans: Sequence[Span]) -> None:
    start = 0
    for span in spans:
        whole[:, :, span.start : span.stop] = piece[:, :, start : start + span.length]
        start += span.length


def _exchanged(sent: Sequence[Tensor], shapes: Sequence[tuple[int, ...]], ranks: Ranks) -> list[Tensor]:
    """Send the r-th tensor to rank r, and return what came from each rank."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    flat_in = torch.cat([x.reshape(-1) for x in sent])
    flat_out = flat_in.new_empty(sum(sizes))
    dist.all_to_all_single(flat_out, flat_in, sizes, [x.numel() for x in sent], group=ranks.group)
    return [x.view(shape) for x, shape in zip(flat_out.split(sizes), shapes, strict=True)]
