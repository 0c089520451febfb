"""Which of PyTorch's ways to differentiate and to batch surround a call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad

from attn_n.compilation import constant_when_compiled


def beyond_one_backward(*tensors: Tensor | None) -> str | None:
    """Why kernels with an explicit backward cannot serve: forward-mode AD, or a gradient of a gradient."""
    levels = _levels()
    if torch.compiler.is_compiling() and "Grad" in levels:  # it traces no autograd.Function there
        return "a gradient of torch.func within torch.compile"
    if "Jvp" in levels or have_tangents(*tensors):
        return "forward-mode AD"
    gradients = [level for level in levels if level == "Grad"]
    return "differentiated twice by torch.func" if len(gradients) > 1 else None


def have_tangents(*tensors: Tensor | None) -> bool:
    """Whether forward-mode AD takes the tangent of one of them along."""
    if forward_ad._current_level < 0:
        return False
    if torch.compiler.is_compiling():  # which cannot trace the question
        return True
    # What torch.vmap wraps cannot be asked.
    return any(
        x is not None and (_functorch.is_batchedtensor(x) or forward_ad.unpack_dual(x).tangent is not None)
        for x in tensors
    )


def by_functional_gradient() -> bool:
    """Whether torch.func computes a gradient. (torch.vmap alone, and autograd around it, need none.)"""
    return "Grad" in _levels()


def requires_grad(x: Tensor | None) -> bool:
    """Whether x has a gradient to come, also where torch.vmap has hidden that in what it wraps."""
    if x is None:
        return False
    if torch.compiler.is_compiling():  # there nobody can look into what torch.vmap wraps
        return x.requires_grad or (x.is_floating_point() and "Vmap" in _levels())
    while not x.requires_grad:
        if not _functorch.is_functorch_wrapped_tensor(x):
            return False
        x = _functorch.get_unwrapped(x)
    return True


@constant_when_compiled  # while it traces, torch.compile runs under the same functorch levels
def _levels() -> tuple[str, ...]:
    """Those of functorch, from the outermost to the innermost: "Grad", "Jvp", "Vmap", "Functionalize"."""
    if not torch._C._are_functorch_transforms_active():
        return ()
    stack: Any = _functorch.get_interpreter_stack()
    return tuple(level.key().name for level in stack)
