"""The cache of prepared calls, keyed by everything that checking, choosing and preparing depend on.

That is metadata: no key holds a tensor or an address. What depends on the contents of a tensor is looked at in each
call, which is the case for a tensor of n, and on a CPU for `cu_seqlens` and for the lengths in use.
"""

from __future__ import annotations

import operator
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from attn_n.autograd.prepared import PreparedCall
from attn_n.backends import registry
from attn_n.cache.append import Append
from attn_n.call import CacheRequest, Request, autocast, transforms
from attn_n.call.checks import PLAIN
from attn_n.dispatch import forced, similar
from attn_n.recent import Recent

Key = tuple[Any, ...]

# Of a tensor; its shape comes first, because calls of one kind leave it out.
_of_tensor = operator.attrgetter("shape", "dtype", "device", "requires_grad", "layout")

# The types of arguments that a key may hold: numbers and names, and tensors by their metadata.
_NUMBERS = frozenset((NoneType, bool, int, float, str, tuple))
_KEPT = _NUMBERS.union(PLAIN)
# The places of the tensors of a request of which the metadata decide; of the others more than that does.
_TENSORS = [
    Request._fields.index(name) for name in ("sm_n", "sinks", "attn_mask", "seqused_q", "seqused_k", "leftpad_k")
]

_calls: Recent[Key, PreparedCall] = Recent()
_kinds: Recent[tuple[Any, ...], PreparedCall] = Recent()
over_cache: Recent[Key, tuple[PreparedCall, Append | None]] = Recent()  # by `key_over_cache`


def key(q: Tensor, k: Tensor, v: Tensor, request: Request, packing: tuple[Any, ...] = ()) -> Key | None:
    """None if the call is not kept: somebody watches it, an argument is of a type of its own, or it has ALiBi.

    `packing` are `cu_seqlens_q` and `cu_seqlens_k`, and the longest of their sequences.
    """
    if q.__class__ not in PLAIN or k.__class__ not in PLAIN or v.__class__ not in PLAIN or transforms.watched():
        return None
    if q.is_neg() or k.is_neg() or v.is_neg() or not (q.is_cuda or q.is_cpu):
        return None
    types, window, device = tuple(map(type, request)), request.window, "cuda" if q.is_cuda else "cpu"
    values: tuple[Any, ...] = request
    try:
        if packing or not _NUMBERS.issuperset(types):
            values = _with_metadata(request, packing)
        if window is not None:  # its numbers, too, may equal another one of a type that is refused
            types += tuple(map(type, window))
        return (
            values, types, _of_tensor(q), _of_tensor(k), _of_tensor(v), q.stride(), k.stride(), v.stride(),
            torch.is_grad_enabled(), torch.is_autocast_enabled(device) and autocast.dtype(device),
            forced.surroundings(), registry.generation, torch._C._get_deterministic_algorithms(),
            q.dtype is torch.float32 and torch.get_float32_matmul_precision(),
        )  # fmt: skip
    except (RuntimeError, TypeError, _NoMetadata):  # nested tensors and some sparse ones have no strides
        return None


def key_over_cache(q: Tensor, k: Tensor, v: Tensor, request: Request, cache: CacheRequest) -> Key | None:
    """`key` of a call over a KV cache. None also for a number `cache_seqlens`, which grows with each token."""
    if cache.cache_seqlens.__class__ is int:
        return None
    of_call = key(q, k, v, request)
    if of_call is None:
        return None
    types = tuple([x.__class__ for x in cache])
    if not _KEPT.issuperset(types):
        return None
    try:
        return (*of_call, types, *[_metadata(x) if x.__class__ in PLAIN else x for x in cache])
    except _NoMetadata:
        return None


class _NoMetadata(Exception):
    """A tensor is more than its metadata say."""


def _with_metadata(request: Request, packing: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments with metadata in place of the tensors."""
    values: list[Any] = list(request)
    for place in _TENSORS:
        if values[place].__class__ in PLAIN:
            values[place] = _metadata(values[place])
    if not _NUMBERS.issuperset(map(type, values)):
        raise _NoMetadata
    values.append(request.seqused_q is request.seqused_k)  # one tensor: kernels know the diagonal
    if packing:
        starts_q, starts_k, longest_q, longest_k = packing
        if starts_q.__class__ not in PLAIN or starts_k.__class__ not in PLAIN:
            raise _NoMetadata
        if longest_q.__class__ is not int or longest_k.__class__ is not int:
            raise _NoMetadata
        values += _metadata(starts_q), _metadata(starts_k), starts_q is starts_k, longest_q, longest_k
    return tuple(values)


def _metadata(x: Tensor) -> tuple[Any, ...]:
    if x.is_neg():
        raise _NoMetadata
    return _of_tensor(x), x.stride()


def get(key: Key | None) -> PreparedCall | None:
    try:
        return None if key is None else _calls.get(key)
    except TypeError:  # a list, say, cannot be part of a key; nor is it right
        return None


def get_over_cache(key: Key | None) -> tuple[PreparedCall, Append | None] | None:
    try:
        return None if key is None else over_cache.get(key)
    except TypeError:
        return None


def put(key: Key, call: PreparedCall) -> None:
    """Keep a call. If backends were loaded or registered since its key was made, no key will be equal to that again."""
    _calls.put(key, call)


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
    if kind is not None:
        _kinds.put(kind, call)


def _kind(
    key: Key, q: Tensor, k: Tensor, v: Tensor, request: Request, packing: tuple[Any, ...]
) -> tuple[Any, ...] | None:
    of_shapes = similar.kind(q, k, v, request, packing)
    if of_shapes is None:
        return None
    values, types, of_q, of_k, of_v, _, _, _, *rest = key
    if packing:  # without what may differ: the lengths, and whether q and k have the same ones
        values = values[:-3]
    return values, types, of_shapes, of_q[1:], of_k[1:], of_v[1:], *rest


def clear() -> None:
    _calls.clear()
    _kinds.clear()
    over_cache.clear()
