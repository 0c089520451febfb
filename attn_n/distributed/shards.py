"""The tokens of a rank out of the whole sequence, and the whole sequence out of those of all ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from attn_n.call import checks
from attn_n.distributed.groups import Ranks, ranks_of
from attn_n.distributed.layout import chunks_of, length_of


def shard(x: Tensor, dim: int = 2, group: dist.ProcessGroup | DeviceMesh | None = None) -> Tensor:
    """Return the tokens of this rank, of a tensor that has all of them.

    With R ranks a sequence has `2 R` chunks, and rank r holds the chunks r and `2 R - 1 - r`, one behind the other,
    which balances causal attention. Chunks differ by at most one token. Positions are sharded as tokens are:
    `shard(torch.arange(length), 0)` are those of this rank.

    Args:
        x: any tensor; the dimension `dim` has all tokens. Differentiable.
        dim: 2 is that of `(N, H, L, E)`; of packed sequences `(T, H, E)`, ids or labels it is 0 or 1.
        group: the ranks that share the sequence: a process group, a DeviceMesh with one dimension, or None for all.
    """
    ranks, dim = ranks_of(group), checks.dimension("dim", dim, x)
    return _tokens_of(x, dim, ranks)


def unshard(x: Tensor, dim: int = 2, group: dist.ProcessGroup | DeviceMesh | None = None) -> Tensor:
    """Return all tokens, in their order, of a tensor of which each rank has those that `shard` gives it.

    Every rank of the group gets the result. The gradient is that of the sum of the losses of all ranks: a loss that
    each of them computes from the whole counts once a rank. All ranks call it, and its backward.

    Raises:
        ValueError: the lengths of the ranks are not those of `shard`.
    """
    ranks, dim = ranks_of(group), checks.dimension("dim", dim, x)
    lengths = torch.zeros(ranks.size, dtype=torch.int64, device=x.device)
    lengths[ranks.rank] = x.shape[dim]
    dist.all_reduce(lengths, group=ranks.group)
    found = lengths.tolist()
    expected = [length_of(sum(found), ranks.size, rank) for rank in range(ranks.size)]
    if found != expected:
        raise ValueError(f"x: expected {expected} tokens on the ranks, as shard divides {sum(found)}, got {found}")
    whole: Tensor = _Unshard.apply(x, dim, ranks, found)  # type: ignore[no-untyped-call]
    return whole


def _tokens_of(x: Tensor, dim: int, ranks: Ranks) -> Tensor:
    spans = chunks_of(x.shape[dim], ranks.size, ranks.rank)
    return torch.cat([x.narrow(dim, span.start, span.length) for span in spans], dim)


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, ranks: Ranks, lengths: list[int]) -> Tensor:
        ctx.dim, ctx.ranks = dim, ranks
        # Collectives want equal sizes: the shorter ones, by one token, are filled up.
        padded = x.new_zeros([max(lengths) if i == dim else size for i, size in enumerate(x.shape)])
        padded.narrow(dim, 0, x.shape[dim]).copy_(x)
        pieces = [torch.empty_like(padded) for _ in range(ranks.size)]
        dist.all_gather(pieces, padded, group=ranks.group)
        whole = x.new_empty([sum(lengths) if i == dim else size for i, size in enumerate(x.shape)])
        for rank, piece in enumerate(pieces):
            start = 0
            for span in chunks_of(sum(lengths), ranks.size, rank):
                whole.narrow(dim, span.start, span.length).copy_(piece.narrow(dim, start, span.length))
                start += span.length
        return whole

    @staticmethod
    def backward(ctx: Any, dwhole: Tensor) -> Any:
        dwhole = dwhole.contiguous().clone()
        dist.all_reduce(dwhole, group=ctx.ranks.group)
        return _tokens_of(dwhole, ctx.dim, ctx.ranks), None, None, None
