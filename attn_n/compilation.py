"""Workarounds for torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable[..., object])


def constant_when_compiled(function: F) -> F:
    """Have torch.compile call `function` while it traces, and keep the result as a constant.

    `torch.compiler.assume_constant_result` does this too, but would import all of torch._dynamo with `import attn_n`.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
