"""The arguments that both ways to attend over several ranks share: what they refuse, and what they check."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attn_n.call import Request, canonical, checks
from attn_n.call.errors import UnsupportedError
from attn_n.distributed.groups import Ranks
from attn_n.distributed.layout import length_of

_REFUSED = {
    "attn_mask": "a rank has but some of its rows and columns. Use causal=, window= or packed sequences",
    "dropout_p": "the weights that are dropped would depend on the number of ranks. Pass 0",
    "alibi_slopes": "the distances within a part are not those of the whole. Use attn_n.flash_attention_n on one rank",
    "seqused_q": "padding would leave ranks without work. Pack the sequences, for the function with _varlen",
    "seqused_k": "padding would leave ranks without work. Pack the sequences, for the function with _varlen",
    "leftpad_k": "padding would leave ranks without work. Pack the sequences, for the function with _varlen",
}


def no_others(function: str, unknown: Mapping[str, Any]) -> None:
    """Refuse what does not work over several ranks, and keywords that do not exist."""
    for name, value in unknown.items():
        if name not in _REFUSED:
            known = [field for field in Request._fields if field not in _REFUSED]
            checks.no_others(function, (name,), (*known, "group", "total_length"))
        if value is not None and not (name == "dropout_p" and value == 0):
            raise UnsupportedError(f"{name}: {function} does not take it: {_REFUSED[name]}")


def plain(**tensors: object) -> None:
    """Refuse DTensors and the like, of which a rank knows more than its tokens."""
    for name, x in tensors.items():
        if isinstance(x, Tensor) and type(x) not in checks.PLAIN and type(x).__torch_dispatch__ is not _OF_TENSOR:
            raise TypeError(
                f"{name}: expected a plain torch.Tensor with the tokens of this rank, got {type(x).__name__}: pass"
                " to_local() of a DTensor that is sharded so"
            )


_OF_TENSOR = Tensor.__torch_dispatch__


def total_of(q: Tensor, dim: int, total_length: int | None, ranks: Ranks) -> int:
    """Return the length of the whole sequence, of which q has the tokens of this rank."""
    local = q.shape[dim]
    if total_length is None:
        return local * ranks.size
    total = checks.length("total_length", total_length)
    held(local, total, ranks)
    return total


def held(local: int, total: int, ranks: Ranks) -> None:
    """Check how many tokens this rank has."""
    expected = length_of(total, ranks.size, ranks.rank)
    if local != expected:
        raise ValueError(
            f"q: expected {expected} tokens on rank {ranks.rank} of {ranks.size}, as shard divides {total}, got {local}"
        )


def same_tokens(q: object, k: object, v: object, dim: int) -> None:
    """Refuse keys of other tokens than the queries; other faults are found elsewhere."""
    for name, x in (("k", k), ("v", v)):
        if not (isinstance(q, Tensor) and isinstance(x, Tensor) and x.dim() == q.dim() and x.dim() + dim >= 0):
            continue
        if x.shape[dim] != q.shape[dim]:
            raise ValueError(f"{name}: expected the {q.shape[dim]} tokens of q, got {x.shape[dim]}")


def boundaries(cu_seqlens: object, q: Tensor, ranks: Ranks) -> tuple[int, ...]:
    """Read cu_seqlens of the whole to the host, and check them; they may be on the CPU or on the device of q."""
    cu = checks.tensor("cu_seqlens", cu_seqlens)
    if cu.dtype != torch.int32:
        raise TypeError(f"cu_seqlens: expected int32, got {str(cu.dtype).removeprefix('torch.')}")
    if cu.dim() != 1 or cu.shape[0] == 0:
        raise ValueError(f"cu_seqlens: expected shape (sequences + 1,), got {tuple(cu.shape)}")
    total = int(cu[-1])
    starts = checks.boundaries("cu_seqlens", cu, total, total)
    held(q.shape[0], total, ranks)
    return tuple(starts)


def varlen(q: Tensor, k: Tensor, v: Tensor, request: Request) -> canonical.Canonical:
    """Return the canonical form of the tokens of this rank, as if they were one sequence."""
    tokens = q.shape[0] if isinstance(q, Tensor) and q.dim() else 0
    local = torch.tensor([0, tokens], dtype=torch.int32, device=q.device if isinstance(q, Tensor) else None)
    return canonical.varlen(q, k, v, local, local, tokens, tokens, request)


def as_batch(call: canonical.Canonical) -> tuple[Tensor, Tensor, Tensor, float | Tensor | None]:
    """Return q, k, v and n of packed tokens `(T, H, ...)` as `(1, H, T, ...)`."""
    q, k, v = (x.transpose(0, 1)[None] for x in (call.q, call.k, call.v))
    n = call.n.T[None] if isinstance(call.n, Tensor) and call.n.dim() > 1 else call.n
    return q, k, v, n
