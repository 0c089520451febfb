"""What was found out about a call, for the next call that looks the same.

Checking, describing and choosing take some 15 us of Python, several times that when a kernel has just emptied the
caches. A call of plain tensors and numbers depends on nothing but what `key` collects.
"""

from __future__ import annotations

from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attn_n.autograd import operators
from attn_n.backends import registry
from attn_n.call import Options, Request, checks
from attn_n.dispatch import forced

_VALUES = frozenset((NoneType, bool, int, float, tuple, str))
_MOST = 1024  # then they are forgotten: lengths may never come again

Key = tuple[Any, ...]


class Plan(NamedTuple):
    """How to run a call whose tensors are canonical as they come."""

    options: Options
    how: operators.How
    needs_grad: bool


_plans: dict[Key, Plan] = {}


def key(q: Tensor, k: Tensor, v: Tensor, request: Request) -> Key | None:
    """All that the plan of a call depends on, if it is a call that can be planned."""
    if operators.watched(q) or type(k) not in checks.PLAIN or type(v) not in checks.PLAIN:
        return None
    device = "cpu" if q.is_cpu else "cuda" if q.is_cuda else None
    if device is None or torch.is_autocast_enabled(device):
        return None
    window, of_n = request.window, None
    learned = q.requires_grad or k.requires_grad or v.requires_grad
    n = tensor_n(request)
    if q.is_neg() or k.is_neg() or v.is_neg() or (n is not None and n.is_neg()):
        return None
    # The values of a tensor on a CPU are looked at in each call.
    if n is not None and not checks.readable(n):
        learned, of_n = learned or n.requires_grad, (n is request.sinks, n.shape, n.dtype, n.device)
        request = request._replace(sm_n=None) if n is request.sm_n else request._replace(sinks=None)
    try:
        shapes = q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride()
    except RuntimeError:  # sparse or nested: no such call is served
        return None
    # The types as well, and first: True equals 1, and must not be taken for it.
    return (
        tuple(map(type, request)), request, tuple(map(type, window)) if type(window) is tuple else (),
        shapes, q.dtype, k.dtype, v.dtype,
        q.device, k.device, v.device, torch.is_grad_enabled() and learned, of_n,
        forced.forced(request.backend), registry.generation(),
    )  # fmt: skip


def tensor_n(request: Request) -> Tensor | None:
    """n or log n, if it is a plain tensor."""
    n = request.sm_n if request.sinks is None else request.sinks
    return n if type(n) in checks.PLAIN else None  # type: ignore[return-value]


def find(known: Key | None) -> Plan | None:
    try:
        return None if known is None else _plans.get(known)
    except TypeError:  # a list, say, cannot be part of a key; nor is it right
        return None


def keep(known: Key, plan: Plan) -> None:
    types, _, sides, *_, generation = known
    if not _VALUES.issuperset(types) or not _VALUES.issuperset(sides):
        return
    # Backends were loaded or registered since: the plan may be of those before, and its key will not be asked for.
    if generation != registry.generation():
        return
    if len(_plans) >= _MOST:
        forget()
    _plans[known] = plan


def forget() -> None:
    _plans.clear()
