"""The formulas for torch.utils.flop_counter: matmuls over whole rectangles of queries and keys, as PyTorch counts SDPA.

A causal mask or a window leaves the count as it is. Packed sequences count by their lengths where these can be read,
otherwise by the longest ones.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from attn_n.call import Options
from attn_n.compilation import constant_when_compiled

_registered = False


@constant_when_compiled  # runs it once, while it traces
def register() -> None:
    """Tell the flop counter, if there is one: importing its module would import Triton.

    A counter that has been entered before has a copy of the formulas, which gets ours as well.
    """
    global _registered
    counter = sys.modules.get("torch.utils.flop_counter")
    if counter is None or _registered:
        return
    _registered = True
    formulas = {
        torch.ops.attn_n.forward: _forward,
        torch.ops.attn_n.forward_with_dropout: _forward,
        torch.ops.attn_n.backward: _backward,
    }
    for operator, formula in formulas.items():
        counter.register_flop_formula(operator, get_raw=True)(formula)
    for mode in _get_current_dispatch_mode_stack():
        known = getattr(getattr(mode, "counter", None), "flop_registry", None)
        if known is not None:
            known.update({operator: counter.flop_registry[operator] for operator in formulas})


def _forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **_: Any) -> int:
    """Q K^T and P V."""
    options = Options(*rest[5 : 5 + len(Options._fields)])
    return 2 * q.shape[1] * _pairs(q, k, options) * (q.shape[-1] + v.shape[-1])


def _backward(dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **_: Any) -> int:
    """Q K^T once more, dO V^T, P^T dO, dS K and dS^T Q."""
    options = Options(*rest[9 : 9 + len(Options._fields)])
    return 2 * q.shape[1] * _pairs(q, k, options) * (3 * q.shape[-1] + 2 * v.shape[-1])


def _pairs(q: Tensor, k: Tensor, options: Options) -> int:
    """Pairs of a query and a key, of one head."""
    starts_q, starts_k = options.cu_seqlens_q, options.cu_seqlens_k
    if starts_q is None or starts_k is None:
        return q.shape[0] * q.shape[2] * k.shape[2]
    if type(starts_q) is not Tensor or starts_q.is_meta:  # fake tensors have no values
        return (starts_q.shape[0] - 1) * options.max_seqlen_q * options.max_seqlen_k
    return int((starts_q.diff().long() * starts_k.diff().long()).sum())
