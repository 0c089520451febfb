"""The cache of prepared calls, keyed by everything that checking, choosing and preparing depend on.

That is metadata: no key holds a tensor or an address. What depends on the contents of a tensor is looked at in each
call, which is the case for a tensor of n and for `cu_seqlens` on a CPU.
"""

from __future__ import annotations

from types import NoneType
from typing import Any

import torch
from torch import Tensor

from attn_n.autograd.operators import PreparedCall, needs_dispatcher
from attn_n.backends import registry
from attn_n.call import Request
from attn_n.call.checks import PLAIN
from attn_n.dispatch import forced

_VALUES = frozenset((NoneType, bool, int, float, str, *PLAIN))
_MOST = 4096  # then all are dropped: lengths may never come again

Key = tuple[Any, ...]

_calls: dict[Key, PreparedCall] = {}


def key(q: Tensor, k: Tensor, v: Tensor, request: Request, packing: tuple[Any, ...] = ()) -> Key | None:
    """None if the call cannot be kept: somebody watches it, an argument is of a type of its own, or it has ALiBi.

    `packing` are `cu_seqlens_q` and `cu_seqlens_k`, and the longest of their sequences.
    """
    if needs_dispatcher(q) or type(k) not in PLAIN or type(v) not in PLAIN or q.is_neg() or k.is_neg() or v.is_neg():
        return None
    device = q.device
    kind = device.type
    if (kind != "cpu" and kind != "cuda") or torch.is_autocast_enabled(kind) or request.alibi_slopes is not None:
        return None
    try:
        # The types come first: True equals 1, and must not be taken for it.
        types: tuple[type, ...] = tuple([type(x) for x in request])
        values: tuple[Any, ...] = request
        if request.window.__class__ is tuple:
            types = (*types, *[type(side) for side in request.window])
        if packing:
            types, values = (*types, *[type(x) for x in packing]), (*request, *packing, packing[0] is packing[1])
        if packing or request.sinks is not None or request.attn_mask is not None or request.sm_n.__class__ in PLAIN:
            values = tuple([_metadata(x) if x.__class__ in PLAIN else x for x in values])
        gradients = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        return (
            types, values, q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, k.dtype, v.dtype,
            device, k.device, v.device, gradients, torch.is_grad_enabled(), forced.forced(request.backend),
            registry.generation(), torch.are_deterministic_algorithms_enabled(),
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
    types, *_, generation, _, _ = key
    if not _VALUES.issuperset([x for x in types if x is not tuple]):
        return
    # Backends were loaded or registered since: the call may be of those before, and its key will not be asked for.
    if generation != registry.generation():
        return
    if len(_calls) >= _MOST:
        clear()
    _calls[key] = call


def clear() -> None:
    _calls.clear()
