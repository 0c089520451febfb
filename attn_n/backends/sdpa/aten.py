"""What the fused kernels share: the check of PyTorch's private operators, and the shapes that they take."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_n.call import AttentionCall


@cache
def changed_operator(*signatures: str) -> str | None:
    """Why the private operators cannot be called, given `"name(arg, arg, ...) -> results"` of what is relied upon.

    PyTorch may change them in any release: the positional arguments must begin as given, the keywords behind a `*`
    must exist, and the number of results must agree.
    """
    for signature in signatures:
        name, _, rest = signature.partition("(")
        arguments, _, results = rest.partition(") -> ")
        positional, _, keywords = arguments.partition(", *, ")
        operator = getattr(torch.ops.aten, name, None)
        if operator is None:
            return f"PyTorch {torch.__version__} has no operator aten::{name}"
        schema = operator.default._schema
        present = [argument.name for argument in schema.arguments if not argument.kwarg_only]
        known = [argument.name for argument in schema.arguments]
        wanted = positional.split(", ")
        optional = [a for a in schema.arguments if not a.kwarg_only][len(wanted) :]
        if (
            present[: len(wanted)] != wanted
            or not all(argument.has_default_value() for argument in optional)
            or not all(keyword in known for keyword in keywords.split(", ") if keyword)
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


def of_width(x: Tensor, width: int) -> Tensor:
    """x with its last dimension contiguous and filled up to `width` with zeros; x itself if it is so already."""
    if x.shape[-1] != width:
        return F.pad(x, (0, width - x.shape[-1]))
    return x if x.stride(-1) == 1 else x.contiguous()
