"""The exchange of tokens for heads: from some tokens of all heads to all tokens of some heads, and back.

Tensors are `(B, H, L, E)`. The gradient of one direction is the other direction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from attn_n.backends.base import empty_in_order, memory_order
from attn_n.distributed.groups import Ranks
from attn_n.distributed.layout import chunks_of, length_of

_Direction: TypeAlias = Callable[..., Tensor]


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
    exchanged: Tensor = _Exchange.apply(x, _to_heads, _to_tokens, heads, total, ranks)  # type: ignore[no-untyped-call]
    return exchanged


def to_tokens(x: Tensor, heads: Heads, total: int, ranks: Ranks) -> Tensor:
    """Return all heads of this rank's tokens, of a tensor with all tokens of this rank's heads."""
    exchanged: Tensor = _Exchange.apply(x, _to_tokens, _to_heads, heads, total, ranks)  # type: ignore[no-untyped-call]
    return exchanged


class _Exchange(torch.autograd.Function):
    """One exchange; its gradient goes `back` by the other one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: _Direction, back: _Direction, *layout: Any) -> Tensor:
        ctx.back, ctx.layout = back, layout
        return there(x, *layout)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> Any:
        return ctx.back(dx, *ctx.layout), None, None, *(None for _ in ctx.layout)


def _to_heads(x: Tensor, heads: Heads, total: int, ranks: Ranks) -> Tensor:
    batch, _, length, size = x.shape
    if not heads.in_order:
        x = x[:, _indices(heads, x)]
    # Rank after rank its heads: of a batch of one this is x itself.
    sent = x.reshape(batch, ranks.size, heads.each, length, size).transpose(0, 1).reshape(-1)
    lengths = [length_of(total, ranks.size, rank) for rank in range(ranks.size)]
    a_token = batch * heads.each * size
    received = _exchanged(sent, [length] * ranks.size, lengths, a_token, ranks)
    whole = empty_in_order(x, (batch, heads.each, total, size), memory_order(x))
    for mine, there in _chunks(received, whole, lengths, ranks):
        there.copy_(mine)
    return whole


def _to_tokens(x: Tensor, heads: Heads, total: int, ranks: Ranks) -> Tensor:
    batch, each, _, size = x.shape
    lengths = [length_of(total, ranks.size, rank) for rank in range(ranks.size)]
    length = lengths[ranks.rank]
    sent = x.new_empty(x.numel())
    for mine, there in _chunks(sent, x, lengths, ranks):
        mine.copy_(there)
    received = _exchanged(sent, lengths, [length] * ranks.size, batch * each * size, ranks)
    by_head = received.view(ranks.size, batch, each, length, size).transpose(0, 1)
    by_head = by_head.reshape(batch, ranks.size * each, length, size)
    if heads.in_order:
        return by_head
    # A head that several ranks have gets the sum of what they send.
    dtype = torch.promote_types(x.dtype, torch.float32)
    summed = x.new_zeros((batch, heads.all, length, size), dtype=dtype)
    return summed.index_add_(1, _indices(heads, x), by_head.to(dtype)).to(x.dtype)


def _indices(heads: Heads, x: Tensor) -> Tensor:
    return torch.tensor(heads.indices, device=x.device).flatten()


def _chunks(flat: Tensor, whole: Tensor, lengths: Sequence[int], ranks: Ranks) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each chunk twice: where it lies among the tokens of its rank, and in the whole sequence.

    `flat` has the tokens of one rank after the other, each `(B, H, L_r, E)`.
    """
    batch, heads, total, size = whole.shape
    of_ranks = flat.split([batch * heads * size * length for length in lengths])
    for rank, (of_rank, length) in enumerate(zip(of_ranks, lengths, strict=True)):
        tokens, start = of_rank.view(batch, heads, length, size), 0
        for span in chunks_of(total, ranks.size, rank):
            yield tokens[:, :, start : start + span.length], whole[:, :, span.start : span.stop]
            start += span.length


def _exchanged(sent: Tensor, to: Sequence[int], of: Sequence[int], a_token: int, ranks: Ranks) -> Tensor:
    """Send each rank its part of `sent`, and return theirs; `to` and `of` count tokens of `a_token` elements."""
    received = sent.new_empty(sum(of) * a_token)
    sizes_of, sizes_to = ([a_token * count for count in counts] for counts in (of, to))
    dist.all_to_all_single(received, sent, sizes_of, sizes_to, group=ranks.group)
    return received
