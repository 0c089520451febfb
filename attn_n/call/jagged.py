"""Conversion of jagged NestedTensors, PyTorch's own form of varlen sequences, to ours and back."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class VarlenArguments(NamedTuple):
    """The first arguments of `flash_attention_n_varlen`."""

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int


def is_jagged(x: object) -> bool:
    return isinstance(x, Tensor) and x.layout is torch.jagged


def to_varlen(q: Any, k: Any, v: Any) -> VarlenArguments:
    """Return views `(T, H, E)` of tensors `(N, H, j, E)`, each a transposed `(N, j, H, E)`."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not is_jagged(x):
            raise TypeError(f"{name}: expected a jagged NestedTensor as the others are, got {type(x).__name__}")
        if x.dim() != 4 or x._ragged_idx != 2:
            raise ValueError(
                f"{name}: expected a jagged NestedTensor (N, heads, length, E) with a ragged length, got shape"
                f" {tuple(x.shape)}: pass one of (N, length, heads, E) with .transpose(1, 2)"
            )
        if x.lengths() is not None:
            raise ValueError(f"{name}: expected sequences that lie one behind the other: pass {name}.contiguous()")
    if k.shape[0] != q.shape[0]:
        raise ValueError(f"k: expected the number of sequences of q, {q.shape[0]}, got {k.shape[0]}")
    if v.offsets() is not k.offsets():
        raise ValueError(
            "v: expected the very offsets of k, got others: make v by"
            " torch.nested.nested_tensor_from_jagged(values, k.offsets()).transpose(1, 2)"
        )
    of_q, of_k, of_v = (x.values().transpose(0, 1) for x in (q, k, v))
    starts_q = q.offsets().to(torch.int32)
    starts_k = starts_q if k.offsets() is q.offsets() else k.offsets().to(torch.int32)
    return VarlenArguments(of_q, of_k, of_v, starts_q, starts_k, q._get_max_seqlen(), k._get_max_seqlen())


def nested(x: Tensor, like: Any) -> Tensor:
    """Return a result `(T, H, ...)` as `(N, H, j, ...)` with the lengths of q, which is `like`."""
    longest = like._get_max_seqlen()  # q has it cached by now
    return torch.nested.nested_tensor_from_jagged(x, like.offsets(), max_seqlen=longest).transpose(1, 2)
