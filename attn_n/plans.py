"""What was found out about a call, for the next call that looks the same.

Checking, describing and choosing take some 15 us of Python, several times that when a kernel has just emptied the
caches. A call of plain tensors and numbers depends on nothing but what `key` collects.
"""

from __future__ import annotations

from types import NoneType
from typing import NamedTuple

import torch
from torch import Tensor

from attn_n import registry
from attn_n.call import Options, Request

_PLAIN = (Tensor, torch.nn.Parameter)
_NUMBERS = frozenset((NoneType, int, float))
_OTHERS = frozenset((NoneType, bool, tuple))
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
    if torch.compiler.is_compiling() or not (type(q) in _PLAIN and type(k) in _PLAIN and type(v) in _PLAIN):
        return None
    if request.sinks is not None or request.attn_mask is not None or request.alibi_slopes is not None:
        return None
    scale, window, device = request.sm_scale, request.window, q.device
    # Exact types: True equals 1, and must not be taken for it.
    numbers = (scale, request.sm_n, request.softcap, request.dropout_p, *(window if type(window) is tuple else ()))
    others = (request.causal, request.return_lse, window)
    if not _NUMBERS.issuperset(map(type, numbers)) or not _OTHERS.issuperset(map(type, others)):
        return None
    if q.dim() != 4 or (scale is not None and scale <= 0):  # other tensors than the user's are attended to
        return None
    if device.type not in ("cpu", "cuda") or torch.is_autocast_enabled(device.type):
        return None
    gradient = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return (
        q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, k.dtype, v.dtype,
        device, k.device, v.device, gradient, request, registry.forced(request.backend), registry.generation(),
    )  # fmt: skip


def find(known: object | None) -> Plan | None:
    return None if known is None else _plans.get(known)


def keep(known: object, plan: Plan) -> None:
    if len(_plans) >= _MOST:
        forget()
    _plans[known] = plan


def forget() -> None:
    _plans.clear()
