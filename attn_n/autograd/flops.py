"""The formulas for torch.utils.flop_counter, which count matmuls over all pairs of queries and keys, as for SDPA.

A causal mask or a window does not change the count. Varlen sequences count by their lengths where these can be read,
otherwise by the longest ones.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from attn_n.call import Options
from attn_n.compilation import constant_when_compiled

# The numbers of matmuls of E and of Ev columns. Forward: Q K^T; P V. Backward: Q K^T, dS K, dS^T Q; dO V^T, P^T dO.
_FORWARD, _BACKWARD = (1, 1), (3, 2)


@constant_when_compiled  # runs it once, while it traces
def register() -> None:
    """Register the formulas if the flop counter has been imported; importing it here would import Triton.

    An active counter has a copy of the formulas, to which ours are added as well.
    """
    counter = sys.modules.get("torch.utils.flop_counter")
    if counter is None:
        return
    operators = torch.ops.attn_n
    formulas = {
        operators.forward: _formula(operators.forward, _FORWARD),
        operators.forward_with_dropout: _formula(operators.forward_with_dropout, _FORWARD),
        operators.backward: _formula(operators.backward, _BACKWARD),
    }
    if operators.forward not in counter.flop_registry:
        for operator, formula in formulas.items():
            counter.register_flop_formula(operator, get_raw=True)(formula)
    for mode in _get_current_dispatch_mode_stack():
        known = getattr(getattr(mode, "counter", None), "flop_registry", None)
        if known is not None and operators.forward not in known:
            known.update({operator: counter.flop_registry[operator] for operator in formulas})


def _formula(operator: Any, matmuls: tuple[int, int]) -> Callable[..., Any]:
    names = [argument.name for argument in operator.default._schema.arguments]

    def count(*arguments: Any, **_: Any) -> Any:
        named = dict(zip(names, arguments, strict=False))
        q, v, (with_e, with_ev) = named["q"], named["v"], matmuls
        pairs = _pairs(q, named["k"], Options(*(named[name] for name in Options._fields)))
        return 2 * q.shape[1] * pairs * (with_e * q.shape[-1] + with_ev * v.shape[-1])

    return count


def _pairs(q: Tensor, k: Tensor, options: Options) -> int:
    """Return the number of pairs of a query and a key in one head."""
    starts_q, starts_k = options.cu_seqlens_q, options.cu_seqlens_k
    if starts_q is None or starts_k is None:
        return q.shape[0] * q.shape[2] * k.shape[2]
    if type(starts_q) is not Tensor or starts_q.is_meta:  # fake tensors have no values
        return (starts_q.shape[0] - 1) * options.max_seqlen_q * options.max_seqlen_k
    return int((starts_q.diff().long() * starts_k.diff().long()).sum())
