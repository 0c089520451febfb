"""What the fused kernels share: the check of PyTorch's private operators."""

from __future__ import annotations

from functools import cache

import torch

from attn_n.call import AttentionCall
from attn_n.compilation import constant_when_compiled


@constant_when_compiled
def changed_operator(*signatures: str) -> str | None:
    """Why the private operators cannot be called, given `"name(arg, arg, ...) -> results"` of what is relied upon.

    PyTorch may change them in any release: the positional arguments must begin as given, the keywords behind a `*`
    must exist, and the number of results must agree.
    """
    return next((reason for reason in map(_changed, signatures) if reason is not None), None)


@cache
def _changed(signature: str) -> str | None:
    name, _, rest = signature.partition("(")
    arguments, _, results = rest.partition(") -> ")
    positional, _, keywords = arguments.partition(", *, ")
    operator = getattr(torch.ops.aten, name, None)
    if operator is None:
        return f"PyTorch {torch.__version__} has no operator aten::{name}"
    schema = operator.default._schema
    by_position = [argument for argument in schema.arguments if not argument.kwarg_only]
    wanted = positional.split(", ")
    if (
        [argument.name for argument in by_position[: len(wanted)]] != wanted
        or not all(argument.has_default_value() for argument in by_position[len(wanted) :])
        or not {argument.name for argument in schema.arguments}.issuperset(keywords.split(", ") if keywords else ())
        or len(schema.returns) != int(results)
    ):
        return f"PyTorch {torch.__version__} has changed its operator aten::{name}: {schema}"
    return None


def unserved_field(call: AttentionCall) -> str | None:
    """Why none of PyTorch's fused kernels serves the call, whatever the device."""
    if call.softcap is not None:
        return "PyTorch's fused kernels have no softcap"
    if call.mask_needs_grad:
        return "no gradient of attn_mask"
    if call.alibi_needs_grad:
        return "no gradient of alibi_slopes"
    return None
