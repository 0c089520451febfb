"""What was found out about a call, for the next call that looks the same.

Checking, describing and choosing take some 15 us of Python, several times that when a kernel has just emptied the
caches. A call of plain tensors and numbers depends on nothing but what `key` collects.
"""

from __future__ import annotations

from types import NoneType
from typing import NamedTuple

import torch
from torch import Tensor

from attn_n import ops, registry, validate
from attn_n.call import Options, Request

_VALUES = frozenset((NoneType, bool, int, float, tuple, str))
_MOST = 1024  # then they are forgotten: lengths may never come again


class Plan(NamedTuple):
    """How to run a call whose tensors are canonical as they come."""

    backend: str
    log_n: float | None
    options: Options
    needs_grad: bool


_plans: dict[object, Plan] = {}


def key(q: Tensor, k: Tensor, v: Tensor, request: Request) -> object | None:
    """All that the plan of a call depends on; None for a call that is planned anew each time."""
    if ops.watched(q) or type(k) not in ops.PLAIN or type(v) not in ops.PLAIN:
        return None
    values, window, of_n = tuple(request), request.window, None
    n = tensor_n(request)
    # The values of a tensor on a CPU are looked at in each call.
    if n is not None and type(n) in ops.PLAIN and not validate.readable(n):
        values = (*request[:2], request.sm_n if n is request.sinks else None, *request[4:])
        of_n = n is request.sinks, n.shape, n.dtype, n.device
    types = tuple(map(type, values))
    sides = tuple(map(type, window)) if type(window) is tuple else ()
    if not _VALUES.issuperset(types) or tuple in sides or not _VALUES.issuperset(sides):
        return None
    device = "cpu" if q.is_cpu else "cuda" if q.is_cuda else None
    if device is None or torch.is_autocast_enabled(device):
        return None
    learned = q.requires_grad or k.requires_grad or v.requires_grad or (n is not None and n.requires_grad)
    # The types as well: True equals 1, and must not be taken for it.
    return (
        q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, k.dtype, v.dtype,
        q.device, k.device, v.device, torch.is_grad_enabled() and learned, of_n, values, types, sides,
        registry.forced(request.backend), registry.generation(),
    )  # fmt: skip


def tensor_n(request: Request) -> Tensor | None:
    """n or log n, if it is a tensor."""
    n = request.sm_n if request.sinks is None else request.sinks
    return n if isinstance(n, Tensor) else None


def find(known: object | None) -> Plan | None:
    return None if known is None else _plans.get(known)


def keep(known: object, plan: Plan) -> None:
    if len(_plans) >= _MOST:
        forget()
    _plans[known] = plan


def forget() -> None:
    _plans.clear()
