"""The cache of prepared calls, keyed by everything that checking, choosing and preparing depend on.

That is metadata: no key holds a tensor or an address. What depends on the contents of a tensor is looked at in each
call, which is the case for a tensor of n and for `cu_seqlens` on a CPU.
"""

from __future__ import annotations

from types import NoneType
from typing import Any

import torch
from torch import Tensor

from attn_n.autograd.prepared import PreparedCall
from attn_n.backends import registry
from attn_n.call import Request, transforms
from attn_n.call.checks import PLAIN
from attn_n.dispatch import forced, similar
from attn_n.recent import Recent

Key = tuple[Any, ...]

# The types of arguments that a key may hold: numbers and names, and tensors by their metadata.
_NUMBERS = frozenset((NoneType, bool, int, float, str, tuple))
_KEPT = _NUMBERS.union(PLAIN)
_SIDES = frozenset((NoneType, int))
_PACKING = frozenset((int, *PLAIN))

_calls: Recent[Key, PreparedCall] = Recent()
_kinds: Recent[tuple[Any, ...], PreparedCall] = Recent()


def key(q: Tensor, k: Tensor, v: Tensor, request: Request, packing: tuple[Any, ...] = ()) -> Key | None:
    """None if the call is not kept: somebody watches it, an argument is of a type of its own, or it has ALiBi.

    `packing` are `cu_seqlens_q` and `cu_seqlens_k`, and the longest of their sequences.
    """
    if (
        transforms.needs_dispatcher(q)
        or type(k) not in PLAIN
        or type(v) not in PLAIN
        or q.is_neg()
        or k.is_neg()
        or v.is_neg()
    ):
        return None
    if not (q.is_cpu or q.is_cuda) or torch.is_autocast_enabled("cpu" if q.is_cpu else "cuda"):
        return None
    types, window = [x.__class__ for x in request], request.window
    if not _KEPT.issuperset(types):
        return None
    if window is not None and (window.__class__ is not tuple or not _SIDES.issuperset([x.__class__ for x in window])):
        return None
    # True equals 1, and must not be taken for it.
    if types.count(bool) != 2 or request.causal.__class__ is not bool or request.return_lse.__class__ is not bool:
        return None
    try:
        values: tuple[Any, ...] = request
        if packing:
            if not _PACKING.issuperset([x.__class__ for x in packing]):
                return None
            values = (*request, *packing, packing[0] is packing[1])
        if packing or not _NUMBERS.issuperset(types):
            tensors = request.sm_n, request.sinks, request.attn_mask  # of others more than the metadata decides
            if len([x for x in types if x in PLAIN]) != len([x for x in tensors if x.__class__ in PLAIN]):
                return None
            values = tuple([_metadata(x) if x.__class__ in PLAIN else x for x in values])
        enabled = torch.is_grad_enabled()
        needed = enabled and (q.requires_grad or k.requires_grad or v.requires_grad)
        return (
            values, q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, k.dtype, v.dtype,
            q.device, k.device, v.device, enabled, needed,
            forced.forced(request.backend), registry.generation(), torch.are_deterministic_algorithms_enabled(),
            q.dtype is torch.float32 and torch.get_float32_matmul_precision(),
        )  # fmt: skip
    except (RuntimeError, _NoMetadata):  # sparse and nested tensors have no strides
        return None


class _NoMetadata(Exception):
    """A tensor is more than its metadata say."""


def _metadata(x: Tensor) -> tuple[Any, ...]:
    if x.is_neg():
        raise _NoMetadata
    return x.shape, x.stride(), x.dtype, x.device, x.requires_grad


def get(key: Key | None) -> PreparedCall | None:
    try:
        return None if key is None else _calls.get(key)
    except TypeError:  # a list, say, cannot be part of a key; nor is it right
        return None


def put(key: Key, call: PreparedCall) -> None:
    if _is_current(key):
        _calls.put(key, call)


def _is_current(key: Key) -> bool:
    """Return False if backends were loaded or registered since: the call may be of those before."""
    *_, generation, _, _ = key
    return bool(generation == registry.generation())


def get_similar(
    key: Key | None, q: Tensor, k: Tensor, v: Tensor, request: Request, packing: tuple[Any, ...] = ()
) -> PreparedCall | None:
    """A call at lengths that are new, prepared as one of its kind was."""
    if key is None or not _kinds:
        return None
    try:
        kind = _kind(key, q, k, v, request, packing)
        known = None if kind is None else _kinds.get(kind)
    except (TypeError, ValueError):  # of an argument that is not what it should be, as a check will say
        return None
    if known is None:
        return None
    call = known.at_other_lengths(packing)
    put(key, call)
    return call


def put_kind(
    key: Key, q: Tensor, k: Tensor, v: Tensor, request: Request, packing: tuple[Any, ...], call: PreparedCall
) -> None:
    kind = _kind(key, q, k, v, request, packing)
    if kind is not None and _is_current(key):
        _kinds.put(kind, call)


def _kind(
    key: Key, q: Tensor, k: Tensor, v: Tensor, request: Request, packing: tuple[Any, ...]
) -> tuple[Any, ...] | None:
    of_shapes = similar.kind(q, k, v, request, packing)
    if of_shapes is None:
        return None
    values, *_ = key
    if packing:  # without the lengths of the longest sequences
        values = values[: len(request) + 2]
    return values, of_shapes, key[7:]


def clear() -> None:
    _calls.clear()
    _kinds.clear()
