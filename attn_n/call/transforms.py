"""Detection of the transforms around a call: forward-mode AD, torch.func and torch.vmap."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad

from attn_n.call.checks import PLAIN
from attn_n.compilation import constant_when_compiled


def beyond_one_backward(*tensors: Tensor | None) -> str | None:
    """Return the transform under which an explicit backward cannot serve (forward-mode AD, a second derivative)."""
    levels = _levels()
    if torch.compiler.is_compiling() and "Grad" in levels:  # torch.compile cannot trace an autograd.Function there
        return "a gradient of torch.func within torch.compile"
    if "Jvp" in levels or have_tangents(*tensors):
        return "forward-mode AD"
    gradients = [level for level in levels if level == "Grad"]
    return "differentiated twice by torch.func" if len(gradients) > 1 else None


def have_tangents(*tensors: Tensor | None) -> bool:
    """Return True if one of the tensors has a tangent of forward-mode AD."""
    if forward_ad._current_level < 0:
        return False
    if torch.compiler.is_compiling():  # torch.compile cannot trace unpack_dual
        return True
    # A tensor that torch.vmap wraps cannot be asked.
    return any(
        x is not None and (_functorch.is_batchedtensor(x) or forward_ad.unpack_dual(x).tangent is not None)
        for x in tensors
    )


def by_functional_gradient() -> bool:
    """Return True within a gradient of torch.func. (torch.vmap alone, also within autograd, is none.)"""
    return "Grad" in _levels()


def requires_grad(x: Tensor | None) -> bool:
    """Return True if x requires a gradient, also within the wrappers of torch.vmap, which hide that."""
    if x is None:
        return False
    if torch.compiler.is_compiling():  # torch.compile cannot look into these wrappers
        return x.requires_grad or (x.is_floating_point() and "Vmap" in _levels())
    while not x.requires_grad:
        if not _functorch.is_functorch_wrapped_tensor(x):
            return False
        x = _functorch.get_unwrapped(x)
    return True


@constant_when_compiled  # while it traces, torch.compile runs under the same functorch levels
def _levels() -> tuple[str, ...]:
    """Return the levels of functorch from the outermost to the innermost: "Grad", "Jvp", "Vmap", "Functionalize"."""
    if not torch._C._are_functorch_transforms_active():
        return ()
    stack: Any = _functorch.get_interpreter_stack()
    return tuple(level.key().name for level in stack)


def needs_dispatcher(x: Tensor) -> bool:
    """Return True if the call has to be an operator: under what `watched` names, and for a tensor subclass."""
    return watched() or type(x) not in PLAIN


def watched() -> bool:
    """Return True under torch.compile, a dispatch mode (as checkpoints set), functorch, tracing and forward-mode AD."""
    if torch.compiler.is_compiling():
        return True
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_tracing()
        or forward_ad._current_level >= 0
    )


def is_batched(x: Tensor | None) -> bool:
    """By torch.autograd.grad(is_grads_batched=True)."""
    return x is not None and _functorch.is_legacy_batchedtensor(x)
