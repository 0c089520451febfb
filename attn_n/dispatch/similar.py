"""Calls that differ in lengths alone: what was chosen for one of them serves the others.

A decoder's cache grows with each token, and prompts and batches have lengths of their own. To check, to describe and to
choose takes most of the host's time at a new length. The result depends on lengths by comparisons only: with each
other, with the sides of a window, and with the numbers in `order`. A kind holds the outcome of each of them.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

from torch import Tensor

from attn_n.backends import registry
from attn_n.backends.base import Backend, Family
from attn_n.call import AttentionCall, Request
from attn_n.dispatch import order

_LONGEST = 1 << 30  # beyond, kernels count rows in other ways


def kind(q: Tensor, k: Tensor, v: Tensor, request: Request, packing: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The kind of a call by its shapes and strides, or None if the call has to be looked at by itself.

    Two calls of one kind whose other arguments are equal are checked, described and chosen alike.
    """
    if request.attn_mask is not None:
        return None
    of_lengths = _of_varlen(q, k, v, request, packing) if packing else _of_batch(q, k, v, request)
    if of_lengths is None:
        return None
    return of_lengths, q.shape[-1], k.shape[-1], v.shape[-1], _of_strides(q), _of_strides(k), _of_strides(v)


def _of_batch(q: Tensor, k: Tensor, v: Tensor, request: Request) -> tuple[Any, ...] | None:
    if not q.dim() == k.dim() == v.dim() == 4:
        return None
    (batch, heads, len_q, _), (batch_k, heads_kv, len_k, _) = q.shape, k.shape
    if v.shape[:3] != k.shape[:3] or not 0 < len_q < _LONGEST or not 0 < len_k < _LONGEST:
        return None
    left, right = request.window or (None, None)
    if request.causal:
        right = 0
    within = right is None or right >= len_k
    # A side that bounds nothing counts as none, as in the canonical form.
    left = None if left is None or left >= len_k - 1 else left
    right = None if right is None or right >= len_q - 1 else right
    seen = len_k if left is None or right is None else min(len_k, left + right + 1)
    return (
        batch, batch_k, heads, heads_kv, bisect_right(order.LENGTHS, len_q), bisect_right(order.LENGTHS, seen),
        order.is_short(batch * heads * len_q, seen, q.shape[3] + v.shape[3]),
        seen >= order.MANY_KEYS and order.has_many_rows(q.shape, k.shape),
        len_q == len_k, len_q > len_k, len_q > len_k + 1, len_q > 2 * len_k, left is None, right is None, within,
    )  # fmt: skip


def _of_varlen(q: Tensor, k: Tensor, v: Tensor, request: Request, packing: tuple[Any, ...]) -> tuple[Any, ...] | None:
    starts_q, starts_k, longest_q, longest_k = packing
    if not q.dim() == k.dim() == v.dim() == 3 or request.window is not None or v.shape[:2] != k.shape[:2]:
        return None
    (tokens_q, heads, _), (tokens_k, heads_kv, _), sequences = q.shape, k.shape, starts_q.shape[0] - 1
    if not 0 < tokens_q < _LONGEST or not 0 < tokens_k < _LONGEST or sequences < 1 or starts_k.shape != starts_q.shape:
        return None
    if not 0 <= longest_q < _LONGEST or not 0 <= longest_k < _LONGEST:
        return None
    return sequences, heads, heads_kv, bisect_right(order.LENGTHS, tokens_k // sequences)


def _of_strides(x: Tensor) -> tuple[bool, bool, bool]:
    """Return what a backend may ask of strides: unit stride in a row, no expanded dimension, 16-byte aligned rows."""
    *outer, column = x.stride()
    step = 16 // x.element_size()
    return column == 1, 0 not in outer, not any([stride % step for stride in outer])


def covers(call: AttentionCall, chosen: str, named: bool) -> bool:
    """Whether each backend that was asked before one served the call asks of lengths no more than a kind holds."""
    for name in (chosen,) if named else order.automatic(call):
        backend, _ = registry.find(name)
        if backend is not None and not _compares(backend):
            return False
        if chosen == name or chosen.startswith(f"{name}:"):
            return True
    return False


def _compares(backend: Backend) -> bool:
    members = backend.members.values() if isinstance(backend, Family) else (backend,)
    return all(member.compares_lengths for member in members)
